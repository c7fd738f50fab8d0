// The endpoint, as the page sees it: what may be asked for, answers as they stream, errors in words.

const KEY = "prefvec-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (secret) => (secret ? sessionStorage.setItem(KEY, secret) : sessionStorage.removeItem(KEY)),
};

/** What went wrong, in words for the person at the page. `again` is the number of seconds after which to try again. */
export class Problem extends Error {
  constructor(title, message, { status = 0, code = null, again = null } = {}) {
    super(message);
    Object.assign(this, { title, status, code, again });
  }
}

const TITLES = {
  400: "Refused",
  401: "A key is needed",
  403: "Not allowed",
  404: "Not found here",
  408: "Too slow",
  413: "Too long",
  429: "Too many requests",
  503: "Not ready",
  504: "Took too long",
};

function problemOf(status, error, headers) {
  const wait = Number.parseFloat(headers?.get("retry-after"));
  const again = Number.isFinite(wait) ? Math.max(1, Math.ceil(wait)) : null;
  const title = error?.code === "overloaded" ? "Busy" : (TITLES[status] ?? (status >= 500 ? "The server failed" : "Refused"));
  const message = error?.message ?? `the server answered ${status} and said nothing more`;
  return new Problem(title, message, { status, code: error?.code ?? null, again });
}

async function ask(path, init = {}) {
  const headers = { ...init.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("No connection", "the server does not answer; it may be starting", { again: 3 });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw problemOf(response.status, body?.error, response.headers);
}

/** `GET /v1/preferences`: what this caller may have. */
export const preferences = async () => (await ask("v1/preferences")).json();

/** The events of one streamed answer: `{fingerprint, used}`, the coefficients that it really has, then `{text}`, `{reason}` and `{usage}` as they come. Throws a
 * Problem where the server refuses, fails midway, or hangs up before the end. */
export async function* answer(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const told = (name) => response.headers.get(`x-prefvec-${name}`);
  yield { fingerprint: told("fingerprint"), used: JSON.parse(told("preferences")) };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw problemOf(chunk.error.code === "timeout" ? 504 : 500, chunk.error);
    if (chunk.usage) yield { usage: chunk.usage };
    const [choice] = chunk.choices;
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { reason: choice.finish_reason };
  }
  throw new Problem("Cut off", "the connection ended before the answer did");
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
