"""The ground layer of a picture: one value a pixel, every painted edge filtered over the pixel's footprint.

It is made row by row, in passes over the row: those without branches take several pixels at a time.
"""

from __future__ import annotations

import math

from carla_digr.simulator import palette as pal
from carla_digr.simulator.rays import (
    CLEAR,
    DOWN_X,
    DOWN_Y,
    HIT_X,
    HIT_Y,
    REACH,
    RIGHT_X,
    RIGHT_Y,
    aim_row,
    arc_tangent,
)
from carla_digr.simulator.road import (
    BARRIER_HALF_WIDTH,
    DASH_LENGTH,
    LANE_WIDTH,
    LANES,
    LINE_WIDTH,
    MEDIAN_HALF_WIDTH,
    PAVED_EDGE,
    ROAD_EDGE,
)
from carla_digr.simulator.scenery import (
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
)
from carla_digr.simulator.shading import (
    BEYOND,
    FIRST_LINE_BIT,
    GROUND,
    HIDDEN,
    ID_LINE,
    ID_ROAD,
    ID_TERRAIN,
    WITHOUT_COLOURS,
    compiled,
    inlined,
    outside,
)
from carla_digr.simulator.sky import name_sky, paint_sky

ASPHALT = (104.0, 105.0, 108.0)
SHOULDER = (118.0, 117.0, 116.0)
GRASS = (92.0, 124.0, 58.0)
FIELD = (150.0, 146.0, 84.0)
WHITE = (240.0, 240.0, 236.0)
YELLOW = (232.0, 178.0, 40.0)
FIRST_DASHED, LAST_DASHED = MEDIAN_HALF_WIDTH + 0.5 * LANE_WIDTH, ROAD_EDGE - 0.5 * LANE_WIDTH  # m, and beyond none
SHADOW_DISTANCE = 250.0  # m, farther shadows are not seen
# Columns of a row's scratch: the ground point of each pixel and where it lies on the road; the pixel's footprint across
# and along the road (m), how much of the grain it shows, one over the footprint, which share of it is paved and which
# painted; noise under grass and asphalt; the colour.
(
    X, Y, PIECE, ALONG, ACROSS, OFFSET, COS_ROAD, SIN_ROAD, WIDE, LONG, GRAIN, SHARP, PAVED, LINE,
    GRASS_FINE, GRASS_BROAD, ROAD_FINE, ROAD_BROAD, RED, GREEN, BLUE,
) = range(21)  # fmt: skip
RUN_COLUMNS = 21
FARTHEST = 6000.0  # units of the optical axis to the ground from which on all is haze


@inlined
def _road_point(pieces, origin, grid, x, y):
    """(piece, along, across, d, cos, sin) of a ground point, the direction being the road's; piece -1 = countryside.

    On an arc along and across are the legs of the angle from the piece's middle, on a straight along is the distance
    from it: what ``_arc_length`` needs.
    """
    u = (x - origin[0]) * (1.0 / CELL)
    v = (y - origin[1]) * (1.0 / CELL)
    if not (0.0 <= u < grid.shape[1] and 0.0 <= v < grid.shape[0]):
        return -1, 0.0, 0.0, 1e9, 1.0, 0.0
    index = int(grid[int(v), int(u)])
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


@inlined
def _arc_length(pieces, piece, along, across):
    """The s that belongs to a result of ``_road_point``."""
    if pieces[piece, SIDE] == 0.0:
        return pieces[piece, MID_S] + along
    return pieces[piece, MID_S] + abs(pieces[piece, RADIUS]) * arc_tangent(along, across)


@compiled
def _dash(s, period, footprint):
    """Share of the interval of length ``footprint`` around s that is painted; dashes begin at multiples of period."""
    a = (s - 0.5 * footprint) / period
    b = (s + 0.5 * footprint) / period
    fa = math.floor(a)
    fb = math.floor(b)
    painted = (fb - fa) * DASH_LENGTH
    painted += min((b - fb) * period, DASH_LENGTH) - min((a - fa) * period, DASH_LENGTH)
    return painted / footprint


