// The page: receives a live drive's frames over one WebSocket (wire format: docstring of server.py) and keeps the last
// minute, or has a recording; it shows one frame at a time with everything that belongs to it, changed in one step.

import { Ask } from "./ask.js";
import { Clip } from "./clip.js";
import { Control } from "./control.js";
import { nameActions, notices, showFigures, showNotices, showTimes } from "./figures.js";
import { dismissHints, welcome } from "./hints.js";
import { byId, clock, number, paced, setAttribute, setText } from "./page.js";
import { Objects } from "./objects.js";
import { Picture } from "./picture.js";
import { drawPlots, isMarked, makePlots, resizePlots } from "./plots.js";
import { saveCsv, savePng } from "./save.js";
import { Recording, chooseRecording, parse } from "./recording.js";

const HISTORY_FRAMES = 1200; // a minute at 20 Hz
const STALLED_SECONDS = 1; // connected, but the newest picture is older than this
const SILENCE_SECONDS = 5; // the server beats once a second: longer silence is a lost connection
const RETRY_SECONDS = [0.25, 0.5, 1, 2]; // pauses between attempts to connect; the last one repeats

// ---------------------------------------------------------------- frames

const history = []; // oldest first: at most HISTORY_FRAMES of a live drive, or the whole recording
let recording = null; // what is shown instead of a live drive
let arrivedWhilePaused = []; // so that what is being looked at stays; joins the history on going live
let paused = false;
let shown = null; // the frame on the page
let newest = null; // the newest frame received, shown or not

function keep(list, frame) {
  list.push(frame);
  if (list.length > HISTORY_FRAMES) list.shift();
}

const framesWith = (frame) => (arrivedWhilePaused.includes(frame) ? arrivedWhilePaused : history);

function receive(message) {
  const frame = parse(message);
  frame.pictures = () => [frame];
  connection.socket.send(String(frame.sequence));
  if (newest && frame.published === newest.published) return; // sent again because the connection is new
  frame.time = Math.max(frame.published + connection.clockOffset, newest ? newest.time : -Infinity);
  if (connection.lastSequence !== null) connection.skipped += frame.sequence - connection.lastSequence - 1;
  connection.lastSequence = frame.sequence;
  connection.recent.push(frame);
  while (frame.time - connection.recent[0].time > 2) connection.recent.shift();
  newest = frame;
  keep(paused ? arrivedWhilePaused : history, frame);
  if (!paused) show(frame);
}

// ---------------------------------------------------------------- connection

const connection = {
  socket: null,
  state: "connecting", // connecting | live | stalled | lost
  attempts: 0,
  heard: 0, // when the server was last heard
  clockOffset: 0, // this page's clock minus the server's, s
  lastSequence: null,
  skipped: 0,
  recent: [], // frames of the last 2 s, for the rate
  retry: 0,
};

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.binaryType = "arraybuffer";
  connection.socket = socket;
  connection.heard = clock();
  socket.onmessage = ({ data }) => {
    connection.heard = clock();
    if (typeof data !== "string") return receive(data);
    const message = JSON.parse(data);
    if (message.type === "hello") greet(message);
    if (message.colormap) picture.colour(message.colormap);
    if (["state", "control", "answer"].includes(message.type)) control.receive(message);
    byId("ask-button").hidden = !(ask.possible && control.granted);
    document.body.toggleAttribute("data-asking", ask.possible && control.granted && paused);
    if (message.progress !== undefined) ask.progress(message.progress);
  };
  socket.onclose = () => lose();
}

function greet(hello) {
  Object.assign(connection, { state: "live", attempts: 0, lastSequence: null, recent: [] });
  connection.clockOffset = clock() - hello.now;
  byId("shelf-button").hidden = !hello.shelf;
  if (hello.shelf && !location.search) chooseRecording();
  else if (hello.recording && !recording) openRecording();
  control.opened();
  ask.possible = hello.asking;
  refreshState();
}

async function openRecording() {
  const response = await fetch(`api/recording${location.search}`);
  if (!response.ok) return void (control.say((await response.text()).trim(), false), chooseRecording());
  recording = new Recording(await response.json());
  for (const frame of recording.frames) history.push(frame);
  recording.present((change) => {
    change();
    recording.playFrom(asked);
    planTimeline();
  });
  newest = history[history.length - 1];
  paused = true;
  byId("pause").setAttribute("aria-pressed", "true");
  byId("pause").setAttribute("aria-label", "Play");
  show(history[0]);
}

// While a recording plays: the frame that is due.
function play() {
  if (!recording || paused) return;
  const frame = recording.due();
  if (frame !== asked) show(frame);
  recording.fetchAhead(frame);
  if (frame === newest) setPaused(true);
  else requestAnimationFrame(play);
}

