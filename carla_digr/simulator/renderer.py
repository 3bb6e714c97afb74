"""Draws the embedded highway for any camera, on one CPU core.

A picture is made in two layers. The ground and the sky are evaluated once a pixel: the pixel's ray meets the plane
z = 0, the point is converted to road coordinates (s, d) on the analytic line or arc, and every painted edge is box
filtered over the pixel's footprint, so lines are exact near the camera and fade far away. Everything that stands on
the ground is polygons and balls, drawn into a supersampled z-buffer which is then averaged over the ground layer.

Camera model: CARLA's pinhole, square pixels, horizontal field of view, centre of the picture on the optical axis,
pixel (i, j) sampled around (i + 0.5, j + 0.5). Rotations are Unreal Engine's (yaw, then pitch, then roll).
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.simulator import palette as pal
from carla_digr.simulator.bodies import (
    ALBEDO,
    BRAKE,
    GANTRY_MODEL,
    GLASS,
    HEADLAMP,
    MAX_CORNERS,
    PAINT,
    SIGN,
    SIGN_TEXT,
    models,
)
from carla_digr.simulator.palette import PALETTES, Palette
from carla_digr.simulator.road import (
    BARRIER_HALF_WIDTH,
    BARRIER_HEIGHT,
    DASH_LENGTH,
    LANE_WIDTH,
    LANES,
    LINE_WIDTH,
    MEDIAN_HALF_WIDTH,
    PAVED_EDGE,
    RAIL_HEIGHT,
    RAIL_OFFSET,
    ROAD_EDGE,
    Road,
)
from carla_digr.simulator.scenery import (
    BLOCK,
    CELL,
    CENTER_X,
    CENTER_Y,
    COS,
    COS_HALF,
    HALF,
    MID_S,
    MID_X,
    MID_Y,
    RADIUS,
    SIDE,
    SIN,
    SIN_HALF,
    scenery,
    textures,
)

# Instance ids of what is not a vehicle; vehicles have their positive actor id.
ID_SKY, ID_ROAD, ID_LINE, ID_BARRIER, ID_RAIL, ID_VEGETATION, ID_BUILDING, ID_SIGN = 0, -1, -2, -3, -4, -5, -6, -7

NEAR = 0.1  # m, nearest visible depth
FAR = 480.0  # m, farthest drawn object
ASPHALT = (104.0, 105.0, 108.0)
SHOULDER = (118.0, 117.0, 116.0)
GRASS = (92.0, 124.0, 58.0)
FIELD = (150.0, 146.0, 84.0)
WHITE = (240.0, 240.0, 236.0)
YELLOW = (232.0, 178.0, 40.0)
CONCRETE = (212.0, 208.0, 198.0)
STEEL = (170.0, 174.0, 178.0)
LEAVES = (74.0, 108.0, 46.0)
NEEDLES = (44.0, 84.0, 54.0)
BARK = (84.0, 66.0, 50.0)
# d, z of the barrier's cross-section from foot to top (New Jersey shape).
PROFILE = np.array([(BARRIER_HALF_WIDTH, 0.0), (0.27, 0.10), (0.16, 0.36), (0.11, BARRIER_HEIGHT)])


_compiled = njit(cache=True, nogil=True, error_model="numpy")
_inlined = njit(cache=True, nogil=True, error_model="numpy", inline="always")


class VehicleTable(NamedTuple):
    """The vehicles of a picture, an entry each; only those in view cost time."""

    id: NDArray[np.int32]  # positive actor ids, written to the instance picture
    kind: NDArray[np.int64]  # index into vehicle.KINDS
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
    camera_pose: tuple[float, float, float, float, float, float],
    width: int,
    height: int,
    fov_deg: float,
    vehicles: VehicleTable,
    palette: int | Palette = 0,
    supersample: int = 2,
) -> NDArray[np.uint8]:
    """The picture a camera sees; a pure function of its arguments.

    Parameters:
        camera_pose: x, y, z (m), pitch, yaw, roll (rad), CARLA's signs: positive pitch looks up.
        width, height: picture size in pixels.
        fov_deg: horizontal field of view in degrees, between 0 and 180.
        palette: index into ``PALETTES`` or a palette of one's own.
        supersample: 1, 2 or 3 samples a pixel in both directions for what stands on the ground.

    Returns:
        (height, width, 4) uint8, BGRA with alpha 255, C-contiguous.

    Raises:
        UserError: a size, field of view, palette or supersampling that cannot be drawn.
    """
    bgra, _ = _draw(road, camera_pose, width, height, fov_deg, vehicles, palette, supersample)
    return bgra


def instances(
    road: Road,
    camera_pose: tuple[float, float, float, float, float, float],
    width: int,
    height: int,
    fov_deg: float,
    vehicles: VehicleTable,
) -> NDArray[np.int32]:
    """(height, width) int32: what the centre of each pixel shows, a vehicle's id or one of the ID_ constants.

    Parameters and errors as for :func:`render`, whose drawing code it shares.
    """
    _, ids = _draw(road, camera_pose, width, height, fov_deg, vehicles, 0, 1)
    return ids


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


class _Workspace:
    """Buffers of one picture size, kept a thread: allocating them anew costs as much as a third of a picture."""

    def __init__(self, width: int, height: int, supersample: int):
        rows, columns = height * supersample, width * supersample
        self.ground = np.empty((height, width, 3), np.float32)
        self.ground_ids = np.empty((height, width), np.int32)
        self.depth = np.empty((rows, columns), np.float32)
        self.color = np.empty((rows, columns), np.uint32)
        self.ids = np.empty((rows, columns), np.int32)
        self.scratch = np.empty((2, max(rows, 4 * (MAX_CORNERS + 4))), np.float64)
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


def _draw(road, camera_pose, width, height, fov_deg, vehicles, palette, supersample):
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
    bgra = np.empty((height, width, 4), np.uint8)
    ids = np.empty((height, width), np.int32)
    _paint(
        view, focal, supersample, scenery(road), textures(), models(), vehicles, palette.pack(), bgra, ids,
        work.ground, work.ground_ids, work.depth, work.color, work.ids, work.scratch, work.points,
    )  # fmt: skip
    return bgra, ids


# ---------------------------------------------------------------------------------------------------------------------
# Compiled code. ``view`` is (4, 3): camera position, forward, right, up. ``light`` is Palette.pack().


@_compiled
def _paint(
    view, focal, ss, world, patterns, mesh, vehicles, light, bgra, ids,
    ground, ground_ids, depth, color, sample_ids, scratch, points,
):  # fmt: skip
    """The whole picture: ground and sky, shadows, then everything on the ground, then the average."""
    _paint_ground(view, focal, world, patterns, light, ground, ground_ids)
    depth[:] = 0.0
    fine = focal * ss
    target = (depth, color, sample_ids, scratch, points)
    noise = patterns[0]
    for i in range(vehicles.x.shape[0]):
        kind = vehicles.kind[i]
        _paint_shadow(
            view, focal, vehicles.x[i], vehicles.y[i], vehicles.yaw[i], mesh.half[kind, 0], mesh.half[kind, 1],
            mesh.height[kind], light, ground, ground_ids,
        )  # fmt: skip
    for i in range(world.trees.shape[0]):
        tree = world.trees[i]
        if (tree[0] - view[0, 0]) ** 2 + (tree[1] - view[0, 1]) ** 2 < 150.0**2:
            half = 0.25 * tree[2]
            _paint_shadow(view, focal, tree[0], tree[1], 0.0, half, half, tree[2], light, ground, ground_ids)
    for i in range(vehicles.x.shape[0]):
        _paint_model(
            view, fine, mesh, vehicles.kind[i], vehicles.x[i], vehicles.y[i], vehicles.yaw[i],
            float(vehicles.color[i, 0]), float(vehicles.color[i, 1]), float(vehicles.color[i, 2]),
            vehicles.brake_light[i], vehicles.id[i], light, target,
        )  # fmt: skip
    _paint_course(view, fine, world.course, light, target)
    for i in range(world.models.shape[0]):
        model = int(world.models[i, 0])
        ident = ID_SIGN if model == GANTRY_MODEL else ID_BUILDING
        _paint_model(
            view, fine, mesh, model, world.models[i, 1], world.models[i, 2], world.models[i, 3],
            0.0, 0.0, 0.0, False, ident, light, target,
        )  # fmt: skip
    for i in range(world.trees.shape[0]):
        _paint_tree(view, fine, world.trees[i], noise, light, target)
    _resolve(ss, ground, ground_ids, depth, color, sample_ids, bgra, ids)


@_compiled
def _haze(distance, light):
    """Share of haze at a distance, 0 to 1."""
    return 1.0 - math.exp(-distance / light[pal.AIR, 1])


@_compiled
def _pack(red, green, blue):
    """Colour as one 32-bit word, clipped to 0..255."""
    r = min(max(int(red + 0.5), 0), 255)
    g = min(max(int(green + 0.5), 0), 255)
    b = min(max(int(blue + 0.5), 0), 255)
    return np.uint32((r << 16) | (g << 8) | b)


@_compiled
def _atan2(y, x):
    """atan2 to 2e-8 rad: a fifth of the library's time. (0, 0) gives 0."""
    ax = abs(x)
    ay = abs(y)
    big = max(ax, ay)
    if big == 0.0:
        return 0.0
    t = min(ax, ay) / big
    shift = 0.0
    if t > 0.4142135623730950:  # reduce to |t| <= tan(pi / 8)
        t = (t - 1.0) / (t + 1.0)
        shift = 0.25 * math.pi
    q = t * t
    series = 1.0 / 9.0 - q * (1.0 / 11.0 - q * (1.0 / 13.0 - q / 15.0))
    a = shift + t * (1.0 - q * (1.0 / 3.0 - q * (1.0 / 5.0 - q * (1.0 / 7.0 - q * series))))
    if ay > ax:
        a = 0.5 * math.pi - a
    if x < 0.0:
        a = math.pi - a
    return -a if y < 0.0 else a


