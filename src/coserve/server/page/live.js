// The upper half: what both workloads do now and did in the last five minutes. Asks /api/live once a second.

import { get } from "./api.js";
import { LineChart } from "./chart.js";
import { byId, bytes, duration, el, milliseconds, number, percent, setText, timeOfDay } from "./dom.js";
import { ReplicasView } from "./replicas.js";

const HISTORY_S = 300;
const LEAST_S = 60;
const TIME_STEPS_S = [15, 30, 60, 120];
const PERIOD_MS = 1000;
const GAP_S = 5;
const ENOUGH = 100; // values that a 99th percentile must be of to be judged
const COLUMNS = ["time", "inference", "finetuning", "ttft50", "ttft99", "tpot50", "tpot99"];
const SEGMENTS = [
  ["used", "Requests", "--inference"],
  ["cached", "Prefix cache", "--cache"],
  ["arena", "Training", "--finetuning"],
  ["free", "Free", "--free"],
];
const STATES = {
  ready: ["Ready", "ok"],
  down: ["Engine is starting", "wait"],
  lost: ["Server not reachable", "bad"],
  refused: ["No access", "bad"],
};

const upTo = (least) => (_, __, most) => [0, Math.max(least, (most || 0) * 1.1)];
const lastMinutes = { range: (_, least, most) => [Math.max(most - HISTORY_S, Math.min(least, most - LEAST_S)), most] };

export class LiveView {
  constructor() {
    this.history = Object.fromEntries(COLUMNS.map((name) => [name, []]));
    this.objectives = {}; // not known yet; null: best effort
    this.replicas = new ReplicasView();
    this.rate = this.rateChart("chart-rate", "Inference", "--inference");
    this.training = this.rateChart("chart-training", "Finetuning", "--finetuning");
    this.ttft = this.latencyChart("chart-ttft", "Time to first token", "ttft_ms");
    this.tpot = this.latencyChart("chart-tpot", "Time per output token", "tpot_ms");
    this.bar = Object.fromEntries(SEGMENTS.map(([name, , color]) => {
      const part = el("span", { class: `part ${name}` });
      part.style.background = `var(${color})`;
      return [name, part];
    }));
    byId("memory-bar").append(...Object.values(this.bar));
    this.amounts = Object.fromEntries(SEGMENTS.map(([name]) => [name, el("span", { class: "amount" })]));
    byId("memory-legend").append(...SEGMENTS.map(([name, label, color]) => {
      const mark = el("span", { class: "square", "aria-hidden": true });
      mark.style.background = `var(${color})`;
      return el("li", {}, mark, label, " ", this.amounts[name]);
    }));
  }

  /** One workload's tokens per second, on an axis of its own: a token costs each of them something else. */
  rateChart(id, label, color) {
    return new LineChart(byId(id), {
      title: `${label}, tokens/s`, x: lastMinutes, steps: TIME_STEPS_S,
      formatX: (time, step) => timeOfDay(time, step < 60), formatReadout: (time) => timeOfDay(time, true),
      series: [{ label, color, format: number }], scales: { y: { range: upTo(10) } }, axes: [{ scale: "y", format: number }],
    });
  }

  latencyChart(id, title, objective) {
    return new LineChart(byId(id), {
      title, x: lastMinutes, steps: TIME_STEPS_S, formatX: (time, step) => timeOfDay(time, step < 60), formatReadout: (time) => timeOfDay(time, true),
      series: [
        { label: "p50", color: "--inference", format: milliseconds },
        { label: "p99", color: "--slow", format: milliseconds },
        { label: "Objective", color: "--objective", format: milliseconds, dash: [5, 4], width: 1, constant: true, optional: true },
      ],
      scales: { y: { range: (_, __, most) => [0, Math.max(most || 0, this.objectives[objective] || 1) * 1.15] } },
      axes: [{ scale: "y", format: (value) => (value >= 10_000 ? `${number(value / 1000)} s` : number(value)) }],
    });
  }

  /** Runs until the page is closed; pauses while nobody looks. */
  async run() {
    for (;;) {
      const begun = performance.now();
      if (!document.hidden) await this.poll();
      await new Promise((resolve) => setTimeout(resolve, Math.max(100, PERIOD_MS - (performance.now() - begun))));
    }
  }

  async poll() {
    try {
      const live = await get("api/live", AbortSignal.timeout(10_000));
      this.show(live);
    } catch (error) {
      this.showState(error.status === 401 ? "refused" : "lost");
      this.append({});
    }
  }

  show(live) {
    this.objectives = live.objectives;
    const { inference, finetuning, engine } = live;
    this.showState(engine.ready ? "ready" : "down");
    setText(byId("fact-model"), engine.model);
    setText(byId("fact-policy"), engine.policy);
    setText(byId("fact-uptime"), duration(engine.uptime_s));
    setText(byId("fact-restarts"), number(engine.restarts));
    setText(byId("fact-error"), predictionError(live.prediction_errors));
    this.showTiles(live);
    this.showMemory(live.memory);
    this.replicas.show(live.replicas, live.signals);
    this.append({
      inference: inference.tokens_per_s, finetuning: finetuning.tokens_per_s,
      ttft50: inference.ttft_ms.p50, ttft99: inference.ttft_ms.p99, tpot50: inference.tpot_ms.p50, tpot99: inference.tpot_ms.p99,
    });
  }

