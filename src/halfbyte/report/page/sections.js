function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...children);
}

function tile(value, text) {
  return el("div", { class: "tile" }, el("b", { class: "name" }, value), el("span", {}, text));
}

const called = (model) => (model.label ? `${model.label}: ${model.name}` : model.name);

function summary(data) {
  const tiles = [];
  const column = (title) => data.comparison && data.comparison.columns.find((one) => one.title === title);
  for (const [title, text, form] of [["compression", "smallest on disk, against A", times], ["perplexity", "lowest perplexity", fixed(2)], ["decode", "fastest decoding, tok/s", fixed(1)]]) {
    const one = column(title);
    const best = one ? bestOf(one) : null;
    if (best !== null) tiles.push(tile(form(best), `${text} (${data.comparison.labels[one.values.indexOf(best)]})`));
  }
  for (const model of data.models) {
    const { manifest, columns: c } = model;
    const of = model.label ? `${model.label}: ` : "";
    if (manifest.bits_per_weight && !data.comparison) {
      tiles.push(tile(`${fixed(2)(manifest.bits_per_weight)} bits`, `${of}a weight of the blocks, scales included`));
      tiles.push(tile(times(manifest.total_bytes_before / manifest.total_bytes_after), `${of}smaller: ${fixed(1)(manifest.total_bytes_after / 1e6)} of ${fixed(1)(manifest.total_bytes_before / 1e6)} MB`));
    }
    const snr = mean(known(c.output_snr_db));
    tiles.push(snr === null ? tile(decibels(mean(known(c.weight_snr_db))), `${of}mean SNR of the weights`) : tile(decibels(snr), `${of}mean SNR of the outputs of ${c.name.length} linears`));
    const key = snr === null ? "weight_error" : "output_error";
    const worst = c[key].reduce((found, value, index) => (value > c[key][found] ? index : found), 0);
    tiles.push(tile(percent(c[key][worst]), `${of}largest error, ${leaf(c.kind[worst])} of block ${c.block[worst]}`));
  }
  const node = section("summary", "Summary");
  if (data.comparison && data.comparison.provisional) node.append(el("p", { class: "warn" }, "Provisional: a quick comparison, with reduced calibration and measurement. Repeat it without --quick before deciding."));
  if (tiles.length) node.append(el("div", { class: "tiles" }, tiles));
  if (data.comparison) node.append(el("ul", {}, data.comparison.verdicts.map((text) => el("li", { class: "name" }, text))));
  for (const note of data.notes) node.append(el("p", { class: "warn name" }, note));
  return node;
}

// None where all are the same.
function bestOf(one) {
  const values = known(one.values);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return low < high ? (one.better === "lower" ? low : high) : null;
}

function comparison(found) {
  const rows = found.labels.map((label, index) => ({ label, name: found.names[index], engine: found.engines[index], index }));
  const measured = found.columns.map((one) => {
    const best = bestOf(one);
    const text = (value) => num(value, 4);
    return {
      title: one.unit ? `${one.title}, ${one.unit}` : one.title, value: (row) => one.values[row.index], best: (row) => best !== null && one.values[row.index] === best,
      node: (row) => [text(one.values[row.index]), one.spreads[row.index] ? el("span", { class: "spread" }, one.spreads[row.index].map(text).join(" – ")) : null],
    };
  });
  const p = (value) => (value === null ? "–" : value < 0.001 ? "< 0.001" : num(value, 2));
  const change = (value) => (value === null ? "–" : `${value > 1 ? "+" : value < 1 ? "−" : ""}${fixed(2)(Math.abs(100 * (value - 1)))} %`);
  return section("comparison", "Comparison",
    sortable({ caption: "Models; the best of each column is bold. Below perplexity and divergence: 95 % interval; below speeds: slowest and fastest round.", rows, columns: [{ title: "label", value: (row) => row.label, word: true, short: true }, { title: "model", value: (row) => row.name, word: true }, ...measured] }),
    el("div", { class: "charts" }, found.columns.filter((one) => known(one.values).length > 1).map((one) => bars({
      title: one.unit ? `${one.title}, ${one.unit}` : one.title, note: `${one.better} is better`, values: one.values, names: found.labels.map((label, index) => `${label}: ${found.names[index]}`),
      spreads: one.spreads, text: (value) => num(value, 4), best: bestOf(one),
    }))),
    el("h3", {}, "Pairs"),
    sortable({ caption: "The first of each pair against the second; p of equal perplexity, not corrected for several pairs", rows: found.pairs, columns: [
      { title: "pair", value: (row) => row.pair, word: true },
      { title: "perplexity", value: (row) => row.perplexity, text: (row) => change(row.perplexity) },
      { title: "95 % interval", value: (row) => row.interval && row.interval[0], text: (row) => (row.interval ? row.interval.map(change).join(" to ") : "–") },
      { title: "p", value: (row) => row.p_value, text: (row) => p(row.p_value) },
      { title: "prefill", value: (row) => row.prefill, text: (row) => times(row.prefill) },
      { title: "decode", value: (row) => row.decode, text: (row) => times(row.decode) },
    ].filter((column) => found.pairs.some((row) => column.value(row) !== null)) }),
    el("p", { class: "note name" }, `Text: ${found.text.name}, ${whole(found.text.tokens)} tokens in ${found.text.windows} windows of ${found.text.window}. Intervals: bootstrap over windows.`));
}