@_inlined
def _road_point(pieces, origin, grid, x, y):
    """(piece, along, across, d, cos, sin) of a ground point, the direction being the road's; piece -1 = countryside.

    On an arc along and across are the legs of the angle from the piece's middle, on a straight along is the distance
    from it: what ``_arc_length`` needs.
    """
    column = int((x - origin[0]) * (1.0 / CELL))
    row = int((y - origin[1]) * (1.0 / CELL))
    if x < origin[0] or y < origin[1] or row >= grid.shape[0] or column >= grid.shape[1]:
        return -1, 0.0, 0.0, 1e9, 1.0, 0.0
    index = int(grid[row, column])
    if index < 0:
        return -1, 0.0, 0.0, 1e9, 1.0, 0.0
    count = pieces.shape[0]
    nearest = index
    along = 0.0
    across = 0.0
    d = 0.0
    c = 1.0
    sn = 0.0
    for _ in range(3):
        nearest = index
        if pieces[index, SIDE] == 0.0:
            dx = x - pieces[index, MID_X]
            dy = y - pieces[index, MID_Y]
            c = pieces[index, COS]
            sn = pieces[index, SIN]
            along = dx * c + dy * sn
            d = dy * c - dx * sn
            over = abs(along) - pieces[index, HALF]
        else:
            vx = pieces[index, SIDE] * (x - pieces[index, CENTER_X])
            vy = pieces[index, SIDE] * (y - pieces[index, CENTER_Y])
            along = vx * pieces[index, COS] + vy * pieces[index, SIN]
            across = vx * pieces[index, SIN] - vy * pieces[index, COS]
            rho = math.sqrt(vx * vx + vy * vy)
            d = pieces[index, RADIUS] - pieces[index, SIDE] * rho
            if rho > 0.0:
                inverse = 1.0 / rho
                c = -vy * inverse
                sn = vx * inverse
            # sin(angle - half angle) times rho; along grows with s because the frame is turned by SIDE.
            over = abs(along) * pieces[index, COS_HALF] - across * pieces[index, SIN_HALF]
            along *= pieces[index, SIDE]
        if over <= 1e-9:
            break
        if along > 0.0:
            index = index + 1 if index + 1 < count else 0
        else:
            index = index - 1 if index > 0 else count - 1
    return nearest, along, across, d, c, sn


