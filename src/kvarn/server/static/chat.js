// The chat page: what is open, what runs, and what the keys and buttons do about it.
import { Answer } from "./answer.js";
import { Failure, ask } from "./api.js";
import { parameters, setUpSettings, settingsAreGood, showSettings, systemMessages } from "./settings.js";
import { Sidebar, toast } from "./sidebar.js";
import * as store from "./store.js";
import { ConversationView } from "./view.js";

const RETRY_MS = 1000;
const $ = (id) => document.getElementById(id);

let open = store.conversation(location.hash.slice(1)) ?? store.begun();
let running = null; // the AbortController of the answer that comes
let editing = false;

const view = new ConversationView($("log"), { regenerate, edit, retry, use });
const sidebar = new Sidebar({ current: () => open.id, open: openConversation });

function openConversation(id) {
  running?.abort();
  setRunning(null);
  setEditing(false);
  open = (id && store.conversation(id)) || store.begun();
  showOpen();
  sidebar.refresh();
  $("prompt").focus();
}

function showOpen() {
  history.replaceState(null, "", open.messages.length ? `#${open.id}` : location.pathname);
  view.show(open.messages);
}

function keep(conversation) {
  conversation.updated = Date.now();
  if (!store.save(conversation)) toast("There is no room to keep this conversation: export or delete others.");
  sidebar.refresh();
}

function setRunning(controller) {
  const focused = document.activeElement;
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  if (controller && focused === $("send")) $("stop").focus();
  if (!controller && focused === $("stop")) $("prompt").focus();
}

function setEditing(on) {
  editing = on;
  $("editing").hidden = !on;
  if (!on) $("prompt").value = "";
}

function send() {
  const content = $("prompt").value.trim();
  if (!content || running || !settingsAreGood()) return;
  const last = open.messages.findLastIndex(({ role }) => role === "user");
  if (editing) open.messages.length = last;
  else if (open.messages.at(-1)?.role === "user") open.messages.pop(); // it was never answered: this one takes its place
  const redraw = editing || last === open.messages.length;
  setEditing(false);
  if (redraw) view.show(open.messages);
  open.messages.push({ role: "user", content });
  view.addUser(open.messages.at(-1));
  answer();
}

async function answer() {
  if (running || !settingsAreGood()) return;
  const conversation = open;
  const controller = new AbortController();
  setRunning(controller);
  view.clearFailure();
  keep(conversation);
  if (location.hash !== `#${conversation.id}`) history.replaceState(null, "", `#${conversation.id}`);
  const coming = new Answer();
  const shown = view.beginAnswer();
  $("status").textContent = "Answering.";
  const failure = await ended(coming, requestBody(conversation), controller.signal, () => shown.grow(coming));
  const message = madeOf(coming, controller.signal.aborted);
  if (message) {
    conversation.messages.push(message);
    if (store.conversation(conversation.id) || conversation === open) keep(conversation); // else it was deleted meanwhile
  }
  if (conversation !== open) return; // another is open, and may be running an answer of its own
  setRunning(null);
  shown.end(message);
  if (failure || !message) view.fail(failure);
  $("status").textContent = failure ? "" : controller.signal.aborted ? "Stopped." : "The answer is complete.";
}

// Runs it; why it failed, null where it came to its end or was stopped.
async function ended(coming, body, signal, told) {
  try {
    await coming.run(body, signal, told);
    return null;
  } catch (error) {
    if (error.name === "AbortError") return null;
    if (!(error instanceof Failure)) console.error(error);
    return error;
  }
}

// What is kept of an answer; null where nothing has come.
function madeOf({ text, thinking, figures, finish }, stopped) {
  if (!text && !thinking && finish === null) return null;
  const note = stopped ? "stopped" : finish === "length" ? "cut at the longest answer" : text ? undefined : "no text";
  return { role: "assistant", content: text, ...(thinking && { thinking }), figures, note };
}

function requestBody(conversation) {
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  return { model: $("model").value || undefined, messages: [...systemMessages(), ...messages], ...parameters() };
}

function regenerate() {
  if (running) return;
  open.messages.pop();
  view.show(open.messages);
  answer();
}

function retry() {
  if (open.messages.at(-1)?.role === "assistant") regenerate();
  else answer();
}

function edit() {
  const last = open.messages.findLast(({ role }) => role === "user");
  if (running || !last) return;
  setEditing(true);
  $("prompt").value = last.content;
  $("prompt").focus();
}

function use(text) {
  $("prompt").value = text;
  send();
}

async function loadModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id, state }) => new Option(named(id, state), id, false, id === chosen)));
    $("model").disabled = false;
  } catch (error) {
    if (!(error instanceof Failure) || error.status === 401) return;
    $("model").replaceChildren(new Option(error.status === 503 ? "loading …" : "no server", ""));
    setTimeout(loadModels, RETRY_MS);
  }
}

function named(id, state) {
  return state && state !== "loaded" ? `${id} (${state})` : id;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => running?.abort());
$("cancel").addEventListener("click", () => (setEditing(false), $("prompt").focus()));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && $("prompt").value === "" && open.messages.length) {
    event.preventDefault();
    edit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else if (editing) setEditing(false);
  else if ($("settings").contains(document.activeElement)) showSettings(false);
  else sidebar.close();
});
document.addEventListener("visibilitychange", () => !document.hidden && !$("model").disabled && loadModels());

setUpSettings();
showOpen();
loadModels();