const VIEWS = {
  errors: [["output error", "output_error", percent], ["output SNR", "output_snr_db", decibels], ["weight SNR", "weight_snr_db", decibels], ["plain", "recorded_rtn", percent], ["scaled", "recorded_scaled", percent], ["ranged", "recorded_ranged", percent], ["stored", "recorded_stored", percent], ["zero point", "zero_point_gain_db", decibels]],
  rounding: [["up", "up", percent], ["down", "down", percent], ["exact", "exact", percent], ["bias, steps", "bias", fixed(4)], ["RMS, steps", "rms", fixed(3)], ["clipped", "clipped", percent], ["moved", "moved", percent], ["entropy, bits", "entropy", fixed(2)]],
  channels: [["critical", "critical", whole], ["of E|x|", "activation_share", percent], ["weights", "weight_ratio", times], ["scale", "scale_ratio", times], ["error, plain", "error_share_rtn", percent], ["error, stored", "error_share", percent], ["theirs left", "error_kept", times], ["others left", "others_kept", times]],
};
const VIEW_TITLES = { errors: "Errors", rounding: "Rounding", channels: "Salient channels" };

function linears(model, open) {
  const c = model.columns;
  const rows = c.name.map((name, index) => ({ name, index }));
  const holder = el("div");
  const shown = (view) => VIEWS[view].filter(([, key]) => known(c[key]).length);
  const draw = (view) => holder.replaceChildren(sortable({
    caption: `${VIEW_TITLES[view]} of ${rows.length} linears`, tall: true, rows, sorted: { title: shown(view)[0][0], up: false },
    columns: [
      { title: "linear", word: true, value: (row) => row.name, node: (row) => el("button", { type: "button", class: "link name", onclick: () => open([row.index]) }, row.name) },
      { title: "bits", value: (row) => c.bits[row.index] },
      ...shown(view).map(([title, key, text]) => ({ title, value: (row) => c[key][row.index], text: (row) => text(c[key][row.index]) })),
    ],
  }));
  const views = Object.keys(VIEWS).filter((view) => shown(view).length);
  draw(views[0]);
  return el("div", {}, el("h3", {}, "Every linear"), el("div", { class: "controls" }, labelled("Columns", choice(views.map((view) => [view, VIEW_TITLES[view]]), draw))), holder);
}

function kinds(model) {
  const c = model.columns;
  const rows = [...new Set(c.kind)].map((kind) => ({ kind, members: c.kind.flatMap((name, index) => (name === kind ? [index] : [])) }));
  const average = (key) => (row) => mean(known(row.members.map((index) => c[key][index])));
  const column = (title, key, text) => ({ title, value: average(key), text: (row) => text(average(key)(row)) });
  return sortable({
    caption: "Means by kind of linear", rows,
    columns: [
      { title: "kind", word: true, value: (row) => row.kind }, { title: "linears", value: (row) => row.members.length },
      ...[["output SNR", "output_snr_db", decibels], ["weight SNR", "weight_snr_db", decibels], ["plain", "recorded_rtn", percent], ["stored", "recorded_stored", percent], ["zero point", "zero_point_gain_db", decibels], ["up", "up", percent], ["down", "down", percent], ["bias, steps", "bias", fixed(4)], ["clipped", "clipped", percent], ["critical: of E|x|", "activation_share", percent], ["their scale", "scale_ratio", times]]
        .filter(([, key]) => known(c[key]).length).map((one) => column(...one)),
    ],
  });
}

