"""The drivers of the embedded highway: heterogeneous traffic by IDM and MOBIL, and how it is placed on the ring.

Sources: Treiber, Hennecke, Helbing, "Congested traffic states" (2000), equations 3 and 4 (IDM); Kesting, Treiber,
Helbing, "General lane-changing model MOBIL" (2007), equations 2 to 5; Gipps, "A behavioural car-following model"
(1981), equation 2 (the speed from which a driver can still stop behind a leader that brakes as hard as it can).

A driver holds (s, d) on the road, its speed and the slope of its path against the lane; everything it does follows from
the vehicle table of the step before, so that a table of vehicles is the whole state of the traffic.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.simulator.road import LANE_WIDTH, LANES, MEDIAN_HALF_WIDTH, Road, lane_center, pose_at
from carla_digr.simulator.vehicle import BUS, CAR, KINDS, MAX_ACCELERATION, MAX_BRAKING, MAX_STEER, TRUCK, VAN

CLIENT, TRAFFIC, ONCOMING = range(3)
"""Who drives a vehicle: a client's controls, the world's driver, or the constant speed of the other carriageway."""

VEHICLE = np.dtype(
    [
        ("id", "i8"),
        ("kind", "i8"),  # index into KINDS
        ("driver", "i8"),  # CLIENT, TRAFFIC or ONCOMING
        ("color", "u1", (3,)),  # RGB
        ("hand_brake", "?"),
        ("reverse", "?"),
        ("brake_light", "?"),
        ("ghost", "?"),  # nothing collides with it
        ("length", "f8"),  # m, like all lengths
        ("width", "f8"),
        ("wheelbase", "f8"),
        ("mass", "f8"),  # kg
        ("x", "f8"),
        ("y", "f8"),
        ("yaw", "f8"),  # rad
        ("speed", "f8"),  # m/s along the heading, negative backwards
        ("vx", "f8"),
        ("vy", "f8"),
        ("yaw_rate", "f8"),  # rad/s
        ("ax", "f8"),  # m/s2
        ("ay", "f8"),
        ("s", "f8"),  # road coordinates of the centre
        ("d", "f8"),
        ("throttle", "f8"),  # 0 to 1
        ("steer", "f8"),  # -1 to 1, of MAX_STEER
        ("brake", "f8"),  # 0 to 1
        # The traffic driver's own state and character.
        ("lane", "i8"),  # where it drives or is heading to
        ("home_lane", "i8"),  # where it would like to drive
        ("leftmost_lane", "i8"),  # it may use
        ("lane_changes", "i8"),  # begun so far
        ("slope", "f8"),  # tangent of the angle between path and lane
        ("desired_speed", "f8"),  # m/s
        ("headway", "f8"),  # s
        ("vigour", "f8"),  # m/s2, IDM's maximum acceleration
        ("think_in", "f8"),  # s until it considers a lane change again
        ("blocking", "f8"),  # s it has been the last of a row that covers every lane
    ],
    align=True,
)
"""One row of the vehicle table."""

HORIZON = 120.0  # m, how far a driver looks
STANDSTILL_GAP = 2.5  # m, IDM's s0
COMFORTABLE_BRAKING = 2.0  # m/s2, IDM's b
FIRM_BRAKING = 4.0  # m/s2, the most that IDM alone may ask
EMERGENCY_BRAKING = 9.0  # m/s2, what a traffic driver can do
CLIENT_BRAKING = 14.6  # m/s2, what a client's vehicle can do with brake, hand brake, rolling and drag
CUT_IN_BRAKING = 2.0  # m/s2, for a vehicle alongside that is about to pull in
SIDE_MARGIN = 0.3  # m, beside the own body
ANTICIPATION = 1.0  # s of sideways motion of a client's vehicle that others foresee

THINK_PERIOD = 0.4  # s between two looks for a better lane
CHANGE_REST = 6.0  # s from the begin of a lane change to the next look
MAX_SLOPE = 0.12  # of a lane change's path
MAX_SWING = 0.7  # m, slope times length: keeps the ends of long vehicles inside their lanes
SIDE_SPEED, SIDE_ACCELERATION = 1.7, 1.5  # m/s and m/s2 of a lane change: about 3.3 s
SAFE_BRAKING = 1.5  # m/s2 that a lane change may cost anybody (MOBIL's b_safe)
POLITENESS = 0.1  # MOBIL's p
CHANGE_THRESHOLD = 0.1  # m/s2, MOBIL's delta a_th
HOME_BIAS = 0.18  # m/s2 a lane towards the own home lane
FRONT_ROOM, BACK_ROOM = 4.0, 6.0  # m free before and behind a lane change
CLOSING_TIME = 4.0  # s a faster driver behind needs to adapt to a lane change
CLIENT_CLOSING_TIME = 6.0  # s the same for a client's vehicle, which may hold its speed

ROW_LENGTH = 32.0  # m; vehicles in every lane within this length are a blockade
ROW_PATIENCE = 1.0  # s before the last one of a blockade lets off
ROW_LET_OFF = 0.84  # of the speed of the slowest other one
ROW_SLOWEST = 8.0  # m/s, nobody lets off below

# Columns of the footprints: lateral body interval, the one swept soon, half length along the road, speed along it.
_BODY_LOW, _BODY_HIGH, _LOW, _HIGH, _HALF, _ALONG = range(6)


@njit(cache=True, nogil=True)
def curvature_at(pieces, s):
    """Signed curvature of the reference line at s in [0, ring), 1/m, positive turns right."""
    i = pieces.shape[0] - 1
    while i > 0 and s < pieces[i, 0]:
        i -= 1
    return pieces[i, 5]


@njit(cache=True, nogil=True)
def advance(pieces, s, d, distance):
    """The s in [0, ring) that a vehicle at the offset d reaches from s after ``distance`` m (negative: backwards).

    Off the reference line a metre of path is 1 / (1 - curvature * d) metres of s, which changes where a piece ends.
    """
    last = pieces.shape[0] - 1
    ring = pieces[last, 0] + pieces[last, 4]
    sign = 1.0 if distance >= 0.0 else -1.0
    left = abs(distance)
    i = last
    while i > 0 and (s < pieces[i, 0] or (sign < 0.0 and s == pieces[i, 0])):
        i -= 1
    while True:
        rate = 1.0 / (1.0 - pieces[i, 5] * d)
        to_end = pieces[i, 0] + pieces[i, 4] - s if sign > 0.0 else s - pieces[i, 0]
        if left * rate <= to_end:
            return (s + sign * left * rate) % ring
        left -= to_end / rate
        i = (i + int(sign)) % (last + 1)
        s = pieces[i, 0] if sign > 0.0 else pieces[i, 0] + pieces[i, 4]


@njit(cache=True, nogil=True)
def free_acceleration(speed, desired, vigour):
    """IDM's acceleration on a free road, never below the comfortable deceleration."""
    return max(vigour * (1.0 - (speed / desired) ** 4), -COMFORTABLE_BRAKING)


