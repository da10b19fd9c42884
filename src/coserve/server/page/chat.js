// Asks two models the same question and shows both answers as they come: thoughts, text, calls of tools. Each side keeps its own
// conversation, and gives its own results to the calls.

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
    await this.during(sides.map((side) => {
      const begun = this.turns[side].length;
      this.turns[side].push({ role: "user", content: question });
      return this.answer(side, begun, settings, answers[side]);
    }));
  }

  /** Waits for answers; meanwhile they can be stopped, and nothing else can be asked. */
  async during(answers) {
    this.setBusy(true);
    await Promise.all(answers);
    this.stopper = null;
    this.setBusy(false);
  }

  /** Asks for a side's next turn. begun: how many turns there were before; the conversation goes back there if none comes. */
  async answer(side, begun, settings, view) {
    const turns = this.turns[side];
    const asked = performance.now();
    const message = { role: "assistant", content: "" };
    let first = null;
    let tokens = 0;
    try {
      const body = { model: view.model, messages: turns, stream: true, stream_options: { include_usage: true }, ...settings };
      for await (const chunk of stream("v1/chat/completions", body, this.stopper.signal)) {
        const delta = chunk.choices?.[0]?.delta ?? {};
        if (delta.content || delta.reasoning_content || delta.tool_calls) first ??= performance.now();
        addDelta(message, delta);
        view.add(delta);
        tokens = chunk.usage?.completion_tokens ?? tokens;
      }
      const seconds = (performance.now() - (first ?? asked)) / 1000;
      const rate = tokens > 1 && seconds > 0 ? `, ${number((tokens - 1) / seconds)} tokens/s` : "";
      const empty = first === null ? "An empty answer." : "It ended in its thoughts.";
      const some = message.content || message.tool_calls;
      view.end(some ? `first token ${milliseconds(Math.round(first - asked))}${rate}` : empty);
    } catch (error) {
      if (error.name === "AbortError") view.end("Stopped.");
      else view.fail(error.message);
      delete message.tool_calls; // they may not be whole
    }
    if (!message.content && !message.tool_calls) {
      turns.splice(begun);
      return;
    }
    turns.push(message);
    if (message.tool_calls) view.askResults(message.tool_calls, (results) => this.giveResults(side, turns, results, view.model));
  }

  /** Goes on with the results of a turn's calls, which are {call: result} by the call's id. */
  giveResults(side, turns, results, model) {
    const settings = readSettings();
    if (this.stopper !== null || this.turns[side] !== turns || turns.at(-1).role !== "assistant" || typeof settings === "string") {
      setNotice(byId("chat-error"), typeof settings === "string" ? settings : "The conversation has gone on since; ask again.");
      return false;
    }
    setNotice(byId("chat-error"), "");
    const begun = turns.length;
    for (const [id, result] of Object.entries(results)) turns.push({ role: "tool", tool_call_id: id, content: result });
    const view = answerBox(model);
    byId("chat-log").append(el("div", { class: "pair" }, ...SIDES.map((other) => (other === side ? view.box : el("div")))));
    this.stopper = new AbortController();
    this.during([this.answer(side, begun, settings, view)]);
    return true;
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

/** What a request says beside its messages; a text where something is wrong. */
function readSettings() {
  const temperature = Number(byId("chat-temperature").value);
  const tokens = Number(byId("chat-tokens").value);
  if (!(temperature >= 0 && temperature <= 2)) return "Temperature is a number from 0 to 2.";
  if (!Number.isInteger(tokens) || tokens < 1) return "Most tokens is a whole number from 1.";
  const settings = { temperature, max_completion_tokens: tokens };
  const tools = readJson("chat-tools");
  if (tools !== null && !Array.isArray(tools)) return "Tools are a JSON list.";
  if (tools !== null) Object.assign(settings, { tools, tool_choice: byId("chat-choice").value });
  const schema = readJson("chat-schema");
  if (schema === undefined) return "The schema of the answer is a JSON object.";
  if (schema !== null) settings.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const thinking = byId("chat-thinking").value;
  if (thinking) settings.chat_template_kwargs = { enable_thinking: thinking === "on" };
  return settings;
}

/** The JSON in a field: null where it is empty, undefined where it is no JSON. */
function readJson(id) {
  const text = byId(id).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Adds a stream's delta to the message that is made of them. */
function addDelta(message, delta) {
  if (delta.content) message.content += delta.content;
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
  for (const { index, id, function: called } of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    message.tool_calls[index] ??= { id, type: "function", function: { name: called.name, arguments: "" } };
    message.tool_calls[index].function.arguments += called.arguments ?? "";
  }
}

function answerBox(model) {
  const thought = el("p");
  const thoughts = el("details", { class: "thoughts", open: true, hidden: true }, el("summary", {}, "Thoughts"), thought);
  const text = el("p", { class: "text" });
  const calls = el("div");
  const note = el("p", { class: "note" }, "Waiting for the first token");
  const box = el("div", { class: "answer" },
    el("p", { class: "who", title: model }, modelLabel(model)), thoughts, text, calls, note);
  const follow = () => {
    const log = byId("chat-log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
  };
  return {
    model, box,
    add(delta) {
      if (delta.reasoning_content) {
        thoughts.hidden = false;
        thought.append(delta.reasoning_content);
      }
      if (delta.content) {
        thoughts.open = false;
        text.append(delta.content);
      }
      for (const { index, function: called } of delta.tool_calls ?? []) {
        while (calls.children.length <= index) calls.append(el("div", { class: "call" }, el("code")));
        calls.children[index].firstChild.append(called.name ? `${called.name} ` : "", called.arguments ?? "");
      }
      if (delta.content || delta.reasoning_content || delta.tool_calls) setText(note, "");
      follow();
    },
    /** A field below each call for its result. give: is called with all results, and says whether they were taken. */
    askResults(asked, give) {
      const fields = asked.map(({ id, function: called }, index) => {
        const field = el("input", { "aria-label": `Result of ${called.name}`, placeholder: "Its result", autocomplete: "off" });
        calls.children[index].append(field);
        return [id, field];
      });
      const button = el("button", { type: "button", class: "small" }, fields.length > 1 ? "Give the results" : "Give the result");
      button.onclick = () => {
        if (!give(Object.fromEntries(fields.map(([id, field]) => [id, field.value])))) return;
        button.remove();
        for (const [, field] of fields) field.disabled = true;
      };
      calls.append(button);
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
