"""What the server knows of the world's surfaces: the objects beside the road, and where a ray meets something."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from carla_digr.simulator import sensors
from carla_digr.simulator.bodies import GANTRY_MODEL, models
from carla_digr.simulator.road import BARRIER_HALF_WIDTH, BARRIER_HEIGHT, RAIL_HEIGHT, RAIL_OFFSET
from carla_digr.simulator.scenery import scenery
from carla_digr.simulator.wire import BoundingBox, EnvironmentObject, LabelledPoint, Rotation, Transform, Vector3D
from carla_digr.simulator.world import Camera, World

ANY = 255  # the label that stands for all of them
BUILDINGS, SIGNS, VEGETATION, GUARD_RAIL = 3, 8, 9, 28
FENCE_LENGTH = 10.0  # m of barrier and rails that are one object: 6 cm beside the arc at most
RAIL_HALF_WIDTH = 0.1  # m
NEAREST = 0.1  # m from the start of a ray on which the renderer sees nothing
MOST_HITS = 32  # of a ray


def environment(world: World, label: int) -> list[EnvironmentObject]:
    """What stands beside the road, in the same order for the same world.

    Args:
        label: CARLA's CityObjectLabel of those wanted, or ANY.
    """
    found = itertools.chain(_models(world), _trees(world), _fences(world))
    return [thing._replace(id=i) for i, thing in enumerate(found, start=1) if label in (ANY, thing.label)]


def project(world: World, start: Vector3D, direction: Vector3D, distance: float) -> LabelledPoint | None:
    """The first surface on a ray, exactly where a depth camera sees it; None where there is none.

    Args:
        start: m, in the world; surfaces within NEAREST of it are not seen.
        direction: of any length.
        distance: m, of the farthest surface.

    Raises:
        ValueError: the direction has no length.
    """
    length = math.hypot(*direction)
    if not length > 0.0:
        raise ValueError("a ray needs a direction")
    x, y, z = (part / length for part in direction)
    camera = Camera(0, *start, math.atan2(z, math.hypot(x, y)), math.atan2(y, x), 0.0, 1, 1, 0.1)
    reach = float(world.depths(camera)[0, 0])
    if not reach <= distance:
        return None
    label = int(sensors.semantic_picture(world, camera)[0, 0, 2])
    return LabelledPoint(Vector3D(start.x + reach * x, start.y + reach * y, start.z + reach * z), label)


def cast(world: World, start: Vector3D, end: Vector3D) -> list[LabelledPoint]:
    """The surfaces between two points, the nearest first, at most MOST_HITS of them.

    Raises:
        ValueError: the points are the same.
    """
    way = Vector3D(*(b - a for a, b in zip(start, end, strict=True)))
    hits: list[LabelledPoint] = []
    while len(hits) < MOST_HITS:
        hit = project(world, start, way, math.dist(start, end))
        if hit is None:
            break
        hits.append(hit)
        start = hit.location
        if math.dist(start, end) <= NEAREST:
            break
    return hits


def box(x: float, y: float, yaw: float, z: float, extent: Vector3D) -> BoundingBox:
    """A box in the world: middle of its foot (m), heading (rad) and half sizes (m)."""
    return BoundingBox(Vector3D(x, y, z + extent.z), extent, Rotation(0.0, math.degrees(yaw), 0.0))


def _thing(name: str, label: int, x: float, y: float, yaw: float, extent: Vector3D) -> EnvironmentObject:
    place = Transform(Vector3D(x, y, 0.0), Rotation(0.0, math.degrees(yaw), 0.0))
    return EnvironmentObject(place, box(x, y, yaw, 0.0, extent), 0, name, label)


def _models(world: World) -> Iterator[EnvironmentObject]:
    sizes = models()
    for i, row in enumerate(scenery(world.road, world.scenery_seed).models.tolist()):
        model, (x, y, yaw) = int(row[0]), row[1:]
        length, width = sizes.half[model].tolist()
        extent = Vector3D(length, width, float(sizes.height[model]) / 2)
        name, label = ("Gantry", SIGNS) if model == GANTRY_MODEL else ("House", BUILDINGS)
        yield _thing(f"{name}_{i}", label, x, y, yaw, extent)


def _trees(world: World) -> Iterator[EnvironmentObject]:
    for i, (x, y, height, *_) in enumerate(scenery(world.road, world.scenery_seed).trees.tolist()):
        yield _thing(f"Tree_{i}", VEGETATION, x, y, 0.0, Vector3D(height / 4, height / 4, height / 2))


def _fences(world: World) -> Iterator[EnvironmentObject]:
    count = math.ceil(world.road.length / FENCE_LENGTH)
    step = world.road.length / count
    for name, d, half, height in (
        ("Barrier", 0.0, BARRIER_HALF_WIDTH, BARRIER_HEIGHT),
        ("RailRight", RAIL_OFFSET, RAIL_HALF_WIDTH, RAIL_HEIGHT),
        ("RailLeft", -RAIL_OFFSET, RAIL_HALF_WIDTH, RAIL_HEIGHT),
    ):
        xs, ys, _ = world.road.pose(np.arange(count + 1) * step, d)
        for i, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(zip(xs.tolist(), ys.tolist(), strict=True))):
            extent = Vector3D(0.5 * math.hypot(x1 - x0, y1 - y0), half, height / 2)
            yaw = math.atan2(y1 - y0, x1 - x0)
            yield _thing(f"{name}_{i}", GUARD_RAIL, 0.5 * (x0 + x1), 0.5 * (y0 + y1), yaw, extent)
