// The picture: camera and map of a frame on one canvas. Smooth, the map's values are interpolated (bicubic) at about the
// page's resolution, and then coloured; crisp, every pixel of the camera is one.

import { byId } from "./page.js";

const GAP = 2; // camera pixels between two pictures side by side
const FINEST = 8; // pixels of the canvas for one of the camera, at most
const LARGEST = 1 << 21; // pixels of the canvas
const MAP_SIDE = 512; // pixels of an interpolated map

const newCanvas = () => document.createElement("canvas");

export class Picture {
  constructor() {
    this.canvas = byId("picture");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.levels = newCanvas(); // the map's values as grey
    this.scratch = newCanvas();
    this.colours = new Uint8Array(768); // 256 times red, green, blue
    this.shots = []; // what is drawn: {camera: canvas, map, saliency: [height, width]}, null where a side has no frame
    this.view = "overlay";
    this.opacity = 0.6;
    this.smooth = true;
  }

  colour(colormap) {
    this.colours.set(colormap);
    const image = new ImageData(256, 1);
    new Uint32Array(image.data.buffer).set(this.table(true));
    byId("scale").getContext("2d").putImageData(image, 0, 0);
    this.compose();
  }

  // A pixel for each level. Over the camera its colour and its opacity are the level, as in the overlay topic.
  table(opaque) {
    const table = new Uint8ClampedArray(1024);
    for (let i = 0; i < 256; i++) table.set([...this.colours.subarray(3 * i, 3 * i + 3), opaque ? 255 : i], 4 * i);
    return new Uint32Array(table.buffer);
  }

  // The map as a canvas of that size.
  paint(map, rows, columns, width, height, opaque) {
    const image = new ImageData(columns, rows);
    const table = this.smooth ? null : this.table(opaque);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < map.length; i++) pixels[i] = table ? table[map[i]] : 0xff000000 | (map[i] * 0x010101);
    [this.levels.width, this.levels.height] = [columns, rows];
    this.levels.getContext("2d").putImageData(image, 0, 0);
    if (!this.smooth) return this.levels;
    const coarser = Math.min(1, MAP_SIDE / Math.max(width, height));
    const [wide, high] = [Math.ceil(width * coarser), Math.ceil(height * coarser)];
    if (this.scratch.width !== wide || this.scratch.height !== high) [this.scratch.width, this.scratch.height] = [wide, high];
    const scratch = this.scratch.getContext("2d", { willReadFrequently: true });
    scratch.imageSmoothingQuality = "high";
    scratch.drawImage(this.levels, 0, 0, wide, high);
    const interpolated = scratch.getImageData(0, 0, wide, high);
    const found = new Uint32Array(interpolated.data.buffer);
    const coloured = this.table(opaque);
    for (let i = 0; i < found.length; i++) found[i] = coloured[found[i] & 255];
    scratch.putImageData(interpolated, 0, 0);
    return this.scratch;
  }

  // The pictures side by side: the camera alone stands before the others when both are asked for.
  panels() {
    const first = this.shots.find(Boolean);
    return this.view === "both" && first ? [{ ...first, map: null }, ...this.shots] : this.shots;
  }

  // Canvas pixels for one of the camera.
  fineness(width, height) {
    if (!this.smooth) return 1;
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    const wanted = devicePixelRatio * Math.min(clientWidth / width, clientHeight / height);
    return Math.max(1, Math.min(FINEST, Math.ceil(wanted), Math.floor(Math.sqrt(LARGEST / (width * height)))));
  }

  compose() {
    const first = this.shots.find(Boolean);
    if (!first) return;
    const panels = this.panels();
    const { width, height } = first.camera;
    const total = panels.length * (width + GAP) - GAP;
    const fine = this.fineness(total, height);
    const { canvas, context } = this;
    if (canvas.width !== total * fine || canvas.height !== height * fine) [canvas.width, canvas.height] = [total * fine, height * fine];
    context.imageSmoothingQuality = "high";
    context.globalAlpha = 1;
    context.fillRect(0, 0, canvas.width, canvas.height);
    panels.forEach((shot, i) => {
      if (!shot) return;
      const place = [i * (width + GAP) * fine, 0, width * fine, height * fine];
      context.globalAlpha = 1;
      if (this.view !== "map") context.drawImage(shot.camera, ...place);
      if (!shot.map || this.view === "camera") return;
      const [rows, columns] = shot.saliency;
      const map = this.paint(shot.map, rows, columns, place[2], place[3], this.view === "map");
      context.globalAlpha = this.view === "map" ? 1 : this.opacity;
      context.drawImage(map, ...place);
    });
  }

  // Where each picture is on the stage, in CSS pixels, and the size of its map or camera; null for the camera alone.
  places() {
    const first = this.shots.find(Boolean);
    if (!first) return [];
    const panels = this.panels();
    const { width, height } = first.camera;
    const total = panels.length * (width + GAP) - GAP;
    const { clientWidth, clientHeight } = this.canvas;
    const scale = Math.min(clientWidth / total, clientHeight / height);
    const [left, top] = [(clientWidth - total * scale) / 2, (clientHeight - height * scale) / 2];
    return panels.map((shot, i) => shot && {
      left: left + i * (width + GAP) * scale,
      top,
      width: width * scale,
      height: height * scale,
      size: shot.saliency ?? [height, width],
      alone: this.view === "both" && i === 0,
    });
  }

  // The pictures of a frame with their cameras on canvases. A side without the frame is null.
  async decode(frame) {
    const parts = await frame.pictures();
    return Promise.all(parts.map(async (part) => {
      if (!part) return null;
      const bitmap = await createImageBitmap(new Blob([part.jpeg], { type: "image/jpeg" }));
      const camera = newCanvas();
      [camera.width, camera.height] = [part.width, part.height];
      camera.getContext("2d").drawImage(bitmap, 0, 0);
      bitmap.close();
      return { ...part, camera };
    }));
  }
}
