"""Draws the embedded highway for any camera, on one CPU core.

A picture is made in two layers. Everything that stands on the ground is polygons and balls, drawn into a supersampled
z-buffer. Where it does not hide them, the ground and the sky are evaluated once a pixel: the pixel's ray meets the
plane z = 0, the point is converted to road coordinates (s, d) on the analytic line or arc, and every painted edge is
box filtered over the pixel's footprint, so lines are exact near the camera and fade far away. The z-buffer's samples
are then averaged over the ground layer.

Camera model: CARLA's pinhole, square pixels, horizontal field of view, centre of the picture on the optical axis,
pixel (i, j) sampled around (i + 0.5, j + 0.5). Rotations are Unreal Engine's (yaw, then pitch, then roll).
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.simulator.bodies import GANTRY_MODEL, MAX_CORNERS, models
from carla_digr.simulator.ground import RUN_COLUMNS, paint_ground, paint_shadow
from carla_digr.simulator.palette import PALETTES, Palette
from carla_digr.simulator.raster import paint_course, paint_model, paint_tree
from carla_digr.simulator.rays import RAY_COLUMNS, aim
from carla_digr.simulator.road import Road
from carla_digr.simulator.scenery import scenery, textures
from carla_digr.simulator.shading import (
    ID_BUILDING,
    ID_SIGN,
    WITHOUT_BARRIER,
    WITHOUT_BUILDINGS,
    WITHOUT_COLOURS,
    WITHOUT_RAILS,
    WITHOUT_TREES,
    compiled,
)

Pose = tuple[float, float, float, float, float, float]
"""x, y, z in metres, pitch, yaw, roll in radians; CARLA's signs: positive pitch looks up."""


class VehicleTable(NamedTuple):
    """The vehicles of a picture, an entry each; only those in view cost time."""

    id: NDArray[np.int32]  # positive actor ids, written to the instance picture
    kind: NDArray[np.int64]  # index into vehicle.KINDS, or of another model of `bodies`
    x: NDArray[np.float64]  # m, centre of the box on the ground
    y: NDArray[np.float64]
    yaw: NDArray[np.float64]  # rad
    color: NDArray[np.uint8]  # (N, 3) RGB
    brake_light: NDArray[np.bool_]

    @classmethod
    def empty(cls) -> VehicleTable:
        """A table without vehicles."""
        return cls(
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            np.zeros(0),
            np.zeros(0),
            np.zeros(0),
            np.zeros((0, 3), np.uint8),
            np.zeros(0, np.bool_),
        )


def render(
    road: Road,
    camera_pose: Pose,
    width: int,
    height: int,
    fov_deg: float,
    vehicles: VehicleTable,
    palette: int | Palette = 0,
    supersample: int = 2,
    without: int = 0,
    scenery_seed: int = 0,
) -> NDArray[np.uint8]:
    """The picture a camera sees; a pure function of its arguments.

    Args:
        width, height: picture size in pixels.
        fov_deg: horizontal field of view in degrees, between 0 and 180.
        palette: index into ``PALETTES`` or a palette of one's own.
        supersample: 1, 2 or 3 samples a pixel in both directions for what stands on the ground.
        without: what is left out, `shading`'s bits.
        scenery_seed: of the trees and houses; 0: the usual ones.

    Returns:
        (height, width, 4) uint8, BGRA with alpha 255, C-contiguous.

    Raises:
        UserError: a size, field of view, palette or supersampling that cannot be drawn.
    """
    bgra, _ = _draw(
        road, camera_pose, width, height, fov_deg, vehicles, palette, supersample, None, without, scenery_seed
    )
    return bgra


