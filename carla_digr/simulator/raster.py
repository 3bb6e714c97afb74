"""Everything that stands on the ground: convex polygons and leafy balls, drawn into a supersampled depth buffer.

``target`` is (depth, color, ids, scratch, points) everywhere: inverse depth times lift (float32, 0 = empty), colour
words (0xLLRRGGBB; 1 + LL / 1000 is the lift, by which decals win over the face they lie on), instance ids, a row of
left and right polygon borders, and room for a polygon's corners.
"""

from __future__ import annotations

import math

import numpy as np

from carla_digr.simulator import palette as pal
from carla_digr.simulator.bodies import ALBEDO, BRAKE, GLASS, HEADLAMP, PAINT, SIGN, SIGN_TEXT
from carla_digr.simulator.road import BARRIER_HALF_WIDTH, BARRIER_HEIGHT, RAIL_HEIGHT, RAIL_OFFSET
from carla_digr.simulator.scenery import BLOCK, COURSE_STEP
from carla_digr.simulator.shading import ID_BARRIER, ID_RAIL, ID_VEGETATION, compiled, haze_share, lit, outside, pack

NEAR = 0.1  # m, nearest visible depth
CONCRETE = (212.0, 208.0, 198.0)
STEEL = (170.0, 174.0, 178.0)
LEAVES = (74.0, 108.0, 46.0)
NEEDLES = (44.0, 84.0, 54.0)
BARK = (84.0, 66.0, 50.0)
# d, z of the barrier's cross-section from foot to top (New Jersey shape).
PROFILE = np.array([(BARRIER_HALF_WIDTH, 0.0), (0.27, 0.10), (0.16, 0.36), (0.11, BARRIER_HEIGHT)])
BLOCK_RADIUS = math.hypot(0.5 * BLOCK * COURSE_STEP * 1.1, RAIL_OFFSET + 1.0)  # m, about a block of the course


@compiled
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
    word |= np.uint32(int((lift - 1.0) * 1000.0 + 0.5) << 24)
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


@compiled
def _corner(view, x, y, z, out):
    """A world point in camera coordinates."""
    rx = x - view[0, 0]
    ry = y - view[0, 1]
    rz = z - view[0, 2]
    out[0] = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    out[1] = rx * view[2, 0] + ry * view[2, 1] + rz * view[2, 2]
    out[2] = rx * view[3, 0] + ry * view[3, 1] + rz * view[3, 2]


@compiled
def paint_model(view, focal, mesh, model, x, y, yaw, red, green, blue, braking, ident, light, target):
    """Draws a model at a ground pose; faces turned away or too small to matter are left out."""
    depth, _, _, _, points = target
    rows, columns = depth.shape
    rx = x - view[0, 0]
    ry = y - view[0, 1]
    rz = 0.5 * mesh.height[model] - view[0, 2]
    radius = mesh.radius[model]
    if outside(view, focal, rows, columns, rx, ry, rz, radius):
        return
    distance = math.sqrt(rx * rx + ry * ry + rz * rz)
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
    haze = haze_share(distance, light)
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
        _fill(corners, count, pack(r, g, b), ident, mesh.lift[face], focal, target)