function lose() {
  connection.socket.onclose = connection.socket.onmessage = null;
  connection.socket.close();
  connection.state = "lost";
  control.closed();
  const wait = RETRY_SECONDS[Math.min(connection.attempts++, RETRY_SECONDS.length - 1)];
  clearTimeout(connection.retry);
  connection.retry = setTimeout(connect, wait * 1000);
  refreshState();
}

let lastTick = clock();

function tick() {
  const now = clock();
  // A tab that slept has not listened: what the server said meanwhile is still to be read.
  if (now - lastTick > 2) connection.heard = now;
  lastTick = now;
  if (connection.socket.onclose && now - connection.heard > SILENCE_SECONDS) lose();
  refreshState();
}

function rate() {
  const { recent } = connection;
  const last = recent[recent.length - 1];
  if (recent.length < 2 || connection.state !== "live" || last.time <= recent[0].time) return NaN;
  return (last.sequence - recent[0].sequence) / (last.time - recent[0].time);
}

function refreshState() {
  if (recording) return refreshRecording();
  const age = newest && Math.max(0, clock() - newest.time);
  if (connection.state === "live" && age > STALLED_SECONDS) connection.state = "stalled";
  if (connection.state === "stalled" && age <= STALLED_SECONDS) connection.state = "live";
  const { state } = connection;
  const waiting = state === "live" && !newest;
  const pill = byId("connection");
  setAttribute(pill, "data-state", waiting ? "stalled" : state);
  const words = { connecting: "Connecting", live: "Connected", stalled: "No new picture", lost: "Connection lost" };
  setText(pill.querySelector("span"), waiting ? "No picture yet" : words[state]);
  const named = state === "live" ? "carla_digr live" : `${words[state]} · carla_digr`;
  if (document.title !== named) document.title = named;

  const old = age === null ? "No picture was received yet." : `The last picture is ${number(age, 1)} s old.`;
  const [title, text] = {
    connecting: ["Connecting", ""],
    live: waiting ? ["Waiting for the first picture", "Connected. The drive has not sent one yet."] : ["", ""],
    stalled: ["No new picture", `Connected, but the drive sends none. ${old}`],
    lost: ["Connection lost", `${old} Reconnecting …`],
  }[state];
  // While paused an old picture is what was asked for: the header tells the state, nothing covers the picture.
  byId("veil").hidden = !title || (shown && (paused || (state === "stalled" && control.state.paused)));
  setText(byId("veil-title"), title);
  setText(byId("veil-text"), text);
  document.body.classList.toggle("stale", !byId("veil").hidden);
  setAttribute(document.body, "data-state", state);

  setText(byId("rate"), state === "stalled" ? "0.0" : number(rate(), 1));
  setText(byId("skipped"), String(connection.skipped));
  const alarm = paused && newest && newest !== shown && notices(newest, framesWith(newest)).find(([level]) => level === "alarm");
  byId("live-alert").hidden = !alarm;
  if (alarm) setText(byId("live-alert"), `Now: ${alarm[1]}`);
  if (paused && shown) setText(byId("badge"), `Paused, ${number(Math.max(0, clock() - shown.time), 1)} s ago`);
  byId("badge").hidden = !(paused && shown);
}

function refreshRecording() {
  const { state } = connection;
  const pill = byId("connection");
  pill.dataset.state = state;
  setText(pill.querySelector("span"), state === "lost" ? "Connection lost" : "Recording");
  document.title = `${recording.sides.map(({ name }) => name).join(" · ")} · carla_digr`;
  byId("veil").hidden = true;
  document.body.classList.remove("stale");
  document.body.dataset.state = state;
}

// ---------------------------------------------------------------- picture

const picture = new Picture();
const objects = new Objects();
let asked = null; // the frame last asked for; it becomes the one shown once its picture is decoded
let wanted = null; // the frame to draw next
let drawing = false;

function show(frame) {
  asked = wanted = frame;
  if (!drawing && !document.hidden) draw();
}

// Decoding takes a moment: frames wanted meanwhile replace each other, so a slow page skips instead of lagging.
async function draw() {
  drawing = true;
  while (wanted) {
    const frame = wanted;
    wanted = null;
    const decoded = await decode(frame);
    if (!decoded) continue;
    shown = frame;
    picture.take(decoded, paused);
    describe(frame);
  }
  drawing = false;
}

// The pictures of a frame, or null.
async function decode(frame) {
  try {
    return await picture.decode(frame);
  } catch (error) {
    if (recording) setText(byId("ignored"), error.message);
    return null;
  }
}

// The outlines around what decides, where there is a map or a camera under it.
function outline() {
  if (shown) objects.outline(shown, picture.places(), picture.room);
}

