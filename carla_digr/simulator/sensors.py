"""What sensors measure, in CARLA's terms: labelled and depth pictures, inertial and satellite readings."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator import lidar, streaming, wire
from carla_digr.simulator.blueprints import (
    COSMOS,
    DEPTH,
    DVS,
    GRAVITY,
    INSTANCE,
    LABELS,
    LIDAR,
    NORMALS,
    RGB,
    SEMANTIC,
    SEMANTIC_LIDAR,
)
from carla_digr.simulator.events import Contrast, EventCamera
from carla_digr.simulator.figures import NOBODY, strike
from carla_digr.simulator.optics import Look, flow, normals
from carla_digr.simulator.renderer import camera_axes
from carla_digr.simulator.road import LATITUDE, LONGITUDE
from carla_digr.simulator.shading import (
    ID_BARRIER,
    ID_BUILDING,
    ID_LINE,
    ID_RAIL,
    ID_ROAD,
    ID_SIGN,
    ID_SKY,
    ID_TERRAIN,
    ID_VEGETATION,
)
from carla_digr.simulator.wire import Vector3D
from carla_digr.simulator.world import Camera, World

EARTH_SCALE = 0.9996 * 6378137.0  # m a radian, of the projection the client uses
FAR = 1000.0  # m, the largest depth a picture can hold; farther surfaces and the sky have it

# CARLA's CityObjectLabel of what is no vehicle, at the negative of the renderer's id.
_STATIC_LABELS = np.zeros(9, np.uint8)
for _id, _label in (
    (ID_SKY, 11),
    (ID_ROAD, 1),
    (ID_LINE, 24),
    (ID_BARRIER, 28),
    (ID_RAIL, 28),
    (ID_VEGETATION, 9),
    (ID_BUILDING, 3),
    (ID_SIGN, 8),
    (ID_TERRAIN, 10),
):
    _STATIC_LABELS[-_id] = _label


CITYSCAPES = np.zeros((29, 3), np.uint8)
"""RGB of the labels that there are here."""
for _label, _rgb in {
    1: (128, 64, 128),
    3: (70, 70, 70),
    8: (220, 220, 0),
    9: (107, 142, 35),
    10: (152, 251, 152),
    11: (70, 130, 180),
    12: (220, 20, 60),
    14: (0, 0, 142),
    15: (0, 0, 70),
    16: (0, 60, 100),
    20: (110, 190, 160),
    21: (170, 120, 50),
    24: (157, 234, 50),
    28: (180, 165, 180),
}.items():
    CITYSCAPES[_label] = _rgb


# Pictures, all (H, W, 4) uint8 BGRA.


def semantic_picture(world: World, camera: Camera) -> NDArray[np.uint8]:
    """Red holds CARLA's CityObjectLabel of what a pixel's centre shows."""
    ids = world.instances(camera)
    picture = np.zeros((*ids.shape, 4), np.uint8)
    picture[..., 2] = _labels(world, ids)
    return picture


def instance_picture(world: World, camera: Camera) -> NDArray[np.uint8]:
    """Red holds the label, green and blue the low and the high byte of an id.

    The id is a vehicle's actor id modulo 65536; what is no vehicle has the renderer's id without its sign.
    """
    ids = world.instances(camera)
    number = np.abs(ids)
    picture = np.zeros((*ids.shape, 4), np.uint8)
    picture[..., 2] = _labels(world, ids)
    picture[..., 1] = number & 0xFF
    picture[..., 0] = (number >> 8) & 0xFF
    return picture


def depth_picture(world: World, camera: Camera) -> NDArray[np.uint8]:
    """Depth along the optical axis: red, green and blue are a 24-bit number, low byte first, 2^24 - 1 being 1000 m."""
    share = np.minimum(world.depths(camera).astype(np.float64), FAR) / FAR
    number = np.rint(share * (2**24 - 1)).astype(np.uint32)
    picture = np.empty((*number.shape, 4), np.uint8)
    picture[..., 2] = number & 0xFF
    picture[..., 1] = (number >> 8) & 0xFF
    picture[..., 0] = number >> 16
    picture[..., 3] = 255
    return picture


def normals_picture(world: World, camera: Camera) -> NDArray[np.uint8]:
    """Red, green and blue are x, y and z in the world of the unit normal, -1 to 1 as 0 to 255; the sky has grey."""
    facing = normals(world.depths(camera), world.instances(camera), world.pose(camera), camera.fov)
    picture = np.full((*facing.shape[:2], 4), 255, np.uint8)
    picture[..., 2::-1] = np.rint(127.5 + 127.5 * facing)
    return picture


def coloured_picture(world: World, camera: Camera) -> NDArray[np.uint8]:
    """The label of what a pixel's centre shows in the colours of the Cityscapes data set."""
    picture = np.full((camera.height, camera.width, 4), 255, np.uint8)
    picture[..., 2::-1] = CITYSCAPES[_labels(world, world.instances(camera))]
    return picture


