"""The live page in a real browser, fed with a made-up drive (feed.py)."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

import cv2
import feed
import live_support
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import find_chromium
from playwright.sync_api import Browser, BrowserContext, Page, expect

from carla_digr.driving.control import ACTIONS
from carla_digr.errors import UserError
from carla_digr.live.viewer.asking import Asking
from carla_digr.live.viewer.client import WINDOW
from carla_digr.live.viewer.server import STATIC, ViewerServer
from carla_digr.saliency.overlay import colours, overlay

pytestmark = pytest.mark.alone

# Resolves once the page shows the frame. Runs over the debugging protocol: the page's own policy forbids eval.
WAIT_FOR_FRAME = """async (frame) => {
    const shown = () => document.getElementById("picture").dataset.frame;
    for (const start = performance.now(); shown() !== String(frame); ) {
        if (performance.now() - start > 20000) throw Error(`the page stayed at frame ${shown()} instead of ${frame}`);
        await new Promise((resolve) => setTimeout(resolve, 5));
    }
}"""
# Crisp, a pixel of the canvas is one of the camera.
PIXELS = """() => {
    const [canvas, smooth] = ["picture", "smooth"].map((id) => document.getElementById(id));
    const smoothed = smooth.checked;
    if (smoothed) smooth.click();
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    if (smoothed) smooth.click();
    return btoa(Array.from(data, (value) => String.fromCharCode(value)).join(""));
}"""


class Pages:
    """Opens pages, and keeps what they asked for and what went wrong in them."""

    def __init__(self, context: BrowserContext):
        self.context = context
        self.requests: list[str] = []
        self.errors: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def open(self, viewer: ViewerServer) -> Page:
        page = self.context.new_page()
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.goto(viewer.url)
        expect(page.locator("#connection")).not_to_have_text("Connecting")
        return page


@pytest.fixture
def pages(context: BrowserContext):
    pages = Pages(context)
    yield pages
    assert pages.errors == []


def wait_for_frame(page: Page, frame: int) -> None:
    page.evaluate(WAIT_FOR_FRAME, frame)


def drive(viewer: ViewerServer, frames: range, **changes: object) -> None:
    """Publish frames, each when the pages have taken the one before, so that none is skipped."""
    for frame in frames:
        feed.publish(viewer, frame, **changes)
        wait_until(lambda: all(took_all(viewer, client) for client in viewer.status()["clients"]))


def took_all(viewer: ViewerServer, client: dict[str, int]) -> bool:
    return client["sent"] + client["dropped"] == viewer.status()["published"] and client["unanswered"] == 0


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def pixels(page: Page) -> np.ndarray:
    """The picture on the page, (height, width, 3), as integers that may be subtracted."""
    values = np.frombuffer(base64.b64decode(page.evaluate(PIXELS)), np.uint8)
    return values.reshape(feed.SIZE, -1, 4)[..., :3].astype(int)


def shown(page: Page) -> tuple[int, int]:
    """The frame's number by the text of the page, and by the pixels of the picture."""
    x, y = feed.PATCH_CENTRE
    return int(page.locator("#frame").inner_text()), feed.frame_of(list(pixels(page)[y, x]))


