// Asks two models the same question and shows both answers as they come. Each side keeps its own conversation.

import { stream } from "./api.js";
import { byId, el, milliseconds, modelLabel, modelOption, number, setNotice, setText } from "./dom.js";

const SIDES = ["left", "right"];

export class ChatView {
  constructor() {
    this.turns = { left: [], right: [] };
    this.stopper = null;
    this.names = null;
    this.offered = null; // a tuned model that came while the right side stayed with another one
    this.following = true; // the right side moves on to each new model until somebody picks one or asks
    byId("chat-form").onsubmit = (event) => {
      event.preventDefault();
      if (this.stopper === null) this.ask();
    };
    byId("chat-text").onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        byId("chat-form").requestSubmit();
      }
    };
    byId("chat-stop").onclick = () => this.stopper?.abort();
    byId("chat-new").onclick = () => this.clear();
    byId("chat-offer-take").onclick = () => this.choose(this.offered);
    for (const side of SIDES) byId(`chat-${side}`).onchange = () => this.picked(side);
  }

  /** models: of /v1/models. What was chosen stays chosen; in the place of a model that is gone comes the newest one. */
  setModels(models) {
    const base = models.filter((model) => !model.parent);
    const tuned = models.filter((model) => model.parent).sort((a, b) => (b.created ?? 0) - (a.created ?? 0));
    const names = models.map((model) => model.id).join("\n");
    if (names === this.names) return;
    const before = this.names?.split("\n");
    this.names = names;
    const chosen = Object.fromEntries(SIDES.map((side) => [side, byId(`chat-${side}`).value]));
    const isGone = (name) => name !== "" && !models.some((model) => model.id === name);
    const newest = tuned[0]?.id ?? "";
    const left = !chosen.left || isGone(chosen.left) ? base[0]?.id : chosen.left;
    const right = this.following || isGone(chosen.right) ? newest : chosen.right;
    fill(byId("chat-left"), base, tuned, false, left);
    fill(byId("chat-right"), base, tuned, true, right);
    for (const side of SIDES) if (byId(`chat-${side}`).value !== chosen[side]) this.turns[side] = [];
    const fresh = tuned.find(({ id }) => before && !before.includes(id) && !id.includes(":ckpt-step-"));
    this.offer(fresh?.id ?? (isGone(this.offered ?? "") ? null : this.offered));
  }

  /** Says that a model can be asked which the right side does not show; null: no model. */
  offer(name) {
    this.offered = name === byId("chat-right").value ? null : name;
    setText(byId("chat-offer-text"), this.offered ? `New: ${modelLabel(this.offered)}.` : "");
    byId("chat-offer").hidden = !this.offered;
  }

  /** Another model starts another conversation. */
  picked(side) {
    this.turns[side] = [];
    if (side === "right") this.following = false;
    this.offer(this.offered);
  }

  /** Puts a model on the right and the cursor into the question. */
  choose(name) {
    const select = byId("chat-right");
    if (![...select.options].some((option) => option.value === name)) select.append(modelOption(name));
    select.value = name;
    this.picked("right");
    byId("chat").scrollIntoView({ block: "start" });
    byId("chat-text").focus();
  }

  clear() {
    this.stopper?.abort();
    this.turns = { left: [], right: [] };
    byId("chat-log").replaceChildren(byId("chat-empty"));
    byId("chat-empty").hidden = false;
    setNotice(byId("chat-error"), "");
    byId("chat-text").focus();
  }

  async ask() {
    const question = byId("chat-text").value.trim();
    const settings = readSettings();
    if (typeof settings === "string" || !question) {
      setNotice(byId("chat-error"), question ? settings : "Type a question first.");
      byId("chat-text").focus();
      return;
    }
    setNotice(byId("chat-error"), "");
    byId("chat-empty").hidden = true;
    this.following &&= !byId("chat-right").value;
    const sides = SIDES.filter((side) => byId(`chat-${side}`).value);
    const answers = Object.fromEntries(sides.map((side) => [side, answerBox(byId(`chat-${side}`).value)]));
    const log = byId("chat-log");
    log.append(el("p", { class: "question" }, el("span", { class: "sr" }, "You: "), question),
      el("div", { class: "pair" }, ...sides.map((side) => answers[side].box)));
    log.scrollTop = log.scrollHeight;
    byId("chat-text").value = "";
    this.stopper = new AbortController();
    this.setBusy(true);
    await Promise.all(sides.map((side) => this.answer(side, question, settings, answers[side])));
    this.stopper = null;
    this.setBusy(false);
  }

  async answer(side, question, settings, view) {
    const turns = this.turns[side];
    turns.push({ role: "user", content: question });
    const begun = performance.now();
    let text = "";
    let first = null;
    let tokens = 0;
    try {
      const body = { model: view.model, messages: turns, stream: true, stream_options: { include_usage: true }, ...settings };
      for await (const chunk of stream("v1/chat/completions", body, this.stopper.signal)) {
        const { content: piece, reasoning_content: thought } = chunk.choices?.[0]?.delta ?? {};
        if (thought) {
          first ??= performance.now();
          view.think(thought);
        }
        if (piece) {
          first ??= performance.now();
          text += piece;
          view.add(piece);
        }
        tokens = chunk.usage?.completion_tokens ?? tokens;
      }
      const seconds = (performance.now() - (first ?? begun)) / 1000;
      const rate = tokens > 1 && seconds > 0 ? `, ${number((tokens - 1) / seconds)} tokens/s` : "";
      const empty = first === null ? "An empty answer." : "It ended in its thoughts.";
      view.end(!text ? empty : `first token ${milliseconds(Math.round(first - begun))}${rate}`);
    } catch (error) {
      if (error.name === "AbortError") view.end("Stopped.");
      else view.fail(error.message);
    }
    if (text) turns.push({ role: "assistant", content: text });
    else turns.pop();
  }

  setBusy(busy) {
    byId("chat-send").disabled = busy;
    byId("chat-stop").disabled = !busy;
    byId("chat-log").setAttribute("aria-busy", String(busy));
  }
}

