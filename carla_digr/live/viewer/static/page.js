// What every part of the page uses: elements, the clock, and how numbers are written.

export const byId = (id) => document.getElementById(id);
export const clock = () => performance.now() / 1000; // s
export const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");
export const percent = (value) => (Number.isFinite(value) ? `${Math.round(value * 100)} %` : "–");
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
