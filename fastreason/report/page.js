// Sorts the tables of a report and opens its samples. Everything from a model goes into the page as text, never as markup.
"use strict";

const collator = new Intl.Collator("en", { numeric: true });

function numberIn(text) {
  const found = /^[+\-\u2212]?\d[\d,]*(\.\d+)?(e[+\-]\d+)?/.exec(text);
  return found ? parseFloat(found[0].replace("\u2212", "-").replaceAll(",", "")) : NaN;
}

// Cells without a figure stay at the end in both directions.
function comparison(cells, sign) {
  const numeric = cells.some((cell) => !isNaN(numberIn(cell))) && cells.every((cell) => !isNaN(numberIn(cell)) || cell === "" || cell === "-");
  return (a, b) => {
    if (!numeric) return sign * collator.compare(a, b);
    const [x, y] = [numberIn(a), numberIn(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
    return sign * (x - y);
  };
}

function sortTable(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = Array.from(body.rows), text = (row) => row.cells[column].textContent.trim();
  const compare = comparison(rows.map(text), descending ? -1 : 1);
  rows.sort((a, b) => compare(text(a), text(b)));
  body.append(...rows);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function responseElement(sample) {
  const details = element("details"), summary = element("summary");
  summary.append(element("span", sample.right ? "right" : "wrong", sample.right ? "right" : "wrong"));
  const facts = [`response ${sample.sample}`, `${sample.tokens} tokens`];
  if (sample.answer !== null) facts.push(`answer ${sample.answer}`);
  if (sample.strict !== null && sample.strict !== sample.right) facts.push(`strict grader: ${sample.strict ? "right" : "wrong"}`);
  if (sample.cut) facts.push("cut off at the limit");
  if (sample.error !== null) facts.push(sample.error);
  summary.append(element("span", ` ${facts.join(", ")}`, "soft"));
  details.append(summary, element("pre", sample.text));
  return details;
}

function openProblem(dialog, set, problem) {
  const header = element("header"), close = element("button", "Close");
  close.addEventListener("click", () => dialog.close());
  header.append(element("strong", `${set.title}: ${problem.id}${problem.level ? ` (${problem.level})` : ""}`), close);
  const parts = [header, element("pre", problem.question), element("p", `Gold answer: ${problem.gold ?? "none"}`)];
  set.labels.forEach((label, place) => {
    parts.push(element("h3", `${label}: ${problem.counts[place]} of ${set.n} right`));
    parts.push(...problem.samples[place].map(responseElement));
    const rest = set.n - problem.samples[place].length;
    if (rest > 0) parts.push(element("p", `${rest} more in ${set.files[place]}`, "soft"));
  });
  dialog.replaceChildren(...parts);
  dialog.querySelector("details")?.setAttribute("open", "");
  dialog.showModal();
}

function start() {
  const sets = JSON.parse(document.getElementById("samples").textContent), dialog = document.getElementById("sample");
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.parentElement.tagName === "TH") sortTable(button.parentElement);
    if (button.dataset.problem !== undefined) {
      const set = sets[Number(button.dataset.set)];
      openProblem(dialog, set, set.problems[Number(button.dataset.problem)]);
    }
  });
  for (const field of document.querySelectorAll("input[type=search]")) {
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase();
      for (const row of document.getElementById(field.dataset.table).tBodies[0].rows)
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }
}

start();
