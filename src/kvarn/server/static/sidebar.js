// The list of conversations: opening, exporting, and deleting them, which can be undone for a while.
import * as store from "./store.js";

const UNDO_MS = 8000;
const NARROW = matchMedia("(max-width: 48rem)");

const $ = (id) => document.getElementById(id);

// current(): the id of the open conversation. open(id): opens one; null: a new one.
export class Sidebar {
  #current;
  #open;

  constructor({ current, open }) {
    this.#current = current;
    this.#open = open;
    $("new").addEventListener("click", () => this.#choose(null));
    $("export-all").addEventListener("click", () => store.download(store.conversations()));
    $("delete-all").addEventListener("click", () => this.#delete(store.conversations()));
    $("list-button").addEventListener("click", () => this.shown($("list").hidden));
    NARROW.addEventListener("change", () => this.shown(!NARROW.matches));
    store.onChange(() => this.refresh());
    this.shown(!NARROW.matches);
    this.refresh();
  }

  // Whether it was there to be closed: on narrow screens it lies over the page.
  close() {
    if (!NARROW.matches || $("list").hidden) return false;
    this.shown(false);
    $("list-button").focus();
    return true;
  }

  shown(shown) {
    $("list").hidden = !shown;
    $("list-button").setAttribute("aria-expanded", String(shown));
  }

  refresh() {
    const kept = store.conversations();
    $("conversations").replaceChildren(...kept.map((conversation) => this.#item(conversation)));
    $("none-kept").hidden = kept.length > 0;
    $("list").querySelector("footer").hidden = kept.length === 0;
  }

  #item(conversation) {
    const { id, title } = conversation;
    const open = document.createElement("button");
    open.type = "button";
    open.className = "open";
    open.textContent = title || "Untitled";
    open.title = title;
    if (id === this.#current()) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.#choose(id));
    const item = document.createElement("li");
    item.append(
      open,
      iconButton("save", `Export “${title}”`, () => store.download([conversation])),
      iconButton("delete", `Delete “${title}”`, () => this.#delete([conversation])),
    );
    return item;
  }

  #choose(id) {
    if (NARROW.matches) this.shown(false);
    this.#open(id);
  }

  #delete(conversations) {
    conversations.forEach(({ id }) => store.remove(id));
    const wasOpen = conversations.some(({ id }) => id === this.#current()) ? this.#current() : null;
    if (wasOpen) this.#open(null);
    this.refresh();
    const what = conversations.length === 1 ? `“${conversations[0].title}”` : `${conversations.length} conversations`;
    toast(`Deleted ${what}.`, "Undo", () => {
      conversations.forEach(store.save);
      if (wasOpen) this.#open(wasOpen);
      this.refresh();
    });
    $("new").focus();
  }
}

// Says something at the page's edge, for a while; with a button where there is something to do about it.
export function toast(text, label, action) {
  const node = document.createElement("p");
  node.append(text);
  if (label) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    button.textContent = label;
    button.addEventListener("click", () => (node.remove(), action()));
    node.append(button);
  }
  $("toast").replaceChildren(node);
  setTimeout(() => node.remove(), UNDO_MS);
}

function iconButton(name, label, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon small";
  button.title = label;
  button.setAttribute("aria-label", label);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  button.append(svg);
  button.addEventListener("click", action);
  return button;
}
