"""`ctl`: says one thing to a running drive and ends, for scripts without ROS tools; `carla-digr ctl` starts it.

What can be said stands in controls.py; besides, `list` tells what can be set, with its value and what it means, and
`drive` may have the seconds for which its command is repeated.
"""

from __future__ import annotations

import sys
import time

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future
from rclpy.utilities import remove_ros_args

from carla_digr.errors import UserError
from carla_digr.live.composition import number
from carla_digr.live.watchdog import MANUAL_SECONDS
from carla_digr_ros import topics
from carla_digr_ros.controls import ANSWER_SECONDS, Controls, manual_control
from carla_digr_ros.running import SPIN_SECONDS, Stop, run

REPEAT_SECONDS = 0.1
LONGEST_DRIVE = 3600.0  # s


class Control(Node):
    """Asks the nodes of a drive."""

    def __init__(self) -> None:
        super().__init__("ctl")
        self.words = remove_ros_args(sys.argv)[1:]
        self._stop: Stop | None = None

    def run(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Do what the words say.

        Raises:
            UserError: they say nothing that can be done, a node refuses, or there is no drive.
        """
        self._stop = stop
        controls = Controls(self, self._wait)
        match self.words:
            case ["list"]:
                for name, setting in sorted(controls.settings().items()):
                    constraints = setting.descriptor.additional_constraints
                    among = f" ({constraints})" if constraints else ""
                    print(f"{name}: {setting.value!r}  {setting.descriptor.description}{among}")
            case ["drive", steer, throttle, brake, *seconds] if len(seconds) <= 1:
                self._drive((steer, throttle, brake), *seconds)
            case words:
                print(controls.do(words))

    def _drive(self, command: tuple[str, ...], seconds: str = str(MANUAL_SECONDS)) -> None:
        """Repeat a command for so long; it holds for MANUAL_SECONDS after the last time."""
        assert self._stop is not None
        message = manual_control(command)
        lasting = number("SECONDS", seconds, 0.0, LONGEST_DRIVE)
        publisher = topics.MANUAL.publisher(self)
        end = time.monotonic() + ANSWER_SECONDS
        while not publisher.get_subscription_count():
            if time.monotonic() > end or self._stop.requested:
                raise UserError("Nobody takes commands in this ROS domain: is the drive running?")
            time.sleep(REPEAT_SECONDS)
        end = time.monotonic() + max(0.0, lasting - MANUAL_SECONDS)
        publisher.publish(message)
        while time.monotonic() < end and not self._stop.requested:
            time.sleep(REPEAT_SECONDS)
            publisher.publish(message)
        publisher.wait_for_all_acked()
        print(f"driven for {lasting:g} s")

    def _wait(self, future: Future, seconds: float) -> None:
        assert self.executor is not None and self._stop is not None
        end = time.monotonic() + seconds
        while not (future.done() or self._stop.requested or time.monotonic() > end):
            self.executor.spin_once(timeout_sec=SPIN_SECONDS)


def main() -> int:
    """Say it; the exit status."""
    return run(Control, Control.run)
