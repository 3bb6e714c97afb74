"""Polygon models of vehicles, houses and sign gantries, as flat arrays that compiled code draws.

A model's frame is CARLA's actor frame: x forward, y right, z up, origin on the ground in the centre of the box.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator import road as r
from carla_digr.simulator.shapes import SHAPES, Shape
from carla_digr.simulator.vehicle import BUS, CAR, KINDS, TRUCK, VAN, VehicleKind

# Materials. PAINT takes the instance's colour, BRAKE glows while the brake light is on.
PAINT, GLASS, TIRE, TRIM, BRAKE, HEADLAMP, CARGO, METAL, PLATE, ROOF_TILES, WALL, SIGN, SIGN_TEXT, HUB, STRIPE = range(
    15
)

ALBEDO = np.array(
    [
        (0, 0, 0),  # PAINT: unused
        (26, 32, 40),  # GLASS
        (26, 26, 28),  # TIRE
        (44, 45, 48),  # TRIM
        (184, 20, 22),  # BRAKE
        (226, 228, 220),  # HEADLAMP
        (214, 214, 208),  # CARGO
        (150, 154, 158),  # METAL
        (232, 232, 222),  # PLATE
        (150, 74, 54),  # ROOF_TILES
        (222, 212, 190),  # WALL
        (10, 104, 74),  # SIGN
        (238, 240, 238),  # SIGN_TEXT
        (128, 130, 134),  # HUB
        (206, 60, 48),  # STRIPE
    ],
    np.float64,
)

MAX_CORNERS = 8


class Models(NamedTuple):
    """Faces of all models, one after the other; face i of model m is in start[m] <= i < start[m + 1]."""

    start: NDArray[np.int64]  # (M + 1,)
    radius: NDArray[np.float64]  # (M,) of the bounding sphere about (0, 0, height / 2), m
    height: NDArray[np.float64]  # (M,) m
    half: NDArray[np.float64]  # (M, 2) half length and half width on the ground, m
    corners: NDArray[np.float64]  # (F, MAX_CORNERS, 3) m
    sides: NDArray[np.int64]  # (F,) corners used
    normal: NDArray[np.float64]  # (F, 3) outward
    material: NDArray[np.int64]  # (F,)
    lift: NDArray[np.float64]  # (F,) factor on the inverse depth: decals win over the face they lie on
    reach: NDArray[np.float64]  # (F,) m, not drawn farther away


class _Builder:
    """Collects the faces of one model."""

    def __init__(self, length: float, width: float, height: float):
        self.length, self.width, self.height = length, width, height
        self.faces: list[tuple] = []

    def face(self, points, material, normal, lift=0, reach=1e9):
        """A convex polygon; ``normal`` only has to point to the outer side roughly."""
        p = np.array(points, np.float64)
        n = np.zeros(3)
        for product in np.cross(p, np.roll(p, -1, axis=0)):
            n += product
        n /= np.linalg.norm(n)
        if n @ np.asarray(normal, np.float64) < 0:
            n = -n
        self.faces.append((p, material, n, 1.0 + 0.002 * lift, reach))

    def sides(self, points, material, lift=0, reach=1e9):
        """The polygon and its mirror image about the x-z plane; points have y > 0."""
        p = np.array(points, np.float64)
        self.face(p, material, (0, 1, 0.01), lift, reach)
        self.face(p * (1, -1, 1), material, (0, -1, 0.01), lift, reach)

    def box(self, x0, x1, half, z0, z1, material, reach=1e9, top=True):
        """An upright box, symmetric about the x-z plane, without its bottom."""
        self.across((x0, z0), (x0, z1), half, half, material, (-1, 0, 0), reach=reach)
        self.across((x1, z0), (x1, z1), half, half, material, (1, 0, 0), reach=reach)
        self.sides([(x0, half, z0), (x1, half, z0), (x1, half, z1), (x0, half, z1)], material, reach=reach)
        if top:
            self.across((x0, z1), (x1, z1), half, half, material, (0, 0, 1), reach=reach)

    def across(self, a, b, half_a, half_b, material, normal, lift=0, reach=1e9):
        """A face across the model from the line at (x, z) = a to the one at b."""
        points = [(a[0], -half_a, a[1]), (a[0], half_a, a[1]), (b[0], half_b, b[1]), (b[0], -half_b, b[1])]
        self.face(points, material, normal, lift, reach)

    def patch(self, x, y0, y1, z0, z1, material, lift=1, reach=1e9, mirrored=True):
        """A rectangle in a plane of constant x, facing away from the model's centre."""
        for sign in (1, -1) if mirrored else (1,):
            points = [(x, sign * y0, z0), (x, sign * y1, z0), (x, sign * y1, z1), (x, sign * y0, z1)]
            self.face(points, material, (math.copysign(1.0, x), 0, 0), lift, reach)

    def wheels(self, xs, radius, half, thickness, reach=70.0):
        """Wheels at the given x: discs flush with the side of the model, and their treads."""
        turn = np.arange(8) * (math.pi / 4) + math.pi / 8
        outer = radius / math.cos(math.pi / 8)
        for x in xs:
            ring = [(x + outer * math.cos(t), half, radius + outer * math.sin(t)) for t in turn]
            self.sides(ring, TIRE, 1, 4 * reach)
            hub = [(x + 0.6 * radius * math.cos(t), half, radius + 0.6 * radius * math.sin(t)) for t in turn]
            self.sides(hub, HUB, 2, reach)
            for sign in (1, -1):
                edge = x + sign * radius
                tread = [(edge, half - thickness, 0.0), (edge, half, 0.0)]
                tread += [(edge, half, 1.5 * radius), (edge, half - thickness, 1.5 * radius)]
                self.face(tread, TIRE, (sign, 0, 0), 0, 2 * reach)
                self.face(np.array(tread) * (1, -1, 1), TIRE, (sign, 0, 0), 0, 2 * reach)


