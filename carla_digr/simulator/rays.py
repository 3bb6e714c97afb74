"""Where the ray of each pixel goes: all that stays the same while a camera only travels and turns about the vertical.

A row of pixels is (13, width) float64, columns below. Ground points and directions are seen from the camera's place
with its yaw taken out, so a picture needs no more than to turn and shift them.
"""

from __future__ import annotations

import math

from carla_digr.simulator.shading import compiled

# How far the ray runs to the ground, in units of the optical axis, and the point there (m from below the camera); how
# far that point moves for a step of one pixel right and one down; the share of clear air on the way; the slope with
# which the ray rises and its direction around the horizon (columns of the sky's patterns); what the sky is made of
# there: share of the zenith's colour, row of the cloud pattern, thickness of clouds.
REACH, HIT_X, HIT_Y, RIGHT_X, RIGHT_Y, DOWN_X, DOWN_Y, CLEAR, RISE, TURN, BLEND, LEVEL, VEIL = range(13)
RAY_COLUMNS = 13
NO_GROUND = 1e9  # reach of a ray that never meets the ground
HORIZON_COLUMNS = 1024  # of the sky's patterns, all around
CLOUD_ROWS = 64


@compiled
def arc_tangent(y, x):
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


@compiled
def _aim_down(axes, z, b, pixel, air, row):
    """The ground's columns of a row of rays.

    Without branches, so that the compiler takes several pixels at a time. The exponential is a Taylor polynomial of a
    64th of its argument squared six times, within 1e-9 of the true one.
    """
    width = row.shape[1]
    middle = 0.5 * width - 0.5
    rise = axes[0, 2] + b * axes[2, 2]
    flat = 1.0 + b * b
    thin = 1.0 / (64.0 * air)
    per_height = -1.0 / z if z != 0.0 else 0.0
    for i in range(width):
        a = (i - middle) * pixel
        t = -z / (rise + a * axes[1, 2])
        met = t > 0.0 and t < NO_GROUND
        row[REACH, i] = t if met else NO_GROUND
        q = min((t if met else NO_GROUND) * math.sqrt(flat + a * a) * thin, 1.0)
        e = 1.0 - q * (1.0 - q * (0.5 - q * (1.0 / 6.0 - q * (1.0 / 24.0 - q * (1.0 / 120.0 - q * (1.0 / 720.0))))))
        e *= e
        e *= e
        e *= e
        e *= e
        e *= e
        row[CLEAR, i] = e * e
        t = t if met else 0.0
        dx = axes[0, 0] + a * axes[1, 0] + b * axes[2, 0]
        dy = axes[0, 1] + a * axes[1, 1] + b * axes[2, 1]
        row[HIT_X, i] = t * dx
        row[HIT_Y, i] = t * dy
        scale = t * pixel
        k = axes[1, 2] * t * per_height
        row[RIGHT_X, i] = scale * (axes[1, 0] - dx * k)
        row[RIGHT_Y, i] = scale * (axes[1, 1] - dy * k)
        k = axes[2, 2] * t * per_height
        row[DOWN_X, i] = scale * (axes[2, 0] - dx * k)
        row[DOWN_Y, i] = scale * (axes[2, 1] - dy * k)


@compiled
def _aim_up(axes, b, pixel, row):
    """The sky's columns of a row of rays."""
    width = row.shape[1]
    middle = 0.5 * width - 0.5
    for i in range(width):
        a = (i - middle) * pixel
        dx = axes[0, 0] + a * axes[1, 0] + b * axes[2, 0]
        dy = axes[0, 1] + a * axes[1, 1] + b * axes[2, 1]
        dz = axes[0, 2] + a * axes[1, 2] + b * axes[2, 2]
        rise = dz / max(math.sqrt(dx * dx + dy * dy), 1e-6)
        row[RISE, i] = rise
        row[TURN, i] = (arc_tangent(dy, dx) / (2.0 * math.pi) + 0.5) * HORIZON_COLUMNS
        rise = max(rise, 0.0)
        blend = 1.0 - min(rise * 0.9, 1.0)
        row[BLEND, i] = 1.0 - blend * blend
        level = rise / (0.25 + rise) * 80.0  # rows of the cloud pattern get higher towards the zenith
        row[VEIL, i] = max(min(rise * 12.0, 1.0) * min((CLOUD_ROWS - 1.0 - level) * 0.2, 1.0) * 0.9, 0.0)
        row[LEVEL, i] = min(level, CLOUD_ROWS - 1.0 - 1e-9)


@compiled
def aim_row(axes, z, focal, air, j, height, row):
    """The rays of row j of a picture.

    ``axes`` is (3, 3): forward, right and up of the camera with its yaw taken out; ``z`` its height over the ground
    (m), ``focal`` in pixels, ``air`` the distance (m) after which 63 % of the light is haze.
    """
    pixel = 1.0 / focal
    b = (0.5 * height - (j + 0.5)) * pixel
    side = 0.5 * row.shape[1] * pixel * axes[1, 2]
    middle = axes[0, 2] + b * axes[2, 2]
    if min((middle - side) * z, (middle + side) * z) < 0.0:
        _aim_down(axes, z, b, pixel, air, row)
    else:
        row[REACH] = NO_GROUND
    if middle + abs(side) >= 0.0 or z <= 0.0:
        _aim_up(axes, b, pixel, row)
    else:
        row[RISE] = -1.0
        for column in (TURN, BLEND, LEVEL, VEIL):
            row[column] = 0.0


@compiled
def aim(axes, z, focal, air, rays):
    """The rays of a whole picture, (height, 13, width)."""
    for j in range(rays.shape[0]):
        aim_row(axes, z, focal, air, j, rays.shape[0], rays[j])
