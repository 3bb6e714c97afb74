"""A scripted driver over CARLA's protocol: keeps its lane, follows, overtakes; the first thing to try on a server.

It sees what a client sees: the snapshot's vehicles and the map. Every 0.2 s it looks along its lane and those beside
it; a slower vehicle ahead is passed where a lane beside is free far enough, before, beside and behind, else followed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import carla
import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import CRUISE_SPEED, MAX_WHEEL_ANGLE, VehicleCommand
from carla_digr.driving.highway import LEAST_WIDTH, reach
from carla_digr.driving.keeper import across, look_ahead, pursuit, straightest
from carla_digr.driving.scenario import RUN_OUT, Scenario

LOOK_EVERY = 4  # ticks
SPACING, AHEAD, BEHIND = 4.0, 120.0, 60.0  # m between looks along a lane, and how far
LENGTH = 5.5  # m, of a vehicle
SIDE_SPEED = 1.3  # m/s across, of a lane change
STEEPEST = 0.12  # rad, wheel angle
BRAKING = 2.5  # m/s2 that it counts on
STANDING_GAP, HEADWAY = 7.0, 0.9  # m and s to the vehicle it follows
STILL_INSIDE = 1.2  # m from the middle of the lane it changes to; farther off it also follows who is in its old one
SLOWER = 1.0  # m/s below the cruise speed that make a vehicle worth passing
WORTH = 15.0  # m more room ahead that a lane must offer
REST = 40  # ticks from a start or a lane change to the next one
LEAST_REACH = RUN_OUT + 100.0  # m that a lane goes on which it changes to: the change itself takes 70


class Room(NamedTuple):
    """What is free in a lane: m to the vehicle ahead and its m/s, m to the one behind and its m/s."""

    ahead: float
    ahead_speed: float
    behind: float
    behind_speed: float


class ScriptedDriver:
    """Drives a scenario's ego."""

    def __init__(self) -> None:
        self._lane: carla.Waypoint | None = None
        """On the lane it drives in or changes to, beside the ego."""
        self._ticks = 0
        self._rest = REST
        self._speed = CRUISE_SPEED

    def reset(self) -> None:
        """Forget the episode before."""
        self.__init__()  # type: ignore[misc]

    def command(self, drive: Scenario) -> VehicleCommand:
        """What to do until the next tick."""
        place, velocity = drive.ego.get_transform(), drive.ego.get_velocity()
        speed = math.hypot(velocity.x, velocity.y)
        lane = drive.session.map.get_waypoint(place.location) if self._lane is None else self._lane
        self._lane = lane = _along(lane, place.location)
        self._rest = max(self._rest - 1, 0)
        if self._ticks % LOOK_EVERY == 0:
            self._look(drive, lane, place, speed)
        self._ticks += 1
        return VehicleCommand(_steer(self._lane, place, speed), target_speed=self._speed)

    def _look(self, drive: Scenario, lane: carla.Waypoint, place: carla.Transform, speed: float) -> None:
        """Choose lane and speed."""
        others = _others(drive)
        room = _room(lane, place, others)
        if abs(across(lane, place.location)) < 0.5 and self._rest == 0 and room.ahead_speed < CRUISE_SPEED - SLOWER:
            need = STANDING_GAP + 4.0 * max(speed - room.ahead_speed, 0.0) + speed
            if room.ahead < need:
                found = self._better(drive, lane, place, others, room, speed)
                if found is not None:
                    self._lane, self._rest = found, REST
        ways = [self._lane]
        if abs(across(self._lane, place.location)) > STILL_INSIDE:
            ways.append(drive.session.map.get_waypoint(place.location))
        self._speed = min(_following_speed(_room(way, place, others)) for way in ways)

    def _better(
        self,
        drive: Scenario,
        lane: carla.Waypoint,
        place: carla.Transform,
        others: NDArray[np.float64],
        now: Room,
        speed: float,
    ) -> carla.Waypoint | None:
        """The lane beside with the most room ahead, where there is one worth it, free, and not about to end."""
        best, found = now.ahead + WORTH, None
        for beside in (lane.get_left_lane(), lane.get_right_lane()):
            if beside is None or beside.lane_id * lane.lane_id < 0 or beside.lane_width < LEAST_WIDTH:
                continue
            if beside.lane_type != carla.LaneType.Driving:
                continue
            room = _room(beside, place, others)
            free = room.ahead > 8.0 + 2.5 * max(speed - room.ahead_speed, 0.0)
            free = free and room.behind > 6.0 + 3.0 * max(room.behind_speed - speed, 0.0)
            free = free and room.ahead > best
            if free and reach(drive.session.map, beside.transform).metres >= LEAST_REACH:
                best, found = room.ahead, beside
        return found


