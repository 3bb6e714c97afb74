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

_CLASS_OF_LABEL = np.full(256, CLASSES.index("empty road"), np.int8)  # by CARLA's CityObjectLabel
for _name, _labels in {
    "vehicle": (12, 13, 14, 15, 16, 17, 18, 19),  # pedestrians and riders with them
    "lane line": (24,),
    "barrier": (4, 5),
    "guard rail": (28,),
    "sky": (11,),
    "vegetation": (9, 10, 23, 25),
    "building": (3, 6, 7, 8, 20, 21, 22),
}.items():
    _CLASS_OF_LABEL[list(_labels)] = CLASSES.index(_name)


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
    return _of_samples(fine)


def class_picture_seen(labels: NDArray[np.uint8], ego: int) -> NDArray[np.int8]:
    """`class_picture` from a CARLA server's instance picture.

    CARLA has one label for barriers and guard rails of metal, and none for shadows; what bounds the road besides is a
    barrier, masts and signs are buildings, and labels that nobody knows, as on edges, are empty road.

    Args:
        labels: uint8 (SAMPLES * H, SAMPLES * W, 3), CARLA's label, low and high byte of the actor's id.
        ego: the ego's id.
    """
    fine = _CLASS_OF_LABEL[labels[..., 0]]
    fine[(fine == 0) & (labels[..., 1] == ego & 0xFF) & (labels[..., 2] == ego >> 8 & 0xFF)] = EGO
    return _of_samples(fine)


def _of_samples(fine: NDArray[np.int8]) -> NDArray[np.int8]:
    """The class of every pixel from those of its samples."""
    height, width = fine.shape[0] // SAMPLES, fine.shape[1] // SAMPLES
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