@njit(cache=True, nogil=True)
def follow_acceleration(speed, desired, headway, vigour, gap, leader_speed, leader_braking, dt):
    """Acceleration behind a leader: IDM down to firm braking, harder only where Gipps' safe speed demands it."""
    leader_speed = max(leader_speed, 0.0)
    wanted = speed * headway + speed * (speed - leader_speed) / (2.0 * math.sqrt(vigour * COMFORTABLE_BRAKING))
    wanted = STANDSTILL_GAP + max(wanted, 0.0)
    room = max(gap, 0.1)
    a = free_acceleration(speed, desired, vigour) - vigour * (wanted / room) ** 2
    a = max(a, -FIRM_BRAKING)
    reach = EMERGENCY_BRAKING * dt
    stop = reach * reach + 2.0 * EMERGENCY_BRAKING * (gap - 0.6 * STANDSTILL_GAP)
    stop += leader_speed * leader_speed * (EMERGENCY_BRAKING / leader_braking)
    safe = math.sqrt(stop) - reach if stop > reach * reach else 0.0
    return max(min(a, (safe - speed) / dt), -EMERGENCY_BRAKING)


@njit(cache=True, nogil=True)
def _footprints(vehicles, heading, out):
    """What each vehicle covers across the road now and soon, in road coordinates; (N, 6), columns as above."""
    for i in range(vehicles.shape[0]):
        v = vehicles[i]
        angle = v.yaw - heading[i]
        c, sn = abs(math.cos(angle)), abs(math.sin(angle))
        half = 0.5 * (v.width * c + v.length * sn)
        if v.driver == TRAFFIC:
            end = MEDIAN_HALF_WIDTH + (v.lane + 0.5) * LANE_WIDTH
        else:
            drift = v.speed * math.sin(angle) * ANTICIPATION
            end = v.d + min(max(drift, -LANE_WIDTH), LANE_WIDTH)
        out[i, _BODY_LOW] = v.d - half
        out[i, _BODY_HIGH] = v.d + half
        out[i, _LOW] = min(v.d, end) - half
        out[i, _HIGH] = max(v.d, end) + half
        out[i, _HALF] = 0.5 * (v.length * c + v.width * sn)
        out[i, _ALONG] = v.speed * math.cos(angle)