@_inlined
def _arc_length(pieces, piece, along, across):
    """The s that belongs to a result of ``_road_point``."""
    if pieces[piece, SIDE] == 0.0:
        return pieces[piece, MID_S] + along
    return pieces[piece, MID_S] + abs(pieces[piece, RADIUS]) * _atan2(along, across)


@_compiled
def _stripe(d, center, half, footprint):
    """Share of the interval of length ``footprint`` around d that the stripe covers."""
    d -= center
    low = max(d - 0.5 * footprint, -half)
    high = min(d + 0.5 * footprint, half)
    return max(high - low, 0.0) / footprint


@_compiled
def _dash(s, period, footprint):
    """Share of the interval of length ``footprint`` around s that is painted; dashes begin at multiples of period."""
    a = (s - 0.5 * footprint) / period
    b = (s + 0.5 * footprint) / period
    fa = math.floor(a)
    fb = math.floor(b)
    painted = (fb - fa) * DASH_LENGTH
    painted += min((b - fb) * period, DASH_LENGTH) - min((a - fa) * period, DASH_LENGTH)
    return painted / footprint


@_compiled
def _paint_ground(view, focal, world, patterns, light, ground, ground_ids):
    """Ground and sky, a value a pixel."""
    noise, cloud, hills = patterns
    pieces, origin, grid, dash_period = world.pieces, world.origin, world.grid, world.dash_period
    height, width = ground_ids.shape
    haze_r, haze_g, haze_b = light[pal.HORIZON]
    up = max(light[pal.SUN_DIRECTION, 2], 0.0)
    lit_r = light[pal.AMBIENT, 0] + light[pal.SUN, 0] * up
    lit_g = light[pal.AMBIENT, 1] + light[pal.SUN, 1] * up
    lit_b = light[pal.AMBIENT, 2] + light[pal.SUN, 2] * up
    pixel = 1.0 / focal
    for j in range(height):
        b = (0.5 * height - (j + 0.5)) * pixel
        for i in range(width):
            a = ((i + 0.5) - 0.5 * width) * pixel
            dx = view[1, 0] + a * view[2, 0] + b * view[3, 0]
            dy = view[1, 1] + a * view[2, 1] + b * view[3, 1]
            dz = view[1, 2] + a * view[2, 2] + b * view[3, 2]
            inverse = 0.0
            t = 1e9
            if dz * view[0, 2] < 0.0:
                inverse = 1.0 / dz
                t = -view[0, 2] * inverse
            distance = t * math.sqrt(1.0 + a * a + b * b)
            if distance > 6000.0:
                if dz < 0.0:
                    r, g, bl = haze_r, haze_g, haze_b
                    ground_ids[j, i] = ID_VEGETATION
                else:
                    r, g, bl = _sky(dx, dy, dz, focal, cloud, hills, light)
                    ground_ids[j, i] = ID_SKY
                ground[j, i, 0] = r
                ground[j, i, 1] = g
                ground[j, i, 2] = bl
                continue
            x = view[0, 0] + t * dx
            y = view[0, 1] + t * dy
            haze = _haze(distance, light)
            ident = ID_VEGETATION
            piece, along, across, d, c, sn = _road_point(pieces, origin, grid, x, y)
            e = abs(d)
            # The pixel's footprint: how far the ground point moves for a step of one pixel right and one down.
            scale = t * pixel
            k = view[2, 2] * inverse
            right_x = scale * (view[2, 0] - dx * k)
            right_y = scale * (view[2, 1] - dy * k)
            k = view[3, 2] * inverse
            down_x = scale * (view[3, 0] - dx * k)
            down_y = scale * (view[3, 1] - dy * k)
            wide = math.sqrt((right_y * c - right_x * sn) ** 2 + (down_y * c - down_x * sn) ** 2)
            long = math.sqrt((right_x * c + right_y * sn) ** 2 + (down_x * c + down_y * sn) ** 2)
            grain = 1.0 / (1.0 + wide + long)
            paved = 0.0
            if e < PAVED_EDGE + wide:
                paved = min(max((PAVED_EDGE - e) / wide + 0.5, 0.0), 1.0)
            r = 0.0
            g = 0.0
            bl = 0.0
            if paved < 1.0:
                # Grass: two sizes of patches near the road, fields in the countryside.
                fine = noise[math.floor(x * 3.3) & 255, math.floor(y * 3.3) & 255] * grain
                broad = noise[math.floor(x * 0.06) & 255, math.floor(y * 0.06) & 255]
                tone = 1.0 + 0.20 * fine + 0.10 * broad
                field = min(max((e - 34.0) * 0.03, 0.0), 1.0) * min(max(broad * 3.0, 0.0), 1.0)
                worn = 0.35 * max(0.0, 1.0 - (e - PAVED_EDGE) * 0.6) if e >= PAVED_EDGE else 0.35
                r = (GRASS[0] + (FIELD[0] - GRASS[0]) * max(field, worn)) * tone
                g = (GRASS[1] + (FIELD[1] - GRASS[1]) * max(field, worn)) * tone
                bl = (GRASS[2] + (FIELD[2] - GRASS[2]) * max(field, worn)) * tone
            if paved > 0.0:
                fine = noise[math.floor(x * 5.0) & 255, math.floor(y * 5.0) & 255] * grain * grain
                broad = noise[math.floor(x * 0.25) & 255, math.floor(y * 0.25) & 255] * grain
                tone = 1.0 + 0.07 * fine + 0.03 * broad
                road_r, road_g, road_b = ASPHALT
                line = 0.0
                line_r, line_g, line_b = WHITE
                if e > ROAD_EDGE - 1.0:
                    edge = min(max((e - ROAD_EDGE) / wide + 0.5, 0.0), 1.0)
                    road_r += (SHOULDER[0] - road_r) * edge
                    road_g += (SHOULDER[1] - road_g) * edge
                    road_b += (SHOULDER[2] - road_b) * edge
                    line = _stripe(e, ROAD_EDGE, 0.5 * LINE_WIDTH, wide)
                elif e < MEDIAN_HALF_WIDTH + 1.0:
                    line = _stripe(e, MEDIAN_HALF_WIDTH, 0.5 * LINE_WIDTH, wide)
                    line_r, line_g, line_b = YELLOW
                    inner = min(max((MEDIAN_HALF_WIDTH - e) / wide + 0.5, 0.0), 1.0)
                    road_r += (SHOULDER[0] - road_r) * inner
                    road_g += (SHOULDER[1] - road_g) * inner
                    road_b += (SHOULDER[2] - road_b) * inner
                    tone *= 1.0 - 0.4 * max(0.0, 1.0 - abs(e - BARRIER_HALF_WIDTH) / (0.5 + wide))
                if e > MEDIAN_HALF_WIDTH and e < ROAD_EDGE:
                    lane = (e - MEDIAN_HALF_WIDTH) / LANE_WIDTH
                    border = math.floor(lane + 0.5)
                    if border >= 1.0 and border <= LANES - 1.0:
                        line = _stripe(e, MEDIAN_HALF_WIDTH + border * LANE_WIDTH, 0.5 * LINE_WIDTH, wide)
                        if line > 0.0:
                            s = _arc_length(pieces, piece, along, across)
                            line *= _dash(s, dash_period, long)
                    # Tyre tracks: a quarter of a lane to both sides of its centre the asphalt is darker.
                    off = abs(abs(lane - math.floor(lane) - 0.5) - 0.25)
                    tone *= 1.0 - 0.07 * max(0.0, 1.0 - off * 6.0) / (1.0 + wide * wide)
                road_r = road_r * tone + (line_r - road_r * tone) * line
                road_g = road_g * tone + (line_g - road_g * tone) * line
                road_b = road_b * tone + (line_b - road_b * tone) * line
                r += (road_r - r) * paved
                g += (road_g - g) * paved
                bl += (road_b - bl) * paved
                if paved >= 0.5:
                    ident = ID_LINE if line >= 0.5 else ID_ROAD
            ground[j, i, 0] = r * lit_r + (haze_r - r * lit_r) * haze
            ground[j, i, 1] = g * lit_g + (haze_g - g * lit_g) * haze
            ground[j, i, 2] = bl * lit_b + (haze_b - bl * lit_b) * haze
            ground_ids[j, i] = ident


