// Dark or light: as the system has it, until the button in the header says otherwise. Loaded before the page is painted.

const STORED = "kvarn.theme";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function chosen() {
  const theme = localStorage.getItem(STORED);
  return theme === "dark" || theme === "light" ? theme : null;
}

function isDark() {
  return (chosen() ?? (dark.matches ? "dark" : "light")) === "dark";
}

function apply() {
  const theme = chosen();
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
  const button = document.getElementById("theme");
  if (!button) return;
  const label = isDark() ? "Light colours" : "Dark colours";
  button.title = label;
  button.setAttribute("aria-label", label);
}

function toggle() {
  const wanted = isDark() ? "light" : "dark";
  // What the system has is not stored, so that the page goes on to follow it.
  if ((wanted === "dark") === dark.matches) localStorage.removeItem(STORED);
  else localStorage.setItem(STORED, wanted);
  apply();
}

apply();
dark.addEventListener("change", apply);
addEventListener("storage", (event) => event.key === STORED && apply());
addEventListener("DOMContentLoaded", () => {
  apply();
  document.getElementById("theme")?.addEventListener("click", toggle);
});
