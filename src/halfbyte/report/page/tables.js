// A table whose heads sort it. Columns: title, value(row) to sort by, text(row) or node(row) to show, word for text, short for a
// word that needs no room.
// More rows than this are cut off behind the order asked for: a browser takes seconds to lay out tens of thousands.
const MOST_ROWS = 1000;

function sortable({ caption, columns, rows, sorted, tall }) {
  const body = el("tbody");
  const heads = columns.map((column, index) => {
    const button = el("button", { type: "button", title: column.about || null, onclick: () => sort(index) }, column.title);
    // Chromium repeats a head on every printed page only if there is no button in it.
    return el("th", { scope: "col", class: column.word ? "word" : null, "aria-sort": "none" }, button, el("span", { class: "printed" }, column.title));
  });
  const entries = rows.map((row) => ({ row, node: null }));
  let by = null;
  let up = true;

  function cell(column, row) {
    const attributes = { class: [column.word ? (column.short ? "word" : "word name") : "", column.best && column.best(row) ? "best" : ""].join(" ").trim() || null };
    return el("td", attributes, column.node ? column.node(row) : column.text ? column.text(row) : String(column.value(row) ?? "–"));
  }

  function sort(index, ascending) {
    const column = columns[index];
    up = ascending ?? (by === index ? !up : Boolean(column.word));
    by = index;
    const order = entries.map((entry, place) => ({ entry, place, value: column.value(entry.row) }));
    order.sort((a, b) => {
      const missing = (a.value === null || a.value === undefined) - (b.value === null || b.value === undefined);
      if (missing) return missing;
      const found = typeof a.value === "string" ? a.value.localeCompare(b.value, "en", { numeric: true }) : a.value - b.value;
      return (up ? found : -found) || a.place - b.place;
    });
    show(order.map((one) => one.entry));
    heads.forEach((head, place) => head.setAttribute("aria-sort", place === index ? (up ? "ascending" : "descending") : "none"));
  }

  function show(order) {
    for (const entry of order.slice(0, MOST_ROWS)) entry.node ??= el("tr", {}, columns.map((column) => cell(column, entry.row)));
    body.replaceChildren(...order.slice(0, MOST_ROWS).map((entry) => entry.node));
  }

  show(entries);
  if (sorted) sort(columns.findIndex((column) => column.title === sorted.title), sorted.up);
  if (rows.length > MOST_ROWS) caption += `; the first ${MOST_ROWS} in the order of the column chosen`;
  const table = el("table", { class: "data" }, caption ? el("caption", {}, caption) : null, el("thead", {}, el("tr", {}, heads)), body);
  return el("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": caption || "Table" }, table);
}
