"""What stands still beside the ring highway, and the road in the form the renderer reads it fastest.

Everything follows from the road and a seed: the same road always has the same trees, unless others are asked for.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.bodies import GANTRY_MODEL, HOUSE_MODELS
from carla_digr.simulator.road import CURVATURE, LENGTH, PAVED_EDGE, S0, Road

COURSE_STEP = 4.0  # m between vertices of the barrier and the rails: at most 8 mm beside the arc
BLOCK = 4  # course steps a block
CELL = 16.0  # m, side of a cell of the piece grid
VERGE = 60.0  # m from the reference line: farther ground is countryside without road coordinates

# Columns of Scenery.pieces: the middle of a piece with its frame; curvature 0 for straights.
MID_S, MID_X, MID_Y, COS, SIN, CENTER_X, CENTER_Y, RADIUS, SIDE, HALF, COS_HALF, SIN_HALF = range(12)


class Scenery(NamedTuple):
    """The road and its surroundings as arrays for compiled code."""

    pieces: NDArray[np.float64]  # (P, 12), columns above
    origin: NDArray[np.float64]  # (2,) x, y of the grid's corner, m
    grid: NDArray[np.int16]  # (rows along y, columns along x) piece nearest to the cell's centre, -1 = countryside
    course: NDArray[np.float64]  # (N, 4) x, y, cos, sin of the reference line; N is a multiple of BLOCK
    trees: NDArray[np.float64]  # (T, 6) x, y, height, kind, shade, phase
    models: NDArray[np.float64]  # (M, 4) model index, x, y, yaw
    dash_period: float


SCENERIES = 16  # kept at the same time


def scenery(road: Road, seed: int = 0) -> Scenery:
    """The scenery of a road; made once for each road and seed."""
    return _scenery(road.pieces.tobytes(), seed)


@lru_cache(maxsize=SCENERIES + 4)
def _scenery(pieces_bytes: bytes, seed: int) -> Scenery:
    road = Road(np.frombuffer(pieces_bytes).reshape(-1, 6).copy())
    pieces = np.stack([_piece_frame(p) for p in road.pieces])
    origin, grid = _piece_grid(road)
    steps = BLOCK * round(road.length / COURSE_STEP / BLOCK)
    x, y, heading = road.pose(np.arange(steps) * (road.length / steps), 0.0)
    course = np.stack([x, y, np.cos(heading), np.sin(heading)], axis=1)
    houses = _houses(road, seed)
    return Scenery(
        pieces=pieces,
        origin=origin,
        grid=grid,
        course=course,
        trees=_trees(road, houses, seed),
        models=np.concatenate([houses, _gantries(road)]),
        dash_period=road.dash_period,
    )


def _piece_frame(piece: NDArray[np.float64]) -> NDArray[np.float64]:
    """A row of Scenery.pieces."""
    half, k = 0.5 * piece[LENGTH], piece[CURVATURE]
    x, y, heading = (float(v) for v in Road(piece[None] * [0, 1, 1, 1, 1, 1]).pose(half, 0.0))
    c, s = math.cos(heading), math.sin(heading)
    sign = math.copysign(1.0, k)
    radius, center = (1.0 / k, (x - s / k, y + c / k)) if k else (0.0, (0.0, 0.0))
    return np.array(
        [
            piece[S0] + half,
            x,
            y,
            c,
            s,
            *center,
            radius,
            sign if k else 0.0,
            half,
            math.cos(half * k),
            abs(math.sin(half * k)),
        ]
    )


def _piece_grid(road: Road) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    x, y, _ = road.pose(np.linspace(0, road.length, 2000), 0.0)
    margin = VERGE + 2 * CELL
    origin = np.array([x.min() - margin, y.min() - margin])
    columns = int((x.max() + margin - origin[0]) / CELL) + 1
    rows = int((y.max() + margin - origin[1]) / CELL) + 1
    cx = origin[0] + (np.arange(columns) + 0.5) * CELL
    cy = origin[1] + (np.arange(rows) + 0.5) * CELL
    s, _d, _ = road.project(cx[None, :], cy[:, None])
    px, py, _ = road.pose(s, 0.0)
    distance = np.hypot(px - cx[None, :], py - cy[:, None])
    piece = np.searchsorted(road.pieces[:, S0], s, side="right") - 1
    return origin, np.where(distance < VERGE + CELL, piece, -1).astype(np.int16)


def _clear(road: Road, x, y, distance: float) -> NDArray[np.bool_]:
    """Which points are farther from every part of the ring's reference line than ``distance``."""
    s, _, _ = road.project(x, y)
    px, py, _ = road.pose(s, 0.0)
    return np.hypot(px - x, py - y) > distance


