// Recordings on the page: one, or two of the same drive side by side. Frames come by HTTP when they are looked at.

import { byId, clock, number, setText } from "./page.js";

const KEPT = 300; // frames whose pictures stay in this page
const AHEAD_SECONDS = 0.5; // of playing that are fetched in advance

// A binary message: length and JSON header, picture, map (wire format: docstring of server.py).
export function parse(message) {
  const headerBytes = new DataView(message).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(message, 4, headerBytes)));
  const jpegStart = 4 + headerBytes;
  const mapStart = jpegStart + header.jpeg_bytes;
  return {
    ...header,
    jpeg: new Uint8Array(message, jpegStart, header.jpeg_bytes),
    map: header.saliency && new Uint8Array(message, mapStart),
  };
}

// Lists the recordings of the server's folder; one that is chosen is opened, or laid beside another.
export async function chooseRecording() {
  const names = await (await fetch("api/recordings")).json();
  const link = (text, bags) => {
    const made = document.createElement("a");
    made.textContent = text;
    made.href = `?${new URLSearchParams(bags.map((bag) => ["bag", bag]))}`;
    return made;
  };
  const [chosen] = new URLSearchParams(location.search).getAll("bag");
  byId("shelf-list").replaceChildren(...names.map((name) => {
    const item = document.createElement("li");
    item.append(link(name, [name]));
    if (chosen && chosen !== name) item.append(link("beside", [chosen, name]));
    return item;
  }));
  byId("shelf").show();
}

export class Recording {
  constructor({ sides, frames, events, ignored }) {
    Object.assign(this, { sides, events, ignored });
    this.frames = frames.map((row, index) => ({
      ...row,
      index,
      decision: row.decisions[0],
      map: row.explained[0],
      pictures: () => this.pictures(index),
    }));
    this.kept = new Map(); // index -> promise of its pictures
    this.speed = 1;
    this.from = { time: 0, clock: 0 }; // where and when playing began
  }

  // One picture with its map for each side; null where that side has no such frame.
  pictures(index) {
    if (!this.kept.has(index)) {
      this.kept.set(index, Promise.all(this.sides.map((_, side) => this.fetch(side, index))));
      if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    }
    return this.kept.get(index);
  }

  async fetch(side, index) {
    if (!this.frames[index].decisions[side]) return null;
    const response = await fetch(`api/recording/${side}/${index}${location.search}`);
    if (!response.ok) throw Error(await response.text());
    const picture = parse(await response.arrayBuffer());
    const decision = this.frames[index].decisions[side];
    decision.saliency_flat = picture.map?.every((value) => !value);
    decision.objects?.forEach((thing, i) => (thing.outline = picture.outlines[i]));
    return picture;
  }

  playFrom(frame) {
    this.from = { time: frame.time, clock: clock() };
  }

  // The frame that is due while playing.
  due() {
    const time = this.from.time + (clock() - this.from.clock) * this.speed;
    let [low, high] = [0, this.frames.length - 1];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (this.frames[middle].time <= time + 1e-6) low = middle;
      else high = middle - 1;
    }
    return this.frames[low];
  }

  fetchAhead(frame) {
    const end = frame.time + AHEAD_SECONDS * this.speed;
    for (let i = frame.index + 1; i < this.frames.length && this.frames[i].time <= end; i++) this.pictures(i).catch(() => {});
  }

  // Which kind of events to mark and to jump to; empty: all.
  choose(kind) {
    this.places = this.events.filter((event) => !kind || event.kind === kind).map((event) => event.index);
    for (const frame of this.frames) frame.event = false;
    for (const index of this.places) this.frames[index].event = true;
  }

  // The next or previous event of the chosen kind: its frame's index, or undefined.
  event(index, direction) {
    return direction > 0 ? this.places.find((i) => i > index) : this.places.findLast((i) => i < index);
  }

  // Fills the controls that only a recording has.
  present(change) {
    document.body.dataset.mode = "recording";
    byId("recording").hidden = false;
    const counts = new Map([["", this.events.length]]);
    for (const { kind } of this.events) counts.set(kind, (counts.get(kind) ?? 0) + 1);
    byId("kind").replaceChildren(...[...counts].map(([kind, count]) => new Option(`${kind || "all events"} (${count})`, kind)));
    byId("kind").addEventListener("change", (event) => change(() => this.choose(event.target.value)));
    this.choose("");
    byId("speed").addEventListener("change", (event) => change(() => (this.speed = Number(event.target.value))));
    byId("scrub").setAttribute("aria-label", "Frame of the recording");
    setText(document.querySelector("#probabilities-title span"), "20 s");
    byId("captions").hidden = false;
    byId("captions").replaceChildren(...this.sides.map(() => document.createElement("span")));
    if (this.sides.length > 1) for (const id of ["other", "agreement-row"]) byId(id).hidden = false;
    setText(byId("ignored"), this.ignored.join("; "));
  }

  // What each side says about a frame.
  describe(frame) {
    this.sides.forEach((side, i) => {
      const decision = frame.decisions[i];
      const name = (decision?.action_names ?? [])[decision?.action];
      const chosen = name ? `${name} ${number(100 * decision.probabilities[decision.action], 0)} %` : "no decision";
      const method = side.method === "live" ? "" : `${side.method}, `;
      setText(byId("captions").children[i], `${side.name}: ${method}${side.policy || "no policy"} – ${decision ? chosen : "no such frame"}`);
      if (i) setText(byId("other-action"), decision ? chosen : "–");
    });
    setText(byId("agreement"), number(frame.agreement ?? NaN, 2));
    setText(byId("event"), this.events.filter(({ index }) => index === frame.index).map(({ kind }) => kind).join(", "));
  }
}
