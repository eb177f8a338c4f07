// The settings beside the chat: parameters, the system prompt, the key. What is set is kept by this browser; what is left
// empty is not sent, so that the server's own defaults hold.
import { askForKey, forgetKey, key } from "./key.js";

const STORED = "kvarn.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const DEFAULTS = { temperature: "0.7", top_p: "0.95", max_tokens: "1024", seed: "", system: "" };

const $ = (id) => document.getElementById(id);

export function setUpSettings() {
  fill({ ...DEFAULTS, ...stored() });
  $("parameters").addEventListener("input", keep);
  $("parameters").addEventListener("submit", (event) => event.preventDefault());
  $("parameters").addEventListener("reset", (event) => {
    event.preventDefault();
    fill(DEFAULTS);
    keep();
  });
  $("settings-button").addEventListener("click", () => showSettings($("settings").hidden));
  $("settings-close").addEventListener("click", () => showSettings(false));
  $("key-button").addEventListener("click", async () => (await askForKey(), tellOfKey()));
  $("key-forget").addEventListener("click", () => (forgetKey(), tellOfKey()));
  tellOfKey();
}

// Focus goes into the settings, and back to the button that opens them.
export function showSettings(shown) {
  $("settings").hidden = !shown;
  $("settings-button").setAttribute("aria-expanded", String(shown));
  if (shown) tellOfKey();
  (shown ? $("system") : $("settings-button")).focus();
}

// Whether what is set can be sent; where not, the browser says what is wrong beside the field.
export function settingsAreGood() {
  if ($("parameters").checkValidity()) return true;
  if ($("settings").hidden) showSettings(true);
  $("parameters").reportValidity();
  return false;
}

// The body of a chat request, without its messages' conversation: parameters that are set, and the system message.
export function parameters() {
  const values = {};
  for (const name of NUMBERS) {
    const text = $(name).value.trim();
    if (text !== "") values[name] = Number(text);
  }
  return values;
}

export function systemMessages() {
  const content = $("system").value.trim();
  return content ? [{ role: "system", content }] : [];
}

function keep() {
  const values = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, $(name).value]));
  try {
    localStorage.setItem(STORED, JSON.stringify(values));
  } catch {
    // No room: they hold for as long as the page is open.
  }
}

function fill(values) {
  for (const name of Object.keys(DEFAULTS)) $(name).value = typeof values[name] === "string" ? values[name] : "";
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

function tellOfKey() {
  const has = key() !== "";
  $("key-state").textContent = has ? "A key is set for this tab." : "None is set. The server asks where it needs one.";
  $("key-button").textContent = has ? "Set another key" : "Set a key";
  $("key-forget").hidden = !has;
}
