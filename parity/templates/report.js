// Comforts on top of a page that is whole without them: a theme, all tables at once, sorting.
"use strict";
const tools = document.querySelector(".tools");

const theme = document.createElement("select");
theme.setAttribute("aria-label", "Theme");
for (const name of ["system", "light", "dark"]) theme.add(new Option(`theme: ${name}`, name));
theme.onchange = () => {
  document.documentElement.dataset.theme = theme.value;
};

const all = document.createElement("button");
const tables = [...document.querySelectorAll("details.table")];
const say = () => {
  all.textContent = tables.every((d) => d.open) ? "Close all tables" : "Open all tables";
};
all.type = "button";
all.onclick = () => {
  const open = !tables.every((d) => d.open);
  for (const d of tables) d.open = open;
  say();
};
for (const d of tables) d.addEventListener("toggle", say);
say();
tools.append(all, theme);

// A cell sorts by its data-by or its words; in a column of numbers, what is none comes last.
const value = (row, i, numbers) => {
  const cell = row.cells[i];
  const text = cell?.dataset.by ?? cell?.textContent.trim() ?? "";
  if (!numbers) return text;
  const number = Number.parseFloat(text);
  return Number.isNaN(number) ? Infinity : number;
};
const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a === b ? 0 : a < b ? -1 : 1);
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  for (const [i, th] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...th.childNodes);
    th.append(button);
    button.onclick = () => {
      const up = th.ariaSort !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      th.ariaSort = up ? "ascending" : "descending";
      const numbers = th.classList.contains("n");
      const by = (row) => value(row, i, numbers);
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(by(a), by(b)));
      for (const row of rows) row.classList.remove("first");
      body.append(...rows);
    };
  }
}
