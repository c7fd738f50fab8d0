// The conversation: every turn is one question and one or two answers that stream in side by side.

import { answer, Problem } from "./api.js";
import { chips, equal } from "./balance.js";
import { $, copy, el, short, tell } from "./dom.js";

const ENDS = { length: "cut at its length limit", stop: "" };

export class Chat {
  #turns = [];
  #stopper = null;

  constructor(balance, settings) {
    this.balance = balance;
    this.settings = settings;
  }

  get running() {
    return this.#stopper !== null;
  }

  stop() {
    this.#stopper?.abort();
  }

  clear() {
    this.stop();
    for (const turn of this.#turns) turn.element.remove();
    this.#turns = [];
    $("empty").hidden = false;
    tell("New chat");
  }

  /** The bodies that `prompt` would be asked with now; `base` is null where there is nothing to compare with. */
  bodies(prompt, before = this.#before()) {
    const { compare, history, sampling } = this.settings();
    const base = compare && !this.balance.isBase ? this.balance.base() : null;
    const body = (request, side) => ({ ...request, messages: messages(history ? before : [], prompt, side), ...sampling });
    return { steered: body(this.balance.request(), "steered"), base: base && body(base, "base") };
  }

  /** The body of the last question, for those who copy code before they have typed the next. */
  last() {
    const turn = this.#turns.at(-1);
    return turn ? this.bodies(turn.prompt, this.#before(turn)).steered : null;
  }

  /** What was said before `turn` (default: up to now), but for questions that were asked again since. */
  #before(turn = null) {
    const until = turn ? this.#turns.indexOf(turn) : this.#turns.length;
    return this.#turns.slice(0, until).filter((one) => !one.askedAgain);
  }

  /** Ask, and show what comes. Returns the first Problem, or null: the caller says it in words. */
  async ask(prompt) {
    const bodies = this.bodies(prompt);
    const turn = { prompt, sides: {} };
    const { card, values } = this.balance;
    const zero = Object.fromEntries(card.preferences.map((one) => [one.preference, 0]));
    if (bodies.base) turn.sides.base = new Side("Base", zero, card);
    turn.sides.steered = new Side(this.balance.name(), values, card);
    const sides = Object.values(turn.sides);
    const again = el("button", { type: "button", class: "again", onclick: () => this.#again(turn) }, "↻ Ask again at the current balance");
    const same = el("p", { class: "same note", hidden: true }, "Both answers are the same, word for word.");
    turn.element = el(
      "article",
      { class: "turn", "aria-label": `Question: ${prompt}` },
      el("p", { class: "asked" }, prompt),
      el("div", { class: sides.length > 1 ? "sides two" : "sides" }, ...sides.map((side) => side.element)),
      same,
      again,
    );
    $("empty").hidden = true;
    $("turns").append(turn.element);
    this.#turns.push(turn);
    turn.element.scrollIntoView({ block: "end" });
    const stopper = (this.#stopper = new AbortController());
    turn.element.setAttribute("aria-busy", "true");
    tell(sides.length > 1 ? "Two answers are coming" : "The answer is coming");
    const asked = Object.entries(turn.sides).map(([name, side]) => side.read(bodies[name], stopper.signal));
    const problems = (await Promise.all(asked)).filter(Boolean);
    turn.element.setAttribute("aria-busy", "false");
    if (this.#stopper === stopper) this.#stopper = null;
    const { base, steered } = turn.sides;
    same.hidden = !(base?.complete && steered.complete && base.text === steered.text && !equal(values, zero));
    tell(stopper.signal.aborted ? "Stopped" : problems.length ? problems[0].message : sides.map((side) => `${side.name}: ${side.text}`).join(". "));
    return problems[0] ?? null;
  }

  #again(turn) {
    if (this.running) return;
    turn.askedAgain = true; // the new turn takes its place in what later turns remember
    $("composer").dispatchEvent(new CustomEvent("ask", { detail: turn.prompt }));
  }
}

/** What was said before, as one side saw it. A turn without that side's answer is told with the steered one. */
function messages(turns, prompt, side) {
  const said = [];
  for (const turn of turns) {
    const text = (turn.sides[side] ?? turn.sides.steered).text;
    if (text) said.push({ role: "user", content: turn.prompt }, { role: "assistant", content: text });
  }
  return [...said, { role: "user", content: prompt }];
}

/** One answer as it comes. */
class Side {
  text = "";
  complete = false;

  constructor(name, values, card) {
    this.name = name;
    this.card = card;
    this.head = el("header", {}, el("b", {}, name), ...chips(card, values));
    this.words = el("p", { class: "words" });
    this.foot = el("footer", {}, el("span", { class: "waiting" }, "waiting…"));
    this.element = el(
      "section",
      { class: name === "Base" ? "side base" : "side", "aria-label": `Answer: ${name}` },
      this.head,
      this.words,
      this.foot,
    );
  }

  /** Reads the answer to its end. Returns the Problem that ended it early, or null. */
  async read(body, signal) {
    const began = performance.now();
    let first = null, reason = "", usage = null, fingerprint = null;
    this.element.classList.add("running");
    try {
      for await (const event of answer(body, signal)) {
        fingerprint = event.fingerprint ?? fingerprint;
        // What was used, by the server's word: a preset may have moved since the page was loaded.
        if (event.used) this.head.replaceChildren(this.head.firstChild, ...chips(this.card, event.used));
        reason = event.reason ?? reason;
        usage = event.usage ?? usage;
        if (event.text) {
          first ??= performance.now() - began;
          this.#add(event.text);
        }
      }
      this.complete = true;
      this.#close([ENDS[reason] ?? reason, usage && tokens(usage.completion_tokens), first && `first after ${seconds(first)}`], fingerprint);
      return null;
    } catch (error) {
      if (error.name === "AbortError") {
        this.#close(["stopped"], fingerprint);
        return null;
      }
      const problem = error instanceof Problem ? error : new Problem("The page failed", String(error));
      this.element.classList.add("failed");
      this.#close([], fingerprint);
      this.foot.prepend(el("b", { class: "wrong" }, problem.title));
      return problem;
    } finally {
      this.element.classList.remove("running");
    }
  }

  #add(text) {
    const near = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 160;
    this.text += text;
    this.words.textContent = this.text;
    if (near) window.scrollTo({ top: document.documentElement.scrollHeight });
  }

  #close(facts, fingerprint) {
    if (this.complete && !this.text.trim()) this.words.replaceChildren(el("i", {}, "(an empty answer)"));
    const mark = fingerprint && el("button", {
      type: "button", class: "quiet print", title: `${fingerprint}: equal fingerprints, equal weights. Copies it.`,
      "aria-label": `Copy fingerprint ${short(fingerprint)}`,
      onclick: async () => tell((await copy(fingerprint)) ? "Fingerprint copied" : fingerprint),
    }, short(fingerprint));
    this.foot.replaceChildren(el("span", {}, facts.filter(Boolean).join(" · ")), mark ?? "");
  }
}

const tokens = (count) => `${count} token${count === 1 ? "" : "s"}`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
