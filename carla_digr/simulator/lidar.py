"""Where the beams of a lidar end: on the surfaces that the cameras show, ray by ray.

The surfaces around the sensor are gathered as convex polygons and balls, those that face it, and sorted by the
direction in which they lie; so a ray meets few of them. Below them is the flat ground. How beams are spread over
channels and time, and how their echoes weaken, is as CARLA's documentation of its lidars has it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.bodies import GANTRY_MODEL, MAX_CORNERS, models
from carla_digr.simulator.ground import ground_name
from carla_digr.simulator.raster import PROFILE
from carla_digr.simulator.renderer import Pose, VehicleTable, camera_axes
from carla_digr.simulator.road import RAIL_HEIGHT, RAIL_OFFSET, Road
from carla_digr.simulator.scenery import BLOCK, scenery
from carla_digr.simulator.shading import ID_BARRIER, ID_BUILDING, ID_RAIL, ID_ROAD, ID_SIGN, ID_VEGETATION, compiled

MOST_POLYGONS = 1 << 15  # gathered around one sensor; what is farther away is left out first
MOST_BALLS = 1 << 12
MOST_SHOTS = 1 << 18  # of one frame
SECTORS = 720  # of the horizon
NOTHING = -100  # id of a beam without an echo
"""Ids are those of `shading`, and positive ones of vehicles."""


def _bands() -> NDArray[np.float64]:
    """What runs along the road: from d, z to d, z across it, the id, and 1 if it is seen from both sides."""
    rows = []
    for (d0, z0), (d1, z1) in pairwise(PROFILE):
        rows += [(d0, z0, d1, z1, ID_BARRIER, 0), (-d1, z1, -d0, z0, ID_BARRIER, 0)]
    top_d, top_z = PROFILE[-1]
    rows.append((top_d, top_z, -top_d, top_z, ID_BARRIER, 0))
    rows += [(d, RAIL_HEIGHT - 0.34, d, RAIL_HEIGHT, ID_RAIL, 1) for d in (-RAIL_OFFSET, RAIL_OFFSET)]
    return np.array(rows, np.float64)


BANDS = _bands()


class Beams(NamedTuple):
    """A lidar's settings, angles in degrees; names and defaults are those of CARLA's blueprint."""

    channels: int = 32
    range: float = 10.0  # m
    points_per_second: int = 56_000
    rotation_frequency: float = 10.0  # Hz
    upper_fov: float = 10.0
    lower_fov: float = -30.0
    horizontal_fov: float = 360.0


class Scan(NamedTuple):
    """What a lidar sees in one frame.

    Attributes:
        angle: degrees, at which the next frame begins.
        counts: int (channels,), echoes of each channel, the highest first.
        points: float32 (N, 3), m in the sensor's frame (x forward, y right, z up), channel by channel.
        ids: int32 (N,), what was hit.
        cosines: float32 (N,), of the angle between beam and surface normal.
    """

    angle: float
    counts: NDArray[np.int64]
    points: NDArray[np.float32]
    ids: NDArray[np.int32]
    cosines: NDArray[np.float32]


def scan(
    road: Road, pose: Pose, vehicles: VehicleTable, beams: Beams, angle: float, seconds: float, scenery_seed: int = 0
) -> Scan:
    """The echoes of the beams of one frame; a pure function of its arguments.

    Args:
        road: with its surroundings.
        pose: of the sensor, m and rad.
        vehicles: all there are.
        beams: settings.
        angle: degrees, at which the frame begins.
        seconds: that the frame lasts.
        scenery_seed: of the trees and houses; 0: the usual ones.
    """
    shots = min(round(beams.points_per_second * seconds / beams.channels), MOST_SHOTS // beams.channels)
    turned = beams.rotation_frequency * beams.horizontal_fov * seconds
    steps = angle + turned / max(shots, 1) * np.arange(shots)
    around = np.radians(steps % beams.horizontal_fov - beams.horizontal_fov / 2)
    up = np.radians(np.linspace(beams.upper_fov, beams.lower_fov, beams.channels))
    along = np.stack(  # in the sensor's frame, (channels, shots, 3)
        [
            np.cos(up)[:, None] * np.cos(around),
            np.cos(up)[:, None] * np.sin(around),
            np.repeat(np.sin(up)[:, None], shots, axis=1),
        ],
        axis=-1,
    )
    rays = along.reshape(-1, 3) @ camera_axes(*pose[3:])
    distance, ids, cosines = cast(road, np.array(pose[:3]), vehicles, rays, beams.range, scenery_seed)
    hit = ids != NOTHING
    points = (along.reshape(-1, 3)[hit] * distance[hit, None]).astype(np.float32)
    counts = hit.reshape(beams.channels, shots).sum(axis=1)
    return Scan((angle + turned) % beams.horizontal_fov, counts, points, ids[hit], cosines[hit].astype(np.float32))


def cast(
    road: Road, eye: NDArray[np.float64], vehicles: VehicleTable, rays: NDArray[np.float64], reach: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.float64]]:
    """Distance (m) to what each ray meets first, its id, and the cosine at which it meets it."""
    world = scenery(road, seed)
    corners = np.empty((MOST_POLYGONS, MAX_CORNERS, 3))
    normals = np.empty((MOST_POLYGONS, 3))
    sides, names = np.empty(MOST_POLYGONS, np.int64), np.empty(MOST_POLYGONS, np.int32)
    balls = np.empty((MOST_BALLS, 4))
    polygons, round_ones = _gather(eye, reach, world, models(), vehicles, corners, sides, normals, names, balls)
    first, last = np.empty(polygons, np.int64), np.empty(polygons, np.int64)
    starts = np.zeros(SECTORS + 1, np.int64)
    _spread(eye, corners, sides, polygons, first, last, starts)
    members = np.empty(starts[-1], np.int64)
    _sort_in(first, last, starts, members)
    distance, cosines = np.empty(len(rays)), np.empty(len(rays))
    ids = np.empty(len(rays), np.int32)
    _meet(
        eye, reach, rays, corners, sides, normals, names, starts, members, balls, round_ones, world, distance, ids,
        cosines,
    )  # fmt: skip
    return distance, ids, cosines


# --- what stands around the sensor ---


@compiled
def _keep(eye, corners, sides, normals, names, used, count, ident):
    """Finish polygon ``used``, its normal towards the sensor; 1, or 0 of a polygon without area."""
    nx = 0.0
    ny = 0.0
    nz = 0.0
    p = corners[used]
    for i in range(count):
        j = i + 1 if i + 1 < count else 0
        nx += (p[i, 1] - p[j, 1]) * (p[i, 2] + p[j, 2])
        ny += (p[i, 2] - p[j, 2]) * (p[i, 0] + p[j, 0])
        nz += (p[i, 0] - p[j, 0]) * (p[i, 1] + p[j, 1])
    length = math.sqrt(nx * nx + ny * ny + nz * nz)
    if length < 1e-12:
        return 0
    toward = nx * (eye[0] - p[0, 0]) + ny * (eye[1] - p[0, 1]) + nz * (eye[2] - p[0, 2])
    sign = 1.0 / length if toward > 0.0 else -1.0 / length
    normals[used, 0] = nx * sign
    normals[used, 1] = ny * sign
    normals[used, 2] = nz * sign
    sides[used] = count
    names[used] = ident
    return 1


@compiled
def _add_model(eye, mesh, model, x, y, yaw, ident, corners, sides, normals, names, used):
    """The faces of a model that face the sensor, as the cameras draw them from there."""
    c = math.cos(yaw)
    sn = math.sin(yaw)
    rx = eye[0] - x
    ry = eye[1] - y
    eye_x = rx * c + ry * sn
    eye_y = ry * c - rx * sn
    distance = math.sqrt(rx * rx + ry * ry + (eye[2] - 0.5 * mesh.height[model]) ** 2)
    for face in range(mesh.start[model], mesh.start[model + 1]):
        if distance > mesh.reach[face] or used >= corners.shape[0]:
            continue
        px = eye_x - mesh.corners[face, 0, 0]
        py = eye_y - mesh.corners[face, 0, 1]
        pz = eye[2] - mesh.corners[face, 0, 2]
        if mesh.normal[face, 0] * px + mesh.normal[face, 1] * py + mesh.normal[face, 2] * pz <= 0.0:
            continue
        count = mesh.sides[face]
        for k in range(count):
            corners[used, k, 0] = x + mesh.corners[face, k, 0] * c - mesh.corners[face, k, 1] * sn
            corners[used, k, 1] = y + mesh.corners[face, k, 0] * sn + mesh.corners[face, k, 1] * c
            corners[used, k, 2] = mesh.corners[face, k, 2]
        used += _keep(eye, corners, sides, normals, names, used, count, ident)
    return used


@compiled
def _add_band(eye, a, b, d0, z0, d1, z1, ident, both, corners, sides, normals, names, used):
    """A face along the road between two course vertices, from (d0, z0) to (d1, z1) across it."""
    if used >= corners.shape[0]:
        return used
    for k in range(4):
        end = a if k == 0 or k == 3 else b
        d = d0 if k < 2 else d1
        corners[used, k, 0] = end[0] - end[3] * d
        corners[used, k, 1] = end[1] + end[2] * d
        corners[used, k, 2] = z0 if k < 2 else z1
    if not both:
        n_d = z1 - z0
        n_z = d0 - d1
        out_x = -a[3] * n_d
        out_y = a[2] * n_d
        p = corners[used, 0]
        if (eye[0] - p[0]) * out_x + (eye[1] - p[1]) * out_y + (eye[2] - p[2]) * n_z <= 0.0:
            return used
    return used + _keep(eye, corners, sides, normals, names, used, 4, ident)


@compiled
def _gather(eye, reach, world, mesh, vehicles, corners, sides, normals, names, balls):
    """Fills polygons and balls (x, y, z, radius); how many there are of each."""
    used = 0
    for i in range(vehicles.x.shape[0]):
        kind = int(vehicles.kind[i])
        if math.hypot(vehicles.x[i] - eye[0], vehicles.y[i] - eye[1]) < reach + mesh.radius[kind]:
            used = _add_model(
                eye, mesh, kind, vehicles.x[i], vehicles.y[i], vehicles.yaw[i], int(vehicles.id[i]),
                corners, sides, normals, names, used,
            )  # fmt: skip
    for i in range(world.models.shape[0]):
        model = int(world.models[i, 0])
        if math.hypot(world.models[i, 1] - eye[0], world.models[i, 2] - eye[1]) < reach + mesh.radius[model]:
            ident = ID_SIGN if model == GANTRY_MODEL else ID_BUILDING
            used = _add_model(
                eye, mesh, model, world.models[i, 1], world.models[i, 2], world.models[i, 3], ident,
                corners, sides, normals, names, used,
            )  # fmt: skip
    used = _add_course(eye, reach, world.course, corners, sides, normals, names, used)
    round_ones = 0
    for i in range(world.trees.shape[0]):
        x, y, height, kind, _, phase = world.trees[i]
        if math.hypot(x - eye[0], y - eye[1]) >= reach + height or used >= corners.shape[0]:
            continue
        flat = math.hypot(x - eye[0], y - eye[1]) + 1e-9
        side_x = (eye[1] - y) / flat  # trunk and conifers are flat and face the sensor
        side_y = (x - eye[0]) / flat
        trunk = 0.035 * height
        for k in range(4):
            wide = trunk if k == 1 or k == 2 else -trunk
            corners[used, k, 0] = x + side_x * wide
            corners[used, k, 1] = y + side_y * wide
            corners[used, k, 2] = 0.4 * height if k >= 2 else 0.0
        used += _keep(eye, corners, sides, normals, names, used, 4, ID_VEGETATION)
        if kind == 0.0:
            for ball in range(3):
                if round_ones < balls.shape[0]:
                    turn = 2.0 * math.pi * (phase + ball / 3.0)
                    off = (0.0, 0.16, 0.18)[ball] * height
                    balls[round_ones, 0] = x + off * math.cos(turn)
                    balls[round_ones, 1] = y + off * math.sin(turn)
                    balls[round_ones, 2] = (0.70, 0.55, 0.58)[ball] * height
                    balls[round_ones, 3] = (0.30, 0.25, 0.22)[ball] * height
                    round_ones += 1
            continue
        for tier in range(3):
            if used >= corners.shape[0]:
                break
            wide = (0.22, 0.18, 0.13)[tier] * height
            for k in range(3):
                corners[used, k, 0] = x + side_x * wide * (k - 1)
                corners[used, k, 1] = y + side_y * wide * (k - 1)
                corners[used, k, 2] = ((0.58, 0.80, 1.0) if k == 1 else (0.14, 0.38, 0.62))[tier] * height
            used += _keep(eye, corners, sides, normals, names, used, 3, ID_VEGETATION)
    return used, round_ones


@compiled
def _add_course(eye, reach, course, corners, sides, normals, names, used):
    """Barrier and rails of the blocks of the course that are near."""
    count = course.shape[0]
    for block in range(count // BLOCK):
        middle = course[block * BLOCK + BLOCK // 2]
        if math.hypot(middle[0] - eye[0], middle[1] - eye[1]) > reach + RAIL_OFFSET + 12.0:
            continue
        for k in range(block * BLOCK, (block + 1) * BLOCK):
            a = course[k]
            b = course[(k + 1) % count]
            for band in range(BANDS.shape[0]):
                d0, z0, d1, z1, ident, both = BANDS[band]
                used = _add_band(
                    eye, a, b, d0, z0, d1, z1, int(ident), both > 0.0, corners, sides, normals, names, used
                )
    return used


# --- by direction ---


@compiled
def _sector(eye, x, y):
    """In which sector of the horizon a point lies, a number with its fraction."""
    return (math.atan2(y - eye[1], x - eye[0]) / (2.0 * math.pi) % 1.0) * SECTORS


@compiled
def _spread(eye, corners, sides, polygons, first, last, starts):
    """The sectors that each polygon reaches, ``last`` beyond SECTORS where it lies across direction 0; and how many
    polygons reach the sectors before each, in ``starts``."""
    for i in range(polygons):
        begin = _sector(eye, corners[i, 0, 0], corners[i, 0, 1])
        low = 0.0
        high = 0.0
        turn = 0.0
        at = begin
        for k in range(1, sides[i] + 1):
            j = k if k < sides[i] else 0
            there = _sector(eye, corners[i, j, 0], corners[i, j, 1])
            turn += (there - at + 1.5 * SECTORS) % SECTORS - 0.5 * SECTORS
            low = min(low, turn)
            high = max(high, turn)
            at = there
        if abs(turn) > 1.0 or high - low >= 0.5 * SECTORS:  # it lies above, below or all around
            low = 0.0
            high = SECTORS - 1.0
            begin = 0.0
        a = math.floor(begin + low)
        b = math.floor(begin + high)
        shift = SECTORS if a < 0 else (-SECTORS if a >= SECTORS else 0)
        first[i] = a + shift
        last[i] = b + shift
        for s in range(first[i], last[i] + 1):
            starts[s % SECTORS + 1] += 1
    for s in range(SECTORS):
        starts[s + 1] += starts[s]


@compiled
def _sort_in(first, last, starts, members):
    """The polygons of each sector, one sector after the other."""
    for i in range(first.shape[0]):
        for s in range(first[i], last[i] + 1):
            sector = s % SECTORS
            members[starts[sector]] = i
            starts[sector] += 1
    for s in range(SECTORS, 0, -1):
        starts[s] = starts[s - 1]
    starts[0] = 0


# --- rays ---


@compiled
def _meets(eye, ray, p, count, normal, best):
    """Distance at which a ray meets a polygon, or ``best`` if that is nearer or it does not."""
    slope = normal[0] * ray[0] + normal[1] * ray[1] + normal[2] * ray[2]
    if slope > -1e-9:
        return best
    gap = normal[0] * (p[0, 0] - eye[0]) + normal[1] * (p[0, 1] - eye[1]) + normal[2] * (p[0, 2] - eye[2])
    t = gap / slope
    if not 1e-6 < t < best:
        return best
    x = eye[0] + t * ray[0]
    y = eye[1] + t * ray[1]
    z = eye[2] + t * ray[2]
    sign = 0
    for k in range(count):
        j = k + 1 if k + 1 < count else 0
        ex = p[j, 0] - p[k, 0]
        ey = p[j, 1] - p[k, 1]
        ez = p[j, 2] - p[k, 2]
        hx = x - p[k, 0]
        hy = y - p[k, 1]
        hz = z - p[k, 2]
        across = normal[0] * (ey * hz - ez * hy) + normal[1] * (ez * hx - ex * hz) + normal[2] * (ex * hy - ey * hx)
        side = 1 if across > 0.0 else -1
        if sign == 0:
            sign = side
        elif side != sign:
            return best
    return t


@compiled
def _meet(
    eye, reach, rays, corners, sides, normals, names, starts, members, balls, round_ones, world, distance, ids, cosines
):
    """The nearest of polygons, balls and ground along each ray."""
    for r in range(rays.shape[0]):
        ray = rays[r]
        best = reach
        ident = NOTHING
        cosine = 0.0
        if ray[2] < -1e-9 and eye[2] > 0.0:
            t = -eye[2] / ray[2]
            if t < best:
                best = t
                ident = ID_ROAD
                cosine = -ray[2]
        sector = int((math.atan2(ray[1], ray[0]) / (2.0 * math.pi) % 1.0) * SECTORS) % SECTORS
        for m in range(starts[sector], starts[sector + 1]):
            i = members[m]
            t = _meets(eye, ray, corners[i], sides[i], normals[i], best)
            if t < best:
                best = t
                ident = names[i]
                cosine = -(normals[i, 0] * ray[0] + normals[i, 1] * ray[1] + normals[i, 2] * ray[2])
        for i in range(round_ones):
            x = balls[i, 0] - eye[0]
            y = balls[i, 1] - eye[1]
            z = balls[i, 2] - eye[2]
            middle = x * ray[0] + y * ray[1] + z * ray[2]
            rest = balls[i, 3] ** 2 - (x * x + y * y + z * z - middle * middle)
            if rest <= 0.0:
                continue
            half = math.sqrt(rest)
            t = middle - half
            if 1e-6 < t < best:
                best = t
                ident = ID_VEGETATION
                cosine = half / balls[i, 3]
        if ident == ID_ROAD:
            ident = ground_name(world, eye[0] + best * ray[0], eye[1] + best * ray[1])
        distance[r] = best
        ids[r] = ident
        cosines[r] = cosine
