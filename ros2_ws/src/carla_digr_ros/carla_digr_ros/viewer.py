"""Node `viewer`: matches what belongs to one frame by its stamp and feeds the web page."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from carla_digr_msgs.msg import DriveFrame, DrivingDecision
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from carla_digr.driving.control import VehicleCommand, pedals
from carla_digr.live.composition import PAGE_IS_AT
from carla_digr.live.viewer.server import ViewerServer
from carla_digr_ros import topics
from carla_digr_ros.conversion import to_array, to_rgb
from carla_digr_ros.diagnostics import OK, WARN, Recent, Reporter
from carla_digr_ros.parameters import declare
from carla_digr_ros.running import run

PATIENCE = 4  # newer pictures after which a frame is shown without what is still missing


@dataclass
class Parts:
    """What has arrived of one frame; ``arrived`` is the picture's time on the monotonic clock in s."""

    rgb: NDArray | None = None
    arrived: float = math.nan
    facts: DriveFrame | None = None
    odometry: Odometry | None = None
    decision: DrivingDecision | None = None
    fallback: DrivingDecision | None = None
    saliency: NDArray | None = None
    events: list[str] = field(default_factory=list)

    def complete(self) -> bool:
        """Whether nothing more is to be waited for: after a decision comes a map, after a lone fallback nothing."""
        if self.rgb is None:
            return False
        return self.saliency is not None if self.decision is not None else self.fallback is not None


class ViewerNode(Node):
    """Subscribes to picture, decision and map; serves the page on ``host``:``port``."""

    def __init__(self) -> None:
        super().__init__("viewer")
        host = declare(self, "host", "127.0.0.1", "address the page is served on")
        port = declare(self, "port", 8765, "port of the page, 0 for a free one", (0, 65535))
        self._server = ViewerServer(host=host, port=port)
        self._frames: dict[tuple[int, int], Parts] = {}  # by stamp, in order of arrival
        self._shown = Recent()
        self._incomplete = 0
        self._newest = (0, 0)
        Reporter(self, "web page", self._status)
        topics.FRAME.subscribe(self, self._on_frame)
        topics.ODOMETRY.subscribe(self, self._on_odometry)
        topics.IMAGE.subscribe(self, self._on_image)
        topics.DECISION.subscribe(self, self._on_decision)
        topics.SALIENCY.subscribe(self, self._on_saliency)
        self.get_logger().info(f"{PAGE_IS_AT}{self._server.url}")

    def close(self) -> None:
        """End the page's server."""
        self._server.close()

    def _on_frame(self, message: DriveFrame) -> None:
        self._update(message.header, facts=message)

    def _on_odometry(self, message: Odometry) -> None:
        self._update(message.header, odometry=message)

    def _on_image(self, message: Image) -> None:
        try:
            rgb = to_rgb(message)
        except ValueError as error:
            self.get_logger().error(f"Not shown: {error}", throttle_duration_sec=5.0)
            return
        self._update(message.header, rgb=rgb, arrived=time.monotonic())

    def _on_decision(self, message: DrivingDecision) -> None:
        self._update(message.header, **{"fallback" if message.fallback else "decision": message})

    def _on_saliency(self, message: Image) -> None:
        try:
            saliency = to_array(message)
        except ValueError as error:
            self.get_logger().error(f"Not shown: {error}", throttle_duration_sec=5.0)
            return
        self._update(message.header, saliency=saliency)

    def _update(self, header: Header, **parts: Any) -> None:
        key = header.stamp.sec, header.stamp.nanosec
        if key not in self._frames and key <= self._newest:
            return  # shown already
        frame = self._frames.setdefault(key, Parts())
        for name, value in parts.items():
            setattr(frame, name, value)
        pictures = [stamp for stamp, parts in self._frames.items() if parts.rgb is not None]
        if frame.complete():
            self._show(key)
        elif len(pictures) > PATIENCE:
            self._incomplete += 1
            self._show(pictures[0])

    def _show(self, key: tuple[int, int]) -> None:
        frame = self._frames[key]
        decision = _for_the_page(frame)
        if frame.saliency is not None:
            decision["latency_ms"] = (time.monotonic() - frame.arrived) * 1000.0
        self._shown.add(decision.get("latency_ms", math.nan))
        assert frame.rgb is not None
        number = frame.facts.frame if frame.facts else 0  # a camera without a bridge has no numbers
        self._server.publish(key[0] + key[1] * 1e-9, number, frame.rgb, frame.saliency, decision)
        # What is older comes too late; the page runs forward only.
        self._newest = max(self._newest, key)
        self._frames = {stamp: parts for stamp, parts in self._frames.items() if stamp > key}

    def _status(self):
        page = self._server.status()
        values = {
            "page": self._server.url,
            "frames (Hz)": self._shown.rate(),
            "frame to map p50 (ms)": self._shown.latency(50),
            "frame to map p99 (ms)": self._shown.latency(99),
            "frames shown incomplete": self._incomplete,
            "clients": len(page["clients"]),
            "frames dropped for slow clients": sum(client["dropped"] for client in page["clients"]),
        }
        if self._shown.rate() == 0.0:
            return WARN, "No frames", values
        return OK, f"{self._shown.rate():.1f} frames/s, {len(page['clients'])} clients", values


def _for_the_page(frame: Parts) -> dict[str, Any]:
    """The decision as `ViewerServer.publish` wants it; a fallback's control replaces the policy's."""
    shown: dict[str, Any] = {"fallback": frame.fallback is not None}
    message = frame.decision or frame.fallback
    if message is not None:
        shown.update(
            action_names=list(message.action_names),
            probabilities=list(message.probabilities),
            action=message.action,
            value=message.value,
            policy_hash=message.policy_hash,
            inference_ms=message.inference_ms,
            saliency_ms=message.saliency_ms,
        )
    applied = frame.fallback or frame.decision
    if applied is not None:
        wanted = VehicleCommand(applied.steer, applied.throttle, applied.brake, applied.target_speed)
        speed = frame.odometry.twist.twist.linear.x if frame.odometry else math.nan
        throttle, brake = pedals(wanted, speed)  # what the cruise control makes of it at this speed
        shown.update(throttle=throttle, steer=applied.steer, brake=brake)
    if frame.saliency is not None:
        shown["saliency_flat"] = not frame.saliency.any()
    facts = frame.facts
    if facts is not None:
        shown["events"] = (["collision"] if facts.collision else []) + (["off the road"] if facts.off_road else [])
        if facts.over:
            shown["status"] = "The episode is over; the next one starts in a moment."
    return shown


def main() -> int:
    """Run the node; its exit status."""
    return run(ViewerNode)
