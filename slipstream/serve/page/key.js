// Who knows the API key? This file alone: it lives in the tab's session storage and goes nowhere but into the header
// of a request to this server.

const PLACE = "slipstream.key";
const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
const given = document.getElementById("key-given");
const listeners = [];
let answered = null;

/** Return the key, "" where there is none. */
export function apiKey() {
  return sessionStorage.getItem(PLACE) ?? "";
}

/** Call a function whenever the key changes. */
export function onKeyChange(listener) {
  listeners.push(listener);
}

function keep(key) {
  if (key === apiKey()) return;
  if (key) sessionStorage.setItem(PLACE, key);
  else sessionStorage.removeItem(PLACE);
  field.value = key;
  for (const listener of listeners) listener(key);
}

/** Ask for the key; resolves to whether one was given. Those who ask meanwhile get the same answer. */
export function askForKey(reason) {
  if (answered) return answered.promise;
  answered = {};
  answered.promise = new Promise((resolve) => (answered.resolve = resolve));
  // What it says to a client without a key is about headers.
  document.getElementById("key-reason").textContent = apiKey() ? reason : "Whoever runs the server has one for you.";
  given.value = "";
  dialog.showModal();
  return answered.promise;
}

function settle(isGiven) {
  const waiting = answered;
  answered = null;
  dialog.close();
  waiting?.resolve(isGiven);
}

/** Connect the dialog and the field of the settings. */
export function startKey() {
  field.value = apiKey();
  field.addEventListener("change", () => keep(field.value.trim()));
  document.getElementById("key-cancel").addEventListener("click", () => settle(false));
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    settle(false);
  });
  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keep(given.value.trim());
    settle(true);
  });
}
