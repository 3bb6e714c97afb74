"""`carla-digr explain`: new maps and decisions in a copy of a recording, the same bytes each time."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import drive_bags
import live_support
import numpy as np
import pytest
import torch

from carla_digr import checkpoint, objects
from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.cli import main as command
from carla_digr.driving.control import ACTIONS, Neighbour
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.files import exclusive, sha256_of
from carla_digr.images import to_array, to_rgb
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.policy import to_input
from carla_digr.recordings import topics
from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.drive import Decoder, read_drive
from carla_digr.recordings.explain import explain_bag
from carla_digr.saliency import METHODS
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.overlay import overlay
from carla_digr.simulator.sensors import instance_picture
from carla_digr.tasks.driving.drive import InProcessDrive

STUDENT = WEIGHTS_DIRECTORY / "driving_student.safetensors"
STUDENT_HASH = sha256_of(STUDENT)[:12]
MADE_ANEW = {topics.DECISION, topics.SALIENCY, topics.OVERLAY, topics.FACTS_TOPIC}


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """Five frames, the third one braked by the bridge, driven by the student that ships."""
    drive = drive_bags.DriveRecorder(tmp_path_factory.mktemp("bags") / "drive", policy_hash=STUDENT_HASH)
    for number in range(1, 6):
        drive.frame(number, fallback=number == 3)
    drive.close()
    return drive.recorder.path


def messages(path):
    """topic -> (time, bytes)"""
    found = {}
    with open_bag(path) as opened:
        for channel, time, data in opened.read():
            found.setdefault(channel.topic, []).append((time, data))
    return found


def decoded(path, topic):
    decode = Decoder()
    with open_bag(path) as opened:
        return [decode(channel, data) for channel, _, data in opened.read(wanted=lambda c: c.topic == topic)]


def files(bag):
    return {path.name: path.read_bytes() for path in bag.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["digr", "linear", "smoothgrad"])
def test_maps_are_the_explainers_and_the_bytes_the_same_twice(bag, method, tmp_path, weights):
    chosen = weights if method == "smoothgrad" else None
    first, second = tmp_path / "first", tmp_path / "again" / "second"
    explain_bag(bag, first, method, chosen)
    explain_bag(bag, second, method, chosen)
    assert files(first) == files(second)
    explainer = Explainer.from_checkpoint(chosen or STUDENT, method=method)
    decisions = [m for m in decoded(first, topics.DECISION) if not m.fallback]
    maps = decoded(first, topics.SALIENCY)
    pictures = decoded(first, topics.OVERLAY)
    for number, (message, shown, mixed) in enumerate(zip(decisions, maps, pictures, strict=True), 1):
        rgb = drive_bags.picture(number)
        decision = explainer.decide(rgb)
        expected = explainer.explain(decision).map
        np.testing.assert_array_equal(to_array(shown), expected)
        np.testing.assert_array_equal(to_rgb(mixed), overlay(rgb, expected))
        np.testing.assert_array_equal(message.probabilities, decision.probabilities)
        assert (message.frame, message.action, message.policy_hash) == (number, decision.action, explainer.policy_hash)
        assert math.isnan(message.inference_ms) and math.isnan(message.saliency_ms)


def test_the_rest_of_the_drive_is_kept(bag, tmp_path, weights):
    out = tmp_path / "explained"
    done = explain_bag(bag, out, "gradcam", weights)
    assert (done.frames, done.refused, done.left_out) == (5, {}, [])
    before, after = messages(bag), messages(out)
    assert set(after) == set(before)
    for topic in set(before) - MADE_ANEW:
        assert after[topic] == before[topic], topic
    (kept,) = (m for m in decoded(out, topics.DECISION) if m.fallback)
    assert (kept.frame, kept.brake, kept.policy_hash) == (3, 1.0, "")
    ((_, facts),) = after[topics.FACTS_TOPIC]
    assert json.loads(facts[8:-1]) == {
        "policy_hash": sha256_of(weights)[:12],
        "driven_by": STUDENT_HASH,
        "method": "gradcam",
    }
    with open_bag(out) as opened:
        assert [f.number for f in read_drive(opened).frames] == [1, 2, 3, 4, 5]


def states_of(policy, frames):
    """The states of consecutive frames in one batch; before the first one, it is repeated."""
    pictures = np.stack([policy.recipe.picture(frame, policy.input_shape[1:], resize=True) for frame in frames])
    rows = np.arange(len(frames))[:, None] + np.arange(1 - policy.recipe.stack, 1)
    return to_input(torch.from_numpy(pictures[rows.clip(min=0)].reshape(len(frames), *policy.input_shape)))


@pytest.mark.parametrize("target", [None, "stop"])
def test_a_foreign_policy_explains_what_it_would_have_done(bag, tmp_path, target):
    foreign = live_support.make_foreign_weights(tmp_path)
    explain_bag(bag, tmp_path / "out", "vg", foreign, wrong_size="resize", target=target)
    policy, _ = checkpoint.load(foreign)
    frames = np.stack([drive_bags.picture(number) for number in range(1, 6)])
    states = states_of(policy, frames)
    raw = METHODS["vg"](policy, states, None if target is None else 1)
    probabilities = policy(states)[0].softmax(dim=1).detach().numpy()
    decisions = [m for m in decoded(tmp_path / "out", topics.DECISION) if not m.fallback]
    maps, pictures = (decoded(tmp_path / "out", topic) for topic in (topics.SALIENCY, topics.OVERLAY))
    assert len(decisions) == 5
    for k, (message, shown, mixed) in enumerate(zip(decisions, maps, pictures, strict=True)):
        np.testing.assert_allclose(message.probabilities, probabilities[k], atol=1e-6)
        np.testing.assert_allclose(to_array(shown), normalise(raw)[0][k].numpy(), atol=1e-5)
        assert to_rgb(mixed).shape == (84, 84, 3)
        expected = (0.0, 15.0) if message.action == 0 else (0.5, math.nan)
        np.testing.assert_allclose((message.brake, message.target_speed), expected)
    facts = json.loads(messages(tmp_path / "out")[topics.FACTS_TOPIC][0][1][8:-1])
    assert facts.get("target") == target


def test_frames_of_another_episode_are_not_stacked(tmp_path):
    drive = drive_bags.DriveRecorder(tmp_path / "drive", policy_hash=STUDENT_HASH)
    for number in (1, 2, 3, 60, 61):  # 2.85 s are missing
        drive.frame(number)
    drive.close()
    foreign = live_support.make_foreign_weights(tmp_path)
    explain_bag(drive.recorder.path, tmp_path / "out", "vg", foreign, wrong_size="resize")
    policy, _ = checkpoint.load(foreign)
    frames = np.stack([drive_bags.picture(number) for number in (60, 61)])
    states = states_of(policy, frames)
    expected = policy(states)[0].softmax(dim=1).detach().numpy()
    found = [m.probabilities for m in decoded(tmp_path / "out", topics.DECISION)]
    np.testing.assert_allclose(found[3:], expected, atol=1e-6)


def test_a_policy_whose_actions_mean_nothing_to_a_car_still_explains(bag, tmp_path):
    foreign = live_support.make_foreign_weights(tmp_path, controls=False)
    explain_bag(bag, tmp_path / "out", "vg", foreign, wrong_size="resize")
    assert all(math.isnan(m.steer) for m in decoded(tmp_path / "out", topics.DECISION) if not m.fallback)


def test_an_action_that_the_policy_does_not_have_is_refused(bag, tmp_path):
    with pytest.raises(UserError, match="no action 'fly' to explain; choose one of left, keep, right, brake"):
        explain_bag(bag, tmp_path / "out", target="fly")


def test_an_explained_recording_can_be_explained_again(bag, tmp_path, weights):
    explain_bag(bag, tmp_path / "other", "vg", weights)
    explain_bag(tmp_path / "other", tmp_path / "back", "digr", STUDENT)
    explain_bag(bag, tmp_path / "direct", "digr", STUDENT)
    back, direct = messages(tmp_path / "back"), messages(tmp_path / "direct")
    assert back == direct


def test_what_the_policy_saw_is_explained_where_it_was_not_the_cameras_picture(tmp_path, monkeypatch):
    kind = topics.PICTURE_TYPE
    monkeypatch.setitem(drive_bags.TYPES, topics.OBSERVATION, kind)
    monkeypatch.setitem(drive_bags.CHANNELS, topics.OBSERVATION, drive_bags.channel(topics.OBSERVATION, kind))
    drive = drive_bags.DriveRecorder(tmp_path / "attacked", policy_hash=STUDENT_HASH)
    drive.frame(1)
    drive.frame(2)
    seen = drive_bags.picture(99)
    drive.add(topics.OBSERVATION, drive_bags.image(2 * drive_bags.PERIOD, seen, "rgb8"), 2 * drive_bags.PERIOD)
    drive.close()
    assert explain_bag(drive.recorder.path, tmp_path / "out").frames == 2
    explainer = Explainer.from_checkpoint(STUDENT)
    expected = [explainer.decide(rgb).probabilities for rgb in (drive_bags.picture(1), seen)]
    for message, probabilities in zip(decoded(tmp_path / "out", topics.DECISION), expected, strict=True):
        np.testing.assert_array_equal(message.probabilities, probabilities)


INTERRUPTED = """
import os, sys
from itertools import count
from carla_digr.cli import main
from carla_digr.recordings import explain as reexplain
explain, calls = reexplain.Explainer.explain, count(1)
def interrupted(self, decision):
    if next(calls) == 11:
        os.kill(os.getpid(), int(sys.argv[1]))
    return explain(self, decision)
