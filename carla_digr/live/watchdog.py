"""The car stops when in doubt: which command a frame gets, and when driving may go on after a fault.

A pure state machine with an injected clock. For every frame the bridge calls `sent`, hands in what arrives by
`receive`, and asks `rule` once, when a decision is there or the deadline has passed.

| state      | usable decision for this frame, in time    | none in time, or an unusable one |
|------------|--------------------------------------------|----------------------------------|
| DRIVING    | DRIVING, the decision is applied           | STOPPING, full brake             |
| STOPPING   | RECOVERING (or DRIVING if `recovery` is 1) | STOPPING, full brake             |
| RECOVERING | brake with the decision's steering, until  | STOPPING, full brake             |
|            | the `recovery`-th in a row: DRIVING        |                                  |

It starts in DRIVING: the bridge does not begin a drive before an explainer is there, and the first missing decision
brakes like any other. Late decisions and decisions for other frames are counted and otherwise ignored; of two for
the same frame the first counts.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

from carla_digr.driving.control import VehicleCommand

FULL_BRAKE = VehicleCommand(steer=0.0, throttle=0.0, brake=1.0)


class State(enum.Enum):
    """Where the watchdog is; the value is what diagnostics show."""

    DRIVING = "driving"
    STOPPING = "stopping"
    RECOVERING = "recovering"


@dataclass(frozen=True)
class Ruling:
    """What the car does on one frame.

    ``command`` is always in range. ``fallback`` is true when it is not the policy's decision; ``reason`` then says why.
    """

    command: VehicleCommand
    fallback: bool
    reason: str = ""


class Watchdog:
    """Turns decisions that may be late, missing or broken into commands that are always safe to apply.

    Args:
        clock: monotonic time in seconds.
        deadline: seconds after a frame within which its decision must arrive; infinite in lockstep.
        recovery: usable decisions in a row that end a stop; at least 1.
    """

    def __init__(self, clock: Callable[[], float], deadline: float = 0.040, recovery: int = 5):
        if not deadline > 0 or recovery < 1:
            raise ValueError(f"deadline must be positive and recovery at least 1, not {deadline} and {recovery}")
        self.deadline = deadline
        self.recovery = recovery
        self.state = State.DRIVING
        self.ignored = 0  # decisions that were late, repeated or for another frame
        self._clock = clock
        self._good = 0  # usable decisions in a row since the last fault
        self._frame: int | None = None
        self._sent_at = 0.0
        self._command: VehicleCommand | None = None
        self._fault: str | None = None

    def sent(self, frame: int) -> None:
        """Frame number ``frame`` has just been published: its deadline runs from now."""
        self._frame, self._sent_at = frame, self._clock()
        self._command = self._fault = None

    def receive(self, frame: int, command: VehicleCommand) -> bool:
        """Take a decision for a frame; whether it is the one that was waited for (usable or not)."""
        answered = self._command is not None or self._fault is not None
        if frame != self._frame or answered or self.remaining() <= 0.0:
            self.ignored += 1
            return False
        self._fault = _fault(command)
        if self._fault is None:
            self._command = _clamped(command)
        return True

    def remaining(self) -> float:
        """Seconds until the deadline of the present frame; 0 once it has passed."""
        return max(0.0, self._sent_at + self.deadline - self._clock())

    def rule(self) -> Ruling:
        """The command for the present frame, and the next state. Ask once a frame."""
        if self._command is None:
            self.state, self._good = State.STOPPING, 0
            missing = f"no decision for frame {self._frame} within {self.deadline * 1000:.0f} ms"
            return Ruling(FULL_BRAKE, True, self._fault or missing)
        self._good += 1
        if self.state is State.DRIVING or self._good >= self.recovery:
            self.state = State.DRIVING
            return Ruling(self._command, False)
        self.state = State.RECOVERING
        braking = VehicleCommand(steer=self._command.steer, throttle=0.0, brake=1.0)
        return Ruling(braking, True, f"{self._good} of {self.recovery} good decisions in a row")


def _fault(command: VehicleCommand) -> str | None:
    for name in ("steer", "throttle", "brake"):
        if not math.isfinite(getattr(command, name)):
            return f"unusable decision: {name} is {getattr(command, name)}"
    if math.isinf(command.target_speed):
        return f"unusable decision: target speed is {command.target_speed}"
    return None


def _clamped(command: VehicleCommand) -> VehicleCommand:
    speed = command.target_speed
    return VehicleCommand(
        steer=min(max(command.steer, -1.0), 1.0),
        throttle=min(max(command.throttle, 0.0), 1.0),
        brake=min(max(command.brake, 0.0), 1.0),
        target_speed=speed if math.isnan(speed) else max(speed, 0.0),
    )
