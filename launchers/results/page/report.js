"use strict";
// A column's button sorts by it: best first, then worst first, then as written. What has no value stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], written = [...body.rows];
  table.classList.add("unsorted");
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const key = (row) => {
      const cell = row.cells[column], text = cell.dataset.key ?? cell.textContent.trim();
      const number = parseFloat(text.replace(/^x/, ""));
      return cell.matches("th, .word") ? (text === "-" ? null : text) : Number.isNaN(number) ? null : number;
    };
    const numbers = written.some((row) => typeof key(row) === "number");
    const turns = numbers ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    const turn = turns[(turns.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
    heads.forEach((each) => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", turn);
    table.classList.toggle("unsorted", turn === "none");
    const sign = turn === "ascending" ? 1 : -1;
    const order = (one, other) => {
      const a = key(one), b = key(other);
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    };
    body.append(...(turn === "none" ? written : [...written].sort(order)));
  }));
}
// Paper shows what is folded away on a screen.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