def _houses(road: Road, seed: int) -> NDArray[np.float64]:
    rng = np.random.Generator(np.random.PCG64(20 + 1000 * seed))
    s = np.arange(60.0, road.length - 30.0, 75.0)
    s = s + rng.uniform(-25, 25, s.size)
    side = rng.choice([-1.0, 1.0], s.size)
    d = side * rng.uniform(44, 85, s.size)
    x, y, heading = road.pose(s, d)
    model = rng.choice(HOUSE_MODELS, s.size)
    yaw = heading + rng.choice([0.0, math.pi / 2], s.size) + rng.uniform(-0.3, 0.3, s.size)
    keep = _clear(road, x, y, 38.0) & (rng.random(s.size) < 0.8)
    return np.stack([model, x, y, yaw], axis=1)[keep]


def _gantries(road: Road) -> NDArray[np.float64]:
    s = np.arange(150.0, road.length - 100.0, 420.0)
    x, y, heading = road.pose(s, 0.0)
    return np.stack([np.full(s.size, GANTRY_MODEL), x, y, heading], axis=1)


def _trees(road: Road, houses: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Loose rows along the verge and groves behind; none on a house."""
    rng = np.random.Generator(np.random.PCG64(21 + 1000 * seed))
    loose = int(road.length / 22.0)
    s = rng.uniform(0, road.length, loose)
    d = rng.choice([-1.0, 1.0], loose) * (PAVED_EDGE + rng.uniform(6.0, 26.0, loose))
    groves = int(road.length / 60.0)
    grove_s = np.repeat(rng.uniform(0, road.length, groves), 7)
    grove_d = np.repeat(rng.choice([-1.0, 1.0], groves) * rng.uniform(45, 110, groves), 7)
    s = np.concatenate([s, grove_s + rng.normal(0, 9, grove_s.size)])
    d = np.concatenate([d, grove_d + rng.normal(0, 7, grove_s.size)])
    x, y, _ = road.pose(s, d)
    height = rng.uniform(4.5, 10.0, s.size)
    kind = np.where(np.sin(s / 170.0) + rng.normal(0, 0.7, s.size) > 0.5, 1.0, 0.0)
    keep = _clear(road, x, y, PAVED_EDGE + 5.0)
    for _, hx, hy, _ in houses:
        keep &= np.hypot(x - hx, y - hy) > 15.0
    shade, phase = rng.uniform(0.8, 1.15, s.size), rng.uniform(0, 1, s.size)
    return np.stack([x, y, height, kind, shade, phase], axis=1)[keep]


@lru_cache(maxsize=1)
def textures() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Static patterns: fine noise (256, 256) tileable in [-1, 1]; cloud density (64, 1024) in [0, 1], rows from the
    horizon up, columns around; hill height (2, 1024), far and near range, as tangent of elevation."""
    rng = np.random.Generator(np.random.PCG64(22))
    octaves = [_tile(rng, 256, 256, n, n) * w for n, w in ((256, 0.6), (64, 0.5), (16, 0.5))]
    noise = np.sum(octaves, axis=0)
    noise = noise / np.abs(noise).max()
    octaves = [_tile(rng, 64, 1024, 2 * n, 4 * n) * w for n, w in ((4, 1.0), (8, 0.6), (16, 0.35), (32, 0.18))]
    cloud = np.sum(octaves, axis=0)
    cloud = (cloud - cloud.min()) / (cloud.max() - cloud.min())
    angle = np.arange(1024) * (2 * math.pi / 1024)
    far = 0.030 + sum(a * np.sin(n * angle + p) for n, a, p in ((3, 0.010, 0.3), (7, 0.007, 1.9), (17, 0.004, 4.0)))
    near = 0.014 + sum(a * np.sin(n * angle + p) for n, a, p in ((5, 0.006, 2.2), (11, 0.005, 0.7), (29, 0.002, 5.0)))
    hills = np.maximum(np.stack([far, near]), 0.004)
    return noise.astype(np.float32), cloud.astype(np.float32), hills.astype(np.float32)


def _tile(rng, rows: int, columns: int, coarse_rows: int, coarse_columns: int) -> NDArray[np.float64]:
    """Smooth value noise in [-1, 1] that repeats in both directions."""
    grid = rng.uniform(-1, 1, (coarse_rows, coarse_columns))
    for axis, size in ((0, rows), (1, columns)):
        n = grid.shape[axis]
        at = np.arange(size) * (n / size)
        low = np.floor(at).astype(int)
        t = at - low
        t = t * t * (3 - 2 * t)
        shape = (-1, 1) if axis == 0 else (1, -1)
        grid = np.take(grid, low, axis) * (1 - t.reshape(shape)) + np.take(grid, (low + 1) % n, axis) * t.reshape(shape)
    return grid