@compiled
def paint_course(view, focal, course, light, target, barrier, rail):
    """Barrier and guard rails along the whole ring, as far as they can be seen; either may be left out."""
    count = course.shape[0]
    rows, columns = target[0].shape
    for block in range(count // BLOCK):
        start = block * BLOCK
        middle = course[start + BLOCK // 2]
        rx = middle[0] - view[0, 0]
        ry = middle[1] - view[0, 1]
        rz = -view[0, 2]
        distance = math.sqrt(rx * rx + ry * ry + rz * rz)
        if outside(view, focal, rows, columns, rx, ry, rz, BLOCK_RADIUS):
            continue
        step = 1 if distance < 80.0 else (2 if distance < 170.0 else 4)
        for k in range(start, start + BLOCK, step):
            a = course[k]
            b = course[(k + step) % count]
            reach = math.sqrt((a[0] - view[0, 0]) ** 2 + (a[1] - view[0, 1]) ** 2 + view[0, 2] ** 2)
            haze = haze_share(reach, light)
            for side in (-1.0, 1.0):
                if not barrier:
                    pass
                elif distance < 120.0:
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
                if rail and distance < 320.0:
                    d = side * RAIL_OFFSET
                    low = RAIL_HEIGHT - 0.34
                    mid = RAIL_HEIGHT - 0.17
                    _paint_band(view, focal, a, b, d, low, d, mid, STEEL, 0.78, haze, ID_RAIL, True, light, target)
                    _paint_band(
                        view, focal, a, b, d, mid, d, RAIL_HEIGHT, STEEL, 1.05, haze, ID_RAIL, True, light, target
                    )
                    if distance < 110.0:
                        _paint_post(view, focal, a, d + side * 0.05, low + 0.1, haze, light, target)
            if barrier:
                top_d, top_z = PROFILE[PROFILE.shape[0] - 1]
                _paint_band(
                    view, focal, a, b, top_d, top_z, -top_d, top_z, CONCRETE, 1.05, haze, ID_BARRIER, False, light,
                    target,
                )  # fmt: skip


@compiled
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
    word = lit(albedo, shade * facing, shade * (0.85 + 0.15 * n_z), haze, light)
    _fill(corners, 4, word, ident, 1.0, focal, target)


@compiled
def _barrier_face(view, focal, a, b, side, d0, z0, d1, z1, shade, haze, light, target):
    """One side face of the barrier; the left one runs from top to foot, so that its normal points outward."""
    if side > 0.0:
        _paint_band(view, focal, a, b, d0, z0, d1, z1, CONCRETE, shade, haze, ID_BARRIER, False, light, target)
    else:
        _paint_band(view, focal, a, b, -d1, z1, -d0, z0, CONCRETE, shade, haze, ID_BARRIER, False, light, target)


@compiled
def _paint_post(view, focal, a, d, height, haze, light, target):
    """A guard rail's post: an upright rectangle across the road."""
    corners = target[4][0]
    for k in range(4):
        wide = d + (0.06 if k == 1 or k == 2 else -0.06)
        _corner(view, a[0] - a[3] * wide, a[1] + a[2] * wide, height if k >= 2 else 0.0, corners[k])
    _fill(corners, 4, lit(STEEL, 0.2, 0.6, haze, light), ID_RAIL, 1.0, focal, target)


@compiled
def paint_tree(view, focal, tree, noise, light, target):
    """A round tree (trunk and three balls) or a conifer (three cones seen flat)."""
    x, y, height, kind, shade, phase = tree
    rx = x - view[0, 0]
    ry = y - view[0, 1]
    rz = 0.5 * height - view[0, 2]
    rows, columns = target[0].shape
    if outside(view, focal, rows, columns, rx, ry, rz, 0.6 * height):
        return
    haze = haze_share(math.sqrt(rx * rx + ry * ry + rz * rz), light)
    flat = math.sqrt(rx * rx + ry * ry) + 1e-9
    side_x = -ry / flat  # horizontal, to the right as seen from the camera
    side_y = rx / flat
    corners = target[4][0]
    trunk = 0.035 * height
    for k in range(4):
        wide = trunk if k == 1 or k == 2 else -trunk
        _corner(view, x + side_x * wide, y + side_y * wide, 0.4 * height if k >= 2 else 0.0, corners[k])
    _fill(corners, 4, lit(BARK, 0.3, 0.8, haze, light), ID_VEGETATION, 1.0, focal, target)
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
        word = lit(NEEDLES, facing * shade, 0.9 * shade, haze, light)
        for tier in range(3):
            wide = (0.22, 0.18, 0.13)[tier] * height * sign
            low = (0.14, 0.38, 0.62)[tier] * height
            top = (0.58, 0.80, 1.0)[tier] * height
            _corner(view, x, y, low, corners[0])
            _corner(view, x + side_x * wide, y + side_y * wide, low, corners[1])
            _corner(view, x, y, top, corners[2])
            _fill(corners, 3, word, ID_VEGETATION, 1.0 + 0.001 * tier, focal, target)


@compiled
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
            color[j, i] = lit(LEAVES, tone * facing, tone * (0.78 - 0.18 * v), haze, light)
            ids[j, i] = ID_VEGETATION
