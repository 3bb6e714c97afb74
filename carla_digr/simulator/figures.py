"""Walkers and props in the world: who they are, what cameras and lidars show of them, and which vehicles hit them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carla_digr.simulator.bodies import FIRST_SHAPE
from carla_digr.simulator.contacts import TOUCHING, box_overlap, push
from carla_digr.simulator.renderer import VehicleTable

FIGURE = np.dtype(
    [
        ("id", np.int64),
        ("shape", np.int64),
        ("x", np.float64),
        ("y", np.float64),
        ("yaw", np.float64),
        ("half_length", np.float64),
        ("half_width", np.float64),
        ("mass", np.float64),
        ("vx", np.float64),
        ("vy", np.float64),
        ("label", np.uint8),
        ("solid", np.bool_),
        ("color", np.uint8, 3),
    ],
    align=True,
)
"""One of them: actor id, index into shapes.NAMES, m, rad, kg, m/s, CityObjectLabel, whether vehicles hit it, RGB."""
NOBODY = np.zeros(0, FIGURE)


def drawn_with(vehicles: VehicleTable, figures: NDArray[np.void]) -> VehicleTable:
    """What the renderer draws besides the scenery; the shapes follow the other models."""
    others = VehicleTable(
        figures["id"].astype(np.int32),
        figures["shape"] + FIRST_SHAPE,
        figures["x"],
        figures["y"],
        figures["yaw"],
        figures["color"],
        np.zeros(len(figures), np.bool_),
    )
    columns: Any = zip(vehicles, others, strict=True)
    return VehicleTable(*(np.concatenate(pair) for pair in columns))


@njit(cache=True, nogil=True)
def strike(vehicles, figures, contacts):
    """Find and resolve the overlaps of vehicles with solid figures, plastically; returns their number.

    ``contacts`` (C, 5) receives the vehicle's index, the figure's, and the impulse's direction nx, ny and size on the
    figure. What has a mass is pushed aside; whoever moves it decides where it is next.
    """
    count = 0
    a = np.empty(5)
    b = np.empty(5)
    for i in range(vehicles.shape[0]):
        v = vehicles[i]
        if v.ghost:
            continue
        for j in range(figures.shape[0]):
            f = figures[j]
            reach = 0.5 * (v.length + v.width) + f.half_length + f.half_width
            if not f.solid or (f.x - v.x) ** 2 + (f.y - v.y) ** 2 > reach * reach or count == contacts.shape[0]:
                continue
            a[0], a[1], a[2], a[3], a[4] = v.x, v.y, v.yaw, 0.5 * v.length, 0.5 * v.width
            b[0], b[1], b[2], b[3], b[4] = f.x, f.y, f.yaw, f.half_length, f.half_width
            depth, nx, ny = box_overlap(a, b)
            if depth <= TOUCHING:
                continue
            closing = (v.speed * math.cos(v.yaw) - f.vx) * nx + (v.speed * math.sin(v.yaw) - f.vy) * ny
            heavy = f.mass == math.inf
            impulse = max(closing, 0.0) * (v.mass if heavy else v.mass * f.mass / (v.mass + f.mass))
            push(v, -nx, -ny, depth if heavy else 0.0, impulse)
            contacts[count, 0], contacts[count, 1] = i, j
            contacts[count, 2], contacts[count, 3], contacts[count, 4] = nx, ny, impulse
            count += 1
    return count
