"""A road like Town04's highway: bends of 54 to 860 m, slopes of 6 %, junctions with an exit, a ramp and a merge.

Ring and cross-section are those of the ordinary highway, so world and renderer need to know nothing; heights are told
to clients and pull at the cars, pictures show a plane. The ramp runs where the shoulder is elsewhere.
"""

from __future__ import annotations

import copy
import math
import xml.etree.ElementTree as ElementTree

import numpy as np

from carla_digr.simulator.awkward.episode import AwkwardEpisode, Car, Trait
from carla_digr.simulator.road import (
    CURVATURE,
    HEADING0,
    LANE_WIDTH,
    LANES,
    LENGTH,
    ROAD_EDGE,
    S0,
    SHOULDER_WIDTH,
    Road,
)

GRAVITY = 9.81  # m/s2
HALF = (  # (m or degrees, radius in m; 0 = straight, positive turns right); net 180 degrees to the left
    (700.0, 0.0),
    (20.0, -860.0),
    (40.0, 180.0),
    (60.0, -147.0),
    (100.0, 0.0),
    (90.0, -74.0),
    (60.0, 0.0),
    (50.0, -54.0),
)
SLOPES = (0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, None)
"""Slope at each piece's start over the largest one, linear in between; None: what brings the half back to height 0."""
EXIT, RAMP, MERGE = 4, 5, 6  # pieces of each half: a junction, the road beside which the ramp runs, a junction
OUTER = -(LANES + 1)
"""OpenDRIVE id of the outermost driving lane; the one beyond is the shoulder."""


class Town(Trait):
    """The road of this file; ``size`` is the steepest slope in per cent."""

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._road = Road.closed(HALF)
        self._slopes, self._heights = _profile(self._road, size / 100.0)

    def road(self) -> Road:
        """The ring of HALF twice."""
        return self._road

    def ground(self, s: float, d: float) -> tuple[float, float]:
        """Height and slope of the profile."""
        pieces = self._road.pieces
        i = int(np.searchsorted(pieces[:, S0], s, side="right")) - 1
        begin, end = self._slopes[i], self._slopes[i + 1]
        along = s - float(pieces[i, S0])
        change = (end - begin) / float(pieces[i, LENGTH])
        return self._heights[i] + begin * along + 0.5 * change * along * along, begin + change * along

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """Downhill force, on what rolls."""
        row = car.row
        if abs(float(row["speed"])) < 0.1 and not car.throttle:
            return
        _, slope = self.ground(float(row["s"]), float(row["d"]))
        if slope:
            car.push -= GRAVITY * math.sin(math.atan(slope)) * math.cos(float(row["yaw"]) - self._heading(row))

    def _heading(self, row: np.void) -> float:
        pieces = self._road.pieces
        i = int(np.searchsorted(pieces[:, S0], row["s"], side="right")) - 1
        return float(pieces[i, HEADING0] + pieces[i, CURVATURE] * (row["s"] - pieces[i, S0]))

    def opendrive(self, text: str) -> str:
        """The ring's map with heights, and with the exits and merges."""
        root = ElementTree.fromstring(text)  # noqa: S314 - our own map
        roads = root.findall("road")
        for i, road in enumerate(roads):
            begin, end = self._slopes[i], self._slopes[i + 1]
            change = 0.5 * (end - begin) / float(road.get("length", ""))
            profile = _find(road, "elevationProfile")
            profile[0].attrib.update({"a": repr(self._heights[i]), "b": repr(begin), "c": repr(change)})
        for half in range(2):
            _add_ramp(root, roads, half * len(HALF))
        return ElementTree.tostring(root, encoding="unicode")


def _profile(road: Road, steepest: float) -> tuple[list[float], list[float]]:
    """Slope (tangent) and height (m) at the start of every piece and at the end of the last."""
    lengths = [float(length) for length in road.pieces[: len(HALF), LENGTH]]
    slopes = [steepest * (slope or 0.0) for slope in SLOPES] + [0.0]
    rise = sum(0.5 * (slopes[i] + slopes[i + 1]) * length for i, length in enumerate(lengths))
    last = len(HALF) - 1
    slopes[last] = -rise / (0.5 * (lengths[last - 1] + lengths[last]))
    heights = [0.0]
    for i, length in enumerate(lengths):
        heights.append(heights[-1] + 0.5 * (slopes[i] + slopes[i + 1]) * length)
    return slopes[:-1] * 2 + [slopes[0]], heights[:-1] * 2 + [0.0]


