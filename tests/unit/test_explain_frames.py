"""`carla-digr explain` of a folder of pictures, an .npz and a video."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

import carla_digr
from carla_digr import checkpoint
from carla_digr.cli import main as command
from carla_digr.config import PolicyConfig
from carla_digr.files import exclusive
from carla_digr.policy import ActorCritic, InputRecipe
from carla_digr.recordings import frames as frames_module

SIZE = 128


@pytest.fixture(scope="module")
def pictures():
    """Twelve smooth pictures."""
    random = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
    return np.stack([cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for small in random])


@pytest.fixture
def folder(pictures, tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    for number, picture in enumerate(pictures, 1):
        cv2.imwrite(str(path / f"frame{number}.png"), picture[..., ::-1])
    return path


def explain(*arguments) -> int:
    weights = [] if "--weights" in arguments else ["--weights", "driving_student"]
    return command(["explain", *map(str, [*arguments, *weights])])


def result(out):
    with np.load(out / "maps.npz") as arrays:
        return json.loads((out / "explained.json").read_text()), arrays["maps"], arrays["names"].tolist()


def interrupt_the_sixth_overlay(monkeypatch) -> list[int]:
    """A Ctrl-C while the sixth overlay is made; a list that grows with each overlay."""
    real, calls = frames_module.overlay, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(frames_module, "overlay", interrupted)
    return calls


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("method", ["digr", "vg"])
def test_a_folder_gives_the_maps_and_decisions_of_the_library_in_natural_order(folder, pictures, tmp_path, method):
    out = tmp_path / "maps"
    assert explain(folder, "--out", out, "--method", method) == 0
    said, maps, names = result(out)
    policy = carla_digr.load_policy("driving_student")
    expected = carla_digr.explain(policy, pictures, method)
    decisions = carla_digr.decide(policy, pictures)
    assert names == [f"frame{number}" for number in range(1, 13)]
    assert maps.dtype == np.float16
    np.testing.assert_array_equal(maps, expected.astype(np.float16))
    assert (said["method"], said["target"]) == (method, None)
    assert said["policy"] == policy.card["weights_sha256"][:12]
    for frame, action, probabilities in zip(said["frames"], decisions.actions, decisions.probabilities, strict=True):
        assert frame["action"] == policy.action_names[action]
        np.testing.assert_allclose(frame["probabilities"], probabilities, rtol=1e-6)
    mixed = cv2.imread(str(out / "frame10.png"))[..., ::-1]
    np.testing.assert_array_equal(mixed, carla_digr.overlay(pictures[9], expected[9]))
    assert set(files(out)) == {"maps.npz", "explained.json", *(f"{name}.png" for name in names)}
    assert not list(tmp_path.glob(".*"))


def test_an_array_and_a_folder_of_its_pictures_give_the_same(folder, pictures, tmp_path):
    np.savez_compressed(tmp_path / "frames.npz", frames=pictures)
    assert explain(folder, "--out", tmp_path / "a", "--target", "brake") == 0
    assert explain(tmp_path / "frames.npz", "--out", tmp_path / "b", "--target", "brake") == 0
    (said, maps, _), (also, same, names) = result(tmp_path / "a"), result(tmp_path / "b")
    np.testing.assert_array_equal(maps, same)
    assert names[0] == "000000" and said["target"] == also["target"] == "brake"
    assert [frame["probabilities"] for frame in said["frames"]] == [frame["probabilities"] for frame in also["frames"]]


def test_a_video_is_explained(pictures, tmp_path):
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 20, (SIZE, SIZE))
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    assert explain(path, "--out", tmp_path / "maps") == 0
    _, maps, names = result(tmp_path / "maps")
    assert len(names) == len(maps) == 12
    video = cv2.VideoCapture(str(path))
    decoded = np.stack([video.read()[1][..., ::-1] for _ in pictures])
    expected = carla_digr.explain(carla_digr.load_policy("driving_student"), decoded)
    np.testing.assert_array_equal(maps, expected.astype(np.float16))


def test_damaged_pictures_are_left_out_and_counted(folder, tmp_path, capsys):
    (folder / "frame3.png").write_bytes((folder / "frame3.png").read_bytes()[:900])
    (folder / "frame5.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((SIZE, SIZE, 3), np.uint8))[1].tobytes()[:-300])
    (folder / "frame6.jpeg").write_text("no picture")
    cv2.imwrite(str(folder / "frame13.png"), np.zeros((64, 64, 3), np.uint8))
    bomb = bytearray((folder / "frame1.png").read_bytes())
    bomb[16:24] = b"\x00\x01\x00\x00" * 2
    (folder / "frame0.png").write_bytes(bomb)
    (folder / "notes.txt").write_text("not counted")
    assert explain(folder, "--out", tmp_path / "maps") == 0
    said, maps, names = result(tmp_path / "maps")
    refused = {frame["name"]: frame["refused"] for frame in said["frames"] if "refused" in frame}
    assert set(refused) == {"frame0", "frame3", "frame5.jpg", "frame6.jpeg", "frame13"}
    assert "65536 x 65536" in refused["frame0"] and "64 x 64" in refused["frame13"]
    assert len(maps) == len(names) == 11 and "frame5.png" in names
    assert "5 frames were refused" in capsys.readouterr().out


def test_frames_of_another_size_are_scaled_if_asked_for(tmp_path, capsys):
    np.savez(tmp_path / "small.npz", frames=np.full((2, 64, 96, 3), 90, np.uint8))
    assert explain(tmp_path / "small.npz", "--out", tmp_path / "maps") == 2
    assert "No frame of" in capsys.readouterr().err
    assert explain(tmp_path / "small.npz", "--out", tmp_path / "maps", "--resize") == 0
    assert result(tmp_path / "maps")[1].shape == (2, SIZE, SIZE)


def test_interrupted_it_resumes_and_gives_the_same_bytes(folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "maps"
    assert explain(folder, "--out", whole) == 0
    calls = interrupt_the_sixth_overlay(monkeypatch)
    assert explain(folder, "--out", out) == 130
    assert not out.exists()
    with (tmp_path / ".maps.tmp" / "maps" / "frames.jsonl").open("a") as file:
        file.write('{"name": "half a li')
    capsys.readouterr()
    assert explain(folder, "--out", out) == 0
    assert len(calls) == 6 + 7  # five were done, the sixth was interrupted
    assert "5 of them before it was interrupted" in capsys.readouterr().out
    assert files(out) == files(whole)


def test_a_policy_of_several_pictures_sees_those_before_also_when_it_resumes(folder, pictures, tmp_path, monkeypatch):
    torch.manual_seed(0)
    policy = ActorCritic(PolicyConfig(features=16), 4, 84, 84, 3, recipe=InputRecipe("grey", stack=4))
    card = {"task": None, "role": "imported", "action_names": ["a", "b", "c"]}
    checkpoint.save(tmp_path / "grey.safetensors", policy, card)
    options = ["--weights", tmp_path / "grey.safetensors", "--resize", "--method", "vg"]
    (folder / "frame4.png").write_bytes(b"")
    interrupt_the_sixth_overlay(monkeypatch)
    assert explain(folder, "--out", tmp_path / "maps", *options) == 130
    assert explain(folder, "--out", tmp_path / "maps", *options) == 0
    said, maps, _ = result(tmp_path / "maps")
    whole = np.delete(pictures, 3, axis=0)
    expected = carla_digr.explain(carla_digr.load_policy(tmp_path / "grey.safetensors"), whole, "vg", resize=True)
    np.testing.assert_array_equal(maps, expected.astype(np.float16))
    assert [frame["name"] for frame in said["frames"] if "refused" in frame] == ["frame4"]
    stacks = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 4), dtype=np.uint8)
    np.savez(tmp_path / "stacks.npz", frames=stacks)
    assert explain(tmp_path / "stacks.npz", "--out", tmp_path / "of_stacks", *options) == 0
    newest = cv2.imread(str(tmp_path / "of_stacks" / "000001.png"))[..., ::-1]
    alone = carla_digr.explain(policy, stacks[1:], "vg")[0]
    np.testing.assert_array_equal(newest, carla_digr.overlay(stacks[1, :, :, 3], alone))


def test_what_another_method_left_is_not_taken(folder, tmp_path, monkeypatch):
    calls = interrupt_the_sixth_overlay(monkeypatch)
    assert explain(folder, "--out", tmp_path / "maps", "--method", "vg") == 130
    assert explain(folder, "--out", tmp_path / "maps", "--method", "digr") == 0
    assert len(calls) == 6 + 12


@pytest.mark.slow
def test_killed_it_resumes(folder, tmp_path):
    """Killed while a slow method is at work."""
    whole, out = tmp_path / "whole", tmp_path / "maps"
    arguments = ["explain", str(folder), "--weights", "driving_student", "--method", "ig", "--out"]
    assert command([*arguments, str(whole)]) == 0
    process = subprocess.Popen([sys.executable, "-m", "carla_digr.cli", *arguments, str(out)], stderr=subprocess.PIPE)
    lines = tmp_path / ".maps.tmp" / "maps" / "frames.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") > 2):
        pass
    process.kill()
    process.communicate()
    assert command([*arguments, str(out)]) == 0
    assert files(out) == files(whole)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda p: np.savez(p, pictures=np.zeros((1, 2, 2, 3), np.uint8)), ["no array 'frames'"]),
        (lambda p: np.savez(p, frames=np.zeros((1, 2, 2, 3), np.float32)), ["uint8", "float32"]),
        (lambda p: np.savez(p, frames=np.zeros((0, 128, 128, 3), np.uint8)), ["uint8"]),
        (lambda p: np.savez(p, frames=np.array([{"a": 1}], dtype=object)), ["object"]),
        (lambda p: p.write_bytes(b"PK\x03\x04 not a zip"), ["Cannot read", ".npz"]),
        (lambda p: p.with_suffix(".mp4").write_bytes(b"no video"), ["Cannot read", "video"]),
        (lambda p: None, ["Cannot read", "No such file"]),
    ],
)
def test_what_holds_no_frames_is_one_sentence(tmp_path, capsys, make, parts):
    path = tmp_path / "frames.npz"
    make(path)
    path = path.with_suffix(".mp4") if path.with_suffix(".mp4").exists() else path
    assert explain(path, "--out", tmp_path / "maps") == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()[-1:]) == 1 and said.strip().endswith(".")
    for part in parts:
        assert part in said
    assert not (tmp_path / "maps").exists() and not (tmp_path / ".maps.tmp").exists()


def test_a_name_that_is_taken_or_a_policy_that_is_missing_is_said_at_once(folder, tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    assert explain(folder, "--out", tmp_path / "maps") == 2
    assert "exists already" in capsys.readouterr().err
    assert command(["explain", str(folder), "--out", str(tmp_path / "other")]) == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["garbage in the table", "maps are missing", "maps are cut"])
def test_what_is_left_damaged_is_made_again(folder, tmp_path, monkeypatch, damage):
    calls = interrupt_the_sixth_overlay(monkeypatch)
    assert explain(folder, "--out", tmp_path / "maps") == 130
    left = tmp_path / ".maps.tmp" / "maps"
    if damage == "garbage in the table":
        with (left / "frames.jsonl").open("a") as file:
            file.write("garbage\n")
    elif damage == "maps are missing":
        (left / "maps.raw").unlink()
    else:
        (left / "maps.raw").write_bytes((left / "maps.raw").read_bytes()[:-1])
    assert explain(folder, "--out", tmp_path / "maps") == 0
    assert len(calls) == 6 + 12 and len(result(tmp_path / "maps")[1]) == 12


def test_two_commands_do_not_make_the_same_maps(folder, tmp_path, capsys):
    with exclusive(tmp_path / ".maps.tmp", "taken"):
        assert explain(folder, "--out", tmp_path / "maps") == 2
    assert "Another command is making" in capsys.readouterr().err


def test_only_files_are_opened(folder, tmp_path):
    os.mkfifo(folder / "pipe.png")
    assert explain(folder, "--out", tmp_path / "maps") == 0
    assert len(result(tmp_path / "maps")[1]) == 12
