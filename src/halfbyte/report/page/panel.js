// The panel of one linear: facts, stages, search curve, channels, histograms.
const STAGES = [["recorded_rtn", "plain rounding"], ["recorded_scaled", "after scaling"], ["recorded_ranged", "after the range search"], ["recorded_stored", "as stored"]];

function panel(model) {
  const dialog = document.getElementById("panel");

  function open(members, index = members[0]) {
    dialog.replaceChildren(...contents(members, index));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    dialog.querySelector("[data-close]").focus();
  }

  dialog.onclick = (event) => { if (event.target === dialog && event.clientX < dialog.getBoundingClientRect().left) dialog.close(); };
  // The focus goes back to where it was by itself.
  dialog.onclose = () => dialog.replaceChildren();

  function contents(members, index) {
    const get = (name) => model.columns[name][index];
    const count = model.columns.name.length;
    const step = (by) => el("button", { type: "button", "aria-label": by < 0 ? "Previous linear" : "Next linear", disabled: index + by < 0 || index + by >= count, onclick: () => open([index + by]) }, by < 0 ? "‹" : "›");
    const top = el("div", { class: "top" }, el("h2", { id: "panel-title", class: "name" }, get("name")), step(-1), step(1),
      el("button", { type: "button", "data-close": true, onclick: () => dialog.close() }, "Close"));
    const several = members.length > 1 ? el("div", { class: "controls" }, labelled(`One of ${members.length}`, selected(members, index))) : null;
    const detail = model.details[index];
    const parts = [top, several, summaryOf(get), stages(get)];
    if (detail) parts.push(curve(detail, get), channels(detail, get), ...distributions(detail, get));
    else parts.push(el("p", { class: "note" }, "Histograms and curves are kept of the linears with the largest errors only; this is not one of them. halfbyte inspect weights --layer NAME shows it."));
    return parts.filter(Boolean);
  }

  function selected(members, index) {
    const node = choice(members.map((member) => [member, model.columns.name[member]]), (value) => open(members, Number(value)));
    node.value = index;
    return node;
  }

  return open;
}

function summaryOf(get) {
  return facts([
    ["shape", `${whole(get("out_features"))} outputs × ${whole(get("in_features"))} inputs, ${whole(get("weights"))} weights as codes`],
    ["bits, group size", `${get("bits")} bits, groups of ${get("group_size")}; entropy of a code ${num(get("entropy"))} bits`],
    ["scale", get("scale") || null],
    ["weights", `SNR ${decibels(get("weight_snr_db"))}, error ${percent(get("weight_error"))}, MSE ${num(get("mse"))}`],
    ["outputs", get("output_error") === null ? "not measured" : `SNR ${decibels(get("output_snr_db"))}, error ${percent(get("output_error"))}, MSE ${num(get("output_mse"))}`],
    ["zero point gains", get("zero_point_gain_db") === null ? null : decibels(get("zero_point_gain_db"))],
    ["rounding", `${percent(get("up"))} up, ${percent(get("down"))} down, ${percent(get("exact"))} exact; bias ${fixed(4)(get("bias"))} steps, RMS ${fixed(3)(get("rms"))} steps (0.289: even rounding to nearest)`],
    ["further than 0.6 steps", `${percent(get("clipped"))} clipped, ${percent(get("moved"))} moved by compensated rounding`],
  ]);
}

function stages(get) {
  const shown = STAGES.filter(([name]) => get(name) !== null);
  if (!shown.length) return null;
  return bars({
    title: "Error after each stage, % of the output", note: "E‖ΔWx‖² / E‖Wx‖², measured by halfbyte quantize over its own calibration text",
    values: shown.map(([name]) => 100 * get(name)), names: shown.map(([, text]) => text), text: (value) => `${num(value)} %`,
  });
}

function curve(detail, get) {
  if (!detail.curve) return null;
  const series = [["s = x^r", detail.curve.activations], ["s = x^r / w^(1−r)", detail.curve.duo]].filter(([, points]) => points.length)
    .map(([name, points]) => ({ name, points: points.map(([ratio, error]) => [ratio, 100 * error]) }));
  if (!series.length) return null;
  const best = series.flatMap((one) => one.points).reduce((a, b) => (b[1] < a[1] ? b : a));
  const { figure, area } = lines({
    title: "Search curve: error over the scale ratio r",
    note: `This linear alone, lowest at r = ${num(best[0])} (ringed). quantize adds up all linears that share a scale${get("scale") ? `; it chose ${get("scale")}` : ""}.`,
    series, rings: [best], x: [0, 1], xLabel: "ratio r", yLabel: "error, % of that without scaling",
  });
  if (area.atY(100) > area.top && area.atY(100) < area.bottom) area.drawing.append(svg("line", { x1: area.left, x2: area.right, y1: area.atY(100), y2: area.atY(100), stroke: "var(--gap)", "stroke-dasharray": "3 3" }));
  return figure;
}

