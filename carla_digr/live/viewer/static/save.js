// What the page has, as files: a picture of the moment, and the numbers of its frames.

const FIGURES = ["action", "value", "steer", "throttle", "brake", "inference_ms", "saliency_ms", "latency_ms", "trust"];
const THING = ["id", "kind", "lane", "distance", "share", "effect", "without"];

export function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// Picture and outlines as they are on the page, but finer.
export function savePng(frame, picture, objects) {
  const canvas = picture.copy();
  const context = canvas.getContext("2d");
  const shown = picture.places().filter(Boolean);
  const [{ left, top }, last] = [shown[0], shown[shown.length - 1]];
  const scale = canvas.width / (last.left + last.width - left);
  context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
  objects.draw(context);
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
