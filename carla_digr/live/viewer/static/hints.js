// What a first visit needs to know, until it is dismissed; this browser remembers that.

import { byId } from "./page.js";

const REMEMBERED = "carla_digr hints";

function remembered() {
  try {
    return localStorage.getItem(REMEMBERED) !== null;
  } catch {
    return false; // a browser that keeps nothing
  }
}

export function showHints() {
  byId("hints").hidden = false;
}

// Whether there was something to dismiss.
export function dismissHints() {
  if (byId("hints").hidden) return false;
  byId("hints").hidden = true;
  try {
    localStorage.setItem(REMEMBERED, "dismissed");
  } catch {
    // they come again
  }
  return true;
}

// Shows them on a first visit.
export function welcome() {
  byId("hints-dismiss").addEventListener("click", dismissHints);
  byId("hints-again").addEventListener("click", () => {
    byId("help").close();
    showHints();
    byId("hints-dismiss").focus();
  });
  if (!remembered()) showHints();
}
