// The dashboard's tables: keys, models, and what went wrong.
import { ShareBar } from "./chart.js";
import { count, percent, whole } from "./format.js";

const REFUSALS = {
  queued_requests: "queue full",
  queued_tokens: "too many prompt tokens",
  queued_grammars: "too many grammars",
  ttft_slo: "too late for its deadline",
};
const $ = (id) => document.getElementById(id);

// tenants: [{name, answering, waiting, tokens}]. Of a server without keys there is one, whose name is empty.
export function showTenants(tenants) {
  const most = Math.max(1, ...tenants.map(({ tokens }) => tokens));
  fill("tenants", tenants, (tenant, row) => {
    cells(row, [tenant.name || "everybody (no keys are set)", count(tenant.answering), count(tenant.waiting), count(tenant.tokens)]);
    const bar = new ShareBar(row.insertCell(), "Tokens beside the largest", ["used"]);
    bar.show([tenant.tokens / most], percent(tenant.tokens / most));
  });
  $("tenants").hidden = tenants.length === 0;
  $("no-tenants").hidden = tenants.length > 0;
}

// historyOf: the history of a model, by its name.
export function showModels(models, historyOf) {
  $("models-tile").hidden = models.length < 2;
  fill("models", models, (model, row) => {
    const { used, cached, free } = model.blocks;
    const share = model.state === "loaded" ? used / (used + cached + free || 1) : null;
    const rate = historyOf(model.name).rate("generated_tokens");
    cells(row, [model.name, model.state, count(model.running), count(model.waiting), percent(share), whole(rate)]);
  });
}

export function showTrouble({ counters, rejections }, history) {
  const reasons = Object.keys(rejections).filter((reason) => rejections[reason] > 0);
  const rows = [
    ["Preempted", ({ counters }) => counters.preemptions],
    ["Failed steps", ({ counters }) => counters.failed_steps],
    ["Refused", ({ rejections }) => Object.values(rejections).reduce((sum, number) => sum + number, 0)],
    ...reasons.map((reason) => [
      `… ${REFUSALS[reason] ?? reason.replaceAll("_", " ")}`,
      ({ rejections }) => rejections[reason] ?? 0,
    ]),
  ];
  fill("trouble", rows, ([label, read], row) => {
    cells(row, [label, count(history.gained(read)), count(read({ counters, rejections }))]);
  });
}

function fill(id, values, write) {
  const body = $(id).tBodies[0];
  body.replaceChildren();
  for (const value of values) write(value, body.insertRow());
}

// The first cell is the row's heading.
function cells(row, texts) {
  const [first, ...others] = texts;
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = first;
  row.append(head);
  for (const text of others) row.insertCell().textContent = text;
}
