"""`carla-digr live --record`, `explain` and `replay`, each as a user starts it: one drive, kept and shown again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import live_support
import pytest

from carla_digr.cli import main as command
from carla_digr.recordings import topics
from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.drive import Decoder, read_drive, stamp_of

pytestmark = pytest.mark.alone


def carla_digr(*arguments: str, **options) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("AMENT_PREFIX_PATH", "ROS_DOMAIN_ID")}
    return subprocess.Popen([sys.executable, "-m", "carla_digr.cli", *arguments], env=environment, **options)


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """A drive of the policy that ships, ended by Ctrl-C."""
    directory = tmp_path_factory.mktemp("drive") / "recordings"
    port = str(live_support.free_port())
    drive = carla_digr("live", "--port", port, "--viewer", "false", "--lockstep", "true", "--record", str(directory))
    try:
        live_support.until(lambda: drive.poll() is not None or any(f.stat().st_size > 3e6 for f in files(directory)))
        drive.send_signal(signal.SIGINT)
        assert drive.wait(live_support.LIMIT) == 0
    finally:
        drive.kill()
    (path,) = directory.iterdir()
    return path


def files(directory):
    return list(directory.glob("*/*.mcap"))


def explanations(bag):
    """(topic, stamp) -> what the explainer made of a frame."""
    decode, found = Decoder(), {}
    with open_bag(bag) as opened:
        for channel, _, data in opened.read():
            if channel.topic in (topics.SALIENCY, topics.OVERLAY):
                found[channel.topic, stamp_of(data)] = data
            elif channel.topic == topics.DECISION and not (message := decode(channel, data)).fallback:
                values = message.probabilities.tobytes(), message.action, message.value, message.policy_hash
                found[channel.topic, stamp_of(data)] = message.frame, values
    return found


def test_a_recorded_drive_is_whole_from_its_first_frame(bag):
    with open_bag(bag) as opened:
        drive = read_drive(opened)
    assert len(drive.frames) >= 20
    numbers = [frame.number for frame in drive.frames]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    for frame in drive.frames[:-2]:  # when a drive is ended, the last is under way, and the map of the one before it
        assert frame.policy is not None and frame.saliency and frame.facts and frame.odometry, frame.number
    assert {frame.policy.policy_hash for frame in drive.frames[:-1]} == {drive.facts["policy_hash"]}


def test_explained_by_the_same_policy_it_has_the_live_maps_byte_for_byte(bag, tmp_path):
    assert command(["explain", str(bag), "--out", str(tmp_path / "explained")]) == 0
    live, again = explanations(bag), explanations(tmp_path / "explained")
    assert len(live) > 60
    for key, made in live.items():
        if key[0] == topics.DECISION and not made[0]:  # the picture came before the frame's number, on another topic
            again[key] = 0, again[key][1]
        assert again[key] == made, key


def test_replayed_it_ends_by_itself(bag):
    replay = carla_digr(
        "replay", str(bag), "--rate", "5", "--viewer-port", str(live_support.free_port()), stdout=subprocess.PIPE
    )
    output, _ = replay.communicate(timeout=live_support.LIMIT)
    assert replay.returncode == 0
    assert b"The page is at http://127.0.0.1:" in output


def test_a_replay_of_nothing_is_one_sentence(tmp_path):
    replay = carla_digr("replay", str(tmp_path / "none"), "--viewer", "false", stderr=subprocess.PIPE, text=True)
    _, errors = replay.communicate(timeout=live_support.LIMIT)
    assert replay.returncode == 2
    assert errors == f"carla-digr: There is no recording {tmp_path / 'none'}.\n"
