"""Where on a map the driving task can be driven: spawn points with a highway ahead."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import carla

from carla_digr.driving.control import EGO_WHEELBASE, WHEEL_ANGLE
from carla_digr.errors import UserError

LEAST_LANES = 3  # in the driving direction
LEAST_WIDTH = 3.0  # m, of each of them
AHEAD = 200.0  # m that must be highway, without a junction
STEP = 25.0  # m between looks
REACH, STRIDE = 1200.0, 20.0  # m that a stretch is followed at most, and between looks
STRAIGHT = 1e4  # m, a radius that is as good as none
LEAST_RADIUS = EGO_WHEELBASE / math.tan(WHEEL_ANGLE)  # m, bends the actions can follow


def identity(road_map: carla.Map) -> tuple[str, str]:
    """A map's name, and 12 digits that no other map has."""
    return road_map.name.rpartition("/")[2], hashlib.sha256(road_map.to_opendrive().encode()).hexdigest()[:12]


def highway_points(
    road_map: carla.Map, roads: Sequence[int] = (), spawn_points: Sequence[int] = ()
) -> list[carla.Transform]:
    """The spawn points of a map from which a drive can start, in the map's order.

    Args:
        roads: only points on roads with these OpenDRIVE ids; empty: on any road.
        spawn_points: exactly these, as indices into the map's list, whether they look like a highway or not; empty:
            those with at least LEAST_LANES lanes for the next AHEAD metres, no junction and no bend the ego cannot
            follow at full speed.

    Raises:
        UserError: an index or a road without spawn points, or nothing is left; the sentence names what to change.
    """
    points = road_map.get_spawn_points()
    if spawn_points:
        beyond = [index for index in spawn_points if not 0 <= index < len(points)]
        if beyond:
            raise UserError(
                f"The map {road_map.name} has the spawn points 0 to {len(points) - 1}, not {beyond[0]}; choose others."
            )
        return [points[index] for index in spawn_points]
    starts = [road_map.get_waypoint(point.location) for point in points]
    elsewhere = set(roads) - {start.road_id for start in starts if start is not None}
    if elsewhere:
        raise UserError(f"The map {road_map.name} has no spawn point on the road {min(elsewhere)}; choose other roads.")
    found = [
        point
        for point, start in zip(points, starts, strict=True)
        if start is not None and (not roads or start.road_id in roads) and _is_highway(start)
    ]
    if found:
        return found
    where = f" on the roads {', '.join(map(str, roads))}" if roads else ""
    raise UserError(
        f"The map {road_map.name} has no highway{where}: none of its {len(points)} spawn points has {LEAST_LANES} "
        f"lanes in its direction for {AHEAD:.0f} m without a junction or a bend below {LEAST_RADIUS:.0f} m; load "
        "Town04 or Town05, choose other roads or spawn points, or drive on the embedded highway."
    )


class Reach(NamedTuple):
    """How far a stretch of road can be driven from a place."""

    metres: float
    until: str
    """What ends it."""
    tightest: float
    """m, smallest radius of its bends."""
    slope: float
    """Tangent of the steepest one."""


def reach(road_map: carla.Map, point: carla.Transform) -> Reach:
    """How far a place's lane goes, at most REACH.

    A junction ends it, the lane's end or where it gets too narrow, and a bend that the actions cannot hold.
    """
    waypoint = road_map.get_waypoint(point.location)
    slope, tightest, metres, until = 0.0, math.inf, 0.0, "nothing in reach"
    while metres < REACH:
        following = waypoint.next(STRIDE)
        if waypoint.is_junction or len(following) != 1:
            until = "junction" if waypoint.is_junction or following else "end of the road"
            break
        if waypoint.lane_width < LEAST_WIDTH or waypoint.lane_type != carla.LaneType.Driving:
            until = f"lane of {waypoint.lane_width:.1f} m"
            break
        turned = (following[0].transform.rotation.yaw - waypoint.transform.rotation.yaw + 180.0) % 360.0 - 180.0
        radius = STRIDE / abs(math.radians(turned)) if turned else math.inf
        if radius < LEAST_RADIUS:
            until = f"bend of {radius:.0f} m"
            break
        tightest = min(tightest, radius)
        waypoint = following[0]
        slope = max(slope, abs(math.tan(math.radians(waypoint.transform.rotation.pitch))))
        metres += STRIDE
    return Reach(metres, until, min(tightest, STRAIGHT), slope)


def far_reaching(road_map: carla.Map, points: Sequence[carla.Transform]) -> list[carla.Transform]:
    """Those of the points that reach at least half as far as the one that reaches farthest, in their order."""
    metres = [reach(road_map, point).metres for point in points]
    return [point for point, far in zip(points, metres, strict=True) if far >= 0.5 * max(metres)]


def _is_highway(waypoint: carla.Waypoint) -> bool:
    """Whether AHEAD metres from here are highway."""
    heading = waypoint.transform.rotation.yaw
    for _ in range(round(AHEAD / STEP)):
        if waypoint.is_junction or len(lanes_beside(waypoint)) < LEAST_LANES:
            return False
        following = waypoint.next(STEP)
        if len(following) != 1:
            return False
        waypoint = following[0]
        turned = (waypoint.transform.rotation.yaw - heading + 180.0) % 360.0 - 180.0
        if abs(math.radians(turned)) > STEP / LEAST_RADIUS:
            return False
        heading += turned
    return True


def lanes_beside(waypoint: carla.Waypoint) -> list[carla.Waypoint]:
    """Driving lanes of full width in a waypoint's direction, from left to right, its own included."""
    left, right = (list(_lanes_towards(waypoint, turn)) for turn in ("get_left_lane", "get_right_lane"))
    return [*reversed(left), *right[1:]]


def _lanes_towards(waypoint: carla.Waypoint, turn: str) -> Iterator[carla.Waypoint]:
    lane = waypoint
    while _drives_along(lane, waypoint):
        yield lane
        lane = getattr(lane, turn)()


def _drives_along(lane: carla.Waypoint | None, other: carla.Waypoint) -> bool:
    return (
        lane is not None
        and lane.lane_type == carla.LaneType.Driving
        and lane.lane_id * other.lane_id > 0
        and lane.lane_width >= LEAST_WIDTH
    )
