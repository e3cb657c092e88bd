// How does a turn of the conversation look? Its words, and below an answer what it took or what went wrong.

import { GrowingText } from "/page/markdown.js";

// Drawing takes at most this share of the time: long answers are drawn less often.
const DRAW_SHARE = 0.2;
const REASONS = { stop: "finished", length: "reached the length limit", cancelled: "stopped", timeout: "out of time" };

function make(tag, { className = "", text = "", type } = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  if (type) node.type = type;
  return node;
}

/** Return a button of a turn. */
export function button(text, onClick) {
  const node = make("button", { className: "plain", text, type: "button" });
  node.addEventListener("click", onClick);
  return node;
}

/** What was asked. */
export class Question {
  constructor(content) {
    this.content = content;
    this.node = make("article", { className: "question" });
    this.actions = make("div", { className: "actions" });
    this.node.append(make("h3", { className: "unseen", text: "You" }), make("p", { className: "words", text: content }));
    this.node.append(this.actions);
  }
}

/** What is answered, while it comes and afterwards. */
export class Answer {
  constructor({ onDraw }) {
    this.content = "";
    this.numPieces = 0;
    this.startedAt = performance.now();
    this.firstAt = this.lastAt = 0;
    this.usage = null;
    this.finish = "";
    this.node = make("article", { className: "answer" });
    this.body = make("div", { className: "words" });
    this.notice = make("p", { className: "notice" });
    this.foot = make("div", { className: "foot" });
    this.figures = make("p", { className: "figures soft" });
    this.actions = make("div", { className: "actions" });
    this.foot.append(this.figures, this.actions);
    this.notice.hidden = true;
    this.node.append(make("h3", { className: "unseen", text: "Answer" }), this.body, this.notice, this.foot);
    // Read out once it is whole, not letter by letter.
    this.node.setAttribute("aria-busy", "true");
    this.node.classList.add("coming");
    this.growing = new GrowingText(this.body);
    this.undrawn = "";
    this.drawnUntil = 0;
    this.frame = 0;
    this.onDraw = onDraw;
  }

  /** Take a piece of what comes. */
  take({ text, finish, usage }) {
    if (text) {
      this.lastAt = performance.now();
      this.firstAt ||= this.lastAt;
      this.numPieces += 1;
      this.content += text;
      this.undrawn += text;
      this.frame ||= requestAnimationFrame(() => this.draw());
    }
    if (finish) this.finish = finish;
    if (usage) this.usage = usage;
  }

  draw() {
    this.frame = 0;
    const start = performance.now();
    if (start < this.drawnUntil) {
      this.frame = requestAnimationFrame(() => this.draw());
      return;
    }
    this.drawAll();
    this.drawnUntil = start + (performance.now() - start) / DRAW_SHARE;
    this.figures.textContent = this.figuresText();
  }

  drawAll() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (this.undrawn) this.growing.append(this.undrawn);
    this.undrawn = "";
    this.onDraw();
  }

  /** Show why nothing comes for the moment. */
  tell(message, ...buttons) {
    this.notice.replaceChildren(make("span", { text: message }), ...buttons);
    this.notice.hidden = !message;
  }

  /** Show that the answer has ended; `finish` where the server did not say how. */
  end(finish) {
    this.finish ||= finish;
    this.node.classList.remove("coming");
    this.figures.textContent = this.figuresText();
    this.drawAll();
    this.node.setAttribute("aria-busy", "false");
  }

  /** Show what failed and what to do; the words that came stay. */
  fail(failure, ...buttons) {
    this.end("failed");
    this.notice.classList.add("failed");
    this.tell(`${failure.message} ${failure.advice}`.trim(), ...buttons);
  }

  figuresText() {
    if (!this.firstAt) return REASONS[this.finish] ?? "";
    const count = this.usage?.completion_tokens ?? this.numPieces;
    const about = this.usage ? "" : "about ";
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const parts = [`first token ${span((this.firstAt - this.startedAt) / 1000)}`];
    if (count > 1 && seconds > 0) parts.push(`${rounded((count - 1) / seconds)} tokens/s`);
    parts.push(`${about}${count} ${count === 1 ? "token" : "tokens"}`);
    if (this.finish) parts.push(REASONS[this.finish] ?? this.finish);
    return parts.join("  ·  ");
  }
}

function span(seconds) {
  return seconds < 1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`;
}

function rounded(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}
