// A click on a heading of a table sorts its rows: upwards, then downwards, then as they were.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], before = [...body.rows], headings = [...table.tHead.rows[0].cells];
  const number = text => /^[-+]?[0-9.]/.test(text) ? parseFloat(text) : NaN;
  headings.forEach((heading, column) => {
    const text = row => row.cells[column].textContent.trim();
    const told = before.map(text).filter(cell => cell && cell !== "\u2013");
    const isNumeric = told.every(cell => !isNaN(number(cell)));
    const compare = (a, b) => isNumeric ? number(a) - number(b) : a.localeCompare(b, "en", {numeric: true});
    const sort = () => {
      const next = {none: "ascending", ascending: "descending", descending: "none"}[heading.getAttribute("aria-sort")];
      headings.forEach(other => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const missing = row => !text(row) || text(row) === "\u2013";
      const rows = next === "none" ? before : [...before].sort((a, b) =>
        missing(a) - missing(b) || (missing(a) ? 0 : sign * compare(text(a), text(b))));
      body.append(...rows);
    };
    heading.tabIndex = 0;
    heading.setAttribute("aria-sort", "none");
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
