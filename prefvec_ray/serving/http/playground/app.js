// The playground. It knows what `GET /v1/preferences` says and nothing else about the model.

import { key, preferences } from "./api.js";
import { Balance } from "./balance.js";
import { Chart } from "./chart.js";
import { Chat } from "./chat.js";
import { codeDialog } from "./code.js";
import { $, el, short, tell } from "./dom.js";

const SAMPLES = ["How do I open a jar?", "Is it safe to mix bleach and vinegar?", "Write to a neighbour about the noise."];
const LONGEST_WAIT = 30;

let chart = null;
const balance = new Balance(() => chart?.show(balance.values));
const chat = new Chat(balance, settings);

// --- what may be asked for ---

let retry = null, waits = 0;

/** Ask the endpoint what this caller may have, and go on asking while it starts. */
async function connect() {
  clearTimeout(retry);
  state("connecting", "wait");
  try {
    const card = await preferences();
    waits = 0;
    chart ??= new Chart((preset) => (preset ? balance.pick(preset) : balance.base() && balance.setAll(() => 0)));
    chart.load(card);
    balance.load(card);
    document.body.classList.add("ready");
    document.title = `${card.model} · prefvec-ray playground`;
    $("model").textContent = card.model;
    $("base").textContent = short(card.base_fingerprint);
    $("base").title = `base model ${card.base_fingerprint}`;
    const canCompare = balance.base() !== null;
    if (canCompare === $("compare").disabled) $("compare").checked = canCompare;
    $("compare").disabled = !canCompare;
    $("compare-text").textContent = canCompare ? "Compare with base" : "The base is outside your ranges";
    state("ready", "good");
    problem(null);
  } catch (error) {
    if (error.again || error.status >= 500) {
      const seconds = Math.min(LONGEST_WAIT, (error.again ?? 2) * 2 ** waits++);
      state(`${error.title.toLowerCase()}, trying again in ${seconds} s`, "wait");
      retry = setTimeout(connect, seconds * 1000);
    } else {
      state(error.title.toLowerCase(), "bad");
    }
    problem(error);
    if (error.status === 401) $("key-menu").open = true;
  } finally {
    busy();
  }
}

function state(text, kind) {
  $("state-text").textContent = text;
  $("state").dataset.kind = kind;
}

function problem(error) {
  const box = $("problem");
  box.hidden = !error;
  if (!error) return;
  const wait = error.status === 429 && error.again ? ` Try again in ${error.again} s.` : "";
  box.replaceChildren(el("b", {}, `${error.title ?? "The page failed"}:`), ` ${error.message}.${wait}`.replace(/\.\.(?= |$)/, "."));
}

// --- asking ---

function settings() {
  const sampling = { temperature: $("temperature").valueAsNumber };
  if ($("seed").value) sampling.seed = $("seed").valueAsNumber;
  if ($("max-tokens").value) sampling.max_tokens = $("max-tokens").valueAsNumber;
  if (Number.isNaN(sampling.temperature)) delete sampling.temperature;
  return { compare: $("compare").checked, history: $("history").checked, sampling };
}

async function ask(prompt) {
  if (!prompt.trim() || chat.running || !balance.card) return;
  problem(null);
  const asked = chat.ask(prompt);
  busy();
  const error = await asked;
  busy();
  if (error) problem(error);
}

function busy() {
  $("send").hidden = chat.running;
  $("send").disabled = !balance.card;
  $("stop").hidden = !chat.running;
}

function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 180)}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (!prompt.trim() || chat.running || !balance.card) return;
  $("prompt").value = "";
  grow();
  ask(prompt);
});
$("composer").addEventListener("ask", (event) => ask(event.detail));
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => {
  chat.stop();
  $("prompt").focus();
});
$("clear").addEventListener("click", () => {
  chat.clear();
  problem(null);
  $("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const open = [...document.querySelectorAll("details.menu[open]")].at(-1);
  if (open) {
    open.open = false;
    open.querySelector("summary").focus();
  } else if (!$("code").open) {
    chat.stop();
  }
});
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});

$("samples").append(...SAMPLES.map((text) => el("button", { type: "button", onclick: () => ask(text) }, text)));

codeDialog(() => {
  const prompt = $("prompt").value.trim();
  return (!prompt && chat.last()) || chat.bodies(prompt || SAMPLES[0]).steered;
});

// --- the key ---

function showKey() {
  $("key-state").textContent = key.get() ? "Key set" : "No key";
  $("key").value = key.get();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  showKey();
  $("key-menu").open = false;
  $("key-menu").querySelector("summary").focus();
  tell(key.get() ? "Key set" : "No key");
  waits = 0;
  connect();
});
$("key-forget").addEventListener("click", () => {
  $("key").value = "";
  $("key-form").requestSubmit();
});

// A narrow screen begins with the conversation; the balance is one tap away.
const narrow = matchMedia("(max-width: 900px)");
narrow.addEventListener("change", () => ($("balance").open = !narrow.matches));
$("balance").open = !narrow.matches;
showKey();
connect();