reexplain.Explainer.explain = interrupted
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """Six frames of a drive with what their pixels show, in every second one before the picture."""
    world = InProcessDrive()
    recorder = drive_bags.DriveRecorder(tmp_path_factory.mktemp("bags") / "segmented", surroundings=True)
    shown = {}
    frame = world.reset(4)
    for number in range(1, 7):
        camera = replace(world.camera, width=256, height=256)
        labels = np.ascontiguousarray(instance_picture(world.world, camera)[:, :, 2::-1])
        vehicles = {int(i): Neighbour(12.0, 0.25, -1) for i in world.world.vehicles["id"] if i != world.ego}
        shown[number] = frame.image.copy(), labels, vehicles
        if number % 2:
            recorder.surroundings(number, labels, vehicles)
        recorder.frame(number, rgb=np.ascontiguousarray(frame.image))
        if not number % 2:
            recorder.surroundings(number, labels, vehicles)
        if number == 3:
            recorder.trust(number, agreement=0.875, age=4.0)
        frame = world.step(ACTIONS["wheels"]["keep"])
    recorder.close()
    return recorder.recorder.path, shown


def objects_of(path):
    """(time, message)"""
    decode = Decoder()
    with open_bag(path) as opened:
        found = opened.read(wanted=lambda c: c.topic == topics.OBJECTS)
        return [(time, decode(channel, data)) for channel, time, data in found]


