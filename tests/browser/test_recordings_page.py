"""`carla-digr view` in a real browser: recordings with pictures that tell their frame (feed.py)."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import closing

import cv2
import drive_bags
import feed
import live_support
import numpy as np
import pytest
from playwright.sync_api import BrowserContext, Page, expect
from test_page import pixels, shown, wait_for_frame

from carla_digr.errors import UserError
from carla_digr.live.viewer.asking import Asking
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.live.viewer.server import ViewerServer
from carla_digr.live.viewer.shelf import Shelf
from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.topics import IMAGE
from carla_digr.saliency.overlay import overlay

FRAMES = 60
BRAKES, COLLISIONS = range(20, 25), (30,)
UNLIKE = range(40, 43)  # where the second recording's maps have nothing of the first's


def record(path, saliency, policy_hash, **facts):
    """A drive of FRAMES frames of feed.py whose maps are ``saliency`` of the frame's number."""
    drive = drive_bags.DriveRecorder(path, policy_hash=policy_hash, **facts)
    for number in range(1, FRAMES + 1):
        drive.frame(
            number,
            rgb=feed.picture(number),
            saliency=saliency(number),
            action=3 if number in BRAKES else 1,
            collision="a truck" if number in COLLISIONS else "",
        )
        if number % 20 == 0:
            drive.recorder.commit()
    drive.close()
    return path


def other(number):
    flipped = feed.saliency(number)[::-1, ::-1]
    return flipped.copy() if number in UNLIKE else np.sqrt(feed.saliency(number))


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bags")
    first = record(directory / "drive", feed.saliency, "aaaaaaaaaaaa")
    return first, record(directory / "explained", other, "bbbbbbbbbbbb", method="gb")


@pytest.fixture(scope="module")
def alone(bags):
    with closing(Recorded(bags[:1])) as recorded, ViewerServer(port=0, recorded=recorded) as server:
        yield server


@pytest.fixture(scope="module")
def both(bags):
    with closing(Recorded(bags)) as recorded, ViewerServer(port=0, recorded=recorded) as server:
        yield server


@pytest.fixture
def visit(context: BrowserContext):
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))

    def visit(server: ViewerServer) -> Page:
        page = context.new_page()
        page.goto(server.url)
        wait_for_frame(page, 1)
        return page

    yield visit
    assert errors == []


def test_a_marked_stretch_is_saved_with_each_of_its_frames_for_as_long_as_it_lasted(visit, both):
    page = visit(both)
    page.get_by_label("Frame of the recording").fill("35")
    wait_for_frame(page, 36)
    page.keyboard.press("]")
    page.get_by_label("Frame of the recording").fill("9")
    wait_for_frame(page, 10)
    page.keyboard.press("[")
    page.keyboard.press("v")
    expect(page.locator("#clip-said")).to_have_text("Frames 10 to 36, 1.3 s; 30 s at most.")
    page.get_by_role("button", name="WebP").focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "frames-10-36.webp"
    there, film = cv2.imreadanimation(str(download.value.path()))
    assert there and len(film.frames) == 27
    assert set(film.durations[:-1]) == {50}
    for number, picture in zip(range(10, 37), film.frames, strict=True):
        height = picture.shape[0] - 56
        scale = height / 128
        for x in (feed.PATCH_CENTRE[0], feed.PATCH_CENTRE[0] + 130):  # of both recordings
            row, column = int(feed.PATCH_CENTRE[1] * scale), int(x * scale)
            assert feed.frame_of(picture[row, column, 2::-1].tolist()) == number
    page.keyboard.press("End")
    wait_for_frame(page, FRAMES)
    page.keyboard.press("[")  # beyond its end: that one is off
    expect(page.locator("#clip-said")).to_have_text(f"Frames {FRAMES} to {FRAMES}, 0.0 s; 30 s at most.")


