// Which car: outlines around what decides, the thicker the more of the map it holds, and a list of it.

import { byId, clock, number, percent } from "./page.js";

const CHANGE_SECONDS = 0.5; // between two changes of the list, while frames come one after the other
const LASTS_SECONDS = 1; // that a thing stays in the list without being seen
const NEWS = 0.3; // of a new value in the figures of the list
const LEAST_SHARE = 0.03; // of the map, or
const LEAST_EFFECT = 0.02; // nats, of what is listed
const LISTED = 4;
const WIDTH = 1.5; // CSS pixels of an outline, and as many more
const WIDTH_OF_ALL = 6; // where the thing holds all of the map
const HUE = "#7fd4ff";

const identity = (thing) => thing.id || `${thing.kind} ${thing.lane}`;
const weight = (thing) => Math.max(thing.effect ?? 0, thing.share ?? 0);
const matters = (thing) => thing.share >= LEAST_SHARE || thing.effect >= LEAST_EFFECT;

function lane({ kind, lane: place, id }) {
  if (place === null) return "–";
  const side = place < 0 ? "left" : "right";
  if (!id) return Math.abs(place) > 1 ? `${side}, ${Math.abs(place)}.` : side;
  if (place === 0) return "my lane";
  return Math.abs(place) > 1 ? `${Math.abs(place)} ${side}` : side;
}

export class Objects {
  constructor() {
    this.known = new Map(); // identity -> the thing with calm figures, and when it was seen
    this.listed = []; // identities, in the order of the list
    this.changed = -Infinity;
    this.frame = null;
  }

  // Takes the frame that is shown; calm: others come after it.
  take(frame, calm) {
    const now = clock();
    const things = frame.decision.objects ?? [];
    if (!calm) this.known.clear();
    for (const thing of things) {
      const before = this.known.get(identity(thing));
      const figures = {};
      for (const key of ["share", "effect"]) {
        figures[key] = before && Number.isFinite(before[key]) ? before[key] + NEWS * ((thing[key] ?? 0) - before[key]) : thing[key];
      }
      this.known.set(identity(thing), { ...thing, ...figures, seen: now });
    }
    for (const [key, thing] of this.known) if (now - thing.seen > LASTS_SECONDS) this.known.delete(key);
    this.frame = frame;
    if (calm && now - this.changed < CHANGE_SECONDS) return;
    this.changed = now;
    const found = [...this.known.values()].filter(matters).sort((a, b) => weight(b) - weight(a));
    this.listed = found.slice(0, LISTED).map(identity);
    this.list(frame.decision.action_names?.[frame.decision.action]);
  }

  list(decided) {
    byId("objects").hidden = !this.listed.length;
    const rows = this.listed.map((key, index) => {
      const thing = this.known.get(key);
      const row = document.createElement("tr");
      const without = thing.flips && thing.without ? thing.without : thing.without === null ? "–" : "same";
      const distance = Number.isFinite(thing.distance) ? `${number(thing.distance, 0)} m` : "–";
      const cells = [String(index + 1), thing.kind, lane(thing), distance, percent(thing.share ?? NaN), without];
      row.append(...cells.map((text, column) => {
        const cell = document.createElement(column === 1 ? "th" : "td");
        if (column === 1) cell.scope = "row";
        cell.textContent = text;
        return cell;
      }));
      row.classList.toggle("flips", thing.flips);
      row.title = `Without it: ${without === "same" ? `${decided ?? "the same"} too` : without}; the decision depends on it by ${number(thing.effect, 2)} nats`;
      return row;
    });
    byId("objects").tBodies[0].replaceChildren(...rows);
  }

  // Draws the outlines; panels: for each picture with a map its place {left, top, width, height} in CSS pixels, the
  // map's size [height, width], and its things.
  outline(canvas, panels) {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const scale = devicePixelRatio;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "600 12px system-ui, sans-serif";
    for (const { left, top, width: wide, height: high, size: [rows, columns], things } of panels) {
      for (const thing of things ?? []) {
        const place = this.listed.indexOf(identity(thing));
        if (place < 0 || !thing.box) continue;
        const [l, t, r, b] = thing.box;
        const box = [left + (l / columns) * wide, top + (t / rows) * high, ((r + 1 - l) / columns) * wide, ((b + 1 - t) / rows) * high];
        const share = this.known.get(identity(thing))?.share ?? 0;
        const line = WIDTH + WIDTH_OF_ALL * share;
        context.beginPath();
        context.roundRect(box[0] - line / 2, box[1] - line / 2, box[2] + line, box[3] + line, 4);
        context.setLineDash(thing.flips ? [] : [6, 4]); // whole: without it the decision is another one
        for (const [colour, extra] of [["#000a", 2], [HUE, 0]]) {
          context.strokeStyle = colour;
          context.lineWidth = line + extra;
          context.stroke();
        }
        context.setLineDash([]);
        const text = String(place + 1);
        context.fillStyle = "#06131fd0";
        context.fillRect(box[0] - line, box[1] - line - 16, 15, 15);
        context.fillStyle = HUE;
        context.fillText(text, box[0] - line + 4, box[1] - line - 4);
      }
    }
  }

  // The thing at a place of a map, row and column, of those that the frame has; the smallest box wins.
  at(frame, row, column) {
    const area = ([l, t, r, b]) => (r - l + 1) * (b - t + 1);
    const inside = (frame.decision.objects ?? []).filter(({ box: [l, t, r, b] }) => column >= l && column <= r && row >= t && row <= b);
    return inside.sort((a, b) => area(a.box) - area(b.box))[0];
  }
}

