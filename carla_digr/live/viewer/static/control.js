// Controls of a running drive: what `carla-digr ctl` says, said by the page that was opened by the address with the
// token (protocol: docstring of control.py). What others change is shown as well.

import { byId, clock, setText } from "./page.js";

const REPEAT_MS = 100; // between two commands of a hand that drives; each holds for half a second
const SETTING_MS = 150; // between two values of a setting that is being dragged
const SAID_MS = 4000; // that an answer stays on the page
const STEER = 0.06; // of a key that is held; a policy's wheel angles are 0.02 to 0.05
const STEER_RATE = 0.25; // a second, towards it
const STICK = 0.2; // of a stick that is all over
const SETTINGS = {
  method: "Explained by",
  target: "Explained action",
  explanation: "Maps",
  attack: "Attack on the picture",
  attack_epsilon: "Its strength",
  colormap: "Colours",
  weather: "Weather",
  vehicles: "Other vehicles, next episode",
  objects: "Say what decides",
  trust: "Measure trust",
  rate: "Steps a second",
};
const KEYS = { ArrowLeft: "left", a: "left", ArrowRight: "right", d: "right", ArrowUp: "faster", w: "faster", ArrowDown: "slower", s: "slower", " ": "slower" };

export class Control {
  // send: sends a text to the server; opacity: shows one; state: called after each change of it.
  constructor({ send, opacity }) {
    Object.assign(this, { send, opacity });
    this.granted = false;
    this.state = {};
    this.waiting = new Map(); // number -> what to do with the answer
    this.number = 0;
    this.driving = false;
    this.held = new Set(); // directions whose keys are held
    this.steer = 0;
    this.later = new Map(); // name -> timer and value of a setting that is being dragged
    this.actions = [];
    this.keepToken();
    this.listen();
  }

  keepToken() {
    const fragment = new URLSearchParams(location.hash.slice(1));
    if (!fragment.has("token")) return;
    sessionStorage.setItem("token", fragment.get("token"));
    window.history.replaceState(null, "", location.pathname + location.search); // not where it is looked at
  }

  // ---------------------------------------------------------------- the connection

  opened() {
    const token = sessionStorage.getItem("token");
    if (token) this.send(JSON.stringify({ token }));
  }

  closed() {
    this.granted = false;
    this.drive(false);
    this.waiting.clear();
    this.show();
  }

  receive(message) {
    if (message.type === "control") {
      this.granted = message.granted;
      if (!message.granted) sessionStorage.removeItem("token");
    } else if (message.type === "answer") {
      this.say(message.said, message.ok);
      this.waiting.get(message.id)?.(message);
      this.waiting.delete(message.id);
      return;
    } else {
      this.state = message;
      this.showOpacity();
    }
    this.show();
  }

  // Says words to the drive; resolves with the answer.
  ask(...words) {
    if (!this.granted) return this.say("Watching only: the address that the start prints has the token to control.", false);
    const id = this.number++;
    this.send(JSON.stringify({ id, words: words.map(String) }));
    return new Promise((resolve) => this.waiting.set(id, resolve));
  }

  // Sets a value; of several in a row the last one, and not too many.
  set(name, value) {
    if (!this.granted) return;
    const running = this.later.get(name);
    if (running) return void (running.value = value);
    this.ask("set", name, value);
    const entry = { value };
    entry.timer = setTimeout(() => {
      this.later.delete(name);
      if (entry.value !== value) this.set(name, entry.value);
      if (name === "opacity") this.showOpacity(); // what others have changed meanwhile
    }, SETTING_MS);
    this.later.set(name, entry);
  }

  // The one that is told, where it has changed and nobody drags it here.
  showOpacity() {
    const value = this.state.settings?.opacity?.value;
    if (value === undefined || this.later.has("opacity")) return;
    if (value !== this.knownOpacity) this.opacity(Math.round(100 * value));
    this.knownOpacity = value;
  }

  say(text, ok = true) {
    if (ok && this.driving) return; // ten times a second
    byId("said").dataset.ok = ok;
    byId("said").hidden = !text;
    setText(byId("said"), text);
    clearTimeout(this.fading);
    this.fading = setTimeout(() => (byId("said").hidden = true), SAID_MS);
  }

  // ---------------------------------------------------------------- what is shown

  show() {
    const { state, granted, driving } = this;
    const there = state.paused !== undefined;
    for (const id of ["cockpit", "driver"]) byId(id).hidden = !there;
    if (!there) return;
    for (const element of byId("cockpit").querySelectorAll("button, input")) element.disabled = !granted;
    byId("settings-button").disabled = false;
    const replay = Boolean(state.replay); // which can be held and stepped, and no more
    byId("drive").hidden = replay || state.drives === false;
    byId("reset").hidden = replay;
    document.body.toggleAttribute("data-play", state.drives === false);
    byId("record").hidden = replay || state.recording === undefined;
    byId("record").setAttribute("aria-pressed", String(Boolean(state.recording)));
    byId("hold").setAttribute("aria-pressed", String(state.paused));
    setText(byId("hold").querySelector("span"), state.paused ? "Go on" : "Hold");
    byId("one-step").disabled = !granted || !state.paused;
    byId("drive").setAttribute("aria-pressed", String(driving));
    const others = state.control === "page" ? "A page drives" : "A human drives";
    const hand = state.control === "page" || state.control === "manual";
    byId("driver").dataset.state = state.paused || hand ? "stalled" : state.control === "policy" ? "live" : "alarm";
    const drivers = { policy: state.drives === false ? "The policy plays" : "The policy drives", watchdog: "The watchdog brakes", manual: others, page: others };
    setText(byId("driver"), state.paused ? "Held" : replay ? "Replay" : driving && state.control === "page" ? "You drive" : drivers[state.control] ?? "");
    byId("wheel").hidden = !driving;
    setText(byId("watching"), granted ? "" : "Watching only");
    this.showSettings();
  }