@compiled
def ground_name(world, x, y):
    """The id of what the ground shows at a point: terrain, road or a line on it."""
    piece, along, across, d, _, _ = _road_point(world.pieces, world.origin, world.grid, x, y)
    e = abs(d)
    if e > PAVED_EDGE:
        return ID_TERRAIN
    border = min(max(math.floor((e - MEDIAN_HALF_WIDTH) / LANE_WIDTH + 0.5), 0.0), float(LANES))
    if abs(e - MEDIAN_HALF_WIDTH - border * LANE_WIDTH) > 0.5 * LINE_WIDTH:
        return ID_ROAD
    if e >= FIRST_DASHED and e < LAST_DASHED:
        painted = _dash(_arc_length(world.pieces, piece, along, across), world.dash_period, 1e-3)
        return ID_LINE if painted >= 0.5 else ID_ROAD
    return ID_LINE


@compiled
def _look_through(depth, ss, j, rays, shown):
    """What the pixels of row j show of the ground layer: HIDDEN if objects cover all samples, GROUND or BEYOND."""
    width = shown.shape[0]
    for i in range(width):
        shown[i] = BEYOND if rays[REACH, i] > FARTHEST else GROUND
    if ss == 2:  # the usual case, several pixels at a time
        for i in range(width):
            least = min(depth[2 * j, 2 * i], depth[2 * j, 2 * i + 1])
            least = min(least, min(depth[2 * j + 1, 2 * i], depth[2 * j + 1, 2 * i + 1]))
            shown[i] = HIDDEN if least > 0.0 else shown[i]
        return
    for i in range(width):
        covered = True
        for v in range(j * ss, j * ss + ss):
            for u in range(i * ss, i * ss + ss):
                covered = covered and depth[v, u] > 0.0
        if covered:
            shown[i] = HIDDEN


@compiled
def _place(view, yaw, rays, run):
    """Where the rays of a row meet the ground."""
    c = math.cos(yaw)
    sn = math.sin(yaw)
    for i in range(run.shape[1]):
        run[X, i] = view[0, 0] + rays[HIT_X, i] * c - rays[HIT_Y, i] * sn
        run[Y, i] = view[0, 1] + rays[HIT_X, i] * sn + rays[HIT_Y, i] * c


@compiled
def _find_road(pieces, origin, grid, shown, run):
    """Where on the road the ground points of a row lie."""
    for i in range(shown.shape[0]):
        if shown[i] != GROUND:
            continue
        piece, along, across, d, c, sn = _road_point(pieces, origin, grid, run[X, i], run[Y, i])
        run[PIECE, i] = piece
        run[ALONG, i] = along
        run[ACROSS, i] = across
        run[OFFSET, i] = d
        run[COS_ROAD, i] = c
        run[SIN_ROAD, i] = sn


@compiled
def _measure_pixels(yaw, rays, run):
    """Footprints, and how much of them is paved and painted; dashed lines are taken for solid ones here."""
    cy = math.cos(yaw)
    sy = math.sin(yaw)
    for i in range(run.shape[1]):
        c = run[COS_ROAD, i] * cy + run[SIN_ROAD, i] * sy
        sn = run[SIN_ROAD, i] * cy - run[COS_ROAD, i] * sy
        across_right = rays[RIGHT_Y, i] * c - rays[RIGHT_X, i] * sn
        across_down = rays[DOWN_Y, i] * c - rays[DOWN_X, i] * sn
        along_right = rays[RIGHT_X, i] * c + rays[RIGHT_Y, i] * sn
        along_down = rays[DOWN_X, i] * c + rays[DOWN_Y, i] * sn
        wide = max(math.sqrt(across_right * across_right + across_down * across_down), 1e-9)
        long = math.sqrt(along_right * along_right + along_down * along_down)
        spread = 1.0 + wide + long
        share = 1.0 / (wide * spread)  # one division for both
        run[WIDE, i] = wide
        run[LONG, i] = long
        run[GRAIN, i] = share * wide
        run[SHARP, i] = share * spread
    for i in range(run.shape[1]):
        e = abs(run[OFFSET, i])
        wide = run[WIDE, i]
        sharp = run[SHARP, i]
        run[PAVED, i] = min(max((PAVED_EDGE - e) * sharp + 0.5, 0.0), 1.0)
        border = min(max(math.floor((e - MEDIAN_HALF_WIDTH) * (1.0 / LANE_WIDTH) + 0.5), 0.0), float(LANES))
        off = e - (MEDIAN_HALF_WIDTH + border * LANE_WIDTH)
        low = max(off - 0.5 * wide, -0.5 * LINE_WIDTH)
        high = min(off + 0.5 * wide, 0.5 * LINE_WIDTH)
        inner = border >= 1.0 and border <= LANES - 1.0
        near = inner or e < MEDIAN_HALF_WIDTH + 1.0 or e > ROAD_EDGE - 1.0
        run[LINE, i] = max(high - low, 0.0) * sharp if near else 0.0