def test_newest_frame_is_shown_with_its_own_number_and_pixels(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    for frame in range(1, 300):  # much faster than the page can draw
        feed.publish(viewer, frame)
    wait_for_frame(page, 299)
    assert shown(page) == (299, 299)
    page.keyboard.press("2")
    assert abs(pixels(page) - feed.picture(299)).mean() < 2, "not the camera's picture"


def test_page_opened_late_shows_the_last_frame(pages: Pages, viewer: ViewerServer):
    feed.publish(viewer, 41)
    page = pages.open(viewer)
    wait_for_frame(page, 41)
    assert shown(page) == (41, 41)


def test_opacity_mixes_the_coloured_map_into_the_camera(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.publish(viewer, 10)
    wait_for_frame(page, 10)
    page.keyboard.press("2")
    camera = pixels(page)
    page.keyboard.press("1")
    slider = page.get_by_label("Opacity")
    for opacity in (0, 35, 100):
        slider.fill(str(opacity))
        expect(page.locator("#opacity-value")).to_have_text(f"{opacity} %")
        expected = overlay(camera.astype(np.uint8), feed.saliency(10), opacity / 100).astype(int)
        assert abs(pixels(page) - expected).max() <= 6, f"not the overlay topic's picture at {opacity} %"
    slider.fill("60")
    page.keyboard.press("o")
    assert (pixels(page) == camera).all()
    page.keyboard.press("o")
    expect(slider).to_have_value("60")


def test_the_map_has_the_colours_of_the_overlay_topic_and_takes_others_at_once(pages: Pages, viewer: ViewerServer):
    """Those of an open page, paused too, of the scale beside it, and of a page that is opened later."""
    page = pages.open(viewer)
    feed.publish(viewer, 10)
    wait_for_frame(page, 10)
    page.keyboard.press("2")
    camera = pixels(page).astype(np.uint8)
    page.keyboard.press("1")
    page.get_by_label("Opacity").fill("100")
    page.keyboard.press(" ")
    late = None
    for colormap in ("inferno", "turbo", "viridis"):
        viewer.change_colormap(colormap)
        expected = overlay(camera, feed.saliency(10), 1.0, colormap).astype(int)
        page.wait_for_function(
            """([r, g, b]) => {
                const pixel = document.getElementById("scale").getContext("2d").getImageData(255, 0, 1, 1).data;
                return pixel[0] === r && pixel[1] === g && pixel[2] === b;
            }""",
            arg=[int(level) for level in colours(colormap)[-1]],
        )
        assert abs(pixels(page) - expected).max() <= 6, f"not the overlay topic's picture in {colormap}"
        late = expected
    second = pages.open(viewer)
    wait_for_frame(second, 10)
    second.get_by_label("Opacity").fill("100")
    assert abs(pixels(second) - late).max() <= 6
    with pytest.raises(UserError, match="no colormap 'jet'"):
        viewer.change_colormap("jet")


def test_views_show_camera_map_and_both(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.publish(viewer, 10)
    wait_for_frame(page, 10)
    laid_over = pixels(page)
    page.locator(".segments").get_by_text("Camera").click()
    camera = pixels(page)
    page.locator(".segments").get_by_text("Map").click()
    levels = np.rint(feed.saliency(10) * 255).astype(np.uint8)
    assert abs(pixels(page) - cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]).max() <= 1
    page.locator(".segments").get_by_text("Both").click()
    both = pixels(page)
    assert (both[:, :128] == camera).all() and (both[:, -128:] == laid_over).all()


def test_probabilities_are_shown_with_the_actions_names(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.publish(viewer, 7, probabilities=[0.125, 0.5, 0.25, float("nan")], action=1)
    wait_for_frame(page, 7)
    rows = page.locator("#actions > div")
    assert rows.all_inner_texts() == ["left\n12.5 %", "keep\n50.0 %", "right\n25.0 %", "brake\n–"]
    expect(page.locator("#action")).to_have_text("Keep")
    expect(page.get_by_role("meter", name="right")).to_have_attribute("aria-valuenow", "0.250")
    lengths = [row.locator("u").bounding_box()["width"] for row in rows.all()]
    assert lengths == pytest.approx([lengths[1] / 4, lengths[1], lengths[1] / 2, 0], abs=0.5)

    feed.publish(viewer, 8, action_names=["noop", "fire"], probabilities=[0.75, 0.25], action=0)
    wait_for_frame(page, 8)
    assert rows.all_inner_texts() == ["noop\n75.0 %", "fire\n25.0 %"]


def test_figures_belong_to_the_frame(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.publish(viewer, 7, steer=-0.25, throttle=0.5, brake=0.125, value=3.5, latency_ms=62.5)
    wait_for_frame(page, 7)
    for name, text in {
        "steer": "Steer\n−0.250",
        "throttle": "Throttle\n50 %",
        "brake": "Brake\n13 %",
        "value": "3.50",
        "stamp": "0.35",
        "policy": "3fa94c17e2b0",
        "map": "Linearised Perturbation of brake",
        "skipped": "0",
    }.items():
        assert page.locator(f"#{name}").inner_text() == text
    expect(page.locator(".times .over")).to_contain_text("62.5 ms")


def test_the_sentence_of_the_frame_is_shown_and_gone_where_there_is_none(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    said = "Keeps the lane because of the truck 24 m ahead: without it, it would steer left."
    feed.publish(viewer, 7, sentence=said)
    wait_for_frame(page, 7)
    expect(page.locator("#sentence")).to_have_text(said)
    feed.publish(viewer, 8)
    wait_for_frame(page, 8)
    expect(page.locator("#sentence")).to_be_hidden()


def thing(number: int, **changes: object) -> dict[str, object]:
    """What decides, as the page is told of it."""
    usual = {"id": number, "kind": "truck", "lane": 0, "distance": 24.2, "share": 0.5, "effect": 0.8}
    return {**usual, "without": "left", "flips": True, "box": [40, 50, 60, 70], **changes}


def test_what_decides_is_listed_and_outlined_and_changes_calmly(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    outlined = """() => {
        const canvas = document.getElementById("outlines");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let [count, left, right] = [0, Infinity, 0];
        for (let i = 0; i < data.length / 4; i++) {
            if (!data[4 * i + 3]) continue;
            count++;
            [left, right] = [Math.min(left, i % canvas.width), Math.max(right, i % canvas.width)];
        }
        if (canvas.hidden) return [0];
        const picture = document.getElementById("picture").getBoundingClientRect();
        const side = Math.min(picture.width, picture.height);
        const shift = canvas.getBoundingClientRect().left - picture.left;
        const column = (x) => ((x + shift - (picture.width - side) / 2) / side) * 128;
        const top = canvas.getBoundingClientRect().top - picture.top - (picture.height - side) / 2;
        const place = (x, y) => [(x / 128) * side + (picture.width - side) / 2 - shift, (y / 128) * side - top];
        const inner = canvas.getContext("2d").getImageData(...place(8.5, 63).map(Math.round), 12, 12);
        const between = inner.data.some(Boolean);
        return [count, column(left), column(right), between];
    }"""
    car = thing(3, kind="car", lane=-2, distance=None, share=0.1, effect=0.05, flips=False, box=[2, 60, 12, 70])
    car["outline"] = [[8, 60, 9, 60, 9, 61], [11, 69, 12, 69, 12, 70]]  # in two parts, with nothing between them
    feed.publish(viewer, 1, objects=[thing(7), car, thing(8, share=0.001, effect=0.001)])
    wait_for_frame(page, 1)
    rows = page.locator("#objects tbody tr")
    assert rows.all_inner_texts() == ["1\ttruck\tmy lane\t24 m\t50 %\tleft", "2\tcar\t2 left\t–\t10 %\tsame"]
    count, left, right, between = page.evaluate(outlined)
    assert count > 100 and left == pytest.approx(8, abs=2) and right == pytest.approx(61, abs=3) and not between
    page.evaluate("""() => {  // keeps what the list says from now on
        window.said = [];
        const list = document.querySelector("#objects tbody");
        const note = () => window.said.push([performance.now(), list.innerText]);
        new MutationObserver(note).observe(list, { childList: true });
    }""")
    for frame in range(2, 42):  # which of two weighs more changes with every frame
        weights = (0.6, 0.2) if frame % 2 else (0.2, 0.6)
        feed.publish(viewer, frame, objects=[thing(7, effect=weights[0]), thing(9, kind="bus", effect=weights[1])])
        wait_for_frame(page, frame)
    page.keyboard.press(" ")
    feed.publish(viewer, 42)
    times = [moment for moment, _ in page.evaluate("() => window.said")]
    assert all(later - earlier > 400 for earlier, later in itertools.pairwise(times[:-1]))
    page.keyboard.press("End")
    wait_for_frame(page, 42)
    for frame in range(43, 10_000):  # a second after the last word it is gone
        feed.publish(viewer, frame)
        wait_for_frame(page, frame)
        if page.locator("#objects").is_hidden():
            break
    assert page.evaluate(outlined)[0] == 0


def test_the_trust_of_the_map_is_shown_with_its_age(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.publish(viewer, 7, trust=0.913, trust_age=6.2)
    wait_for_frame(page, 7)
    expect(page.locator("#trust")).to_have_text("0.91, 6 s")
    feed.publish(viewer, 8)
    wait_for_frame(page, 8)
    expect(page.locator("#trust")).to_have_text("–")


def test_rate_is_the_feeds(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    expect(page.locator("#rate")).to_have_text("–")
    stop = threading.Event()

    def keep_driving() -> None:
        for frame in itertools.count(1):
            feed.publish(viewer, frame)
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=keep_driving)
    thread.start()
    try:
        expect(page.locator("#rate")).to_have_text(re.compile("^[1-9]"))
        rate = float(page.locator("#rate").inner_text())
        assert rate == pytest.approx(viewer.status()["rate_hz"], rel=0.5)
    finally:
        stop.set()
        thread.join()


def test_pause_holds_the_frame_and_scrubbing_shows_older_ones(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    drive(viewer, range(1, 61))
    wait_for_frame(page, 60)
    page.keyboard.press("Space")
    drive(viewer, range(61, 81))
    assert shown(page) == (60, 60)
    expect(page.locator("#badge")).to_contain_text("Paused")

    page.get_by_role("button", name="Step one frame back").click()
    page.keyboard.press("ArrowLeft")
    wait_for_frame(page, 58)
    assert shown(page) == (58, 58)
    page.keyboard.press("Shift+ArrowLeft")
    wait_for_frame(page, 38)
    page.get_by_role("button", name="Step one frame forward").click()
    wait_for_frame(page, 39)

    scrub = page.get_by_label("Frame of the last minute")
    scrub.fill("10")
    wait_for_frame(page, 11)
    assert shown(page) == (11, 11)
    probability = feed.decision(11)["probabilities"][0]
    assert page.locator("#actions > div").first.inner_text() == f"left\n{100 * probability:.1f} %"
    expect(scrub).to_have_attribute("aria-valuetext", re.compile("^frame 11, "))
    page.keyboard.press("Home")
    wait_for_frame(page, 1)

    page.get_by_role("button", name="Live", exact=True).click()
    wait_for_frame(page, 80)
    assert shown(page) == (80, 80)
    for _ in range(5):  # what came during the pause is there
        page.keyboard.press("ArrowLeft")
    wait_for_frame(page, 75)
    page.keyboard.press("End")
    feed.publish(viewer, 81)
    wait_for_frame(page, 81)


@pytest.mark.long
def test_page_keeps_the_last_1200_frames(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    drive(viewer, range(1, 1231))
    wait_for_frame(page, 1230)
    expect(page.locator("#scrub")).to_have_attribute("max", "1199")
    page.keyboard.press("Home")
    wait_for_frame(page, 31)
    assert shown(page) == (31, 31)


def test_alarms_and_events_are_found_again(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    notices = page.locator("#notices")
    drive(viewer, range(1, 6))
    drive(viewer, range(6, 9), fallback=True, status="watchdog braking: no decision in time")
    wait_for_frame(page, 8)
    expect(notices).to_have_text("Watchdog braking: no decision in time")
    expect(page.locator("#unapplied")).to_be_visible()
    drive(viewer, range(9, 10), fallback=True)
    wait_for_frame(page, 9)
    expect(notices).to_have_text("Watchdog braking")
    drive(viewer, range(10, 12))
    drive(viewer, range(12, 13), events=["collision"])
    drive(viewer, range(13, 15))
    wait_for_frame(page, 14)
    expect(notices).to_have_text("Collision")  # stays for a while after its frame
    page.keyboard.press("p")
    wait_for_frame(page, 12)
    page.keyboard.press("p")
    wait_for_frame(page, 6)
    page.keyboard.press("n")
    wait_for_frame(page, 12)
    drive(viewer, range(15, 16), fallback=True)
    expect(page.locator("#live-alert")).to_have_text("Now: Watchdog braking")  # a pause hides no alarm


def test_frame_without_explanation_says_so_and_shows_the_drive(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    notices = page.locator("#notices")
    feed.publish(viewer, 1)
    wait_for_frame(page, 1)
    expect(notices).to_be_empty()
    feed.publish(viewer, 2, explained=False)
    wait_for_frame(page, 2)
    expect(notices).to_have_text("No explanation for this frame")
    assert shown(page) == (2, 2)
    assert abs(pixels(page) - feed.picture(2)).mean() < 2, "the camera alone"
    viewer.publish(0.15, 3, feed.picture(3), np.full((128, 128), np.nan, np.float32), {})
    wait_for_frame(page, 3)
    expect(notices).to_have_text("No explanation for this frame")
    assert page.locator("#actions > div").all_inner_texts() == [f"{name}\n–" for name in feed.ACTION_NAMES]
    feed.publish(viewer, 4, saliency_flat=True)
    wait_for_frame(page, 4)
    expect(notices).to_contain_text("Flat explanation")
    feed.publish(viewer, 5)
    wait_for_frame(page, 5)
    expect(notices).to_be_empty()


def test_plots_follow_the_drive_and_lead_to_a_frame(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.drive(viewer, 1, 40)
    wait_for_frame(page, 40)
    for name in ("probability", "latency"):
        page.wait_for_selector(f"#{name}-plot canvas")
    expect(page.locator("#latency-summary")).to_contain_text("p99")
    box = page.locator("#probability-plot .u-over").bounding_box()
    page.mouse.click(box["x"] + box["width"] * (1 - 1 / 20), box["y"] + 20)  # one second before now
    expect(page.locator("#badge")).to_be_visible()
    expect(page.locator("#frame")).not_to_have_text("40")
    frame = int(page.locator("#frame").inner_text())
    assert 10 <= frame <= 30
    assert shown(page) == (frame, frame)


def test_a_feed_that_stops_is_told_from_a_lost_connection(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    expect(page.locator("#veil")).to_contain_text("Waiting for the first picture")
    feed.publish(viewer, 1)
    wait_for_frame(page, 1)
    expect(page.locator("#veil")).to_be_hidden()
    expect(page.locator("#connection")).to_have_text("No new picture")
    expect(page.locator("#veil")).to_contain_text("Connected, but the drive sends none. The last picture is")
    feed.publish(viewer, 2)
    expect(page.locator("#connection")).to_have_text("Connected")
    expect(page.locator("#veil")).to_be_hidden()


def test_lost_connection_is_shown_and_recovers_when_the_server_is_back(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    drive(viewer, range(1, 4))
    wait_for_frame(page, 3)
    viewer.close()
    expect(page.locator("#connection")).to_have_text("Connection lost")
    expect(page.locator("#veil")).to_be_visible()
    age = page.evaluate("""async () => {  // waits until the age has grown
        const age = () => parseFloat(document.getElementById("veil-text").textContent.match(/is ([0-9.]+) s old/)[1]);
        const first = age();
        while (age() <= first) await new Promise((resolve) => setTimeout(resolve, 20));
        return [first, age()];
    }""")
    assert 0 <= age[0] < age[1]
    with ViewerServer(port=viewer.port) as again:
        expect(page.locator("#connection")).not_to_have_text("Connection lost")
        feed.publish(again, 500)
        wait_for_frame(page, 500)
        assert shown(page) == (500, 500)
        feed.publish(again, 501)
        expect(page.locator("#veil")).to_be_hidden()
        expect(page.locator("#connection")).to_have_text("Connected")
        wait_for_frame(page, 501)
        for _ in range(2):  # the history has survived
            page.keyboard.press("ArrowLeft")
        wait_for_frame(page, 3)


def test_server_that_hangs_counts_as_lost(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    feed.publish(viewer, 1)
    wait_for_frame(page, 1)
    go_on = threading.Event()
    viewer._loop.call_soon_threadsafe(go_on.wait)  # the connection stays open, but nothing comes any more
    try:
        expect(page.locator("#connection")).to_have_text("Connection lost", timeout=20_000)
    finally:
        go_on.set()
    feed.publish(viewer, 2)
    wait_for_frame(page, 2)
    expect(page.locator("#connection")).to_have_text("Connected")


def test_no_request_leaves_the_machine(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    drive(viewer, range(1, 30))
    wait_for_frame(page, 29)
    page.keyboard.press("Space")
    page.keyboard.press("Home")
    wait_for_frame(page, 1)
    assert {urlsplit(url).netloc for url in pages.requests} == {f"127.0.0.1:{viewer.port}"}
    assert any(url.startswith("ws:") for url in pages.requests)
    # And none could: the page's policy stops what its scripts might ask for.
    blocked = page.evaluate("""() => new Promise((resolve) => {
        document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        fetch("http://192.0.2.1/").catch(() => {});
    })""")
    assert blocked == "connect-src"


def test_two_pages_at_once(pages: Pages, viewer: ViewerServer):
    first, second = pages.open(viewer), pages.open(viewer)
    drive(viewer, range(1, 11))
    wait_for_frame(first, 10)
    wait_for_frame(second, 10)
    first.keyboard.press("Space")
    drive(viewer, range(11, 21))
    wait_for_frame(second, 20)
    assert shown(first) == (10, 10)
    assert shown(second) == (20, 20)
    assert [client["sent"] for client in viewer.status()["clients"]] == [20, 20]
    second.close()
    wait_until(lambda: len(viewer.status()["clients"]) == 1)


def test_frozen_tab_neither_holds_up_the_others_nor_is_flooded(pages: Pages, viewer: ViewerServer):
    frozen, lively = pages.open(viewer), pages.open(viewer)
    drive(viewer, range(1, 4))
    wait_for_frame(frozen, 3)
    debugger = pages.context.new_cdp_session(frozen)
    debugger.send("Debugger.enable")
    debugger.send("Debugger.pause")  # scripts of the page stop at their next step
    for frame in range(4, 1004):
        feed.publish(viewer, frame)
    wait_for_frame(lively, 1003)
    sent = [client["sent"] for client in viewer.status()["clients"]]
    assert sent[0] <= 3 + WINDOW
    assert sent[1] > sent[0]
    debugger.send("Debugger.disable")
    wait_for_frame(frozen, 1003)  # at once the newest, not a thousand old ones
    assert viewer.status()["clients"][0]["sent"] <= 3 + 2 * WINDOW
    expect(frozen.locator("#skipped")).not_to_have_text("0")


class Driven:
    """Controls that keep what they are told."""

    def __init__(self) -> None:
        self.done: list[tuple[str, ...]] = []

    def do(self, words) -> str:
        self.done.append(words)
        return " ".join(words)


SETTINGS = {
    "method": {"value": "linear", "choices": ["digr", "linear"]},
    "target": {"value": ""},
    "attack_epsilon": {"value": 0.02, "range": [0.0, 0.2]},
    "opacity": {"value": 0.8, "range": [0.0, 1.0]},
    "explanation": {"value": True},
}
STATE = {"paused": False, "control": "policy", "recording": False, "policies": ["one", "two"], "settings": SETTINGS}


@pytest.fixture
def driven():
    controls = Driven()
    with ViewerServer(port=0, controls=controls) as server:
        server.tell(STATE)
        yield server, controls


def test_the_page_says_what_is_pressed_and_shows_what_others_change(context: BrowserContext, driven):
    server, controls = driven
    page = Pages(context).open(server)
    expect(page.get_by_text("Watching only")).to_be_visible()
    assert page.locator("#hold").is_disabled()
    page.get_by_label("Opacity").fill("30")  # for this page alone
    page.goto(server.address)
    page.reload()  # the token stays in this tab, and not in its address
    assert page.url == server.url
    feed.publish(server, 1)
    wait_for_frame(page, 1)
    assert controls.done == []
    expect(page.locator("#opacity-value")).to_have_text("80 %")
    page.keyboard.press("h")
    expect(page.locator("#said")).to_have_text("pause")
    server.tell({"paused": True})
    page.get_by_role("button", name="Step", exact=True).click()
    page.get_by_role("button", name="Go on", exact=True).click()
    page.get_by_label("Seed of").fill("77")
    page.get_by_role("button", name="New episode").click()
    page.get_by_role("button", name="Record").click()
    page.get_by_label("Opacity").fill("40")
    page.keyboard.press("g")
    page.get_by_label("Policy that drives").select_option("two")
    page.get_by_label("Explained by").select_option("digr")
    page.get_by_label("Explained action").select_option("brake")
    page.get_by_label("Its strength").fill("0.1")
    page.get_by_label("Maps").uncheck()
    wanted = [("pause",), ("step",), ("resume",), ("reset", "77"), ("record", "on"), ("set", "opacity", "0.40")]
    wanted += [("policy", "two"), ("set", "method", "digr"), ("set", "target", "brake")]
    wanted += [("set", "attack_epsilon", "0.1"), ("set", "explanation", "false")]
    wait_until(lambda: len(controls.done) >= len(wanted))
    assert sorted(controls.done) == sorted(wanted)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    changed = {
        **SETTINGS,
        "opacity": {"value": 0.25, "range": [0, 1]},
        "method": {**SETTINGS["method"], "value": "digr"},
    }
    server.tell({"settings": changed, "paused": False, "control": "watchdog"})
    expect(page.locator("#driver")).to_have_text("The watchdog brakes")
    expect(page.locator("#opacity-value")).to_have_text("25 %")
    expect(page.locator("#set-method")).to_have_value("digr")
    server.tell({"replay": True, "control": ""})  # what only a drive has is not there
    expect(page.locator("#driver")).to_have_text("Replay")
    for absent in ("drive", "reset", "record"):
        expect(page.locator(f"#{absent}")).to_be_hidden()
    expect(page.locator("#hold")).to_be_enabled()


def test_a_hand_at_the_keys_drives_until_it_lets_go_or_looks_away(context: BrowserContext, driven):
    server, controls = driven
    page = Pages(context).open(server)
    page.goto(server.address)
    feed.publish(server, 1)
    wait_for_frame(page, 1)

    def until_commanded(holds: Callable[[float, float, float], bool]) -> None:
        before = len(controls.done)
        wait_until(lambda: any(holds(*map(float, words[1:])) for words in controls.done[before:]))

    page.keyboard.press("d")
    expect(page.get_by_text("You drive.")).to_be_visible()
    page.keyboard.down("ArrowUp")
    page.keyboard.down("ArrowRight")
    until_commanded(lambda steer, throttle, brake: steer > 0.02 and throttle == 1.0 and brake == 0.0)
    page.keyboard.up("ArrowRight")
    page.keyboard.up("ArrowUp")
    page.keyboard.down("ArrowDown")
    until_commanded(lambda steer, throttle, brake: abs(steer) < 0.001 and throttle == 0.0 and brake == 1.0)
    server.tell({"control": "page"})
    expect(page.locator("#driver")).to_have_text("You drive")
    page.keyboard.press("Escape")
    expect(page.get_by_text("You drive.")).to_be_hidden()
    page.evaluate("""() => {  // a gamepad: its stick half to the left, the right trigger pressed by a quarter
        const buttons = Array.from({ length: 16 }, (_, i) => ({ pressed: i === 7, value: i === 7 ? 0.25 : 0 }));
        navigator.getGamepads = () => [null, { connected: true, mapping: "standard", axes: [-0.5, 0, 0, 0], buttons }];
    }""")
    page.keyboard.press("d")
    until_commanded(lambda steer, throttle, brake: steer < -0.02 and throttle == 0.25 and brake == 0.0)
    page.evaluate("navigator.getGamepads = () => [null, null]")  # it is pulled out: nothing is pressed any more
    until_commanded(lambda steer, throttle, brake: abs(steer) < 0.001 and throttle == 0.0)
    page.evaluate("""() => {
        Object.defineProperty(document, "hidden", { value: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }""")
    expect(page.locator("#wheel")).to_be_hidden()
    assert page.locator("#drive").get_attribute("aria-pressed") == "false"
    assert {words[0] for words in controls.done} == {"drive"}


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (1280, 800), (390, 844)])
def test_everything_fits_the_screen(context: BrowserContext, viewer: ViewerServer, width: int, height: int):
    page = Pages(context).open(viewer)
    page.set_viewport_size({"width": width, "height": height})
    feed.publish(viewer, 1, fallback=True, explained=False)
    wait_for_frame(page, 1)
    sizes = page.evaluate("""() => {
        const { scrollWidth, scrollHeight } = document.documentElement;
        const panels = document.querySelector(".panels");
        const stage = document.getElementById("stage").getBoundingClientRect();
        return { scrollWidth, scrollHeight, hidden: panels.scrollHeight - panels.clientHeight,
                 picture: Math.min(stage.width, stage.height) };
    }""")
    assert sizes["scrollWidth"] <= width
    assert sizes["picture"] >= min(360, 0.9 * width)
    if width > 900:
        assert sizes["scrollHeight"] <= height
        assert sizes["hidden"] <= 1
        assert sizes["picture"] >= 0.7 * height


def test_a_first_visit_is_told_what_it_sees_once(browser: Browser, viewer: ViewerServer):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = Pages(context).open(viewer)
    hints = page.get_by_role("region", name="What you see")
    expect(hints).to_be_visible()
    page.keyboard.press("Escape")
    expect(hints).to_be_hidden()
    page.reload()
    expect(page.locator("#connection")).not_to_have_text("Connecting")
    expect(hints).to_be_hidden()
    page.keyboard.press("?")
    page.get_by_role("button", name="What you see").click()
    expect(hints).to_be_visible()
    expect(page.get_by_role("button", name="Got it")).to_be_focused()
    page.keyboard.press("Enter")
    expect(hints).to_be_hidden()
    context.close()


def test_every_control_has_a_name(pages: Pages, viewer: ViewerServer):
    page = pages.open(viewer)
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, [role=img], [role=meter]")].filter(
        (element) => !(element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.length),
    ).map((element) => element.outerHTML)""")
    assert unnamed == []
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_held_page_asks_about_what_is_clicked_dragged_over_or_not_chosen(context: BrowserContext, tmp_path):
    weights = str(live_support.make_weights(tmp_path))
    with ViewerServer(port=0, asking=Asking(lambda side: (weights, ""))) as server:
        page = Pages(context).open(server)
        feed.publish(server, 1, objects=[thing(7)])
        wait_for_frame(page, 1)
        expect(page.locator("#ask-button")).to_be_hidden()
        page.goto(server.address)
        ask = page.get_by_role("button", name="Ask", exact=True)
        ask.click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Ask about frame 1")
        place = page.locator("#picture").bounding_box()
        side = min(place["width"], place["height"])
        left, top = place["x"] + (place["width"] - side) / 2, place["y"] + (place["height"] - side) / 2

        def point(column: float, row: float) -> tuple[float, float]:
            return left + column / 128 * side, top + row / 128 * side

        page.mouse.click(*point(50, 60))
        expect(dialog.locator("figcaption")).to_contain_text("Without the truck", timeout=120_000)
        assert dialog.locator("#answers tr").count() == 1 + len(ACTIONS["wheels"])
        page.mouse.move(*point(10, 70))
        page.mouse.down()
        page.mouse.move(*point(30, 90))
        page.mouse.up()
        expect(dialog.locator("figcaption")).to_contain_text("Without the part in the box", timeout=60_000)
        page.mouse.click(*point(100, 100))
        expect(page.locator("#said")).to_contain_text("drag a box")
        dialog.get_by_role("button", name="brake").click()
        expect(dialog.locator("figcaption")).to_contain_text("“brake”", timeout=60_000)
        dialog.get_by_role("button", name="Compare methods").click()
        expect(dialog.locator("figure")).to_have_count(4, timeout=120_000)
        expect(page.locator("#ring")).to_be_hidden()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        for token, wanted in (("guessed", 401), (server.address.partition("#token=")[2], 404)):
            request = urllib.request.Request(f"{server.url}api/ask/0/999/map?what=digr")
            request.add_header("Authorization", f"token {token}")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == wanted


def test_the_moment_and_the_numbers_are_saved_as_files(pages: Pages, viewer: ViewerServer, tmp_path):
    page = pages.open(viewer)
    drive(viewer, range(1, 4), objects=[thing(7, kind='a "truck", green')])
    wait_for_frame(page, 3)
    page.keyboard.press("v")
    with page.expect_download() as png:
        page.get_by_role("button", name="PNG").click()
    assert png.value.suggested_filename == "frame-3.png"
    saved = cv2.imread(str(png.value.path()))[..., ::-1]
    crisp = cv2.resize(saved, (feed.SIZE, feed.SIZE), interpolation=cv2.INTER_AREA)
    assert abs(crisp[100:] - pixels(page)[100:]).mean() < 4  # below the outline
    with page.expect_download() as table:
        page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(table.value.path().open()))
    assert [row["frame"] for row in rows] == ["1", "2", "3"]
    assert rows[1]["first kind"] == 'a "truck", green' and rows[1]["action"] == "keep"
    assert float(rows[1]["p left"]) == pytest.approx(feed.decision(2)["probabilities"][0])
    with page.expect_download() as clip:
        page.get_by_role("button", name="WebP").click()
    assert clip.value.suggested_filename == "frames-1-3.webp"
    assert cv2.imcount(str(clip.value.path())) == 3


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_no_serious_fault(context: BrowserContext, driven, scheme: str):
    server, _ = driven
    page = Pages(context).open(server)
    page.emulate_media(color_scheme=scheme)
    page.goto(server.address)
    feed.publish(server, 1, objects=[thing(7)], sentence="Keeps the lane.", events=["collision"])
    wait_for_frame(page, 1)
    server.tell({"paused": True})  # what has no new pictures is dimmed
    expect(page.locator("#driver")).to_have_text("Held")
    expect(page.locator("#hold")).to_be_enabled()
    for width, height in ((1280, 800), (640, 400), (390, 844)):  # the second is the first at 200 %
        page.set_viewport_size({"width": width, "height": height})
        page.keyboard.press("g" if width < 1280 else "?")
        faults = [
            f"{fault['id']}: {fault['help']} {[node['html'] for node in fault['nodes']]}"
            for fault in Axe().run(page).response["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert faults == [], (scheme, width)
        page.keyboard.press("Escape")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_vendored_plot_library_is_the_pinned_one():
    vendor = STATIC / "vendor"
    pinned = json.loads((vendor / "package.json").read_text())["dependencies"]["uplot"]
    assert f"(v{pinned})" in (vendor / "uPlot.iife.min.js").read_text()[:100]
    assert json.loads((vendor / "package-lock.json").read_text())["packages"]["node_modules/uplot"]["version"] == pinned
    assert "MIT License" in (vendor / "uPlot.LICENSE.txt").read_text()


def test_missing_chromium_fails_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(pytest.fail.Exception, match="install the Debian package chromium"):
        find_chromium()
