"""A driver for the ego that sees the whole state: the upper reference for learned policies, and the proof that the
traffic can be passed.

Model predictive control over a short list of manoeuvres: every plan (which lane now, which later, braking first or not)
is rolled out with the ego's own bicycle model, in road coordinates, against traffic that keeps its speed and finishes
its lane changes; the cheapest plan's first step is taken, and all is planned anew every few ticks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carla_digr.simulator.road import LANE_WIDTH, LANES, MEDIAN_HALF_WIDTH, lane_center
from carla_digr.simulator.traffic import ONCOMING, TRAFFIC, curvature_at
from carla_digr.simulator.world import World

_STEP, _STEPS = 0.125, 64  # s and number of steps of a rollout: 8 s
_REPLAN = 3  # ticks from plan to plan; in between it steers towards the chosen lane and brakes if it must
_LOOK_AHEAD, _LOOK_BEHIND = 200.0, 60.0  # m
_FIRST_CHANGE = (0.0, 1.0, 2.0, 3.5)  # s until the first lane change
_SECOND_CHANGE = (2.5, 4.5)  # s from the first to the second
_BRAKE_FIRST = (0.0, 1.0, 2.5)  # s of braking before all else
_SIDE_SPEED, _SIDE_ACCELERATION = 2.0, 1.0  # m/s and m/s2 of the ego's lane changes
_LEAST_BRAKING = 0.4  # m/s2, for distances where a curve lets no braking slow the ego
_SLOWING_TIME = 2.0  # s that a vehicle that brakes is expected to go on braking
_FRONT_MARGIN, _SIDE_MARGIN = 2.0, 0.4  # m kept free where possible
_CRASH = 1000.0  # costs; a second at standstill costs 22
_NEAR = 20.0  # a second inside the margins
_CHANGE = 1.0  # a lane change
_SWITCH = 0.5  # another lane than the tick before wanted
_BLOCKED = 6.0  # ending right behind a slower vehicle

# Columns of the obstacle table: distance ahead, offset, speed, offset it heads for, half measures, deceleration.
_AHEAD, _OFFSET, _SPEED, _GOAL, _HALF_LENGTH, _HALF_WIDTH, _SLOWING = range(7)


@njit(cache=True, nogil=True)
def _wanted_curvature(d, angle, speed, goal, curvature, tightest, given):
    """Path curvature that brings the ego to the offset ``goal``, at most ``tightest`` to either side of ``given``."""
    error = goal - d
    side = min(_SIDE_SPEED, math.sqrt(1.6 * _SIDE_ACCELERATION * abs(error)), abs(error) / 0.7)
    side = side if error > 0.0 else -side
    wanted = side / max(speed, 5.0)
    wanted = curvature / (1.0 - curvature * d) + (wanted - angle) / (0.25 * max(speed, 5.0))
    return given + min(max(wanted - given, -tightest), tightest)


@njit(cache=True, nogil=True)
def _braking_left(curvature, tightest, speed, cruise, braking):
    """Mean deceleration of a driver that brakes while it follows the road, m/s2; negative where it gets faster.

    Braking steers straight, so a curve leaves only part of the time for it; in the rest the cruise control pulls.
    """
    part = max(1.0 - abs(curvature) / tightest, 0.0)
    return part * braking - (1.0 - part) * min(max(cruise - speed, 0.0), 4.0)


@njit(cache=True, nogil=True)
def _must_brake(obstacles, ahead, d, speed, goal, half_length, half_width, braking):
    """True when a vehicle ahead, in the own path or the lane headed for, is nearer than braking now allows for."""
    braking = max(braking, _LEAST_BRAKING)
    low, high = min(d, goal) - half_width - 0.25, max(d, goal) + half_width + 0.25
    for k in range(obstacles.shape[0]):
        o = obstacles[k]
        gap = o[_AHEAD] - ahead - half_length - o[_HALF_LENGTH]
        if o[_AHEAD] < ahead or o[_OFFSET] + o[_HALF_WIDTH] < low or o[_OFFSET] - o[_HALF_WIDTH] > high:
            continue
        if gap < -0.5 and (
            o[_OFFSET] + o[_HALF_WIDTH] < d - half_width or o[_OFFSET] - o[_HALF_WIDTH] > d + half_width
        ):
            continue
        closing = speed - o[_SPEED] + 0.5 * o[_SLOWING]
        if closing > -0.3 and gap < 3.0 + 0.5 * closing + closing * abs(closing) / (2.0 * braking):
            return True
    return False


@njit(cache=True, nogil=True)
def _rollout(pieces, start, obstacles, plan, size, limits, along):
    """Cost of a plan.

    ``start``: s, d, angle to the road, speed. ``plan``: lane now, lane from t1, t1, lane from t2, t2, seconds of
    braking. ``size``: half length and half width. ``limits``: tightest curvature, cruise speed, braking. ``along``: 1
    if the wheels follow the road's curve by themselves, else 0.
    """
    last = pieces.shape[0] - 1
    ring = pieces[last, 0] + pieces[last, 4]
    s, d, angle, speed = start
    half_length, half_width = size
    tightest, cruise, braking = limits
    others = obstacles.copy()
    ahead = 0.0
    cost = 0.0
    goal = 0.0
    for step in range(_STEPS):
        t = step * _STEP
        lane = plan[0] if t < plan[2] else (plan[1] if t < plan[4] else plan[3])
        goal = MEDIAN_HALF_WIDTH + (lane + 0.5) * LANE_WIDTH
        curvature = curvature_at(pieces, (s + ahead) % ring)
        given = along * curvature
        effective = _braking_left(curvature - given, tightest, speed, cruise, braking)
        turn = _wanted_curvature(d, angle, speed, goal, curvature, tightest, given)
        if t < plan[5] or _must_brake(others, ahead, d, speed, goal, half_length, half_width, effective):
            speed = max(speed - effective * _STEP, 0.0)
        else:
            speed += min(max(cruise - speed, -1.0), 4.0) * _STEP
        rate = math.cos(angle) / (1.0 - curvature * d) * speed
        angle += (turn * speed - curvature * rate) * _STEP
        ahead += rate * _STEP
        d += speed * math.sin(angle) * _STEP
        cost += (cruise - speed) * _STEP
        half = half_width + half_length * abs(math.sin(angle))
        for k in range(others.shape[0]):
            o = others[k]
            if t < _SLOWING_TIME:
                o[_SPEED] = max(o[_SPEED] - o[_SLOWING] * _STEP, 0.0)
            o[_AHEAD] += o[_SPEED] / (1.0 - curvature * o[_OFFSET]) * _STEP
            o[_OFFSET] += min(max(o[_GOAL] - o[_OFFSET], -1.3 * _STEP), 1.3 * _STEP)
            front = abs(o[_AHEAD] - ahead) - half_length - o[_HALF_LENGTH]
            beside = abs(o[_OFFSET] - d) - half - o[_HALF_WIDTH]
            if front < 0.3 and beside < 0.1:
                return cost + _CRASH / (1.0 + t)
            if front < _FRONT_MARGIN and beside < _SIDE_MARGIN:
                cost += (
                    _NEAR * (1.0 - max(front, 0.0) / _FRONT_MARGIN) * (1.0 - max(beside, 0.0) / _SIDE_MARGIN) * _STEP
                )
    for k in range(others.shape[0]):
        o = others[k]
        gap = o[_AHEAD] - ahead
        if gap > 0.0 and abs(o[_OFFSET] - goal) < 0.5 * LANE_WIDTH and o[_SPEED] < cruise:
            clear = gap / (cruise - o[_SPEED])
            cost += _BLOCKED * max(0.0, 1.0 - clear / 10.0)
    return cost


@njit(cache=True, nogil=True)
def _best_plan(pieces, start, obstacles, lane, size, limits, along):
    """(lane to head for now, whether to brake now) of the cheapest plan."""
    best, best_lane, best_brake = math.inf, lane, False
    plan = np.empty(6)
    for brake_time in _BRAKE_FIRST:
        for first in range(max(lane - 1, 0), min(lane + 2, LANES)):
            for t1 in _FIRST_CHANGE:
                if first == lane and t1 > 0.0:
                    continue
                for second in range(max(first - 1, 0), min(first + 2, LANES)):
                    for pause in _SECOND_CHANGE:
                        if second == first and pause > _SECOND_CHANGE[0]:
                            continue
                        if first == lane and second != lane:
                            continue
                        plan[0], plan[1], plan[2] = lane, first, t1
                        plan[3], plan[4], plan[5] = second, t1 + pause, brake_time
                        cost = _rollout(pieces, start, obstacles, plan, size, limits, along)
                        cost += _CHANGE * (abs(first - lane) + abs(second - first))
                        now = first if t1 == 0.0 else lane
                        if now != lane:
                            cost += _SWITCH
                        if cost < best:
                            best, best_lane, best_brake = cost, now, brake_time > 0.0
    return best_lane, best_brake


class Planner:
    """Drives one ego by actions that steer at a few wheel angles, and one that brakes.

    Args:
        wheel_angles: rad that the actions set, from left to right, the middle one 0; the last action brakes.
        cruise_speed: m/s held by every action but brake.
        braking: m/s2 of the action brake.
        along_lane: the angles are added to what the road's curve asks for.
    """

    def __init__(self, wheel_angles: Sequence[float], cruise_speed: float, braking: float, along_lane: bool = False):
        self.curvatures = np.array([_path_curvature(angle) for angle in wheel_angles])
        self.along_lane = along_lane
        self.cruise_speed = cruise_speed
        self.braking = braking
        self.lane: int | None = None
        """The lane it drives in or heads for; None before the first observation of an episode."""
        self._brake = False
        self._plan_in = 0

    def reset(self) -> None:
        """Forget the episode before."""
        self.lane, self._brake, self._plan_in = None, False, 0

    def observe(self, world: World, ego_id: int) -> int:
        """The action for the next tick, an index into the wheel angles, or their number: brake.

        Raises:
            KeyError: there is no such vehicle.
        """
        ego = world.vehicle(ego_id)
        pieces = world.road.pieces
        heading = float(world.road.pose(ego.s, ego.d)[2])
        angle = (ego.yaw - heading + math.pi) % (2.0 * math.pi) - math.pi
        nearest = min(max(int((ego.d - MEDIAN_HALF_WIDTH) // LANE_WIDTH), 0), LANES - 1)
        if self.lane is None:
            self.lane = nearest
        levels = self.curvatures / float(ego.wheelbase)
        tightest = float(levels[-1])
        start = (float(ego.s), float(ego.d), angle, float(ego.speed))
        size = (0.5 * float(ego.length), 0.5 * float(ego.width))
        limits = (tightest, self.cruise_speed, self.braking)
        obstacles = _obstacles(world, ego)
        if self._plan_in == 0:
            along = float(self.along_lane)
            self.lane, self._brake = _best_plan(pieces, start, obstacles, self.lane, size, limits, along)
            self._plan_in = _REPLAN
        self._plan_in -= 1

        curvature = curvature_at(pieces, ego.s)
        goal = lane_center(self.lane)
        given = curvature if self.along_lane else 0.0
        effective = _braking_left(curvature - given, tightest, ego.speed, self.cruise_speed, self.braking)
        brake = self._brake or _must_brake(obstacles, 0.0, ego.d, ego.speed, goal, *size, effective)
        turn = _wanted_curvature(ego.d, angle, ego.speed, goal, curvature, tightest, given) - given
        if brake and abs(turn) < 0.75 * tightest:
            return len(levels)
        return int(np.abs(levels - turn).argmin())


def _path_curvature(wheel_angle: float) -> float:
    """Curvature of the path of a bicycle's centre, times its wheelbase."""
    return math.tan(wheel_angle) * math.cos(math.atan(0.5 * math.tan(wheel_angle)))


def _obstacles(world: World, ego: np.record) -> NDArray[np.float64]:
    """The vehicles of the own carriageway around the ego, (M, 7), columns as above."""
    v = world.vehicles
    ring = world.road.length
    ahead = (v["s"] - ego.s + 0.5 * ring) % ring - 0.5 * ring
    v = v[(v["driver"] != ONCOMING) & (v["id"] != ego.id) & (ahead < _LOOK_AHEAD) & (ahead > -_LOOK_BEHIND)]
    ahead = (v["s"] - ego.s + 0.5 * ring) % ring - 0.5 * ring
    goal = np.where(v["driver"] == TRAFFIC, MEDIAN_HALF_WIDTH + (v["lane"] + 0.5) * LANE_WIDTH, v["d"])
    slowing = np.maximum(-(v["ax"] * np.cos(v["yaw"]) + v["ay"] * np.sin(v["yaw"])), 0.0)
    return np.stack([ahead, v["d"], v["speed"], goal, 0.5 * v["length"], 0.5 * v["width"], slowing], axis=1)