@_inlined
def _sky(dx, dy, dz, focal, cloud, hills, light):
    """Colour of the sky in a direction: gradient, clouds, two ranges of hills."""
    flat = math.sqrt(dx * dx + dy * dy)
    rise = dz / max(flat, 1e-6)
    turn = (_atan2(dy, dx) / (2.0 * math.pi) + 0.5) * 1024.0
    column = int(turn)
    part = turn - column
    column &= 1023
    after = (column + 1) & 1023
    blend = min(rise * 0.9, 1.0)
    blend = 1.0 - (1.0 - blend) * (1.0 - blend)
    r = light[pal.HORIZON, 0] + (light[pal.ZENITH, 0] - light[pal.HORIZON, 0]) * blend
    g = light[pal.HORIZON, 1] + (light[pal.ZENITH, 1] - light[pal.HORIZON, 1]) * blend
    b = light[pal.HORIZON, 2] + (light[pal.ZENITH, 2] - light[pal.HORIZON, 2]) * blend
    level = rise / (0.25 + rise) * 80.0  # rows of the cloud pattern get higher towards the zenith
    if level < 63.0:
        row = int(level)
        up = level - row
        low = cloud[row, column] + (cloud[row, after] - cloud[row, column]) * part
        high = cloud[row + 1, column] + (cloud[row + 1, after] - cloud[row + 1, column]) * part
        cover = light[pal.AIR, 0]
        amount = min(max((low + (high - low) * up - (1.0 - cover)) * 3.5, 0.0), 1.0)
        amount *= min(rise * 12.0, 1.0) * min((63.0 - level) * 0.2, 1.0) * 0.9
        r += (light[pal.CLOUD, 0] - r) * amount
        g += (light[pal.CLOUD, 1] - g) * amount
        b += (light[pal.CLOUD, 2] - b) * amount
    if rise < 0.1:
        for k in range(2):
            top = hills[k, column] + (hills[k, after] - hills[k, column]) * part
            inside = min(max((top - rise) * focal + 0.5, 0.0), 1.0)
            if inside > 0.0:
                strength = (0.45 if k == 0 else 0.7) * inside * (0.55 + 0.45 * min(max(rise / top, 0.0), 1.0))
                r += (light[pal.HILLS, 0] - r) * strength
                g += (light[pal.HILLS, 1] - g) * strength
                b += (light[pal.HILLS, 2] - b) * strength
    return r, g, b


