"""The curvature of the lane that a car is in: what its steering adds to follow the road."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.road import CURVATURE, S0, project_to

TIGHTEST = 0.2  # 1/m, of a lane: a circle of 5 m


def lane_curvature(pieces: NDArray[np.float64], x: float, y: float) -> float:
    """Curvature, in 1/m and positive to the right, of the line through (x, y) that runs beside a reference line.

    Args:
        pieces: (P, 6), as in ``carla_digr.simulator.road.Road``: the reference line's straights and arcs.
        x, y: metres, CARLA's coordinates.
    """
    s, d, _ = project_to(pieces, x, y)
    index = max(int(np.searchsorted(pieces[:, S0], s, side="right")) - 1, 0)
    curvature = float(pieces[index, CURVATURE])
    return min(max(curvature / max(1.0 - curvature * d, 1e-3), -TIGHTEST), TIGHTEST)
