// What happens when somebody asks? The conversation: turns sent and stopped, answered again, edited and cleared.
//
// Invariant: at most one answer is under way, and `job` is what it takes to stop it.

import { Failure, answerTo, ask } from "/page/answer_stream.js";
import { apiKey, askForKey, onKeyChange, startKey } from "/page/key.js";
import { startLive } from "/page/live.js";
import { chosenFields, firstInvalid, isDrawerOpen, showPanel, startOptions, systemMessages } from "/page/options.js";
import { Answer, Question, button } from "/page/turns.js";

const POLL_MS = 1000;
const FOLLOW_PX = 80;
const element = (id) => document.getElementById(id);
const box = element("box");
const scroller = element("scroller");
// Questions with their answers.
let turns = [];
let job = null;
let isEditing = false;

function messages() {
  const said = turns.flatMap(({ question, answer }) => {
    const asked = { role: "user", content: question.content };
    return answer?.content ? [asked, { role: "assistant", content: answer.content }] : [asked];
  });
  return [...systemMessages(), ...said];
}

async function send(content) {
  const wrong = firstInvalid();
  if (wrong) return say(`${wrong} is not a number that can be sent.`);
  if (isEditing) dropLastTurn();
  setEditing(false);
  const question = new Question(content);
  turns.push({ question, answer: null });
  element("log").append(question.node);
  await respond();
}

/** Get an answer to the last question, in place of the one it has. */
async function respond() {
  const turn = turns[turns.length - 1];
  turn.answer?.node.remove();
  turn.answer = null;
  const body = { ...chosenFields(), messages: messages() };
  const answer = new Answer({ onDraw: follow });
  job = { abort: new AbortController(), answer };
  turn.answer = answer;
  turn.question.node.after(answer.node);
  scroller.scrollTop = scroller.scrollHeight;
  update();
  say("The answer is coming.");
  try {
    await receive(body, answer, job.abort.signal);
    answer.end("stop");
    say("The answer is complete.");
  } catch (error) {
    ended(error, answer, job.abort.signal);
  } finally {
    job = null;
    update();
    follow();
  }
}

/** Receive an answer; a server that loads is waited for, one that wants a key is given it. */
async function receive(body, answer, signal) {
  for (;;) {
    try {
      for await (const piece of answerTo(body, { key: apiKey(), signal })) {
        answer.tell("");
        answer.take(piece);
      }
      return;
    } catch (error) {
      // Words that came are not asked for twice.
      if (!(error instanceof Failure) || answer.content || !(await canAskAgain(error, answer, signal))) throw error;
      answer.startedAt = performance.now();
    }
  }
}

async function canAskAgain(failure, answer, signal) {
  if (failure.status === 401) return askForKey(failure.message);
  if (failure.status !== 503) return false;
  for (;;) {
    answer.tell(`${failure.message} The question is sent again by itself.`);
    await pause(POLL_MS, signal);
    const ready = await ask("/ready", { signal });
    if (ready.ok) return true;
    const state = await ready.json().catch(() => null);
    if (state?.reason) failure.message = state.reason;
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function ended(error, answer, signal) {
  if (signal.aborted) {
    answer.tell("");
    answer.end("cancelled");
    return say("Stopped.");
  }
  const failure = error instanceof Failure ? error : new Failure(0, "The page failed at this answer.");
  const again = button("Try again", respondAgain);
  answer.fail(failure, again);
  if (failure.status === 429) countDown(failure, answer, again);
  say(failure.message);
  if (!(error instanceof Failure)) throw error;
}

/** Say when a full server may be asked again. */
function countDown(failure, answer, again) {
  let left = Math.ceil(failure.waitS) || 1;
  const tick = () => {
    failure.advice = left > 0 ? `Try again in ${left} s.` : "Try again now.";
    answer.tell(`${failure.message} ${failure.advice}`, again);
    left -= 1;
    if (left >= 0 && answer.node.isConnected) setTimeout(tick, 1000);
  };
  tick();
}

function respondAgain() {
  const wrong = firstInvalid();
  if (wrong) return say(`${wrong} is not a number that can be sent.`);
  if (!job) respond();
}

function stop() {
  job?.abort.abort();
}

function dropLastTurn() {
  const turn = turns.pop();
  turn?.question.node.remove();
  turn?.answer?.node.remove();
}

function clear() {
  stop();
  while (turns.length) dropLastTurn();
  setEditing(false);
  update();
  box.focus();
  say("The conversation is cleared.");
}

function edit() {
  setEditing(true);
  box.value = turns[turns.length - 1].question.content;
  fit();
  box.focus();
}

function setEditing(isOn) {
  isEditing = isOn;
  element("editing").hidden = !isOn;
  box.value = "";
  fit();
}

/** Show which buttons there are now. */
function update() {
  for (const { question, answer } of turns) {
    question.actions.replaceChildren();
    answer?.actions.replaceChildren();
  }
  const last = turns[turns.length - 1];
  if (last && !job) {
    last.question.actions.append(button("Edit", edit));
    const { answer } = last;
    if (answer?.content) answer.actions.append(button("Copy", ({ target }) => copy(target, answer.content)));
    answer?.actions.append(button("Answer again", respondAgain));
  }
  element("welcome").hidden = turns.length > 0;
  element("clear").disabled = turns.length === 0;
  element("stop").hidden = !job;
  element("send").hidden = Boolean(job);
  element("send").disabled = box.value.trim() === "";
}

async function copy(node, text) {
  // Browsers hand out the clipboard on https and on this machine only.
  const isDone = await (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(
    () => true,
    () => false,
  );
  node.textContent = isDone ? "Copied" : "Not allowed here";
  setTimeout(() => (node.textContent = "Copy"), 1500);
}

/** Keep the end in view for whoever is there; who has scrolled up reads on. */
function follow() {
  const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  if (below < FOLLOW_PX + scroller.clientHeight / 4) scroller.scrollTop = scroller.scrollHeight;
}

function say(message) {
  element("spoken").textContent = message;
}

/** Make the box as high as what it holds. */
function fit() {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.4)}px`;
  element("send").disabled = box.value.trim() === "";
}

function submit() {
  const content = box.value.trim();
  if (content && !job) send(content);
}

function onKey(event) {
  if (event.key === "k" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    box.focus();
  }
  if (event.key !== "Escape" || element("key-dialog").open) return;
  if (isDrawerOpen()) showPanel(false);
  else if (job) stop();
  else if (isEditing) setEditing(false);
}

function start() {
  startOptions();
  startKey();
  startLive();
  const showDocs = () => element("docs-link")?.toggleAttribute("hidden", Boolean(apiKey()));
  onKeyChange(showDocs);
  showDocs();
  document.addEventListener("keydown", onKey);
  box.addEventListener("input", fit);
  box.addEventListener("keydown", (event) => {
    // Enter also ends a composition, of Japanese for example.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  element("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  element("stop").addEventListener("click", stop);
  element("clear").addEventListener("click", clear);
  element("edit-cancel").addEventListener("click", () => setEditing(false));
  element("log").addEventListener("click", ({ target }) => {
    if (target.classList?.contains("copy")) copy(target, target.closest("figure").querySelector("code").textContent);
  });
  for (const starter of document.querySelectorAll(".starter")) {
    starter.addEventListener("click", () => !job && send(starter.textContent));
  }
  update();
}

start();
