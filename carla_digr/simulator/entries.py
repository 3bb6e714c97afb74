"""What the server keeps of an actor, and how the text of its attributes is read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from carla_digr.simulator import blueprints, sensors, wire
from carla_digr.simulator.events import LEAST_THRESHOLD, Contrast, EventCamera
from carla_digr.simulator.lidar import Beams
from carla_digr.simulator.optics import Look
from carla_digr.simulator.radar import Cone
from carla_digr.simulator.wire import Transform, Vector3D
from carla_digr.simulator.world import Camera

MAX_ATTRIBUTES, MAX_TEXT = 128, 8192  # of an actor, and characters of all their names and values

MOST_CHANNELS, MOST_POINTS = 512, 10_000_000  # of a lidar, the latter a second

ORIGIN = Transform()
STILL = Vector3D()


class CallFailed(Exception):
    """A call that cannot be done; the text reaches the client as a RuntimeError."""


@dataclass
class Entry:
    """What the server keeps of an actor; a vehicle's motion is in the world."""

    id: int
    description: wire.ActorDescription
    parent: int = 0
    transform: Transform = ORIGIN
    """Of actors that are no vehicles; relative to the parent if there is one."""
    stream: int = 0
    kind: int = -1
    """Index into KINDS of a vehicle, else -1."""
    attributes: dict[str, str] = field(default_factory=dict)
    camera: Camera | None = None
    noise: sensors.Noise | None = None
    """Of inertial and satellite sensors."""
    beams: Beams | None = None
    echoes: sensors.Echoes | None = None
    """Of lidars; a semantic one loses no echoes."""
    angle: float = 0.0
    """Degrees, at which a lidar's next frame begins."""
    sensor_tick: float = 0.0
    memory: EventCamera | Look | None = None
    """Of cameras that compare a frame with the one before."""
    cone: Cone | None = None
    draw: np.random.Generator | None = None
    """Of radars."""
    walk: wire.WalkerControl = field(default_factory=wire.WalkerControl)
    """Of walkers, what they do until they are told otherwise."""
    moved: bool = False
    """Whether a walker was put where it is by who leads it, since the last frame."""
    velocity: Vector3D = STILL
    """m/s, of walkers."""
    solid: bool = True
    """Whether vehicles hit a walker or prop."""
    due: float = -math.inf
    """Simulated second from which the sensor measures again."""
    lights: int = 0
    physics: wire.VehiclePhysics | None = None
    constant_velocity: Vector3D | None = None
    ackermann: wire.AckermannControl | None = None
    ackermann_settings: wire.AckermannSettings = field(default_factory=wire.AckermannSettings)
    spin: float = 0.0
    """rad/s by which a vehicle turns in the next frame besides what its wheels do."""
    sticky: bool = True
    """Whether a vehicle's control lasts until the next one, not for a frame only."""
    steered: bool = False
    """Whether a control has come since the last frame."""
    held: bool = False
    """A vehicle without physics: only transforms move it."""
    replayed: bool = False
    """Whether a recording moves it."""
    traffic: list[int] = field(default_factory=list)
    """Vehicles of a traffic controller."""

    def measures(self, now: float) -> bool:
        """Whether a sensor's turn has come at a simulated second; the next one is a sensor_tick after this turn, so
        that the mean rate is right where frames do not divide it."""
        if now < self.due - 1e-6:
            return False
        self.due += self.sensor_tick
        if self.due <= now:  # its first turn, or nobody has listened for a while
            self.due = now + self.sensor_tick
        return True


def check_attributes(description: wire.ActorDescription) -> None:
    """Refuse attributes that clients cannot read: all of them are told of every actor's.

    Raises:
        CallFailed: there are too many or too long ones, or one has another type than its blueprint's, or a value that
            is none of its type.
    """
    text = sum(len(name) + len(value) for name, _, value in description.attributes)
    if len(description.attributes) > MAX_ATTRIBUTES or text > MAX_TEXT:
        raise CallFailed(f"an actor has at most {MAX_ATTRIBUTES} attributes, of at most {MAX_TEXT} characters together")
    definition = blueprints.BY_ID.get(description.id)
    types = {a.id: a.type for a in definition.attributes} if definition else {}
    for name, kind, value in description.attributes:
        if kind not in _READ or types.get(name, kind) != kind:
            raise CallFailed(f"{name:.40}: the attribute's type is not {kind}")
        read, wanted = _READ[kind]
        try:
            read(value)
        except (KeyError, ValueError):
            raise CallFailed(f"{name:.40} must be {wanted}, not {value!r:.40}") from None