@compiled
def _leave_out_lines(without, run):
    """No paint where a line is left out."""
    for i in range(run.shape[1]):
        e = abs(run[OFFSET, i])
        border = int(min(max(math.floor((e - MEDIAN_HALF_WIDTH) * (1.0 / LANE_WIDTH) + 0.5), 0.0), float(LANES)))
        bit = FIRST_LINE_BIT + border + (LANES + 1 if run[OFFSET, i] < 0.0 else 0)
        if (without >> bit) & 1:
            run[LINE, i] = 0.0


@compiled
def _look_up(pieces, origin, grid, dash_period, noise, shown, run, coloured):
    """What is found for one pixel after the other: gaps of dashed lines and noise; whether there is grass, and road."""
    grass = False
    road = False
    for i in range(shown.shape[0]):
        if shown[i] != GROUND:
            continue
        x = run[X, i]
        y = run[Y, i]
        if coloured and run[PAVED, i] < 1.0:
            grass = True
            run[GRASS_FINE, i] = noise[math.floor(x * 3.3) & 255, math.floor(y * 3.3) & 255]
            run[GRASS_BROAD, i] = noise[math.floor(x * 0.06) & 255, math.floor(y * 0.06) & 255]
        if run[PAVED, i] > 0.0:
            if coloured:
                road = True
                run[ROAD_FINE, i] = noise[math.floor(x * 5.0) & 255, math.floor(y * 5.0) & 255]
                run[ROAD_BROAD, i] = noise[math.floor(x * 0.25) & 255, math.floor(y * 0.25) & 255]
            e = abs(run[OFFSET, i])
            if run[LINE, i] > 0.0 and e >= FIRST_DASHED and e < LAST_DASHED:
                s = _arc_length(pieces, int(run[PIECE, i]), run[ALONG, i], run[ACROSS, i])
                run[LINE, i] *= _dash(s, dash_period, run[LONG, i])
    return grass, road


@compiled
def _paint_grass(run):
    """Two sizes of patches near the road, fields in the countryside, worn ground beside the asphalt."""
    for i in range(run.shape[1]):
        e = abs(run[OFFSET, i])
        broad = run[GRASS_BROAD, i]
        tone = 1.0 + 0.20 * (run[GRASS_FINE, i] * run[GRAIN, i]) + 0.10 * broad
        field = min(max((e - 34.0) * 0.03, 0.0), 1.0) * min(max(broad * 3.0, 0.0), 1.0)
        dry = max(field, 0.35 * min(max(1.0 - (e - PAVED_EDGE) * 0.6, 0.0), 1.0))
        run[RED, i] = (GRASS[0] + (FIELD[0] - GRASS[0]) * dry) * tone
        run[GREEN, i] = (GRASS[1] + (FIELD[1] - GRASS[1]) * dry) * tone
        run[BLUE, i] = (GRASS[2] + (FIELD[2] - GRASS[2]) * dry) * tone


