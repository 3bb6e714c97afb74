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
const LABEL = 18; // CSS pixels of a number beside an outline
const STEP = 32; // CSS pixels

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

// The highest corner of a polygon, x and y of its corners by turns.
function highest(corners) {
  const rows = corners.filter((_, i) => i % 2);
  const i = rows.indexOf(Math.min(...rows));
  return corners.slice(2 * i, 2 * i + 2);
}

// Whether a polygon, x and y of its corners by turns, is around a point: a line from there to the right crosses it an odd
// number of times.
function surrounds(corners, x, y) {
  let inside = false;
  for (let i = 0; i < corners.length; i += 2) {
    const [left, top] = corners.slice(i, i + 2);
    const [right, bottom] = corners.slice((i + 2) % corners.length).slice(0, 2);
    if (top > y !== bottom > y && x < left + ((y - top) / (bottom - top)) * (right - left)) inside = !inside;
  }
  return inside;
}

export class Objects {
  constructor() {
    this.known = new Map(); // identity -> the thing with calm figures, and when it was seen
    this.listed = []; // identities, in the order of the list
    this.decides = new Set(); // those without which the decision is another one, as the list says it
    this.changed = -Infinity;
    this.shapes = []; // what is outlined on the page
  }

  // Takes the frame that is shown; calm: others come after it.
  take(frame, calm) {
    if (this.choose(frame, calm, clock())) this.list(frame.decision.action_names?.[frame.decision.action]);
  }

  // What of a frame is to be listed, now being the time in s; whether that has changed.
  choose(frame, calm, now) {
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
    if (calm && now - this.changed < CHANGE_SECONDS) return false;
    this.changed = now;
    const found = [...this.known.values()].filter(matters).sort((a, b) => weight(b) - weight(a));
    this.listed = found.slice(0, LISTED).map(identity);
    this.decides = new Set(found.filter(({ flips }) => flips).map(identity));
    return true;
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

  // Outlines what is listed of a frame, in places of its pictures (`Picture.places`).
  shape(frame, places) {
    this.shapes = places.filter(Boolean).flatMap((place) => this.outlines(place, (frame.decisions ?? [frame.decision])[place.side]?.objects));
  }

  // Outlines it on the page; room: width and height of the stage.
  outline(frame, places, room) {
    this.shape(frame, places);
    const outlines = this.shapes;
    const key = JSON.stringify([outlines, room, devicePixelRatio]);
    if (key === this.drawn) return;
    this.drawn = key;
    const canvas = byId("outlines");
    canvas.hidden = !outlines.length;
    if (canvas.hidden) return;
    // The canvas is no larger than what is drawn, in steps: each pixel of it costs whenever it changes.
    const step = (edge, most, round) => Math.max(0, Math.min(most, STEP * round(edge / STEP)));
    const [width, height] = room;
    const left = step(Math.min(...outlines.map(({ box, line }) => box[0] - line - 2)), width, Math.floor);
    const top = step(Math.min(...outlines.map(({ box, line }) => box[1] - line - LABEL)), height, Math.floor);
    const right = step(Math.max(...outlines.map(({ box, line }) => box[0] + box[2] + Math.max(line + 2, LABEL))), width, Math.ceil);
    const bottom = step(Math.max(...outlines.map(({ box, line }) => box[1] + box[3] + line + 2)), height, Math.ceil);
    const place = { left, top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(place)) {
      if (canvas.style[name] !== `${value}px`) canvas.style[name] = `${value}px`;
    }
    const [wide, high] = [place.width, place.height].map((side) => Math.round(side * devicePixelRatio));
    if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
    const context = canvas.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, -left * devicePixelRatio, -top * devicePixelRatio);
    context.clearRect(left, top, place.width, place.height);
    this.draw(context);
  }

  // What is outlined in a place: each thing's box [left, top, width, height] and corners in its pixels, and how.
  outlines({ left, top, width, height, size: [rows, columns] }, things) {
    const [across, down] = [width / columns, height / rows];
    return (things ?? []).flatMap((thing) => {
      const place = this.listed.indexOf(identity(thing));
      if (place < 0 || !thing.box) return [];
      const [l, t, r, b] = thing.box;
      const box = [left + l * across, top + t * down, (r + 1 - l) * across, (b + 1 - t) * down];
      const share = this.known.get(identity(thing))?.share ?? 0;
      const point = (number, i) => (i % 2 ? top + (number + 0.5) * down : left + (number + 0.5) * across);
      const parts = (thing.outline ?? []).map((corners) => corners.map(point));
      const label = parts.length ? highest(parts[0]) : box;
      return { box, parts, label, line: WIDTH + Math.round(4 * WIDTH_OF_ALL * share) / 4, whole: this.decides.has(identity(thing)), text: String(place + 1) };
    });
  }

  // Draws that on a context whose pixels are the places'.
  draw(context) {
    context.font = "600 12px system-ui, sans-serif";
    context.lineJoin = "round";
    for (const { box: [left, top, width, height], parts, label, line, whole, text } of this.shapes) {
      context.beginPath();
      if (!parts.length) context.roundRect(left - line / 2, top - line / 2, width + line, height + line, 4);
      for (const corners of parts) {
        context.moveTo(corners[0], corners[1]); // or the part before would be drawn on from
        for (let i = 2; i < corners.length; i += 2) context.lineTo(corners[i], corners[i + 1]);
        context.closePath();
      }
      context.setLineDash(whole ? [] : [6, 4]); // whole: without it the decision is another one
      for (const [colour, extra] of [["#000a", 2], [HUE, 0]]) {
        context.strokeStyle = colour;
        context.lineWidth = line + extra;
        context.stroke();
      }
      context.setLineDash([]);
      context.fillStyle = "#06131fd0";
      context.fillRect(label[0] - line, label[1] - line - 16, 15, 15);
      context.fillStyle = HUE;
      context.fillText(text, label[0] - line + 4, label[1] - line - 4);
    }
  }

  // The thing at a place of a map, row and column, of those that the frame has: the one whose outline is around it, or
  // else the one with the smallest box.
  at(frame, row, column) {
    const area = ([l, t, r, b]) => (r - l + 1) * (b - t + 1);
    const inside = (frame.decision.objects ?? []).filter(({ box: [l, t, r, b] }) => column >= l && column <= r && row >= t && row <= b);
    inside.sort((a, b) => area(a.box) - area(b.box));
    return inside.find(({ outline }) => outline?.some((corners) => surrounds(corners, column - 0.5, row - 0.5))) ?? inside[0];
  }
}

