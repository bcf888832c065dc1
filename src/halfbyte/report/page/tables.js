// A table whose heads sort it. Columns: title, value(row) to sort by, text(row) or node(row) to show, word for text, short for a
// word that needs no room.
function sortable({ caption, columns, rows, sorted, tall }) {
  const body = el("tbody");
  const heads = columns.map((column, index) => {
    const button = el("button", { type: "button", title: column.about || null, onclick: () => sort(index) }, column.title);
    return el("th", { scope: "col", class: column.word ? "word" : null, "aria-sort": "none" }, button);
  });
  const cells = rows.map((row) => ({ row, node: el("tr", {}, columns.map((column) => cell(column, row))) }));
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
    const order = cells.map((entry, place) => ({ ...entry, place, value: column.value(entry.row) }));
    order.sort((a, b) => {
      const missing = (a.value === null || a.value === undefined) - (b.value === null || b.value === undefined);
      if (missing) return missing;
      const found = typeof a.value === "string" ? a.value.localeCompare(b.value, "en", { numeric: true }) : a.value - b.value;
      return (up ? found : -found) || a.place - b.place;
    });
    body.replaceChildren(...order.map((entry) => entry.node));
    heads.forEach((head, place) => head.setAttribute("aria-sort", place === index ? (up ? "ascending" : "descending") : "none"));
  }

  body.append(...cells.map((entry) => entry.node));
  if (sorted) sort(columns.findIndex((column) => column.title === sorted.title), sorted.up);
  const table = el("table", { class: "data" }, caption ? el("caption", {}, caption) : null, el("thead", {}, el("tr", {}, heads)), body);
  return el("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": caption || "Table" }, table);
}