@compiled
def _pave(run):
    """Asphalt with shoulders, dirt at the barrier, tyre tracks and lines, over the grass."""
    for i in range(run.shape[1]):
        e = abs(run[OFFSET, i])
        wide = run[WIDE, i]
        sharp = run[SHARP, i]
        grain = run[GRAIN, i]
        line = run[LINE, i]
        paved = run[PAVED, i]
        tone = 1.0 + 0.07 * (run[ROAD_FINE, i] * grain * grain) + 0.03 * (run[ROAD_BROAD, i] * grain)
        outer = e > ROAD_EDGE - 1.0
        inner = e < MEDIAN_HALF_WIDTH + 1.0
        beside = min(max((e - ROAD_EDGE if outer else MEDIAN_HALF_WIDTH - e) * sharp + 0.5, 0.0), 1.0)
        beside = beside if outer or inner else 0.0
        # Tyre tracks: a quarter of a lane to both sides of its centre the asphalt is darker.
        lane = (e - MEDIAN_HALF_WIDTH) * (1.0 / LANE_WIDTH)
        off = abs(abs(lane - math.floor(lane) - 0.5) - 0.25)
        worn = 0.07 * max(0.0, 1.0 - off * 6.0) / (1.0 + wide * wide)
        dirt = 0.4 * max(0.0, 1.0 - abs(e - BARRIER_HALF_WIDTH) / (0.5 + wide))
        tone *= 1.0 - (dirt if inner else 0.0)
        tone *= 1.0 - (worn if e > MEDIAN_HALF_WIDTH and e < ROAD_EDGE else 0.0)
        r = (ASPHALT[0] + (SHOULDER[0] - ASPHALT[0]) * beside) * tone
        g = (ASPHALT[1] + (SHOULDER[1] - ASPHALT[1]) * beside) * tone
        b = (ASPHALT[2] + (SHOULDER[2] - ASPHALT[2]) * beside) * tone
        r += ((YELLOW[0] if inner else WHITE[0]) - r) * line
        g += ((YELLOW[1] if inner else WHITE[1]) - g) * line
        b += ((YELLOW[2] if inner else WHITE[2]) - b) * line
        grass = paved < 1.0  # else its colour is that of an earlier row
        under_r = run[RED, i] if grass else 0.0
        under_g = run[GREEN, i] if grass else 0.0
        under_b = run[BLUE, i] if grass else 0.0
        run[RED, i] = under_r + (r - under_r) * paved
        run[GREEN, i] = under_g + (g - under_g) * paved
        run[BLUE, i] = under_b + (b - under_b) * paved


@compiled
def _light(j, rays, light, run, ground):
    """Sun, sky light and haze on a row of ground."""
    up = max(light[pal.SUN_DIRECTION, 2], 0.0)
    haze_r, haze_g, haze_b = light[pal.HORIZON]
    lit_r = light[pal.AMBIENT, 0] + light[pal.SUN, 0] * up
    lit_g = light[pal.AMBIENT, 1] + light[pal.SUN, 1] * up
    lit_b = light[pal.AMBIENT, 2] + light[pal.SUN, 2] * up
    for i in range(run.shape[1]):
        haze = 1.0 - rays[CLEAR, i]
        r = run[RED, i] * lit_r
        g = run[GREEN, i] * lit_g
        b = run[BLUE, i] * lit_b
        ground[j, 0, i] = r + (haze_r - r) * haze
        ground[j, 1, i] = g + (haze_g - g) * haze
        ground[j, 2, i] = b + (haze_b - b) * haze


@compiled
def _name(j, run, ground_ids):
    """What a row of ground shows."""
    for i in range(run.shape[1]):
        ident = ID_LINE if run[LINE, i] >= 0.5 else ID_ROAD
        ground_ids[j, i] = ident if run[PAVED, i] >= 0.5 else ID_TERRAIN


