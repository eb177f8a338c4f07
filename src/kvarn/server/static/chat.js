// The chat page: one conversation, streamed from this server's own API.
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
let messages = [];
let running = null;

function article(role, text) {
  $("hint")?.remove();
  const node = document.createElement("article");
  node.className = role;
  const body = document.createElement("div");
  if (role === "assistant") render(text, body);
  else body.textContent = text;
  node.append(body);
  log.append(node);
  log.scrollTop = log.scrollHeight;
  return { node, body };
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function requestBody() {
  const system = $("system").value.trim();
  return {
    model: $("model").value || undefined,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
}

// The key, where the server wants one. It stays on this page and is gone with it.
function headers(more = {}) {
  const key = $("api_key").value.trim();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const pieces = buffer.split("\n\n");
    buffer = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    // No kvarn answered, but a proxy before it.
    return `${response.status} ${response.statusText}`.trim();
  }
}

async function answer() {
  const conversation = messages;
  const controller = new AbortController();
  setRunning(controller);
  const { node, body } = article("assistant", "");
  const started = performance.now();
  let first = null;
  let text = "";
  let usage = null;
  let failure = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(requestBody()),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const piece = event.choices[0]?.delta.content;
      if (!piece) continue;
      first ??= performance.now();
      text += piece;
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      render(text, body);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    // Browsers report a connection that cannot be had or that breaks as a TypeError, each in words of its own.
    if (error instanceof TypeError) failure = "The connection to the server was lost.";
    else if (error.name !== "AbortError") failure = error.message;
  }
  if (messages !== conversation) return; // a new chat has begun, and may be running an answer of its own
  setRunning(null);
  if (failure) article("error", failure);
  if (text) messages.push({ role: "assistant", content: text });
  else node.remove();
  showFigures(started, first, usage);
  addTools(node, text);
  $("prompt").focus();
}

function showFigures(started, first, usage) {
  if (first === null) return;
  const ttft = `first token ${Math.round(first - started)} ms`;
  const seconds = (performance.now() - first) / 1000;
  const rate = usage && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : null;
  $("figures").textContent = rate ? `${ttft} · ${rate.toFixed(1)} tokens/s · ${usage.total_tokens} tokens` : ttft;
}

function addTools(node, text) {
  document.querySelectorAll(".tools").forEach((old) => old.remove());
  if (!text) return;
  const tools = document.createElement("div");
  tools.className = "tools";
  const button = (label, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "plain";
    made.textContent = label;
    made.addEventListener("click", action);
    tools.append(made);
  };
  button("Regenerate", () => {
    if (running) return;
    messages.pop();
    node.remove();
    answer();
  });
  button("Copy", () => navigator.clipboard?.writeText(text));
  node.append(tools);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  if (messages.at(-1)?.role === "user") messages.pop();
  messages.push({ role: "user", content: text });
  article("user", text);
  answer();
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});

// A setting out of its range keeps the form from being sent; the browser can say so only where the setting is seen.
$("settings").addEventListener("invalid", () => ($("settings").open = true), true);

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  messages = [];
  log.replaceChildren();
  $("figures").textContent = "";
  $("prompt").focus();
});

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() }).catch(() => null);
  if (!response?.ok) {
    $("figures").textContent = response ? await refusal(response) : "the server cannot be reached";
    setTimeout(loadModels, 500);
    return;
  }
  $("figures").textContent = "";
  const { data } = await response.json();
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
}
loadModels();
