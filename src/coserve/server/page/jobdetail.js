// One job: its settings, loss curves, checkpoints and events.

import { get } from "./api.js";
import { LineChart } from "./chart.js";
import { byId, el, moment, number, setNotice, setText, timeOfDay } from "./dom.js";
import { hasEnded, nameOf, progressText } from "./jobs.js";

const PAGE = 100;
const MAX_EVENTS = 20_000;
const MAX_SHOWN = 200;

const loss = (value) => (value === null || value === undefined ? "–" : value.toPrecision(3));

export class JobDetail {
  constructor({ onAsk }) {
    this.onAsk = onAsk;
    this.id = null;
    this.files = new Map();
    byId("detail-chat").onclick = () => onAsk(this.job.fine_tuned_model);
  }

  /** Shows another job, empty until it is updated. */
  select(job) {
    byId("job-detail").hidden = false;
    this.chart ??= new LineChart(byId("chart-loss"), {
      title: "Loss", heading: "h4", formatX: (step) => (Number.isInteger(step) ? String(step) : ""), formatReadout: (step) => `Step ${step}`,
      series: [
        { label: "Training", color: "--finetuning", format: loss },
        { label: "Validation", color: "--inference", format: loss, points: true, optional: true },
      ],
      scales: { y: { range: (_, least, most) => lossRange(least, most) } }, axes: [{ scale: "y", format: (value) => String(Number(value.toPrecision(3))) }],
      x: { range: (_, least, most) => [least ?? 0, Math.max(most ?? 1, (least ?? 0) + 1)] },
    });
    if (job.id === this.id) return;
    this.id = job.id;
    this.events = new Map();
    this.order = []; // ids of events as the server lists them: the newest first
    this.steps = new Map();
    this.complete = false; // whether the events were read back to the first one
    this.seenEnd = false;
    this.showHead(job);
    this.showEvents();
    this.showCheckpoints([]);
  }

  /** Fetches what is new. */
  async update(job) {
    if (job.id !== this.id) return;
    this.showHead(job);
    if (this.seenEnd) return;
    const ended = hasEnded(job);
    try {
      await this.readEvents(job.id);
      const { data } = await get(`v1/fine_tuning/jobs/${job.id}/checkpoints?limit=${PAGE}`);
      if (job.id !== this.id) return;
      this.showEvents();
      this.showCheckpoints(data);
      this.seenEnd = ended;
    } catch (error) {
      if (job.id === this.id) setNotice(byId("detail-error"), `Events can’t be shown. ${error.message}`);
    }
  }

  async readEvents(id) {
    let after = "";
    const walked = [];
    for (;;) {
      const { data, has_more: hasMore } = await get(`v1/fine_tuning/jobs/${id}/events?limit=${PAGE}${after}`);
      if (id !== this.id) return;
      const met = data.some((event) => this.events.has(event.id));
      walked.push(...data.map((event) => event.id));
      const listed = new Set(walked);
      this.order = [...walked, ...this.order.filter((known) => !listed.has(known))];
      for (const event of data) {
        this.events.set(event.id, event);
        if (event.type === "metrics" && event.data) this.steps.set(event.data.step, event.data);
      }
      if (met && this.complete) return;
      if (!hasMore || this.events.size > MAX_EVENTS) {
        this.complete = true;
        return;
      }
      after = `&after=${encodeURIComponent(data.at(-1).id)}`;
    }
  }

  showHead(job) {
    this.job = job;
    setText(byId("detail-title"), nameOf(job));
    const button = byId("detail-chat");
    button.hidden = !job.fine_tuned_model;
    setNotice(byId("detail-error"), job.error?.message ?? "");
    const hyper = job.method?.[job.method.type]?.hyperparameters ?? job.hyperparameters ?? {};
    const facts = [
      ["Status", progressText(job)],
      ["Model", job.fine_tuned_model || job.model],
      ["Training file", this.fileName(job.training_file)],
      ["Validation file", job.validation_file ? this.fileName(job.validation_file) : null],
      ["Epochs", hyper.n_epochs],
      ["Batch", hyper.batch_size],
      ["Rank", job.settings?.rank],
      ["Learning rate", job.settings?.learning_rate],
      ["Speed", job.tokens_per_second ? `${number(job.tokens_per_second)} tokens/s` : null],
      ["Ends about", job.estimated_finish ? moment(job.estimated_finish) : null],
      ["Trained tokens", job.trained_tokens ? number(job.trained_tokens) : null],
      ["Ended", job.finished_at ? moment(job.finished_at) : null],
    ].filter(([, value]) => value !== null && value !== undefined && value !== "");
    const text = JSON.stringify(facts);
    if (text === this.factsText) return;
    this.factsText = text;
    byId("detail-facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
  }

  /** The name of a file; its id until the name is known. */
  fileName(id) {
    if (!this.files.has(id)) {
      this.files.set(id, id);
      get(`v1/files/${encodeURIComponent(id)}`).then((file) => this.files.set(id, file.filename), () => {});
    }
    return this.files.get(id);
  }

  showEvents() {
    const steps = [...this.steps.values()].sort((a, b) => a.step - b.step);
    byId("chart-loss").hidden = steps.length === 0;
    const train = steps.map((row) => row.train_loss ?? null);
    const valid = steps.map((row) => row.valid_loss ?? row.full_valid_loss ?? null);
    const lastValid = valid.findLast((value) => value !== null);
    this.chart.set([steps.map((row) => row.step), train, valid],
      steps.length ? `step ${steps.at(-1).step}, training ${loss(train.at(-1))}${lastValid === undefined ? "" : `, validation ${loss(lastValid)}`}`
        : "no step yet");
    const shown = this.order.map((known) => this.events.get(known)).filter((event) => event.type !== "metrics").slice(0, MAX_SHOWN);
    const text = shown.map((event) => event.id).join();
    if (text === this.eventsText && shown.length) return;
    this.eventsText = text;
    byId("event-list").replaceChildren(...shown.map((event) => el("li", { class: event.level },
      el("time", {}, timeOfDay(event.created_at, true)), event.level === "info" ? null : el("b", {}, event.level), el("span", {}, event.message))));
  }

  showCheckpoints(checkpoints) {
    byId("detail-checkpoints").hidden = checkpoints.length === 0;
    const text = checkpoints.map((checkpoint) => checkpoint.id).join();
    if (text === this.checkpointsText) return;
    this.checkpointsText = text;
    byId("checkpoint-list").replaceChildren(...checkpoints.map((checkpoint) => {
      const { train_loss: train, valid_loss: valid, full_valid_loss: full } = checkpoint.metrics ?? {};
      const measured = valid ?? full ?? train;
      return el("li", {}, el("button", {
        type: "button", class: "small", onclick: () => this.onAsk(checkpoint.fine_tuned_model_checkpoint),
      }, `Ask step ${checkpoint.step_number}`, measured === undefined || measured === null ? null : `, loss ${loss(measured)}`));
    }));
  }
}

function lossRange(least, most) {
  if (least === null || most === null) return [0, 1];
  const room = Math.max((most - least) * 0.08, 0.01);
  return [Math.max(0, least - room), most + room];
}
