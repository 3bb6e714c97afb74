// Questions about the frame that is shown: the decision without a part of it, why not another action, other methods' maps.
// A process of the lowest priority answers (docstring of asking.py), so the drive does not wait.

import { byId, percent, setText } from "./page.js";
import { parse } from "./recording.js";

const LEAST_DRAG = 5; // CSS pixels of a box that was meant to be one
const SIDE = 190; // CSS pixels of an answer's picture
const COMPARED = [
  ["map", "digr"],
  ["map", "linear"],
  ["map", "gbp"],
  ["teacher", "gb"],
];

const make = (tag, text = "", more = {}) => Object.assign(document.createElement(tag), { textContent: text }, more);

export class Ask {
  // picture, objects, control: the page's; shown: gives the frame on the page; pause: holds the page on it.
  constructor({ picture, objects, control, shown, pause }) {
    Object.assign(this, { picture, objects, control, shown, pause });
    this.possible = false; // this server answers
    this.asked = 0;
    this.listen();
  }

  open() {
    if (!this.possible || !this.shown()) return;
    this.pause();
    const frame = this.shown();
    setText(byId("ask-title"), `Ask about frame ${frame.frame}`);
    const button = (text, act) => {
      const made = make("button", text, { className: "text", type: "button" });
      made.addEventListener("click", act);
      return made;
    };
    const things = this.objects.listed.map((key) => this.objects.known.get(key)).filter((thing) => thing?.box);
    byId("ask-without").replaceChildren(...things.map((thing, i) => button(`${i + 1} ${thing.kind}`, () => this.without(thing.box, thing.kind))));
    byId("ask-instead").replaceChildren(...(frame.decision.action_names ?? []).map((name) => button(name, () => this.instead(name))));
    byId("ask").show();
  }

  // ---------------------------------------------------------------- questions

  async fetch(kind, what, side = 0) {
    const frame = this.shown();
    const index = frame.index ?? frame.sequence;
    const headers = { Authorization: `token ${sessionStorage.getItem("token") ?? ""}` };
    const query = new URLSearchParams([["what", what], ...new URLSearchParams(location.search)]);
    const response = await fetch(`api/ask/${side}/${index}/${kind}?${query}`, { headers });
    if (!response.ok) throw Error((await response.text()).trim());
    return parse(await response.arrayBuffer());
  }

  // Has questions answered one after the other, and shows each answer as it comes.
  async answer(questions) {
    const asked = ++this.asked;
    byId("answers").replaceChildren();
    byId("ring").hidden = false;
    setText(byId("ask-said"), "Thinking …");
    try {
      for (const { kind, what, side, show } of questions) {
        this.progress(0);
        const part = await this.fetch(kind, what, side);
        if (asked !== this.asked) return; // something else was asked meanwhile
        const [shot] = await this.picture.decode({ pictures: () => [part] });
        byId("answers").append(show(part.found, shot));
        shot.camera.close();
      }
      setText(byId("ask-said"), "");
    } catch (error) {
      if (asked === this.asked) setText(byId("ask-said"), error.message);
    } finally {
      if (asked === this.asked) byId("ring").hidden = true;
    }
  }

  progress(share) {
    byId("ring").style.setProperty("--done", share);
    byId("ring").setAttribute("aria-valuenow", Math.round(100 * share));
  }

  without(box, name, side = 0) {
    const grown = [box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 2].map((edge) => Math.max(0, Math.round(edge)));
    const show = ({ decision, without }, shot) => {
      const same = decision.action === without.action;
      const [now, then] = [decision, without].map((one) => one.action_names[one.action]);
      const text = same ? `Without the ${name}: ${then} too.` : `Without the ${name}: ${then} instead of ${now}.`;
      return this.figure(shot, text, this.compare(decision, without));
    };
    return this.answer([{ kind: "without", what: grown.join(","), side, show }]);
  }

  instead(action) {
    const show = ({ decision, title, flat }, shot) => {
      const taken = decision.action_names[decision.action] === action;
      const probability = percent(decision.probabilities[decision.action_names.indexOf(action)]);
      const text = `What speaks for or against “${action}”${taken ? "" : `, which has ${probability}`} (${title}${flat ? ": nothing" : ""}).`;
      return this.figure(shot, text);
    };
    return this.answer([{ kind: "target", what: action, show }]);
  }