@njit(cache=True, nogil=True)
def _acceleration(vehicles, feet, order, rank, low, high, desired, stretch, ring, dt):
    """What driver order[rank] does in the corridor [low, high] of lateral offsets: the least over all leaders."""
    n = order.shape[0]
    i = order[rank]
    v = vehicles[i]
    a = free_acceleration(v.speed, desired, v.vigour)
    for step in range(1, n):
        j = order[(rank + step) % n]
        distance = (vehicles[j].s - v.s) % ring
        if distance > HORIZON:
            break
        if feet[j, _HIGH] < low or feet[j, _LOW] > high:
            continue
        gap = distance * stretch - feet[i, _HALF] - feet[j, _HALF]
        if gap <= 0.0 and (feet[j, _BODY_HIGH] < low or feet[j, _BODY_LOW] > high):
            a = min(a, -CUT_IN_BRAKING)
            continue
        braking = CLIENT_BRAKING if vehicles[j].driver == CLIENT else EMERGENCY_BRAKING
        a = min(
            a,
            follow_acceleration(v.speed, desired, v.headway, v.vigour, gap, feet[j, _ALONG], braking, dt),
        )
    return a


@njit(cache=True, nogil=True)
def _lane_gain(vehicles, feet, order, rank, lane, stretch, ring, dt):
    """MOBIL for driver order[rank] and the neighbouring lane: (own acceleration there, cost to those behind there).

    The own acceleration is -inf where the change is not safe: too little room or time before or behind, or anybody
    would have to brake by more than SAFE_BRAKING.
    """
    n = order.shape[0]
    i = order[rank]
    v = vehicles[i]
    center = MEDIAN_HALF_WIDTH + (lane + 0.5) * LANE_WIDTH
    low = center - 0.5 * v.width - 0.5
    high = center + 0.5 * v.width + 0.5
    for step in range(1, n):
        j = order[(rank + step) % n]
        distance = (vehicles[j].s - v.s) % ring
        if distance > HORIZON:
            break
        if feet[j, _HIGH] >= low and feet[j, _LOW] <= high:
            gap = distance * stretch - feet[i, _HALF] - feet[j, _HALF]
            closing = max(v.speed - feet[j, _ALONG], 0.0)
            if gap < FRONT_ROOM + CLOSING_TIME * closing:
                return -math.inf, 0.0
    own = _acceleration(vehicles, feet, order, rank, low, high, v.desired_speed, stretch, ring, dt)
    if own < -SAFE_BRAKING:
        return -math.inf, 0.0
    cost = 0.0
    nearest = True
    for step in range(1, n):
        j = order[(rank - step) % n]
        distance = (v.s - vehicles[j].s) % ring
        if distance > HORIZON:
            break
        if feet[j, _HIGH] < low or feet[j, _LOW] > high:
            continue
        w = vehicles[j]
        gap = distance * stretch - feet[i, _HALF] - feet[j, _HALF]
        patience = CLIENT_CLOSING_TIME if w.driver == CLIENT else CLOSING_TIME
        if gap < BACK_ROOM + patience * max(feet[j, _ALONG] - v.speed, 0.0):
            return -math.inf, 0.0
        if w.driver == TRAFFIC and nearest:
            behind = follow_acceleration(
                w.speed, w.desired_speed, w.headway, w.vigour, gap, v.speed, EMERGENCY_BRAKING, dt
            )
            if behind < -SAFE_BRAKING:
                return -math.inf, 0.0
            cost = max(free_acceleration(w.speed, w.desired_speed, w.vigour) - behind, 0.0)
            nearest = False
    return own, cost


