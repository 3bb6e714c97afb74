"""What each pixel of the driving task's picture shows, and whether it matters to a driver: the truth for its maps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.shading import (
    ID_BARRIER,
    ID_BUILDING,
    ID_LINE,
    ID_RAIL,
    ID_ROAD,
    ID_SIGN,
    ID_SKY,
    ID_TERRAIN,
    ID_VEGETATION,
)

CLASSES = ("vehicle", "lane line", "barrier", "guard rail", "ego", "empty road", "sky", "vegetation", "building")
"""By number. Vegetation includes grass and fields, building the gantries with signs; shadows are empty road."""
RELEVANT = 4  # classes before this one matter: the vehicles, and what bounds the lanes and the road
EGO = CLASSES.index("ego")
SAMPLES = 5  # of a pixel, in both directions; odd, so that the middle one is the pixel's centre

_CLASS_OF_ID = np.zeros(9, np.int8)  # at the negative of the renderer's id
for _id, _name in (
    (ID_SKY, "sky"),
    (ID_ROAD, "empty road"),
    (ID_LINE, "lane line"),
    (ID_BARRIER, "barrier"),
    (ID_RAIL, "guard rail"),
    (ID_VEGETATION, "vegetation"),
    (ID_BUILDING, "building"),
    (ID_SIGN, "building"),
    (ID_TERRAIN, "vegetation"),
):
    _CLASS_OF_ID[-_id] = CLASSES.index(_name)


def class_picture(ids: NDArray[np.int32], ego: int) -> NDArray[np.int8]:
    """The class of every pixel.

    A pixel belongs to the first relevant class of which any of its samples shows a piece, for a lane line is thinner
    than a pixel from 20 m on and colours it all the same; else to the ego if any sample shows that; else it has the
    class of its centre.

    Args:
        ids: int32 (SAMPLES * H, SAMPLES * W), an instance picture: a vehicle's id, or one of the renderer's ID_
            constants.
        ego: the ego's id.

    Returns:
        int8 (H, W), indices into CLASSES.
    """
    fine = np.where(ids > 0, np.int8(0), _CLASS_OF_ID[np.maximum(-ids, 0)])
    fine[ids == ego] = EGO
    height, width = ids.shape[0] // SAMPLES, ids.shape[1] // SAMPLES
    samples = fine.reshape(height, SAMPLES, width, SAMPLES)
    first = samples.min(axis=(1, 3))
    return np.where(first <= EGO, first, samples[:, SAMPLES // 2, :, SAMPLES // 2])


def importance_of(classes: NDArray[np.int8]) -> NDArray[np.int8]:
    """1 on what matters, 0 on what does not, -1 (not counted) on the ego; the shape of ``classes``.

    The ego itself is left out: it is at the same place in every picture and tells the policy nothing, but its outline
    is where a driver looks for what comes near.
    """
    label = np.zeros(len(CLASSES), np.int8)
    label[:RELEVANT] = 1
    label[EGO] = -1
    return label[classes]