def test_a_recording_opens_at_its_first_frame_and_scrubs_and_steps(visit, alone):
    page = visit(alone)
    expect(page.locator("#connection")).to_have_text("Recording")
    assert shown(page) == (1, 1)
    page.get_by_label("Frame of the recording").fill("36")
    wait_for_frame(page, 37)
    assert shown(page) == (37, 37)
    expect(page.locator("#position")).to_have_text("frame 37, 1.80 s")
    probabilities = drive_bags.probabilities(37)
    expect(page.locator("#actions > div").first).to_have_text(f"left{100 * probabilities[0]:.1f} %")
    page.keyboard.press("ArrowRight")
    wait_for_frame(page, 38)
    page.keyboard.press("Shift+ArrowLeft")
    wait_for_frame(page, 18)
    page.keyboard.press("End")
    wait_for_frame(page, FRAMES)
    page.keyboard.press("Home")
    wait_for_frame(page, 1)
    expect(page.locator("#stage .veil")).to_be_hidden()
    expect(page.locator("body")).not_to_have_class(re.compile("stale"))
    expect(page.get_by_role("button", name="Live", exact=True)).to_be_hidden()


def test_the_picture_is_the_recorded_map_over_the_recorded_camera(visit, alone):
    page = visit(alone)
    page.keyboard.press("2")
    camera = pixels(page)
    assert abs(camera - feed.picture(1)).mean() < 2
    page.keyboard.press("1")
    expected = overlay(camera.astype(np.uint8), feed.saliency(1), 0.6).astype(int)
    assert abs(pixels(page) - expected).max() <= 4


def test_it_plays_to_its_end_at_the_chosen_speed_and_again(visit, alone):
    page = visit(alone)
    later_frame = re.compile(r"^([3-9]|\d\d)$")
    page.get_by_label("Speed").select_option("0.25")
    start = time.monotonic()
    page.keyboard.press("Space")
    expect(page.locator("#frame")).to_have_text(later_frame)
    assert time.monotonic() - start >= 0.9 * 2 * 0.05 / 0.25  # two frames at a quarter of the speed take 0.4 s
    page.get_by_label("Speed").select_option("8")
    wait_for_frame(page, FRAMES)
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    page.get_by_label("Speed").select_option("0.1")
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#frame")).not_to_have_text(str(FRAMES))
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_events_are_jumped_to(visit, both):
    page = visit(both)
    kinds = page.get_by_label("Events")
    assert {option.split(" (")[0] for option in kinds.locator("option").all_inner_texts()} == {
        "all events",
        "brake",
        "collision",
        "low agreement",
    }
    for kind, frame in (("collision", 30), ("brake", 20), ("low agreement", 40)):
        kinds.select_option(kind)
        page.keyboard.press("Home")
        wait_for_frame(page, 1)
        page.get_by_role("button", name="Next").click()
        wait_for_frame(page, frame)
        expect(page.locator("#event")).to_have_text(kind)
    kinds.select_option("")
    page.get_by_role("button", name="Previous").click()
    wait_for_frame(page, 30)
    page.get_by_label("Opacity").focus()
    page.keyboard.press("p")
    wait_for_frame(page, 20)


def test_equal_maps_are_no_low_agreement(bags):
    with closing(Recorded([bags[0], bags[0]])) as recorded:
        assert {event["kind"] for event in recorded.description()["events"]} == {"brake", "collision"}


def test_two_recordings_stand_side_by_side(visit, both):
    page = visit(both)
    page.get_by_label("Frame of the recording").fill("9")
    wait_for_frame(page, 10)
    page.locator(".segments").get_by_text("Map").click()
    first, second = pixels(page)[:, :128], pixels(page)[:, -128:]
    page.locator(".segments").get_by_text("Overlay").click()
    picture = pixels(page)
    assert picture.shape == (128, 258, 3)
    assert abs(first - second).mean() > 3
    captions = page.locator("#captions span")
    expect(captions.nth(0)).to_contain_text("drive: aaaaaaaaaaaa – keep")
    expect(captions.nth(1)).to_contain_text("explained: Gaussian-Blur Perturbation, bbbbbbbbbbbb – keep")
    assert float(page.locator("#agreement").inner_text()) > 0.9
    page.get_by_label("Frame of the recording").fill("40")
    wait_for_frame(page, 41)
    assert float(page.locator("#agreement").inner_text().replace("−", "-")) < 0.9
    page.locator(".segments").get_by_text("Both").click()
    assert pixels(page).shape == (128, 388, 3)
    page.locator(".segments").get_by_text("Camera").click()
    left = pixels(page)[:, :128]
    assert (left == pixels(page)[:, -128:]).all()


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path)
    return connection.getresponse()


