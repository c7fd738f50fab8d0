// What was measured: the presets' figures against each other, and where the present setting lies among them.
// Nothing is drawn that was not measured: near a measured line a dashed ring shows where, far from it there is none.

import { $, el, shown, svg } from "./dom.js";
import { equal, presetName } from "./balance.js";

const WIDTH = 340, HEIGHT = 196, LEFT = 44, RIGHT = 14, TOP = 16, BOTTOM = 36;
const FAR = 0.25; // in coefficients: further from every measured setting, nothing is said about this one

/** `{mean, stderr}` of one measured figure, null where there is none. */
function figure(metrics, name) {
  const found = metrics?.[name];
  if (Number.isFinite(found)) return { mean: found, stderr: null };
  return Number.isFinite(found?.mean) ? { mean: found.mean, stderr: Number.isFinite(found.stderr) ? found.stderr : null } : null;
}

export class Chart {
  #card = null;
  #axes = null;

  constructor(pick) {
    this.pick = pick;
  }

  load(card) {
    this.#card = card;
    const names = measured(card);
    this.#axes = names.slice(0, 2);
    $("axes").replaceChildren();
    if (names.length > 2) {
      const choose = (axis, label) => {
        const select = el("select", { "aria-label": label, onchange: () => this.#turn(axis, select.value) });
        select.append(...names.map((name) => el("option", { value: name, selected: name === this.#axes[axis] }, name)));
        return select;
      };
      $("axes").append(choose(0, "Figure across"), el("span", {}, "×"), choose(1, "Figure upwards"));
    }
    $("figures-table").replaceChildren(table(card));
    $("figures").hidden = ![...card.presets, ...card.preferences].some((one) => all(one).length);
  }

  #turn(axis, name) {
    this.#axes[axis] = name;
    this.show(this.values);
  }

  show(values) {
    this.values = values;
    const [across, up] = this.#axes;
    const points = up ? points_of(this.#card, across, up) : [];
    const note = $("chart-note");
    if (!points.length) {
      $("chart").replaceChildren();
      note.textContent = this.#card.presets.length
        ? "Nothing to draw: no preset here has two figures measured for it."
        : "Nothing to draw: there are no presets here, so no setting was measured.";
      return;
    }
    const place = locate(points, values);
    $("chart").replaceChildren(this.#draw(points, place, across, up));
    note.textContent = said(place, across, up);
  }

  #draw(points, place, across, up) {
    const x = scale(points.map((p) => p.x), LEFT, WIDTH - RIGHT), y = scale(points.map((p) => p.y), HEIGHT - BOTTOM, TOP);
    const line = points.filter((p) => p.preset);
    const label = `${up} against ${across}: ` + points.map((p) => `${p.name} ${text(p.x)} and ${text(p.y)}`).join("; ");
    const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
    for (const tick of x.ticks) {
      root.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
      root.append(svg("text", { class: "tick", x: x(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, shown(tick)));
    }
    for (const tick of y.ticks) {
      root.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
      root.append(svg("text", { class: "tick", x: LEFT - 7, y: y(tick) + 3.5, "text-anchor": "end" }, shown(tick)));
    }
    root.append(svg("text", { class: "axis", x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, `${across} →`));
    root.append(svg("text", { class: "axis", x: 2, y: 10 }, `↑ ${up}`));
    root.append(svg("polyline", { class: "curve", points: line.map((p) => `${x(p.x.mean)},${y(p.y.mean)}`).join(" ") }));
    for (const p of points) {
      const at = { x: x(p.x.mean), y: y(p.y.mean) };
      if (p.x.stderr) root.append(svg("line", { class: "error", x1: x(p.x.mean - p.x.stderr), x2: x(p.x.mean + p.x.stderr), y1: at.y, y2: at.y }));
      if (p.y.stderr) root.append(svg("line", { class: "error", y1: y(p.y.mean - p.y.stderr), y2: y(p.y.mean + p.y.stderr), x1: at.x, x2: at.x }));
      const dot = svg("circle", { class: p.preset ? "point" : "point base", cx: at.x, cy: at.y, r: 5, onclick: () => this.pick(p.preset) });
      dot.append(svg("title", {}, p.name));
      const left = at.x > WIDTH * 0.66;
      root.append(dot, svg("text", { class: "label", x: at.x + (left ? -9 : 9), y: at.y - 8, "text-anchor": left ? "end" : "start" }, p.name));
    }
    const here = place.exact ? points[place.from] : null;
    if (here || place.distance <= FAR) {
      const [cx, cy] = [x(between(points, place, "x")), y(between(points, place, "y"))];
      root.append(svg("circle", { class: here ? "here" : "here near", cx, cy, r: 9 }));
    }
    return root;
  }
}

/** The figures that presets have, the search's objectives first, then those named after preferences. */
function measured(card) {
  const count = new Map();
  for (const preset of card.presets) for (const name of all(preset)) count.set(name, (count.get(name) ?? 0) + 1);
  const objectives = card.presets.flatMap((preset) => preset.metrics?.evidence?.search?.objectives ?? []);
  const first = [...objectives, ...card.preferences.map((one) => one.preference)];
  const rank = (name) => (first.includes(name) ? first.indexOf(name) : first.length);
  return [...count.keys()].sort((a, b) => rank(a) - rank(b) || count.get(b) - count.get(a) || (a < b ? -1 : 1));
}

const all = (one) => Object.keys(one.metrics ?? {}).filter((name) => figure(one.metrics, name));

/** The presets' points along the line, then the base's, which is on no line, where it was measured with them. */
function points_of(card, across, up) {
  const point = (preset, name, at, metrics) => ({ preset, name, at, x: figure(metrics, across), y: figure(metrics, up) });
  const drawn = (one) => one.x && one.y;
  const line = card.presets.map((preset) => point(preset, presetName(preset), preset.preferences, preset.metrics)).filter(drawn);
  const bases = card.presets.map((preset) => preset.metrics?.evidence?.base).filter(Boolean);
  const same = bases.every((base) => JSON.stringify(base) === JSON.stringify(bases[0])); // else of different searches
  const base = bases.length && same ? [point(null, "base", {}, bases[0])].filter(drawn) : [];
  const places = [];
  for (const one of [...line.sort((a, b) => a.x.mean - b.x.mean), ...base]) {
    const twin = places.find((other) => other.x.mean === one.x.mean && other.y.mean === one.y.mean && equal(one.at, other.at));
    if (twin) twin.name += `, ${one.name}`;
    else places.push(one);
  }
  return places;
}

/** Where a setting lies: on a measured point, or nearest to which stretch between two of them, by coefficients. */
function locate(points, values) {
  const exact = points.findIndex((point) => equal(values, point.at));
  if (exact >= 0) return { exact: true, from: exact, to: exact, share: 0, distance: 0, points };
  let best = null;
  for (let from = 0; from < points.length; from++) {
    const to = points[from].preset && points[from + 1]?.preset ? from + 1 : from;
    const a = vector(points[from].at, values), b = vector(points[to].at, values), v = Object.values(values);
    const ab = b.map((value, i) => value - a[i]), length = dot(ab, ab);
    const share = length ? Math.min(1, Math.max(0, dot(ab, v.map((value, i) => value - a[i])) / length)) : 0;
    const distance = Math.hypot(...v.map((value, i) => value - a[i] - share * ab[i]));
    if (!best || distance < best.distance) best = { exact: false, from, to, share, distance, points };
  }
  return best;
}

const vector = (at, values) => Object.keys(values).map((name) => at[name] ?? 0);
const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const between = (points, { from, to, share }, axis) => points[from][axis].mean * (1 - share) + points[to][axis].mean * share;

function said({ exact, from, to, share, distance, points }, across, up) {
  if (exact) return `Measured at this setting (${points[from].name}): ${across} ${text(points[from].x)}, ${up} ${text(points[from].y)}.`;
  const where = share === 0 || from === to ? points[from].name : share === 1 ? points[to].name : `${points[from].name} and ${points[to].name}`;
  const nearest = where.includes(" and ") ? `between ${where}` : where;
  if (distance > FAR) return `Not measured here, nor near it: the nearest measured setting (${nearest}) is ${shown(distance)} away in coefficients.`;
  return `Not measured at this setting. The ring is the nearest place on the measured line (${nearest}), ${shown(distance)} away in coefficients.`;
}

const text = ({ mean, stderr }) => `${shown(mean)}${stderr ? ` ± ${shown(stderr)}` : ""}`;

/** A linear scale over figures and their errors, with round ticks. */
function scale(figures, low, high) {
  let from = Math.min(...figures.map((f) => f.mean - (f.stderr ?? 0))), to = Math.max(...figures.map((f) => f.mean + (f.stderr ?? 0)));
  const pad = (to - from) * 0.12 || Math.abs(to) * 0.1 || 1;
  from -= pad;
  to += pad;
  const rough = (to - from) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const at = (value) => low + ((value - from) / (to - from)) * (high - low);
  at.ticks = [];
  for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) at.ticks.push(tick);
  return at;
}

/** Every figure of presets and vectors, for those who would rather read than look. */
function table(card) {
  const rows = [
    ...card.presets.map((preset) => ({ name: presetName(preset), kind: "preset", one: preset })),
    ...card.preferences.map((one) => ({ name: one.vector, kind: "vector", one })),
  ];
  const cells = rows.flatMap(({ name, kind, one }) =>
    all(one).map((metric) =>
      el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, kind), el("td", {}, metric), el("td", { class: "number" }, text(figure(one.metrics, metric)))),
    ),
  );
  const head = el("tr", {}, ...["What", "Kind", "Figure", "Mean ± s.e."].map((name) => el("th", { scope: "col" }, name)));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...cells));
}