@compiled
def paint_ground(
    view, yaw, focal, world, patterns, light, depth, ss, axes, rays, run, shown, ground, ground_ids, without
):
    """Ground and sky, a value a pixel; what stands in ``ground`` for pixels that objects cover wholly means nothing.

    ``ground`` is (height, 3, width) float32. ``rays`` has the rays of all rows, or room for one: then they are found
    here, from ``axes`` as :func:`rays.aim_row` has them. ``run`` is (RUN_COLUMNS, width) float64 and ``shown`` (width,)
    int8 scratch. Bit ``line_bit`` of ``without`` leaves a line out; WITHOUT_COLOURS leaves ``ground`` as it is.
    """
    noise, cloud, hills = patterns
    pieces, origin, grid, dash_period = world.pieces, world.origin, world.grid, world.dash_period
    height, width = ground_ids.shape
    kept = rays.shape[0] == height
    coloured = without & WITHOUT_COLOURS == 0
    for j in range(height):
        row = rays[j if kept else 0]
        if not kept:
            aim_row(axes, view[0, 2], focal, light[pal.AIR, 1], j, height, row)
        _look_through(depth, ss, j, row, shown)
        ground_seen = False
        beyond_seen = False
        for i in range(width):
            ground_seen |= shown[i] == GROUND
            beyond_seen |= shown[i] == BEYOND
        if ground_seen:
            _place(view, yaw, row, run)
            _find_road(pieces, origin, grid, shown, run)
            _measure_pixels(yaw, row, run)
            if without >> FIRST_LINE_BIT:
                _leave_out_lines(without, run)
            grass, road = _look_up(pieces, origin, grid, dash_period, noise, shown, run, coloured)
            if grass:
                _paint_grass(run)
            if road:
                _pave(run)
            if coloured:
                _light(j, row, light, run, ground)
            _name(j, run, ground_ids)
        if beyond_seen:
            if coloured:
                paint_sky(j, row, yaw, focal, shown, cloud, hills, light, run, ground)
            name_sky(j, row, shown, ground_ids)


@compiled
def paint_shadow(view, focal, x, y, yaw, half_length, half_width, height, light, ground, ground_ids):
    """Darkens the ground under a box: soft at the edge, shifted away from the sun."""
    rows, columns = ground_ids.shape
    shift = min(0.18 * height, 0.5)
    px = x - shift * light[pal.SUN_DIRECTION, 0]
    py = y - shift * light[pal.SUN_DIRECTION, 1]
    rx = px - view[0, 0]
    ry = py - view[0, 1]
    rz = -view[0, 2]
    depth = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    reach = math.sqrt(half_length * half_length + half_width * half_width) + 1.0 + abs(depth) / focal
    if depth > SHADOW_DISTANCE or view[0, 2] <= 0.0 or outside(view, focal, rows, columns, rx, ry, rz, reach):
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
        low = min(-0.5 * columns * view[2, 2], 0.5 * columns * view[2, 2]) / focal
        if view[1, 2] + low + b * view[3, 2] > -1e-6:
            continue
        for i in range(i0, i1 + 1):
            a = ((i + 0.5) - 0.5 * columns) / focal
            dz = view[1, 2] + a * view[2, 2] + b * view[3, 2]
            t = -view[0, 2] / dz  # also the ground point's distance along the optical axis
            if dz > -1e-6 or abs(t - depth) > reach + 1.0:
                continue
            gx = t * (view[1, 0] + a * view[2, 0] + b * view[3, 0]) - rx
            gy = t * (view[1, 1] + a * view[2, 1] + b * view[3, 1]) - ry
            along = abs(gx * c + gy * sn) - half_length + 0.15
            across = abs(gy * c - gx * sn) - half_width + 0.15
            soft = 0.55 + t / focal
            if along >= soft or across >= soft:
                continue
            gap = math.sqrt(max(along, 0.0) ** 2 + max(across, 0.0) ** 2)
            dark = 1.0 - gap / soft
            if dark > 0.0:
                keep = 1.0 - strength * dark * dark * (3.0 - 2.0 * dark)
                ground[j, 0, i] *= keep
                ground[j, 1, i] *= keep
                ground[j, 2, i] *= keep
