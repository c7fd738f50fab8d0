// Building elements. Whatever comes from outside goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, `on…` listeners and children; `null` and `false` attributes are left out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A coefficient or figure as people read it: at most three digits after the point, a real minus. */
export const shown = (value) => String(Math.round(value * 1000) / 1000 || 0).replace("-", "−");

/** The start of a digest: enough to compare by eye. */
export const short = (digest) => (digest ?? "").replace(/^\w+:/, "").slice(0, 10);

/** Copies `text`; false where the browser does not let the page (over plain http, say). */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Says `text` to screen readers. */
export const tell = (text) => ($("told").textContent = text);