function fill(select, base, tuned, mayBeEmpty, chosen) {
  const group = (label, models) => el("optgroup", { label }, ...models.map((model) => modelOption(model.id)));
  const parts = [];
  if (mayBeEmpty) parts.push(el("option", { value: "" }, tuned.length ? "Nobody" : "No tuned model yet"));
  if (base.length) parts.push(group("Base", base));
  if (tuned.length) parts.push(group("Tuned", tuned));
  select.replaceChildren(...parts);
  select.value = chosen ?? "";
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

function readSettings() {
  const temperature = Number(byId("chat-temperature").value);
  const tokens = Number(byId("chat-tokens").value);
  if (!(temperature >= 0 && temperature <= 2)) return "Temperature is a number from 0 to 2.";
  if (!Number.isInteger(tokens) || tokens < 1) return "Most tokens is a whole number from 1.";
  return { temperature, max_completion_tokens: tokens };
}

function answerBox(model) {
  const text = el("p", { class: "text" });
  const note = el("p", { class: "note" }, "Waiting for the first token");
  const thoughts = el("p");
  const thinking = el("details", { class: "thoughts", hidden: true }, el("summary", {}, "Thoughts"), thoughts);
  const box = el("div", { class: "answer" }, el("p", { class: "who", title: model }, modelLabel(model)), thinking, text, note);
  const follow = () => {
    const log = byId("chat-log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
  };
  return {
    model, box,
    think(piece) {
      thoughts.append(piece);
      thinking.hidden = false;
      setText(note, "Thinking");
      follow();
    },
    add(piece) {
      text.append(piece);
      setText(note, "");
      follow();
    },
    end(message) {
      setText(note, message);
      follow();
    },
    fail(message) {
      setText(note, message);
      note.classList.add("bad");
      follow();
    },
  };
}
