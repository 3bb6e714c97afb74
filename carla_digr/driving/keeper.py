"""Keeping a lane over CARLA's protocol: a scripted steer from the ego's state and the client's own map."""

from __future__ import annotations

import math

import carla

from carla_digr.driving.control import EGO_WHEELBASE, MAX_WHEEL_ANGLE

LOOK_AHEAD, LEAST_LOOK = 0.6, 6.0  # s at the present speed, and m at least; 0.8 cuts an S-bend of R 150 by 0.47 m
STEEPEST = 0.2  # rad, wheel angle


def lane_steer(road_map: carla.Map, place: carla.Transform, speed: float, lock: float = MAX_WHEEL_ANGLE) -> float:
    """The steer in [-1, 1] that follows the lane a car is in.

    Pure pursuit (Coulter, 1992): the arc from the rear axle through a point of the lane's middle ahead.

    Args:
        place: of the car's centre.
        speed: m/s.
        lock: wheel angle in rad at steer 1, as the car has it at this speed.
    """
    waypoint = road_map.get_waypoint(place.location)
    following = waypoint.next(max(LEAST_LOOK, LOOK_AHEAD * speed))
    if not following:
        return 0.0
    goal = min(following, key=lambda w: abs(_turned(w.transform.rotation.yaw - waypoint.transform.rotation.yaw)))
    yaw = math.radians(place.rotation.yaw)
    x = goal.transform.location.x - place.location.x + 0.5 * EGO_WHEELBASE * math.cos(yaw)
    y = goal.transform.location.y - place.location.y + 0.5 * EGO_WHEELBASE * math.sin(yaw)
    right = -x * math.sin(yaw) + y * math.cos(yaw)
    angle = math.atan(2.0 * EGO_WHEELBASE * right / max(x * x + y * y, 1.0))
    return max(-1.0, min(max(-STEEPEST, min(angle, STEEPEST)) / lock, 1.0))


def lane_offset(road_map: carla.Map, place: carla.Transform) -> float:
    """How far a place is beside the middle of its lane, m.

    Across the lane: the client's map finds a lane's nearest point only to about half a metre along it.
    """
    middle = road_map.get_waypoint(place.location).transform
    right, away = middle.get_right_vector(), place.location - middle.location
    return abs(away.x * right.x + away.y * right.y)


def _turned(degrees: float) -> float:
    return (degrees + 180.0) % 360.0 - 180.0
