// How does an answer come from the server, and what is to be done where none does? Events of
// `/v1/chat/completions`, and failures with advice.

/** A failure with its status, what to do about it, and after how many seconds. */
export class Failure extends Error {
  constructor(status, message, { advice = "", waitS = 0 } = {}) {
    super(message);
    this.status = status;
    this.advice = advice;
    this.waitS = waitS;
  }
}

const ADVICE = {
  400: "Change the question or a setting, then try again.",
  401: "Give the server's API key.",
  403: "Use a key that may do this.",
  404: "Choose another model in the settings.",
  413: "Clear the conversation, or send less.",
  500: "Try again; the server's log says more.",
  504: "Try again.",
};

/** Return what a refused answer says, in the API's one shape or whatever a proxy made of it. */
export async function failureOf(answer) {
  const body = await answer.json().catch(() => null);
  const message = body?.error?.message ?? body?.reason ?? `The server answered with status ${answer.status}.`;
  const waitS = Number(answer.headers.get("Retry-After")) || 0;
  return new Failure(answer.status, message, { advice: ADVICE[answer.status] ?? "", waitS });
}

/** Ask the server, with the key if there is one. Throws Failure where nobody answers. */
export async function ask(path, { key, signal, body } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store", credentials: "same-origin" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  try {
    return await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(0, "The server cannot be reached.", { advice: "See that it runs, then try again." });
  }
}

/**
 * Yield what an answer brings: `{text}`, `{finish}`, `{usage}`.
 *
 * Throws Failure, also where the stream says that it failed or ends before its end mark.
 */
export async function* answerTo(body, { key, signal }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await ask("/v1/chat/completions", { key, signal, body: asked });
  if (!answer.ok) throw await failureOf(answer);
  for await (const event of eventsOf(answer.body, signal)) {
    if (event.data === "[DONE]") return;
    const message = JSON.parse(event.data);
    if (event.name === "error" || message.error) {
      throw new Failure(500, message.error.message, { advice: "Try again." });
    }
    const choice = message.choices[0];
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (message.usage) yield { usage: message.usage };
  }
  throw new Failure(0, "The connection ended before the answer did.", { advice: "Try again." });
}

/** Yield the server-sent events of a body, as https://html.spec.whatwg.org/#parsing-an-event-stream has them. */
async function* eventsOf(body, signal) {
  const event = { name: "", data: [] };
  for await (const line of linesOf(body, signal)) {
    if (line === "") {
      if (event.data.length) yield { name: event.name, data: event.data.join("\n") };
      Object.assign(event, { name: "", data: [] });
      continue;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") event.data.push(value);
    if (field === "event") event.name = value;
  }
}

/** Yield whole lines; characters may be cut anywhere between two reads. */
async function* linesOf(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  // Pieces of a line that has not ended, joined once it has.
  let begun = [];
  try {
    for (;;) {
      const { done, value } = await read(reader, signal);
      if (done) return;
      const parts = decoder.decode(value, { stream: true }).split("\n");
      for (const part of parts.slice(0, -1)) {
        yield [...begun, part].join("").replace(/\r$/, "");
        begun = [];
      }
      begun.push(parts[parts.length - 1]);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(0, "The connection broke off.", { advice: "Try again." });
  }
}
