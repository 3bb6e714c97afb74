"""The node `recorder` with a publisher in another process: what arrives is in the bag, whatever ends it."""

from __future__ import annotations

import json
import signal

import live_support
import numpy as np
import pytest
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory

live_support.workspace()

from builtin_interfaces.msg import Time  # noqa: E402
from carla_digr_msgs.msg import (  # noqa: E402
    DriveEvent,
    DriveFrame,
    DrivingDecision,
    ExplainedObject,
    ExplainedObjects,
    MapTrust,
    Vehicle,
    VehicleControl,
    Vehicles,
)
from carla_digr_ros import conversion, topics  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CameraInfo  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from carla_digr.cli import main as command  # noqa: E402
from carla_digr.errors import UserError  # noqa: E402
from carla_digr.files import sha256_of  # noqa: E402
from carla_digr.live.composition import Process  # noqa: E402
from carla_digr.recordings.bag import open_bag  # noqa: E402
from carla_digr.recordings.topics import FACTS_TOPIC, TYPES  # noqa: E402

pytestmark = pytest.mark.alone

NAMES = {topic.name for topic in topics.TOPICS}
PER_FRAME = 18  # messages that `Drive.frame` sends


def test_recordings_know_the_types_of_the_tables_topics():
    own = {topic.name: f"{topic.type.__module__.split('.')[0]}/msg/{topic.type.__name__}" for topic in topics.TOPICS}
    assert own == {name: kind for name, kind in TYPES.items() if name != FACTS_TOPIC}


