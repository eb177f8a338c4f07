// The API key, where the server wants one: asked for in a dialog, kept for this tab only (sessionStorage).

const STORED = "kvarn.key";
let asking = null;

export function key() {
  return sessionStorage.getItem(STORED) ?? "";
}

export function forgetKey() {
  sessionStorage.removeItem(STORED);
}

// Asks for a key; whether one was given. Whoever asks meanwhile gets the same answer.
export function askForKey(reason = "") {
  asking ??= shown(reason).finally(() => (asking = null));
  return asking;
}

function shown(reason) {
  const dialog = document.getElementById("key-dialog");
  const field = dialog.querySelector("input");
  dialog.querySelector("[role=alert]").textContent = reason;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = field.value.trim();
        field.value = "";
        const done = dialog.returnValue === "use" && given !== "";
        if (done) sessionStorage.setItem(STORED, given);
        resolve(done);
      },
      { once: true },
    );
  });
}
