// Asking the server: the key where it wants one, streams, and failures in words that say what to do next.
import { askForKey, key } from "./key.js";

// Why there is no answer. message: what happened. next: what to do about it. status: 0 where nothing answered.
export class Failure extends Error {
  constructor(message, next = "", { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.next = next;
    this.status = status;
    this.retryAfter = retryAfter; // seconds; 0 where the server does not say
  }
}

// The response of a route of this server, with a good status. Where it wants a key and has none or a wrong one, the
// person is asked. Raises Failure, and AbortError where `signal` says so.
export async function ask(path, { body, signal } = {}) {
  for (;;) {
    const used = key();
    const response = await send(path, body, signal, used);
    if (response.ok) return response;
    const failure = await refusal(response);
    if (response.status !== 401) throw failure;
    if (key() === used && !(await askForKey(used ? "The server does not know this key." : ""))) throw failure;
    signal?.throwIfAborted();
  }
}

async function send(path, body, signal, secret) {
  const headers = { ...(secret && { Authorization: `Bearer ${secret}` }), ...(body && { "Content-Type": "application/json" }) };
  const request = { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) };
  try {
    return await fetch(path, request);
  } catch (error) {
    throw unlessAborted(error);
  }
}

// Browsers report a connection that cannot be had or that breaks as a TypeError, each in words of its own.
function unlessAborted(error) {
  if (!(error instanceof TypeError)) return error;
  return new Failure("The connection to the server was lost.", "See whether it still runs, then try again.");
}

async function refusal(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // No kvarn answered, but a proxy before it.
  }
  const message = typeof error.message === "string" ? error.message : `${response.status} ${response.statusText}`.trim();
  return new Failure(message, nextStep(response.status, error, retryAfter), { status: response.status, retryAfter });
}

function nextStep(status, error, retryAfter) {
  const later = retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment.";
  if (status === 401) return "Give a key under Settings.";
  if (status === 403) return "Ask whoever runs the server to let this key do it.";
  if (status === 404) return "Choose another model above.";
  if (status === 413) return "Start a new chat, or send less text.";
  if (status === 429) return later;
  if (status === 503) return later;
  if (status >= 500) return "Try again; the server's log says more.";
  if (/long|length|max_model_len/.test(error.message ?? "")) return "Start a new chat, or allow a shorter answer in Settings.";
  if (status === 400 || status === 422) return "Look at Settings, or edit the message.";
  return "";
}

// The JSON values of a stream of server-sent events, until its [DONE]. Raises Failure where the server tells of one in the
// stream, or where the stream ends before that.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw unlessAborted(error);
    });
    if (done) throw new Failure("The answer broke off.", "Try again.");
    buffer += value;
    const pieces = buffer.split("\n\n");
    buffer = pieces.pop();
    for (const piece of pieces) {
      if (!piece.startsWith("data: ")) continue;
      const data = piece.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message, "Try again.", { status: event.error.code ?? 500 });
      yield event;
    }
  }
}
