"""The driving task in numbers: the ego, its camera, its actions, the commands they stand for, and the cruise control.

No CARLA in here: training in process, the CARLA session and the ROS bridge share these few lines, so that a policy
meets the same car everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError

TICK = 0.05  # s of sim time
IMAGE_SIZE = 128  # pixels, square
EGO_BLUEPRINT = "vehicle.tesla.model3"
EGO_WHEELBASE = 2.88  # m
CAMERA = {"x": -9.5, "y": 0.0, "z": float(np.float32(4.2)), "pitch": -9.0, "yaw": 0.0, "roll": 0.0, "fov": 48.0}
"""Where the camera sits on the ego (m and degrees from the centre of its box on the ground) and its field of view;
float32 numbers, as they cross CARLA's protocol."""

ACTION_NAMES = ("left", "keep", "right", "brake")
WHEEL_ANGLE = 0.02  # rad, what left and right set at once; a curve of 250 m radius needs 0.011
MAX_WHEEL_ANGLE = math.radians(70.0)  # rad at steer 1, CARLA's passenger cars
CRUISE_SPEED = 22.0  # m/s
BRAKE = 0.5  # brake pedal of the action "brake", about 4 m/s2
FULL_THROTTLE_ACCELERATION = 4.0  # m/s2, scales the cruise control's pedals
CRUISE_GAIN = 1.0  # 1/s
CRUISE_FEED_FORWARD = 0.0855  # throttle that holds the cruise speed against rolling and air resistance


@dataclass(frozen=True)
class VehicleCommand:
    """What the car is asked to do until the next tick.

    ``steer`` in [-1, 1], ``throttle`` and ``brake`` in [0, 1]. While ``target_speed`` (m/s) is a number, the cruise
    control sets throttle and brake from it; when it is NaN they are applied as they are.
    """

    steer: float
    throttle: float = 0.0
    brake: float = 0.0
    target_speed: float = math.nan


UNKNOWN = VehicleCommand(math.nan, math.nan, math.nan)
"""Of an action of which nobody says what it does to a car."""


@dataclass(frozen=True)
class DriveFrame:
    """One tick as the driver sees it.

    ``image`` is (H, W, 3) uint8 RGB of frame number ``frame`` at ``stamp`` seconds of sim time; ``x``, ``y`` (m),
    ``yaw`` (rad) and ``speed`` (m/s) are those of the ego in the same frame, float32 as CARLA's snapshot carries
    them. ``collision`` names what the ego hit in this tick; ``off_road``: its centre is off the driving lanes.
    """

    frame: int
    stamp: float
    image: NDArray[np.uint8]
    x: float
    y: float
    yaw: float
    speed: float
    collision: str | None = None
    off_road: bool = False


class Drive(Protocol):
    """A car on a highway with traffic, in process or over CARLA's protocol: the same calls give the same frames."""

    def reset(self, seed: int) -> DriveFrame:
        """Put the ego at a place drawn from ``seed`` among traffic drawn from ``seed``; the first frame."""

    def step(self, command: VehicleCommand) -> DriveFrame:
        """Apply a command, advance 0.05 s and return the frame."""

    def close(self) -> None:
        """Release everything; safe to call twice."""


def start_index(seed: int, spawn_points: int) -> int:
    """Which spawn point the ego starts from in the episode of this seed, the same on every route to the simulator."""
    return int(np.random.default_rng(seed).integers(spawn_points))


def command(action: int) -> VehicleCommand:
    """The command an action stands for: 0 left, 1 keep, 2 right (speed held), 3 brake (wheels straight)."""
    if action == 3:
        return VehicleCommand(steer=0.0, brake=BRAKE)
    steer = (action - 1) * WHEEL_ANGLE / MAX_WHEEL_ANGLE
    return VehicleCommand(steer=steer, target_speed=CRUISE_SPEED)


def commands_of(card: Mapping[str, Any]) -> tuple[VehicleCommand, ...] | None:
    """What each of a policy's actions does to the car, None if its card does not say it.

    Args:
        card: of the checkpoint. Its ``controls`` are one mapping an action of steer, throttle, brake and target_speed;
            without them the actions must be this task's own.

    Raises:
        UserError: the card's controls are not of this kind.
    """
    controls, names = card.get("controls"), card["action_names"]
    if controls is None:
        return tuple(command(k) for k in range(len(names))) if tuple(names) == ACTION_NAMES else None
    if not isinstance(controls, list) or len(controls) != len(names):
        raise UserError(f"The policy's controls must be a list of {len(names)} entries, one for each action.")
    return tuple(_command_of(name, values) for name, values in zip(names, controls, strict=True))


def _command_of(action: str, values: Any) -> VehicleCommand:
    limits = {"steer": (-1.0, 1.0), "throttle": (0.0, 1.0), "brake": (0.0, 1.0), "target_speed": (0.0, 100.0)}
    if not isinstance(values, dict) or not values.keys() <= limits.keys():
        raise UserError(f"The control of the action {action} must have no other keys than {', '.join(limits)}.")
    for key, value in values.items():
        low, high = limits[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise UserError(
                f"The control of the action {action}: {key} must lie in [{low:g}, {high:g}], not {value!r}."
            )
    return VehicleCommand(**{"steer": 0.0, **{key: float(value) for key, value in values.items()}})


def signed_speed(vx: float, vy: float, yaw: float) -> float:
    """Speed in m/s, negative backwards, of a car with this velocity (m/s) and yaw (rad).

    From the velocity in float32 alone but for the sign: what CARLA's snapshot carries gives the same number, bit for
    bit, as the simulated world itself.
    """
    forward = vx * math.cos(yaw) + vy * math.sin(yaw)
    return float(np.float32(math.copysign(math.hypot(np.float32(vx), np.float32(vy)), forward)))


def pedals(wanted: VehicleCommand, speed: float) -> tuple[float, float]:
    """(throttle, brake) for a command at the present speed in m/s, both float32 numbers in [0, 1].

    A proportional cruise control: it holds the speed to a few cm/s without a state of its own, so one picture and
    the speed stay a sufficient state.
    """
    throttle, brake = wanted.throttle, wanted.brake
    if not math.isnan(wanted.target_speed):
        effort = CRUISE_GAIN * (wanted.target_speed - speed) / FULL_THROTTLE_ACCELERATION
        throttle = min(max(effort + CRUISE_FEED_FORWARD, 0.0), 1.0)
        brake = min(max(-0.5 * (effort + 0.1), 0.0), 1.0)
    return float(np.float32(throttle)), float(np.float32(brake))
