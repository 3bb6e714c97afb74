"""CARLA 0.9.16's RPC port: msgpack-rpc messages without length prefix, and the structures in them.

Pure functions over bytes, without sockets; the streaming port is in streaming.py. Structures travel in msgpack as
arrays in field order, which is what a ``NamedTuple`` packs to; angles are degrees here, as everywhere in CARLA's
protocol.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple

import msgpack
import numpy as np

VERSION = "0.9.16"
MAX_REQUEST = 16 * 2**20
"""Longest accepted RPC request in bytes; a longer one is an attack or an accident."""
MAX_ITEMS = 10_000
"""Most items of an array; what takes longer to answer would hold the clients beside it."""


MAX_FLOAT = float(np.finfo(np.float32).max)
U8 = Annotated[int, range(2**8)]
U16 = Annotated[int, range(2**16)]
U32 = Annotated[int, range(2**32)]
I32 = Annotated[int, range(-(2**31), 2**31)]
"""Integers that are kept and sent to other clients, which die of one that does not fit."""


class ProtocolError(Exception):
    """Bytes or values that are no message of the protocol; the text says what is wrong with them."""


# ---------------------------------------------------------------------------------------------- structures


class Vector3D(NamedTuple):
    """Three floats; also CARLA's Location, in metres."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0


class Rotation(NamedTuple):
    """Degrees."""

    pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0


class Transform(NamedTuple):
    """Location in metres and rotation in degrees."""

    location: Vector3D = Vector3D()
    rotation: Rotation = Rotation()


class BoundingBox(NamedTuple):
    """Centre relative to the actor and half sizes, metres."""

    center: Vector3D = Vector3D()
    extent: Vector3D = Vector3D()
    rotation: Rotation = Rotation()
    actor_id: int = 0


class Attribute(NamedTuple):
    """An attribute of a blueprint; ``type`` is one of BOOL, INT, FLOAT, STRING, COLOR, the value always text."""

    id: str
    type: int
    value: str
    recommended: tuple[str, ...] = ()
    modifiable: bool = True
    restricted: bool = False


BOOL, INT, FLOAT, STRING, COLOR = 1, 2, 3, 4, 5


class AttributeValue(NamedTuple):
    """An attribute as an actor carries it."""

    id: str
    type: U8
    value: str


class ActorDefinition(NamedTuple):
    """A blueprint."""

    uid: int
    id: str
    tags: str
    attributes: tuple[Attribute, ...]


class ActorDescription(NamedTuple):
    """What an actor was made from."""

    uid: U32
    id: str
    attributes: list[AttributeValue]


class Actor(NamedTuple):
    """An actor as the client knows it; ``token`` is empty for actors without a stream."""

    id: int
    parent: int
    description: ActorDescription
    box: BoundingBox
    tags: bytes
    token: bytes


class EpisodeSettings(NamedTuple):
    """World settings; times in seconds, distances in metres."""

    synchronous: bool = False
    no_rendering: bool = False
    fixed_delta: float | None = None
    substepping: bool = True
    max_substep_delta: float = 0.01
    max_substeps: I32 = 10
    max_culling_distance: float = 0.0
    deterministic_ragdolls: bool = True
    tile_stream_distance: float = 3000.0
    actor_active_distance: float = 2000.0
    spectator_as_ego: bool = True


class VehicleControl(NamedTuple):
    """Pedals in [0, 1], steer in [-1, 1]."""

    throttle: float = 0.0
    steer: float = 0.0
    brake: float = 0.0
    hand_brake: bool = False
    reverse: bool = False
    manual_gear_shift: bool = False
    gear: int = 0


class WalkerControl(NamedTuple):
    """Where a walker goes, a direction in the world, and how fast (m/s)."""

    direction: Vector3D = Vector3D(1.0, 0.0, 0.0)
    speed: float = 0.0
    jump: bool = False


class AckermannControl(NamedTuple):
    """CARLA's VehicleAckermannControl: rad to the right, rad/s, m/s, m/s2, m/s3; 0 in a rate means no limit."""

    steer: float = 0.0
    steer_speed: float = 0.0
    speed: float = 0.0
    acceleration: float = 0.0
    jerk: float = 0.0


class AckermannSettings(NamedTuple):
    """CARLA's AckermannControllerSettings, gains of its speed and acceleration controllers."""

    speed_kp: float = 0.15
    speed_ki: float = 0.0
    speed_kd: float = 0.25
    accel_kp: float = 0.01
    accel_ki: float = 0.0
    accel_kd: float = 0.01