@_compiled
def _paint_shadow(view, focal, x, y, yaw, half_length, half_width, height, light, ground, ground_ids):
    """Darkens the ground under a box: soft at the edge, shifted away from the sun."""
    rows, columns = ground_ids.shape
    shift = min(0.18 * height, 0.5)
    px = x - shift * light[pal.SUN_DIRECTION, 0]
    py = y - shift * light[pal.SUN_DIRECTION, 1]
    rx = px - view[0, 0]
    ry = py - view[0, 1]
    rz = -view[0, 2]
    depth = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    reach = math.sqrt(half_length * half_length + half_width * half_width) + 1.0
    if depth < -reach or depth > 250.0 or view[0, 2] <= 0.0:
        return
    c = math.cos(yaw)
    sn = math.sin(yaw)
    j0, j1, i0, i1 = 0, rows - 1, 0, columns - 1
    if depth > reach + 0.5:
        # Picture rectangle of the shadow's corners; near the camera all pixels are tried.
        soft_edge = 0.8 + depth / focal
        i_min = 1e9
        i_max = -1e9
        j_min = 1e9
        j_max = -1e9
        for k in range(4):
            along = (half_length + soft_edge) * (1.0 if k & 1 else -1.0)
            across = (half_width + soft_edge) * (1.0 if k & 2 else -1.0)
            qx = rx + along * c - across * sn
            qy = ry + along * sn + across * c
            z = max(qx * view[1, 0] + qy * view[1, 1] + rz * view[1, 2], 0.2)
            ii = 0.5 * columns + focal * (qx * view[2, 0] + qy * view[2, 1] + rz * view[2, 2]) / z
            jj = 0.5 * rows - focal * (qx * view[3, 0] + qy * view[3, 1] + rz * view[3, 2]) / z
            i_min = min(i_min, ii)
            i_max = max(i_max, ii)
            j_min = min(j_min, jj)
            j_max = max(j_max, jj)
        if i_max < 0.0 or j_max < 0.0 or i_min > columns or j_min > rows:
            return
        i0 = max(0, int(i_min))
        i1 = min(columns - 1, int(i_max) + 1)
        j0 = max(0, int(j_min))
        j1 = min(rows - 1, int(j_max) + 1)
    strength = light[pal.AIR, 2] * math.exp(-max(depth, 0.0) / light[pal.AIR, 1])
    for j in range(j0, j1 + 1):
        b = (0.5 * rows - (j + 0.5)) / focal
        for i in range(i0, i1 + 1):
            a = ((i + 0.5) - 0.5 * columns) / focal
            dz = view[1, 2] + a * view[2, 2] + b * view[3, 2]
            if dz > -1e-6:
                continue
            t = -view[0, 2] / dz
            gx = t * (view[1, 0] + a * view[2, 0] + b * view[3, 0]) - rx
            gy = t * (view[1, 1] + a * view[2, 1] + b * view[3, 1]) - ry
            along = abs(gx * c + gy * sn) - half_length + 0.15
            across = abs(gy * c - gx * sn) - half_width + 0.15
            outside = math.sqrt(max(along, 0.0) ** 2 + max(across, 0.0) ** 2)
            soft = 0.55 + t / focal
            dark = 1.0 - outside / soft
            if dark > 0.0:
                keep = 1.0 - strength * dark * dark * (3.0 - 2.0 * dark)
                ground[j, i, 0] *= keep
                ground[j, i, 1] *= keep
                ground[j, i, 2] *= keep


@_compiled
def _fill(corners, count, word, ident, lift, focal, target):
    """Draws a convex polygon, corners in camera coordinates (forward, right, up; m), with one colour."""
    depth, color, ids, scratch, points = target
    rows, columns = depth.shape
    clipped = points[1]
    used = 0
    for i in range(count):
        j = i + 1 if i + 1 < count else 0
        da = corners[i, 0] - NEAR
        db = corners[j, 0] - NEAR
        if da >= 0.0:
            clipped[used, 0] = corners[i, 0]
            clipped[used, 1] = corners[i, 1]
            clipped[used, 2] = corners[i, 2]
            used += 1
        if (da >= 0.0) != (db >= 0.0):
            part = da / (da - db)
            clipped[used, 0] = NEAR
            clipped[used, 1] = corners[i, 1] + (corners[j, 1] - corners[i, 1]) * part
            clipped[used, 2] = corners[i, 2] + (corners[j, 2] - corners[i, 2]) * part
            used += 1
    if used < 3:
        return
    x_min = 1e18
    x_max = -1e18
    y_min = 1e18
    y_max = -1e18
    for i in range(used):
        inverse = focal / clipped[i, 0]
        px = 0.5 * columns + clipped[i, 1] * inverse
        py = 0.5 * rows - clipped[i, 2] * inverse
        points[2, i, 0] = px
        points[2, i, 1] = py
        x_min = min(x_min, px)
        x_max = max(x_max, px)
        y_min = min(y_min, py)
        y_max = max(y_max, py)
    if x_max < 0.5 or y_max < 0.5 or x_min > columns - 0.5 or y_min > rows - 0.5:
        return
    first = max(0, math.ceil(y_min - 0.5))
    last = min(rows - 1, math.ceil(y_max - 0.5) - 1)
    if last < first:
        return
    # The plane n . p = c through the corners makes the inverse depth linear in the picture.
    nx = 0.0
    ny = 0.0
    nz = 0.0
    for i in range(count):
        j = i + 1 if i + 1 < count else 0
        nx += (corners[i, 1] - corners[j, 1]) * (corners[i, 2] + corners[j, 2])
        ny += (corners[i, 2] - corners[j, 2]) * (corners[i, 0] + corners[j, 0])
        nz += (corners[i, 0] - corners[j, 0]) * (corners[i, 1] + corners[j, 1])
    c = nx * corners[0, 0] + ny * corners[0, 1] + nz * corners[0, 2]
    if abs(c) < 1e-9:
        return
    step = lift * ny / (c * focal)
    fall = -lift * nz / (c * focal)
    base = lift * nx / c + step * (0.5 - 0.5 * columns) + fall * (0.5 - 0.5 * rows)
    for row in range(first, last + 1):
        scratch[0, row] = 1e18
        scratch[1, row] = -1e18
    for i in range(used):
        j = i + 1 if i + 1 < used else 0
        xa = points[2, i, 0]
        ya = points[2, i, 1]
        xb = points[2, j, 0]
        yb = points[2, j, 1]
        if ya > yb:
            xa, ya, xb, yb = xb, yb, xa, ya
        top = max(first, math.ceil(ya - 0.5))
        bottom = min(last, math.ceil(yb - 0.5) - 1)
        if bottom < top:
            continue
        slope = (xb - xa) / (yb - ya)
        for row in range(top, bottom + 1):
            cross = xa + (row + 0.5 - ya) * slope
            scratch[0, row] = min(scratch[0, row], cross)
            scratch[1, row] = max(scratch[1, row], cross)
    for row in range(first, last + 1):
        left = max(scratch[0, row] - 0.5, 0.0)
        right = min(scratch[1, row] - 0.5, float(columns))
        if right <= left:
            continue
        start = math.ceil(left)
        stop = math.ceil(right)
        near = base + row * fall
        for column in range(start, stop):
            w = np.float32(near + column * step)
            if w > depth[row, column]:
                depth[row, column] = w
                color[row, column] = word
                ids[row, column] = ident