def _car(kind: VehicleKind) -> _Builder:
    b = _Builder(kind.length, kind.width, kind.height)
    hl, hw, h = kind.length / 2, kind.width / 2, kind.height
    belt, deck, hood, nose, sill = 0.63 * h, 0.60 * h, 0.55 * h, 0.46 * h, 0.20
    crease, tail = 0.43 * h, -0.97 * hl
    roof_half, belt_half = 0.74 * hw, 0.93 * hw
    wagon = kind.length < 4.0 or h > 1.8  # hatchbacks and off-roaders end steeply
    rear_base, rear_top = (-0.97 * hl, -0.80 * hl) if wagon else (-0.70 * hl, -0.38 * hl)
    front_top, front_base = 0.08 * hl, 0.46 * hl
    side = [
        (-hl, sill),
        (-hl, crease),
        (tail, deck),
        (rear_base, belt),
        (front_base, belt),
        (0.93 * hl, hood),
        (hl, nose),
        (hl, sill),
    ]
    b.sides([(x, hw, z) for x, z in side], PAINT)
    lower = [
        (-0.985 * hl, hw, sill),
        (-0.985 * hl, hw, sill + 0.13),
        (0.985 * hl, hw, sill + 0.13),
        (0.985 * hl, hw, sill),
    ]
    b.sides(lower, TRIM, 1, 60.0)
    b.across((-hl, sill), (-hl, crease), hw, hw, PAINT, (-1, 0, 0))
    b.across((-hl, crease), (tail, deck), hw, hw, PAINT, (-1, 0, 0))
    b.across((tail, deck), (rear_base, belt), hw, hw, PAINT, (0, 0, 1))
    b.across((rear_base, belt), (front_base, belt), hw, hw, PAINT, (0, 0, 1))
    b.across((front_base, belt), (0.93 * hl, hood), hw, hw, PAINT, (0, 0, 1))
    b.across((0.93 * hl, hood), (hl, nose), hw, hw, PAINT, (1, 0, 1))
    b.across((hl, nose), (hl, sill), hw, hw, PAINT, (1, 0, 0))
    # Cabin: painted shell with the windows as decals, so that pillars stay.
    shell = [
        (rear_base, belt_half, belt),
        (rear_top, roof_half, h),
        (front_top, roof_half, h),
        (front_base, belt_half, belt),
    ]
    b.sides(shell, PAINT)
    b.across((rear_base, belt), (rear_top, h), belt_half, roof_half, PAINT, (-1, 0, 1))
    b.across((rear_top, h), (front_top, h), roof_half, roof_half, PAINT, (0, 0, 1))
    b.across((front_top, h), (front_base, belt), roof_half, belt_half, PAINT, (1, 0, 1))

    def on_shell(along, up):
        """A point of the cabin's side: along 0 (rear) to 1 (front), up 0 (belt) to 1 (roof)."""
        x0 = rear_base + (rear_top - rear_base) * up
        x1 = front_base + (front_top - front_base) * up
        return (x0 + (x1 - x0) * along, belt_half + (roof_half - belt_half) * up, belt + (h - belt) * up)

    for a, c in ((0.09, 0.47), (0.52, 0.93)):
        b.sides([on_shell(a, 0.06), on_shell(c, 0.06), on_shell(c, 0.88), on_shell(a, 0.88)], GLASS, 1)
    for base, top, normal in ((rear_base, rear_top, (-1, 0, 1)), (front_base, front_top, (1, 0, 1))):
        low, high = 0.08, 0.90
        b.across(
            (base + (top - base) * low, belt + (h - belt) * low),
            (base + (top - base) * high, belt + (h - belt) * high),
            (belt_half + (roof_half - belt_half) * low) * 0.92,
            (belt_half + (roof_half - belt_half) * high) * 0.92,
            GLASS,
            normal,
            1,
        )
    for sign in (1, -1):
        lamp = [
            (-hl, 0.50, crease + 0.02),
            (-hl, 0.98, crease + 0.02),
            (tail, 0.98, deck - 0.02),
            (tail, 0.56, deck - 0.02),
        ]
        b.face([(x, sign * y * hw, z) for x, y, z in lamp], BRAKE, (-1, 0, 0), 1)
    b.patch(-hl, 0.0, hw, sill, 0.25 * h, TRIM, reach=90.0)
    b.patch(-hl, 0.0, 0.26, 0.31 * h, 0.31 * h + 0.12, PLATE, 2, 50.0)
    b.patch(hl, 0.52 * hw, 0.95 * hw, 0.36 * h, 0.45 * h, HEADLAMP)
    b.patch(hl, 0.0, 0.50 * hw, 0.22 * h, 0.36 * h, TRIM, reach=90.0)
    _running_gear(b, kind, sill, 0.33)
    return b


