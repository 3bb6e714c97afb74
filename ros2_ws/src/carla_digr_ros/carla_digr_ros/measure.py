"""Node `measure`: watches every topic of a drive and prints its figures, with what must hold, as a line of JSON."""

from __future__ import annotations

import json
import struct
import time

from carla_digr_msgs.msg import DriveFrame, DrivingDecision
from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import Header

from carla_digr.errors import UserError
from carla_digr.live.measurement import OBJECTS, RATE, Measurement, Memory, ProcessorTime, criteria
from carla_digr.live.page_reader import PageReader
from carla_digr_ros import topics
from carla_digr_ros.parameters import declare
from carla_digr_ros.receiving import subscribe
from carla_digr_ros.running import Stop, run

LAST_ANSWERS_SECONDS = 0.5  # after the last picture
SAMPLE_SECONDS = 1.0  # between two looks at the processes' memory


class Measure(Node):
    """Ends by itself after ``duration`` seconds of frames, or prints what there is when it is asked to stop.

    A latency runs from the time at which the bridge's writer stamped the picture to the callback here, both on this
    machine's system clock.
    """

    def __init__(self) -> None:
        super().__init__("measure")
        duration = declare(self, "duration", 60.0, "drive to measure, s", (1.0, 86400.0))
        page = declare(self, "page", "", "address of a web page to read like a browser; empty: none")
        processes = declare(self, "processes", [""], "name=pid of the processes whose CPU time is measured")
        self._pids = {name: int(pid) for name, _, pid in (entry.partition("=") for entry in processes) if pid}
        self._measurement = Measurement(round(duration * RATE))
        self._memory = Memory(self._pids)
        self._processor_time: ProcessorTime | None = None
        self._started = 0.0
        self._page = PageReader(page, self._measurement.on_the_page) if page else None
        subscribe(self, topics.FRAME, self._on_frame)
        topics.IMAGE.subscribe(self, self._on_image)
        subscribe(self, topics.ODOMETRY, self._on_odometry)
        subscribe(self, topics.DECISION, self._on_decision)
        topics.SALIENCY.subscribe(self, self._on_saliency)
        topics.OVERLAY.subscribe(self, self._on_overlay)
        topics.OBJECTS.subscribe(self, self._on_objects)

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

    def _on_frame(self, message: DriveFrame) -> None:
        self._measurement.facts(
            _stamp(message.header), message.frame, message.episode, bool(message.collision), message.over
        )

    # A callback with two arguments gets the times of the transport as well.
    def _on_image(self, message: bytes, info: dict) -> None:
        self._measurement.picture(_stamp_of(message), info["source_timestamp"] * 1e-9)

    def _on_odometry(self, message: Odometry) -> None:
        self._measurement.motion(_stamp(message.header), message.twist.twist.linear.x)

    def _on_decision(self, message: DrivingDecision) -> None:
        if message.fallback:
            self._measurement.fallback(_stamp(message.header))
        else:
            self._measurement.answer("decision", _stamp(message.header), time.time())

    def _on_saliency(self, message: bytes) -> None:
        self._measurement.answer("saliency", _stamp_of(message), time.time())

    def _on_overlay(self, message: bytes) -> None:
        self._measurement.answer("overlay", _stamp_of(message), time.time())

    def _on_objects(self, message: bytes) -> None:
        self._measurement.answer(OBJECTS, _stamp_of(message), time.time())


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
