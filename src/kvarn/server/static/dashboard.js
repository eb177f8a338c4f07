// The dashboard: asks for a snapshot each second, and shows what it and those before it say.
import { Failure, ask } from "./api.js";
import { ShareBar, Sparkline } from "./chart.js";
import { count, duration, percent, seconds, whole } from "./format.js";
import { History } from "./history.js";
import { showModels, showTenants, showTrouble } from "./tables.js";

const POLL_MS = 1000;
const LATENCIES = [
  ["ttft", "First token"],
  ["itl", "Between tokens"],
  ["e2e", "Whole answer"],
  ["queue", "In the queue"],
];
const PERCENTILES = [0.5, 0.95, 0.99];
const $ = (id) => document.getElementById(id);

const histories = new Map(); // by the model's name
let paused = false;
let timer = null;

const lines = {
  running: new Sparkline($("chart-running"), "Running", whole, 4),
  waiting: new Sparkline($("chart-waiting"), "Waiting", whole, 4),
  generated: new Sparkline($("chart-generated"), "Generated tokens a second", whole, 10),
  prompts: new Sparkline($("chart-prompts"), "Prompt tokens a second", whole, 10),
  hits: new Sparkline($("chart-hits"), "Prefix hits", percent, 1),
  accepted: new Sparkline($("chart-accepted"), "Guesses accepted", percent, 1),
};
const cacheBar = new ShareBar($("cache-bar"), "KV cache", ["used", "cached", "free"]);
const latencies = LATENCIES.map(([name, label]) => latencyRow(name, label));

function latencyRow(name, label) {
  const row = $("latency").tBodies[0].insertRow();
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = label;
  row.append(head);
  const cells = PERCENTILES.map(() => row.insertCell());
  const chart = row.insertCell();
  return { name, cells, line: new Sparkline(chart, `${label}, P95`, seconds) };
}

async function poll() {
  try {
    const state = await (await ask("dashboard/state")).json();
    if (paused) return;
    for (const model of state.models) historyOf(model.name).add(state.time, model);
    show(state);
    tell("live", "Live");
  } catch (error) {
    if (!(error instanceof Failure)) console.error(error);
    tell("lost", "No numbers", `${error.message} ${error.next ?? ""}`);
    if (error.status === 401) return; // no key was given: asking each second would ask the person each second
  }
  timer = paused ? null : setTimeout(poll, POLL_MS);
}

function historyOf(name) {
  if (!histories.has(name)) histories.set(name, new History());
  return histories.get(name);
}

function tell(state, text, notice = "") {
  $("live").dataset.state = state;
  const said = $("live").querySelector("span");
  if (said.textContent !== text) said.textContent = text; // a status is read out when it changes
  $("notice").hidden = notice === "";
  if ($("notice").textContent !== notice) $("notice").textContent = notice;
}

function show(state) {
  showChoice(state.models);
  const model = state.models.find(({ name }) => name === $("model").value) ?? state.models[0];
  $("about").textContent = `kvarn ${state.version} · up ${duration(state.uptime)}`;
  showTenants(state.tenants);
  showModels(state.models, historyOf);
  if (!model) return;
  $("title").textContent = model.state === "loaded" ? model.name : `${model.name} (${model.state})`;
  const history = historyOf(model.name);
  showLoad(model, history);
  showCache(model);
  showShares(model, history);
  showLatencies(history);
  showTrouble(model, history);
}

function showChoice(models) {
  const select = $("model");
  select.hidden = models.length < 2;
  const names = models.map(({ name }) => name);
  if ([...select.options].map(({ value }) => value).join("\n") === names.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

function showLoad(model, history) {
  $("running").textContent = count(model.running);
  $("of-running").textContent = model.max_running ? `of at most ${model.max_running}` : "";
  $("waiting").textContent = count(model.waiting);
  $("of-waiting").textContent = model.queued_tokens ? `${count(model.queued_tokens)} prompt tokens` : "";
  $("generated").textContent = whole(history.rate("generated_tokens"));
  $("prompts").textContent = whole(history.rate("prompt_tokens"));
  lines.running.show(history.line(({ running }) => running), history.span);
  lines.waiting.show(history.line(({ waiting }) => waiting), history.span);
  lines.generated.show(history.rateLine("generated_tokens"), history.span);
  lines.prompts.show(history.rateLine("prompt_tokens"), history.span);
}

function showCache({ blocks }) {
  const parts = [
    ["used", "in use", blocks.used],
    ["cached", "kept for later prompts", blocks.cached],
    ["free", "empty", blocks.free],
  ];
  const all = blocks.used + blocks.cached + blocks.free || 1;
  $("cache").textContent = percent(blocks.used / all);
  $("of-cache").textContent = `in use, of ${count(all)} blocks`;
  cacheBar.show(
    parts.map(([, , number]) => number / all),
    parts.map(([, words, number]) => `${number} ${words}`).join(", "),
  );
  $("cache-legend").replaceChildren(
    ...parts.map(([name, words, number]) => {
      const item = document.createElement("li");
      item.className = name;
      item.textContent = `${count(number)} ${words}`;
      return item;
    }),
  );
}

function showShares({ counters }, history) {
  $("hits").textContent = percent(history.share("prefix_hits", "prefix_queries"));
  lines.hits.show(history.shareLine("prefix_hits", "prefix_queries"), history.span);
  $("guesses").hidden = counters.draft_tokens === 0; // nothing is guessed ahead
  $("accepted").textContent = percent(history.share("accepted_tokens", "draft_tokens"));
  lines.accepted.show(history.shareLine("accepted_tokens", "draft_tokens"), history.span);
}

function showLatencies(history) {
  const span = Number($("window").value);
  for (const { name, cells, line } of latencies) {
    history.percentiles(name, PERCENTILES, span).forEach((value, index) => (cells[index].textContent = seconds(value)));
    line.show(history.percentileLine(name, 0.95), history.span);
  }
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
  clearTimeout(timer);
  if (paused) tell("paused", "Paused");
  else poll();
});
poll();