def _running_gear(b: _Builder, kind: VehicleKind, sill: float, radius: float, axles=None) -> None:
    """Underbody and wheels."""
    hl, hw = kind.length / 2, kind.width / 2
    b.box(-0.95 * hl, 0.95 * hl, 0.90 * hw, 0.13, sill + 0.01, TRIM, 90.0, top=False)
    half = kind.wheelbase / 2
    b.wheels(axles or (-half, half), radius, hw, 0.24 * radius / 0.33)


def _van(kind: VehicleKind) -> _Builder:
    b = _Builder(kind.length, kind.width, kind.height)
    hl, hw, h, sill = kind.length / 2, kind.width / 2, kind.height, 0.24
    roof_half = 0.90 * hw
    belt, nose = 0.52 * h, 0.42 * h
    top_front, base_front = 0.62 * hl, 0.86 * hl
    side = [(-hl, sill), (-hl, belt), (base_front, belt), (hl, nose), (hl, sill)]
    b.sides([(x, hw, z) for x, z in side], PAINT)
    upper = [(-hl, hw, belt), (-0.98 * hl, roof_half, h), (top_front, roof_half, h), (base_front, hw, belt)]
    b.sides(upper, PAINT)
    b.across((-hl, sill), (-hl, belt), hw, hw, PAINT, (-1, 0, 0))
    b.across((-hl, belt), (-0.98 * hl, h), hw, roof_half, PAINT, (-1, 0, 0))
    b.across((-0.98 * hl, h), (top_front, h), roof_half, roof_half, PAINT, (0, 0, 1))
    b.across((top_front, h), (base_front, belt), roof_half, hw, GLASS, (1, 0, 1))
    b.across((base_front, belt), (hl, nose), hw, hw, PAINT, (1, 0, 1))
    b.across((hl, nose), (hl, sill), hw, hw, PAINT, (1, 0, 0))

    def on_upper(x, up):
        return (x, hw + (roof_half - hw) * up, belt + (h - belt) * up)

    b.sides(
        [on_upper(0.40 * hl, 0.05), on_upper(0.80 * hl, 0.05), on_upper(0.64 * hl, 0.8), on_upper(0.40 * hl, 0.8)],
        GLASS,
        1,
    )
    if kind.height < 2.3:  # a passenger van: windows along the side
        for x0, x1 in ((-0.86, -0.46), (-0.40, 0.0), (0.06, 0.34)):
            corners = [
                on_upper(x0 * hl, 0.08),
                on_upper(x1 * hl, 0.08),
                on_upper(x1 * hl, 0.75),
                on_upper(x0 * hl, 0.75),
            ]
            b.sides(corners, GLASS, 1)
    x_low, x_high = -hl + 0.02 * hl * 0.15, -hl + 0.02 * hl * 0.8
    b.across(
        (x_low, belt + 0.10 * (h - belt)),
        (x_high, belt + 0.78 * (h - belt)),
        0.80 * hw,
        0.76 * hw,
        GLASS,
        (-1, 0, 0),
        1,
    )
    b.patch(-hl, 0.82 * hw, 0.99 * hw, 0.30 * h, 0.50 * h, BRAKE)
    b.patch(-hl, 0.0, hw, sill, sill + 0.2, TRIM, reach=90.0)
    b.patch(-hl, 0.0, 0.012, sill, belt, TRIM, 2, 40.0)
    b.patch(-hl, 0.2, 0.5, 0.25 * h, 0.25 * h + 0.12, PLATE, 2, 50.0, mirrored=False)
    b.patch(hl, 0.58 * hw, 0.96 * hw, 0.28 * h, 0.38 * h, HEADLAMP)
    b.patch(hl, 0.0, hw, sill, sill + 0.22, TRIM, reach=90.0)
    _running_gear(b, kind, sill, 0.36)
    return b


