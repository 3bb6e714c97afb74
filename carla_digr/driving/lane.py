"""The curvature of the lane that a car is in: what its steering adds to follow the road.

In process and over CARLA's protocol it follows from the same reference lines, there from the map's OpenDRIVE text
(ASAM OpenDRIVE 1.4, section 5.3.4, road plan view), so that the embedded highway steers the same car to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.etree.ElementTree import Element

import defusedxml.ElementTree
import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.simulator.road import CURVATURE, S0, project_to

TIGHTEST = 0.2  # 1/m, of a lane: a circle of 5 m
ARC = 2.0  # m, pieces of a curve that is neither straight nor an arc
LARGEST_MAP = 2**26  # characters; Town04 has 5 million
MOST_PIECES = 2**20


def lane_curvature(pieces: NDArray[np.float64], x: float, y: float, yaw: float) -> float:
    """Curvature, in 1/m and positive to the right, of the line through (x, y) that runs beside a reference line.

    Args:
        pieces: (P, 6), as in ``carla_digr.simulator.road.Road``: the reference line's straights and arcs.
        x, y: metres, CARLA's coordinates.
        yaw: of the car, rad; against the reference line a right-hand curve is one to the left.
    """
    s, d, heading = project_to(pieces, x, y)
    index = max(int(np.searchsorted(pieces[:, S0], s, side="right")) - 1, 0)
    curvature = float(pieces[index, CURVATURE])
    curvature /= max(1.0 - curvature * d, 1e-3)
    if math.cos(yaw - heading) < 0.0:
        curvature = -curvature
    return min(max(curvature, -TIGHTEST), TIGHTEST)


def reference_lines(opendrive: str) -> dict[int, NDArray[np.float64]]:
    """The reference line of every road of an OpenDRIVE map, by the road's id, as straights and arcs in CARLA's
    coordinates, (P, 6) as in ``carla_digr.simulator.road.Road``.

    Raises:
        UserError: the text is no such map, or is larger than any.
    """
    if len(opendrive) > LARGEST_MAP:
        raise UserError(f"The server's OpenDRIVE map has more than {LARGEST_MAP} characters; load another map.")
    try:
        roads = defusedxml.ElementTree.fromstring(opendrive, forbid_dtd=True).findall("road")
        lines = {}
        total = 0
        for road in roads:
            rows = [row for geometry in road.findall("planView/geometry") for row in _pieces(geometry)]
            total += len(rows)
            if total > MOST_PIECES:
                raise ValueError("too many pieces")
            lines[int(road.attrib["id"])] = np.array(rows, np.float64).reshape(-1, 6) * [1, 1, -1, -1, 1, -1]
    except (defusedxml.ElementTree.ParseError, LookupError, ValueError, ArithmeticError) as error:
        raise UserError(f"The server's OpenDRIVE map cannot be read ({error}); load another map.") from None
    if not all(np.isfinite(line).all() for line in lines.values()):
        raise UserError("The server's OpenDRIVE map holds numbers that are not finite; load another map.")
    return lines


def _pieces(geometry: Element) -> Iterator[tuple[float, float, float, float, float, float]]:
    """Rows s, x, y, heading, length, curvature in OpenDRIVE's coordinates of one geometry of a plan view."""
    s, x, y, heading, length = (float(geometry.attrib[name]) for name in ("s", "x", "y", "hdg", "length"))
    shape = geometry[0]
    if shape.tag == "line":
        yield s, x, y, heading, length, 0.0
        return
    if shape.tag == "arc":
        yield s, x, y, heading, length, float(shape.attrib["curvature"])
        return
    count = max(math.ceil(length / ARC), 1)
    if count > MOST_PIECES:
        raise ValueError("too many pieces")
    part = length / count
    if shape.tag == "spiral":  # the curvature is linear in s
        first, last = float(shape.attrib["curvStart"]), float(shape.attrib["curvEnd"])
        for i in range(count):
            curvature = first + (last - first) * (i + 0.5) / count
            yield s + i * part, x, y, heading, part, curvature
            middle = heading + 0.5 * curvature * part
            x, y = x + part * math.cos(middle), y + part * math.sin(middle)
            heading += curvature * part
        return
    if shape.tag not in ("paramPoly3", "poly3"):
        raise ValueError(f"a geometry of the unknown kind {shape.tag}")
    for i in range(count):
        (u, v), (du, dv), (ddu, ddv) = _polynomial(shape, length, (i + 0.5) / count)
        (u, v), (at_du, at_dv), _ = _polynomial(shape, length, i / count)
        curvature = (du * ddv - dv * ddu) / math.hypot(du, dv) ** 3
        c, sn = math.cos(heading), math.sin(heading)
        yield s + i * part, x + c * u - sn * v, y + sn * u + c * v, heading + math.atan2(at_dv, at_du), part, curvature


def _polynomial(shape: Element, length: float, share: float) -> list[tuple[float, float]]:
    """(u, v), its first and its second derivative at a share of a cubic's length."""
    if shape.tag == "poly3":
        u, end = (0.0, 1.0, 0.0, 0.0), length
        v = tuple(float(shape.attrib[name]) for name in "abcd")
    else:
        u = tuple(float(shape.attrib[f"{name}U"]) for name in "abcd")  # type: ignore[assignment]
        v = tuple(float(shape.attrib[f"{name}V"]) for name in "abcd")
        end = length if shape.attrib.get("pRange") == "arcLength" else 1.0
    p = share * end
    rows = ((1.0, p, p * p, p**3), (0.0, 1.0, 2.0 * p, 3.0 * p * p), (0.0, 0.0, 2.0, 6.0 * p))
    return [(float(np.dot(row, u)), float(np.dot(row, v))) for row in rows]
