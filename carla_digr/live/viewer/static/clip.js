// A stretch of the timeline as a file: an animated WebP (developers.google.com/speed/webp/docs/riff_container), which this
// page makes of its own frames, each shown for as long as it lasted.

import { byId, number, percent, sentence, setText } from "./page.js";
import { Objects } from "./objects.js";
import { download } from "./save.js";

const LONGEST = 30; // s
const USUAL = 10; // s before the frame shown, where no stretch is marked
const LONGEST_PAUSE = 2; // s that a picture is shown where no frame follows
const LAST = 0.05; // s of the last picture
const HEIGHT = 512; // pixels of the pictures, about
const BAR = 56; // pixels under them
const QUALITY = 0.9;

// ---------------------------------------------------------------- the file's format

const size = (parts) => parts.reduce((sum, part) => sum + part.byteLength, 0);

// A number in so many bytes, the lowest first.
const bytes = (value, count) => Uint8Array.from({ length: count }, (_, i) => Math.floor(value / 256 ** i) % 256);

function chunk(name, ...parts) {
  const length = size(parts);
  return [new TextEncoder().encode(name), bytes(length, 4), ...parts, new Uint8Array(length % 2)];
}

// The chunks of pixels of a WebP picture, after its 12 bytes of header.
function pixels(webp) {
  const view = new DataView(webp);
  const found = [];
  for (let at = 12; at + 8 <= webp.byteLength; ) {
    const end = at + 8 + view.getUint32(at + 4, true);
    const name = new TextDecoder().decode(new Uint8Array(webp, at, 4));
    if (["ALPH", "VP8 ", "VP8L"].includes(name)) found.push(new Uint8Array(webp, at, Math.min(end + (end % 2), webp.byteLength) - at));
    at = end + (end % 2);
  }
  return found;
}

// pictures: WebP files of that size as buffers, and how many ms each is shown.
function animation(width, height, pictures) {
  const place = [...[0, 0, width - 1, height - 1].map((value) => bytes(value, 3))];
  const parts = [
    new TextEncoder().encode("WEBP"),
    ...chunk("VP8X", bytes(2, 4), bytes(width - 1, 3), bytes(height - 1, 3)), // 2: it is animated
    ...chunk("ANIM", bytes(0, 6)), // for ever
    ...pictures.flatMap(([webp, ms]) => chunk("ANMF", ...place, bytes(ms, 3), bytes(2, 1), ...pixels(webp))), // 2: over nothing
  ];
  return new Blob([new TextEncoder().encode("RIFF"), bytes(size(parts), 4), ...parts], { type: "image/webp" });
}

// ---------------------------------------------------------------- a frame's picture

function words(context, { frame, decision }, time, top, width) {
  const name = decision.action_names?.[decision.action];
  const decided = decision.fallback ? sentence(decision.status || "watchdog braking") : name ? `${name} ${percent(decision.probabilities[decision.action])}` : "";
  context.fillStyle = "#121821";
  context.fillRect(0, top, width, BAR);
  context.font = "14px system-ui, sans-serif";
  [`${number(time, 2)} s   frame ${frame}   ${decided}`, decision.sentence ?? ""].forEach((text, line) => {
    context.fillStyle = line ? "#9aa8ba" : "#e8eef6";
    context.fillText(text, 10, top + 22 + 22 * line, width - 20);
  });
}

export class Clip {
  // picture: the page's, whose view is taken; frames: gives those there are; shown: gives the one on the page;
  // changed: called when another stretch is marked.
  constructor({ picture, frames, shown, changed }) {
    Object.assign(this, { picture, frames, shown, changed });
    this.ends = [null, null]; // frames, as far as they are marked
    this.making = false;
    byId("clip-from").addEventListener("click", () => this.mark(0));
    byId("clip-to").addEventListener("click", () => this.mark(1));
    byId("save-clip").addEventListener("click", () => (this.making ? (this.making = false) : this.save()));
  }

  // Marks the frame shown as the first (0) or the last (1); one that lies beyond the other end takes that off.
  mark(end) {
    const frame = this.shown();
    if (!frame) return;
    this.ends[end] = frame;
    const [from, to] = this.ends;
    if (from && to && from.time > to.time) this.ends[1 - end] = null;
    this.changed();
  }

  get marked() {
    return this.ends.some(Boolean);
  }

  // Indices of the first and the last frame.
  range() {
    const frames = this.frames();
    const [from, to] = this.ends;
    const last = to ? Math.max(0, frames.indexOf(to)) : from ? frames.length - 1 : frames.lastIndexOf(this.shown());
    const first = from ? Math.max(0, frames.indexOf(from)) : frames.findIndex(({ time }) => time >= frames[last].time - USUAL);
    return [first, frames.findLastIndex(({ time }, i) => i <= last && time <= frames[first].time + LONGEST)];
  }

  describe() {
    if (this.making || !this.shown()) return;
    const frames = this.frames();
    const [first, last] = this.range();
    const long = number(frames[last].time - frames[first].time, 1);
    setText(byId("clip-said"), `Frames ${frames[first].frame} to ${frames[last].frame}, ${long} s${this.marked ? "" : " before this one"}; ${LONGEST} s at most.`);
  }

  async save() {
    if (!this.shown()) return;
    const [first, last] = this.range();
    const frames = this.frames().slice(first, last + 1);
    const progress = byId("clip-progress");
    this.making = true;
    progress.hidden = false;
    setText(byId("save-clip"), "Stop");
    try {
      const file = await this.make(frames, (share) => (progress.value = share));
      if (file) download(`frames-${frames[0].frame}-${frames[frames.length - 1].frame}.webp`, file);
      setText(byId("clip-said"), file ? `${frames.length} frames, ${number(file.size / 1e6, 1)} MB.` : "Stopped.");
    } catch (error) {
      setText(byId("clip-said"), `That failed: ${error.message}`);
    } finally {
      this.making = false;
      progress.hidden = true;
      setText(byId("save-clip"), "WebP of the stretch");
    }
  }

  // The file, or null if it was stopped.
  async make(frames, progress) {
    const objects = new Objects();
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d", { alpha: false });
    const at = (i) => Math.round(1000 * (frames[i].time - frames[0].time));
    const pictures = [];
    for (let i = 0; i < frames.length && this.making; i++) {
      const picture = this.picture.of(await this.picture.decode(frames[i]));
      const drawn = picture.copy(Math.max(1, Math.round(HEIGHT / picture.shots.find(Boolean).height)));
      if (!i) [canvas.width, canvas.height] = [drawn.width, drawn.height + BAR];
      picture.room = [canvas.width, canvas.height - BAR];
      context.drawImage(drawn, 0, 0, ...picture.room);
      objects.choose(frames[i], i > 0, frames[i].time);
      objects.shape(frames[i], picture.places());
      objects.draw(context);
      words(context, frames[i], (frames[i].time - frames[0].time), canvas.height - BAR, canvas.width);
      for (const shot of picture.shots) shot?.camera.close();
      const webp = await new Promise((resolve) => canvas.toBlob(resolve, "image/webp", QUALITY));
      const ms = i + 1 < frames.length ? Math.min(at(i + 1) - at(i), 1000 * LONGEST_PAUSE) : 1000 * LAST;
      pictures.push([await webp.arrayBuffer(), Math.max(1, ms)]);
      progress((i + 1) / frames.length);
    }
    return this.making ? animation(canvas.width, canvas.height, pictures) : null;
  }
}