def _truck(kind: VehicleKind) -> _Builder:
    b = _Builder(kind.length, kind.width, kind.height)
    hl, hw, h = kind.length / 2, kind.width / 2, kind.height
    cab_length = 1.75 if kind.length < 6 else 2.2
    cab_rear, floor = hl - cab_length, 1.0
    cab_half, cab_height = 0.96 * hw, 0.84 * h
    b.box(-hl, cab_rear - 0.18, hw, floor, h, CARGO)
    b.box(-0.97 * hl, cab_rear, 0.42 * hw, 0.55, floor, TRIM, 150.0, top=False)
    # Cab: painted, with a raked windscreen.
    belt = 0.50 * h
    b.sides([(cab_rear, cab_half, 0.35), (hl, cab_half, 0.35), (hl, cab_half, belt), (cab_rear, cab_half, belt)], PAINT)
    top = hl - 0.30
    b.sides(
        [
            (cab_rear, cab_half, belt),
            (hl, cab_half, belt),
            (top, cab_half, cab_height),
            (cab_rear, cab_half, cab_height),
        ],
        PAINT,
    )
    b.across((hl, 0.35), (hl, belt), cab_half, cab_half, PAINT, (1, 0, 0))
    b.across((hl, belt), (top, cab_height), cab_half, cab_half, GLASS, (1, 0, 0))
    b.across((cab_rear, cab_height), (top, cab_height), cab_half, cab_half, PAINT, (0, 0, 1))
    b.across((cab_rear, 0.35), (cab_rear, cab_height), cab_half, cab_half, PAINT, (-1, 0, 0))
    window = [
        (cab_rear + 0.55, belt),
        (hl - 0.12, belt),
        (hl - 0.30, 0.92 * cab_height),
        (cab_rear + 0.55, 0.92 * cab_height),
    ]
    b.sides([(x, cab_half, z) for x, z in window], GLASS, 1)
    # The box: doors, a stripe in the cab's colour, lamps and bumper.
    b.sides(
        [
            (-hl, hw, floor + 0.35),
            (cab_rear - 0.18, hw, floor + 0.35),
            (cab_rear - 0.18, hw, floor + 0.75),
            (-hl, hw, floor + 0.75),
        ],
        PAINT,
        1,
    )
    b.patch(-hl, 0.0, 0.03, floor, 0.97 * h, TRIM, 1, 90.0)
    b.patch(-hl, 0.30 * hw, 0.34 * hw, floor + 0.1, 0.94 * h, METAL, 1, 50.0)
    b.patch(-hl, 0.955 * hw, hw, floor, h, METAL, 1, 120.0)
    b.patch(-hl, 0.0, hw, h - 0.09, h, METAL, 1, 120.0)
    b.patch(-hl, 0.0, hw, 0.45, floor - 0.12, TRIM, 0, 400.0)
    b.patch(-hl, 0.58 * hw, 0.97 * hw, 0.62, floor - 0.14, BRAKE, 1)
    b.patch(-hl, 0.0, 0.26, 0.66, 0.80, PLATE, 1, 50.0)
    b.patch(hl, 0.60 * hw, 0.92 * hw, 0.50, 0.72, HEADLAMP)
    b.patch(hl, 0.0, 0.55 * hw, 0.70, 1.25, TRIM, reach=90.0)
    skirt = [(-0.97 * hl, hw, 0.42), (cab_rear - 0.2, hw, 0.42), (cab_rear - 0.2, hw, floor), (-0.97 * hl, hw, floor)]
    b.sides(skirt, TRIM)
    front_axle = hl - 1.15
    rear_axle = front_axle - kind.wheelbase if kind.length < 6 else -0.62 * hl
    b.wheels((rear_axle, front_axle), 0.48, hw, 0.5)
    return b


