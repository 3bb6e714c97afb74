"""Node `recorder`: every topic of the drive into a bag, off the hot path."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from carla_digr_msgs.msg import DriveFrame
from rclpy.clock import Clock as NodeClock
from rclpy.clock import ClockType
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosbags.typesys.store import Typestore
from rosgraph_msgs.msg import Clock

from carla_digr import __version__
from carla_digr.errors import UserError
from carla_digr.files import WEIGHTS_BYTES, sha256_of
from carla_digr.live.composition import WEIGHTS
from carla_digr.recordings.bag import Channel, offered_qos
from carla_digr.recordings.definitions import definition, typestore
from carla_digr.recordings.drive import FIRST, LISTED, stamp_of
from carla_digr.recordings.recorder import Recorder
from carla_digr_ros import topics
from carla_digr_ros.diagnostics import ERROR, OK, WARN, Recent, Reporter, Seldom
from carla_digr_ros.parameters import declare
from carla_digr_ros.receiving import message_of
from carla_digr_ros.running import ManagedNode, run

COMMIT_SECONDS = 0.9  # a kill loses what came since: with the time to write, at most a second
DEPTH = 400  # messages of a topic that wait in the middleware while this process is held up
EXPLAINER_SECONDS = 30.0  # longest wait for an explainer before the pictures are recorded alone
QUEUED, QUEUED_BYTES = 10_000, 1 << 28  # messages that wait for the writer thread
LONGEST_GAP = 10_000  # frames; what is longer is no bridge's
LONGEST_NOTE = 10_000  # characters, of which frames a recording lacks

Entry = tuple[Channel, bytes, int | None, str]  # of the queue: a message, its stamp in ns and its publisher


class RecorderNode(ManagedNode):
    """Subscribes to all of `topics.TOPICS` raw; callbacks only queue, one thread writes. A bag for each configuration.

    A message's time in the bag is the stamp of its header (or the clock's), which is simulation time; what is stamped
    by the wall clock, diagnostics and a human's control, gets the latest time. Topics have their names of the root
    namespace in the bag, wherever the drive was.
    """

    def __init__(self) -> None:
        super().__init__("recorder")
        self._directory = declare(
            self, "directory", "recordings", "where the drive's bag is made, with its start as its name"
        )
        self._weights = declare(self, "weights", str(WEIGHTS), "the policy that drives; its hash is recorded")
        self._queue: queue.Queue[Entry | None] = queue.Queue(QUEUED)
        self._recorder: Recorder | None = None
        self._writer: threading.Thread | None = None
        self._failure = ""
        self._lost = 0
        self._taken = self._written = 0  # bytes
        self._last_frame = 0, 0  # its episode and number
        self._lacking = 0
        self._jump_told, self._gap_told = Seldom(), Seldom()
        self._rate = Recent()
        Reporter(self, "recording", self._status)

    def configure(self) -> None:
        """Make a bag.

        Raises:
            UserError: the weights cannot be read, or the bag cannot be made.
        """
        weights = Path(self._weights)
        try:
            digest = sha256_of(weights, WEIGHTS_BYTES)
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
        store = typestore(Path(get_package_share_directory("carla_digr_msgs")) / "msg")
        self._channels = [_channel(topic, store) for topic in topics.TOPICS]
        self._recorder = Recorder(Path(self._directory) / f"drive-{started}", self._channels, facts)
        self._lost, self._failure, self._lacking = 0, "", 0
        self._writer = threading.Thread(target=self._write, args=(self._recorder,), name="writer")
        self._writer.start()
        self.get_logger().info(f"Recording to {self._recorder.path}")

    def activate(self) -> None:
        """Hear the drive."""
        for topic, channel in zip(topics.TOPICS, self._channels, strict=True):
            if topic is not topics.IMAGE:
                self._record(topic, channel)
        # The bridge begins when its pictures are heard; from then on nothing of the explainer's may be missed either.
        self._begun = time.monotonic()
        self._completion = self.create_timer(0.05, self._complete, clock=NodeClock(clock_type=ClockType.STEADY_TIME))

    def deactivate(self) -> None:
        """Hear no more of it."""
        self.destroy_timer(self._completion)

    def _complete(self) -> None:
        heard = all(
            self.count_publishers(topic.of(self)) for topic in (topics.DECISION, topics.SALIENCY, topics.OVERLAY)
        )
        if heard or time.monotonic() - self._begun > EXPLAINER_SECONDS:
            self._completion.cancel()
            self._record(topics.IMAGE, self._channels[topics.TOPICS.index(topics.IMAGE)])

    def close(self) -> None:
        """Finish the bag."""
        if self._recorder is None or self._writer is None:
            return
        self._queue.put(None)
        self._writer.join()
        self._recorder.commit()
        self._recorder.close()
        if self._recorder.problem:
            self.get_logger().error(self._recorder.problem)
        self._recorder = self._writer = None

    def _record(self, topic: topics.Topic, channel: Channel) -> None:
        fields = list(topic.type.get_fields_and_field_types())
        wall = topic in (topics.DIAGNOSTICS, topics.MANUAL)
        listed = topic in (topics.TF, topics.MARKERS)  # the stamp is that of the first in a list
        stamped = topic.type is Clock or listed or (fields[0] == "header" and not wall)
        place = (LISTED if listed else FIRST) if stamped else None

        def keep(data: bytes, info: Any) -> None:
            stamp = None if place is None else stamp_of(data, place)
            if topic is topics.FRAME:
                self._look_for_a_gap(message_of(data, DriveFrame))
            self._rate.add()
            if self._taken - self._written > QUEUED_BYTES or self._queue.full():
                self._lost += 1
                return
            self._taken += len(data)
            self._queue.put_nowait((channel, data, stamp, str(info.get("publisher_gid"))))

        qos = QoSProfile(depth=DEPTH, durability=topic.qos.durability)
        self.heard.append(self.create_subscription(topic.type, topic.relative, keep, qos, raw=True))

    def _write(self, recorder: Recorder) -> None:
        """The writer thread, until None comes."""
        due = time.monotonic() + COMMIT_SECONDS
        while True:
            entry: Entry | tuple[()] | None
            try:
                entry = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                entry = ()
            if entry is None:
                return
            try:
                if entry:
                    self._add(recorder, *entry)
                if time.monotonic() >= due:
                    due = time.monotonic() + COMMIT_SECONDS
                    before = recorder.problem
                    recorder.commit()
                    if recorder.problem and not before:
                        self.get_logger().error(recorder.problem)
            except Exception as error:  # one message is lost, not the recording
                self._lost += 1
                self._failure = f"A message{f' of {entry[0].topic}' if entry else ''} was not recorded: {error!r}"

    def _add(self, recorder: Recorder, channel: Channel, data: bytes, stamp: int | None, source: str) -> None:
        jumps = recorder.jumps
        self._written += len(data)
        recorder.add(channel, data, stamp, source)
        if recorder.jumps > jumps and self._jump_told():
            self.get_logger().warning(
                f"The clock of {channel.topic} jumped: in the recording time goes on where it was"
            )

    def _look_for_a_gap(self, frame: DriveFrame) -> None:
        """The bridge numbers the frames of an episode one after the other."""
        episode, before = self._last_frame
        self._last_frame = frame.episode, frame.frame
        lacking = frame.frame - before - 1
        if episode == frame.episode and 0 < lacking < LONGEST_GAP:
            self._lacking += lacking
            part = f"{before + 1}-{frame.frame - 1}"
            assert self._recorder is not None
            noted = self._recorder.notes.get("frames_lacking", "")
            if len(noted) < LONGEST_NOTE:
                self._recorder.notes["frames_lacking"] = ", ".join(filter(None, [noted, part]))
            if self._gap_told():
                self.get_logger().warning(f"The recording lacks {lacking} frames, {part}")

    def _status(self):
        recorder = self._recorder
        if recorder is None:
            return WARN, "not configured", {}
        lost = self._lost + recorder.dropped
        values = {
            "recording": str(recorder.path),
            "messages recorded": recorder.messages,
            "messages (Hz)": self._rate.rate(),
            "messages waiting": self._queue.qsize(),
            "messages lost": lost,
            "frames lacking": self._lacking,
            "jumps of a clock": recorder.jumps,
        }
        if recorder.problem or self._failure:
            return ERROR, recorder.problem or self._failure, values
        if lost or self._lacking:
            return WARN, f"{lost} messages and {self._lacking} frames were not recorded", values
        return OK, f"{self._rate.rate():.0f} messages/s", values


def _channel(topic: topics.Topic, store: Typestore) -> Channel:
    latched = topic.qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
    return Channel(topic.name, topic.type_name, definition(store, topic.type_name), offered_qos(latched))


def main() -> int:
    """Run the node; its exit status."""
    return run(RecorderNode)
