// The picture: camera and map of a frame on one canvas. Smooth and still, both are interpolated (bicubic) at about the
// page's resolution, the map's values before they are coloured; while frames come one after the other, the canvas has the
// camera's pixels and the browser stretches it. Crisp, every pixel of the camera is one.

import { byId } from "./page.js";

const GAP = 2; // camera pixels between two pictures side by side
const FINEST = 8; // pixels of the canvas for one of the camera, at most
const LARGEST = 1 << 21; // pixels of a canvas
const MAP_SIDE = 512; // pixels of an interpolated map

const newCanvas = () => document.createElement("canvas");

// Pixels that are set one by one, on a canvas that is kept from frame to frame.
class Pixels {
  constructor() {
    this.canvas = newCanvas();
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.image = new ImageData(1, 1);
  }

  fit(width, height) {
    const { canvas } = this;
    if (canvas.width === width && canvas.height === height) return;
    [canvas.width, canvas.height] = [width, height];
    this.image = new ImageData(width, height);
  }

  // Each pixel is that of the table at its level; levels lie a step apart.
  set(levels, step, table) {
    const pixels = new Uint32Array(this.image.data.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = table[levels[step * i]];
    this.context.putImageData(this.image, 0, 0);
  }
}

const GREYS = Uint32Array.from({ length: 256 }, (_, level) => 0xff000000 + 0x010101 * level);

export class Picture {
  constructor() {
    this.canvas = byId("picture");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.levels = new Pixels();
    this.interpolated = new Pixels();
    this.shots = []; // what is drawn: {camera, width, height, map, saliency: [height, width]}, null where a side has no frame
    this.room = [1, 1]; // for the picture, CSS pixels
    this.view = "overlay";
    this.opacity = 0.6;
    this.smooth = true;
    this.still = false; // it stays for a while
    this.colour(new Uint8Array(768));
  }

  // colormap: 256 times red, green, blue.
  colour(colormap) {
    // A pixel for each level; over the camera its colour and its opacity are the level, as in the overlay topic.
    const table = (opacity) => {
      const pixels = new Uint8ClampedArray(1024);
      for (let i = 0; i < 256; i++) pixels.set([...colormap.slice(3 * i, 3 * i + 3), opacity ?? i], 4 * i);
      return new Uint32Array(pixels.buffer);
    };
    [this.opaque, this.clear] = [table(255), table()];
    const image = new ImageData(256, 1);
    new Uint32Array(image.data.buffer).set(this.opaque);
    byId("scale").getContext("2d").putImageData(image, 0, 0);
    this.compose();
  }

  // The map as a canvas: interpolated to about that size, or as it is.
  paint(map, rows, columns, width, height, interpolate, opaque) {
    const { levels, interpolated } = this;
    const table = opaque ? this.opaque : this.clear;
    levels.fit(columns, rows);
    levels.set(map, 1, interpolate ? GREYS : table);
    if (!interpolate) return levels.canvas;
    const coarser = Math.min(1, MAP_SIDE / Math.max(width, height));
    const [wide, high] = [Math.ceil(width * coarser), Math.ceil(height * coarser)];
    interpolated.fit(wide, high);
    const { context } = interpolated;
    context.imageSmoothingQuality = "high";
    context.drawImage(levels.canvas, 0, 0, wide, high);
    interpolated.set(context.getImageData(0, 0, wide, high).data, 4, table);
    return interpolated.canvas;
  }

  // The pictures side by side: the camera alone stands before the others when both are asked for.
  panels() {
    const first = this.shots.find(Boolean);
    return this.view === "both" && first ? [{ ...first, map: null }, ...this.shots] : this.shots;
  }

  compose() {
    if (this.shots.some(Boolean)) this.draw(this.canvas, this.context, this.still ? this.fineness() : 1);
  }

  // Canvas pixels for one of the camera that the page has room for.
  fineness() {
    const [{ width }] = this.places().filter(Boolean);
    return Math.min(FINEST, Math.ceil((devicePixelRatio * width) / this.shots.find(Boolean).width));
  }

  // The same, finer, on a canvas of its own.
  copy(finest = FINEST) {
    const canvas = newCanvas();
    this.draw(canvas, canvas.getContext("2d", { alpha: false }), finest);
    return canvas;
  }

  // A picture of other shots, as this one is seen.
  of(shots) {
    return Object.assign(Object.create(this), { shots });
  }

  draw(canvas, context, finest) {
    const panels = this.panels();
    const { width, height } = this.shots.find(Boolean);
    const total = panels.length * (width + GAP) - GAP;
    const fine = this.smooth ? Math.max(1, Math.min(finest, Math.floor(Math.sqrt(LARGEST / (total * height))))) : 1;
    if (canvas.width !== total * fine || canvas.height !== height * fine) [canvas.width, canvas.height] = [total * fine, height * fine];
    context.imageSmoothingQuality = "high";
    context.globalAlpha = 1;
    if (panels.length > 1 || !panels[0]) context.fillRect(0, 0, canvas.width, canvas.height);
    panels.forEach((shot, i) => {
      if (!shot) return;
      const place = [i * (width + GAP) * fine, 0, width * fine, height * fine];
      context.globalAlpha = 1;
      if (this.view !== "map") context.drawImage(shot.camera, ...place);
      else context.fillRect(...place);
      if (!shot.map || this.view === "camera") return;
      const map = this.paint(shot.map, ...shot.saliency, place[2], place[3], fine > 1, this.view === "map");
      context.globalAlpha = this.view === "map" ? 1 : this.opacity;
      context.drawImage(map, ...place);
    });
  }

  // Where each picture is on the stage, in CSS pixels, and the size of its map or camera; null for a side without
  // the frame.
  places() {
    const first = this.shots.find(Boolean);
    if (!first) return [];
    const panels = this.panels();
    const { width, height } = first;
    const total = panels.length * (width + GAP) - GAP;
    const [wide, high] = this.room;
    const scale = Math.min(wide / total, high / height);
    const [left, top] = [(wide - total * scale) / 2, (high - height * scale) / 2];
    const alone = Number(this.view === "both");
    return panels.map((shot, i) => shot && {
      side: Math.max(0, i - alone),
      left: left + i * (width + GAP) * scale,
      top,
      width: width * scale,
      height: height * scale,
      size: shot.saliency ?? [height, width],
    });
  }

  // Shows other pictures, which are its own from now on.
  take(shots, still) {
    for (const shot of this.shots) shot?.camera.close();
    Object.assign(this, { shots, still });
    this.compose();
  }

  // The pictures of a frame with their cameras decoded. A side without the frame is null.
  async decode(frame) {
    const parts = await frame.pictures();
    return Promise.all(parts.map(async (part) => part && { ...part, camera: await decoded(part.jpeg) }));
  }
}

// A picture that can be drawn and closed. A Blob costs more than all the rest of decoding, but only on this machine's own
// address, or over TLS, browsers have what needs none.
async function decoded(jpeg) {
  if (!("ImageDecoder" in window)) return createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
  const decoder = new ImageDecoder({ data: jpeg, type: "image/jpeg" });
  try {
    return (await decoder.decode()).image;
  } finally {
    decoder.close();
  }
}