@_compiled
def _paint_model(view, focal, mesh, model, x, y, yaw, red, green, blue, braking, ident, light, target):
    """Draws a model at a ground pose; faces turned away or too small to matter are left out."""
    depth, _, _, _, points = target
    rows, columns = depth.shape
    rx = x - view[0, 0]
    ry = y - view[0, 1]
    rz = 0.5 * mesh.height[model] - view[0, 2]
    radius = mesh.radius[model]
    forward = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    if forward < -radius or forward > FAR:
        return
    distance = math.sqrt(rx * rx + ry * ry + rz * rz)
    if forward > radius:
        # The sphere's picture lies within this circle (generously for oblique rays).
        slack = 1.5 * radius * focal / (forward - 0.5 * radius)
        across = focal * (rx * view[2, 0] + ry * view[2, 1] + rz * view[2, 2]) / forward
        upward = focal * (rx * view[3, 0] + ry * view[3, 1] + rz * view[3, 2]) / forward
        stretch = slack * (1.0 + abs(across) / focal)
        if abs(across) - stretch > 0.5 * columns:
            return
        stretch = slack * (1.0 + abs(upward) / focal)
        if abs(upward) - stretch > 0.5 * rows:
            return
    c = math.cos(yaw)
    sn = math.sin(yaw)
    # Camera and sun in the model's frame.
    eye_x = -(rx * c + ry * sn)
    eye_y = -(ry * c - rx * sn)
    eye_z = view[0, 2]
    sun_x = light[pal.SUN_DIRECTION, 0] * c + light[pal.SUN_DIRECTION, 1] * sn
    sun_y = light[pal.SUN_DIRECTION, 1] * c - light[pal.SUN_DIRECTION, 0] * sn
    sun_z = light[pal.SUN_DIRECTION, 2]
    fx = view[1, 0] * c + view[1, 1] * sn
    fy = view[1, 1] * c - view[1, 0] * sn
    gx = view[2, 0] * c + view[2, 1] * sn
    gy = view[2, 1] * c - view[2, 0] * sn
    ux = view[3, 0] * c + view[3, 1] * sn
    uy = view[3, 1] * c - view[3, 0] * sn
    fz = view[1, 2]
    gz = view[2, 2]
    uz = view[3, 2]
    haze = _haze(distance, light)
    lamps = light[pal.LAMPS, 0]
    corners = points[0]
    for face in range(mesh.start[model], mesh.start[model + 1]):
        if distance > mesh.reach[face]:
            continue
        nx = mesh.normal[face, 0]
        ny = mesh.normal[face, 1]
        nz = mesh.normal[face, 2]
        px = eye_x - mesh.corners[face, 0, 0]
        py = eye_y - mesh.corners[face, 0, 1]
        pz = eye_z - mesh.corners[face, 0, 2]
        if nx * px + ny * py + nz * pz <= 0.0:
            continue
        count = mesh.sides[face]
        for k in range(count):
            qx = mesh.corners[face, k, 0] - eye_x
            qy = mesh.corners[face, k, 1] - eye_y
            qz = mesh.corners[face, k, 2] - eye_z
            corners[k, 0] = qx * fx + qy * fy + qz * fz
            corners[k, 1] = qx * gx + qy * gy + qz * gz
            corners[k, 2] = qx * ux + qy * uy + qz * uz
        material = mesh.material[face]
        r = ALBEDO[material, 0]
        g = ALBEDO[material, 1]
        b = ALBEDO[material, 2]
        if material == PAINT:
            r = red
            g = green
            b = blue
        facing = max(nx * sun_x + ny * sun_y + nz * sun_z, 0.0)
        open_sky = 0.82 + 0.18 * nz
        r *= light[pal.AMBIENT, 0] * open_sky + light[pal.SUN, 0] * facing
        g *= light[pal.AMBIENT, 1] * open_sky + light[pal.SUN, 1] * facing
        b *= light[pal.AMBIENT, 2] * open_sky + light[pal.SUN, 2] * facing
        if material == GLASS:
            # Glass mirrors the sky, the more the higher it looks.
            mirror = 0.14 + 0.30 * max(nz, 0.0)
            r += light[pal.HORIZON, 0] * mirror
            g += light[pal.HORIZON, 1] * mirror
            b += light[pal.HORIZON, 2] * mirror
        elif material in (SIGN, SIGN_TEXT):  # retroreflective: hardly ever in shade
            r = max(r, 0.85 * ALBEDO[material, 0])
            g = max(g, 0.85 * ALBEDO[material, 1])
            b = max(b, 0.85 * ALBEDO[material, 2])
        elif material == BRAKE:
            if braking:
                r = 255.0
                g = 64.0
                b = 44.0
            else:
                r = max(r, 200.0 * lamps)
        elif material == HEADLAMP:
            r = max(r, 255.0 * lamps)
            g = max(g, 250.0 * lamps)
            b = max(b, 225.0 * lamps)
        r += (light[pal.HORIZON, 0] - r) * haze
        g += (light[pal.HORIZON, 1] - g) * haze
        b += (light[pal.HORIZON, 2] - b) * haze
        _fill(corners, count, _pack(r, g, b), ident, mesh.lift[face], focal, target)


@_compiled
def _lit(albedo, facing, open_sky, haze, light):
    """Packed colour of a surface in sun and sky light, behind haze."""
    r = albedo[0] * (light[pal.AMBIENT, 0] * open_sky + light[pal.SUN, 0] * facing)
    g = albedo[1] * (light[pal.AMBIENT, 1] * open_sky + light[pal.SUN, 1] * facing)
    b = albedo[2] * (light[pal.AMBIENT, 2] * open_sky + light[pal.SUN, 2] * facing)
    return _pack(
        r + (light[pal.HORIZON, 0] - r) * haze,
        g + (light[pal.HORIZON, 1] - g) * haze,
        b + (light[pal.HORIZON, 2] - b) * haze,
    )