def _bus(kind: VehicleKind) -> _Builder:
    b = _Builder(kind.length, kind.width, kind.height)
    hl, hw, h, sill = kind.length / 2, kind.width / 2, kind.height, 0.32
    b.box(-hl, hl, hw, sill, h, PAINT)
    low, high = 0.44 * h, 0.80 * h
    edges = np.linspace(-0.96 * hl, 0.90 * hl, 7)
    for x0, x1 in itertools.pairwise(edges):
        b.sides([(x0 + 0.06, hw, low), (x1 - 0.06, hw, low), (x1 - 0.06, hw, high), (x0 + 0.06, hw, high)], GLASS, 1)
    b.sides([(-hl, hw, 0.26 * h), (hl, hw, 0.26 * h), (hl, hw, 0.33 * h), (-hl, hw, 0.33 * h)], PLATE, 1)
    b.patch(-hl, 0.0, 0.84 * hw, 0.50 * h, 0.80 * h, GLASS)
    b.patch(-hl, 0.0, 0.5 * hw, 0.84 * h, 0.93 * h, TRIM, 1, 120.0)
    b.patch(-hl, 0.80 * hw, 0.98 * hw, 0.22 * h, 0.38 * h, BRAKE)
    b.patch(-hl, 0.0, hw, sill, 0.17 * h, TRIM, reach=200.0)
    b.patch(-hl, 0.0, 0.26, 0.20 * h, 0.20 * h + 0.13, PLATE, 2, 50.0)
    b.patch(-hl, 0.0, 0.66 * hw, 0.30 * h, 0.42 * h, TRIM, 1, 80.0)
    b.patch(hl, 0.0, 0.94 * hw, 0.38 * h, 0.82 * h, GLASS)
    b.patch(hl, 0.0, 0.6 * hw, 0.86 * h, 0.95 * h, TRIM, 1, 120.0)
    b.patch(hl, 0.62 * hw, 0.95 * hw, 0.20 * h, 0.28 * h, HEADLAMP)
    b.patch(hl, 0.0, hw, sill, 0.16 * h, TRIM, reach=200.0)
    b.box(-0.96 * hl, 0.96 * hl, 0.9 * hw, 0.2, sill + 0.01, TRIM, 120.0, top=False)
    b.wheels((-0.55 * kind.wheelbase, 0.55 * kind.wheelbase), 0.48, hw, 0.5)
    return b


def _house(width: float, depth: float, eaves: float, ridge: float, storeys: int) -> _Builder:
    b = _Builder(width, depth, ridge)
    hl, hw = width / 2, depth / 2
    b.sides([(-hl, hw, 0), (hl, hw, 0), (hl, hw, eaves), (-hl, hw, eaves)], WALL)
    for x in (-hl, hl):
        gable = [(x, -hw, 0), (x, hw, 0), (x, hw, eaves), (x, 0, ridge), (x, -hw, eaves)]
        b.face(gable, WALL, (x, 0, 0))
    over = 0.35
    slope = (ridge - eaves) / hw
    low = eaves - over * slope
    b.sides(
        [(-hl - over, hw + over, low), (hl + over, hw + over, low), (hl + over, 0.0, ridge), (-hl - over, 0.0, ridge)],
        ROOF_TILES,
        1,
    )
    for storey in range(storeys):
        z = 1.0 + 2.7 * storey
        for x in np.arange(-hl + 1.2, hl - 1.0, 2.4):
            b.sides([(x, hw, z), (x + 1.0, hw, z), (x + 1.0, hw, z + 1.3), (x, hw, z + 1.3)], GLASS, 1, 300.0)
        for x in (-hl, hl):
            b.patch(x, 0.6, 1.6, z, z + 1.3, GLASS, 1, 300.0)
    return b