function totals(model) {
  const { total } = model;
  return el("div", {}, el("h3", {}, "All weights together"),
    el("p", {}, `${whole(total.weights)} weights. A code of ${num(total.code_bits)} bits carries ${fixed(2)(total.entropy)} bits (entropy).`),
    el("div", { class: "charts" },
      histogram({ title: "Weights before and after", note: "in σ of their own linear, share on a logarithmic axis", series: [{ name: "16 bit", counts: total.before }, { name: `${num(total.code_bits)} bits`, counts: total.after }], limit: LIMITS.weights, xLabel: "weight, in σ", log: true }),
      histogram({ title: "Rounding error", note: "dashed: half a step, where rounding to nearest ends; the outermost bars hold all beyond", series: [{ name: "error", counts: total.errors }], limit: LIMITS.errors, xLabel: "error, steps", bounds: [-0.5, 0.5] }),
      Object.entries(total.codes).map(([bits, counts]) => codes(counts, bits))));
}

function profile(found) {
  const names = [...new Set(found.rows.map((row) => row.implementation))];
  const of = (name) => found.rows.filter((row) => row.implementation === name);
  const middle = (key) => [...found.rows.map((row) => row[key])].sort((a, b) => a - b)[Math.floor(found.rows.length / 2)];
  const [bandwidth, peak] = [middle("bandwidth"), middle("peak_flops")];
  const batches = [...new Set(found.rows.map((row) => row.batch_size))].sort((a, b) => a - b);
  const axis = { logX: true, logY: true, xTicks: batches, xLabel: "batch size" };
  const series = (x, y) => names.map((name) => ({ name, points: of(name).map((row) => [x(row), y(row)]) }));
  const roof = frameRoof(found.rows, bandwidth, peak);
  return section("profile", "Profile and roofline",
    el("p", { class: "name" }, `All linears of a decoder block of ${found.subject}, group size ${found.group_size}, on ${found.machine}.`),
    el("div", { class: "charts" },
      lines({ title: "Throughput", note: "median; band: quartiles", series: series((row) => row.batch_size, (row) => row.tokens_per_second), bands: Object.fromEntries(names.map((name) => [name, of(name).map((row) => [row.batch_size, row.batch_size / row.seconds_q75, row.batch_size / row.seconds_q25])])), yLabel: "tokens/s", ...axis }).figure,
      lines({ title: "Latency", note: "median", series: series((row) => row.batch_size, (row) => 1e3 * row.seconds), yLabel: "ms", ...axis }).figure,
      roof(lines({ title: "Roofline", note: `memory ${num(bandwidth / 1e9)} GB/s, ${found.on_cpu ? "fp32 peak" : "bf16 product"} ${num(peak / 1e9)} GFLOP/s, both measured in the run; 8-bit arithmetic can exceed the latter`, series: series((row) => row.intensity, (row) => row.flops_per_second / 1e9), logX: true, logY: true, xLabel: "FLOP per byte", yLabel: "GFLOP/s", ...roof.limits }))),
    sortable({ caption: "Speed-up and memory saved are against the fastest in 16 bit", rows: found.rows, columns: [
      { title: "batch", value: (row) => row.batch_size }, { title: "kernel", value: (row) => row.implementation, word: true },
      { title: "ms", value: (row) => row.seconds, text: (row) => num(1e3 * row.seconds) }, { title: "tokens/s", value: (row) => row.tokens_per_second, text: (row) => num(row.tokens_per_second, 4) },
      { title: "TFLOP/s", value: (row) => row.flops_per_second, text: (row) => num(row.flops_per_second / 1e12) }, { title: "GB/s", value: (row) => row.bytes_per_second, text: (row) => num(row.bytes_per_second / 1e9) },
      { title: "of roofline", value: (row) => row.roofline_share, text: (row) => percent(row.roofline_share) }, { title: "speed-up", value: (row) => row.speedup, text: (row) => times(row.speedup) },
      { title: "memory saved", value: (row) => row.memory_saved, text: (row) => percent(row.memory_saved) },
    ] }));
}

