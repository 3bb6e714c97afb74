"""The sky of a picture: gradient, clouds and two ranges of hills."""

from __future__ import annotations

import math

from carla_digr.simulator import palette as pal
from carla_digr.simulator.rays import BLEND, HORIZON_COLUMNS, LEVEL, RISE, TURN, VEIL
from carla_digr.simulator.shading import BEYOND, ID_SKY, ID_TERRAIN, compiled

HILL_RISE = 0.1  # slope of a ray above which there are no hills


@compiled
def paint_sky(j, rays, yaw, focal, shown, cloud, hills, light, scratch, ground):
    """Draws the pixels i of row j with ``shown[i] == BEYOND``; ``scratch`` is (4 or more, width) float64."""
    width = shown.shape[0]
    shift = (yaw / (2.0 * math.pi)) % 1.0 * HORIZON_COLUMNS
    red, green, blue, thick = scratch[0], scratch[1], scratch[2], scratch[3]
    low_sky = False
    for i in range(width):
        if shown[i] != BEYOND:
            continue
        turn = rays[TURN, i] + shift
        column = int(turn)
        part = turn - column
        column &= HORIZON_COLUMNS - 1
        after = (column + 1) & (HORIZON_COLUMNS - 1)
        level = rays[LEVEL, i]
        row = int(level)
        low = cloud[row, column] + (cloud[row, after] - cloud[row, column]) * part
        high = cloud[row + 1, column] + (cloud[row + 1, after] - cloud[row + 1, column]) * part
        thick[i] = low + (high - low) * (level - row)
        low_sky |= rays[RISE, i] < HILL_RISE
    clear = 1.0 - light[pal.AIR, 0]
    for i in range(width):
        amount = min(max((thick[i] - clear) * 3.5, 0.0), 1.0) * rays[VEIL, i]
        blend = rays[BLEND, i]
        r = light[pal.HORIZON, 0] + (light[pal.ZENITH, 0] - light[pal.HORIZON, 0]) * blend
        g = light[pal.HORIZON, 1] + (light[pal.ZENITH, 1] - light[pal.HORIZON, 1]) * blend
        b = light[pal.HORIZON, 2] + (light[pal.ZENITH, 2] - light[pal.HORIZON, 2]) * blend
        red[i] = r + (light[pal.CLOUD, 0] - r) * amount
        green[i] = g + (light[pal.CLOUD, 1] - g) * amount
        blue[i] = b + (light[pal.CLOUD, 2] - b) * amount
    if low_sky:
        for i in range(width):
            if shown[i] == BEYOND and 0.0 <= rays[RISE, i] < HILL_RISE:
                turn = rays[TURN, i] + shift
                column = int(turn)
                part = turn - column
                column &= HORIZON_COLUMNS - 1
                after = (column + 1) & (HORIZON_COLUMNS - 1)
                rise = rays[RISE, i]
                for k in range(2):
                    top = hills[k, column] + (hills[k, after] - hills[k, column]) * part
                    inside = min(max((top - rise) * focal + 0.5, 0.0), 1.0)
                    if inside > 0.0:
                        strength = 0.45 if k == 0 else 0.7
                        strength *= inside * (0.55 + 0.45 * min(max(rise / top, 0.0), 1.0))
                        red[i] += (light[pal.HILLS, 0] - red[i]) * strength
                        green[i] += (light[pal.HILLS, 1] - green[i]) * strength
                        blue[i] += (light[pal.HILLS, 2] - blue[i]) * strength
    for i in range(width):
        if shown[i] == BEYOND:
            ground[j, 0, i] = red[i]
            ground[j, 1, i] = green[i]
            ground[j, 2, i] = blue[i]


@compiled
def name_sky(j, rays, shown, ground_ids):
    """What these pixels show."""
    for i in range(shown.shape[0]):
        if shown[i] == BEYOND:
            ground_ids[j, i] = ID_SKY if rays[RISE, i] >= 0.0 else ID_TERRAIN
