// What the files of a new job hold, before it is started: counts, problems by line, and examples with their trained tokens marked.

import { byId, el, number, percent, setNotice, setText } from "./dom.js";

const LINES_BEFORE_PX = 70;
const FILES = [["training_file", ""], ["validation_file", "validation file, "]];

export class DataPreview {
  clear() {
    byId("job-data").hidden = true;
    this.empty();
  }

  /** Says what is being done, while there is nothing to show yet. */
  wait(text) {
    this.empty();
    byId("job-data").hidden = false;
    setText(byId("data-status"), text);
  }

  fail(message) {
    this.empty();
    byId("job-data").hidden = false;
    setNotice(byId("data-error"), message);
  }

  /** found: of POST v1/fine_tuning/jobs/check. */
  show(found) {
    this.empty();
    byId("job-data").hidden = false;
    const files = FILES.filter(([name]) => found[name]).map(([name, label]) => ({ label, ...found[name] }));
    byId("data-facts").replaceChildren(...facts(found.training_file, found.validation_file));
    const { share } = found.training_file;
    if (share < 1) setText(byId("data-status"), `The file is long: this tells of its first ${percent(share)}.`);
    showProblems(files);
    showWarnings(files);
    showExamples(found.training_file.shown);
  }

  empty() {
    setText(byId("data-status"), "");
    setNotice(byId("data-error"), "");
    for (const id of ["data-facts", "data-problem-list", "data-warning-list", "data-example-list"]) byId(id).replaceChildren();
    for (const id of ["data-problems", "data-warnings", "data-examples"]) byId(id).hidden = true;
  }
}

function facts(training, validation) {
  const unit = training.objective === "dpo" ? "Pairs" : "Examples";
  const rows = [[unit, number(training.num_usable)]];
  if (validation) rows.push(["For validation", number(validation.num_usable)]);
  const { lengths } = training;
  if (lengths) {
    rows.push(["Tokens", number(lengths.total)]);
    rows.push(["Trained", `${number(lengths.trained)} (${percent(lengths.trained / Math.max(1, lengths.total))})`]);
    rows.push(["Tokens of an example", `${number(lengths.min)} to ${number(lengths.max)}, median ${number(lengths.median)}`]);
  }
  rows.push([`Longer than ${number(training.max_length)}`, number(training.num_too_long)]);
  return rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
}

function showProblems(files) {
  const count = files.reduce((sum, file) => sum + file.num_problems, 0);
  byId("data-problems").hidden = count === 0;
  if (count === 0) return;
  setText(byId("data-problems-title"), `${count === 1 ? "A problem" : `${number(count)} problems`}: a job would be refused`);
  const items = files.flatMap(({ label, problems }) => problems.map(({ line, message }) =>
    el("li", {}, el("b", {}, line === null ? label : `${label}line ${line}: `), message)));
  const more = count - items.length;
  byId("data-problem-list").replaceChildren(...items, more > 0 ? el("li", {}, `and ${number(more)} more`) : "");
}

function showWarnings(files) {
  const items = files.flatMap(({ label, warnings }) => warnings.map((text) => el("li", {}, `${label}${text}`)));
  byId("data-warnings").hidden = items.length === 0;
  byId("data-warning-list").replaceChildren(...items);
}

function showExamples(shown) {
  byId("data-examples").hidden = shown.length === 0;
  byId("data-example-list").replaceChildren(...shown.map((example, i) => {
    const which = example.num_of_line > 1 ? `, example ${example.number} of ${example.num_of_line}` : "";
    const caption = `Line ${example.line}, ${example.part}${which}: ${number(example.num_tokens)} tokens, ${number(example.num_trained)} trained`;
    const pieces = example.pieces.map(({ text, trained }) => (trained ? el("mark", {}, text) : text));
    return el("li", {}, el("p", { id: `data-example-${i}`, class: "note" }, caption),
      el("pre", { class: "example", tabindex: 0, role: "region", "aria-labelledby": `data-example-${i}` }, ...pieces));
  }));
  for (const text of byId("data-example-list").querySelectorAll("pre")) showFirstMark(text);
}

/** Scrolls a long prompt away, so that what is trained is seen first. */
function showFirstMark(text) {
  const mark = text.querySelector("mark");
  if (mark) text.scrollTop += mark.getBoundingClientRect().top - text.getBoundingClientRect().top - LINES_BEFORE_PX;
}
