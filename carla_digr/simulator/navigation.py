"""Where walkers may go: a strip beside either guard rail, in the binary form that CARLA's client reads.

The client leads the walkers itself, by the library Detour. The bytes are one tile of a Detour navigation mesh
(DetourNavMesh.h of github.com/recastnavigation, version 7) behind the header of its demo's files. The carriageways are
in it as roads, on which the client puts the vehicles that walkers avoid; no way leads from the strips to them.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.road import BARRIER_HALF_WIDTH, MAP_NAME, RAIL_OFFSET, Road

STRIP = (
    RAIL_OFFSET + 1.5,
    RAIL_OFFSET + 4.3,
)  # m from the reference line: behind the gantries' posts, before the trees
CARRIAGEWAY = (BARRIER_HALF_WIDTH, RAIL_OFFSET)
STEP = 16.0  # m along the road that one polygon is long, at most 13 cm beside the arc
SIDEWALK, ROAD = (1, 0x02), (3, 0x08)  # area and flags of the client's crowd
WALKABLE_HEIGHT, WALKABLE_RADIUS, WALKABLE_CLIMB = 1.8, 0.3, 0.4  # m
MOST_POLYGONS = 4096
_FILE, _VERSION = 0x4D534554, 1  # "MSET"
_TILE, _TILE_VERSION = 0x444E4156, 7  # "DNAV"
_CORNERS = 6  # of a polygon, at most

_POLYGON = np.dtype(
    [
        ("first_link", "<u4"),
        ("corners", "<u2", _CORNERS),
        ("neighbours", "<u2", _CORNERS),
        ("flags", "<u2"),
        ("count", "u1"),
        ("area", "u1"),
    ]
)
_LINK = np.dtype([("to", "<u4"), ("next", "<u4"), ("edge", "u1"), ("side", "u1"), ("low", "u1"), ("high", "u1")])
_DETAIL = np.dtype([("corner", "<u4"), ("triangle", "<u4"), ("corners", "u1"), ("triangles", "u1"), ("unused", "V2")])


def file_name(road: Road) -> str:
    """What clients keep the mesh under, another one for another road or form."""
    return f"Nav/{MAP_NAME}-{hashlib.sha256(mesh(road)).hexdigest()[:12]}.bin"


def mesh(road: Road) -> bytes:
    """The navigation mesh of a road."""
    return _mesh(road.pieces.tobytes())


@lru_cache(maxsize=4)
def _mesh(pieces: bytes) -> bytes:
    road = Road(np.frombuffer(pieces).reshape(-1, 6).copy())
    bands = [(side, band, kind) for band, kind in ((STRIP, SIDEWALK), (CARRIAGEWAY, ROAD)) for side in (1.0, -1.0)]
    corners, polygons = [], []
    count = round(road.length / STEP)
    for number, (side, (inner, outer), (area, flags)) in enumerate(bands):
        left, right = sorted((side * inner, side * outer))
        s = np.arange(count) * (road.length / count)
        rims = [road.pose(s, d) for d in (left, right)]
        corners.append(np.stack([(x, np.zeros(count), y) for x, y, _ in rims], axis=1).transpose(2, 1, 0))
        polygons.append(_band(count, number * count, area, flags))
    points = np.concatenate([c.reshape(-1, 3) for c in corners]).astype("<f4")
    tile = _tile(points, np.concatenate(polygons))
    low, high = _bounds(points)
    bits = (MOST_POLYGONS - 1).bit_length()
    params = struct.pack("<3f2f2i", *low, high[0] - low[0], high[2] - low[2], 1, MOST_POLYGONS)
    return struct.pack("<3i", _FILE, _VERSION, 1) + params + struct.pack("<Ii", 1 << bits, len(tile)) + tile


def _band(count: int, first: int, area: int, flags: int) -> NDArray[np.void]:
    """A closed row of quadrangles; two corners a step, the left rim's first."""
    here = np.arange(count)
    there = (here + 1) % count
    polygons = np.zeros(count, _POLYGON)
    polygons["corners"][:, :4] = 2 * first + np.stack([2 * here, 2 * here + 1, 2 * there + 1, 2 * there], axis=1)
    polygons["neighbours"][:, 0] = first + (here - 1) % count + 1  # indices from 1 on, 0 is a border
    polygons["neighbours"][:, 2] = first + there + 1
    polygons["flags"], polygons["count"], polygons["area"] = flags, 4, area
    return polygons


def _bounds(points: NDArray[np.float32]) -> tuple[list[float], list[float]]:
    """Lowest and highest x, height and y of the tile."""
    low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return [low[0], -WALKABLE_HEIGHT, low[2]], [high[0], WALKABLE_HEIGHT, high[2]]


def _tile(points: NDArray[np.float32], polygons: NDArray[np.void]) -> bytes:
    """Header, corners, polygons, room for their links, and each polygon as two triangles."""
    count = len(polygons)
    details = np.zeros(count, _DETAIL)
    details["triangle"], details["triangles"] = 2 * np.arange(count), 2
    triangles = np.tile(np.array([(0, 1, 2, 0b000101), (0, 2, 3, 0b010100)], "u1"), (count, 1))
    links = np.zeros(2 * count, _LINK)
    low, high = _bounds(points)
    header = struct.pack(
        "<5iI9i3f3f3ff",
        *(_TILE, _TILE_VERSION, 0, 0, 0, 0),
        *(count, len(points), len(links), count, 0, len(triangles), 0, 0, count),
        *(WALKABLE_HEIGHT, WALKABLE_RADIUS, WALKABLE_CLIMB, *low, *high, 1.0 / WALKABLE_RADIUS),
    )
    parts = (points, polygons, links, details, triangles)
    return header + b"".join(part.tobytes() for part in parts)
