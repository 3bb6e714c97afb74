"""The ground and the sky of a picture: one value a pixel, every painted edge filtered over the pixel's footprint."""

from __future__ import annotations

import math

from carla_digr.simulator import palette as pal
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
from carla_digr.simulator.shading import ID_LINE, ID_ROAD, ID_SKY, ID_TERRAIN, compiled, inlined, outside

ASPHALT = (104.0, 105.0, 108.0)
SHOULDER = (118.0, 117.0, 116.0)
GRASS = (92.0, 124.0, 58.0)
FIELD = (150.0, 146.0, 84.0)
WHITE = (240.0, 240.0, 236.0)
YELLOW = (232.0, 178.0, 40.0)
NO_GROUND = 1e9  # the distance at which a ray that never meets the ground does so
SHADOW_DISTANCE = 250.0  # m, farther shadows are not seen


@compiled
def _atan2(y, x):
    """atan2 to 2e-8 rad: a fifth of the library's time. (0, 0) gives 0."""
    ax = abs(x)
    ay = abs(y)
    big = max(max(ax, ay), 1e-300)
    small = min(ax, ay)
    steep = small > 0.4142135623730950 * big  # reduce to |t| <= tan(pi / 8)
    t = (small - (big if steep else 0.0)) / (big + (small if steep else 0.0))
    shift = 0.25 * math.pi if steep else 0.0
    q = t * t
    series = 1.0 / 9.0 - q * (1.0 / 11.0 - q * (1.0 / 13.0 - q / 15.0))
    a = shift + t * (1.0 - q * (1.0 / 3.0 - q * (1.0 / 5.0 - q * (1.0 / 7.0 - q * series))))
    if ay > ax:
        a = 0.5 * math.pi - a
    if x < 0.0:
        a = math.pi - a
    return -a if y < 0.0 else a


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
    return pieces[piece, MID_S] + abs(pieces[piece, RADIUS]) * _atan2(along, across)


@compiled
def _stripe(d, center, half, footprint, inverse):
    """Share of the interval of length ``footprint`` (and its inverse) around d that the stripe covers."""
    d -= center
    low = max(d - 0.5 * footprint, -half)
    high = min(d + 0.5 * footprint, half)
    return max(high - low, 0.0) * inverse


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
def _meet_sky(view, b, pixel, turn, rise):
    """A row of rays: where each meets the sky's patterns, in columns around the horizon, and the slope it rises with.

    Without branches, as ``_meet_ground``.
    """
    width = turn.shape[0]
    middle = 0.5 * width - 0.5
    for i in range(width):
        a = (i - middle) * pixel
        dx = view[1, 0] + a * view[2, 0] + b * view[3, 0]
        dy = view[1, 1] + a * view[2, 1] + b * view[3, 1]
        dz = view[1, 2] + a * view[2, 2] + b * view[3, 2]
        rise[i] = dz / max(math.sqrt(dx * dx + dy * dy), 1e-6)
        turn[i] = (_atan2(dy, dx) / (2.0 * math.pi) + 0.5) * 1024.0


@inlined
def _sky(turn, rise, focal, cloud, hills, light):
    """Colour of the sky in a direction given by ``_meet_sky``: gradient, clouds, two ranges of hills."""
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


@inlined
def _hidden(depth, ss, j, i):
    """Whether objects cover all samples of a pixel."""
    if ss == 2:  # the usual case, without loops
        least = min(depth[2 * j, 2 * i], depth[2 * j, 2 * i + 1])
        return min(least, min(depth[2 * j + 1, 2 * i], depth[2 * j + 1, 2 * i + 1])) > 0.0
    for v in range(j * ss, j * ss + ss):
        for u in range(i * ss, i * ss + ss):
            if depth[v, u] == 0.0:
                return False
    return True


@compiled
def _meet_ground(view, b, pixel, clear, distance, air):
    """A row of rays: how far each runs to the ground, and the share of clear air on that way.

    Without branches, so that the compiler takes several pixels at a time; sky pixels have a distance beyond the world.
    ``distance`` is in units of the optical axis. The exponential is a Taylor polynomial of a 64th of its argument
    squared six times, within 1e-9 of the true one.
    """
    width = distance.shape[0]
    middle = 0.5 * width - 0.5
    height = view[0, 2]
    rise = view[1, 2] + b * view[3, 2]
    slope = view[2, 2]
    flat = 1.0 + b * b
    thin = 1.0 / (64.0 * air)
    for i in range(width):
        a = (i - middle) * pixel
        dz = rise + a * slope
        t = -height / dz
        t = t if t > 0.0 else NO_GROUND
        distance[i] = t
        q = min(t * math.sqrt(flat + a * a) * thin, 1.0)
        e = 1.0 - q * (1.0 - q * (0.5 - q * (1.0 / 6.0 - q * (1.0 / 24.0 - q * (1.0 / 120.0 - q * (1.0 / 720.0))))))
        e *= e
        e *= e
        e *= e
        e *= e
        e *= e
        clear[i] = e * e