def _following_speed(room: Room) -> float:
    """The speed that keeps the distance to the vehicle ahead."""
    gap = room.ahead - STANDING_GAP
    if gap <= 0.0:
        return max(0.0, min(room.ahead_speed - 2.0, CRUISE_SPEED))
    stop = math.sqrt(room.ahead_speed**2 + 2.0 * BRAKING * gap)
    follow = room.ahead_speed + max(gap - HEADWAY * room.ahead_speed * 0.5, 0.0) / 2.0
    return max(0.0, min(stop, follow, CRUISE_SPEED))


def _others(drive: Scenario) -> NDArray[np.float64]:
    """Other vehicles near the ego, (N, 4) x, y (m) and their speeds along x, y (m/s)."""
    rows = []
    here = drive.ego.get_location()
    for vehicle in drive.session.world.get_actors().filter("vehicle.*"):
        if vehicle.id != drive.ego.id:
            at, velocity = vehicle.get_location(), vehicle.get_velocity()
            if at.distance(here) < AHEAD:
                rows.append((at.x, at.y, velocity.x, velocity.y))
    return np.array(rows).reshape(-1, 4)


def _room(lane: carla.Waypoint, place: carla.Transform, others: NDArray[np.float64]) -> Room:
    """What is free in a lane from beside the ego on."""
    path = _path(lane)
    end = float(path[:, 0].max())  # a lane that ends is one with somebody standing there
    ahead, ahead_speed = (math.inf, CRUISE_SPEED) if end > AHEAD - SPACING else (end, 0.0)
    behind, behind_speed = math.inf, 0.0
    if not len(others):
        return Room(ahead, ahead_speed, behind, behind_speed)
    away = np.hypot(path[:, None, 1] - others[None, :, 0], path[:, None, 2] - others[None, :, 1])
    nearest = away.argmin(axis=0)
    inside = away[nearest, np.arange(len(others))] < math.hypot(0.5 * SPACING, 0.5 * lane.lane_width)
    for k in np.flatnonzero(inside):
        point = path[nearest[k]]
        x, y, vx, vy = others[k]
        along = float(point[0] + (x - point[1]) * math.cos(point[3]) + (y - point[2]) * math.sin(point[3]))
        across = float(-(x - point[1]) * math.sin(point[3]) + (y - point[2]) * math.cos(point[3]))
        if abs(across) > 0.5 * lane.lane_width + 0.4:
            continue
        speed = float(vx * math.cos(point[3]) + vy * math.sin(point[3]))
        gap = abs(along) - LENGTH
        if along > 0.0 and gap < ahead:
            ahead, ahead_speed = gap, speed
        elif along <= 0.0 and gap < behind:
            behind, behind_speed = gap, speed
    return Room(ahead, ahead_speed, behind, behind_speed)


def _path(lane: carla.Waypoint) -> NDArray[np.float64]:
    """Points of a lane, (N, 4): m along it from here on, x, y (m), heading (rad)."""
    rows = []
    for sign, farthest in ((1.0, AHEAD), (-1.0, BEHIND)):
        point, along = lane, 0.0
        while along <= farthest:
            transform = point.transform
            rows.append(
                (sign * along, transform.location.x, transform.location.y, math.radians(transform.rotation.yaw))
            )
            following = point.next(SPACING) if sign > 0.0 else point.previous(SPACING)
            if not following:
                break
            point, along = straightest(point, following), along + SPACING
    return np.array(rows)


def _along(lane: carla.Waypoint, location: carla.Location) -> carla.Waypoint:
    """The point of the lane beside a location ahead of it."""
    forward = lane.transform.get_forward_vector()
    away = location - lane.transform.location
    distance = away.x * forward.x + away.y * forward.y
    following = lane.next(distance) if distance > 0.05 else []
    return straightest(lane, following) if following else lane


def _steer(lane: carla.Waypoint, place: carla.Transform, speed: float) -> float:
    """Pursuit of the lane, which a lane change approaches at SIDE_SPEED."""
    look = look_ahead(speed)
    following = lane.next(look)
    if not following:
        return 0.0
    goal = straightest(lane, following).transform
    off = across(lane, place.location)
    left = math.copysign(max(abs(off) - SIDE_SPEED * look / max(speed, 5.0), 0.0), off)
    right = goal.get_right_vector()
    angle = pursuit(place, goal.location.x + left * right.x, goal.location.y + left * right.y)
    return max(-STEEPEST, min(angle, STEEPEST)) / MAX_WHEEL_ANGLE