class Weather(NamedTuple):
    """CARLA's weather: percentages, angles in degrees, fog distance in metres."""

    cloudiness: float = 0.0
    precipitation: float = 0.0
    precipitation_deposits: float = 0.0
    wind_intensity: float = 0.0
    sun_azimuth_angle: float = 0.0
    sun_altitude_angle: float = 0.0
    fog_density: float = 0.0
    fog_distance: float = 0.0
    fog_falloff: float = 0.0
    wetness: float = 0.0
    scattering_intensity: float = 0.0
    mie_scattering_scale: float = 0.0
    rayleigh_scattering_scale: float = 0.0331
    dust_storm: float = 0.0


class Wheel(NamedTuple):
    """Physics of one wheel; angle in degrees, radius and position in centimetres."""

    tire_friction: float
    damping_rate: float
    max_steer_angle: float
    radius: float
    max_brake_torque: float
    max_handbrake_torque: float
    lat_stiff_max_load: float
    lat_stiff_value: float
    long_stiff_value: float
    position: Vector3D


class VehiclePhysics(NamedTuple):
    """CARLA's VehiclePhysicsControl; mass in kg."""

    torque_curve: list[tuple[float, float]]
    max_rpm: float
    moi: float
    damping_full_throttle: float
    damping_clutch_engaged: float
    damping_clutch_disengaged: float
    use_gear_autobox: bool
    gear_switch_time: float
    clutch_strength: float
    final_ratio: float
    forward_gears: list[tuple[float, float, float]]
    mass: float
    drag_coefficient: float
    center_of_mass: Vector3D
    steering_curve: list[tuple[float, float]]
    wheels: list[Wheel]
    use_sweep_wheel_collision: bool


class WheelTelemetry(NamedTuple):
    """CARLA's WheelTelemetryData: rad/s, N and N m; slips and normalized values are shares."""

    tire_friction: float = 0.0
    lat_slip: float = 0.0
    long_slip: float = 0.0
    omega: float = 0.0
    tire_load: float = 0.0
    normalized_tire_load: float = 0.0
    torque: float = 0.0
    long_force: float = 0.0
    lat_force: float = 0.0
    normalized_long_force: float = 0.0
    normalized_lat_force: float = 0.0


class VehicleTelemetry(NamedTuple):
    """CARLA's VehicleTelemetryData: m/s, controls as applied, revolutions a minute, N."""

    speed: float
    steer: float
    throttle: float
    brake: float
    engine_rpm: float
    gear: int
    drag: float
    wheels: list[WheelTelemetry]


class LabelledPoint(NamedTuple):
    """A point of a surface, m, and CARLA's CityObjectLabel of it."""

    location: Vector3D = Vector3D()
    label: int = 0


class EnvironmentObject(NamedTuple):
    """A thing that is no actor; its box is in the world."""

    transform: Transform
    box: BoundingBox
    id: int
    name: str
    label: int


class SpawnCommand(NamedTuple):
    """Batch command SpawnActor; ``then`` holds raw commands in which actor id 0 stands for the new actor."""

    description: ActorDescription
    transform: Transform
    parent: int | None
    attachment: int
    socket: str
    then: list[Any]


# ------------------------------------------------------------------------------------ msgpack values to structures

Decoder = Callable[[Any], Any]


