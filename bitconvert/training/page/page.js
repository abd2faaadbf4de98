"use strict";

// A chart tells the numbers of the step that is pointed at; they are those of its table.
for (const chart of document.querySelectorAll("svg[data-table]")) {
  const table = document.getElementById(chart.dataset.table);
  const labels = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent));
  const steps = rows.map((row) => Number(row[0].replaceAll(",", "")));
  const columns = chart.dataset.columns.split(" ").map(Number);
  const [first, last, left, right] = ["first", "last", "left", "right"].map((name) => Number(chart.dataset[name]));
  const cursor = chart.querySelector(".cursor");
  const output = chart.parentElement.querySelector("output");
  let shown = steps.length - 1;

  const show = (index) => {
    shown = Math.min(Math.max(index, 0), steps.length - 1);
    const share = last > first ? (steps[shown] - first) / (last - first) : 0.5;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, left + share * (right - left));
    cursor.setAttribute("visibility", "visible");
    output.textContent = [0, ...columns].map((column) => `${labels[column]} ${rows[shown][column]}`).join(" · ");
  };
  const nearest = (step) =>
    steps.reduce((best, each, index) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? index : best), 0);

  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    show(nearest(first + ((place - left) / (right - left)) * (last - first)));
  });
  chart.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(shown + moves[event.key]);
  });
}
