"""What stands in the driving task's picture, and the same instant without it, rendered anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import IMAGE_SIZE
from carla_digr.simulator.road import LANES
from carla_digr.simulator.shading import (
    FIRST_LINE_BIT,
    ID_BARRIER,
    ID_RAIL,
    WITHOUT_BARRIER,
    WITHOUT_BUILDINGS,
    WITHOUT_RAILS,
    WITHOUT_TREES,
)
from carla_digr.simulator.traffic import ONCOMING
from carla_digr.tasks.driving.classes import SAMPLES
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.objects import SceneObject

LEAST_PIXELS = 4  # that show an object, or it is not in view
LEAST_CHANGE = 8  # levels by which a line's pixel differs from the road without it
PATH_WIDTH = 2.0  # m to both sides of the ego that are its way


def scene_objects(drive: InProcessDrive) -> list[SceneObject]:
    """Vehicles with their shadows, the lane lines one by one, barrier, rails and scenery of the present picture.

    A vehicle's mask is every pixel of which one of SAMPLES x SAMPLES points shows it; a line's, which is thinner than a
    pixel from 20 m on, every pixel that it changes.
    """
    world, camera = drive.world, drive.camera
    size = IMAGE_SIZE * SAMPLES
    ids = world.instances(replace(camera, width=size, height=size)).reshape(IMAGE_SIZE, SAMPLES, IMAGE_SIZE, SAMPLES)
    picture = _rgb(world.render(camera))
    found = []
    in_view = np.unique(ids)
    for row in world.vehicles[np.isin(world.vehicles["id"], in_view)]:
        mask = (ids == row["id"]).any(axis=(1, 3))
        if row["id"] != drive.ego and mask.sum() >= LEAST_PIXELS:
            kind = "oncoming vehicle" if row["driver"] == ONCOMING else "vehicle"
            without = _rgb(world.render(camera, without_vehicle=int(row["id"])))
            found.append(SceneObject(kind, f"vehicle {row['id']}", mask, without, True, _nearness(drive, row)))
    for name, bits in _lines().items():
        without = _rgb(world.render(camera, without=bits))
        mask = (np.abs(without.astype(np.int16) - picture) > LEAST_CHANGE).any(axis=0)
        if mask.sum() >= LEAST_PIXELS:
            found.append(SceneObject("lane line", name, mask, without))
    for kind, ident, bits in (("barrier", ID_BARRIER, WITHOUT_BARRIER), ("guard rail", ID_RAIL, WITHOUT_RAILS)):
        mask = (ids == ident).any(axis=(1, 3))
        if mask.sum() >= LEAST_PIXELS:
            found.append(SceneObject(kind, kind, mask, _rgb(world.render(camera, without=bits))))
    without = _rgb(world.render(camera, without=WITHOUT_TREES | WITHOUT_BUILDINGS))
    mask = (np.abs(without.astype(np.int16) - picture) > LEAST_CHANGE).any(axis=0)
    if mask.sum() >= LEAST_PIXELS:
        found.append(SceneObject("scenery", "trees and buildings", mask, without))
    return found


def _rgb(bgra: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (3, H, W) of the renderer's BGRA."""
    return np.ascontiguousarray(bgra[:, :, 2::-1].transpose(2, 0, 1))


def _lines() -> dict[str, int]:
    """Lane lines by name, with the bit that leaves each out; those of the oncoming carriageway are one."""
    own = {f"line {k} of {LANES + 1}": 1 << (FIRST_LINE_BIT + k) for k in range(LANES + 1)}
    return own | {"lines of the oncoming carriageway": ((1 << (LANES + 1)) - 1) << (FIRST_LINE_BIT + LANES + 1)}


def _nearness(drive: InProcessDrive, row: np.void) -> float:
    """1 / (1 + distance ahead), tripled in the ego's way; vehicles behind it are as near as far ones."""
    ego, ring = drive.world.vehicle(drive.ego), drive.road.length
    ahead = float((row["s"] - ego["s"] + 0.5 * ring) % ring - 0.5 * ring)
    if row["driver"] == ONCOMING or ahead < 0.0:
        return 1e-3 / (1.0 + abs(ahead))
    in_the_way = abs(float(row["d"] - ego["d"])) < PATH_WIDTH
    return (3.0 if in_the_way else 1.0) / (1.0 + ahead)