@compiled
def paint_ground(view, focal, world, patterns, light, depth, ss, ground, ground_ids, lines):
    """Ground and sky, a value a pixel; pixels that objects cover wholly are left as they are.

    ``lines`` is (4, width) float64 scratch.
    """
    noise, cloud, hills = patterns
    pieces, origin, grid, dash_period = world.pieces, world.origin, world.grid, world.dash_period
    height, width = ground_ids.shape
    haze_r, haze_g, haze_b = light[pal.HORIZON]
    up = max(light[pal.SUN_DIRECTION, 2], 0.0)
    lit_r = light[pal.AMBIENT, 0] + light[pal.SUN, 0] * up
    lit_g = light[pal.AMBIENT, 1] + light[pal.SUN, 1] * up
    lit_b = light[pal.AMBIENT, 2] + light[pal.SUN, 2] * up
    pixel = 1.0 / focal
    per_height = -1.0 / view[0, 2] if view[0, 2] != 0.0 else 0.0
    distances, clear, turn, rise = lines
    for j in range(height):
        b = (0.5 * height - (j + 0.5)) * pixel
        left = view[1, 2] - 0.5 * width * pixel * view[2, 2] + b * view[3, 2]
        right = view[1, 2] + 0.5 * width * pixel * view[2, 2] + b * view[3, 2]
        if min(left * view[0, 2], right * view[0, 2]) < 0.0:
            _meet_ground(view, b, pixel, clear, distances, light[pal.AIR, 1])
        else:
            distances[:] = NO_GROUND
        if max(left, right) > 0.0:
            _meet_sky(view, b, pixel, turn, rise)
        for i in range(width):
            if _hidden(depth, ss, j, i):
                continue
            a = ((i + 0.5) - 0.5 * width) * pixel
            dx = view[1, 0] + a * view[2, 0] + b * view[3, 0]
            dy = view[1, 1] + a * view[2, 1] + b * view[3, 1]
            dz = view[1, 2] + a * view[2, 2] + b * view[3, 2]
            t = distances[i]
            if t > 6000.0:
                if dz < 0.0:
                    r, g, bl = haze_r, haze_g, haze_b
                    ground_ids[j, i] = ID_TERRAIN
                else:
                    r, g, bl = _sky(turn[i], rise[i], focal, cloud, hills, light)
                    ground_ids[j, i] = ID_SKY
                ground[j, i, 0] = r
                ground[j, i, 1] = g
                ground[j, i, 2] = bl
                continue
            x = view[0, 0] + t * dx
            y = view[0, 1] + t * dy
            haze = 1.0 - clear[i]
            ident = ID_TERRAIN
            piece, along, across, d, c, sn = _road_point(pieces, origin, grid, x, y)
            e = abs(d)
            # The pixel's footprint: how far the ground point moves for a step of one pixel right and one down.
            scale = t * pixel
            inverse = t * per_height
            k = view[2, 2] * inverse
            right_x = scale * (view[2, 0] - dx * k)
            right_y = scale * (view[2, 1] - dy * k)
            k = view[3, 2] * inverse
            down_x = scale * (view[3, 0] - dx * k)
            down_y = scale * (view[3, 1] - dy * k)
            wide = math.sqrt((right_y * c - right_x * sn) ** 2 + (down_y * c - down_x * sn) ** 2)
            long = math.sqrt((right_x * c + right_y * sn) ** 2 + (down_x * c + down_y * sn) ** 2)
            # One division for both: divisions are a third of this function's time.
            wide = max(wide, 1e-9)
            spread = 1.0 + wide + long
            share = 1.0 / (wide * spread)
            grain = share * wide
            sharp = share * spread
            paved = 0.0
            if e < PAVED_EDGE + wide:
                paved = min(max((PAVED_EDGE - e) * sharp + 0.5, 0.0), 1.0)
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
                    edge = min(max((e - ROAD_EDGE) * sharp + 0.5, 0.0), 1.0)
                    road_r += (SHOULDER[0] - road_r) * edge
                    road_g += (SHOULDER[1] - road_g) * edge
                    road_b += (SHOULDER[2] - road_b) * edge
                    line = _stripe(e, ROAD_EDGE, 0.5 * LINE_WIDTH, wide, sharp)
                elif e < MEDIAN_HALF_WIDTH + 1.0:
                    line = _stripe(e, MEDIAN_HALF_WIDTH, 0.5 * LINE_WIDTH, wide, sharp)
                    line_r, line_g, line_b = YELLOW
                    inner = min(max((MEDIAN_HALF_WIDTH - e) * sharp + 0.5, 0.0), 1.0)
                    road_r += (SHOULDER[0] - road_r) * inner
                    road_g += (SHOULDER[1] - road_g) * inner
                    road_b += (SHOULDER[2] - road_b) * inner
                    tone *= 1.0 - 0.4 * max(0.0, 1.0 - abs(e - BARRIER_HALF_WIDTH) / (0.5 + wide))
                if e > MEDIAN_HALF_WIDTH and e < ROAD_EDGE:
                    lane = (e - MEDIAN_HALF_WIDTH) * (1.0 / LANE_WIDTH)
                    border = math.floor(lane + 0.5)
                    if border >= 1.0 and border <= LANES - 1.0:
                        line = _stripe(e, MEDIAN_HALF_WIDTH + border * LANE_WIDTH, 0.5 * LINE_WIDTH, wide, sharp)
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
            gap = math.sqrt(max(along, 0.0) ** 2 + max(across, 0.0) ** 2)
            soft = 0.55 + t / focal
            dark = 1.0 - gap / soft
            if dark > 0.0:
                keep = 1.0 - strength * dark * dark * (3.0 - 2.0 * dark)
                ground[j, i, 0] *= keep
                ground[j, i, 1] *= keep
                ground[j, i, 2] *= keep
