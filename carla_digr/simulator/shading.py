"""What both layers of a picture share: instance ids, light, haze and how functions are compiled.

``light`` is :meth:`carla_digr.simulator.palette.Palette.pack`'s array everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from carla_digr.simulator.palette import AIR, AMBIENT, HORIZON, SUN

# Instance ids of what is not a vehicle; vehicles have their positive actor id.
ID_SKY, ID_ROAD, ID_LINE, ID_BARRIER, ID_RAIL, ID_VEGETATION, ID_BUILDING, ID_SIGN, ID_TERRAIN = range(0, -9, -1)

# What a picture may be drawn without, bits of one number; lines one by one from FIRST_LINE_BIT on, those of the right
# carriageway from the median outwards, then those of the left one.
WITHOUT_BARRIER, WITHOUT_RAILS, WITHOUT_TREES, WITHOUT_BUILDINGS = 1, 2, 4, 8
WITHOUT_COLOURS = 16  # of ground and sky: only ids and depths are asked for
FIRST_LINE_BIT = 5

HIDDEN, GROUND, BEYOND = range(3)  # what a pixel shows of the ground layer: nothing, the ground, the sky or its edge

FAR = 480.0  # m, farthest drawn object

# Nothing here allocates, so numba's reference counting is switched off: it took a third of a picture's time. A
# function that does allocate is refused by the compiler under this option. "contract" allows fused multiply-adds, an
# eighth of the time; infinities and the order of sums stay as written.
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "_nrt": False,
    "fastmath": {"contract"},
}
compiled = njit(**_OPTIONS)
inlined = njit(**_OPTIONS, inline="always")
"""For functions called once a pixel."""


@compiled
def haze_share(distance, light):
    """Share of haze at a distance, 0 to 1."""
    return 1.0 - math.exp(-distance / light[AIR, 1])


@compiled
def pack(red, green, blue):
    """Colour as one 32-bit word, clipped to 0..255."""
    r = min(max(int(red + 0.5), 0), 255)
    g = min(max(int(green + 0.5), 0), 255)
    b = min(max(int(blue + 0.5), 0), 255)
    return np.uint32((r << 16) | (g << 8) | b)


@compiled
def lit(albedo, facing, open_sky, haze, light):
    """Packed colour of a surface in sun and sky light, behind haze."""
    r = albedo[0] * (light[AMBIENT, 0] * open_sky + light[SUN, 0] * facing)
    g = albedo[1] * (light[AMBIENT, 1] * open_sky + light[SUN, 1] * facing)
    b = albedo[2] * (light[AMBIENT, 2] * open_sky + light[SUN, 2] * facing)
    return pack(
        r + (light[HORIZON, 0] - r) * haze,
        g + (light[HORIZON, 1] - g) * haze,
        b + (light[HORIZON, 2] - b) * haze,
    )


@compiled
def outside(view, focal, rows, columns, rx, ry, rz, radius):
    """Whether a sphere, its centre relative to the camera, surely lies outside the picture."""
    forward = rx * view[1, 0] + ry * view[1, 1] + rz * view[1, 2]
    if forward < -radius or forward > FAR:
        return True
    across = abs(rx * view[2, 0] + ry * view[2, 1] + rz * view[2, 2])
    upward = abs(rx * view[3, 0] + ry * view[3, 1] + rz * view[3, 2])
    # Distances from the planes through the camera and the picture's borders.
    half = 0.5 * columns
    if across * focal - forward * half > radius * math.sqrt(focal * focal + half * half):
        return True
    half = 0.5 * rows
    return upward * focal - forward * half > radius * math.sqrt(focal * focal + half * half)
