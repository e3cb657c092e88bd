// What does a question carry beside its words? The settings of the side panel, kept in the browser; the key is not
// among them.

const PLACE = "slipstream.options";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const TEXTS = ["system", "model"];
const form = document.getElementById("options");
const panel = document.getElementById("settings");
const toggle = document.getElementById("settings-toggle");
const shade = document.getElementById("shade");
const narrow = matchMedia("(max-width: 900px)");

/** Return the fields of a request body that are set. */
export function chosenFields() {
  const fields = {};
  for (const name of NUMBERS) {
    if (form.elements[name].value !== "") fields[name] = form.elements[name].valueAsNumber;
  }
  if (form.elements.model.value) fields.model = form.elements.model.value;
  return fields;
}

/** Return the first message of a conversation, if a system prompt is set. */
export function systemMessages() {
  const content = form.elements.system.value.trim();
  return content ? [{ role: "system", content }] : [];
}

/** Return the label of a setting that cannot be sent, "" where all can. */
export function firstInvalid() {
  const field = NUMBERS.map((name) => form.elements[name]).find((field) => !field.checkValidity());
  if (!field) return "";
  showPanel(true);
  field.focus();
  return field.labels[0].textContent;
}

/** Show what the server uses where nothing is set, and its models where there are several. */
export function showDefaults(info) {
  const limits = info.limits;
  const defaults = { temperature: 1, top_p: 1, top_k: "off", seed: "random", ...info.default_sampling };
  defaults.max_tokens ??= `up to ${limits.max_seq_len.toLocaleString("en")}`;
  for (const name of NUMBERS) form.elements[name].placeholder = defaults[name] ?? "";
  form.elements.temperature.max = limits.max_temperature;
  form.elements.max_tokens.max = limits.max_seq_len;
  const models = form.elements.model;
  const chosen = models.value || kept().model;
  models.replaceChildren(...info.models.map((name) => new Option(name, name)));
  models.value = info.models.includes(chosen) ? chosen : info.models[0];
  document.getElementById("model-row").hidden = info.models.length < 2;
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

function keep() {
  const values = {};
  for (const name of [...NUMBERS, ...TEXTS]) {
    if (form.elements[name].value !== "") values[name] = form.elements[name].value;
  }
  localStorage.setItem(PLACE, JSON.stringify(values));
}

/** Open or close the panel: beside the conversation, or over it where there is no room. */
export function showPanel(isShown) {
  document.body.classList.toggle("with-settings", isShown);
  toggle.setAttribute("aria-expanded", String(isShown));
  panel.inert = !isShown;
  shade.hidden = !isShown || !narrow.matches;
}

/** Say whether the panel lies over the conversation. */
export function isDrawerOpen() {
  return narrow.matches && document.body.classList.contains("with-settings");
}

/** Connect the panel, with what was set before. */
export function startOptions() {
  const values = kept();
  for (const name of [...NUMBERS, "system"]) {
    if (typeof values[name] === "string") form.elements[name].value = values[name];
  }
  showPanel(!narrow.matches);
  narrow.addEventListener("change", () => showPanel(!narrow.matches));
  form.addEventListener("input", (event) => event.target.id !== "key" && keep());
  form.addEventListener("submit", (event) => event.preventDefault());
  toggle.addEventListener("click", () => showPanel(!document.body.classList.contains("with-settings")));
  for (const element of [shade, document.getElementById("settings-close")]) {
    element.addEventListener("click", () => {
      showPanel(false);
      toggle.focus();
    });
  }
  document.getElementById("reset").addEventListener("click", () => {
    for (const name of [...NUMBERS, "system"]) form.elements[name].value = "";
    keep();
  });
}
