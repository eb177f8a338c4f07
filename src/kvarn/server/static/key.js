// The API key, where the server wants one: asked for in a dialog, kept for this tab only (sessionStorage).

const STORED = "kvarn.key";
let asking = null;

export function key() {
  return sessionStorage.getItem(STORED) ?? "";
}

export function forgetKey() {
  sessionStorage.removeItem(STORED);
}

// Asks for a key; whether one was given. reason: why the one before was not enough. Whoever asks meanwhile gets the same
// answer.
export function askForKey(reason = "") {
  asking ??= given(reason).finally(() => (asking = null));
  return asking;
}

function given(reason) {
  const { dialog, field } = made(reason);
  document.body.append(dialog);
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      const value = dialog.returnValue === "use" ? field.value.trim() : "";
      if (value) sessionStorage.setItem(STORED, value);
      resolve(value !== "");
    });
  });
}

function made(reason) {
  const dialog = element("dialog", { ariaLabel: "API key" });
  const form = element("form", { method: "dialog" });
  const field = element("input", { type: "password", autocomplete: "off", maxLength: 512, spellcheck: false, required: true });
  const label = element("label", { textContent: "Key" });
  label.append(field);
  const buttons = element("footer");
  buttons.append(
    element("button", { type: "button", textContent: "Cancel", onclick: () => dialog.close() }),
    element("button", { value: "use", textContent: "Use this key", className: "main" }),
  );
  form.append(
    element("h2", { textContent: "The key for this server" }),
    element("p", { className: "soft", textContent: "It is kept in this tab only, and forgotten when you close it." }),
    label,
    element("p", { role: "alert", textContent: reason }),
    buttons,
  );
  dialog.append(form);
  return { dialog, field };
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}
