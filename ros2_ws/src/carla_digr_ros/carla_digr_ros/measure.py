"""Node `measure`: watches every topic of a drive and prints its figures, with what must hold, as a line of JSON."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from typing import Any

from carla_digr_msgs.msg import DriveFrame, DrivingDecision
from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import Header

from carla_digr.errors import UserError
from carla_digr.live.measurement import OBJECTS, RATE, Measurement, Memory, ProcessorTime, criteria
from carla_digr.live.page_reader import PageReader
from carla_digr.scheduling import DRIVES, go_first
from carla_digr_ros import topics
from carla_digr_ros.parameters import REALTIME, declare
from carla_digr_ros.receiving import message_of
from carla_digr_ros.running import Stop, run

LAST_ANSWERS_SECONDS = 0.5  # after the last picture
UNKNOWN = "_NODE_NAME_UNKNOWN_"  # the middleware's
SAMPLE_SECONDS = 1.0  # between two looks at the processes' memory


class Measure(Node):
    """Ends by itself after ``duration`` seconds of frames, or prints what there is when it is asked to stop.

    A latency runs from the time at which the bridge's writer stamped the picture to the callback here, both on this
    machine's system clock. Only what the drive's own nodes publish counts.
    """

    def __init__(self) -> None:
        super().__init__("measure")
        duration = declare(self, "duration", 60.0, "drive to measure, s", (1.0, 86400.0))
        page = declare(self, "page", "", "address of a web page to read like a browser; empty: none")
        if declare(self, "realtime", False, REALTIME):
            go_first(DRIVES, alone=True)
        processes = declare(self, "processes", [""], "name=pid of the processes whose CPU time is measured")
        self._pids = {name: int(pid) for name, _, pid in (entry.partition("=") for entry in processes) if pid}
        self._measurement = Measurement(round(duration * RATE))
        self._memory = Memory(self._pids)
        self._processor_time: ProcessorTime | None = None
        self._started = 0.0
        self._page = PageReader(page, self._measurement.on_the_page) if page else None
        self._counting: dict[bytes, bool] = {}  # by publisher
        self._hear(topics.FRAME, self._on_frame)
        self._hear(topics.IMAGE, self._on_image)
        self._hear(topics.ODOMETRY, self._on_odometry)
        self._hear(topics.DECISION, self._on_decision)
        self._hear(topics.SALIENCY, self._on_saliency)
        self._hear(topics.OVERLAY, self._on_overlay)
        self._hear(topics.OBJECTS, self._on_objects)

    def _hear(self, topic: topics.Topic, take: Callable[[bytes, dict[str, Any]], None]) -> None:
        """Have a message's bytes and the times of its transport, unless a stranger has sent it."""

        def heard(data: bytes, info: dict[str, Any]) -> None:
            if self._counts(topic, info):
                take(data, info)

        topic.subscribe(self, heard)

    def _counts(self, topic: topics.Topic, info: dict[str, Any]) -> bool:
        if "publisher_gid" not in info:  # which older versions of rclpy do not tell
            return True
        publisher = bytes(info["publisher_gid"]["data"])
        if publisher not in self._counting:
            there = self.get_publishers_info_by_topic(topic.of(self))
            names = {bytes(found.endpoint_gid)[: len(publisher)]: found.node_name for found in there}
            name = names.get(publisher, UNKNOWN)
            if name == UNKNOWN:
                return False  # its node is heard of later
            self._counting[publisher] = name in topic.publishers
        return self._counting[publisher]

    def close(self) -> None:
        """Leave the page."""
        if self._page is not None:
            self._page.close()

    def run(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Measure, then print."""
        ending = None
        sampled = 0.0
        while not stop.requested and (ending is None or time.monotonic() < ending):
            executor.spin_once(timeout_sec=0.1)
            if self._measurement.started and self._processor_time is None:
                self._processor_time, self._started = ProcessorTime(self._pids), time.monotonic()
            if self._processor_time is not None and time.monotonic() - sampled >= SAMPLE_SECONDS:
                sampled = time.monotonic()
                self._memory.sample()
            if self._measurement.full and ending is None:
                ending = time.monotonic() + LAST_ANSWERS_SECONDS
        self._print()

    def _print(self) -> None:
        if self._processor_time is None:
            raise UserError("No frame with picture, decision, map and overlay came, so there is nothing to measure.")
        figures = self._measurement.figures()
        memory = self._memory.report()
        rows = criteria(figures, self._measurement.wanted, memory)
        report = {
            "held": all(row["held"] for row in rows),
            "criteria": rows,
            "figures": figures,
            "memory": memory,
            **self._processor_time.report(time.monotonic() - self._started),
        }
        print(json.dumps(report), flush=True)

    def _on_frame(self, data: bytes, info: dict[str, Any]) -> None:
        message = message_of(data, DriveFrame)
        self._measurement.facts(
            _stamp(message.header), message.frame, message.episode, bool(message.collision), message.over
        )

    def _on_image(self, data: bytes, info: dict[str, Any]) -> None:
        self._measurement.picture(_stamp_of(data), info["source_timestamp"] * 1e-9)

    def _on_odometry(self, data: bytes, info: dict[str, Any]) -> None:
        message = message_of(data, Odometry)
        self._measurement.motion(_stamp(message.header), message.twist.twist.linear.x)

    def _on_decision(self, data: bytes, info: dict[str, Any]) -> None:
        message = message_of(data, DrivingDecision)
        if message.fallback:
            self._measurement.fallback(_stamp(message.header))
        else:
            self._measurement.answer("decision", _stamp(message.header), time.time())

    def _on_saliency(self, data: bytes, info: dict[str, Any]) -> None:
        self._measurement.answer("saliency", _stamp_of(data), time.time())

    def _on_overlay(self, data: bytes, info: dict[str, Any]) -> None:
        self._measurement.answer("overlay", _stamp_of(data), time.time())

    def _on_objects(self, data: bytes, info: dict[str, Any]) -> None:
        self._measurement.answer(OBJECTS, _stamp_of(data), time.time())


def _stamp(header: Header) -> int:
    return header.stamp.sec * 10**9 + header.stamp.nanosec


def _stamp_of(serialized: bytes) -> int:
    """Of a message that begins with a header, as CDR has it: after four bytes, of which the second tells the order.

    Raises:
        ValueError: it is shorter than that.
    """
    try:
        seconds, nanoseconds = struct.unpack_from("<iI" if serialized[1] & 1 else ">iI", serialized, 4)
    except (IndexError, struct.error):
        raise ValueError(f"{len(serialized)} bytes that have no header") from None
    return seconds * 10**9 + nanoseconds


def main() -> int:
    """Run the node; its exit status."""
    return run(Measure, Measure.run)
