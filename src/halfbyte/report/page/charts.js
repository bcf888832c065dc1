// Inline SVG charts on a 400-wide canvas. Lines and bars differ in dashes and shapes, not only in colour.
const WIDTH = 400;
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const colour = (index) => `var(--c${index % 8})`;

function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function powers(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const factor of [1, 2, 5]) {
      const at = factor * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  return found.length > 7 ? found.filter((at) => Math.abs(Math.log10(at) - Math.round(Math.log10(at))) < 1e-9) : found;
}

// Axes, grid and labels; returns the drawing and the functions from numbers to places.
function frame({ x, y, xLabel, yLabel, logX, logY, height = 240, xTicks, yTicks, label, xText = num, yText = num }) {
  const [left, right, top, bottom] = [54, 12, 10, 40];
  const place = (value, [low, high], log, from, to) => from + ((log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low || 1)) * (to - from));
  const atX = (value) => place(value, x, logX, left, WIDTH - right);
  const atY = (value) => place(value, y, logY, height - bottom, top);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label });
  for (const at of yTicks || (logY ? powers(...y) : ticks(...y))) {
    drawing.append(svg("line", { class: "grid", x1: left, x2: WIDTH - right, y1: atY(at), y2: atY(at) }));
    drawing.append(svg("text", { class: "quiet", x: left - 6, y: atY(at) + 4, "text-anchor": "end" }, yText(at)));
  }
  for (const at of xTicks || (logX ? powers(...x) : ticks(...x, 7))) {
    drawing.append(svg("line", { class: "axis", x1: atX(at), x2: atX(at), y1: height - bottom, y2: height - bottom + 4 }));
    drawing.append(svg("text", { class: "quiet", x: atX(at), y: height - bottom + 16, "text-anchor": "middle" }, xText(at)));
  }
  drawing.append(svg("line", { class: "axis", x1: left, x2: WIDTH - right, y1: height - bottom, y2: height - bottom }));
  drawing.append(svg("text", { class: "quiet", x: (left + WIDTH - right) / 2, y: height - 5, "text-anchor": "middle" }, xLabel));
  const middle = (top + height - bottom) / 2;
  drawing.append(svg("text", { class: "quiet", x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, yLabel));
  return { drawing, atX, atY, left, right: WIDTH - right, top, bottom: height - bottom };
}

function captioned(title, note, drawing, legend) {
  return el("figure", {}, el("figcaption", {}, title, note ? el("div", { class: "note" }, note) : null), legend ? key(legend) : null, drawing);
}

function key(names) {
  return el("ul", { class: "legend" }, names.map((name, index) => {
    const mark = svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    mark.append(svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour(index), "stroke-width": 2.5, "stroke-dasharray": DASHES[index % 4] }), shape(index, 13, 5));
    return el("li", {}, mark, el("span", { class: "name" }, name));
  }));
}

function shape(index, x, y) {
  const paint = { fill: colour(index) };
  const r = 3.2;
  if (index % 4 === 0) return svg("circle", { cx: x, cy: y, r, ...paint });
  if (index % 4 === 1) return svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, ...paint });
  if (index % 4 === 2) return svg("path", { d: `M${x} ${y - 4}L${x + 4} ${y + 3}H${x - 4}Z`, ...paint });
  return svg("path", { d: `M${x} ${y - 4}L${x + 4} ${y}L${x} ${y + 4}L${x - 4} ${y}Z`, ...paint });
}

// Series: {name, points: [[x, y], …]}; marks: draw a shape at each point; bands: [[x, low, high], …].
function lines({ title, note, series, marks = true, rings = [], bands = {}, ...axes }) {
  const xs = series.flatMap((one) => one.points.map((point) => point[0]));
  const ys = [...series.flatMap((one) => one.points.map((point) => point[1])), ...Object.values(bands).flat().flatMap((band) => band.slice(1))];
  const span = (values, log, zero) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) return [low / 1.15, high * 1.15];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [zero ? Math.min(0, low) : low - room, high + room];
  };
  const area = frame({ x: span(xs, axes.logX), y: span(ys, axes.logY, axes.zero), label: title, ...axes });
  series.forEach((one, index) => {
    const path = one.points.map((point, place) => `${place ? "L" : "M"}${area.atX(point[0]).toFixed(1)} ${area.atY(point[1]).toFixed(1)}`).join("");
    const band = bands[one.name];
    if (band) {
      const edge = [...band.map((b) => [b[0], b[2]]), ...[...band].reverse().map((b) => [b[0], b[1]])];
      area.drawing.append(svg("path", { d: `${edge.map((b, place) => `${place ? "L" : "M"}${area.atX(b[0])} ${area.atY(b[1])}`).join("")}Z`, fill: colour(index), opacity: 0.18 }));
    }
    area.drawing.append(svg("path", { d: path, fill: "none", stroke: colour(index), "stroke-width": 2, "stroke-dasharray": DASHES[index % 4] }));
    if (marks) for (const point of one.points) area.drawing.append(filled(shape(index, area.atX(point[0]), area.atY(point[1])), {}, [svg("title", {}, `${one.name}: ${axes.xLabel} ${num(point[0])}, ${num(point[1], 4)}`)]));
  });
  for (const ring of rings) area.drawing.append(svg("circle", { cx: area.atX(ring[0]), cy: area.atY(ring[1]), r: 7, fill: "none", stroke: "var(--text)", "stroke-width": 1.6 }));
  return { figure: captioned(title, note, area.drawing, series.map((one) => one.name)), area };
}

