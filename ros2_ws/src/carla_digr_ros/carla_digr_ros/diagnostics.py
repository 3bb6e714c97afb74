"""What a node says about itself on /diagnostics: one status a part, once a second, by the ROS conventions."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from carla_digr_ros.receiving import Receiver
from carla_digr_ros.running import ManagedNode
from carla_digr_ros.topics import DIAGNOSTICS

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


class Seldom:
    """Whether something may be told again, which is so every few seconds.

    rclpy's own throttle asks which line calls it, each time: half a millisecond for a message that is not told.
    """

    def __init__(self, seconds: float = 5.0):
        self._seconds, self._told = seconds, -math.inf

    def __call__(self) -> bool:
        """Whether it may be told now; then it counts as told."""
        now = time.monotonic()
        if now - self._told < self._seconds:
            return False
        self._told = now
        return True


class Recent:
    """Rate and latency of the events of the last seconds (wall clock); one thread adds them, any thread asks."""

    def __init__(self, seconds: float = 5.0):
        self._seconds = seconds
        self._events: deque[tuple[float, float]] = deque()

    def add(self, latency_ms: float = math.nan) -> None:
        """One event, now."""
        now = time.monotonic()
        self._events.append((now, latency_ms))
        while now - self._events[0][0] > self._seconds:
            self._events.popleft()

    def rate(self) -> float:
        """Events a second, 0 without two of them in the last seconds."""
        times = [moment for moment, _ in self._events.copy() if time.monotonic() - moment <= self._seconds]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0

    def latency(self, percentile: float) -> float:
        """A percentile of the latencies in ms; NaN without any."""
        values = [latency for _, latency in self._events.copy() if not math.isnan(latency)]
        return float(np.percentile(values, percentile)) if values else math.nan


class Reporter:
    """Publishes what `status` returns, (level, message, values), once a second of wall time.

    By the steady clock: a simulation that stands still must be reported too, as is a node that is not active.
    """

    def __init__(self, node: Node, part: str, status: Callable[[], tuple[bytes, str, dict[str, object]]]):
        self._node = node
        self._name = f"{node.get_name()}: {part}"
        self._status = status
        self._publisher = DIAGNOSTICS.publisher(node)
        node.create_timer(1.0 / DIAGNOSTICS.rate, self.report, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def report(self) -> None:
        """Publish now."""
        level, message, values = self._status()
        if isinstance(self._node, ManagedNode):
            if not self._node.active:
                level, message = OK, "not active"
            if self._node.incompatible_qos:
                values["incompatible QoS"] = ", ".join(f"{t} ({p})" for t, p in self._node.incompatible_qos.items())
        receiver = self._node.executor
        if isinstance(receiver, Receiver):
            values["messages refused"] = receiver.refused.total()
            if receiver.refusal and level == OK:
                level, message = WARN, receiver.refusal
            elif receiver.refusal:  # beside other trouble
                values["refused"] = receiver.refusal
        status = DiagnosticStatus(
            level=level,
            name=self._name,
            message=message,
            hardware_id="carla_digr",
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )
        array = DiagnosticArray(status=[status])
        array.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(array)


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