def instances(
    road: Road,
    camera_pose: Pose,
    width: int,
    height: int,
    fov_deg: float,
    vehicles: VehicleTable,
    scenery_seed: int = 0,
) -> NDArray[np.int32]:
    """(height, width) int32: what the centre of each pixel shows, a vehicle's id or one of the ID_ constants.

    Parameters and errors as for :func:`render`, whose drawing code it shares.
    """
    _, ids = _draw(
        road, camera_pose, width, height, fov_deg, vehicles, 0, 1, without=WITHOUT_COLOURS, seed=scenery_seed
    )
    return ids


def depths(
    road: Road,
    camera_pose: Pose,
    width: int,
    height: int,
    fov_deg: float,
    vehicles: VehicleTable,
    scenery_seed: int = 0,
) -> NDArray[np.float32]:
    """(height, width) float32: metres along the optical axis to what the centre of each pixel shows, inf for the sky.

    Parameters and errors as for :func:`render`, whose drawing code it shares: the ground's depth is exact, that of
    objects has the 24 bits of the depth buffer.
    """
    out = np.empty((height, width), np.float32)
    _draw(road, camera_pose, width, height, fov_deg, vehicles, 0, 1, out, WITHOUT_COLOURS, scenery_seed)
    return out


def camera_axes(pitch: float, yaw: float, roll: float) -> NDArray[np.float64]:
    """(3, 3) float64: forward, right and up of a camera in the world, rows (Unreal Engine's FRotationMatrix)."""
    cp, sp = math.cos(pitch), math.sin(pitch)
    cy, sy = math.cos(yaw), math.sin(yaw)
    cr, sr = math.cos(roll), math.sin(roll)
    return np.array(
        [
            (cp * cy, cp * sy, sp),
            (sr * sp * cy - cr * sy, sr * sp * sy + cr * cy, -sr * cp),
            (-(cr * sp * cy + sr * sy), cy * sr - cr * sp * sy, cr * cp),
        ]
    )


OPAQUE = np.int32(-(2**24))  # alpha 255 of a BGRA word
KEPT_RAYS = 2**16  # pixels of the largest picture whose rays are kept


class _Workspace:
    """Buffers of one picture size, kept a thread: allocating them anew costs as much as a third of a picture."""

    def __init__(self, width: int, height: int, supersample: int):
        rows, columns = height * supersample, width * supersample
        self.ground = np.zeros((height, 3, width), np.float32)  # hidden pixels are never written, but read
        self.ground_ids = np.empty((height, width), np.int32)
        self.depth = np.empty((rows, columns), np.float32)
        self.color = np.empty((rows, columns), np.uint32)
        self.ids = np.empty((rows, columns), np.int32)
        self.scratch = np.empty((2, max(rows, 4 * (MAX_CORNERS + 4))), np.float64)
        self.run = np.zeros((RUN_COLUMNS, width), np.float64)
        self.shown = np.empty(width, np.int8)
        self.rays = np.empty((height if width * height <= KEPT_RAYS else 1, RAY_COLUMNS, width), np.float64)
        self.aimed = (math.nan,) * 5
        """Height, pitch, roll, focal length and haze of ``rays``."""
        self.points = np.empty((3, MAX_CORNERS + 4, 3), np.float64)


_local = threading.local()


def _workspace(width: int, height: int, supersample: int) -> _Workspace:
    kept = getattr(_local, "kept", None)
    if kept is None:
        kept = _local.kept = {}
    key = (width, height, supersample)
    if key not in kept:
        if len(kept) >= 4:
            kept.clear()
        kept[key] = _Workspace(width, height, supersample)
    return kept[key]


