"""Recordings with what decides: as videos, and where another thing decides."""

from __future__ import annotations

import json
from contextlib import closing

import cv2
import drive_bags
import numpy as np
import pytest

from carla_digr.cli import main as command
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.saliency.overlay import overlay

FRAMES = 30
TRUCK = {"id": 7, "kind": "truck", "share": 0.5, "effect": 0.8, "action": 2, "flips": True, "right": 9, "bottom": 9}
TRUCK |= {"outline": np.array([0, 0, 9, 0, 9, 9], np.uint16), "parts": np.array([3], np.uint16)}
LINE = {"id": 0, "kind": "lane line", "lane": -1, "share": 0.2, "effect": 0.3, "action": 1}


def rgb(number: int) -> np.ndarray:
    return np.full((128, 128, 3), (40 + 5 * number, 90, 200 - 5 * number), np.uint8)


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """The truck decides in frames 6 to 15, and for one frame later; a line from 16 on."""
    path = tmp_path_factory.mktemp("bags") / "drive"
    drive = drive_bags.DriveRecorder(path, surroundings=True)
    saliency = np.zeros((128, 128), np.float32)
    saliency[32:96, 32:96] = 1.0
    for number in range(1, FRAMES + 1):
        drive.frame(number, rgb(number), saliency, action=1)
        first = TRUCK if 6 <= number <= 15 or number == 22 else LINE if number > 15 else {**LINE, "effect": 0.01}
        drive.decides(number, f"Keeps, {number}.", first, {**LINE, "effect": 0.001})
    drive.close()
    return path


def test_a_video_shows_each_frame_with_its_map(bag, tmp_path, capsys):
    out = tmp_path / "videos" / "drive.mp4"
    arguments = ["--start", "0.26", "--duration", "1.01", "--height", "256", "--opacity", "0.5"]
    assert command(["video", str(bag), "--out", str(out), *arguments]) == 0
    assert f"{out}: 20 frames" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["drive.mp4"]
    reader = cv2.VideoCapture(str(out))
    assert reader.get(cv2.CAP_PROP_FPS) == pytest.approx(20.0)
    pictures = []
    while (read := reader.read())[0]:
        pictures.append(read[1][..., ::-1].astype(int))
    assert len(pictures) == 20
    for index in (0, 10, 19):
        saliency = np.zeros((128, 128), np.float32)
        saliency[32:96, 32:96] = 1.0
        wanted = overlay(rgb(index + 7), saliency, 0.5).astype(int)
        for row, column in ((10, 10), (64, 64)):
            assert abs(pictures[index][2 * row, 2 * column] - wanted[row, column]).max() <= 12
    bar = pictures[0][256:]
    assert bar.shape[1] == 256 and bar.max() > 180  # words


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "drive.avi"], "A video is a file .mp4 or .webm"),
        (["--out", "drive.mp4", "--start", "99"], "no frame from 99 s on"),
        (["--out", "drive.mp4", "--height", "9"], "height of the video must lie between"),
        (["--out", "drive.mp4", "--colormap", "beige"], "no colormap 'beige'"),
    ],
)
def test_what_cannot_be_a_video_is_one_sentence_and_leaves_nothing(bag, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert command(["video", str(bag), *more]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_where_another_thing_decides_for_a_while_is_an_event_and_frames_say_what(bag):
    with closing(Recorded([bag])) as recorded:
        told = recorded.description()
        message = recorded.message(0, 6)
    changes = [event["index"] for event in told["events"] if event["kind"] == "another object decides"]
    assert changes == [5, 15]
    first = told["frames"][6]["decisions"][0]["objects"][0]
    assert (first["id"], first["kind"], first["without"], first["flips"]) == (7, "truck", "right", True)
    assert first["box"] == [0, 0, 9, 9] and told["frames"][6]["decisions"][0]["sentence"] == "Keeps, 7."
    header = json.loads(message[4 : 4 + int.from_bytes(message[:4], "little")])
    assert header["outlines"] == [[[0, 0, 9, 0, 9, 9]], []]
