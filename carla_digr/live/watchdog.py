"""The car stops when in doubt: which command a frame gets, and when driving may go on after a fault.

Pure state machines with an injected clock. For every frame the bridge asks `Camera` whether the frame can be driven
on, calls `Watchdog.sent`, hands in what arrives by `receive`, and asks `rule` once, when a decision is there or the
deadline has passed. `ManualControl` is what a human wants instead.

| state      | usable decision for this frame, in time    | none in time, an unusable one, a bad |
|            |                                            | frame, or no next frame (`fail`)     |
|------------|--------------------------------------------|--------------------------------------|
| DRIVING    | DRIVING, the decision is applied           | STOPPING, full brake                 |
| STOPPING   | RECOVERING (or DRIVING if `recovery` is 1) | STOPPING, full brake                 |
| RECOVERING | brake with the decision's steering, until  | STOPPING, full brake                 |
|            | the `recovery`-th in a row: DRIVING        |                                      |

It starts in DRIVING. The first frame of a drive may take `FIRST_DECISION` seconds, while the world stands still: a
policy's first pass is slower than all others. Late decisions and decisions for other frames are counted and otherwise
ignored; of two for the same frame the first counts.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import TICK, VehicleCommand

FULL_BRAKE = VehicleCommand(steer=0.0, throttle=0.0, brake=1.0)
FIRST_DECISION = 5.0  # s that the very first decision may take
WARN_PERIODS, BRAKE_PERIODS = 2, 5  # without a (new) picture
MOVING = 2.0  # m/s, 0.1 m a period, from which two pictures cannot be the same
MANUAL_SECONDS = 0.5  # that a human's command holds


class Order(enum.Enum):
    """How a stamp follows those before it."""

    NEXT = "next"
    REPEATED = "the stamp of the frame before once more"
    LATE = "a stamp older than that of the frame before"
    JUMP = "the clock jumped back"


class Stamps:
    """Tells a camera that repeats or reorders frames from a simulation that began anew.

    Args:
        tolerance: s; an older stamp than the newest by more than this is a jump of the clock, by less it is late.
    """

    def __init__(self, tolerance: float = BRAKE_PERIODS * TICK):
        self._tolerance = tolerance
        self._newest = -math.inf

    def check(self, stamp: float) -> Order:
        """Take the next stamp, in s. After a jump time goes on from there; a late stamp changes nothing."""
        if stamp == self._newest:
            return Order.REPEATED
        if stamp > self._newest:
            self._newest = stamp
            return Order.NEXT
        if stamp >= self._newest - self._tolerance:
            return Order.LATE
        self._newest = stamp
        return Order.JUMP


class Camera:
    """Whether a frame can be driven on: its stamp is the next one and its picture is alive."""

    def __init__(self) -> None:
        self._stamps = Stamps()
        self._picture: NDArray[np.uint8] | None = None
        self._frozen = 0  # periods

    def check(self, stamp: float, picture: NDArray[np.uint8], speed: float) -> str:
        """Take the next frame: its stamp in s, its picture, the ego's speed in m/s.

        Returns:
            What is wrong with it, "" if nothing. A picture that stays the same while the ego moves is wrong from the
            BRAKE_PERIODS-th time on, and then until another one comes, also when the ego stands.
        """
        same = self._picture is not None and np.array_equal(picture, self._picture)
        self._picture = picture
        if not same:
            self._frozen = 0
        elif abs(speed) > MOVING or self._frozen >= BRAKE_PERIODS:
            self._frozen += 1
        order = self._stamps.check(stamp)
        if order is not Order.NEXT:
            return f"bad frame: {order.value}"
        if self._frozen >= BRAKE_PERIODS:
            return f"frozen camera: the same picture for {self._frozen} periods"
        return ""

    @property
    def warning(self) -> str:
        """What to warn of although it is driven on; "" if nothing."""
        return "the camera's picture does not change" if self._frozen >= WARN_PERIODS else ""


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
        self._begun = False
        self._good = 0  # usable decisions in a row since the last fault
        self._frame: int | None = None
        self._sent_at = 0.0
        self._command: VehicleCommand | None = None
        self._fault: str = ""

    def sent(self, frame: int, fault: str = "") -> None:
        """Frame number ``frame`` has just been published: its deadline runs from now.

        ``fault``: what is wrong with the frame itself, so that no decision for it is waited for.
        """
        self._frame, self._sent_at = frame, self._clock()
        self._command, self._fault = None, fault

    def receive(self, frame: int, command: VehicleCommand) -> bool:
        """Take a decision for a frame; whether it is the one that was waited for (usable or not)."""
        if frame != self._frame or self._command is not None or self.remaining() <= 0.0:
            self.ignored += 1
            return False
        self._begun = True
        self._fault = _fault(command)
        if not self._fault:
            self._command = _clamped(command)
        return True

    def remaining(self) -> float:
        """Seconds until the deadline of the present frame; 0 once it has passed or there is a fault."""
        if self._fault:
            return 0.0
        deadline = self.deadline if self._begun else max(self.deadline, FIRST_DECISION)
        return max(0.0, self._sent_at + deadline - self._clock())

    @property
    def silent(self) -> bool:
        """Whether nothing usable or unusable has come for the present frame."""
        return self._command is None and not self._fault

    def rule(self) -> Ruling:
        """The command for the present frame, and the next state. Ask once a frame."""
        self._begun = True
        if self._command is None:
            missing = f"no decision for frame {self._frame} within {self.deadline * 1000:.0f} ms"
            return self.fail(self._fault or missing)
        self._good += 1
        if self.state is State.DRIVING or self._good >= self.recovery:
            self.state = State.DRIVING
            return Ruling(self._command, False)
        self.state = State.RECOVERING
        braking = replace(self._command, throttle=0.0, brake=1.0, target_speed=math.nan)
        return Ruling(braking, True, f"{self._good} of {self.recovery} good decisions in a row")

    def fail(self, reason: str) -> Ruling:
        """Something else is wrong, such as no next frame: stop, and a row of good decisions must come anew."""
        self.state, self._good = State.STOPPING, 0
        return Ruling(FULL_BRAKE, True, reason)


class ManualControl:
    """A human's control of the car: it holds for MANUAL_SECONDS after each command, then the policy drives again.

    Who stands beside the car outranks who looks at its page: while the former's command holds, the page's are ignored.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._command = FULL_BRAKE
        self._until = -math.inf
        self._by_page = False

    def receive(self, command: VehicleCommand, by_page: bool = False) -> str:
        """Take a command; what is wrong with it, "" if nothing. A wrong one means the full brake."""
        if by_page and not self._by_page and self.command() is not None:
            return ""
        self._by_page = by_page
        fault = _fault(command)
        if not fault and _clamped(command) != command:
            fault = f"steer {command.steer}, throttle {command.throttle}, brake {command.brake} are out of range"
        self._command = FULL_BRAKE if fault else command
        self._until = self._clock() + MANUAL_SECONDS
        return fault

    @property
    def driver(self) -> str:
        """Whose command holds: "page", "manual" of anybody else, "" of nobody."""
        if self.command() is None:
            return ""
        return "page" if self._by_page else "manual"

    def command(self) -> VehicleCommand | None:
        """What the human wants now; None: nothing."""
        return self._command if self._clock() < self._until else None


def _fault(command: VehicleCommand) -> str:
    for name in ("steer", "throttle", "brake"):
        if not math.isfinite(getattr(command, name)):
            return f"unusable decision: {name} is {getattr(command, name)}"
    if math.isinf(command.target_speed):
        return f"unusable decision: target speed is {command.target_speed}"
    return ""


def _clamped(command: VehicleCommand) -> VehicleCommand:
    speed = command.target_speed
    return replace(
        command,
        steer=min(max(command.steer, -1.0), 1.0),
        throttle=min(max(command.throttle, 0.0), 1.0),
        brake=min(max(command.brake, 0.0), 1.0),
        target_speed=speed if math.isnan(speed) else max(speed, 0.0),
    )
