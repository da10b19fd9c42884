// One line per replica, where several engines serve behind this address; a single server shows nothing of it.

import { byId, el, number, percent, setText } from "./dom.js";

const RATE_S = 5; // seconds that rates look back

export class ReplicasView {
  constructor() {
    this.rows = new Map();
    this.box = byId("replicas");
    this.body = byId("replicas-body");
  }

  show(replicas, signals) {
    this.box.hidden = replicas.length === 0;
    const known = new Set(replicas.map(({ id }) => id));
    for (const [id, row] of this.rows) {
      if (known.has(id)) continue;
      row.line.remove();
      this.rows.delete(id);
    }
    for (const replica of replicas) this.showOne(replica);
    const ready = replicas.filter(isReady).length;
    setText(byId("replicas-note"), `${ready} of ${replicas.length} take requests${late(signals)}`);
  }

  showOne(replica) {
    const row = this.rows.get(replica.id) ?? this.add(replica);
    const [text, kind] = state(replica);
    setText(row.state, text);
    row.state.dataset.state = kind;
    row.state.title = replica.trouble;
    setText(row.requests, `${number(replica.running)} running, ${number(replica.waiting)} waiting`);
    setText(row.jobs, replica.jobs === null || replica.jobs === undefined ? "–" : number(replica.jobs));
    setText(row.cache, percent(replica.kv_used));
    const now = performance.now() / 1000;
    row.samples = row.samples.filter(({ at }) => now - at <= RATE_S);
    if (isReady(replica)) row.samples.push({ at: now, inference: replica.inference_tokens, finetuning: replica.finetune_tokens });
    setText(row.inference, rate(row.samples, "inference"));
    setText(row.finetuning, rate(row.samples, "finetuning"));
  }

  add(replica) {
    const cells = Object.fromEntries(["state", "requests", "inference", "finetuning", "cache", "jobs"].map((name) => [name, el("td")]));
    cells.state = el("p", { class: "state small" });
    const name = el("th", { scope: "row", title: replica.id }, replica.id.replace(/^replica-/, "").slice(0, 6), el("span", { class: "note" }, replica.node));
    const line = el("tr", {}, name, el("td", {}, cells.state), cells.requests, cells.inference, cells.finetuning, cells.cache, cells.jobs);
    this.body.append(line);
    const row = { line, samples: [], ...cells };
    this.rows.set(replica.id, row);
    return row;
  }
}

const isReady = ({ ready, draining, lost }) => ready && !draining && !lost;

function state({ ready, draining, lost }) {
  if (lost) return ["Not reachable", "bad"];
  if (draining) return ["Ending", "wait"];
  return ready ? ["Ready", "ok"] : ["Engine is starting", "wait"];
}

/** Tokens per second between the first and the last sample; a counter that fell was started again. */
function rate(samples, name) {
  const first = samples[0];
  const last = samples.at(-1);
  if (samples.length < 2 || last[name] < first[name]) return "–";
  return number((last[name] - first[name]) / (last.at - first.at));
}

/** Of the requests of about the last minute, those predicted to miss an objective. */
function late({ missing_share: share }) {
  return share ? `; ${percent(share)} of requests are predicted to be late` : "";
}
