"""CARLA 0.9.16's streaming port: length-prefixed, little-endian packed messages of the world and the sensors.

Pure functions over bytes, without sockets; what messages share with the RPC port is in wire.py.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.wire import Actor, Transform, Vector3D, pack

WORLD_STREAM = 1
"""Stream id of the world state; sensors have ids above it."""

# Index in the client's registry of sensor types: decides what Python object a message becomes.
COLLISION, GNSS, IMU, WORLD_STATE = 0, 4, 5, 17
DEPTH_CAMERA, RGB_CAMERA, SEMANTIC_CAMERA, INSTANCE_CAMERA = 1, 13, 14, 15
NORMALS_CAMERA, DVS_CAMERA, FLOW_CAMERA, COSMOS_CAMERA, RADAR = 2, 3, 8, 16, 9
SEMANTIC_LIDAR, LIDAR = 10, 11

FLAG_MAP_CHANGED = 1
ACTIVE = 1
GREEN_LIGHT = 2

_TOKEN = struct.Struct("<IHBB16s")
_SENSOR_HEADER = struct.Struct("<QQd6f")
_EPISODE_HEADER = struct.Struct("<Qdf3iI")
_IMAGE_HEADER = struct.Struct("<IIf")
_LIDAR_HEADER = struct.Struct("<fI")
_SIZE = struct.Struct("<I")
SUBSCRIPTION = struct.Struct("<I")
"""What a client sends on a fresh streaming connection: the stream's id."""

ACTOR_STATE = np.dtype(
    [
        ("id", "<u4"),
        ("state", "u1"),
        ("location", "<f4", 3),
        ("rotation", "<f4", 3),
        ("velocity", "<f4", 3),
        ("angular_velocity", "<f4", 3),
        ("acceleration", "<f4", 3),
        ("throttle", "<f4"),
        ("steer", "<f4"),
        ("brake", "<f4"),
        ("hand_brake", "?"),
        ("reverse", "?"),
        ("manual_gear_shift", "?"),
        ("gear", "<i4"),
        ("speed_limit", "<f4"),
        ("traffic_light_state", "u1"),
        ("at_traffic_light", "?"),
        ("traffic_light_id", "<u4"),
        ("failure", "u1"),
        ("unused", "V24"),
    ]
)
"""One record of the world state, 119 bytes: m, degrees (pitch, yaw, roll), m/s, deg/s, m/s2, km/h."""
WALKER_STATE = np.dtype(
    {
        "names": ["velocity", "direction", "speed", "jump"],
        "formats": [("<f4", 3), ("<f4", 3), "<f4", "?"],
        "offsets": [29, 65, 77, 81],
        "itemsize": ACTOR_STATE.itemsize,
    }
)
"""Of a walker's record: m/s, and the control that it has."""
ECHO = np.dtype([("point", "<f4", 3), ("intensity", "<f4")])
LABELLED_ECHO = np.dtype([("point", "<f4", 3), ("cosine", "<f4"), ("actor", "<u4"), ("label", "<u4")])
"""What a lidar and a semantic lidar tell of an echo: m in the sensor's frame."""


def token(stream: int, port: int) -> bytes:
    """The 24 bytes that tell a client where stream ``stream`` is: TCP, on the host of its RPC connection."""
    return _TOKEN.pack(stream, port, 1, 0, bytes(16))


def _message(kind: int, frame: int, stamp: float, place: Transform, *payload: bytes) -> bytes:
    size = _SENSOR_HEADER.size + sum(map(len, payload))
    header = _SENSOR_HEADER.pack(kind, frame, stamp, *place.location, *place.rotation)
    return b"".join((_SIZE.pack(size), header, *payload))


def world_state(
    frame: int,
    stamp: float,
    episode: int,
    wall_clock: float,
    delta: float,
    actors: NDArray[np.void],
    map_changed: bool = False,
) -> bytes:
    """The state of all actors in a frame.

    Args:
        stamp, delta: simulated seconds in this episode and of this frame.
        wall_clock: seconds, any epoch.
        actors: (N,) of ACTOR_STATE, every actor that exists.
    """
    flags = FLAG_MAP_CHANGED if map_changed else 0
    header = _EPISODE_HEADER.pack(episode, wall_clock, delta, 0, 0, 0, flags)
    return _message(WORLD_STATE, frame, stamp, Transform(), header, actors.tobytes())


def image(kind: int, frame: int, stamp: float, place: Transform, fov: float, bgra: NDArray[np.uint8]) -> bytes:
    """A camera's picture.

    Args:
        kind: one of the _CAMERA constants.
        place: of the camera in the world.
        fov: horizontal, degrees.
        bgra: (H, W, 4) uint8, encoded as that kind of camera does.
    """
    height, width = bgra.shape[:2]
    header = _IMAGE_HEADER.pack(width, height, fov)
    return _message(kind, frame, stamp, place, header, bgra.tobytes())


def flow(frame: int, stamp: float, place: Transform, fov: float, motion: NDArray[np.float32]) -> bytes:
    """The optical flow of a camera's picture, (H, W, 2) float32."""
    height, width = motion.shape[:2]
    header = _IMAGE_HEADER.pack(width, height, fov)
    return _message(FLOW_CAMERA, frame, stamp, place, header, motion.tobytes())


def events(
    frame: int, stamp: float, place: Transform, size: tuple[int, int], fov: float, found: NDArray[np.void]
) -> bytes:
    """The events of a camera of a size (width, height), (N,) of 13 bytes each: column, row, nanosecond, polarity."""
    return _message(DVS_CAMERA, frame, stamp, place, _IMAGE_HEADER.pack(*size, fov), found.tobytes())


def radar(frame: int, stamp: float, place: Transform, points: NDArray[np.float32]) -> bytes:
    """The points of a radar, (N, 4) float32: velocity, azimuth, altitude, distance."""
    return _message(RADAR, frame, stamp, place, points.tobytes())


def lidar(
    kind: int,
    frame: int,
    stamp: float,
    place: Transform,
    angle: float,
    counts: NDArray[np.integer],
    echoes: NDArray[np.void],
) -> bytes:
    """The echoes of a frame.

    Args:
        kind: LIDAR or SEMANTIC_LIDAR.
        place: of the lidar in the world.
        angle: radians, to which it has turned.
        counts: (channels,), echoes of each channel.
        echoes: (sum of the counts,) of ECHO or LABELLED_ECHO, channel by channel.
    """
    header = _LIDAR_HEADER.pack(angle, len(counts)) + counts.astype("<u4").tobytes()
    return _message(kind, frame, stamp, place, header, echoes.tobytes())


def collision(frame: int, stamp: float, place: Transform, actor: Actor, other: Actor, impulse: Vector3D) -> bytes:
    """A contact of ``actor``, which carries the sensor, with ``other``; the impulse in N s."""
    return _message(COLLISION, frame, stamp, place, pack((actor, other, impulse)))


def imu(frame: int, stamp: float, place: Transform, reading: tuple[Vector3D, Vector3D, float]) -> bytes:
    """An inertial reading: accelerometer (m/s2), gyroscope (rad/s) and compass (rad from north)."""
    return _message(IMU, frame, stamp, place, pack(reading))


def gnss(frame: int, stamp: float, place: Transform, reading: tuple[float, float, float]) -> bytes:
    """A satellite reading: latitude and longitude in degrees, altitude in metres."""
    return _message(GNSS, frame, stamp, place, pack(reading))
