// Elements and numbers. Data becomes text only: nothing here or elsewhere parses it as HTML.

export const byId = (id) => document.getElementById(id);

/** An element. Functions become properties (onclick), true a bare attribute; false and undefined leave it out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node[name] = value;
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets text only where it changes, so that screen readers and selections are left alone. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Shows a message, or hides its element where there is none. */
export function setNotice(node, text) {
  setText(node, text || "");
  node.hidden = !text;
}

/** What tells models apart, first: 'harbour-guide 5f1c2a, step 60' for ft:BASE:ORGANIZATION:SUFFIX:ID:ckpt-step-60. */
export function modelLabel(name) {
  const parts = name.split(":");
  if (parts[0] !== "ft" || parts.length < 5) return name;
  const step = /^ckpt-step-(\d+)$/.exec(parts.at(-1))?.[1];
  const [suffix, id] = parts.slice(step ? -3 : -2);
  return `${suffix ? `${suffix} ` : ""}${id}${step ? `, step ${step}` : ""}`;
}

/** An option of a list of models; its whole name is the value, and shown on request. */
export const modelOption = (name) => el("option", { value: name, title: name }, modelLabel(name));

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });

/** A count or rate: one decimal below 10. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 10 && !Number.isInteger(value) ? one.format(value) : plain.format(value);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10_000 ? `${one.format(value / 1000)} s` : `${number(value)} ms`;
}

/** Rounded down: 100% is said only of all. */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  return share === 0 || share === 1 ? `${share * 100}%` : `${one.format(Math.floor(share * 1000) / 10)}%`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${value < 10 && power > 0 ? one.format(value) : plain.format(value)} ${units[power]}`;
}

export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} days`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const clockSeconds = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

/** Time of day, after the day if that is not today. */
export function moment(seconds) {
  const date = new Date(seconds * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today ? clock.format(date) : `${day.format(date)}, ${clock.format(date)}`;
}

/** Local time of Unix seconds. */
export const timeOfDay = (seconds, withSeconds = false) => (withSeconds ? clockSeconds : clock).format(new Date(seconds * 1000));
