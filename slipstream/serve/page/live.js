// What does the server do now? Its state and a few of its numbers, asked for while somebody looks.

import { Failure, ask, failureOf } from "/page/answer_stream.js";
import { apiKey, askForKey, onKeyChange } from "/page/key.js";
import { showDefaults } from "/page/options.js";

const PERIOD_MS = 1500;
const NUM_SAMPLES = 40;
// How far back the shown rate looks; a single period jumps.
const RATE_SAMPLES = 4;
const PREFIX = "slipstream:";
const NAMES = {
  running: "num_requests_running",
  waiting: "num_requests_waiting",
  kv: "kv_cache_usage_perc",
  tokens: "generation_tokens_total",
  isUp: "engine_up",
  isAsleep: "engine_asleep",
};
const STATES = {
  ready: "Ready",
  busy: "Answering",
  asleep: "Asleep",
  loading: "Loading the model",
  stopped: "Not answering",
  key: "Needs a key",
  away: "Cannot be reached",
};
const element = (id) => document.getElementById(id);
let timer = 0;
let hasInfo = false;
let hasAsked = false;
// Totals with the time they were read at.
let totals = [];
let rates = [];

/** Return the sums over all series of the metrics that the strip shows; a missing one is undefined. */
export function readMetrics(text) {
  const found = {};
  const names = new Map(Object.entries(NAMES).map(([key, name]) => [PREFIX + name, key]));
  for (const line of text.split("\n")) {
    const end = line.search(/[{ ]/);
    const key = names.get(line.slice(0, end));
    if (!key) continue;
    // Labels may hold spaces and braces: the value is what follows the last brace, if there is one.
    const value = line.slice(Math.max(line.lastIndexOf("}") + 1, end)).trim().split(" ")[0];
    found[key] = (found[key] ?? 0) + Number(value);
  }
  return found;
}

async function look() {
  if (!hasInfo) await readInfo();
  const answer = await ask("/metrics", { key: apiKey() });
  if (!answer.ok) throw await failureOf(answer);
  showNumbers(readMetrics(await answer.text()));
}

async function readInfo() {
  const answer = await ask("/server_info", { key: apiKey() });
  if (!answer.ok) throw await failureOf(answer);
  const info = await answer.json();
  const length = info.limits.max_seq_len.toLocaleString("en");
  const types = info.quantization ? [info.quantization, info.dtype] : [info.dtype];
  showFacts([info.models[0], info.device, types.join(" / "), `${length} tokens of context`]);
  element("facts").title = `Slipstream ${info.version}`;
  document.title = `${info.models[0]} – Slipstream`;
  showDefaults(info);
  hasInfo = true;
}

function showFacts(facts) {
  element("facts").replaceChildren(
    ...facts.map((fact) => {
      const span = document.createElement("span");
      span.textContent = fact;
      return span;
    }),
  );
}

function showNumbers(found) {
  const isUp = found.isUp > 0;
  const state = found.isAsleep > 0 ? "asleep" : !isUp ? "stopped" : found.running > 0 ? "busy" : "ready";
  showState(state);
  element("running").textContent = count(found.running);
  element("waiting").textContent = count(found.waiting);
  element("kv").textContent = found.kv === undefined ? "–" : `${(found.kv * 100).toFixed(found.kv < 0.1 ? 1 : 0)} %`;
  element("kv-meter").value = found.kv ?? 0;
  addTotal(found.tokens ?? 0);
}

function count(value) {
  return value === undefined ? "–" : value.toLocaleString("en");
}

function addTotal(total) {
  const now = performance.now();
  const last = totals[totals.length - 1];
  // A server that started again counts from nothing.
  if (last && total < last.total) totals = [];
  totals = [...totals, { total, now }].slice(-RATE_SAMPLES);
  if (!last) return;
  rates = [...rates, rateBetween(last, { total, now })].slice(-NUM_SAMPLES);
  const rate = rateBetween(totals[0], totals[totals.length - 1]);
  element("rate").textContent = rate >= 100 ? Math.round(rate).toLocaleString("en") : rate.toFixed(rate > 0 ? 1 : 0);
  drawSpark();
}

function rateBetween(early, late) {
  return late.now > early.now ? Math.max(0, ((late.total - early.total) * 1000) / (late.now - early.now)) : 0;
}

function drawSpark() {
  const most = Math.max(1, ...rates);
  const step = 120 / (NUM_SAMPLES - 1);
  const left = 120 - (rates.length - 1) * step;
  const points = rates.map((rate, i) => `${(left + i * step).toFixed(1)},${(22.5 - (rate / most) * 20).toFixed(1)}`);
  const spark = element("spark");
  spark.querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  spark.querySelector(".area").setAttribute("d", `M${left.toFixed(1)},24L${points.join("L")}L120,24Z`);
}

function showState(state) {
  element("state").dataset.state = state;
  const label = element("state").querySelector("span");
  if (label.textContent !== STATES[state]) label.textContent = STATES[state];
}

function showTrouble(error) {
  if (!(error instanceof Failure)) throw error;
  const state = { 0: "away", 401: "key", 403: "key", 503: "loading" }[error.status] ?? "stopped";
  showState(state);
  for (const id of ["running", "waiting", "kv", "rate"]) element(id).textContent = "–";
  totals = [];
  // Who closes the dialog is not asked again by the strip.
  if (state === "key" && !hasAsked) {
    hasAsked = true;
    askForKey(error.message);
  }
}

async function tick() {
  clearTimeout(timer);
  if (document.hidden) return;
  let isWaitingForKey = false;
  try {
    await look();
  } catch (error) {
    showTrouble(error);
    isWaitingForKey = error.status === 401 || error.status === 403;
  }
  clearTimeout(timer);
  if (!isWaitingForKey) timer = setTimeout(tick, PERIOD_MS);
}

/** Open what a link names although it needs the key, which a link cannot carry. */
async function openWithKey(event, link, fileName) {
  if (!apiKey()) return;
  event.preventDefault();
  const answer = await ask(link.pathname, { key: apiKey() }).catch(() => null);
  if (!answer?.ok) return showState("stopped");
  const saved = document.createElement("a");
  saved.href = URL.createObjectURL(await answer.blob());
  saved.download = fileName;
  saved.click();
  setTimeout(() => URL.revokeObjectURL(saved.href), 10_000);
}

/** Begin to look, and go on while the tab is seen. */
export function startLive() {
  document.addEventListener("visibilitychange", tick);
  onKeyChange(tick);
  const files = { "trace-link": "slipstream-trace.html", "metrics-link": "slipstream-metrics.txt" };
  for (const [id, name] of Object.entries(files)) {
    element(id).addEventListener("click", (event) => openWithKey(event, element(id), name));
  }
  tick();
}
