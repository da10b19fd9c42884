// The table of finetuning jobs: status, progress, and what can be done to each.

import { get, post } from "./api.js";
import { byId, el, moment, setNotice, setText } from "./dom.js";

const PERIOD_MS = 2000;
const PAGE = 20;
const MOST = 100;
const SURE_MS = 4000;
const WORDS = {
  validating_files: "Checking files", queued: "Queued", running: "Running", paused: "Paused",
  succeeded: "Succeeded", failed: "Failed", cancelled: "Cancelled",
};
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

/** The status with 'paused' added, which OpenAI's words lack. */
export const statusOf = (job) => (job.paused && !ENDED.has(job.status) ? "paused" : job.status);
export const hasEnded = (job) => ENDED.has(job.status);
/** The suffix, which a tuned model's name has in fourth place; the id without one. */
export const nameOf = (job) => job.suffix || job.fine_tuned_model?.split(":")[3] || job.id;

/** In words: 'Running, step 12 of 40'. */
export function progressText(job) {
  const word = WORDS[statusOf(job)] ?? job.status;
  if (!job.num_steps) return word;
  if (job.status === "succeeded") return `${word}, ${job.num_steps} steps`;
  return job.step ? `${word}, step ${job.step} of ${job.num_steps}` : word;
}

export class JobsView {
  constructor(detail) {
    this.detail = detail;
    this.rows = new Map();
    this.limit = PAGE;
    this.selected = null;
    this.wake = () => {};
    byId("jobs-more").onclick = () => {
      this.limit = MOST;
      this.wake();
    };
  }

  async run() {
    for (;;) {
      if (!document.hidden) await this.refresh();
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, PERIOD_MS);
      });
    }
  }

  /** A job that was just created is shown and selected. */
  add(job) {
    this.selected = job.id;
    this.detail.select(job);
    this.wake();
  }

  async refresh() {
    try {
      const { data, has_more: hasMore } = await get(`v1/fine_tuning/jobs?limit=${this.limit}`);
      setNotice(byId("jobs-error"), "");
      this.show(data, hasMore);
      const job = data.find(({ id }) => id === this.selected);
      if (job) await this.detail.update(job);
    } catch (error) {
      setNotice(byId("jobs-error"), `Jobs can’t be shown. ${error.message}`);
    }
  }

  show(jobs, hasMore) {
    byId("jobs-empty").hidden = jobs.length > 0;
    byId("jobs-table").hidden = jobs.length === 0;
    byId("jobs-more").hidden = !hasMore || this.limit === MOST;
    if (this.selected === null && jobs.length > 0) {
      const first = jobs.find((job) => job.status === "running") ?? jobs[0];
      this.selected = first.id;
      this.detail.select(first);
    }
    const present = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.rows) {
      if (!present.has(id)) {
        row.node.remove();
        this.rows.delete(id);
      }
    }
    const body = byId("jobs-body");
    jobs.forEach((job, i) => {
      if (!this.rows.has(job.id)) this.rows.set(job.id, this.makeRow(job));
      const row = this.rows.get(job.id);
      if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
      this.updateRow(row, job);
    });
  }

  makeRow(job) {
    const row = {
      open: el("button", { type: "button", class: "link", onclick: () => this.select(job.id) }),
      bar: el("progress", { max: 1, value: 0, "aria-label": `Progress of ${nameOf(job)}` }),
      status: el("span", { class: "status" }),
      hold: el("button", { type: "button", class: "small", onclick: () => this.act(row, row.held ? "resume" : "pause") }),
      cancel: el("button", { type: "button", class: "small", onclick: () => this.cancel(row) }, "Cancel"),
      error: el("p", { class: "field-error", role: "alert" }),
    };
    row.node = el("tr", {},
      el("th", { scope: "row" }, row.open, el("span", { class: "note" }, `Created ${moment(job.created_at)}`)),
      el("td", {}, row.bar, row.status, row.error),
      el("td", { class: "row-actions" }, row.hold, row.cancel));
    return row;
  }

  updateRow(row, job) {
    const ended = hasEnded(job);
    row.job = job;
    row.held = statusOf(job) === "paused";
    row.node.classList.toggle("selected", job.id === this.selected);
    row.node.dataset.status = statusOf(job);
    row.open.setAttribute("aria-pressed", String(job.id === this.selected));
    row.bar.value = job.status === "succeeded" ? 1 : (job.step ?? 0) / (job.num_steps || 1);
    setText(row.open, nameOf(job));
    setText(row.status, progressText(job));
    setText(row.hold, row.held ? "Resume" : "Pause");
    row.hold.setAttribute("aria-label", `${row.held ? "Resume" : "Pause"} ${nameOf(job)}`);
    if (!row.sure) row.cancel.setAttribute("aria-label", `Cancel ${nameOf(job)}`);
    row.hold.hidden = ended;
    row.cancel.hidden = ended;
  }

  select(id) {
    this.selected = id;
    const { job } = this.rows.get(id);
    for (const row of this.rows.values()) this.updateRow(row, row.job);
    this.detail.select(job);
    this.detail.update(job);
  }

  /** The first press asks, the second one within a few seconds does it. */
  cancel(row) {
    const settle = () => {
      clearTimeout(row.sure);
      row.sure = null;
      setText(row.cancel, "Cancel");
      row.cancel.classList.remove("danger");
    };
    if (row.sure) {
      settle();
      this.act(row, "cancel");
      return;
    }
    setText(row.cancel, "Sure?");
    row.cancel.classList.add("danger");
    row.cancel.setAttribute("aria-label", `Press again to cancel ${nameOf(row.job)} for good`);
    row.sure = setTimeout(settle, SURE_MS);
  }

  async act(row, action) {
    row.hold.disabled = true;
    row.cancel.disabled = true;
    try {
      this.updateRow(row, await post(`v1/fine_tuning/jobs/${row.job.id}/${action}`));
      setText(row.error, "");
    } catch (error) {
      setText(row.error, error.message);
    }
    row.hold.disabled = false;
    row.cancel.disabled = false;
    this.wake();
  }
}