@njit(cache=True, nogil=True)
def _row_speed(vehicles, feet, order, rank, ring):
    """Speed of the slowest other one of a row that covers every lane and ends with order[rank]; inf without one."""
    n = order.shape[0]
    v = vehicles[order[rank]]
    covered = 0
    slowest = math.inf
    for step in range(n):
        j = order[(rank + step) % n]
        if step > 0 and (vehicles[j].s - v.s) % ring > ROW_LENGTH:
            break
        if feet[j, _ALONG] > max(v.speed, v.desired_speed) + 2.0:
            continue
        for lane in range(LANES):
            left = MEDIAN_HALF_WIDTH + lane * LANE_WIDTH + 0.4
            if feet[j, _BODY_HIGH] > left and feet[j, _BODY_LOW] < left + LANE_WIDTH - 0.8:
                covered |= 1 << lane
        if step > 0:
            slowest = min(slowest, feet[j, _ALONG])
    return slowest if covered == (1 << LANES) - 1 else math.inf


@njit(cache=True, nogil=True)
def _order_along_road(vehicles):
    """Indices of the vehicles on the own carriageway's side of traffic by ascending s (insertion sort, stable)."""
    order = np.empty(vehicles.shape[0], np.int64)
    n = 0
    for i in range(vehicles.shape[0]):
        if vehicles[i].driver == ONCOMING:
            continue
        k = n
        while k > 0 and vehicles[order[k - 1]].s > vehicles[i].s:
            order[k] = order[k - 1]
            k -= 1
        order[k] = i
        n += 1
    return order[:n]


@njit(cache=True, nogil=True)
def step_traffic(vehicles, pieces, heading, dt):
    """Advance every traffic driver by dt seconds; clients' vehicles are seen but not moved.

    ``vehicles`` is the table (N,) of VEHICLE, changed in place; ``heading`` (N,) the road's heading at each vehicle,
    in radians, brought up to date for those that move.
    """
    last = pieces.shape[0] - 1
    ring = pieces[last, 0] + pieces[last, 4]
    order = _order_along_road(vehicles)
    feet = np.empty((vehicles.shape[0], 6))
    _footprints(vehicles, heading, feet)
    n = order.shape[0]
    acceleration = np.zeros(vehicles.shape[0])
    desired = np.zeros(vehicles.shape[0])

    # Lane changes one after the other: a lane that one driver has chosen is taken for the next.
    for rank in range(n):
        i = order[rank]
        v = vehicles[i]
        if v.driver != TRAFFIC:
            continue
        row_speed = _row_speed(vehicles, feet, order, rank, ring)
        v.blocking = v.blocking + dt if row_speed < math.inf else max(0.0, v.blocking - 0.5 * dt)
        desired[i] = v.desired_speed
        if v.blocking > ROW_PATIENCE:
            desired[i] = min(v.desired_speed, max(ROW_LET_OFF * row_speed, ROW_SLOWEST))
        v.think_in -= dt
        center = MEDIAN_HALF_WIDTH + (v.lane + 0.5) * LANE_WIDTH
        if v.think_in > 0.0 or abs(v.d - center) > 0.2:
            continue
        v.think_in += THINK_PERIOD
        stretch = 1.0 - curvature_at(pieces, v.s) * v.d
        half = 0.5 * v.width + SIDE_MARGIN
        here = _acceleration(vehicles, feet, order, rank, v.d - half, v.d + half, v.desired_speed, stretch, ring, dt)
        best, choice = CHANGE_THRESHOLD, v.lane
        for lane in (v.lane - 1, v.lane + 1):
            if lane < v.leftmost_lane or lane >= LANES:
                continue
            there, cost = _lane_gain(vehicles, feet, order, rank, lane, stretch, ring, dt)
            gain = there - here - POLITENESS * cost
            gain += HOME_BIAS * (abs(v.lane - v.home_lane) - abs(lane - v.home_lane))
            if gain > best:
                best, choice = gain, lane
        if choice != v.lane:
            v.lane = choice
            v.lane_changes += 1
            v.think_in = CHANGE_REST
            center = MEDIAN_HALF_WIDTH + (choice + 0.5) * LANE_WIDTH
            body = 0.5 * (feet[i, _BODY_HIGH] - feet[i, _BODY_LOW])
            feet[i, _LOW] = min(v.d, center) - body
            feet[i, _HIGH] = max(v.d, center) + body

    for rank in range(n):
        i = order[rank]
        v = vehicles[i]
        if v.driver != TRAFFIC:
            continue
        stretch = 1.0 - curvature_at(pieces, v.s) * v.d
        acceleration[i] = _acceleration(
            vehicles,
            feet,
            order,
            rank,
            feet[i, _LOW] - SIDE_MARGIN,
            feet[i, _HIGH] + SIDE_MARGIN,
            desired[i],
            stretch,
            ring,
            dt,
        )

    for i in range(vehicles.shape[0]):
        v = vehicles[i]
        if v.driver == TRAFFIC:
            _move(v, pieces, heading, i, acceleration[i], dt)
        elif v.driver == ONCOMING:
            v.s = advance(pieces, v.s, v.d, -v.speed * dt)
            v.x, v.y, heading[i] = pose_at(pieces, v.s, v.d)
            v.yaw = heading[i] + math.pi