class Drive:
    """Publishes all topics of a drive but the diagnostics of others."""

    def __init__(self, observer):
        self._observer = observer
        # Deeper than the table's: nothing paces this drive, and the recorder must still get all of it.
        self.out = {
            t.name: observer.node.create_publisher(t.type, t.name, QoSProfile(depth=1000, durability=t.qos.durability))
            for t in topics.TOPICS
        }
        observer.until(lambda: all(out.get_subscription_count() for out in self.out.values()))
        self.number = 0

    def frame(self) -> None:
        self.number += 1
        header = Header(stamp=Time(sec=self.number // 20, nanosec=self.number % 20 * 50_000_000))
        random = np.random.default_rng(self.number)
        picture = random.integers(0, 256, (128, 128, 3), np.uint8)
        saliency = random.random((128, 128), np.float32)
        for name, message in {
            topics.CLOCK.name: Clock(clock=header.stamp),
            topics.FRAME.name: DriveFrame(header=header, frame=self.number, seed=7),
            topics.ODOMETRY.name: Odometry(header=header),
            topics.TF.name: conversion.ego_transform(Odometry(header=header)),
            topics.TF_STATIC.name: conversion.camera_transforms(),
            topics.MARKERS.name: conversion.markers(header, []),
            topics.EVENTS.name: DriveEvent(header=header, kind=DriveEvent.LANE_CHANGE, lanes=1),
            topics.CAMERA_INFO.name: CameraInfo(header=header),
            topics.IMAGE.name: conversion.to_message(picture, "rgb8", header),
            topics.DECISION.name: DrivingDecision(header=header, probabilities=[0.25] * 4, policy_hash="abc"),
            topics.SALIENCY.name: conversion.to_message(saliency, "32FC1", header),
            topics.OVERLAY.name: conversion.to_message(picture, "rgb8", header),
            topics.OBSERVATION.name: conversion.to_message(picture, "rgb8", header),
            topics.INSTANCES.name: conversion.to_message(picture, "rgb8", header),
            topics.VEHICLES.name: Vehicles(header=header, vehicles=[Vehicle(id=self.number, lane=-1)]),
            topics.OBJECTS.name: ExplainedObjects(
                header=header, sentence="Brakes.", objects=[ExplainedObject(kind="car", effect=0.5)]
            ),
            topics.TRUST.name: MapTrust(header=header, agreement=0.9),
            topics.MANUAL.name: VehicleControl(header=header, brake=1.0),
        }.items():
            self.out[name].publish(message)

    def frames_until(self, condition) -> None:
        live_support.until(condition, lambda: (self.frame(), self._observer.spin()))


@pytest.fixture
def record(start, observe, weights, tmp_path):
    """A recorder at work: its process, its diagnostics, the drive that it hears and a function for its bag."""
    directory = tmp_path / "recordings"

    def begin(fault: str = ""):
        process = Process("recorder", parameters={"directory": str(directory), "weights": str(weights)})
        running = start(process, fault)
        observer = observe(topics.DIAGNOSTICS.name)
        return running, observer, Drive(observer), lambda: next(directory.iterdir())

    return begin


def status(observer) -> dict:
    """What the recorder said last about itself."""
    for message in reversed(observer.received[topics.DIAGNOSTICS.name]):
        for part in message.status:
            if part.name.startswith("recorder"):
                return {"level": part.level, "message": part.message, **{v.key: v.value for v in part.values}}
    return {"messages recorded": "0", "level": None, "message": ""}


def independently(path) -> dict[str, list]:
    """topic -> (log time, message), read by mcap and mcap-ros2-support."""
    (file,) = path.glob("*.mcap")
    found: dict[str, list] = {}
    with file.open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        chunks = reader.get_summary().chunk_indexes
        assert chunks and {chunk.compression for chunk in chunks} == {"zstd"}
        for _, channel, message, decoded in reader.iter_decoded_messages():
            found.setdefault(channel.topic, []).append((message.log_time, decoded))
    return found


def test_every_message_is_in_the_bag_for_independent_readers(record, weights):
    running, observer, drive, bag = record()
    for _ in range(60):
        drive.frame()
    observer.until(lambda: int(status(observer)["messages recorded"]) >= 60 * PER_FRAME)
    assert running.end() == 0, running.output
    found = independently(bag())
    assert set(found) == NAMES | {FACTS_TOPIC}
    for name in NAMES - {topics.DIAGNOSTICS.name}:
        assert len(found[name]) == 60, name
    for time, message in found[topics.SALIENCY.name]:
        assert time == message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        expected = np.random.default_rng(round(time / 5e7))
        expected.integers(0, 256, (128, 128, 3), np.uint8)
        assert bytes(message.data) == expected.random((128, 128), np.float32).tobytes()
    assert [message.frame for _, message in found[topics.FRAME.name]] == list(range(1, 61))
    assert {message.policy_hash for _, message in found[topics.DECISION.name]} == {"abc"}
    assert [message.vehicles[0].id for _, message in found[topics.VEHICLES.name]] == list(range(1, 61))
    for name in (topics.TF.name, topics.MARKERS.name):  # the time of the bag is that of the first in the list
        for time, message in found[name]:
            header = (message.transforms if name == topics.TF.name else message.markers)[0].header
            assert time == header.stamp.sec * 10**9 + header.stamp.nanosec
    assert {m.objects[0].kind for _, m in found[topics.OBJECTS.name]} == {"car"}
    times = [time for messages in found.values() for time, _ in messages]
    assert (min(times), max(times)) == (50_000_000, 3_000_000_000)  # wall-clock stamps would be in another century
    ((time, facts),) = found[FACTS_TOPIC]
    assert time == 50_000_000
    assert json.loads(facts.data)["policy_sha256"] == sha256_of(weights)
    with open_bag(bag()) as opened:  # and rosbags reads the same
        assert opened.messages == len(times)
        assert sorted(time for _, time, _ in opened.read()) == sorted(times)


def test_a_kill_loses_at_most_the_last_second_and_the_rest_is_repaired(record, weights):
    running, observer, drive, bag = record()
    # Everything that had been received a second before the kill: reported, then another report.
    drive.frames_until(lambda: int(status(observer)["messages recorded"]) > 500)
    safe, reports = int(status(observer)["messages recorded"]), len(observer.received[topics.DIAGNOSTICS.name])
    drive.frames_until(lambda: len(observer.received[topics.DIAGNOSTICS.name]) >= reports + 2)
    running.end(signal.SIGKILL)
    killed = bag()
    assert not (killed / "metadata.yaml").exists()
    with pytest.raises(UserError, match=r"unfinished or damaged.*carla-digr repair"), open_bag(killed):
        pass
    assert command(["repair", str(killed)]) == 0
    found = independently(killed.with_name(killed.name + "-repaired"))
    assert set(found) >= NAMES - {topics.DIAGNOSTICS.name}
    assert sum(map(len, found.values())) >= safe
    assert json.loads(found[FACTS_TOPIC][0][1].data)["policy_sha256"] == sha256_of(weights)
    assert [message.frame for _, message in found[topics.FRAME.name]] == list(
        range(1, len(found[topics.FRAME.name]) + 1)
    )


def test_a_full_disk_is_reported_and_recording_goes_on_when_there_is_room(record, tmp_path):
    # The node's own process with a limit on file sizes, which a write meets with EFBIG as a full disk with ENOSPC.
    fault = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))"
    )
    running, observer, drive, bag = record(fault)
    drive.frames_until(lambda: status(observer)["level"] == b"\x02")
    assert status(observer)["message"].startswith(f"Cannot write the recording {bag()}: ")
    import resource

    resource.prlimit(running.popen.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    drive.frames_until(lambda: status(observer)["level"] == b"\x00")
    assert running.end() == 0, running.output
    found = independently(bag())
    frames = [message.frame for _, message in found[topics.FRAME.name]]
    assert frames == list(range(1, len(frames) + 1))  # nothing was lost while it waited in memory
    assert next(bag().glob("*.mcap")).stat().st_size > 2_000_000


def test_diagnostics_come_from_the_simulation_time_of_the_drive(record):
    running, observer, drive, bag = record()
    drive.out[topics.DIAGNOSTICS.name].publish(DiagnosticArray(header=Header(stamp=Time(sec=1_700_000_000))))
    drive.frame()
    observer.until(lambda: int(status(observer)["messages recorded"]) >= PER_FRAME)
    assert running.end() == 0, running.output
    found = independently(bag())
    assert {time for messages in found.values() for time, _ in messages} == {50_000_000}
    stamps = {message.header.stamp.sec for _, message in found[topics.DIAGNOSTICS.name]}
    assert 1_700_000_000 in stamps