// The roof over the points: limits that show it, and what draws it (Williams, Waterman, Patterson 2009).
function frameRoof(rows, bandwidth, peak) {
  const ridge = peak / bandwidth;
  const across = [...rows.map((row) => row.intensity), ridge];
  const up = [...rows.map((row) => row.flops_per_second), peak].map((value) => value / 1e9);
  const limits = { x: [Math.min(...across) / 2, Math.max(...across) * 2], y: [Math.min(...up) / 2, Math.max(...up) * 2] };
  const draw = ({ figure, area }) => {
    const start = Math.max(limits.x[0], (limits.y[0] * 1e9) / bandwidth);
    const points = [[start, (bandwidth * start) / 1e9], [ridge, peak / 1e9], [limits.x[1], peak / 1e9]];
    area.drawing.append(svg("path", { d: points.map(([x, y], index) => `${index ? "L" : "M"}${area.atX(x)} ${area.atY(y)}`).join(""), fill: "none", stroke: "var(--text)", "stroke-width": 1.6 }));
    return figure;
  };
  return Object.assign(draw, { limits });
}

function speculation(runs) {
  return section("speculation", "Speculative decoding",
    lines({ title: "Acceptance by position in the draft", note: "of the drafts that reach a position, the share whose token there is accepted", series: runs.map((run) => ({ name: run.name, points: run.by_position.map((share, index) => [index + 1, 100 * share]) })).filter((one) => one.points.length), y: [0, 103], x: [0.7, Math.max(...runs.map((run) => run.by_position.length), 1) + 0.3], xTicks: Array.from({ length: Math.max(...runs.map((run) => run.by_position.length), 1) }, (_, index) => index + 1).filter((at, index, all) => index % Math.ceil(all.length / 16) === 0), xLabel: "position", yLabel: "accepted, %" }).figure,
    sortable({ caption: "Drafts", rows: runs, columns: [
      { title: "run", value: (row) => row.name, word: true }, { title: "draft", value: (row) => row.draft, word: true }, { title: "drafted", value: (row) => row.drafted, text: (row) => whole(row.drafted) },
      { title: "accepted", value: (row) => row.accepted, text: (row) => whole(row.accepted) }, { title: "acceptance", value: (row) => (row.drafted ? row.accepted / row.drafted : null), text: (row) => percent(row.drafted ? row.accepted / row.drafted : null) },
      { title: "tokens a pass", value: (row) => (row.passes ? row.emitted / row.passes : null), text: (row) => num(row.passes ? row.emitted / row.passes : null) },
      { title: "draft, s", value: (row) => row.seconds.draft, text: (row) => num(row.seconds.draft) }, { title: "verify, s", value: (row) => row.seconds.verify, text: (row) => num(row.seconds.verify) },
    ] }));
}

function manifest(data) {
  const parts = data.models.flatMap((model) => [
    el("h3", { class: "name" }, called(model)),
    facts([
      ["came from", model.reference],
      ["method", model.manifest.config && model.manifest.config.method],
      ["calibrated on", model.manifest.calibration && `${model.manifest.calibration.tokens} tokens of ${model.manifest.calibration.source}`],
      ["activations here", model.calibration ? `${whole(model.calibration.tokens)} tokens of ${model.calibration.source}` : "none"],
      ["warnings", (model.manifest.warnings || []).join("\n")],
    ]),
    Object.keys(model.manifest).length ? el("details", {}, el("summary", {}, "The whole manifest, but for its list of linears"), el("pre", { tabindex: "0" }, JSON.stringify(model.manifest, null, 2))) : el("p", { class: "note" }, "This checkpoint has no manifest of halfbyte."),
  ]);
  if (data.comparison) parts.push(el("h3", {}, "The comparison"), el("details", {}, el("summary", {}, "Versions, machine, settings"), el("pre", { tabindex: "0" }, JSON.stringify(data.comparison.manifest, null, 2))));
  return section("manifest", "Manifest", parts);
}
