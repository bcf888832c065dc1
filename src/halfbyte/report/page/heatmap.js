// What a cell can show: a number of each linear, how it reads, and whether colours go by its logarithm.
const MEASURES = [
  { key: "output_error", title: "output error, E‖ΔWx‖² / E‖Wx‖²", text: percent, log: true },
  { key: "output_snr_db", title: "signal-to-noise ratio of the outputs, dB", text: decibels },
  { key: "weight_error", title: "weight error, ‖ΔW‖² / ‖W‖²", text: percent, log: true },
  { key: "recorded_rtn", title: "plain rounding, as quantize measured it", text: percent, log: true },
  { key: "recorded_stored", title: "as stored, as quantize measured it", text: percent, log: true },
  { key: "stages_gain_db", title: "gained by all stages, dB", text: decibels },
  { key: "zero_point_gain_db", title: "gained by a zero point, dB", text: decibels },
  { key: "bits", title: "bits of a code", text: num },
  { key: "bias", title: "rounding bias, steps", text: fixed(4) },
  { key: "clipped", title: "share clipped", text: percent },
  { key: "moved", title: "share moved by compensated rounding", text: percent },
  { key: "activation_share", title: "share of E|x| of the critical 1 % of channels", text: percent },
  { key: "scale_ratio", title: "scale of the critical channels over all", text: times, log: true },
];
// Cividis (Nuñez, Anderton, Renslow 2018): the same order to every kind of eye.
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

function cividis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const [low, high] = [Math.floor(at), Math.ceil(at)];
  return `rgb(${CIVIDIS[low].map((part, index) => Math.round(part + (CIVIDIS[high][index] - part) * (at - low))).join(" ")})`;
}

const leaf = (kind) => kind.split(".").pop();

function shortNames(kinds) {
  const leaves = kinds.map(leaf);
  return new Set(leaves).size === leaves.length ? leaves : kinds;
}

// Blocks from left to right, kinds of linear from top to bottom. `open(indices)` shows the linears of a cell.
function heatmap(model, open) {
  const { kind, block } = model.columns;
  const kinds = [...new Set(kind)];
  const blocks = [...new Set(block)].sort((a, b) => a - b);
  const cells = kinds.map(() => blocks.map(() => []));
  const [row, column] = [new Map(kinds.map((name, index) => [name, index])), new Map(blocks.map((number, index) => [number, index]))];
  kind.forEach((name, index) => cells[row.get(name)][column.get(block[index])].push(index));
  const short = shortNames(kinds);
  const nodes = cells.map((line, y) => line.map((members, x) => el("td", {
    role: "gridcell", tabindex: "-1", class: members.length ? null : "none",
    onclick: () => { focus(y, x); if (members.length) open(members); },
  })));
  const table = el("table", { class: "heat", role: "grid", "aria-label": "Linears: kinds by decoder block. Arrow keys move, Enter opens.", onkeydown: keys },
    el("thead", {}, el("tr", { role: "row" }, el("th", { scope: "col" }, "block"), blocks.map((number) => el("th", { scope: "col", role: "columnheader" }, String(number))))),
    el("tbody", {}, nodes.map((line, y) => el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader", class: "name", title: kinds[y] }, short[y]), line))));
  const legend = el("div", { class: "scale" });
  let at = [0, 0];

  function focus(y, x) {
    nodes[at[0]][at[1]].tabIndex = -1;
    at = [Math.min(Math.max(y, 0), kinds.length - 1), Math.min(Math.max(x, 0), blocks.length - 1)];
    nodes[at[0]][at[1]].tabIndex = 0;
    nodes[at[0]][at[1]].focus();
  }

  function keys(event) {
    const [y, x] = at;
    const moves = { ArrowUp: [y - 1, x], ArrowDown: [y + 1, x], ArrowLeft: [y, x - 1], ArrowRight: [y, x + 1], Home: [y, 0], End: [y, blocks.length - 1], PageUp: [0, x], PageDown: [kinds.length - 1, x] };
    if (moves[event.key]) focus(...moves[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && cells[y][x].length) open(cells[y][x]);
    else return;
    event.preventDefault();
  }

  function paint(measure) {
    const values = model.columns[measure.key];
    const means = cells.map((line) => line.map((members) => mean(known(members.map((index) => values[index])))));
    const shown = known(means.flat()).filter((value) => !measure.log || value > 0).sort((a, b) => a - b);
    // One linear far from all others must not take the colours from them: they end at 2 % and 98 % of the cells.
    const cut = Math.floor(0.02 * shown.length);
    const [low, high] = [shown[cut], shown[shown.length - 1 - cut]];
    const share = (value) => {
      if (!(high > low)) return 0.5;
      return measure.log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
    };
    nodes.forEach((line, y) => line.forEach((node, x) => {
      const [value, members] = [means[y][x], cells[y][x]];
      if (!members.length) return;
      node.style.background = value === null ? "" : cividis(share(value));
      const what = `${kinds[y]}, block ${blocks[x]}: ${measure.text(value)}${members.length > 1 ? ` (mean of ${members.length})` : ""}`;
      node.title = what;
      node.setAttribute("aria-label", what);
    }));
    const ramp = el("i");
    ramp.style.background = `linear-gradient(to right, ${CIVIDIS.map((_, index) => cividis(index / (CIVIDIS.length - 1))).join(", ")})`;
    legend.replaceChildren(...(shown.length ? [el("span", {}, `${shown[0] < low ? "≤ " : ""}${measure.text(low)}`), ramp, el("span", {}, `${shown[shown.length - 1] > high ? "≥ " : ""}${measure.text(high)}`)] : ["nothing to show"]), measure.log ? el("span", { class: "quiet" }, "logarithmic") : "");
  }

  nodes[0][0].tabIndex = 0;
  const measures = MEASURES.filter((measure) => known(model.columns[measure.key]).length);
  const select = choice(measures.map((measure, index) => [index, measure.title]), (index) => paint(measures[index]));
  paint(measures[0]);
  return el("div", {}, el("div", { class: "controls" }, labelled("Show", select)), legend,
    el("p", { class: "note hint" }, "Click a cell, or move with the arrow keys and press Enter, to look into that linear."),
    el("div", { class: "scroll" }, table));
}
