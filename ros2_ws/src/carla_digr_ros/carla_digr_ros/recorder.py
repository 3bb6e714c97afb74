"""Node `recorder`: every topic of the drive into a bag, off the hot path."""

from __future__ import annotations

import queue
import struct
import threading
import time
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock

from carla_digr import __version__
from carla_digr.errors import UserError
from carla_digr.files import sha256_of
from carla_digr.live.composition import WEIGHTS
from carla_digr.live.recording import Channel, Recorder, definition, offered_qos, typestore
from carla_digr_ros import topics
from carla_digr_ros.diagnostics import ERROR, OK, WARN, Recent, Reporter
from carla_digr_ros.parameters import declare
from carla_digr_ros.running import run

COMMIT_SECONDS = 0.9  # a kill loses what came since: with the time to write, at most a second
DEPTH = 400  # messages of a topic that wait in the middleware while this process is held up
QUEUED = 2000  # messages that wait for the writer thread


class RecorderNode(Node):
    """Subscribes to all of `topics.TOPICS` raw; callbacks only queue, one thread writes.

    A message's time in the bag is its header's stamp (or the clock's), which is simulation time; diagnostics, which
    are stamped by the wall clock, get the time of the message before them.
    """

    def __init__(self) -> None:
        super().__init__("recorder")
        directory = declare(
            self, "directory", "recordings", "where the drive's bag is made, with its start as its name"
        )
        weights = Path(declare(self, "weights", str(WEIGHTS), "the policy that drives; its hash is recorded"))
        store = typestore(Path(get_package_share_directory("carla_digr_msgs")) / "msg")
        try:
            digest = sha256_of(weights)
        except OSError as error:
            raise UserError(f"Cannot read the policy weights {weights}: {error.strerror}.") from error
        started = time.strftime("%Y-%m-%d-%H-%M-%S")
        facts = {
            "policy_hash": digest[:12],
            "policy_sha256": digest,
            "policy_file": weights.name,
            "started": started,
            "carla_digr": __version__,
        }
        self._queue: queue.Queue[tuple[Channel, bytes, bool] | None] = queue.Queue(QUEUED)
        self._lost = 0
        self._rate = Recent()
        channels = []
        for topic in topics.TOPICS:
            kind = _type_name(topic.type)
            latched = topic.qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
            channels.append(Channel(topic.name, kind, definition(store, kind), offered_qos(latched)))
        self._recorder = Recorder(Path(directory) / f"drive-{started}", channels, facts)
        for topic, channel in zip(topics.TOPICS, channels, strict=True):
            self._record(topic, channel)
        Reporter(self, "recording", self._status)
        self._writer = threading.Thread(target=self._write, name="writer")
        self._writer.start()
        self.get_logger().info(f"Recording to {self._recorder.path}")

    def close(self) -> None:
        """Finish the bag."""
        self._queue.put(None)
        self._writer.join()
        self._recorder.commit()
        self._recorder.close()
        if self._recorder.problem:
            self.get_logger().error(self._recorder.problem)

    def _record(self, topic: topics.Topic, channel: Channel) -> None:
        fields = list(topic.type.get_fields_and_field_types())
        stamped = topic.type is Clock or (fields[0] == "header" and topic is not topics.DIAGNOSTICS)

        def keep(data: bytes) -> None:
            self._rate.add()
            try:
                self._queue.put_nowait((channel, data, stamped))
            except queue.Full:
                self._lost += 1

        qos = QoSProfile(depth=DEPTH, durability=topic.qos.durability)
        self.create_subscription(topic.type, topic.name, keep, qos, raw=True)

    def _write(self) -> None:
        due = time.monotonic() + COMMIT_SECONDS
        while True:
            try:
                entry = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if entry is None:
                    return
                channel, data, stamped = entry
                self._recorder.add(channel, data, _stamp(data) if stamped else None)
            if time.monotonic() >= due:
                before = self._recorder.problem
                self._recorder.commit()
                if self._recorder.problem and not before:
                    self.get_logger().error(self._recorder.problem)
                due = time.monotonic() + COMMIT_SECONDS

    def _status(self):
        lost = self._lost + self._recorder.dropped
        values = {
            "recording": str(self._recorder.path),
            "messages recorded": self._recorder.messages,
            "messages (Hz)": self._rate.rate(),
            "messages waiting": self._queue.qsize(),
            "messages lost": lost,
        }
        if self._recorder.problem:
            return ERROR, self._recorder.problem, values
        if lost:
            return WARN, f"{lost} messages were not recorded", values
        return OK, f"{self._rate.rate():.0f} messages/s", values


def _type_name(message_class: type) -> str:
    return f"{message_class.__module__.split('.')[0]}/msg/{message_class.__name__}"


def _stamp(data: bytes) -> int:
    """ns; a stamp is the first thing in a Clock and in every message that begins with a header (CDR, 4 bytes on)."""
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds * 10**9 + nanoseconds


def main() -> int:
    """Run the node; its exit status."""
    return run(RecorderNode)