  showSettings() {
    const list = byId("settings-list");
    const { policies = [], settings = {} } = this.state;
    const labels = this.state.replay ? { ...SETTINGS, rate: "Speed" } : SETTINGS;
    const fields = Object.entries(labels).filter(([name]) => settings[name]);
    const key = JSON.stringify([policies, fields.map(([name]) => [name, settings[name].choices]), this.actions]);
    if (list.dataset.key !== key) {
      list.dataset.key = key;
      const rows = fields.map(([name, label]) => this.row(name, label, settings[name]));
      if (policies.length) rows.unshift(this.row("policy", "Policy that drives", { choices: ["", ...policies] }));
      list.replaceChildren(...rows);
    }
    for (const [name] of fields) {
      const input = byId(`set-${name}`);
      const { value } = settings[name];
      if (input.type === "checkbox") input.checked = value;
      else if (document.activeElement !== input || input.tagName === "SELECT") input.value = value;
      if (input.type === "range") setText(input.nextElementSibling, String(value));
    }
    for (const input of list.querySelectorAll("input, select")) input.disabled = !this.granted;
  }

  row(name, label, { value, range, choices, description }) {
    const row = document.createElement("label");
    row.textContent = label;
    row.title = description ?? "";
    let input = document.createElement("input");
    if (name === "target") choices = ["", ...this.actions];
    if (choices) {
      input = document.createElement("select");
      const empty = { policy: "as it is", target: "the decision", weather: "as it is" };
      input.append(...choices.map((choice) => new Option(choice || empty[name], choice)));
    } else if (typeof value === "boolean") {
      input.type = "checkbox";
    } else {
      const whole = range[1] > 1;
      Object.assign(input, { type: "range", min: range[0], max: range[1], step: whole ? 1 : 0.005 });
    }
    input.id = `set-${name}`;
    row.append(input);
    if (input.type === "range") row.append(document.createElement("output"));
    input.addEventListener(input.type === "range" ? "input" : "change", () => {
      if (name === "policy") return void (input.value && this.ask("policy", input.value));
      this.set(name, input.type === "checkbox" ? String(input.checked) : input.value);
    });
    return row;
  }

  // The names of the actions, for the choice of the one that is explained.
  name(actions) {
    this.actions = actions;
    this.show();
  }

  // ---------------------------------------------------------------- driving by hand

  drive(on) {
    if (on === this.driving || (on && !this.granted)) return;
    this.driving = on;
    this.held.clear();
    this.steer = 0;
    clearInterval(this.repeating);
    if (on) {
      this.last = clock();
      this.repeating = setInterval(() => this.command(), REPEAT_MS);
      this.command();
      byId("drive").focus();
    }
    this.say(on ? "" : "The policy takes over");
    this.show();
  }

  command() {
    const pad = [...navigator.getGamepads()].find((found) => found?.connected);
    const now = clock();
    const wanted = STEER * (this.held.has("right") - this.held.has("left"));
    const change = STEER_RATE * (now - this.last);
    this.steer += Math.max(-change, Math.min(change, wanted - this.steer));
    this.last = now;
    const stick = pad?.axes[0] ?? 0;
    const steer = Math.abs(stick) > 0.08 ? STICK * stick ** 3 : this.steer;
    const throttle = Math.max(Number(this.held.has("faster")), pad?.buttons[7]?.value ?? 0);
    const brake = Math.max(Number(this.held.has("slower")), pad?.buttons[6]?.value ?? 0);
    this.ask("drive", steer.toFixed(4), (brake ? 0 : throttle).toFixed(3), brake.toFixed(3));
  }

  // A key of a hand that drives; whether it was one.
  key(event, down) {
    if (!this.driving) return false;
    if (event.key === "Escape") {
      this.drive(false);
      return true;
    }
    const direction = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!direction) return false;
    this.held[down ? "add" : "delete"](direction);
    event.preventDefault();
    return true;
  }

  // ---------------------------------------------------------------- what can be pressed

  hold() {
    this.ask(this.state.paused ? "resume" : "pause");
  }

  openSettings() {
    const dialog = byId("settings");
    if (dialog.open) dialog.close();
    else dialog.show();
  }

  listen() {
    byId("hold").addEventListener("click", () => this.hold());
    byId("one-step").addEventListener("click", () => this.ask("step"));
    byId("reset").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask("reset", ...(byId("seed").value ? [byId("seed").value] : []));
    });
    byId("drive").addEventListener("click", () => this.drive(!this.driving));
    byId("record").addEventListener("click", () => this.ask("record", this.state.recording ? "off" : "on"));
    byId("settings-button").addEventListener("click", () => this.openSettings());
    byId("settings").addEventListener("keydown", ({ key }) => key === "Escape" && byId("settings").close());
    document.addEventListener("visibilitychange", () => document.hidden && this.drive(false));
    window.addEventListener("hashchange", () => {
      this.keepToken();
      this.opened();
    });
    window.addEventListener("blur", () => this.drive(false));
    window.addEventListener("pagehide", () => this.drive(false));
  }
}
