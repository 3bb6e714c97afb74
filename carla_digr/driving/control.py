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
RETRY = 0.5  # s between tries to reach a lost server
IMAGE_SIZE = 128  # pixels, square
EGO_BLUEPRINT = "vehicle.tesla.model3"
EGO_WHEELBASE = 2.88  # m
CAMERA = {"x": -9.5, "y": 0.0, "z": float(np.float32(4.2)), "pitch": -9.0, "yaw": 0.0, "roll": 0.0, "fov": 48.0}
"""Where the camera sits on the ego (m and degrees from the centre of its box on the ground) and its field of view;
float32 numbers, as they cross CARLA's protocol."""

WHEEL_ANGLE = 0.02  # rad, the largest that an action sets or adds; a curve of 250 m radius needs 0.011
FINE_WHEEL_ANGLE = 0.006  # rad, 1 m/s2 across at the cruise speed
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
    control sets throttle and brake from it; when it is NaN they are applied as they are. ``along_lane``: the steering
    is added to what the lane's curve asks for, see ``steering``.
    """

    steer: float
    throttle: float = 0.0
    brake: float = 0.0
    target_speed: float = math.nan
    along_lane: bool = False


UNKNOWN = VehicleCommand(math.nan, math.nan, math.nan)
"""Of an action of which nobody says what it does to a car."""


@dataclass(frozen=True)
class DriveFrame:
    """One tick as the driver sees it.

    ``image`` is (H, W, 3) uint8 RGB of frame number ``frame`` at ``stamp`` seconds of sim time; ``x``, ``y`` (m),
    ``yaw`` (rad) and ``speed`` (m/s) are those of the ego in the same frame, float32 as CARLA's snapshot carries
    them. ``collision`` names what the ego hit in this tick; ``off_road``: its centre is off the driving lanes.
    ``road_ends``: the stretch that can be driven ends here, at a junction or a bend too tight. ``struck``: what the
    collision names drove into the ego; told on CARLA servers.

    Over CARLA's protocol only: ``z`` (m), ``pitch`` and ``roll`` (rad, positive upwards and to the right), ``yaw_rate``
    (rad/s, positive to the right), ``sideways`` and ``upwards`` (m/s along the car's own axes to the right and up);
    ``lane_change``: the lanes to the right by which the ego's centre went over in this tick.
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
    road_ends: bool = False
    struck: bool = False
    z: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    yaw_rate: float = 0.0
    sideways: float = 0.0
    upwards: float = 0.0
    lane_change: int = 0


UNKNOWN_LANE = 127


@dataclass(frozen=True)
class Neighbour:
    """Where another vehicle is: m ``ahead`` of the ego's centre and to its ``right``, and its ``lane``, 0 the ego's,
    negative to the left, UNKNOWN_LANE where nobody knows it.

    ``turned`` is its heading against the ego's (rad, positive to the right), ``speed`` in m/s, ``size`` its length,
    width and height (m), 0 where they are not known, as is an empty ``type``, the simulator's name of its kind.
    """

    ahead: float
    right: float
    lane: int = UNKNOWN_LANE
    turned: float = 0.0
    speed: float = 0.0
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    type: str = ""


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


def _commands(wheel_angles: Mapping[str, float], along_lane: bool) -> dict[str, VehicleCommand]:
    """Actions that hold the cruise speed at these wheel angles (rad), and one that brakes."""
    steering = {name: angle / MAX_WHEEL_ANGLE for name, angle in wheel_angles.items()}
    held = {name: VehicleCommand(s, target_speed=CRUISE_SPEED, along_lane=along_lane) for name, s in steering.items()}
    return held | {"brake": VehicleCommand(steer=0.0, brake=BRAKE, along_lane=along_lane)}


ACTIONS = {
    "wheels": _commands({"left": -WHEEL_ANGLE, "keep": 0.0, "right": WHEEL_ANGLE}, along_lane=False),
    "lane": _commands(
        {
            "left": -WHEEL_ANGLE,
            "slightly left": -FINE_WHEEL_ANGLE,
            "keep": 0.0,
            "slightly right": FINE_WHEEL_ANGLE,
            "right": WHEEL_ANGLE,
        },
        along_lane=True,
    ),
}
"""The driving task's sets of actions, each with the commands that they stand for, in the order of the policy's outputs.

Three absolute wheel angles can only follow a curve by pulsing between two of them, ten times a second: whatever decides
on one picture must. Angles relative to the lane's curve leave "keep" to do what it says.
"""


def commands_of(card: Mapping[str, Any]) -> tuple[VehicleCommand, ...] | None:
    """What each of a policy's actions does to the car, None if its card does not say it.

    Args:
        card: of the checkpoint. Its ``controls`` are one mapping an action of steer, throttle, brake and target_speed;
            without them the actions must be one of this task's own sets.

    Raises:
        UserError: the card's controls are not of this kind.
    """
    controls, names = card.get("controls"), card["action_names"]
    if controls is None:
        return next((tuple(own.values()) for own in ACTIONS.values() if list(own) == list(names)), None)
    if not isinstance(controls, list) or len(controls) != len(names):
        raise UserError(f"The policy's controls must be a list of {len(names)} entries, one for each action.")
    return tuple(_command_of(name, values) for name, values in zip(names, controls, strict=True))


def _command_of(action: str, values: Any) -> VehicleCommand:
    limits = {"steer": (-1.0, 1.0), "throttle": (0.0, 1.0), "brake": (0.0, 1.0), "target_speed": (0.0, 100.0)}
    switch = "along_lane"
    if not isinstance(values, dict) or not values.keys() <= limits.keys() | {switch}:
        raise UserError(
            f"The control of the action {action} must have no other keys than {', '.join((*limits, switch))}."
        )
    values = dict(values)
    along_lane = values.pop(switch, False)
    if not isinstance(along_lane, bool):
        raise UserError(f"The control of the action {action}: {switch} must be true or false, not {along_lane!r}.")
    for key, value in values.items():
        low, high = limits[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise UserError(
                f"The control of the action {action}: {key} must lie in [{low:g}, {high:g}], not {value!r}."
            )
    return VehicleCommand(**{"steer": 0.0, **{k: float(v) for k, v in values.items()}}, along_lane=along_lane)


def turning(speed: float, yaw_rate: float) -> VehicleCommand:
    """The command that drives at a speed (m/s) and turns (rad/s, positive to the left, as ROS has it): the wheel angle
    of a bicycle, as far as the wheels turn. Of numbers that are none it is one that is none."""
    if not (math.isfinite(speed) and math.isfinite(yaw_rate)):
        return UNKNOWN
    angle = math.atan(EGO_WHEELBASE * yaw_rate / speed) if speed else 0.0
    return VehicleCommand(max(-1.0, min(-angle / MAX_WHEEL_ANGLE, 1.0)), target_speed=speed)


def signed_speed(vx: float, vy: float, yaw: float) -> float:
    """Speed in m/s, negative backwards, of a car with this velocity (m/s) and yaw (rad).

    From the velocity in float32 alone but for the sign: what CARLA's snapshot carries gives the same number, bit for
    bit, as the simulated world itself.
    """
    forward = vx * math.cos(yaw) + vy * math.sin(yaw)
    return float(np.float32(math.copysign(math.hypot(np.float32(vx), np.float32(vy)), forward)))


def steering(wanted: VehicleCommand, curvature: float) -> float:
    """Steering for a command, a float32 number in [-1, 1], on a lane of this curvature (1/m, positive turns right).

    Along the lane it is the command's steering and the wheel angle at which the centre of a bicycle of the ego's
    wheelbase, half of it ahead of the rear axle, drives that curvature.
    """
    steer = float(np.float32(wanted.steer))  # as a decision's message carries it
    if wanted.along_lane and curvature:
        turn = min(abs(curvature) * EGO_WHEELBASE, 1.0)
        angle = math.copysign(math.atan(turn / math.sqrt(1.0 - 0.25 * turn * turn)), curvature)
        steer = min(max(steer + angle / MAX_WHEEL_ANGLE, -1.0), 1.0)
    return float(np.float32(steer))


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
