"""What the pixels of a picture are of: which way their surfaces face, and how they have moved since another picture.

Both follow from the depths and ids that the renderer gives. Cameras are ``view`` (4, 3): position, forward, right, up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.renderer import Pose, camera_axes
from carla_digr.simulator.shading import ID_LINE, ID_ROAD, ID_SKY, ID_TERRAIN, compiled

FASTEST = 2.0  # of an optical flow, the largest number that is told
BEHIND = 1e-3  # m, nearest depth that a point is given in the other picture
UNKNOWN_BEND = 1e9  # of a surface whose next pixel is the last one


class Look(NamedTuple):
    """One picture as what moved in it is compared.

    Args:
        pose: of the camera, m and rad.
        ids: (N,) of all that can move, ascending.
        places: (N, 3) x, y (m), yaw (rad) of it.
    """

    pose: Pose
    ids: NDArray[np.int64]
    places: NDArray[np.float64]


def _view(pose: Pose) -> NDArray[np.float64]:
    return np.vstack([pose[:3], camera_axes(*pose[3:])])


def _focal(width: int, fov_deg: float) -> float:
    return 0.5 * width / math.tan(math.radians(0.5 * fov_deg))


def normals(depths: NDArray[np.float32], ids: NDArray[np.int32], pose: Pose, fov_deg: float) -> NDArray[np.float32]:
    """(H, W, 3) float32: the unit normal of what each pixel's centre shows, in the world; 0, 0, 0 for the sky.

    Args:
        depths, ids: (H, W) of the picture.
        pose, fov_deg: of its camera.
    """
    out = np.empty((*depths.shape, 3), np.float32)
    _face(depths, ids, _view(pose), _focal(depths.shape[1], fov_deg), out)
    return out


def flow(
    depths: NDArray[np.float32], ids: NDArray[np.int32], fov_deg: float, now: Look, before: Look
) -> NDArray[np.float32]:
    """(H, W, 2) float32: how far what each pixel shows has moved across the picture since another one.

    In CARLA's units: to the right in half widths, up in half heights, at most FASTEST. What was not there moves as the
    ground does.

    Args:
        depths, ids: (H, W) of the present picture.
        fov_deg: of both.
        now, before: the two pictures.
    """
    at = np.searchsorted(before.ids, now.ids)
    known = at < len(before.ids)
    known[known] = before.ids[at[known]] == now.ids[known]
    places = now.places.copy()
    places[known] = before.places[at[known]]
    out = np.empty((*depths.shape, 2), np.float32)
    _move(
        depths, ids, _focal(depths.shape[1], fov_deg), _view(now.pose), _view(before.pose), now.ids, now.places, places,
        out,
    )  # fmt: skip
    return out


@compiled
def _slope(depth, ids, j, i, down, right):
    """Change of the inverse depth to the next pixel in a direction or from the one before, whichever goes on straight.

    The inverse depth of a plane is linear in the picture, so of two neighbours the one on the same plane is that
    behind which the line is not bent.
    """
    rows, columns = depth.shape
    here = 1.0 / depth[j, i]
    least = math.inf
    slope = 0.0
    for sign in (1, -1):
        y = j + sign * down
        x = i + sign * right
        if y < 0 or x < 0 or y >= rows or x >= columns or ids[y, x] != ids[j, i]:
            continue
        step = 1.0 / depth[y, x] - here
        bend = UNKNOWN_BEND
        y += sign * down
        x += sign * right
        if 0 <= y < rows and 0 <= x < columns and ids[y, x] == ids[j, i]:
            bend = abs(1.0 / depth[y, x] - here - 2.0 * step)
        if bend < least:
            least = bend
            slope = sign * step
    return slope


@compiled
def _face(depth, ids, view, focal, out):
    rows, columns = depth.shape
    for j in range(rows):
        b = (0.5 * rows - (j + 0.5)) / focal
        for i in range(columns):
            ident = ids[j, i]
            if ident in (ID_SKY, ID_ROAD, ID_LINE, ID_TERRAIN):
                out[j, i, 0] = 0.0
                out[j, i, 1] = 0.0
                out[j, i, 2] = 0.0 if ident == ID_SKY else 1.0
                continue
            a = ((i + 0.5) - 0.5 * columns) / focal
            right = _slope(depth, ids, j, i, 0, 1) * focal
            up = -_slope(depth, ids, j, i, 1, 0) * focal
            forward = 1.0 / depth[j, i] - a * right - b * up
            scale = -1.0 / math.sqrt(forward * forward + right * right + up * up)
            for k in range(3):
                out[j, i, k] = scale * (forward * view[1, k] + right * view[2, k] + up * view[3, k])


@compiled
def _find(ids, ident):
    """Index of an id among ascending ones, -1 if it is none of them."""
    low = 0
    high = ids.shape[0]
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < ident:
            low = middle + 1
        else:
            high = middle
    if low < ids.shape[0] and ids[low] == ident:
        return low
    return -1


@compiled
def _move(depth, ids, focal, view, other, movers, places, others, out):
    rows, columns = depth.shape
    for j in range(rows):
        b = (0.5 * rows - (j + 0.5)) / focal
        for i in range(columns):
            a = ((i + 0.5) - 0.5 * columns) / focal
            x = view[1, 0] + a * view[2, 0] + b * view[3, 0]
            y = view[1, 1] + a * view[2, 1] + b * view[3, 1]
            z = view[1, 2] + a * view[2, 2] + b * view[3, 2]
            if depth[j, i] < math.inf:
                x = view[0, 0] + depth[j, i] * x
                y = view[0, 1] + depth[j, i] * y
                z = view[0, 2] + depth[j, i] * z
                k = _find(movers, ids[j, i]) if ids[j, i] > 0 else -1
                if k >= 0:
                    turn = others[k, 2] - places[k, 2]
                    dx = x - places[k, 0]
                    dy = y - places[k, 1]
                    x = others[k, 0] + math.cos(turn) * dx - math.sin(turn) * dy
                    y = others[k, 1] + math.sin(turn) * dx + math.cos(turn) * dy
                x -= other[0, 0]
                y -= other[0, 1]
                z -= other[0, 2]
            forward = max(x * other[1, 0] + y * other[1, 1] + z * other[1, 2], BEHIND)
            right = (x * other[2, 0] + y * other[2, 1] + z * other[2, 2]) / forward
            up = (x * other[3, 0] + y * other[3, 1] + z * other[3, 2]) / forward
            out[j, i, 0] = min(max(2.0 * focal * (a - right) / columns, -FASTEST), FASTEST)
            out[j, i, 1] = min(max(2.0 * focal * (b - up) / rows, -FASTEST), FASTEST)
