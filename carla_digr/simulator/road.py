"""The ring highway: one reference line of straights and arcs that OpenDRIVE, physics and renderer share.

Coordinates are CARLA's: left-handed, x forward, y right, metres, headings in radians positive from +x towards +y.
A point of the road is (s, d): arc length along the reference line and lateral offset, positive to the right of the
driving direction. OpenDRIVE's t is -d and its y is -y (ASAM OpenDRIVE 1.4, sections 5.3.4 and 5.3.7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray

LANES = 4
"""Driving lanes of one carriageway; lane 0 is the leftmost (fast) one."""
LANE_WIDTH = 3.6  # m
MEDIAN_HALF_WIDTH = 2.0  # m, from the reference line to the yellow line and the first lane
SHOULDER_WIDTH = 2.6  # m, right of the last lane
ROAD_EDGE = MEDIAN_HALF_WIDTH + LANES * LANE_WIDTH  # m, white edge line
PAVED_EDGE = ROAD_EDGE + SHOULDER_WIDTH  # m, end of the asphalt
BARRIER_HALF_WIDTH, BARRIER_HEIGHT = 0.3, 0.9  # m, concrete barrier on the reference line
RAIL_OFFSET, RAIL_HEIGHT = PAVED_EDGE + 0.3, 0.75  # m, guard rail beside both shoulders
LINE_WIDTH = 0.15  # m, painted lines, centred on the lane borders
DASH_LENGTH, DASH_PERIOD = 3.0, 12.0  # m; the period is stretched so that a whole number fits the ring
SPEED_LIMIT = 90.0  # km/h
MAP_NAME = "RingHighway"
LATITUDE, LONGITUDE = 49.0, 8.0  # degrees, of the origin

# Columns of Road.pieces.
S0, X0, Y0, HEADING0, LENGTH, CURVATURE = range(6)


@njit(cache=True, nogil=True)
def pose_at(pieces, s, d):
    """(x, y, heading) of the road point (s, d); s is wrapped around the ring."""
    last = pieces.shape[0] - 1
    total = pieces[last, 0] + pieces[last, 4]
    s = s % total
    i = 0
    while i < last and s >= pieces[i + 1, 0]:
        i += 1
    ds = s - pieces[i, 0]
    h0 = pieces[i, 3]
    k = pieces[i, 5]
    h = h0 + k * ds
    if k == 0.0:
        x = pieces[i, 1] + ds * math.cos(h0)
        y = pieces[i, 2] + ds * math.sin(h0)
    else:
        x = pieces[i, 1] + (math.sin(h) - math.sin(h0)) / k
        y = pieces[i, 2] - (math.cos(h) - math.cos(h0)) / k
    return x - d * math.sin(h), y + d * math.cos(h), h


@njit(cache=True, nogil=True)
def project_on_piece(piece, x, y):
    """(ds, d, distance) of the point nearest to (x, y) on one piece; ds is clamped to the piece, d belongs to ds."""
    h0 = piece[3]
    length = piece[4]
    k = piece[5]
    rx = x - piece[1]
    ry = y - piece[2]
    if k == 0.0:
        c = math.cos(h0)
        sn = math.sin(h0)
        ds = rx * c + ry * sn
        d = ry * c - rx * sn
        over = max(-ds, ds - length, 0.0)
        return min(max(ds, 0.0), length), d, math.sqrt(d * d + over * over)
    sign = 1.0 if k > 0.0 else -1.0
    vx = rx + math.sin(h0) / k
    vy = ry - math.cos(h0) / k
    radius = math.sqrt(vx * vx + vy * vy)
    turned = (math.atan2(sign * vx, -sign * vy) - h0) * sign
    # The turned angle is cut where the complement of the arc is halved, so that clamping goes to the nearer end.
    angle = length * abs(k)
    cut = 0.5 * (angle - 2.0 * math.pi)
    turned = turned - 2.0 * math.pi * math.floor((turned - cut) / (2.0 * math.pi))
    d = 1.0 / k - sign * radius
    if 0.0 <= turned <= angle:
        return turned / abs(k), d, abs(d)
    clamped = 0.0 if turned < 0.0 else angle
    chord = 2.0 * radius * math.sin(0.5 * min(abs(turned - clamped), math.pi))
    near = abs(1.0 / k)
    distance = math.sqrt((radius - near) ** 2 + near / max(radius, 1e-9) * chord * chord)
    return clamped / abs(k), d, distance


@njit(cache=True, nogil=True)
def project_to(pieces, x, y):
    """(s, d, heading) of the road point nearest to (x, y)."""
    best = 1e18
    s = 0.0
    d = 0.0
    heading = 0.0
    for i in range(pieces.shape[0]):
        ds, offset, distance = project_on_piece(pieces[i], x, y)
        if distance < best:
            best = distance
            s = pieces[i, 0] + ds
            d = offset
            heading = pieces[i, 3] + pieces[i, 5] * ds
    return s, d, heading


@njit(cache=True, nogil=True)
def _poses(pieces, s, d, out):
    for i in range(s.shape[0]):
        out[i, 0], out[i, 1], out[i, 2] = pose_at(pieces, s[i], d[i])


@njit(cache=True, nogil=True)
def _projections(pieces, x, y, out):
    for i in range(x.shape[0]):
        out[i, 0], out[i, 1], out[i, 2] = project_to(pieces, x[i], y[i])


def lane_center(lane: int) -> float:
    """Lateral offset d of the centre of a lane of the own carriageway, in metres."""
    return MEDIAN_HALF_WIDTH + (lane + 0.5) * LANE_WIDTH


@dataclass(frozen=True)
class Road:
    """A closed road of straights and arcs.

    Args:
        pieces: (P, 6) float64, a row a piece: s0, x0, y0 (m), heading0 (rad), length (m), curvature (1/m, positive
            turns right). Pieces follow each other without gap or kink, the last one ends where the first begins.
    """

    pieces: NDArray[np.float64]

    @classmethod
    def ring(cls) -> Road:
        """The default highway: 2.7 km, point symmetric, curves to both sides with radii of 250 m and 300 m.

        Half of it turns by 180 degrees; the other half repeats it, which closes the ring exactly.
        """
        half = [  # (length or angle in degrees, radius; 0 = straight, positive turns right)
            (200.0, 0.0),
            (70.0, -250.0),
            (30.0, 300.0),
            (80.0, 0.0),
            (140.0, -250.0),
        ]
        return cls.closed(half)

    @classmethod
    def closed(cls, half: Sequence[tuple[float, float]]) -> Road:
        """A point-symmetric ring of twice the same pieces.

        Args:
            half: (length in m or angle in degrees, radius in m; 0 = straight, positive turns right) of each piece;
                together they turn by 180 degrees.
        """
        rows = []
        s = x = y = heading = 0.0
        for size, radius in (*half, *half):
            length = size if radius == 0.0 else math.radians(size) * abs(radius)
            curvature = 0.0 if radius == 0.0 else 1.0 / radius
            row = np.array([s, x, y, heading, length, curvature])
            rows.append(row)
            end = heading + curvature * length
            if curvature == 0.0:
                x, y = x + length * math.cos(heading), y + length * math.sin(heading)
            else:
                x += (math.sin(end) - math.sin(heading)) / curvature
                y -= (math.cos(end) - math.cos(heading)) / curvature
            heading = end
            s += length
        return cls(np.stack(rows))

    @cached_property
    def length(self) -> float:
        """Length of the reference line in metres."""
        return float(self.pieces[-1, S0] + self.pieces[-1, LENGTH])

    @cached_property
    def dash_period(self) -> float:
        """Distance from one dash of a lane line to the next, metres; a whole number of them fits the ring."""
        return self.length / round(self.length / DASH_PERIOD)

    def pose(self, s, d) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """x, y (m) and heading (rad) of road points; s and d broadcast, the results have their common shape."""
        s, d = np.broadcast_arrays(np.asarray(s, np.float64), np.asarray(d, np.float64))
        out = np.empty((s.size, 3))
        _poses(self.pieces, s.ravel(), d.ravel(), out)
        return out[:, 0].reshape(s.shape), out[:, 1].reshape(s.shape), out[:, 2].reshape(s.shape)

    def project(self, x, y) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """s, d (m) and road heading (rad) of the road points nearest to x, y, which broadcast."""
        x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        out = np.empty((x.size, 3))
        _projections(self.pieces, x.ravel(), y.ravel(), out)
        return out[:, 0].reshape(x.shape), out[:, 1].reshape(x.shape), out[:, 2].reshape(x.shape)

    def curvature(self, s) -> NDArray[np.float64]:
        """Signed curvature of the reference line at s, in 1/m, positive turns right."""
        index = np.searchsorted(self.pieces[:, S0], np.asarray(s) % self.length, side="right") - 1
        return self.pieces[index, CURVATURE]

    @cached_property
    def spawn_points(self) -> NDArray[np.float64]:
        """(N, 3) x, y (m), yaw (rad) on the lane centres of the own carriageway, every 50 m, lane by lane.

        x, y and the yaw in degrees are float32 numbers, so that they survive CARLA's protocol unchanged.
        """
        count = int(self.length // 50.0)
        s = np.repeat(np.arange(count) * (self.length / count), LANES)
        d = np.tile([lane_center(i) for i in range(LANES)], count)
        x, y, heading = self.pose(s, d)
        degrees = (np.degrees(heading) + 180.0) % 360.0 - 180.0
        f32 = [a.astype(np.float32).astype(np.float64) for a in (x, y, degrees)]
        return np.stack([f32[0], f32[1], np.radians(f32[2])], axis=1)

    def opendrive(self) -> str:
        """The road as OpenDRIVE 1.4 text: a road a piece, linked to a ring, with lanes and road marks."""
        count = len(self.pieces)
        roads = "\n".join(self._opendrive_road(i, count) for i in range(count))
        return (
            '<?xml version="1.0" standalone="yes"?>\n<OpenDRIVE>\n'
            f'<header revMajor="1" revMinor="4" name="{MAP_NAME}" version="1" north="0" south="0" east="0" west="0">'
            f"<geoReference><![CDATA[+proj=tmerc +lat_0={LATITUDE:g} +lon_0={LONGITUDE:g} +k=1 +x_0=0 +y_0=0 "
            "+datum=WGS84 +units=m "
            "+geoidgrids=egm96_15.gtx +vunits=m +no_defs ]]></geoReference></header>\n"
            f"{roads}\n</OpenDRIVE>\n"
        )

    def _opendrive_road(self, index: int, count: int) -> str:
        piece = self.pieces[index]
        length = repr(float(piece[LENGTH]))
        shape = "<line/>"
        if piece[CURVATURE] != 0.0:
            shape = f'<arc curvature="{-float(piece[CURVATURE])!r}"/>'
        sides = {
            "left": "".join(_opendrive_lane(i, i) for i in range(LANES + 1, 0, -1)),
            "center": f'<lane id="0" type="none" level="false">{_road_mark(*_YELLOW)}</lane>',
            "right": "".join(_opendrive_lane(-1 - i, i) for i in range(LANES + 2)),
        }
        lanes = "".join(f"<{side}>{text}</{side}>" for side, text in sides.items())
        return (
            f'<road name="ring {index}" length="{length}" id="{index + 1}" junction="-1">'
            f'<link><predecessor elementType="road" elementId="{(index - 1) % count + 1}" contactPoint="end"/>'
            f'<successor elementType="road" elementId="{(index + 1) % count + 1}" contactPoint="start"/></link>'
            f'<type s="0" type="motorway"><speed max="{SPEED_LIMIT}" unit="km/h"/></type>'
            f'<planView><geometry s="0" x="{float(piece[X0])!r}" y="{-float(piece[Y0])!r}" '
            f'hdg="{-float(piece[HEADING0])!r}" length="{length}">{shape}</geometry></planView>'
            '<elevationProfile><elevation s="0" a="0" b="0" c="0" d="0"/></elevationProfile><lateralProfile/>'
            f'<lanes><laneOffset s="0" a="{MEDIAN_HALF_WIDTH}" b="0" c="0" d="0"/>'
            f'<laneSection s="0">{lanes}</laneSection></lanes></road>'
        )


_YELLOW, _DASHED, _EDGE, _NO_MARK = (
    ("solid", "yellow", "none"),
    ("broken", "white", "both"),
    ("solid", "white", "none"),
    ("none", "standard", "none"),
)
"""Type and colour of a road mark, and across it the changes of lane that are allowed."""


def _opendrive_lane(lane_id: int, number: int) -> str:
    """A lane with the mark on its outer border: number 0 is the median, then come the driving lanes and the shoulder.

    The whole median is lane -1 and the centre lane its far border. Were both 1 and -1 median, CARLA's client, for which
    the one is the left neighbour of the other, would walk to and fro between them on its way to the next driving lane.
    """
    if number == 0:
        kind, width, mark = "median", 2.0 * MEDIAN_HALF_WIDTH, _YELLOW
    elif number < LANES:
        kind, width, mark = "driving", LANE_WIDTH, _DASHED
    elif number == LANES:
        kind, width, mark = "driving", LANE_WIDTH, _EDGE
    else:
        kind, width, mark = "shoulder", SHOULDER_WIDTH, _NO_MARK
    return (
        f'<lane id="{lane_id}" type="{kind}" level="false">'
        f'<link><predecessor id="{lane_id}"/><successor id="{lane_id}"/></link>'
        f'<width sOffset="0" a="{width}" b="0" c="0" d="0"/>{_road_mark(*mark)}</lane>'
    )


def _road_mark(kind: str, color: str, lane_change: str) -> str:
    return (
        f'<roadMark sOffset="0" type="{kind}" weight="standard" color="{color}" width="{LINE_WIDTH}" '
        f'laneChange="{lane_change}"/>'
    )