// ---------------------------------------------------------------- all that belongs to the frame shown

let actionNames = [];

function nameThem(names) {
  if (names.join("\n") === actionNames.join("\n")) return;
  actionNames = names;
  control.name(names);
  nameActions(names);
  makePlots(names.length, (frame) => seek(history.lastIndexOf(frame)));
}

function describe(frame) {
  const { action_names: names } = frame.decision;
  if (names?.length) nameThem(names); // a frame without decision keeps them
  planFigures();
  showNotices(notices(frame, framesWith(frame)));
  objects.take(frame, !paused && !recording);
  outline();
  recording?.describe(frame);
  if (paused || !byId("veil").hidden) refreshState();
  planTimeline();
}

// ---------------------------------------------------------------- pause, scrub, back to live

function placeScrub(frame) {
  const scrub = byId("scrub");
  const index = history.lastIndexOf(frame);
  const last = history.length - 1;
  for (const id of ["back", "pause", "forward", "live"]) byId(id).disabled = false;
  scrub.disabled = last < 1;
  if (Number(scrub.max) !== last) scrub.max = last;
  scrub.value = index;
  if (recording) {
    const where = `frame ${frame.frame}, ${number(frame.time, 2)} s`;
    scrub.setAttribute("aria-valuetext", where);
    for (const [id, text] of [["oldest", "0 s"], ["latest", `${number(history[last].time, 1)} s`], ["position", where]]) setText(byId(id), text);
    return;
  }
  const behind = history[last].time - frame.time;
  scrub.setAttribute("aria-valuetext", `frame ${frame.frame}, ${number(behind, 1)} s before the last`);
  setText(byId("latest"), latestWord());
  setText(byId("oldest"), `−${number(history[last].time - history[0].time, 0)} s`);
  setText(byId("position"), paused ? `frame ${frame.frame}, ${number(behind, 2)} s before the pause` : "");
}

const latestWord = () => (paused ? "pause" : "now");

function setPaused(value) {
  if (paused === value || !newest) return;
  paused = value;
  document.body.toggleAttribute("data-asking", ask.possible && control.granted && paused);
  if (recording) {
    byId("pause").setAttribute("aria-pressed", String(paused));
    byId("pause").setAttribute("aria-label", paused ? "Play" : "Pause");
    if (paused) return show(asked);
    if (asked === newest) show(history[0]);
    recording.playFrom(asked);
    return play();
  }
  if (!paused) {
    for (const frame of arrivedWhilePaused) keep(history, frame);
    arrivedWhilePaused = [];
  }
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").setAttribute("aria-label", paused ? "Go on live" : "Pause");
  byId("live").dataset.live = String(!paused);
  show(paused ? asked : newest);
}

function seek(index) {
  setPaused(true);
  if (history.length) show(history[Math.max(0, Math.min(history.length - 1, index))]);
}

function step(frames) {
  seek(history.lastIndexOf(asked) + frames);
}

// The first frame of the next or previous run of marked frames.
function seekMark(direction) {
  if (recording) {
    const place = recording.event(asked.index, direction);
    if (place !== undefined) seek(place);
    return;
  }
  const starts = history.flatMap((frame, i) => (isMarked(frame) && !(i && isMarked(history[i - 1])) ? [i] : []));
  const here = history.lastIndexOf(asked);
  const target = direction > 0 ? starts.find((i) => i > here) : starts.findLast((i) => i < here);
  if (target !== undefined) seek(target);
}

// ---------------------------------------------------------------- timeline and plots

// Between two changes while live. Each change costs a layout: numbers change with every second frame, at once with its
// picture; timeline and plots move slowly. A step or a scrub shows at once.
const FIGURES_SECONDS = 0.09;
const TIMELINE_SECONDS = 0.5;

const planTimeline = paced(() => (paused ? 0 : TIMELINE_SECONDS), () => requestAnimationFrame(showTimeline));
const planFigures = paced(() => (paused ? 0 : FIGURES_SECONDS), () => {
  setAttribute(byId("picture"), "data-frame", shown.frame);
  showFigures(shown);
});

function showTimeline() {
  if (!shown) return;
  placeScrub(shown);
  showTimes(shown);
  if (byId("save").open) clip.describe();
  drawPlots(history, paused || recording ? shown : null, Boolean(recording), clip.marked ? clip.range() : null);
}

// ---------------------------------------------------------------- controls

let opacityBefore = 60;

function setOpacity(value) {
  byId("opacity").value = value;
  setText(byId("opacity-value"), `${byId("opacity").value} %`);
  picture.opacity = byId("opacity").value / 100;
  picture.compose();
}

