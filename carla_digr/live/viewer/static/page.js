// What every part of the page uses: elements, the clock, and how numbers are written.

export const byId = (id) => document.getElementById(id);
export const clock = () => performance.now() / 1000; // s
export const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");
export const percent = (value) => (Number.isFinite(value) ? `${Math.round(value * 100)} %` : "–");
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// What is written is compared first, for every change costs a layout; a text keeps its node.
export function setText(element, text) {
  const [node] = element.childNodes;
  if (node instanceof Text && !node.nextSibling) {
    if (node.data !== text) node.data = text;
  } else if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// What calls show, at most once in so many seconds, and after the last call once more.
export function paced(seconds, show) {
  let [due, last] = [0, -Infinity];
  const now = () => {
    last = clock();
    show();
  };
  return () => {
    clearTimeout(due);
    const wait = seconds() - (clock() - last);
    if (wait <= 0) now();
    else due = setTimeout(now, 1000 * wait);
  };
}
