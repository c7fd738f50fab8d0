// The sliders and presets: which coefficients the next answer is asked for with.

import { $, el, shown } from "./dom.js";

const TOLERANCE = 1e-9;

export class Balance {
  card = null;
  values = {};
  preset = null;

  constructor(changed) {
    this.changed = changed;
    $("to-base").addEventListener("click", () => this.setAll(() => 0));
    $("to-default").addEventListener("click", () => this.setAll((one) => one.default));
  }

  get free() {
    return this.card.coefficients === "free";
  }

  /** Take what a caller may have. What was set before stays where it is still allowed. */
  load(card) {
    this.card = card;
    const before = this.values;
    this.values = {};
    for (const one of card.preferences) {
      const value = before[one.preference];
      const stays = this.free && value !== undefined && one.min <= value && value <= one.max;
      this.values[one.preference] = stays ? value : one.default;
    }
    const name = this.preset?.model;
    this.preset = null;
    this.#draw();
    const again = card.presets.find((preset) => preset.model === name);
    if (again) this.pick(again);
    else this.#show();
  }

  /** The model and preferences of a request at this balance. */
  request() {
    if (this.preset) return { model: this.preset.model };
    return this.free ? { model: this.card.model, preferences: { ...this.values } } : { model: this.card.model };
  }

  /** The same for the base model, with every coefficient 0; null where this caller may not have it. */
  base() {
    const zero = Object.fromEntries(this.card.preferences.map((one) => [one.preference, 0]));
    const has = (one) => (this.free ? one.min <= 0 && 0 <= one.max : one.default === 0);
    if (!this.card.preferences.every(has)) return null;
    return this.free ? { model: this.card.model, preferences: zero } : { model: this.card.model };
  }

  get isBase() {
    return Object.values(this.values).every((value) => value === 0);
  }

  /** What this balance is called. */
  name() {
    if (this.preset) return presetName(this.preset);
    if (this.isBase) return "Base";
    return this.free ? "Custom" : "Default";
  }

  pick(preset) {
    this.preset = preset;
    for (const name of Object.keys(this.values)) this.values[name] = preset.preferences[name] ?? 0;
    this.#show();
  }

  set(name, value) {
    this.preset = null;
    this.values[name] = value;
    this.#show(name);
  }

  setAll(value) {
    this.preset = null;
    for (const one of this.card.preferences) this.values[one.preference] = value(one);
    this.#show();
  }

  // --- drawing ---

  #draw() {
    $("sliders").replaceChildren(...this.card.preferences.map((one, index) => this.#slider(one, index)));
    const note = $("sliders-note");
    note.textContent = "You may ask for presets, and the operator's default, only.";
    note.hidden = this.free;
    $("to-base").hidden = !this.free || !this.base();
    $("to-default").hidden = this.free && this.card.preferences.every((one) => one.default === 0);
    const presets = this.card.presets.map((preset) =>
      el(
        "button",
        { type: "button", class: "preset", "data-model": preset.model, "aria-pressed": "false", onclick: () => this.pick(preset) },
        el("span", { class: "name" }, el("b", {}, presetName(preset)), ...chips(this.card, preset.preferences)),
        el("span", { class: "reason" }, [verdict(preset), preset.reason].filter(Boolean).join(": ") || "no reason was given"),
      ),
    );
    $("presets").replaceChildren(...presets);
    $("presets-panel").hidden = !presets.length;
  }

  #slider(one, index) {
    const { preference: name, min, max } = one;
    const id = `eta-${index}`;
    const fixed = !this.free || min === max;
    // With `step` any, an arrow key moves by a hundredth of the range and both ends can be reached.
    const range = el("input", { type: "range", id, min, max, step: "any", disabled: fixed, "data-preference": name });
    const number = el("input", {
      type: "number", min, max, step: "any", inputmode: "decimal", disabled: fixed, "aria-label": `${name}, exact coefficient`,
      "aria-describedby": `${id}-wrong`,
    });
    const wrong = el("p", { class: "wrong", id: `${id}-wrong`, role: "alert", hidden: true });
    const digits = max - min >= 1 ? 2 : 3;
    range.addEventListener("input", () => {
      const value = Number(Number(range.value).toFixed(digits));
      this.set(name, Math.min(max, Math.max(min, value)));
    });
    number.addEventListener("input", () => {
      const value = number.valueAsNumber;
      const fits = min <= value && value <= max;
      wrong.hidden = fits;
      wrong.textContent = fits ? "" : `${name} may go from ${shown(min)} to ${shown(max)}; still at ${shown(this.values[name])}`;
      number.setAttribute("aria-invalid", String(!fits));
      if (fits) this.set(name, value);
    });
    number.addEventListener("blur", () => {
      wrong.hidden = true;
      number.setAttribute("aria-invalid", "false");
      number.value = Math.round(this.values[name] * 1000) / 1000;
    });
    const ends = el("div", { class: "ends", "aria-hidden": "true" }, el("span", {}, shown(min)), el("span", {}, shown(max)));
    const row = el("div", { class: "slider", "data-hue": index % 6 }, el("label", { for: id }, name), number, range, ends, wrong);
    if (min < 0 && max > 0) row.classList.add("has-zero");
    row.style.setProperty("--zero", share(Math.min(max, Math.max(min, 0)), one));
    row.title = `${one.vector} · ${one.digest}`;
    return row;
  }

  #show(moved = null) {
    for (const one of this.card.preferences) {
      const name = one.preference;
      const range = document.querySelector(`input[type=range][data-preference="${CSS.escape(name)}"]`);
      const row = range.parentElement;
      const number = row.querySelector("input[type=number]");
      const value = this.values[name];
      if (document.activeElement !== range || moved !== name) range.value = value;
      if (document.activeElement !== number) number.value = Math.round(value * 1000) / 1000;
      range.setAttribute("aria-valuetext", shown(value));
      const at = share(value, one);
      const zero = share(Math.min(one.max, Math.max(one.min, 0)), one);
      row.style.setProperty("--from", Math.min(at, zero));
      row.style.setProperty("--to", Math.max(at, zero));
    }
    for (const button of $("presets").children) {
      button.setAttribute("aria-pressed", String(button.dataset.model === this.preset?.model));
    }
    $("balance-now").replaceChildren(el("b", {}, this.name()), ...chips(this.card, this.values));
    this.changed();
  }
}

export const presetName = (preset) => preset.model.slice(preset.model.indexOf("@") + 1);

export const equal = (a, b) => Object.keys(a).every((name) => Math.abs(a[name] - (b[name] ?? 0)) < TOLERANCE);

/** Coefficients as small labels, each in its preference's colour. */
export const chips = (card, values) =>
  card.preferences.map((one, index) =>
    el("span", { class: "chip", "data-hue": index % 6 }, `${one.preference} ${shown(values[one.preference] ?? 0)}`),
  );

const share = (value, { min, max }) => (max > min ? (value - min) / (max - min) : 0.5);

/** Whether prompts that the search never saw bore the preset out. */
function verdict(preset) {
  const said = preset.metrics?.evidence?.verdict;
  return typeof said === "string" ? said : null;
}
