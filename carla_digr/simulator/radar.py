"""What a radar sees: points in a cone, where they lie and how fast they come nearer or go away.

As CARLA's radar: the directions of a frame are drawn at random, closer together around the axis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.lidar import MOST_SHOTS, NOTHING, cast
from carla_digr.simulator.renderer import Pose, camera_axes
from carla_digr.simulator.world import World


class Cone(NamedTuple):
    """A radar's settings, angles in degrees; names and defaults are those of CARLA's blueprint."""

    horizontal_fov: float = 30.0
    vertical_fov: float = 30.0
    range: float = 100.0  # m
    points_per_second: int = 1500


def detections(
    world: World, pose: Pose, velocity: tuple[float, float], cone: Cone, seconds: float, draw: np.random.Generator
) -> NDArray[np.float32]:
    """The points of one frame.

    Args:
        world: as it is.
        pose: of the sensor, m and rad.
        velocity: of the sensor on the plane, m/s.
        cone: settings.
        seconds: that the frame lasts.
        draw: of the directions.

    Returns:
        (N, 4) float32: velocity (m/s, positive: it goes away), azimuth and altitude (rad), distance (m).
    """
    count = min(int(cone.points_per_second * seconds), MOST_SHOTS)
    radius, turn = draw.random(count), draw.uniform(0.0, 2.0 * math.pi, count)
    wide, high = (math.tan(math.radians(fov) / 2) * radius for fov in (cone.horizontal_fov, cone.vertical_fov))
    along = np.stack([np.ones(count), wide * np.cos(turn), high * np.sin(turn)], axis=-1)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    rays = along @ camera_axes(*pose[3:])
    distance, ids, _ = cast(world.road, np.array(pose[:3]), world.drawn(), rays, cone.range, world.scenery_seed)
    hit = ids != NOTHING
    along, rays, distance, ids = along[hit], rays[hit], distance[hit], ids[hit]
    movers = world.movers()
    own = np.zeros((len(ids), 2))
    thing = ids > 0
    own[thing] = movers[np.searchsorted(movers[:, 0], ids[thing]), 4:]
    moving = own - velocity
    return np.stack(
        [
            (moving * rays[:, :2]).sum(axis=1),
            np.arctan2(along[:, 1], along[:, 0]),
            np.arcsin(along[:, 2]),
            distance,
        ],
        axis=-1,
    ).astype(np.float32)