// Counts between equal edges from -limit to limit, with what lies outside at either end.
function histogram({ title, note, series, limit, xLabel, log = false, bounds = [] }) {
  const bins = series[0].counts.length - 2;
  const width = (2 * limit) / bins;
  const shares = series.map((one) => {
    const total = one.counts.reduce((a, b) => a + b, 0) || 1;
    return one.counts.map((count) => (100 * count) / total);
  });
  const highest = Math.max(...shares.flat()) || 1;
  const lowest = log ? Math.max(Math.min(...shares.flat().filter((share) => share > 0)), 1e-5) / 1.5 : 0;
  const ends = [-limit - width, limit + width];
  const area = frame({ x: ends, y: [lowest, highest * (log ? 1.6 : 1.06)], logY: log, xLabel, yLabel: "% of the weights", label: title, xTicks: ticks(-limit, limit, 8) });
  const floor = area.bottom;
  shares.forEach((share, index) => {
    let path = "";
    share.forEach((value, bin) => {
      const [from, to] = [area.atX(ends[0] + bin * width), area.atX(ends[0] + (bin + 1) * width)];
      const top = value > 0 ? Math.min(area.atY(Math.max(value, lowest)), floor) : floor;
      path += `${bin ? "L" : `M${from.toFixed(1)} ${floor}L`}${from.toFixed(1)} ${top.toFixed(1)}L${to.toFixed(1)} ${top.toFixed(1)}`;
    });
    path += `L${area.right} ${floor}`;
    area.drawing.append(svg("path", { d: path, fill: index ? "none" : colour(index), "fill-opacity": 0.3, stroke: colour(index), "stroke-width": 1.6, "stroke-dasharray": DASHES[index % 4] }));
  });
  for (const bound of bounds) area.drawing.append(svg("line", { x1: area.atX(bound), x2: area.atX(bound), y1: area.top, y2: floor, stroke: "var(--text)", "stroke-width": 1, "stroke-dasharray": "3 3" }));
  return captioned(title, note, area.drawing, series.length > 1 ? series.map((one) => one.name) : null);
}

// Upright bars, such as of codes.
function columns({ title, note, values, names, xLabel, yLabel }) {
  const area = frame({ x: [-0.6, values.length - 0.4], y: [0, Math.max(...values) * 1.08 || 1], xLabel, yLabel, label: title, height: 220, xTicks: values.map((_, index) => index).filter((index) => index % Math.ceil(values.length / 16) === 0), xText: (at) => names[at] });
  values.forEach((value, index) => {
    const [from, to] = [area.atX(index - 0.42), area.atX(index + 0.42)];
    area.drawing.append(svg("rect", { x: from, width: to - from, y: area.atY(value), height: area.bottom - area.atY(value), fill: colour(0) }, svg("title", {}, `${names[index]}: ${num(value)} ${yLabel}`)));
  });
  return captioned(title, note, area.drawing);
}

// "B: sample:smollm2-135m@awq" → "B: …m2-135m@awq": the letter and the end are what tell models apart.
function shortened(name, room) {
  if (name.length <= room) return name;
  const letter = /^[A-Z]: /.test(name) ? name.slice(0, 3) : "";
  return `${letter}…${name.slice(letter.length + 1 - room)}`;
}

// Level bars with their numbers; spreads: [low, high] drawn as whiskers.
function bars({ title, note, values, names, spreads = [], text = num, best = null }) {
  const row = 26;
  const label = Math.min(165, 14 + 7 * Math.max(...names.map((name) => name.length)));
  const numbers = 66;
  const highest = Math.max(...known(values), ...known(spreads.flat()), 0) || 1;
  const at = (value) => label + (value / highest) * (WIDTH - label - numbers);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${values.length * row + 6}`, role: "img", "aria-label": title });
  values.forEach((value, index) => {
    const y = index * row + 4;
    const name = shortened(names[index], Math.floor((label - 10) / 7));
    drawing.append(svg("text", { x: label - 8, y: y + 14, "text-anchor": "end" }, name, svg("title", {}, names[index])));
    if (value === null) {
      drawing.append(svg("text", { class: "quiet", x: label + 4, y: y + 14 }, "not measured"));
      return;
    }
    drawing.append(svg("rect", { x: label, y, width: Math.max(at(value) - label, 1), height: row - 8, fill: colour(index), rx: 2 }));
    const spread = spreads[index];
    if (spread) drawing.append(svg("path", { d: `M${at(spread[0])} ${y + 9}H${at(spread[1])}M${at(spread[0])} ${y + 4}v10M${at(spread[1])} ${y + 4}v10`, stroke: "var(--text)", "stroke-width": 1.4, fill: "none" }));
    const end = Math.max(at(value), spread ? at(spread[1]) : 0);
    drawing.append(svg("text", { x: end + 6, y: y + 14, class: value === best ? "strong" : null }, text(value)));
  });
  return captioned(title, note, drawing);
}