@njit(cache=True, nogil=True)
def _move(v, pieces, heading, i, a, dt):
    """Advance one driver along its lane, or on the way to it, with acceleration a."""
    before = v.speed
    v.speed = max(0.0, before + a * dt)
    mean = 0.5 * (before + v.speed)

    error = MEDIAN_HALF_WIDTH + (v.lane + 0.5) * LANE_WIDTH - v.d
    side = min(SIDE_SPEED, math.sqrt(1.6 * SIDE_ACCELERATION * abs(error)), abs(error) / 0.6)
    steepest = min(MAX_SLOPE, MAX_SWING / v.length)
    slope = min(side / max(mean, 1.0), steepest)
    slope = slope if error > 0.0 else -slope
    turn = SIDE_ACCELERATION / max(mean, 5.0) * min(1.0, 0.5 * mean) * dt
    v.slope = min(max(slope, v.slope - turn), v.slope + turn)

    angle = math.atan(v.slope)
    v.s = advance(pieces, v.s, v.d, mean * math.cos(angle) * dt)
    v.d += mean * math.sin(angle) * dt
    v.x, v.y, heading[i] = pose_at(pieces, v.s, v.d)
    yaw = heading[i] + angle
    rate = ((yaw - v.yaw + math.pi) % (2.0 * math.pi) - math.pi) / dt
    v.yaw = yaw
    v.throttle = min(max(a, 0.0) / MAX_ACCELERATION, 1.0)
    v.brake = min(max(-a, 0.0) / MAX_BRAKING, 1.0)
    v.steer = math.atan(v.wheelbase * rate / mean) / MAX_STEER if mean > 1.0 else 0.0
    v.brake_light = a < (-0.3 if v.brake_light else -0.8)


# Placing the traffic.

_LANE_BORDERS = (0.22, 0.48, 0.75)  # cumulated shares of the lanes, left to right
_LANE_SPEED = ((17.0, 20.0), (16.0, 19.0), (14.8, 17.5), (14.0, 16.0))  # m/s, desired speeds of cars and vans
_HEAVY_SHARE = (0.0, 0.0, 0.2, 0.5)  # of trucks and buses among the vehicles of a lane
_HEAVY_SPEED = (14.0, 16.0)  # m/s
_ONCOMING_SPEED = (21.0, 19.0, 17.0, 15.0)  # m/s a lane
_SPACING = (24.0, 14.0, 8.0)  # m free in the own lane: wished, and what is taken when the ring fills up
_TRIES = 40  # positions tried at each spacing
_CLEAR_AROUND_EGO = 40.0  # m before and behind it

