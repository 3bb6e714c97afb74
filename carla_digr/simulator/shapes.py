"""Walkers and things that stand beside the road, each a few boxes: what cameras show of them and what vehicles hit."""

from __future__ import annotations

import math
from typing import NamedTuple


class Block(NamedTuple):
    """An upright box, symmetric about the x-z plane; m. The material is a name of `bodies`."""

    x0: float
    x1: float
    half: float
    z0: float
    z1: float
    material: str


class Shape(NamedTuple):
    """One of them. The origin of its blocks is the middle of its foot.

    Args:
        half_length, half_width, height: of its box, m.
        blocks: what is drawn.
        label: CARLA's CityObjectLabel.
        mass: kg; infinite: nothing moves it.
    """

    half_length: float
    half_width: float
    height: float
    blocks: tuple[Block, ...]
    label: int
    mass: float = math.inf


PEDESTRIAN, STATIC, DYNAMIC = 12, 20, 21
WALKER = "walker.pedestrian"
_LEGS, _BODY, _HEAD = (
    Block(-0.10, 0.10, 0.16, 0.0, 0.85, "TRIM"),
    Block(-0.14, 0.14, 0.19, 0.85, 1.52, "PAINT"),
    Block(-0.11, 0.11, 0.09, 1.56, 1.86, "WALL"),
)


def _box(half_length: float, half_width: float, height: float, material: str, label: int = STATIC) -> Shape:
    return Shape(
        half_length,
        half_width,
        height,
        (Block(-half_length, half_length, half_width, 0.0, height, material),),
        label,
    )


def _cone(half: float, height: float) -> Shape:
    thirds = [(1.0, 0.0, 0.12), (0.55, 0.12, 0.55), (0.3, 0.55, 1.0)]
    blocks = tuple(
        Block(-share * half, share * half, share * half, low * height, high * height, "STRIPE")
        for share, low, high in thirds
    )
    return Shape(half, half, height, blocks, DYNAMIC)


SHAPES: dict[str, Shape] = {
    WALKER: Shape(0.19, 0.19, 1.86, (_LEGS, _BODY, _HEAD), PEDESTRIAN, 75.0),
    "static.prop.barrel": _box(0.3, 0.3, 0.9, "STRIPE", DYNAMIC),
    "static.prop.bench01": _box(0.9, 0.3, 0.9, "TRIM", DYNAMIC),
    "static.prop.box01": _box(0.3, 0.3, 0.5, "WALL", DYNAMIC),
    "static.prop.busstop": _box(2.0, 0.9, 2.6, "GLASS"),
    "static.prop.constructioncone": _cone(0.17, 0.6),
    "static.prop.container": _box(1.0, 0.9, 1.6, "SIGN", DYNAMIC),
    "static.prop.streetbarrier": _box(0.6, 0.2, 1.1, "STRIPE", DYNAMIC),
    "static.prop.trafficcone01": _cone(0.4, 1.1),
    "static.prop.trafficcone02": _cone(0.17, 0.7),
    "static.prop.trafficwarning": _box(1.2, 1.4, 3.6, "STRIPE", DYNAMIC),
    "static.prop.vendingmachine": _box(0.5, 0.45, 2.0, "BRAKE", DYNAMIC),
    "static.prop.warningconstruction": _box(0.6, 0.3, 1.2, "STRIPE", DYNAMIC),
}
NAMES = tuple(SHAPES)
