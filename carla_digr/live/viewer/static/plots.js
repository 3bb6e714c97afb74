// The plots of the last seconds and the marks under the timeline.

/* global uPlot */

import { byId, number, setText } from "./page.js";

export const LATENCY_BUDGET_MS = 50; // one period at 20 Hz
export const HUES = ["#56b4e9", "#3ddc97", "#f0a93b", "#ff6f91", "#b79cff", "#e7d84b", "#8fa3bb", "#48d7d7"]; // = .hue-n
const PLOT_SECONDS = 20;
const TIMES = { latency_ms: "#56b4e9", inference_ms: "#3ddc97", saliency_ms: "#f0a93b" };

let probabilityPlot = null;
let latencyPlot = null;
let history = []; // what drawPlots was given last: all frames,
let latest = 0; // the time of the last of them, the plots' zero,
let here = null; // the frame to mark, or null,
let lastWord = "now"; // and what the end of the time axis is called
let marked = null; // first and last index of a stretch
let plotted = []; // frames of the plots' window

// The car was not driven by the policy, or something happened.
export const isMarked = (frame) => frame.decision.fallback || Boolean(frame.decision.events?.length);

// A colour of the style sheet, which has them for dark and light.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function makePlot(element, series, range, pick) {
  const axis = { stroke: () => colour("--quiet"), grid: { stroke: () => colour("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const plot = new uPlot({
    width: element.clientWidth || 300,
    height: element.clientHeight || 100,
    padding: [6, 18, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { setScale: false, x: false }, points: { show: false } },
    scales: { x: { time: false }, y: { range } },
    axes: [
      { ...axis, size: 24, gap: 6, values: (_, ticks) => ticks.map((t) => (t === 0 ? lastWord : `${number(t, 0)} s`)) },
      { ...axis, size: 34, gap: 4, space: 22 },
    ],
    series: [{}, ...series.map((stroke) => ({ stroke, width: 1.6, points: { show: false } }))],
    hooks: { drawClear: [shadeFallback], draw: [drawBudget, drawHere] },
  }, [[], ...series.map(() => [])], element);
  plot.over.addEventListener("click", () => {
    if (!plotted.length) return;
    const time = latest + plot.posToVal(plot.cursor.left, "x");
    const nearest = plotted.reduce((a, b) => (Math.abs(b.time - time) < Math.abs(a.time - time) ? b : a));
    pick(nearest);
  });
  return plot;
}

// Makes the plots for that many actions; a click calls pick with the frame of that moment.
export function makePlots(actions, pick) {
  probabilityPlot?.destroy();
  const series = Array.from({ length: actions }, (_, index) => HUES[index % HUES.length]);
  probabilityPlot = makePlot(byId("probability-plot"), series, [0, 1], pick);
  const fromZero = (_, low, high) => [0, Math.max(10, 1.15 * high)];
  latencyPlot ??= makePlot(byId("latency-plot"), Object.values(TIMES), fromZero, pick);
}

function column(plot, time) {
  return Math.round(plot.valToPos(time - latest, "x", true));
}

function shadeFallback(plot) {
  const { ctx, bbox } = plot;
  ctx.fillStyle = "#ff5a5f44";
  plotted.forEach((frame, i) => {
    if (!frame.decision.fallback) return;
    const left = column(plot, frame.time);
    const right = i + 1 < plotted.length ? column(plot, plotted[i + 1].time) : left + 1;
    ctx.fillRect(left, bbox.top, right - left, bbox.height);
  });
}

function drawBudget(plot) {
  if (plot !== latencyPlot || plot.scales.y.max < LATENCY_BUDGET_MS) return;
  const { ctx, bbox } = plot;
  const y = Math.round(plot.valToPos(LATENCY_BUDGET_MS, "y", true));
  ctx.fillStyle = colour("--alarm");
  ctx.fillRect(bbox.left, y, bbox.width, devicePixelRatio);
  ctx.textAlign = "left";
  ctx.textBaseline = "bottom";
  ctx.fillText(`${LATENCY_BUDGET_MS} ms, one period`, bbox.left + 4, y - 1);
}

function drawHere(plot) {
  const { ctx, bbox } = plot;
  if (!here) return;
  const left = column(plot, here.time);
  if (left < bbox.left || left > bbox.left + bbox.width) return;
  ctx.fillStyle = colour("--text");
  ctx.fillRect(left, bbox.top, devicePixelRatio, bbox.height);
}

