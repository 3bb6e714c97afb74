"""Keeping a lane over CARLA's protocol: a scripted steer from the ego's state and the client's own map."""

from __future__ import annotations

import math

import carla

from carla_digr.driving.control import EGO_WHEELBASE, MAX_WHEEL_ANGLE

LOOK_TIME, LEAST_LOOK = 0.6, 6.0  # s at the present speed, and m at least; 0.8 cuts an S-bend of R 150 by 0.47 m
STEEPEST = 0.2  # rad, wheel angle


def look_ahead(speed: float) -> float:
    """How far ahead the point is that is steered for, m."""
    return max(LEAST_LOOK, LOOK_TIME * speed)


def pursuit(place: carla.Transform, x: float, y: float) -> float:
    """The wheel angle, rad, of the arc from a car's rear axle through a point: pure pursuit (Coulter, 1992).

    Args:
        place: of the car's centre.
        x: of the point, m.
        y: of the point, m.
    """
    yaw = math.radians(place.rotation.yaw)
    x = x - place.location.x + 0.5 * EGO_WHEELBASE * math.cos(yaw)
    y = y - place.location.y + 0.5 * EGO_WHEELBASE * math.sin(yaw)
    return math.atan(2.0 * EGO_WHEELBASE * (-x * math.sin(yaw) + y * math.cos(yaw)) / max(x * x + y * y, 1.0))


def lane_steer(road_map: carla.Map, place: carla.Transform, speed: float, lock: float = MAX_WHEEL_ANGLE) -> float:
    """The steer in [-1, 1] that follows the lane a car is in.

    Args:
        place: of the car's centre.
        speed: m/s.
        lock: wheel angle in rad at steer 1, as the car has it at this speed.
    """
    lane = road_map.get_waypoint(place.location)
    following = lane.next(look_ahead(speed))
    if not following:
        return 0.0
    goal = straightest(lane, following).transform.location
    angle = pursuit(place, goal.x, goal.y)
    return max(-1.0, min(max(-STEEPEST, min(angle, STEEPEST)) / lock, 1.0))


def lane_offset(road_map: carla.Map, place: carla.Transform) -> float:
    """How far a place is beside the middle of its lane, m.

    Across the lane: the client's map finds a lane's nearest point only to about half a metre along it.
    """
    return abs(across(road_map.get_waypoint(place.location), place.location))


def across(lane: carla.Waypoint, location: carla.Location) -> float:
    """m to the right of the lane's middle."""
    right = lane.transform.get_right_vector()
    away = location - lane.transform.location
    return away.x * right.x + away.y * right.y


def straightest(lane: carla.Waypoint, following: list[carla.Waypoint]) -> carla.Waypoint:
    """Where a lane forks, the widest branch that turns least."""

    def turned(waypoint: carla.Waypoint) -> float:
        return abs((waypoint.transform.rotation.yaw - lane.transform.rotation.yaw + 180.0) % 360.0 - 180.0)

    return min(following, key=lambda w: (round(turned(w)), -w.lane_width))
