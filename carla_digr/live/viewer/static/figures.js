// The figures of the frame that is shown, beside its picture.

import { byId, number, percent, sentence, setAttribute, setText } from "./page.js";
import { HUES, LATENCY_BUDGET_MS } from "./plots.js";

const EVENT_SECONDS = 3; // an event stays on the page this long after its frame

const share = (probability) => (Number.isFinite(probability) ? `${(100 * probability).toFixed(1)} %` : "–");

function meter(element, value, text, from = 0) {
  const length = Number.isFinite(value) ? Math.max(-1, Math.min(1, value)) / (from ? 2 : 1) : 0;
  const transform = `scaleX(${length.toFixed(3)})`;
  const bar = element.querySelector("u");
  if (bar.style.transform !== transform) bar.style.transform = transform;
  setText(element.querySelector("b"), text);
  setAttribute(element, "aria-valuenow", Number.isFinite(value) ? value.toFixed(3) : "0");
  setAttribute(element, "aria-valuetext", text);
}

// Makes a meter for each action.
export function nameActions(names) {
  byId("actions").replaceChildren(...names.map((name, index) => {
    const item = document.createElement("div");
    item.className = `hue-${index % HUES.length}`;
    item.dataset.name = name;
    for (const [key, value] of Object.entries({ role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 1 })) {
      item.setAttribute(key, value);
    }
    const [label, track, figure] = ["span", "i", "b"].map((tag) => document.createElement(tag));
    label.textContent = label.title = name;
    track.append(document.createElement("u"));
    item.append(label, track, figure);
    return item;
  }));
}

export function showFigures({ frame, stamp, decision }) {
  setText(byId("frame"), String(frame));
  setText(byId("stamp"), number(stamp, 2));
  byId("score-row").hidden = !Number.isFinite(decision.score);
  setText(byId("score"), number(decision.score, 1));
  setText(byId("policy"), decision.policy_hash || "–");
  setText(byId("map"), decision.map || "–");
  setText(byId("trust"), Number.isFinite(decision.trust) ? `${number(decision.trust, 2)}, ${number(decision.trust_age, 0)} s` : "–");
  setText(byId("sentence"), decision.sentence ?? "");
  byId("sentence").hidden = !decision.sentence;
  setText(byId("action"), sentence((decision.action_names ?? [])[decision.action] ?? "–"));
  byId("action").classList.toggle("unapplied", Boolean(decision.fallback));
  byId("unapplied").hidden = !decision.fallback;
  [...byId("actions").children].forEach((item, index) => {
    meter(item, decision.probabilities?.[index], share(decision.probabilities?.[index]));
    item.classList.toggle("taken", index === decision.action);
  });
  meter(byId("steer"), decision.steer, number(decision.steer, 3), -1);
  meter(byId("throttle"), decision.throttle, percent(decision.throttle));
  meter(byId("brake"), decision.brake, percent(decision.brake));
  setText(byId("value"), number(decision.value, 2));
}

export function showTimes({ decision }) {
  for (const name of ["latency", "inference", "saliency"]) setText(byId(name), number(decision[`${name}_ms`], 1));
  byId("latency").closest("div").classList.toggle("over", decision.latency_ms > LATENCY_BUDGET_MS);
}

// What a person must know about a frame, worst first; earlier: the frames before it.
export function notices(frame, earlier) {
  const { decision } = frame;
  const found = [];
  if (decision.fallback) found.push(["alarm", sentence(decision.status || "watchdog braking")]);
  for (const event of recentEvents(frame, earlier)) found.push(["alarm", sentence(event)]);
  if (!frame.map) found.push(["warning", "No explanation for this frame"]);
  else if (decision.saliency_flat) found.push(["warning", "Flat explanation: the policy has no gradient here"]);
  if (decision.status && !decision.fallback) found.push(["note", sentence(decision.status)]);
  return found;
}

function recentEvents(frame, earlier) {
  const names = new Set(frame.decision.events);
  for (let i = earlier.lastIndexOf(frame) - 1; i >= 0 && frame.time - earlier[i].time < EVENT_SECONDS; i--) {
    for (const event of earlier[i].decision.events ?? []) names.add(event);
  }
  return names;
}

export function showNotices(notices) {
  const list = byId("notices");
  const key = notices.join("\n");
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...notices.map(([level, text]) => {
    const item = document.createElement("li");
    item.dataset.level = level;
    item.textContent = text;
    return item;
  }));
}