PICTURES: dict[str, tuple[int, Callable[[World, Camera], NDArray[np.uint8]]]] = {
    RGB: (streaming.RGB_CAMERA, World.render),
    SEMANTIC: (streaming.SEMANTIC_CAMERA, semantic_picture),
    INSTANCE: (streaming.INSTANCE_CAMERA, instance_picture),
    DEPTH: (streaming.DEPTH_CAMERA, depth_picture),
    NORMALS: (streaming.NORMALS_CAMERA, normals_picture),
    COSMOS: (streaming.COSMOS_CAMERA, coloured_picture),
    DVS: (streaming.DVS_CAMERA, World.render),  # whose events follow from it
}
"""Blueprint to index in the client's registry of sensors and how the picture is made."""


LIDARS = {LIDAR: streaming.LIDAR, SEMANTIC_LIDAR: streaming.SEMANTIC_LIDAR}
"""Blueprint to index in the client's registry of sensors."""


def _labels(world: World, ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """CityObjectLabel for the ids of an instance picture."""
    labels = _STATIC_LABELS[np.maximum(-ids, 0)]
    shown = ids > 0
    vehicles = world.vehicles  # in order of their ids
    own = LABELS[vehicles["kind"]]
    if len(world.figures):
        known = np.concatenate([vehicles["id"], world.figures["id"]])
        order = np.argsort(known)
        own = np.concatenate([own, world.figures["label"]])[order]
        labels[shown] = own[np.searchsorted(known[order], ids[shown])]
        return labels
    labels[shown] = own[np.searchsorted(vehicles["id"], ids[shown])]
    return labels


# Readings.


class Noise:
    """Normally distributed errors of one sensor, from its blueprint's attributes; equal seeds give equal errors.

    Args:
        attributes: ``noise_seed`` and, for a quantity q, ``noise_q_stddev`` and ``noise_q_bias`` (or with an axis at
            the end); those that are missing are 0.
    """

    def __init__(self, attributes: dict[str, float]):
        self._attributes = attributes
        self._draw = np.random.default_rng(int(attributes["noise_seed"]))

    def __call__(self, quantity: str, axis: str = "") -> float:
        """The next error of a quantity."""
        scale, bias = (self._attributes.get(f"noise_{quantity}_{part}{axis}", 0.0) for part in ("stddev", "bias"))
        return bias + float(self._draw.normal(0.0, scale))

    def vector(self, quantity: str) -> NDArray[np.float64]:
        """The next errors of a vector, (3,)."""
        return np.array([self(quantity, axis) for axis in ("_x", "_y", "_z")])


def inertial(vehicle: np.void, mounted: wire.Rotation, noise: Noise) -> tuple[Vector3D, Vector3D, float]:
    """An inertial measurement unit at the centre of a vehicle, turned by ``mounted`` (degrees).

    Returns:
        accelerometer: m/s2 in the sensor's frame, with what holds it against gravity
        gyroscope: rad/s in the sensor's frame
        compass: rad clockwise from north, which is -y
    """
    pitch, yaw, roll = map(math.radians, mounted)
    axes = camera_axes(pitch, yaw + float(vehicle["yaw"]), roll)
    acceleration = axes @ (float(vehicle["ax"]), float(vehicle["ay"]), GRAVITY) + noise.vector("accel")
    rate = axes @ (0.0, 0.0, float(vehicle["yaw_rate"])) + noise.vector("gyro")
    compass = math.atan2(axes[0, 0], -axes[0, 1]) % (2.0 * math.pi)
    return Vector3D(*acceleration.tolist()), Vector3D(*rate.tolist()), compass


class Echoes:
    """How the echoes of one lidar weaken, get lost and are displaced; equal seeds give equal losses.

    Args:
        attributes: ``noise_seed``, ``noise_stddev`` and those from ``atmosphere_attenuation_rate`` to
            ``dropoff_zero_intensity`` of CARLA's blueprint.
    """

    def __init__(self, attributes: dict[str, float]):
        self._attributes = attributes
        self._draw = np.random.default_rng(int(attributes["noise_seed"]))

    def __call__(self, seen: lidar.Scan) -> tuple[NDArray[np.int64], NDArray[np.void]]:
        """Of a frame's scan the echoes that come back: how many of each channel, and (N,) of streaming.ECHO.

        The intensity is exp(-rate * distance). Of all beams the share ``dropoff_general_rate`` is lost, of the echoes
        weaker than the limit those of intensity 0 by ``dropoff_zero_intensity``, the others less in proportion.
        """
        a = self._attributes
        distance = np.linalg.norm(seen.points, axis=1)
        intensity = np.exp(-a["atmosphere_attenuation_rate"] * distance)
        chance, weak = self._draw.random((2, len(distance)))
        limit = max(a["dropoff_intensity_limit"], 1e-9)
        kept = 1.0 - a["dropoff_zero_intensity"] * np.maximum(1.0 - intensity / limit, 0.0)
        back = (chance >= a["dropoff_general_rate"]) & (weak < kept)
        farther = 1.0 + self._draw.normal(0.0, a["noise_stddev"], len(distance)) / np.maximum(distance, 1e-6)
        echoes = np.empty(int(back.sum()), streaming.ECHO)
        echoes["point"] = (seen.points * farther[:, None])[back]
        echoes["intensity"] = intensity[back]
        channel = np.repeat(np.arange(len(seen.counts)), seen.counts)
        return np.bincount(channel[back], minlength=len(seen.counts)), echoes


def labelled(world: World, seen: lidar.Scan) -> NDArray[np.void]:
    """All echoes of a scan with what was hit, (N,) of streaming.LABELLED_ECHO."""
    echoes = np.zeros(len(seen.ids), streaming.LABELLED_ECHO)
    echoes["point"], echoes["cosine"] = seen.points, seen.cosines
    echoes["actor"] = np.maximum(seen.ids, 0)
    echoes["label"] = _labels(world, seen.ids)
    return echoes


def satellite(place: Vector3D, noise: Noise) -> tuple[float, float, float]:
    """Latitude and longitude (degrees) and altitude (m) of a place, as the 0.9.16 client's map converts it.

    That is the inverse transverse Mercator projection of a sphere (Snyder, Map Projections, eq. 8-6 to 8-8), with +y
    taken for north although compasses take -y for it.
    """
    x, y = place.x / EARTH_SCALE, math.radians(LATITUDE) + place.y / EARTH_SCALE
    latitude = math.degrees(math.asin(math.sin(y) / math.cosh(x)))
    longitude = LONGITUDE + math.degrees(math.atan2(math.sinh(x), math.cos(y)))
    return latitude + noise("lat"), longitude + noise("lon"), place.z + noise("alt")


def warm_up(world: World, camera: Camera) -> None:
    """Compile the code of what a drive does not have: lidars, radars, flow, events, normals, walkers."""
    world.scan((0.0, 0.0, 2.0, 0.0, 0.0, 0.0), lidar.Beams(), 0.0, 0.05)
    look = Look(world.pose(camera), np.zeros(0, np.int64), np.zeros((0, 3)))
    flow(world.depths(camera), world.instances(camera), camera.fov, look, look)
    normals_picture(world, camera)
    events = EventCamera(Contrast(), 0)
    for shade in (0, 255):
        events(np.full((1, 1, 4), shade, np.uint8), 0.05)
    strike(world.vehicles, NOBODY, np.zeros((1, 5)))