def color(text: str) -> tuple[int, int, int]:
    """Of "r,g,b"; raises ValueError."""
    r, g, b = bytes(map(int, text.split(",")))
    return r, g, b


def number(entry: Entry, name: str, low: float, high: float, kind: Callable[[str], float] = float) -> Any:
    """An attribute as a number within its range; raises CallFailed for another one."""
    text = entry.attributes[name]
    with contextlib.suppress(ValueError):
        if low <= (value := kind(text)) <= high:
            return value
    raise CallFailed(f"{entry.description.id}: {name} must be between {low} and {high}, not {text!r:.40}")


def noise(entry: Entry, name: str) -> float:
    """One of the ``noise_`` attributes; raises CallFailed as :func:`number`."""
    if name == "noise_seed":
        return integer(entry, name, 0, 2**31 - 1)
    return number(entry, name, 0.0 if "stddev" in name else -1e6, 1e6)


def beams(entry: Entry) -> Beams:
    """The settings of a lidar; refused ones as :func:`number` does."""
    return Beams(
        channels=integer(entry, "channels", 1, MOST_CHANNELS),
        range=number(entry, "range", 0.1, 1000.0),
        points_per_second=integer(entry, "points_per_second", 1, MOST_POINTS),
        rotation_frequency=number(entry, "rotation_frequency", 0.0, 1000.0),
        upper_fov=number(entry, "upper_fov", -90.0, 90.0),
        lower_fov=number(entry, "lower_fov", -90.0, 90.0),
        horizontal_fov=number(entry, "horizontal_fov", 0.1, 360.0),
    )


def echoes(entry: Entry) -> sensors.Echoes | None:
    """How a lidar's echoes get lost, None where it loses none; refused settings as :func:`number` does."""
    if "noise_seed" not in entry.attributes:
        return None
    shares = ("dropoff_general_rate", "dropoff_intensity_limit", "dropoff_zero_intensity")
    given = {name: number(entry, name, 0.0, 1.0) for name in shares}
    given["atmosphere_attenuation_rate"] = number(entry, "atmosphere_attenuation_rate", 0.0, 1e3)
    return sensors.Echoes({**given, **{name: noise(entry, name) for name in ("noise_seed", "noise_stddev")}})


def cone(entry: Entry) -> Cone:
    """The settings of a radar; refused ones as :func:`number` does."""
    return Cone(
        horizontal_fov=number(entry, "horizontal_fov", 0.0, 170.0),
        vertical_fov=number(entry, "vertical_fov", 0.0, 170.0),
        range=number(entry, "range", 0.1, 1000.0),
        points_per_second=integer(entry, "points_per_second", 0, MOST_POINTS),
    )


def event_camera(entry: Entry) -> EventCamera:
    """What a dynamic vision sensor remembers; refused settings as :func:`number` does."""
    thresholds = {
        f"{sigma}{side}_threshold": number(entry, f"{sigma}{side}_threshold", 0.0 if sigma else LEAST_THRESHOLD, 1e3)
        for sigma in ("", "sigma_")
        for side in ("positive", "negative")
    }
    contrast = Contrast(
        **thresholds,
        refractory_period_ns=integer(entry, "refractory_period_ns", 0, 2**62),
        use_log=entry.attributes["use_log"].lower() == "true",
        log_eps=number(entry, "log_eps", 1e-9, 1e3),
    )
    return EventCamera(contrast, entry.id)


def integer(entry: Entry, name: str, low: int, high: int) -> int:
    """As :func:`number`, a whole one."""
    return number(entry, name, low, high, whole)


def whole(text: str) -> int:
    """Of "64" and, as clients do, of "64.0"; raises ValueError."""
    with contextlib.suppress(ValueError):
        return int(text)
    value = float(text)
    if not value.is_integer():
        raise ValueError
    return int(value)


_READ: dict[int, tuple[Callable[[str], Any], str]] = {
    wire.BOOL: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    wire.INT: (whole, "a whole number"),
    wire.FLOAT: (float, "a number"),
    wire.STRING: (str, "text"),
    wire.COLOR: (color, "'r,g,b', three numbers from 0 to 255"),
}
"""How the client library reads a value, by the attribute's type, and what it must be."""