def test_what_is_not_in_a_recording_is_not_found(alone):
    for path, status in [("0/0", 200), (f"0/{FRAMES - 1}", 200), (f"0/{FRAMES}", 404), ("1/0", 404), ("0/-1", 404)]:
        assert get(alone, f"/api/recording/{path}").status == status, path
    description = json.load(get(alone, "/api/recording"))
    assert [row["frame"] for row in description["frames"]] == list(range(1, FRAMES + 1))
    assert [event for event in description["events"] if event["kind"] == "collision"] == [
        {"kind": "collision", "index": 29}
    ]
    with ViewerServer(port=0) as live:
        assert get(live, "/api/recording").status == 404


def test_a_damaged_place_costs_its_frames_only(bags, tmp_path, context):
    """A picture that is none: the frame says so, and all others are there."""
    path = tmp_path / "damaged"
    drive = drive_bags.DriveRecorder(path)
    for number in range(1, 4):
        if number != 2:
            drive.frame(number, rgb=feed.picture(number), saliency=feed.saliency(number))
        else:
            broken = drive_bags.image(2 * drive_bags.PERIOD, feed.picture(2), "rgb8")
            broken.step = 7
            drive.add(IMAGE, broken, 2 * drive_bags.PERIOD)
    drive.close()
    with closing(Recorded([path])) as recorded, ViewerServer(port=0, recorded=recorded) as server:
        page = context.new_page()
        page.goto(server.url)
        wait_for_frame(page, 1)
        page.keyboard.press("ArrowRight")
        expect(page.locator("#ignored")).to_contain_text("The picture of frame 0 in damaged is damaged")
        page.keyboard.press("ArrowRight")
        wait_for_frame(page, 3)


def test_recordings_of_two_drives_are_refused(bags, tmp_path):
    late = drive_bags.DriveRecorder(tmp_path / "late", size=8)
    late.frame(1000)
    late.close()
    with pytest.raises(UserError, match="have no frame in common: they are not of the same drive"):
        Recorded([bags[0], tmp_path / "late"])
    with open_bag(bags[0]):
        pass


def test_a_folders_recordings_are_listed_opened_and_asked_about_by_their_names_alone(bags, context, tmp_path):
    class Shipped(Recorded):
        def policy(self, side: int) -> tuple[str, str]:
            return (weights, "") if self.sides[0].name == "explained" else super().policy(side)

    weights = str(live_support.make_weights(tmp_path))
    shelf = Shelf(bags[0].parent, Shipped)
    with ViewerServer(port=0, recorded=shelf, asking=Asking(recordings=shelf)) as server:
        page = context.new_page()
        page.goto(server.address)
        names = page.locator("#shelf-list a")
        expect(names).to_have_count(2)
        assert set(names.all_inner_texts()) == {"drive", "explained"}
        names.get_by_text("explained").click()
        wait_for_frame(page, 1)
        expect(page.locator("#captions span")).to_have_count(1)
        page.keyboard.press("a")
        page.get_by_role("dialog").get_by_role("button", name="brake").click()
        expect(page.locator("#answers figcaption")).to_contain_text("“brake”", timeout=120_000)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Recordings").click()
        page.get_by_role("dialog").get_by_text("beside").click()
        wait_for_frame(page, 1)
        expect(page.locator("#captions span")).to_have_text([re.compile("^explained"), re.compile("^drive")])
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        for query in (
            "",
            "?bag=..",
            "?bag=../bags/drive",
            "?bag=%2Fetc",
            "?bag=drive&bag=explained&bag=drive",
            "?bag=",
        ):
            connection.request("GET", f"/api/recording{query}")
            refused = connection.getresponse()
            refused.read()
            assert refused.status == 404, query
        token = {"Authorization": f"token {server.address.partition('#token=')[2]}"}
        for query, status in (("bag=..", 404), ("bag=explained&bag=explained&bag=drive", 404), ("bag=drive", 422)):
            connection.request("GET", f"/api/ask/0/3/map?what=digr&{query}", headers=token)
            refused = connection.getresponse()
            assert refused.status == status and (status == 404 or b"does not ship" in refused.read()), query
            refused.read()


def test_the_command_serves_on_loopback_until_it_is_ended(bags):
    command = [sys.executable, "-m", "carla_digr.cli", "view", str(bags[0]), "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = running.stdout.readline()
        port = int(re.fullmatch(r"The page is at http://127\.0\.0\.1:(\d+)/#token=\S+ \(Ctrl-C ends it\)\n", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/api/recording/0/5")
        assert connection.getresponse().status == 200
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
        assert (running.returncode, errors) == (0, "")
    finally:
        running.kill()
