// The eight marks of a lesson have the colours of the charts; a mark is also a word or a digit, never a colour alone.
function words(spans) {
  return spans.map((span) => (span.mark === undefined ? span.text : el("b", { class: `m${span.mark % 8}` }, span.text)));
}

// What stands between backquotes is code.
function prose(text) {
  return text.replaceAll(/\s+/g, " ").split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
}

function lessonTable(block) {
  const numeric = block.columns.map((_, index) => block.rows.every((row) => row[index].value !== undefined || row[index].mark !== undefined));
  const side = (index) => (numeric[index] ? null : "word");
  const table = el("table", { class: "data plain" },
    el("thead", {}, el("tr", {}, block.columns.map((column, index) => el("th", { scope: "col", class: side(index) }, column)))),
    el("tbody", {}, block.rows.map((row) => el("tr", {}, row.map((cell, index) => el("td", { class: side(index) }, words([cell])))))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": block.caption || "Table" }, table);
}

function lessonChart(block) {
  const series = block.series.map((one) => ({ name: one.name, points: block.x.map((x, index) => [x, one.y[index]]).filter((point) => point[1] !== null) }));
  return lines({ title: block.caption, series, xLabel: block.x_label, yLabel: block.y_label }).figure;
}

function lessonBlock(block) {
  const caption = block.caption && block.kind !== "chart" ? el("p", { class: "note" }, block.caption) : null;
  switch (block.kind) {
    case "text": return block.text.split("\n\n").map((paragraph) => el("p", {}, prose(paragraph)));
    case "check": return el("p", { class: "check" }, "✓ ", prose(block.statement));
    case "table": return [caption, lessonTable(block)];
    case "drawing": return [caption, el("pre", { class: "drawing", tabindex: "0" }, block.lines.flatMap((line) => [...words(line), "\n"]))];
    default: return lessonChart(block);
  }
}

// A lesson is drawn when it is opened: six of them are as long as the rest of the page.
function lesson(found) {
  const node = el("details", { class: "lesson", id: `lesson-${found.lesson}` }, el("summary", {}, el("b", {}, found.title), ` ${found.summary}`));
  const draw = () => {
    if (node.childElementCount > 1) return;
    node.append(...found.steps.flatMap((step) => [el("h3", {}, step.heading), ...step.blocks.flatMap(lessonBlock).filter((part) => part !== null)]));
  };
  node.addEventListener("toggle", draw);
  return node;
}

function lessons(found) {
  return section("lessons", "Lessons", el("p", {}, "How it works, shown on real bytes. What has a ✓ was checked by the code when this page was made."), found.map(lesson));
}
