// The conversation as elements: messages, what was measured, failures, and the buttons that belong to each.
import { inWords } from "./answer.js";
import { copyButton } from "./copy.js";
import { render } from "./markdown.js";

const NEAR_END = 60; // pixels from the end within which a growing text keeps itself in view
const EXAMPLES = [
  "Explain how a water mill works, in three short steps.",
  "Write a Python function that reverses a list, with an example.",
  "Compare tea and coffee in a small table.",
];

// log: the element that shows it. actions: {regenerate, edit, retry, use}, called by the buttons.
export class ConversationView {
  #log;
  #actions;

  constructor(log, actions) {
    this.#log = log;
    this.#actions = actions;
  }

  // Shows a conversation from its beginning; an empty one as a greeting.
  show(messages) {
    this.#log.replaceChildren();
    if (!messages.length) this.#log.append(greeting(this.#actions.use));
    for (const message of messages) this.#add(message);
    if (messages.at(-1)?.role === "user") this.fail(null);
    this.#settle();
    this.toEnd();
  }

  addUser(message) {
    this.#log.querySelector(".greeting")?.remove();
    this.#add(message);
    this.#settle();
    this.toEnd();
  }

  // An answer that has begun; what it returns shows its growing text, and ends it.
  beginAnswer() {
    const article = this.#article("assistant", "Answer");
    const waiting = document.createElement("p");
    waiting.className = "waiting";
    waiting.append(...Array.from({ length: 3 }, () => document.createElement("i")));
    article.querySelector(".text").append(waiting);
    article.setAttribute("aria-busy", "true"); // screen readers read it when it is whole
    this.toEnd();
    let drawn = null;
    const draw = (answer) => {
      const near = this.#isNearEnd();
      showThinking(article, answer.thinking, answer.text === "");
      if (answer.text) render(answer.text, article.querySelector(".text"));
      if (near) this.toEnd();
    };
    return {
      grow: (answer) => {
        drawn ??= requestAnimationFrame(() => {
          drawn = null;
          draw(answer);
        });
      },
      end: (message) => {
        if (drawn !== null) cancelAnimationFrame(drawn);
        const near = this.#isNearEnd();
        article.remove();
        if (message) this.#add(message);
        this.#settle();
        if (near) this.toEnd();
      },
    };
  }

  // Says why there is no answer, with a button that asks again. failure: null where nothing has failed.
  fail(failure) {
    const article = document.createElement("article");
    article.className = "failure";
    if (failure) {
      article.setAttribute("role", "alert");
      const what = document.createElement("p");
      what.textContent = sentence(failure.message);
      article.append(what);
      if (failure.next) {
        const next = document.createElement("p");
        next.className = "next";
        next.textContent = failure.next;
        article.append(next);
      }
    }
    article.append(button(failure ? "Try again" : "Answer this", () => (article.remove(), this.#actions.retry()), ""));
    this.#log.append(article);
    this.#settle();
    this.toEnd();
  }

  clearFailure() {
    this.#log.querySelectorAll(".failure").forEach((node) => node.remove());
  }

  toEnd() {
    this.#log.scrollTop = this.#log.scrollHeight;
  }

  #isNearEnd() {
    return this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < NEAR_END;
  }

  #article(kind, label) {
    const article = document.createElement("article");
    article.className = kind;
    article.setAttribute("aria-label", label);
    const text = document.createElement("div");
    text.className = "text";
    article.append(text);
    this.#log.append(article);
    return article;
  }

  #add(message) {
    const mine = message.role === "user";
    const article = this.#article(message.role, mine ? "You" : "Answer");
    const text = article.querySelector(".text");
    if (mine) text.textContent = message.content;
    else render(message.content, text);
    showThinking(article, message.thinking ?? "", false);
    const tools = document.createElement("footer");
    if (!mine) {
      const figures = document.createElement("span");
      figures.className = "figures";
      figures.textContent = [message.note, inWords(message.figures ?? {})].filter(Boolean).join(" · ");
      tools.append(figures);
    }
    tools.append(copyButton(() => message.content, mine ? "Copy message" : "Copy answer"));
    if (mine) tools.append(button("Edit", this.#actions.edit, "plain last"));
    else tools.append(button("Regenerate", this.#actions.regenerate, "plain last"));
    article.append(tools);
  }

  // Only the last question can be edited, and only the last answer made again.
  #settle() {
    for (const kind of ["user", "assistant"]) {
      const own = [...this.#log.querySelectorAll(`article.${kind} .last`)];
      own.forEach((node, index) => (node.hidden = index < own.length - 1));
    }
    const last = this.#log.querySelector("article:last-of-type");
    for (const node of this.#log.querySelectorAll("article.assistant .last")) {
      if (node.closest("article") !== last) node.hidden = true;
    }
  }
}

// open: while there is nothing else yet.
function showThinking(article, thinking, open) {
  if (!thinking) return;
  let details = article.querySelector("details.thinking");
  if (!details) {
    details = document.createElement("details");
    details.className = "thinking";
    const summary = document.createElement("summary");
    summary.textContent = "Thinking";
    details.append(summary, document.createElement("div"));
    article.prepend(details);
    details.open = open;
  }
  details.lastElementChild.textContent = thinking;
}

function greeting(use) {
  const node = document.createElement("section");
  node.className = "greeting";
  const title = document.createElement("h1");
  title.textContent = "What shall we talk about?";
  const list = document.createElement("ul");
  for (const text of EXAMPLES) {
    const item = document.createElement("li");
    item.append(button(text, () => use(text), "example"));
    list.append(item);
  }
  node.append(title, list);
  return node;
}

function button(label, action, className) {
  const node = document.createElement("button");
  node.type = "button";
  node.className = className;
  node.textContent = label;
  node.addEventListener("click", action);
  return node;
}

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}