def _draw(road, camera_pose, width, height, fov_deg, vehicles, palette, supersample, distances=None, without=0, seed=0):
    if not (1 <= width <= 8192 and 1 <= height <= 8192):
        raise UserError(f"A picture of {width}x{height} pixels cannot be drawn; use 1 to 8192 in each direction.")
    if not 0.0 < fov_deg < 180.0:
        raise UserError(f"A field of view of {fov_deg} degrees cannot be drawn; use one between 0 and 180.")
    if supersample not in (1, 2, 3):
        raise UserError(f"Supersampling {supersample} is not offered; use 1, 2 or 3.")
    if not isinstance(palette, Palette):
        if not 0 <= palette < len(PALETTES):
            raise UserError(f"There is no palette {palette}; use 0 to {len(PALETTES) - 1}.")
        palette = PALETTES[palette]
    x, y, z, pitch, yaw, roll = camera_pose
    if not all(math.isfinite(v) for v in camera_pose):
        raise UserError(f"The camera pose {tuple(camera_pose)} is not finite; give six finite numbers.")
    view = np.empty((4, 3))
    view[0] = x, y, z
    view[1:] = camera_axes(pitch, yaw, roll)
    focal = 0.5 * width / math.tan(math.radians(0.5 * fov_deg))
    work = _workspace(width, height, supersample)
    axes = camera_axes(pitch, 0.0, roll)
    aimed = (z, pitch, roll, focal, palette.haze_distance)
    if len(work.rays) == height and work.aimed != aimed:
        aim(axes, z, focal, palette.haze_distance, work.rays)
        work.aimed = aimed
    bgra = np.empty((height, width, 4), np.uint8)
    words = bgra.view(np.int32)[..., 0]
    ids = np.empty((height, width), np.int32)
    _paint(
        view, focal, supersample, scenery(road, seed), textures(), models(), vehicles, palette.pack(), words, ids,
        work.ground, work.ground_ids, work.depth, work.color, work.ids, work.scratch, work.points,
        yaw, axes, work.rays, work.run, work.shown, without,
    )  # fmt: skip
    if distances is not None:
        _measure(view, focal, work.depth, work.color, distances)
    return bgra, ids


@compiled
def _paint(
    view, focal, ss, world, patterns, mesh, vehicles, light, words, ids,
    ground, ground_ids, depth, color, sample_ids, scratch, points,
    yaw, axes, rays, run, shown, without,
):  # fmt: skip
    """The whole picture: everything on the ground, then ground and sky behind it, shadows, then the average.

    ``view`` is (4, 3): camera position, forward, right, up; ``focal`` in pixels; ``axes`` and ``rays`` are
    :mod:`rays`'s. ``words`` (BGRA) and ``ids`` are written. What ``without`` says is left out.
    """
    depth[:] = 0.0
    fine = focal * ss
    target = (depth, color, sample_ids, scratch, points)
    noise = patterns[0]
    for i in range(vehicles.x.shape[0]):
        paint_model(
            view, fine, mesh, vehicles.kind[i], vehicles.x[i], vehicles.y[i], vehicles.yaw[i],
            float(vehicles.color[i, 0]), float(vehicles.color[i, 1]), float(vehicles.color[i, 2]),
            vehicles.brake_light[i], vehicles.id[i], light, target,
        )  # fmt: skip
    barrier = without & WITHOUT_BARRIER == 0
    rail = without & WITHOUT_RAILS == 0
    paint_course(view, fine, world.course, light, target, barrier, rail)
    models_drawn = 0 if without & WITHOUT_BUILDINGS else world.models.shape[0]
    trees_drawn = 0 if without & WITHOUT_TREES else world.trees.shape[0]
    for i in range(models_drawn):
        model = int(world.models[i, 0])
        ident = ID_SIGN if model == GANTRY_MODEL else ID_BUILDING
        paint_model(
            view, fine, mesh, model, world.models[i, 1], world.models[i, 2], world.models[i, 3],
            0.0, 0.0, 0.0, False, ident, light, target,
        )  # fmt: skip
    for i in range(trees_drawn):
        paint_tree(view, fine, world.trees[i], noise, light, target)
    paint_ground(
        view, yaw, focal, world, patterns, light, depth, ss, axes, rays, run, shown, ground, ground_ids, without
    )
    if without & WITHOUT_COLOURS:
        _resolve_ids(ss, ground_ids, depth, sample_ids, ids)
        return
    for i in range(vehicles.x.shape[0]):
        kind = vehicles.kind[i]
        paint_shadow(
            view, focal, vehicles.x[i], vehicles.y[i], vehicles.yaw[i], mesh.half[kind, 0], mesh.half[kind, 1],
            mesh.height[kind], light, ground, ground_ids,
        )  # fmt: skip
    for i in range(trees_drawn):
        tree = world.trees[i]
        if (tree[0] - view[0, 0]) ** 2 + (tree[1] - view[0, 1]) ** 2 < 150.0**2:
            half = 0.25 * tree[2]
            paint_shadow(view, focal, tree[0], tree[1], 0.0, half, half, tree[2], light, ground, ground_ids)
    _resolve(ss, ground, ground_ids, depth, color, sample_ids, words, ids)