def test_a_recording_with_a_segmentation_gets_objects(segmented, tmp_path, weights):
    path, shown = segmented
    explain_bag(path, tmp_path / "out", "linear", weights)
    library = Explainer.from_checkpoint(weights, method="linear")
    narrator = objects.Narrator(library.action_names)
    found = objects_of(tmp_path / "out")
    assert [time for time, _ in found] == [number * drive_bags.PERIOD for number in shown]
    for (time, message), (number, (picture, labels, vehicles)) in zip(found, shown.items(), strict=True):
        assert (message.header.stamp.sec * 10**9 + message.header.stamp.nanosec, message.frame) == (time, number)
        decision = library.decide(picture)
        saliency = library.explain(decision).map
        seen = objects.viewed_objects(labels, vehicles, saliency.shape)
        expected = objects.explain_objects(library, decision, saliency, seen)
        assert message.sentence == narrator.say(decision.action, expected)
        assert [(o.id, o.kind, o.lane) for o in message.objects] == [
            (t.seen.id, t.seen.kind, t.seen.lane) for t in expected
        ]
        np.testing.assert_allclose([o.effect for o in message.objects], [t.effect for t in expected], atol=1e-6)
        assert any(o.id and o.lane == -1 for o in message.objects)


def test_the_page_of_a_recording_has_each_frames_sentence(segmented, tmp_path, weights):
    path, _ = segmented
    explain_bag(path, tmp_path / "out", "vg", weights)
    said = [message.sentence for _, message in objects_of(tmp_path / "out")]
    with closing(Recorded([tmp_path / "out"])) as recorded:
        rows = recorded.description()["frames"]
    assert [row["decisions"][0]["sentence"] for row in rows] == said
    assert not any("trust" in row["decisions"][0] for row in rows)  # that was the trust in other maps
    with closing(Recorded([path])) as recorded:
        rows = recorded.description()["frames"]
    assert not any("sentence" in row["decisions"][0] for row in rows)
    ages = [row["decisions"][0].get("trust_age") for row in rows]
    assert ages == [None, None, 4.0, pytest.approx(4.05), pytest.approx(4.1), pytest.approx(4.15)]
    assert {row["decisions"][0]["trust"] for row in rows[2:]} == {0.875}


def test_objects_have_the_same_bytes_twice_and_are_made_anew_from_what_was_explained(segmented, tmp_path, weights):
    path, _ = segmented
    explain_bag(path, tmp_path / "first", "vg", weights)
    explain_bag(path, tmp_path / "second", "vg", weights)
    explain_bag(tmp_path / "first", tmp_path / "again", "vg", weights)
    first, second, again = (messages(tmp_path / name)[topics.OBJECTS] for name in ("first", "second", "again"))
    assert first == second
    assert sorted(first) == sorted(again)


def test_a_recording_without_a_segmentation_gets_no_objects(bag, tmp_path, weights):
    explain_bag(bag, tmp_path / "out", "vg", weights)
    with open_bag(tmp_path / "out") as opened:
        assert topics.OBJECTS not in {channel.topic for channel in opened.channels}