@cache
def decoder(hint: Any) -> Decoder:
    """The function that checks and converts an unpacked msgpack value to the type ``hint``.

    Known are bool, int (Annotated with its range where it has one), float (finite in 32 bits), str, bytes, Any,
    ``T | None`` (on the wire ``[false]`` or ``[true, value]``), ``list[T]``, tuples of fixed length and NamedTuples
    (arrays in field order; what follows the known fields is
    ignored). The function raises ProtocolError.
    """
    if hint is Any:
        return lambda value: value
    if hint is float:
        return _float
    if hint in (bool, int, str, bytes):
        return _exactly(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _within(arguments[1])
    if origin is list:
        return _list(decoder(arguments[0]))
    if origin is tuple:
        return _fields(tuple, [decoder(a) for a in arguments])
    if origin in (typing.Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return _optional(decoder(inner))
    hints = typing.get_type_hints(hint, include_extras=True)
    return _fields(hint._make, [decoder(hints[name]) for name in hint._fields])


def _float(value: Any) -> float:
    if (type(value) is not float and type(value) is not int) or not abs(value) <= MAX_FLOAT:
        raise ProtocolError(f"expected a finite 32-bit number, got {value!r:.60}")
    return float(value)


def _exactly(kind: type) -> Decoder:
    def decode(value: Any) -> Any:
        if type(value) is not kind:
            raise ProtocolError(f"expected {kind.__name__}, got {value!r:.60}")
        return value

    return decode


def _within(numbers: range) -> Decoder:
    def decode(value: Any) -> int:
        if type(value) is not int or value not in numbers:
            raise ProtocolError(f"expected an integer from {numbers[0]} to {numbers[-1]}, got {value!r:.60}")
        return value

    return decode


def _list(item: Decoder) -> Decoder:
    def decode(value: Any) -> list[Any]:
        if type(value) is not list:
            raise ProtocolError(f"expected an array, got {value!r:.60}")
        if len(value) > MAX_ITEMS:
            raise ProtocolError(f"an array has at most {MAX_ITEMS} items here, not {len(value)}")
        return [item(v) for v in value]

    return decode


def _optional(inner: Decoder) -> Decoder:
    def decode(value: Any) -> Any:
        if type(value) is not list or not value or type(value[0]) is not bool or len(value) < 1 + value[0]:
            raise ProtocolError(f"expected an optional value, got {value!r:.60}")
        return inner(value[1]) if value[0] else None

    return decode


def _fields(make: Callable[[list[Any]], Any], decoders: Sequence[Decoder]) -> Decoder:
    count = len(decoders)

    def decode(value: Any) -> Any:
        if type(value) is not list or len(value) < count:
            raise ProtocolError(f"expected an array of {count}, got {value!r:.60}")
        return make([d(v) for d, v in zip(decoders, value, strict=False)])

    return decode


def optional(value: Any) -> list[Any]:
    """An optional value as the wire has it."""
    return [False] if value is None else [True, value]


def settings_to_wire(settings: EpisodeSettings) -> tuple[Any, ...]:
    """Settings with their optional step in wire form."""
    return tuple(settings._replace(fixed_delta=optional(settings.fixed_delta)))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ RPC


class Request(NamedTuple):
    """One call; the client of an ``asynchronous`` one ignores the answer, which must be sent all the same."""

    call_id: int
    method: str
    asynchronous: bool
    arguments: list[Any]


class RequestReader:
    """Turns the bytes of one RPC connection into requests, in whatever pieces they arrive."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(
            raw=False, strict_map_key=False, max_buffer_size=MAX_REQUEST, unicode_errors="strict"
        )

    def feed(self, data: bytes) -> Iterator[Request]:
        """Yield the requests that ``data`` completes.

        Raises:
            ProtocolError: the bytes are no request.
        """
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                yield _request(message)
        except ProtocolError:
            raise
        except Exception as error:  # msgpack raises half a dozen unrelated types for malformed input
            raise ProtocolError(f"not msgpack: {error}") from error


def _request(message: Any) -> Request:
    match message:
        case [0, int(call_id), str(method), [[bool(asynchronous), *_], *arguments]]:
            if 0 <= call_id < 2**32:
                return Request(call_id, method, asynchronous, arguments)
    raise ProtocolError(f"not a request: {message!r:.60}")


_packer = msgpack.Packer(use_bin_type=True)


def pack(value: Any) -> bytes:
    """msgpack bytes of a value or structure."""
    return _packer.pack(value)


def response(call_id: int, result: Any) -> bytes:
    """The answer to a call; ``result`` comes from value(), value_error(), done(), void_error() or is a bare list."""
    return _packer.pack((1, call_id, None, result))


def refusal(call_id: int, message: str) -> bytes:
    """The answer to a call that cannot be served at all: the client raises RuntimeError."""
    return _packer.pack((1, call_id, message, None))


def value(result: Any) -> list[Any]:
    """Envelope of a result."""
    return [[1, result]]


def value_error(message: str) -> list[Any]:
    """Envelope of a failure where a value is declared; the client raises RuntimeError(message)."""
    return [[0, [message]]]


def done() -> list[Any]:
    """Envelope of success where nothing is returned."""
    return [[False]]


def void_error(message: str) -> list[Any]:
    """Envelope of a failure where nothing is returned."""
    return [[True, [message]]]


def error_in(envelope: list[Any]) -> str:
    """What an envelope says of a failure, "" for success."""
    match envelope:
        case [[0 | True, [str(message)]]]:
            return message
    return ""