@compiled
def _resolve(ss, ground, ground_ids, depth, color, sample_ids, words, ids):
    """Averages the samples of every pixel over the ground layer; ids are taken from the sample next to the centre."""
    height, width = ground_ids.shape
    share = np.float32(1.0 / (ss * ss))
    half = np.float32(0.5)
    full = np.float32(255.0)
    center = ss // 2
    for j in range(height):
        for i in range(width):  # as if nothing stood there, several pixels at a time
            r = np.int32(min(ground[j, 0, i] + half, full))
            g = np.int32(min(ground[j, 1, i] + half, full))
            b = np.int32(min(ground[j, 2, i] + half, full))
            words[j, i] = OPAQUE | (r << 16) | (g << 8) | b
            ids[j, i] = ground_ids[j, i]
        for i in range(width):
            if ss == 2:  # the usual case, without loops
                most = max(depth[2 * j, 2 * i], depth[2 * j, 2 * i + 1])
                if max(most, max(depth[2 * j + 1, 2 * i], depth[2 * j + 1, 2 * i + 1])) == 0.0:
                    continue
            covered = 0
            red = 0
            green = 0
            blue = 0
            for v in range(j * ss, j * ss + ss):
                for u in range(i * ss, i * ss + ss):
                    if depth[v, u] > 0.0:
                        word = int(color[v, u])
                        covered += 1
                        red += (word >> 16) & 255
                        green += (word >> 8) & 255
                        blue += word & 255
            if covered == 0:
                continue
            rest = np.float32(ss * ss - covered)
            r = np.int32(min((red + rest * ground[j, 0, i]) * share + half, full))
            g = np.int32(min((green + rest * ground[j, 1, i]) * share + half, full))
            b = np.int32(min((blue + rest * ground[j, 2, i]) * share + half, full))
            words[j, i] = OPAQUE | (r << 16) | (g << 8) | b
            if depth[j * ss + center, i * ss + center] > 0.0:
                ids[j, i] = sample_ids[j * ss + center, i * ss + center]


@compiled
def _resolve_ids(ss, ground_ids, depth, sample_ids, ids):
    """The ids alone, as ``_resolve`` has them."""
    height, width = ground_ids.shape
    center = ss // 2
    for j in range(height):
        for i in range(width):
            stands = depth[j * ss + center, i * ss + center] > 0.0
            ids[j, i] = sample_ids[j * ss + center, i * ss + center] if stands else ground_ids[j, i]


@compiled
def _measure(view, focal, depth, color, distances):
    """Metres along the optical axis, from the buffers of a picture with one sample a pixel."""
    height, width = depth.shape
    for j in range(height):
        b = (0.5 * height - (j + 0.5)) / focal
        for i in range(width):
            if depth[j, i] > 0.0:
                distances[j, i] = (1.0 + 0.001 * (int(color[j, i]) >> 24)) / depth[j, i]
                continue
            a = ((i + 0.5) - 0.5 * width) / focal
            dz = view[1, 2] + a * view[2, 2] + b * view[3, 2]
            distances[j, i] = -view[0, 2] / dz if dz * view[0, 2] < 0.0 else np.inf