@pytest.mark.slow
def test_what_an_interrupted_command_has_made_is_used_by_the_next_one(tmp_path, weights, capsys):
    bag = drive_bags.record(tmp_path / "drive", 20)
    out, whole, hidden = tmp_path / "out", tmp_path / "whole", tmp_path / ".out.tmp"

    def arguments(method, to):
        return ["explain", str(bag), "--out", str(to), "--method", method, "--weights", str(weights)]

    def interrupt(number):
        program = [sys.executable, "-c", INTERRUPTED, str(number.value)]
        done = subprocess.run([*program, *arguments("gbp", out)], capture_output=True, text=True)
        assert done.returncode == (130 if number == signal.SIGINT else -number)
        assert ("run the same command again to resume" in done.stderr) == (number == signal.SIGINT)
        assert hidden.is_dir() and not out.exists()

    interrupt(signal.SIGKILL)
    interrupt(signal.SIGINT)  # as many maps later
    assert command(arguments("gbp", out)) == 0
    (resumed,) = re.findall(r"20 frames explained .*, (\d+) of them before it was interrupted", capsys.readouterr().out)
    assert 10 <= int(resumed) < 18
    assert not hidden.exists()
    assert command(arguments("gbp", whole)) == 0
    assert files(out) == files(whole)

    shutil.rmtree(out)
    interrupt(signal.SIGKILL)
    assert command(arguments("vg", out)) == 0  # other maps
    assert "before it was" not in capsys.readouterr().out
    assert not hidden.exists()


def test_two_commands_do_not_make_the_same_recording(bag, tmp_path, capsys):
    hidden = tmp_path / ".out.tmp"
    with exclusive(hidden, "Held."):
        assert command(["explain", str(bag), "--out", str(tmp_path / "out")]) == 2
    assert "Another command is making" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]


@pytest.fixture
def foreign(tmp_path):
    """Pictures of another camera: another topic and size, bgr8, padded rows, and a topic that nobody here knows."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    path = tmp_path / "foreign"
    kind = topics.PICTURE_TYPE
    with Writer(path, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        camera = writer.add_connection("/front/image_raw", kind, typestore=drive_bags.STORE)
        other = writer.add_connection("/other", "x_msgs/msg/X", msgdef="uint8 x\n", rihs01="RIHS01_" + 64 * "0")
        for number in range(1, 4):
            bgr = drive_bags.picture(number, 128 if number < 3 else 64)[..., ::-1]
            message = drive_bags.image(number * 10**9, bgr, "bgr8", padding=5)
            writer.write(camera, number * 10**9, drive_bags.serialized(kind, message))
            writer.write(other, number * 10**9, b"\0\1\0\0\7")
    return path


def test_a_foreign_cameras_pictures_become_the_drives(foreign, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["explain", str(foreign), "--out", str(out), "--camera", "/front/image_raw", "--weights", str(STUDENT)]
    assert command(arguments) == 0
    printed = capsys.readouterr().out
    assert f"2 frames explained by linear of the policy {STUDENT_HASH}, 1 pictures were refused" in printed
    found = messages(out)
    assert set(found) == {topics.IMAGE, "/other"} | MADE_ANEW
    assert found["/other"] == messages(foreign)["/other"]
    assert found[topics.IMAGE] == messages(foreign)["/front/image_raw"]
    explainer = Explainer.from_checkpoint(STUDENT)
    expected = explainer.explain(explainer.decide(drive_bags.picture(1))).map
    np.testing.assert_array_equal(to_array(decoded(out, topics.SALIENCY)[0]), expected)
    shutil.rmtree(out)
    assert command([*arguments, "--wrong-size", "resize"]) == 0
    assert "3 frames explained" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_leaves_nothing(bag, foreign, tmp_path, capsys):
    unknown = drive_bags.record(tmp_path / "unknown", 1)
    small = drive_bags.record(tmp_path / "small", 2, size=8)
    there = tmp_path / "there"
    there.mkdir()
    out = ["--out", str(tmp_path / "out")]
    for arguments, sentence in [
        ([str(bag), "--out", str(there)], "there exists already: choose another name"),
        ([str(bag), *out, "--weights", str(tmp_path / "none.safetensors")], "Cannot read the policy weights"),
        ([str(unknown), *out], "was driven by 0123456789ab, which does not ship: name a policy with --weights"),
        ([str(foreign), *out], "no pictures on /carla_digr/camera/image; name one of its picture topics: /front"),
        (
            [str(small), *out, "--weights", str(STUDENT)],
            "No picture of .* could be explained: The policy needs",
        ),
        ([str(bag), *out, "--camera", "/carla_digr/saliency"], "could be explained: image encoding '32FC1' is not one"),
    ]:
        assert command(["explain", *arguments]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("carla-digr: "))
        assert re.search(sentence, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "small", "there", "unknown"]
    with pytest.raises(UserError, match="no saliency method"):
        explain_bag(bag, tmp_path / "out", "lime")