def _add_ramp(root: ElementTree.Element, roads: list[ElementTree.Element], first: int) -> None:
    """Make the exit and merge pieces junctions, and lead a ramp from one to the other."""
    ramp_id, junction_ids = 300 + first, {EXIT: 100 + first, MERGE: 101 + first}
    exit_lane, ramp, merge_lane = (copy.deepcopy(roads[first + i]) for i in (EXIT, RAMP, MERGE))
    for piece, junction_id in junction_ids.items():
        before, road, after = roads[first + piece - 1], roads[first + piece], roads[first + piece + 1]
        road.set("junction", str(junction_id))
        _link(before, "successor", "junction", junction_id)
        _link(after, "predecessor", "junction", junction_id)
        junction = ElementTree.SubElement(root, "junction", {"id": str(junction_id), "name": ""})
        _connect(junction, before, road, "start", [(-i, -i) for i in range(2, LANES + 2)])
        _connect(junction, after, road, "end", [(i, i) for i in range(1, LANES + 1)])
        if piece == EXIT:
            _narrow(exit_lane, 200 + first, junction_id, (LANE_WIDTH, SHOULDER_WIDTH), (OUTER, -1))
            _link(exit_lane, "successor", "road", ramp_id, "start")
            _connect(junction, before, exit_lane, "start", [(OUTER, -1)])
        else:
            _narrow(merge_lane, 201 + first, junction_id, (SHOULDER_WIDTH, LANE_WIDTH), (-1, OUTER))
            _link(merge_lane, "predecessor", "road", ramp_id, "end")
    _narrow(ramp, ramp_id, -1, (SHOULDER_WIDTH, SHOULDER_WIDTH), (-1, -1))
    _link(ramp, "predecessor", "junction", junction_ids[EXIT])
    _link(ramp, "successor", "junction", junction_ids[MERGE])
    _connect(root[-1], ramp, merge_lane, "start", [(-1, -1)])
    for piece in (EXIT, RAMP, MERGE):  # the ramp takes the shoulder's place
        right = _find(roads[first + piece], "lanes/laneSection/right")
        for lane in right.findall("lane"):
            if int(lane.get("id", "")) < OUTER:
                right.remove(lane)
    at = list(root).index(roads[-1]) + 1
    for road in (exit_lane, ramp, merge_lane):
        root.insert(at, road)


def _narrow(
    road: ElementTree.Element, road_id: int, junction: int, widths: tuple[float, float], links: tuple[int, int]
) -> None:
    """Leave one lane, -1, of a copied road: beside or where the outermost lane is, and as wide, by ``widths``."""
    road.set("id", str(road_id))
    road.set("junction", str(junction))
    length = float(road.get("length", ""))
    begin, end = (-ROAD_EDGE + (LANE_WIDTH if width == LANE_WIDTH else 0.0) for width in widths)
    _find(road, "lanes/laneOffset").attrib.update(_blend(begin, end, length))
    section = _find(road, "lanes/laneSection")
    section.remove(_find(section, "left"))
    middle = _find(section, "center/lane")
    middle.remove(_find(middle, "roadMark"))
    right = _find(section, "right")
    for lane in right.findall("lane"):
        if int(lane.get("id", "")) != OUTER:
            right.remove(lane)
    lane = right[0]
    lane.set("id", "-1")
    _find(lane, "width").attrib.update(_blend(*widths, length))
    _find(lane, "link/predecessor").set("id", str(links[0]))
    _find(lane, "link/successor").set("id", str(links[1]))


def _blend(begin: float, end: float, length: float) -> dict[str, str]:
    """Coefficients of the cubic from one value to the other with level ends."""
    step = end - begin
    values = (begin, 0.0, 3.0 * step / length**2, -2.0 * step / length**3)
    return {name: repr(value) for name, value in zip("abcd", values, strict=True)}


def _link(road: ElementTree.Element, which: str, kind: str, element_id: int, contact: str = "") -> None:
    link = _find(road, f"link/{which}")
    link.attrib.clear()
    link.attrib.update({"elementType": kind, "elementId": str(element_id)})
    if contact:
        link.set("contactPoint", contact)


def _connect(
    junction: ElementTree.Element,
    incoming: ElementTree.Element,
    road: ElementTree.Element,
    contact: str,
    lanes: list[tuple[int, int]],
) -> None:
    attributes = {
        "id": str(len(junction)),
        "incomingRoad": incoming.get("id", ""),
        "connectingRoad": road.get("id", ""),
        "contactPoint": contact,
    }
    connection = ElementTree.SubElement(junction, "connection", attributes)
    for begin, end in lanes:
        ElementTree.SubElement(connection, "laneLink", {"from": str(begin), "to": str(end)})


def _find(element: ElementTree.Element, path: str) -> ElementTree.Element:
    found = element.find(path)
    assert found is not None, path
    return found