  showState(name) {
    const [text, kind] = STATES[name];
    setText(byId("engine-state"), text);
    byId("engine-state").dataset.state = kind;
  }

  showTiles({ inference, finetuning, objectives, window_s: span }) {
    setText(byId("tile-inference"), number(inference.tokens_per_s));
    setText(byId("note-inference"), `${number(inference.prompt_tokens_per_s)} prompt tokens/s`);
    setText(byId("tile-finetuning"), number(finetuning.tokens_per_s));
    setText(byId("note-finetuning"), trainingNote(finetuning));
    for (const name of ["ttft", "tpot"]) {
      const { p99, count } = inference[`${name}_ms`];
      const limit = objectives[`${name}_ms`];
      setText(byId(`tile-${name}`), milliseconds(p99));
      setText(byId(`of-${name}`), count > 0 && count < ENOUGH ? `p99 of ${count}` : "p99");
      const late = limit !== null && p99 !== null && p99 > limit;
      setText(byId(`note-${name}`), late ? `over the objective of ${milliseconds(limit)}` : objectiveNote(limit));
      byId(`tile-box-${name}`).classList.toggle("late", late && count >= ENOUGH);
    }
    const { attainment: met, judged } = inference;
    setText(byId("tile-attainment"), percent(met));
    setText(byId("note-attainment"), met === null ? "no request with objectives ended lately" : `of ${requests(judged)} in ${number(span)} s`);
    byId("tile-box-attainment").classList.toggle("late", met !== null && met < 0.95 && judged >= ENOUGH);
    setText(byId("tile-running"), number(inference.running));
    setText(byId("note-running"), `${number(inference.waiting)} waiting, ${number(inference.requests_last_minute)} in the last minute`);
  }

  showMemory(memory) {
    const size = memory.block_bytes;
    const words = [];
    for (const [name, label] of SEGMENTS) {
      const blocks = memory[`${name}_blocks`];
      const share = memory.num_blocks ? blocks / memory.num_blocks : 0;
      this.bar[name].style.flexGrow = String(share * 1000);
      this.bar[name].hidden = blocks === 0;
      setText(this.amounts[name], memory.num_blocks ? `${bytes(blocks * size)}, ${number(share * 100)}%` : "–");
      words.push(`${label} ${number(share * 100)}%`);
    }
    setText(byId("memory-total"), memory.num_blocks ? `${bytes(memory.num_blocks * size)}, ${number(memory.num_blocks)} blocks` : "");
    byId("memory-bar").setAttribute("aria-label", `Memory pool: ${words.join(", ")}`);
  }

  append(sample) {
    const { history } = this;
    const now = Date.now() / 1000;
    const last = history.time.at(-1);
    if (last !== undefined && now - last > GAP_S) this.push(last + 0.5, {});
    this.push(now, sample);
    while (history.time[0] < now - HISTORY_S) for (const name of COLUMNS) history[name].shift();
    const line = (limit) => history.time.map(() => limit ?? null);
    const { inference, finetuning, ttft50, ttft99, tpot50, tpot99 } = history;
    this.rate.set([history.time, inference], `now ${number(inference.at(-1))}`);
    this.training.set([history.time, finetuning], `now ${number(finetuning.at(-1))}`);
    this.ttft.set([history.time, ttft50, ttft99, line(this.objectives.ttft_ms)],
      `p50 ${milliseconds(ttft50.at(-1))}, p99 ${milliseconds(ttft99.at(-1))}, ${objectiveNote(this.objectives.ttft_ms)}`);
    this.tpot.set([history.time, tpot50, tpot99, line(this.objectives.tpot_ms)],
      `p50 ${milliseconds(tpot50.at(-1))}, p99 ${milliseconds(tpot99.at(-1))}, ${objectiveNote(this.objectives.tpot_ms)}`);
  }

  push(time, sample) {
    this.history.time.push(time);
    for (const name of COLUMNS.slice(1)) this.history[name].push(sample[name] ?? null);
  }
}

const objectiveNote = (limit) => (limit === null ? "best effort" : `objective ${milliseconds(limit)}`);

const requests = (count) => (count === 1 ? "1 request" : `${number(count)} requests`);

/** Rate and share are of the same few seconds. */
function trainingNote({ jobs, share, tokens_per_s: rate }) {
  if (share === null || (jobs === 0 && !rate)) return "no job is training";
  return `${percent(share)} of the engine’s time`;
}

/** How far predicted iteration times are off: of iterations with finetuning, or of the commonest kind. */
function predictionError(errors) {
  const kinds = Object.values(errors).sort((a, b) => b.iterations - a.iterations);
  const error = errors.finetuning ?? kinds[0];
  return error ? percent(error.median) : "–";
}
