// Formats of numbers, and elements.

const PLAIN = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const count = (value) => PLAIN.format(value);
export const short = (value) => SHORT.format(value);
export const percent = (value, digits = 0) => `${(100 * value).toFixed(digits)} %`;

/** [number, unit] of a time in milliseconds. */
export function time(ms) {
  if (!Number.isFinite(ms)) return ["–", ""];
  if (ms >= 1000) return [(ms / 1000).toPrecision(3), "s"];
  return [ms >= 100 ? ms.toFixed(0) : ms.toFixed(1), "ms"];
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = value > 0 ? Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)) : 0;
  return `${(value / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

/** A new element with a class and text. */
export function element(name, className = "", text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

/** Give an element the colour of an expert; null removes the colour. */
export function paint(node, expert) {
  if (expert == null) {
    delete node.dataset.expert;
    delete node.dataset.striped;
    return;
  }
  node.dataset.expert = expert % 8;
  if (expert % 16 >= 8) node.dataset.striped = "";
  else delete node.dataset.striped;
}