@_compiled
def _corner(view, x, y, z, out):
    """A world point in camera coordinates."""
    rx = x - view[0, 0]
    ry = y - view[0, 1]
    rz = z - view[0, 2]
    out[0] = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    out[1] = rx * view[2, 0] + ry * view[2, 1] + rz * view[2, 2]
    out[2] = rx * view[3, 0] + ry * view[3, 1] + rz * view[3, 2]


@_compiled
def _paint_band(view, focal, a, b, d0, z0, d1, z1, albedo, shade, haze, ident, both_sides, light, target):
    """A face of the barrier or a rail between two course vertices, from (d0, z0) to (d1, z1) across the road."""
    length = math.sqrt((d1 - d0) ** 2 + (z1 - z0) ** 2)
    n_d = (z1 - z0) / length
    n_z = (d0 - d1) / length
    # Outward normal in the world at vertex a; right of the road is (-sin, cos).
    nx = -a[3] * n_d
    ny = a[2] * n_d
    toward = (view[0, 0] - a[0] + a[3] * d0) * nx + (view[0, 1] - a[1] - a[2] * d0) * ny + (view[0, 2] - z0) * n_z
    if toward <= 0.0:
        if not both_sides:
            return
        nx = -nx
        ny = -ny
        n_z = -n_z
    sun = light[pal.SUN_DIRECTION]
    facing = max(nx * sun[0] + ny * sun[1] + n_z * sun[2], 0.0)
    corners = target[4][0]
    _corner(view, a[0] - a[3] * d0, a[1] + a[2] * d0, z0, corners[0])
    _corner(view, b[0] - b[3] * d0, b[1] + b[2] * d0, z0, corners[1])
    _corner(view, b[0] - b[3] * d1, b[1] + b[2] * d1, z1, corners[2])
    _corner(view, a[0] - a[3] * d1, a[1] + a[2] * d1, z1, corners[3])
    word = _lit(albedo, shade * facing, shade * (0.85 + 0.15 * n_z), haze, light)
    _fill(corners, 4, word, ident, 1.0, focal, target)