function channels(detail, get) {
  const found = detail.channels;
  if (!found) return null;
  const { by_rank: rank, of_critical: critical } = found;
  const count = rank.activation.length;
  const series = [["error of plain rounding", rank.error_rtn], ["error as stored", rank.error]]
    .map(([name, values]) => ({ name, points: values.map((value, index) => [(100 * (index + 0.5)) / count, value]).filter((point) => point[1] > 0) })).filter((one) => one.points.length);
  const activation = rank.activation.map((value, index) => [(100 * (index + 0.5)) / count, value]).filter((point) => point[1] > 0);
  const scale = rank.scale.map((value, index) => [(100 * (index + 0.5)) / count, value]);
  const axis = { x: [0, 100], xLabel: "inputs, largest activation first, %", marks: false, logY: true };
  const rows = found.critical.map((channel, index) => ({ channel, ...Object.fromEntries(Object.entries(critical).map(([name, values]) => [name, values[index]])) }));
  const all = get("critical");
  return el("div", {}, el("h3", {}, "Salient channels"),
    el("p", {}, `The critical ${all} of ${whole(get("in_features"))} inputs carry ${percent(get("activation_share"))} of the activations. They have ${percent(get("error_share_rtn"))} of the error of plain rounding and ${percent(get("error_share"))} of what is left of it as stored; their scale is ${times(get("scale_ratio"))} that of all.`),
    el("div", { class: "charts" },
      activation.length ? lines({ title: "Activations and scales", series: [{ name: "E|x|", points: activation }, { name: "scale s", points: scale }], yLabel: "mean", ...axis }).figure : null,
      series.length ? lines({ title: "Error by channel", series, yLabel: "E[x²] · Σ ΔW²", ...axis }).figure : null),
    sortable({
      caption: `The ${rows.length === all ? "critical" : `first ${rows.length} critical`} channels`, rows,
      columns: [
        { title: "channel", value: (row) => row.channel },
        { title: "E|x|", value: (row) => row.activation, text: (row) => num(row.activation) },
        { title: "mean |W|", value: (row) => row.weight, text: (row) => num(row.weight) },
        { title: "scale", value: (row) => row.scale, text: (row) => num(row.scale) },
        { title: "error, plain", value: (row) => row.error_rtn, text: (row) => num(row.error_rtn) },
        { title: "error, stored", value: (row) => row.error, text: (row) => num(row.error) },
        { title: "left", value: (row) => (row.error_rtn ? row.error / row.error_rtn : null), text: (row) => (row.error_rtn ? times(row.error / row.error_rtn) : "–") },
      ],
    }));
}

function distributions(detail, get) {
  const bits = get("bits");
  return [el("h3", {}, "Weights, errors, codes"), el("div", { class: "charts" },
    histogram({ title: "Weights before and after", note: `σ = ${num(detail.std)}; from ${num(detail.low)} to ${num(detail.high)}, as stored from ${num(detail.stored_low)} to ${num(detail.stored_high)}`, series: [{ name: "16 bit", counts: detail.before }, { name: `${bits} bits`, counts: detail.after }], limit: LIMITS.weights, xLabel: "weight, in σ", log: true }),
    histogram({ title: "Rounding error", note: "dashed: half a step, where rounding to nearest ends; the outermost bars hold all beyond", series: [{ name: "error", counts: detail.errors }], limit: LIMITS.errors, xLabel: "error, steps", bounds: [-0.5, 0.5] }),
    codes(detail.codes, bits))];
}

function codes(counts, bits) {
  const total = counts.reduce((a, b) => a + b, 0) || 1;
  const merged = Math.max(1, counts.length / 32);
  const sums = [];
  for (let start = 0; start < counts.length; start += merged) sums.push((100 * counts.slice(start, start + merged).reduce((a, b) => a + b, 0)) / total);
  return columns({ title: `Codes of ${bits} bits`, values: sums, names: sums.map((_, index) => String(index * merged)), xLabel: "code", yLabel: "% of the codes" });
}