// Draws plots and marks of these frames (oldest first); pausedAt is the frame to mark while paused, else null.
// With ``around`` that frame is the plots' zero and middle. ``stretch``: first and last index of what is marked, or null.
export function drawPlots(frames, pausedAt, around, stretch) {
  [history, here, lastWord, marked] = [frames, pausedAt, around ? "here" : pausedAt ? "pause" : "now", stretch];
  drawMarks();
  if (!history.length || !probabilityPlot) return;
  latest = around ? here.time : history[history.length - 1].time;
  // The window ends with the last frame; a marked frame further back than the window moves it there.
  const end = around || (here && latest - here.time > PLOT_SECONDS) ? here.time + PLOT_SECONDS / 2 : latest;
  plotted = history.filter((frame) => frame.time >= end - PLOT_SECONDS && frame.time <= end);
  const times = plotted.map((frame) => frame.time - latest);
  const range = { min: end - PLOT_SECONDS - latest, max: end - latest };
  const draw = (plot, columns) => plot.batch(() => {
    plot.setData([times, ...columns], false);
    plot.setScale("x", range);
    plot.redraw(false, true); // the axis says "pause" or "now" for the same numbers
  });
  const actions = probabilityPlot.series.slice(1);
  draw(probabilityPlot, actions.map((_, a) => plotted.map((frame) => frame.decision.probabilities?.[a] ?? null)));
  draw(latencyPlot, Object.keys(TIMES).map((key) => plotted.map((frame) => frame.decision[key] ?? null)));
  const sorted = plotted.map((frame) => frame.decision.latency_ms).filter(Number.isFinite).sort((a, b) => a - b);
  const quantile = (q) => number(sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))], 1);
  setText(byId("latency-summary"), around ? `${PLOT_SECONDS} s` : `last ${PLOT_SECONDS} s: p50 ${quantile(0.5)}, p99 ${quantile(0.99)} ms`);
}

const DECIDES = 0.1; // nats, from which a thing is said to decide
const STRIP = 6; // pixels of the strip under the marks
const MISSING = "#ffb547"; // an explanation

// What decides on a frame: its identity, or nothing.
function decider(frame) {
  const first = frame.decision.objects?.[0];
  return first && first.effect >= DECIDES ? String(first.id || `${first.kind} ${first.lane}`) : "";
}

// A hue that a thing keeps.
function hueOf(identity) {
  let sum = 7;
  for (const character of identity) sum = (31 * sum + character.charCodeAt(0)) % 997;
  return HUES[sum % HUES.length];
}

// The colour of what decides on a frame, kept with it; empty: nothing does.
function stripColour(frame) {
  if (frame.stripColour === undefined) {
    const who = decider(frame);
    frame.stripColour = who && hueOf(who);
  }
  return frame.stripColour;
}

// Red where the policy did not drive or something happened, blue where one of a recording's chosen events begins, amber
// where the explanation is missing.
function markColour(frame) {
  if (isMarked(frame)) return "#ff5a5f";
  return frame.event ? "#5cb3ff" : frame.map ? "" : MISSING;
}

// Fills what runs of frames of one colour have of the timeline's width.
function fillRuns(ctx, colourOf, fill) {
  const pitch = ctx.canvas.width / Math.max(1, history.length - 1);
  for (let from = 0, i = 1; i <= history.length; i++) {
    const found = colourOf(history[from]);
    if (i < history.length && colourOf(history[i]) === found) continue;
    const [left, right] = [from, i].map((place) => Math.round((place - 0.5) * pitch));
    ctx.fillStyle = found;
    if (found) fill(found, left, right - left);
    from = i;
  }
}

// Marks, around the marked stretch, and below them a strip with a colour for each thing that decides.
function drawMarks() {
  const marks = byId("marks");
  if (marks.width !== marks.clientWidth) marks.width = marks.clientWidth;
  const ctx = marks.getContext("2d");
  ctx.clearRect(0, 0, marks.width, marks.height);
  fillRuns(ctx, stripColour, (_, left, width) => ctx.fillRect(left, marks.height - STRIP, width, STRIP));
  fillRuns(ctx, markColour, (found, left, width) => {
    const [top, height] = found === MISSING ? [3, 5] : [0, 8];
    ctx.fillRect(left, top, Math.max(2, width), height);
  });
  if (!marked) return;
  const [left, right] = marked.map((i) => Math.round((i / Math.max(1, history.length - 1)) * marks.width));
  ctx.fillStyle = colour("--accent");
  ctx.fillRect(left, 0, Math.max(2, right - left), 2);
  for (const end of [left, right - 2]) ctx.fillRect(end, 0, 2, marks.height);
}

export function resizePlots() {
  for (const plot of [probabilityPlot, latencyPlot]) {
    const box = plot?.root.parentElement;
    if (box) plot.setSize({ width: box.clientWidth, height: box.clientHeight });
  }
  drawMarks();
}
