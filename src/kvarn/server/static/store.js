// Conversations, kept by this browser (localStorage), each under a name of its own:
// {id, title, created, updated, messages: [{role, content, figures?, note?}]}, times in milliseconds.

const PREFIX = "kvarn.chat.";
const MAX_TITLE = 60;

export function begun() {
  const now = Date.now();
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", created: now, updated: now, messages: [] };
}

// All that is kept, what was changed last first. What cannot be read is left out.
export function conversations() {
  const found = [];
  for (let index = 0; index < localStorage.length; index += 1) {
    const name = localStorage.key(index);
    if (name.startsWith(PREFIX)) found.push(read(name));
  }
  return found.filter(Boolean).sort((a, b) => b.updated - a.updated);
}

export function conversation(id) {
  return read(PREFIX + id);
}

// Whether there was room for it.
export function save(conversation) {
  conversation.title ||= titled(conversation.messages);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

// Says so when another tab has changed what is kept.
export function onChange(told) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) told();
  });
}

// Has the browser save conversations as a file. Their messages are as the API takes them.
export function download(list) {
  const plain = list.map(({ title, created, messages }) => ({
    title,
    created: new Date(created).toISOString(),
    messages: messages.map(({ role, content }) => ({ role, content })),
  }));
  const address = URL.createObjectURL(new Blob([JSON.stringify(plain, null, 2)], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = list.length === 1 ? `${fileName(list[0].title)}.json` : "kvarn-conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

function read(name) {
  try {
    const value = JSON.parse(localStorage.getItem(name));
    const whole = value && Array.isArray(value.messages) && value.messages.every(isMessage);
    return whole && PREFIX + value.id === name ? value : null;
  } catch {
    return null;
  }
}

function isMessage(message) {
  return ["user", "assistant"].includes(message?.role) && typeof message.content === "string";
}

function titled(messages) {
  const line = messages[0]?.content.trim().split("\n")[0] ?? "";
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1)}…` : line;
}

function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40) || "conversation";
}