  methods() {
    return this.answer(COMPARED.map(([kind, what]) => ({
      kind,
      what,
      show: ({ title, decision, seconds }, shot) => {
        const who = kind === "teacher" ? `Policy that taught it, ${decision.policy_hash}` : "This policy";
        return this.figure(shot, `${title}. ${who}; ${seconds < 0.1 ? "under 0.1" : seconds.toFixed(1)} s.`);
      },
    })));
  }

  // ---------------------------------------------------------------- answers

  figure(shot, text, more) {
    const { picture } = this;
    const scale = Math.max(1, Math.round((SIDE * devicePixelRatio) / shot.width));
    const canvas = make("canvas", "", { width: shot.width * scale, height: shot.height * scale });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", text);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(shot.camera, 0, 0, canvas.width, canvas.height);
    if (shot.map) {
      context.globalAlpha = picture.opacity;
      context.drawImage(picture.paint(shot.map, ...shot.saliency, canvas.width, canvas.height, picture.smooth, false), 0, 0, canvas.width, canvas.height);
    }
    const figure = make("figure");
    figure.append(canvas, make("figcaption", text), ...(more ? [more] : []));
    return figure;
  }

  // Probabilities with and without, beside each other.
  compare(decision, without) {
    const table = make("table", "", { className: "objects" });
    const head = make("tr");
    head.append(...["", "with it", "without it"].map((text) => make("th", text, { scope: "col" })));
    table.append(head, ...decision.action_names.map((name, i) => {
      const row = make("tr");
      row.append(make("th", name, { scope: "row" }), make("td", percent(decision.probabilities[i])), make("td", percent(without.probabilities[i])));
      return row;
    }));
    return table;
  }

  // ---------------------------------------------------------------- pointing

  // The place of a pointer: the panel, its column and row in pixels of the map.
  place({ clientX, clientY }) {
    const stage = byId("picture").getBoundingClientRect();
    const [x, y] = [clientX - stage.left, clientY - stage.top];
    const panels = this.picture.places();
    const inside = ({ left, top, width, height }) => x >= left && x < left + width && y >= top && y < top + height;
    const i = panels.findIndex((panel) => panel && inside(panel));
    if (i < 0) return null;
    const { side, left, top, width, height, size: [rows, columns] } = panels[i];
    return { side, column: ((x - left) / width) * columns, row: ((y - top) / height) * rows, x, y };
  }

  listen() {
    const stage = byId("stage");
    let from = null;
    stage.addEventListener("pointerdown", (event) => {
      if (event.button || !this.possible || !this.control.granted || !(this.shown() && this.pause(true))) return;
      from = this.place(event);
      if (from) stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      const to = from && this.place(event);
      byId("rubber").hidden = !to;
      if (!to) return;
      const [left, top] = [Math.min(from.x, to.x), Math.min(from.y, to.y)];
      Object.assign(byId("rubber").style, { left: `${left}px`, top: `${top}px`, width: `${Math.abs(to.x - from.x)}px`, height: `${Math.abs(to.y - from.y)}px` });
    });
    stage.addEventListener("pointerup", (event) => {
      const [begun, to] = [from, from && this.place(event)];
      from = null;
      byId("rubber").hidden = true;
      if (!begun || !to || to.side !== begun.side) return;
      if (Math.hypot(to.x - begun.x, to.y - begun.y) >= LEAST_DRAG) {
        const [columns, rows] = [[begun.column, to.column], [begun.row, to.row]];
        this.open();
        return void this.without([Math.min(...columns), Math.min(...rows), Math.max(...columns), Math.max(...rows)], "part in the box", begun.side);
      }
      const thing = this.objects.at(this.shown(), to.row, to.column);
      if (!thing) return void this.control.say("Nothing here has a name: drag a box around it.", false);
      this.open();
      this.without(thing.box, thing.kind, begun.side);
    });
    stage.addEventListener("pointercancel", () => {
      from = null;
      byId("rubber").hidden = true;
    });
    byId("ask-button").addEventListener("click", () => this.open());
    byId("ask-methods").addEventListener("click", () => this.methods());
    byId("ask").addEventListener("keydown", ({ key }) => key === "Escape" && byId("ask").close());
    byId("actions").addEventListener("click", (event) => {
      const name = event.target.closest("[data-name]")?.dataset.name;
      if (!name || !this.possible || !this.control.granted) return;
      this.open();
      this.instead(name);
    });
  }
}
