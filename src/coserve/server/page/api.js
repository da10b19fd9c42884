// Talks to the server: the key, JSON, uploads and server-sent events. Knows nothing of what the page shows.

import { byId, setText } from "./dom.js";

const STORAGE = "coserve-key";

/** status: of HTTP, 0 if there was no answer. param: the field at fault, or null. */
export class ApiError extends Error {
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

let asking = null;

/** Asks for a key in a dialog; one dialog however many requests want it. */
function askKey(wasRefused) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    setText(byId("key-message"), wasRefused
      ? "The server does not know this key. Try another one."
      : "This server asks for a key. It is kept in this tab only.");
    byId("key-input").value = "";
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(STORAGE, byId("key-input").value.trim());
      dialog.close("given");
    };
    byId("key-cancel").onclick = () => dialog.close("cancelled");
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "given") resolve();
      else reject(new ApiError("The server asks for an API key. Reload the page to enter one.", 401));
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

async function readError(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not JSON: a proxy's page, perhaps.
  }
  const error = body?.error;
  return new ApiError(error?.message || `The server answered with status ${response.status}.`, response.status, error?.param ?? null);
}

let refused = false;

async function send(path, { method, body, headers = {}, signal }) {
  for (;;) {
    const key = sessionStorage.getItem(STORAGE);
    let response;
    try {
      response = await fetch(path, { method, body, signal, headers: key ? { ...headers, Authorization: `Bearer ${key}` } : headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server can’t be reached.", 0);
    }
    if (response.status === 401) {
      if (refused) throw await readError(response);
      if (sessionStorage.getItem(STORAGE) === key) {
        try {
          await askKey(key !== null);
        } catch (error) {
          refused = true;
          throw error;
        }
      }
      continue;
    }
    if (!response.ok) throw await readError(response);
    return response;
  }
}

export async function get(path, signal) {
  return (await send(path, { method: "GET", signal })).json();
}

function sendJson(path, body, signal) {
  return send(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });
}

export async function post(path, body = {}, signal) {
  return (await sendJson(path, body, signal)).json();
}

export async function remove(path) {
  return (await send(path, { method: "DELETE" })).json();
}

/** Uploads a file for finetuning; gives OpenAI's file object. */
export async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file, file.name);
  return (await send("v1/files", { method: "POST", body: form })).json();
}

/** The objects of a stream of server-sent events, up to [DONE]. An error event is raised. */
export async function* stream(path, body, signal) {
  const response = await sendJson(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("The connection closed before the answer was complete.", 0);
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const message = JSON.parse(data);
        if (message.error) throw new ApiError(message.error.message, 200, message.error.param ?? null);
        yield message;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