@_compiled
def _paint_course(view, focal, course, light, target):
    """Barrier and guard rails along the whole ring, as far as they can be seen."""
    count = course.shape[0]
    half_columns = 0.5 * target[0].shape[1]
    for block in range(count // BLOCK):
        start = block * BLOCK
        middle = course[start + BLOCK // 2]
        rx = middle[0] - view[0, 0]
        ry = middle[1] - view[0, 1]
        rz = -view[0, 2]
        distance = math.sqrt(rx * rx + ry * ry + rz * rz)
        forward = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
        if forward < -32.0 or forward > FAR:
            continue
        across = rx * view[2, 0] + ry * view[2, 1] + rz * view[2, 2]
        if forward > 0.0 and (abs(across) - 34.0) * focal > half_columns * (forward + 34.0):
            continue
        step = 1 if distance < 80.0 else (2 if distance < 170.0 else 4)
        for k in range(start, start + BLOCK, step):
            a = course[k]
            b = course[(k + step) % count]
            reach = math.sqrt((a[0] - view[0, 0]) ** 2 + (a[1] - view[0, 1]) ** 2 + view[0, 2] ** 2)
            haze = _haze(reach, light)
            for side in (-1.0, 1.0):
                if distance < 120.0:
                    for face in range(PROFILE.shape[0] - 1):
                        d0, z0 = PROFILE[face]
                        d1, z1 = PROFILE[face + 1]
                        shade = 0.86 if face == 0 else 1.0
                        _barrier_face(view, focal, a, b, side, d0, z0, d1, z1, shade, haze, light, target)
                else:
                    top_d, top_z = PROFILE[PROFILE.shape[0] - 1]
                    _barrier_face(
                        view, focal, a, b, side, BARRIER_HALF_WIDTH, 0.0, top_d, top_z, 1.0, haze, light, target
                    )
                if distance < 320.0:
                    d = side * RAIL_OFFSET
                    low = RAIL_HEIGHT - 0.34
                    mid = RAIL_HEIGHT - 0.17
                    _paint_band(view, focal, a, b, d, low, d, mid, STEEL, 0.78, haze, ID_RAIL, True, light, target)
                    _paint_band(
                        view, focal, a, b, d, mid, d, RAIL_HEIGHT, STEEL, 1.05, haze, ID_RAIL, True, light, target
                    )
                    if distance < 110.0:
                        _paint_post(view, focal, a, d + side * 0.05, low + 0.1, haze, light, target)
            top_d, top_z = PROFILE[PROFILE.shape[0] - 1]
            _paint_band(
                view, focal, a, b, top_d, top_z, -top_d, top_z, CONCRETE, 1.05, haze, ID_BARRIER, False, light, target
            )


@_compiled
def _barrier_face(view, focal, a, b, side, d0, z0, d1, z1, shade, haze, light, target):
    """One side face of the barrier; the left one runs from top to foot, so that its normal points outward."""
    if side > 0.0:
        _paint_band(view, focal, a, b, d0, z0, d1, z1, CONCRETE, shade, haze, ID_BARRIER, False, light, target)
    else:
        _paint_band(view, focal, a, b, -d1, z1, -d0, z0, CONCRETE, shade, haze, ID_BARRIER, False, light, target)


@_compiled
def _paint_post(view, focal, a, d, height, haze, light, target):
    """A guard rail's post: an upright rectangle across the road."""
    corners = target[4][0]
    for k in range(4):
        wide = d + (0.06 if k == 1 or k == 2 else -0.06)
        _corner(view, a[0] - a[3] * wide, a[1] + a[2] * wide, height if k >= 2 else 0.0, corners[k])
    _fill(corners, 4, _lit(STEEL, 0.2, 0.6, haze, light), ID_RAIL, 1.0, focal, target)


@_compiled
def _paint_tree(view, focal, tree, noise, light, target):
    """A round tree (trunk and three balls) or a conifer (three cones seen flat)."""
    x, y, height, kind, shade, phase = tree
    rx = x - view[0, 0]
    ry = y - view[0, 1]
    rz = 0.5 * height - view[0, 2]
    forward = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    if forward < 0.6 * height or forward > FAR:
        return
    across = rx * view[2, 0] + ry * view[2, 1] + rz * view[2, 2]
    if (abs(across) - height) * focal > 0.5 * target[0].shape[1] * forward:
        return
    haze = _haze(math.sqrt(rx * rx + ry * ry + rz * rz), light)
    flat = math.sqrt(rx * rx + ry * ry) + 1e-9
    side_x = -ry / flat  # horizontal, to the right as seen from the camera
    side_y = rx / flat
    corners = target[4][0]
    trunk = 0.035 * height
    for k in range(4):
        wide = trunk if k == 1 or k == 2 else -trunk
        _corner(view, x + side_x * wide, y + side_y * wide, 0.4 * height if k >= 2 else 0.0, corners[k])
    _fill(corners, 4, _lit(BARK, 0.3, 0.8, haze, light), ID_VEGETATION, 1.0, focal, target)
    sun = light[pal.SUN_DIRECTION]
    if kind == 0.0:
        for ball in range(3):
            angle = 2.0 * math.pi * (phase + ball / 3.0)
            size = (0.30, 0.25, 0.22)[ball] * height
            off = (0.0, 0.16, 0.18)[ball] * height
            level = (0.70, 0.55, 0.58)[ball] * height
            _paint_ball(
                view, focal, x + off * math.cos(angle), y + off * math.sin(angle), level, size,
                shade, haze, noise, phase, light, target,
            )  # fmt: skip
        return
    for half in range(2):
        sign = -1.0 if half == 0 else 1.0
        facing = max(0.0, sign * (side_x * sun[0] + side_y * sun[1])) + 0.25 * sun[2]
        word = _lit(NEEDLES, facing * shade, 0.9 * shade, haze, light)
        for tier in range(3):
            wide = (0.22, 0.18, 0.13)[tier] * height * sign
            low = (0.14, 0.38, 0.62)[tier] * height
            top = (0.58, 0.80, 1.0)[tier] * height
            _corner(view, x, y, low, corners[0])
            _corner(view, x + side_x * wide, y + side_y * wide, low, corners[1])
            _corner(view, x, y, top, corners[2])
            _fill(corners, 3, word, ID_VEGETATION, 1.0 + 0.001 * tier, focal, target)


@_compiled
def _paint_ball(view, focal, x, y, z, radius, shade, haze, noise, phase, light, target):
    """A leafy ball, its picture taken as a circle."""
    depth, color, ids, _, points = target
    rows, columns = depth.shape
    point = points[0, 0]
    _corner(view, x, y, z, point)
    if point[0] < 1.5 * radius:
        return
    column = 0.5 * columns + focal * point[1] / point[0]
    row = 0.5 * rows - focal * point[2] / point[0]
    size = focal * radius / point[0]
    first = max(0, math.ceil(row - size - 0.5))
    last = min(rows - 1, math.floor(row + size - 0.5))
    left = max(0, math.ceil(column - size - 0.5))
    right = min(columns - 1, math.floor(column + size - 0.5))
    if size < 0.5 or last < first or right < left:
        return
    sun = light[pal.SUN_DIRECTION]
    sun_f = sun[0] * view[1, 0] + sun[1] * view[1, 1] + sun[2] * view[1, 2]
    sun_r = sun[0] * view[2, 0] + sun[1] * view[2, 1] + sun[2] * view[2, 2]
    sun_u = sun[0] * view[3, 0] + sun[1] * view[3, 1] + sun[2] * view[3, 2]
    near = np.float32(1.0 / (point[0] - 0.5 * radius))
    inverse = 1.0 / size
    offset = int(phase * 251.0)
    for j in range(first, last + 1):
        v = (j + 0.5 - row) * inverse
        for i in range(left, right + 1):
            u = (i + 0.5 - column) * inverse
            q = u * u + v * v
            if q > 1.0 or near <= depth[j, i]:
                continue
            leaf = noise[(int((v + 1.0) * 14.0) + offset) & 255, (int((u + 1.0) * 14.0) + 2 * offset) & 255]
            if q > 0.86 + 0.3 * leaf:
                continue
            facing = max(sun_r * u - sun_u * v - sun_f * math.sqrt(1.0 - q), 0.0)
            tone = shade * (1.0 + 0.25 * leaf)
            depth[j, i] = near
            color[j, i] = _lit(LEAVES, tone * facing, tone * (0.78 - 0.18 * v), haze, light)
            ids[j, i] = ID_VEGETATION


@_compiled
def _resolve(ss, ground, ground_ids, depth, color, sample_ids, bgra, ids):
    """Averages the samples of every pixel over the ground layer."""
    height, width = ground_ids.shape
    share = np.float32(1.0 / (ss * ss))
    half = np.float32(0.5)
    for j in range(height):
        for i in range(width):
            covered = 0
            r = 0
            g = 0
            b = 0
            for v in range(j * ss, j * ss + ss):
                for u in range(i * ss, i * ss + ss):
                    if depth[v, u] > 0.0:
                        word = int(color[v, u])
                        covered += 1
                        r += word >> 16
                        g += (word >> 8) & 255
                        b += word & 255
            ids[j, i] = ground_ids[j, i]
            rest = np.float32(ss * ss - covered)
            bgra[j, i, 2] = np.uint8(min(max((r + rest * ground[j, i, 0]) * share + half, 0.0), 255.0))
            bgra[j, i, 1] = np.uint8(min(max((g + rest * ground[j, i, 1]) * share + half, 0.0), 255.0))
            bgra[j, i, 0] = np.uint8(min(max((b + rest * ground[j, i, 2]) * share + half, 0.0), 255.0))
            bgra[j, i, 3] = 255
            center = ss // 2
            if depth[j * ss + center, i * ss + center] > 0.0:
                ids[j, i] = sample_ids[j * ss + center, i * ss + center]
