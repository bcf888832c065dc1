// Elements are made one by one and text goes in as text: names in the data are strangers', and none becomes markup.
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

// A few significant digits, without an exponent where that stays readable, and with thousands apart.
function num(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-4 || size >= 1e9) return value.toExponential(digits - 1).replace("e-", "e−").replace("e+", "e");
  const whole = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { maximumFractionDigits: whole, minimumFractionDigits: 0, useGrouping: true });
}

const fixed = (places) => (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places, signDisplay: "negative" }));
const percent = (value) => {
  if (value === null || value === undefined) return "–";
  const size = 100 * Math.abs(value);
  return `${size > 0 && size < 0.01 ? num(100 * value, 2) : fixed(size < 10 ? 2 : 1)(100 * value)} %`;
};
const whole = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: 0 }));
const times = (value) => (value === null || value === undefined ? "–" : `${num(value)} ×`);
const decibels = (value) => (value === null || value === undefined ? "–" : `${fixed(1)(value)} dB`);
const known = (values) => values.filter((value) => value !== null && value !== undefined && Number.isFinite(value));
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

function facts(pairs) {
  const list = el("dl", { class: "facts" });
  for (const [term, text] of pairs) if (text !== null && text !== undefined && text !== "") list.append(el("dt", {}, term), el("dd", { class: "name" }, String(text)));
  return list;
}

function labelled(text, control) {
  return el("label", {}, `${text} `, control);
}

function choice(options, onchange) {
  const node = el("select", { onchange: () => onchange(node.value) }, options.map(([value, text]) => el("option", { value }, text)));
  return node;
}