_LIGHT_KINDS = [i for i, kind in enumerate(KINDS) if kind.body in (CAR, VAN)]
_HEAVY_KINDS = [i for i, kind in enumerate(KINDS) if kind.body in (TRUCK, BUS)]


def populate(road: Road, seed: int, vehicles: int, oncoming: int, taken: NDArray[np.void]) -> NDArray[np.void]:
    """Draw traffic for the ring.

    Args:
        seed: of a PCG64 generator; equal arguments give equal traffic.
        vehicles: on the own carriageway.
        oncoming: on the other carriageway, at one constant speed a lane.
        taken: table of VEHICLE rows that are there already; no vehicle comes within 40 m of one a client drives.

    Returns:
        The new rows (vehicles + oncoming,) of VEHICLE with all but their ids.

    Raises:
        UserError: they do not fit on the ring.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    table = np.zeros(len(taken) + vehicles + oncoming, VEHICLE)
    table[: len(taken)] = taken
    for i in range(len(taken), len(table)):
        row = table[i]
        draw = rng.random(8)
        lane = int(np.searchsorted(_LANE_BORDERS, draw[0], side="right"))
        heavy = draw[1] < _HEAVY_SHARE[lane]
        kinds = _HEAVY_KINDS if heavy else _LIGHT_KINDS
        kind = kinds[int(draw[2] * len(kinds))]
        colors = KINDS[kind].colors
        fill_kind(row, kind, colors[int(draw[3] * len(colors))])
        own = i < len(taken) + vehicles
        row["driver"] = TRAFFIC if own else ONCOMING
        row["lane"] = row["home_lane"] = lane
        row["leftmost_lane"] = LANES - 2 if heavy else 0
        low, high = _HEAVY_SPEED if heavy else _LANE_SPEED[lane]
        row["desired_speed"] = low + (high - low) * draw[4]
        row["headway"] = 1.0 + 0.6 * draw[5] + 0.3 * heavy
        row["vigour"] = (0.8 if heavy else 1.3) + 0.4 * draw[6]
        row["think_in"] = THINK_PERIOD * draw[7]
        row["speed"] = row["desired_speed"] if own else _ONCOMING_SPEED[lane]
        row["d"] = lane_center(lane) if own else -lane_center(lane)
        row["s"] = _free_place(table[: i + 1], road.length, rng.random(_TRIES * len(_SPACING)))
        if row["s"] < 0.0:
            raise UserError(
                f"The ring of {road.length:.0f} m has no room for {vehicles} vehicles and {oncoming} oncoming "
                "ones; ask for fewer."
            )
    rows = table[len(taken) :]
    x, y, heading = road.pose(rows["s"], rows["d"])
    rows["x"], rows["y"] = x, y
    rows["yaw"] = np.where(rows["driver"] == ONCOMING, heading + math.pi, heading)
    rows["vx"] = rows["speed"] * np.cos(rows["yaw"])
    rows["vy"] = rows["speed"] * np.sin(rows["yaw"])
    return rows


def fill_kind(row: np.void, kind: int, color: tuple[int, int, int]) -> None:
    """Write kind, colour and measures into one row of VEHICLE."""
    row["kind"], row["color"] = kind, color
    for name in ("length", "width", "wheelbase", "mass"):
        row[name] = getattr(KINDS[kind], name)


@njit(cache=True, nogil=True)
def _free_place(table, ring, draws):
    """The first of the drawn places, s = draw * ring, that is free for the table's last row; -1 without one.

    Its d, length and driver are known. Each spacing gets its share of the draws.
    """
    v = table[-1]
    for k in range(draws.shape[0]):
        s = draws[k] * ring
        spacing = _SPACING[k // _TRIES]
        free = True
        for i in range(table.shape[0] - 1):
            w = table[i]
            apart = abs((w.s - s + 0.5 * ring) % ring - 0.5 * ring)
            if w.driver == CLIENT and v.d > 0.0:
                free &= apart > _CLEAR_AROUND_EGO
            elif abs(w.d - v.d) < 0.5 * LANE_WIDTH:
                free &= apart > spacing + 0.5 * (w.length + v.length)
        if free:
            return s
    return -1.0
