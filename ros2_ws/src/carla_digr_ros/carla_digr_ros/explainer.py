"""Node `explainer`: for every camera frame the policy's decision, and after it the map that explains it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from carla_digr_msgs.msg import DriveFrame, DrivingDecision
from numpy.typing import NDArray
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from carla_digr.driving.control import ACTION_NAMES, command
from carla_digr.errors import UserError
from carla_digr.live.composition import WEIGHTS
from carla_digr.live.explainer import Decision, Explainer, Saliency
from carla_digr.saliency import METHODS
from carla_digr.saliency.overlay import COLORMAPS, overlay
from carla_digr_ros import topics
from carla_digr_ros.conversion import to_message, to_rgb
from carla_digr_ros.diagnostics import ERROR, OK, WARN, Recent, Reporter
from carla_digr_ros.parameters import declare
from carla_digr_ros.running import run

KNOWN_FRAMES = 40  # frame numbers that are remembered by stamp until their picture comes


class ExplainerNode(Node):
    """Subscribes to the camera; publishes decision, saliency map and overlay with the picture's header."""

    def __init__(self) -> None:
        super().__init__("explainer")
        weights = declare(self, "weights", str(WEIGHTS), "policy, a .safetensors file beside its card")
        self._wrong_size = declare(
            self, "wrong_size", "refuse", "a picture of another size than the policy's", choices=("refuse", "resize")
        )
        self._opacity = declare(self, "opacity", 0.8, "opacity of the map in the overlay", (0.0, 1.0))
        self._colormap = declare(
            self, "colormap", "inferno", "colours of the map in the overlay", choices=tuple(COLORMAPS)
        )
        method = declare(self, "method", "digr", "how the maps are computed", choices=tuple(METHODS))
        self._explainer = Explainer.from_checkpoint(weights, method=method)
        if self._explainer.action_names != ACTION_NAMES:
            raise UserError(
                f"The policy {weights} decides between {', '.join(self._explainer.action_names)}; "
                f"driving needs {', '.join(ACTION_NAMES)}: train it again."
            )

        self._decisions = topics.DECISION.publisher(self)
        self._saliencies = topics.SALIENCY.publisher(self)
        self._overlays = topics.OVERLAY.publisher(self)
        self._numbers: dict[tuple[int, int], int] = {}  # stamp -> frame number, in order of arrival
        self._decided, self._explained = Recent(), Recent()
        self._refused = self._failed = self._flat = 0
        self._problem = ""  # of the last frame
        self._saliency_ms = math.nan
        self._reporter = Reporter(self, "policy and explanation", self._status)
        # Frame numbers first: of two messages that wait, the executor takes the older subscription's.
        topics.FRAME.subscribe(self, self._on_frame)
        topics.IMAGE.subscribe(self, self._on_image)
        self.get_logger().info(
            f"Policy {self._explainer.policy_hash} from {Path(weights).name}: {', '.join(self._explainer.action_names)}"
        )

    def _on_frame(self, message: DriveFrame) -> None:
        self._numbers[_key(message.header)] = message.frame
        while len(self._numbers) > KNOWN_FRAMES:
            del self._numbers[next(iter(self._numbers))]

    def _on_image(self, message: Image) -> None:
        start = time.monotonic()
        try:
            rgb = self._picture(message)
            decision = self._explainer.decide(rgb)
        except (UserError, ValueError) as error:
            self._refused += 1
            self._report(f"Refused a picture on {topics.IMAGE.name}: {error}")
            return
        self._decisions.publish(self._decision_message(message.header, decision))
        self._decided.add((time.monotonic() - start) * 1000.0)
        # From here on nothing may stop the drive: the decision is out.
        self._saliency_ms = math.nan
        try:
            saliency = self._explainer.explain(decision)
            self._publish_map(message.header, rgb, saliency)
        except Exception as error:
            self._failed += 1
            self._report(f"No map for this frame: {error!r}")
            return
        self._saliency_ms = saliency.saliency_ms
        self._flat += saliency.flat
        self._explained.add((time.monotonic() - start) * 1000.0)
        self._problem = "" if decision.finite else "The policy's output is not a number: the bridge brakes."

    def _picture(self, message: Image) -> NDArray[np.uint8]:
        rgb = to_rgb(message)
        height, width, _ = self._explainer.image_shape
        if self._wrong_size == "resize" and rgb.shape[:2] != (height, width):
            rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
        return rgb

    def _decision_message(self, header: Header, decision: Decision) -> DrivingDecision:
        wanted = command(decision.action)
        return DrivingDecision(
            header=header,
            frame=self._numbers.pop(_key(header), 0),
            action_names=self._explainer.action_names,
            probabilities=decision.probabilities,
            action=decision.action,
            throttle=wanted.throttle,
            steer=wanted.steer if decision.finite else math.nan,
            brake=wanted.brake,
            target_speed=wanted.target_speed,
            value=decision.value,
            policy_hash=self._explainer.policy_hash,
            inference_ms=decision.inference_ms,
            saliency_ms=self._saliency_ms,
        )

    def _publish_map(self, header: Header, rgb: NDArray[np.uint8], saliency: Saliency) -> None:
        self._saliencies.publish(to_message(saliency.map, "32FC1", header))
        picture = overlay(rgb, saliency.map, self._opacity, self._colormap)
        self._overlays.publish(to_message(picture, "rgb8", header))

    def _report(self, problem: str) -> None:
        if problem != self._problem:  # each kind of problem at once on /diagnostics, repetitions once a second
            self._problem = problem
            self._reporter.report()
        self.get_logger().error(problem, throttle_duration_sec=5.0)

    def _status(self):
        values = {
            "policy hash": self._explainer.policy_hash,
            "decisions (Hz)": self._decided.rate(),
            "decision p50 (ms)": self._decided.latency(50),
            "decision p99 (ms)": self._decided.latency(99),
            "maps (Hz)": self._explained.rate(),
            "map p50 (ms)": self._explained.latency(50),
            "map p99 (ms)": self._explained.latency(99),
            "pictures refused": self._refused,
            "maps failed": self._failed,
            "flat maps": self._flat,
        }
        if self._problem:
            return ERROR, self._problem, values
        if self._decided.rate() == 0.0:
            return WARN, f"No pictures on {topics.IMAGE.name}", values
        return OK, f"{self._decided.rate():.1f} frames/s", values


def _key(header: Header) -> tuple[int, int]:
    return header.stamp.sec, header.stamp.nanosec


def main() -> int:
    """Run the node; its exit status."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return run(ExplainerNode)
