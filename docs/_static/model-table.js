// The table of models: search, choose, sort. All rows are in the page; without scripts it is a plain table.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.getElementById("model-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
  const search = document.getElementById("model-search");
  const verdict = document.getElementById("model-verdict");
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, text } of rows) {
      const right = !verdict.value || row.cells[2].textContent === verdict.value;
      row.hidden = !(right && words.every((word) => text.includes(word)));
      shown += !row.hidden;
    }
    document.getElementById("model-count").textContent = `${shown} of ${rows.length}`;
  };
  search.addEventListener("input", show);
  verdict.addEventListener("change", show);
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.firstChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = ({ row }) => row.cells[column].textContent;
      rows.sort((a, b) => (down ? -1 : 1) * text(a).localeCompare(text(b), "en", { numeric: true }));
      body.append(...rows.map(({ row }) => row));
    });
  });
  show();
});