function setView(name) {
  picture.view = name;
  document.querySelector(`input[name=view][value=${name}]`).checked = true;
  byId("captions").dataset.view = name;
  picture.compose();
  outline();
}

function setSmooth(smooth) {
  byId("smooth").checked = smooth;
  picture.smooth = smooth;
  byId("picture").classList.toggle("crisp", !smooth);
  picture.compose();
}

function toggleMap() {
  const value = Number(byId("opacity").value);
  if (value) opacityBefore = value;
  setOpacity(value ? 0 : opacityBefore);
}

function toggleFullscreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else byId("stage").requestFullscreen();
}

const control = new Control({ send: (text) => connection.socket.send(text), opacity: setOpacity });

// Holds the page on its frame; with question: only tells whether it is held.
function hold(question = false) {
  if (!question && history.includes(shown)) seek(history.lastIndexOf(shown));
  return paused || Boolean(control.state.paused);
}

const ask = new Ask({ picture, objects, control, shown: () => shown, pause: hold });

const clip = new Clip({ picture, frames: () => history, shown: () => shown, changed: markStretch });

function markStretch() {
  clip.describe();
  planTimeline();
}

function openSave() {
  clip.describe();
  byId("save").show();
}

const KEYS = {
  " ": () => setPaused(!paused),
  ArrowLeft: (event) => step(event.shiftKey ? -20 : -1),
  ArrowRight: (event) => step(event.shiftKey ? 20 : 1),
  ArrowUp: () => setOpacity(Number(byId("opacity").value) + 5),
  ArrowDown: () => setOpacity(Number(byId("opacity").value) - 5),
  Home: () => seek(0),
  End: () => (recording ? seek(history.length - 1) : setPaused(false)),
  l: () => !recording && setPaused(false),
  n: () => seekMark(1),
  p: () => seekMark(-1),
  o: toggleMap,
  s: () => setSmooth(!byId("smooth").checked),
  f: toggleFullscreen,
  "?": () => byId("help").showModal(),
  Escape: () => dismissHints(),
  1: () => setView("overlay"),
  2: () => setView("camera"),
  3: () => setView("map"),
  4: () => setView("both"),
  h: () => control.hold(),
  t: () => control.ask("step"),
  d: () => control.drive(true),
  g: () => control.openSettings(),
  a: () => control.granted && ask.open(),
  v: openSave,
  "[": () => clip.mark(0),
  "]": () => clip.mark(1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || byId("help").open) return;
  const { target, key } = event;
  if (control.key(event, true)) return;
  // The element in focus keeps the keys it has a use for.
  if (target.matches("button, [type=checkbox]") && key === " ") return;
  if (target.matches("#opacity, [type=radio]") && /^(Arrow|Home|End)/.test(key)) return;
  if (target.matches("select, [type=number]") || (target.matches("[type=range]") && /^(Arrow|Home|End)/.test(key) && target.id !== "scrub")) return;
  const action = KEYS[key.length === 1 ? key.toLowerCase() : key];
  if (!action) return;
  event.preventDefault();
  action(event);
});

document.addEventListener("keyup", (event) => control.key(event, false));

byId("pause").addEventListener("click", () => setPaused(!paused));
byId("back").addEventListener("click", () => step(-1));
byId("forward").addEventListener("click", () => step(1));
byId("next-event").addEventListener("click", () => seekMark(1));
byId("previous-event").addEventListener("click", () => seekMark(-1));
byId("live").addEventListener("click", () => setPaused(false));
byId("scrub").addEventListener("input", (event) => seek(Number(event.target.value)));
byId("opacity").addEventListener("input", (event) => {
  setOpacity(event.target.value);
  control.set("opacity", (event.target.value / 100).toFixed(2));
});
byId("smooth").addEventListener("change", (event) => setSmooth(event.target.checked));
byId("fullscreen").addEventListener("click", toggleFullscreen);
byId("save-button").addEventListener("click", openSave);
byId("save-png").addEventListener("click", () => shown && savePng(shown, picture, objects));
byId("save-csv").addEventListener("click", () => saveCsv(history));
byId("save").addEventListener("keydown", ({ key }) => key === "Escape" && byId("save").close());
byId("shelf-button").addEventListener("click", chooseRecording);
byId("help-button").addEventListener("click", () => byId("help").showModal());
for (const input of document.querySelectorAll("input[name=view]")) input.addEventListener("change", () => setView(input.value));
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused && newest) show(newest);
});

const plots = new ResizeObserver(resizePlots);
for (const id of ["probability-plot", "latency-plot"]) plots.observe(byId(id));
new ResizeObserver(([{ contentRect: { width, height } }]) => {
  picture.room = [width, height];
  picture.compose();
  outline();
}).observe(byId("stage"));
setInterval(tick, 250);
welcome();
connect();
