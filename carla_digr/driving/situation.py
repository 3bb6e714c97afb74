"""Where the ego is on its road and who is around it, from what any client sees: snapshot, boxes and map.

Distances along and across the road are those of its reference line, as the embedded highway's own world counts them;
the lanes are the client's map's. Any OpenDRIVE road will do: one or two carriageways, either side, ramps, lanes of any
width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import carla
import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.keeper import across, straightest
from carla_digr.driving.session import Session
from carla_digr.simulator.road import CURVATURE, HEADING0, LENGTH, S0, X0, Y0, pose_at, project_to

REACH = 300.0  # m of road that are looked at, ahead and behind, when the ego comes to their end
ENOUGH = 160.0  # m of them that must be left, and within which others are seen
STRIDE = 5.0  # m between looks for the next road; shorter roads are joined by what lies before and behind them
LEVEL = 4.0  # m up or down within which others are on the same road
BESIDE = 30.0  # m across within which they are
MOST_LANES = 32  # of a carriageway


class Other(NamedTuple):
    """Another vehicle: m ``ahead`` of the ego's centre along the road, m ``across`` it to the right; speed in m/s,
    negative backwards; length and width in m; ``along``: whether it drives in the ego's direction."""

    ahead: float
    across: float
    speed: float
    length: float
    width: float
    along: bool


class Situation(NamedTuple):
    """Of the ego: speed (m/s, negative backwards), length and width (m); m ``offset`` to the right of the middle of its
    lane; m from its centre ``to_left`` and ``to_right``, the edges of the driving lanes in its direction; ``drift``,
    m/s to the right. ``others`` by id."""

    speed: float
    length: float
    width: float
    offset: float
    to_left: float
    to_right: float
    drift: float
    others: dict[int, Other]


class Situations:
    """Makes a frame's situation.

    Args:
        session: owns the tick.
        ego: the car that is driven.
        lines: the map's reference lines, see ``lane.reference_lines``.
    """

    def __init__(self, session: Session, ego: carla.Vehicle, lines: dict[int, NDArray[np.float64]]):
        self._session, self._ego, self._lines = session, ego, lines
        self._kinds: dict[int, tuple[float, float] | None] = {}  # id -> length and width, None: no vehicle
        self._sizes: dict[str, tuple[float, float]] = {}  # type -> the same
        self._chain = np.zeros((0, 6))
        self._ends = (False, False)
        """Whether the chain begins and ends where the road does."""
        self._road = (0, 0, 0)
        """The road, its section and the side of it that the chain was last known to lead along."""

    def of(self, snapshot: carla.WorldSnapshot) -> Situation:
        """The situation in a frame.

        Raises:
            RuntimeError: of the client library, where the server does not answer.
        """
        state = snapshot.find(self._ego.id)
        place = state.get_transform()
        lane = self._session.map.get_waypoint(place.location)
        s, d, heading = self._along_the_road(place, lane)
        yaw = math.radians(place.rotation.yaw)
        speed = _speed(state, yaw)
        offset, to_left, to_right = _in_lanes(lane, place.location)
        actors = {actor.id: actor for actor in snapshot}
        if not self._kinds.keys() >= actors.keys():
            self._meet(list(actors))
        size = self._kinds[self._ego.id]
        assert size is not None
        others = {}
        x, y, z = place.location.x, place.location.y, place.location.z
        for i, actor in actors.items():
            kind = self._kinds[i]
            if kind is None or i == self._ego.id:
                continue
            at = actor.get_transform()
            here = at.location
            if math.hypot(here.x - x, here.y - y) > ENOUGH or abs(here.z - z) > LEVEL:
                continue
            their_s, their_d, road = project_to(self._chain, here.x, here.y)
            if abs(their_d - d) > BESIDE:
                continue
            turned = math.radians(at.rotation.yaw)
            along = math.cos(turned - road) > 0.0
            others[i] = Other(their_s - s, their_d - d, _speed(actor, turned), *kind, along)
        return Situation(speed, *size, offset, to_left, to_right, speed * math.sin(yaw - heading), others)

    def _meet(self, present: list[int]) -> None:
        """Know of every actor whether it is a vehicle, and how large; a kind of vehicle is asked for once."""
        new = [i for i in present if i not in self._kinds]
        self._kinds = {i: self._kinds.get(i) for i in present}
        for actor in self._session.world.get_actors(new):
            if not isinstance(actor, carla.Vehicle):
                continue
            if actor.type_id not in self._sizes:
                half = actor.bounding_box.extent
                self._sizes[actor.type_id] = 2.0 * half.x, 2.0 * half.y
            self._kinds[actor.id] = self._sizes[actor.type_id]

    def _along_the_road(self, place: carla.Transform, lane: carla.Waypoint) -> tuple[float, float, float]:
        """The ego's (s, d, heading) on the chain of roads that its lane leads along, which grows as it drives."""
        road = lane.road_id, lane.section_id, 1 if lane.lane_id > 0 else -1
        x, y = place.location.x, place.location.y
        if len(self._chain) and road == self._road:
            found = project_to(self._chain, x, y)
            if self._goes_on(found[0]):
                return found
        self._road = road
        self._chain, self._ends = self._follow(lane)
        return project_to(self._chain, x, y)

    def _goes_on(self, s: float) -> bool:
        begins, ends = self._ends
        length = self._chain[-1, S0] + self._chain[-1, LENGTH]
        return (begins or s > ENOUGH) and (ends or length - s > ENOUGH)

    def _follow(self, lane: carla.Waypoint) -> tuple[NDArray[np.float64], tuple[bool, bool]]:
        """The reference lines, one after the other, of the roads that a lane comes from and leads to, in its direction;
        whether the first and the last are ends."""
        ahead, ends = _roads(lane, "next")
        behind, begins = _roads(lane, "previous")
        s, rows = 0.0, []
        for number, against in [*reversed(behind[1:]), *ahead]:
            for piece in _turned(self._lines[number]) if against else self._lines[number]:
                rows.append([s, *piece[X0:]])
                s += piece[LENGTH]
        return np.array(rows), (begins, ends)


