// What the page has, as files: a picture of the moment, and the numbers of its frames.

import { byId } from "./page.js";

const FIGURES = ["action", "value", "steer", "throttle", "brake", "inference_ms", "saliency_ms", "latency_ms", "trust"];
const THING = ["id", "kind", "lane", "distance", "share", "effect", "without"];

function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// Picture and outlines as they are on the page, the picture at its canvas's resolution.
export function savePng(frame, places) {
  const picture = byId("picture");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const shown = places.filter(Boolean);
  if (shown.length) {
    const [first, last] = [shown[0], shown[shown.length - 1]];
    const scale = devicePixelRatio;
    const from = [first.left, first.top, last.left + last.width - first.left, first.height].map((value) => value * scale);
    context.drawImage(byId("outlines"), ...from, 0, 0, canvas.width, canvas.height);
  }
  canvas.toBlob((blob) => download(`frame-${frame.frame}.png`, blob), "image/png");
}

const cell = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

// A row a frame: its numbers, the probabilities, and the thing that weighs most.
export function saveCsv(frames) {
  const names = frames.findLast((frame) => frame.decision.action_names?.length)?.decision.action_names ?? [];
  const head = ["frame", "stamp", ...FIGURES, "fallback", ...names.map((name) => `p ${name}`), ...THING.map((key) => `first ${key}`)];
  const rows = frames.map(({ frame, stamp, decision }) => [
    frame,
    stamp,
    decision.action_names?.[decision.action] ?? decision.action,
    ...FIGURES.slice(1).map((key) => decision[key]),
    decision.fallback,
    ...names.map((_, i) => decision.probabilities?.[i]),
    ...THING.map((key) => decision.objects?.[0]?.[key]),
  ]);
  download("frames.csv", new Blob([[head, ...rows].map((row) => row.map(cell).join(",")).join("\n"), "\n"], { type: "text/csv" }));
}