def _gantry() -> _Builder:
    """A sign gantry over the own carriageway; origin on the reference line, x along the road."""
    left, right = -0.0, r.RAIL_OFFSET + 1.0
    b = _Builder(1.0, 2 * right, 8.2)

    def block(x0, x1, y0, y1, z0, z1, material):
        b.face([(x0, y0, z0), (x0, y1, z0), (x0, y1, z1), (x0, y0, z1)], material, (-1, 0, 0))
        b.face([(x1, y0, z0), (x1, y1, z0), (x1, y1, z1), (x1, y0, z1)], material, (1, 0, 0))
        b.face([(x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)], material, (0, -1, 0))
        b.face([(x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)], material, (0, 1, 0))
        b.face([(x0, y0, z1), (x1, y0, z1), (x1, y1, z1), (x0, y1, z1)], material, (0, 0, 1))
        b.face([(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)], material, (0, 0, -1))

    block(-0.2, 0.2, right - 0.2, right + 0.2, 0.0, 7.6, METAL)
    block(-0.15, 0.15, left - 0.15, left + 0.15, r.BARRIER_HEIGHT, 7.6, METAL)
    block(-0.2, 0.2, left, right, 6.9, 7.5, METAL)
    for y0, y1, rows in ((2.6, 8.6, 2), (10.0, 15.8, 3)):
        z0, z1, x = 5.7, 8.2, -0.3
        b.face([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], SIGN_TEXT, (-1, 0, 0))
        b.face([(x + 0.05, y0, z0), (x + 0.05, y1, z0), (x + 0.05, y1, z1), (x + 0.05, y0, z1)], METAL, (1, 0, 0))
        e = 0.12
        b.face(
            [(x, y0 + e, z0 + e), (x, y1 - e, z0 + e), (x, y1 - e, z1 - e), (x, y0 + e, z1 - e)], SIGN, (-1, 0, 0), 1
        )
        step = (z1 - z0 - 0.5) / rows
        for row in range(rows):
            z = z0 + 0.35 + row * step
            words = ((0.5, 0.9 + 1.9 * ((row * 7 + rows) % 3) / 2), (3.1, 4.9 - 0.6 * (row % 2)))
            for a, c in words:
                text = [(x, y0 + a, z), (x, y0 + c, z), (x, y0 + c, z + 0.55 * step), (x, y0 + a, z + 0.55 * step)]
                b.face(text, SIGN_TEXT, (-1, 0, 0), 2, 160.0)
    return b


_MATERIAL = {
    "PAINT": PAINT,
    "GLASS": GLASS,
    "TRIM": TRIM,
    "BRAKE": BRAKE,
    "WALL": WALL,
    "SIGN": SIGN,
    "STRIPE": STRIPE,
}


def _figure(shape: Shape) -> _Builder:
    b = _Builder(2 * shape.half_length, 2 * shape.half_width, shape.height)
    for x0, x1, half, z0, z1, material in shape.blocks:
        b.box(x0, x1, half, z0, z1, _MATERIAL[material])
    return b


_BUILD = {CAR: _car, VAN: _van, TRUCK: _truck, BUS: _bus}

HOUSE_MODELS = (len(KINDS), len(KINDS) + 1, len(KINDS) + 2)
GANTRY_MODEL = len(KINDS) + 3
FIRST_SHAPE = GANTRY_MODEL + 1


@lru_cache(maxsize=1)
def models() -> Models:
    """All models: one per entry of ``KINDS`` (same index), then HOUSE_MODELS, GANTRY_MODEL and `SHAPES`."""
    builders = [_BUILD[kind.body](kind) for kind in KINDS]
    builders += [_house(11, 9, 5.4, 8.6, 2), _house(14, 10, 3.1, 7.0, 1), _house(24, 13, 5.0, 8.2, 1), _gantry()]
    builders += map(_figure, SHAPES.values())
    total = sum(len(b.faces) for b in builders)
    out = Models(
        start=np.cumsum([0] + [len(b.faces) for b in builders]),
        radius=np.array([0.5 * math.hypot(b.length + 0.7, b.width + 0.7, b.height) for b in builders]),
        height=np.array([b.height for b in builders]),
        half=np.array([(b.length / 2, b.width / 2) for b in builders]),
        corners=np.zeros((total, MAX_CORNERS, 3)),
        sides=np.zeros(total, np.int64),
        normal=np.zeros((total, 3)),
        material=np.zeros(total, np.int64),
        lift=np.ones(total),
        reach=np.zeros(total),
    )
    for i, (points, material, normal, lift, reach) in enumerate(f for b in builders for f in b.faces):
        out.corners[i, : len(points)] = points
        out.sides[i] = len(points)
        out.normal[i], out.material[i], out.lift[i], out.reach[i] = normal, material, lift, reach
    return out