def _roads(lane: carla.Waypoint, way: str) -> tuple[list[tuple[int, bool]], bool]:
    """Roads from a lane's own on, each with whether it is driven against its reference line; whether they end."""
    found = [(lane.road_id, lane.lane_id > 0)]
    for _ in range(round(REACH / STRIDE)):
        following = getattr(lane, way)(STRIDE)
        if not following:
            return found, True
        lane = straightest(lane, following)
        road = lane.road_id, lane.lane_id > 0
        if road == found[-1]:
            continue
        if road in found:  # round in a small ring
            return found, True
        found.append(road)
    return found, False


def _turned(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """A reference line from its end to its beginning, (P, 6)."""
    rows = []
    for piece in line[::-1]:
        alone = piece[None].copy()
        alone[0, S0] = 0.0
        x, y, heading = pose_at(alone, np.nextafter(piece[LENGTH], 0.0), 0.0)
        row = piece.copy()
        row[X0], row[Y0], row[HEADING0], row[CURVATURE] = x, y, heading + math.pi, -piece[CURVATURE]
        rows.append(row)
    return np.array(rows)


def _in_lanes(lane: carla.Waypoint, place: carla.Location) -> tuple[float, float, float]:
    """(offset, to_left, to_right) of a place, see Situation.

    Near the border between two lanes the client's map may name the wrong one of them: the place says which it is.
    """
    offset = across(lane, place)
    if abs(offset) > lane.lane_width / 2.0:
        beside = lane.get_right_lane() if offset > 0.0 else lane.get_left_lane()
        if _belongs(beside, lane):
            lane, offset = beside, across(beside, place)
    left, right = (_lanes_width(lane, way) for way in ("get_left_lane", "get_right_lane"))
    return offset, lane.lane_width / 2.0 + offset + left, lane.lane_width / 2.0 - offset + right


def _lanes_width(lane: carla.Waypoint, way: str) -> float:
    """m of driving lanes in a lane's direction, beside it on one side."""
    width, beside = 0.0, getattr(lane, way)()
    for _ in range(MOST_LANES):
        if not _belongs(beside, lane):
            break
        width += beside.lane_width
        beside = getattr(beside, way)()
    return width


def _belongs(beside: carla.Waypoint | None, lane: carla.Waypoint) -> bool:
    return beside is not None and beside.lane_type == carla.LaneType.Driving and beside.lane_id * lane.lane_id > 0


def _speed(state: carla.ActorSnapshot, yaw: float) -> float:
    velocity = state.get_velocity()
    forward = velocity.x * math.cos(yaw) + velocity.y * math.sin(yaw)
    return math.copysign(math.hypot(velocity.x, velocity.y), forward)
