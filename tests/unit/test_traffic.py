"""The world's drivers: they hit nobody, change lanes safely, keep the order of the lanes, and can be overtaken."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from carla_digr.driving.control import (
    ACTIONS,
    BRAKE,
    CRUISE_SPEED,
    WHEEL_ANGLE,
    VehicleCommand,
    pedals,
)
from carla_digr.errors import UserError
from carla_digr.simulator.planner import Planner
from carla_digr.simulator.road import LANE_WIDTH, LANES, ROAD_EDGE, Road, lane_center
from carla_digr.simulator.traffic import (
    BACK_ROOM,
    CLIENT,
    CLIENT_CLOSING_TIME,
    EMERGENCY_BRAKING,
    FIRM_BRAKING,
    ONCOMING,
    TRAFFIC,
    VEHICLE,
    follow_acceleration,
    populate,
)
from carla_digr.simulator.vehicle import BUS, KINDS, MAX_BRAKING, MAX_STEER, TRUCK
from carla_digr.simulator.world import World

ROAD = Road.ring()
RING = ROAD.length
HEAVY = [i for i, kind in enumerate(KINDS) if kind.body in (TRUCK, BUS)]


def drivers(world):
    """The rows of the own carriageway's traffic, a copy."""
    return world.vehicles[world.vehicles["driver"] == TRAFFIC]


def ahead_of(row, others):
    """Signed distance along the road from a row to others, half a ring to both sides."""
    return (others["s"] - row["s"] + 0.5 * RING) % RING - 0.5 * RING


def start(seed, vehicles=64, speed=CRUISE_SPEED):
    """A world with traffic and a client's vehicle at ``speed`` on a spawn point drawn from the seed, and its id."""
    world = World(ROAD)
    points = ROAD.spawn_points
    x, y, yaw = points[np.random.default_rng(seed).integers(len(points))]
    ego = world.spawn_vehicle(0, x, y, yaw)
    world.set_target_velocity(ego, speed * math.cos(yaw), speed * math.sin(yaw))
    world.spawn_traffic(seed, vehicles, ego)
    return world, ego


def lane_keeping_steer(row, lane):
    """Steer in [-1, 1] that holds a vehicle in a lane."""
    heading = float(ROAD.pose(row.s, row.d)[2])
    angle = (row.yaw - heading + math.pi) % (2 * math.pi) - math.pi
    curvature = float(ROAD.curvature(row.s))
    wanted = curvature / (1 - curvature * row.d) - 0.3 * angle - 0.02 * (row.d - lane_center(lane))
    return math.atan(row.wheelbase * wanted) / MAX_STEER


def crafted(*vehicles):
    """A world with exactly these drivers: dicts of table fields; those not given are those of an ordinary car."""
    rows = populate(ROAD, 0, len(vehicles), 0, np.zeros(0, VEHICLE))
    for row, fields in zip(rows, vehicles, strict=True):
        lane = fields.get("lane", 0)
        given_fields = {
            "lane": lane,
            "home_lane": lane,
            "d": lane_center(lane),
            "leftmost_lane": 0,
            "headway": 1.2,
            "vigour": 1.4,
            "slope": 0.0,
            "length": 4.8,
            "width": 1.9,
        } | fields
        for name, value in given_fields.items():
            row[name] = value
        row["x"], row["y"], row["yaw"] = ROAD.pose(row["s"], row["d"])
    world = World(ROAD)
    rows["id"] = np.arange(1, len(rows) + 1)
    world.set_state({"vehicles": rows, "frame": 0, "last_id": len(rows), "elapsed": 0.0})
    return world


# The traffic by itself.


@pytest.mark.parametrize(("seed", "vehicles"), [(0, 64), (1, 64), (2, 64), (3, 120), (4, 200), (5, 20)])
def test_traffic_alone_drives_2000_steps_in_its_lanes_without_a_collision_or_an_emergency(seed, vehicles):
    world = World(ROAD)
    world.spawn_traffic(seed, vehicles)
    hardest = 0.0
    for _ in range(2000):
        world.step()
        assert not world.collisions
        rows = drivers(world)
        hardest = max(hardest, -(rows["ax"] * np.cos(rows["yaw"]) + rows["ay"] * np.sin(rows["yaw"])).min())
        assert (rows["d"] - 0.5 * rows["width"] > 2.0).all()
        assert (rows["d"] + 0.5 * rows["width"] < ROAD_EDGE).all()
        heavy = np.isin(rows["kind"], HEAVY)
        assert (rows["d"][heavy] > lane_center(2) - 0.2).all()
    assert hardest < FIRM_BRAKING + 0.2
    assert rows["lane_changes"].sum() > 0
    settled = np.abs(rows["d"] - [lane_center(lane) for lane in rows["lane"]]) < 0.05
    assert settled.mean() > 0.8


def test_the_right_lanes_are_slow_and_the_left_ones_fast():
    speeds = [[] for _ in range(LANES)]
    for seed in range(8):
        world = World(ROAD)
        world.spawn_traffic(seed)
        for _ in range(600):
            world.step()
        for row in drivers(world):
            speeds[row["lane"]].append(row["speed"])
    means = [np.mean(lane) for lane in speeds]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1] + 2.0
    assert max(means) + 2.0 < CRUISE_SPEED


def test_a_driver_goes_round_the_ring_without_a_jump():
    world = crafted({"s": 10.0, "lane": 3, "speed": 20.0, "desired_speed": 20.0})
    travelled, before = 0.0, world.vehicle(1).copy()
    for _ in range(2900):
        world.step()
        row = world.vehicle(1).copy()
        assert math.hypot(row.x - before.x, row.y - before.y) == pytest.approx(0.05 * row.speed, rel=1e-3)
        assert abs((row.yaw - before.yaw + math.pi) % (2 * math.pi) - math.pi) < 0.01
        travelled += float(ahead_of(before, row))
        before = row
    assert travelled > RING + 50.0


def test_oncoming_vehicles_drive_the_other_way_on_their_lanes():
    world = World(ROAD)
    world.spawn_traffic(3, 10, oncoming=60)
    before = world.vehicles[world.vehicles["driver"] == ONCOMING].copy()
    assert len(before) == 60 and (before["d"] < -2.0).all()
    for _ in range(2000):
        world.step()
        assert not world.collisions
        after = world.vehicles[world.vehicles["driver"] == ONCOMING]
        assert (after["d"] == before["d"]).all()
        moved = ahead_of(before, after)
        assert (moved < 0.0).all()
        headings = ROAD.pose(after["s"], after["d"])[2]
        assert np.allclose(np.cos(after["yaw"] - headings), -1.0, atol=1e-3)
        before = after.copy()


def test_a_driver_that_is_put_elsewhere_goes_on_in_the_lane_it_finds_itself_in():
    world = crafted({"s": 500.0, "lane": 3, "home_lane": 1, "speed": 15.0, "desired_speed": 15.0})
    world.place(1, *(float(v) for v in ROAD.pose(900.0, lane_center(1) + 0.5)))
    for _ in range(400):
        world.step()
        assert abs(world.vehicle(1).d - lane_center(1)) < 0.51
    assert abs(world.vehicle(1).d - lane_center(1)) < 0.05
    assert world.vehicle(1).speed > 10.0


# Placing.


def test_equal_seeds_give_equal_traffic_and_others_other_traffic():
    worlds = []
    for seed in (5, 5, 6):
        world, _ = start(11)
        world.destroy_traffic()
        world.spawn_traffic(seed, 64)
        worlds.append(world.vehicles["s"].copy())
    assert np.array_equal(worlds[0], worlds[1])
    assert not np.array_equal(worlds[0], worlds[2])


@given(st.integers(0, 2**32), st.integers(0, 160))
@settings(max_examples=25)
def test_traffic_starts_apart_and_leaves_40_m_around_the_client(seed, vehicles):
    world, ego = start(seed, vehicles)
    rows = drivers(world)
    assert len(rows) == vehicles
    assert (np.abs(ahead_of(world.vehicle(ego), rows)) > 40.0).all()
    for row in rows:
        lane = rows[(rows["lane"] == row["lane"]) & (rows["id"] != row["id"])]
        gaps = np.abs(ahead_of(row, lane)) - 0.5 * (lane["length"] + row["length"])
        assert (gaps > 7.9).all()
    before = world.vehicles.copy()
    world.step()
    assert not world.collisions
    assert (np.hypot(world.vehicles["x"] - before["x"], world.vehicles["y"] - before["y"]) < 1.3).all()


def test_more_traffic_than_fits_is_refused_and_nothing_is_spawned():
    world, ego = start(1, 10)
    before = world.ids()
    with pytest.raises(UserError, match="no room for 900 vehicles"):
        world.spawn_traffic(1, 900, ego)
    assert world.ids() == before


# Following.


@given(st.floats(0, 30), st.floats(0, 30), st.floats(0.5, 2.0), st.floats(EMERGENCY_BRAKING, 14.6), st.floats(0, 1))
@example(0.0, 28.0, 2.0, 9.0, 0.015625)
@settings(max_examples=150)
def test_a_driver_stops_behind_a_leader_from_any_gap_from_which_it_can(speed, leader, headway, strongest, pedal):
    """``strongest`` is what the leader could brake, ``pedal`` the part of it that it does."""
    gap = speed**2 / (2 * EMERGENCY_BRAKING) + 0.05 * speed - leader**2 / (2 * strongest) + 1.6
    gap = max(gap, 1.6)
    for _ in range(4000):  # 200 s: a gap that opened to a faster leader takes more than half of them to close
        a = follow_acceleration(speed, 25.0, headway, 1.4, gap, leader, strongest, 0.05)
        assert -EMERGENCY_BRAKING <= a <= 1.4
        new, new_leader = max(speed + 0.05 * a, 0.0), max(leader - 0.05 * pedal * strongest, 0.0)
        gap += 0.025 * (leader + new_leader - speed - new)
        speed, leader = new, new_leader
        assert gap > 0.0
        if speed == 0.0 and leader == 0.0:
            return
    assert abs(speed - leader) < 1.0 or leader > 20.0


WAYS = {
    "stops": lambda t: (0.0 if t > 3.0 else 18.0, 1.0, False),
    "brakes hard again and again": lambda t: (0.0 if t % 8.0 > 5.0 else 17.0, 1.0, False),
    "pulls the hand brake too": lambda t: (0.0 if t % 8.0 > 5.0 else 17.0, 1.0, True),
    "crawls": lambda t: (3.0, 0.4, False),
    "stops and goes": lambda t: ((16.0, 2.0, 12.0, 0.0, 8.0)[int(t / 3.5) % 5], 0.7, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_nobody_strikes_a_client_that(way, long):
    for seed in range(200 if long else 6):
        world, ego = start(seed, vehicles=90, speed=16.0)
        lane = int((world.vehicle(ego).d - 2.0) // LANE_WIDTH)
        for k in range(700):
            row = world.vehicle(ego)
            speed, pedal, hand_brake = WAYS[way](0.05 * k)
            rows = drivers(world)
            gap = ahead_of(row, rows) - 0.5 * (rows["length"] + row.length)
            near = (gap > -3.0) & (np.abs(rows["d"] - row.d) < 2.6)
            near &= gap < 4.0 + row.speed + np.maximum(row.speed**2 - rows["speed"] ** 2, 0.0) / 12.0
            throttle, brake = float(row.speed < speed), pedal * float(row.speed > speed + 0.3 or speed == 0.0)
            if near.any():  # the client itself strikes nobody either
                throttle, brake = 0.0, 1.0
            world.set_control(ego, throttle, lane_keeping_steer(row, lane), brake, hand_brake and brake > 0.0)
            world.step()
            assert not world.collisions, (seed, k, world.collisions)


@given(st.floats(0.0, 3.5), st.floats(0.0, 60.0), st.sampled_from([0, 2]))
@settings(max_examples=40)
def test_a_driver_in_mid_lane_change_sees_a_client_that_stands_in_its_new_lane(after, more, lane):
    """The client appears ``after`` seconds into the change, no nearer than a driver needs to stop."""
    world = crafted(
        {"s": 500.0, "lane": 1, "home_lane": lane, "speed": 18.0, "desired_speed": 20.0, "think_in": 0.0},
        {"s": 540.0, "lane": 1, "speed": 14.0, "desired_speed": 14.0, "think_in": 1e9},
    )
    while world.vehicle(1).lane == 1:
        world.step()
        assert world.elapsed < 20.0
    changed = world.elapsed
    assert world.vehicle(1).lane == lane
    while world.elapsed < changed + after:
        world.step()
    driver = world.vehicle(1)
    stopping = driver.speed**2 / (2 * EMERGENCY_BRAKING) + 0.05 * driver.speed + 1.6
    x, y, yaw = (float(v) for v in ROAD.pose(driver.s + stopping + 4.9 + more, lane_center(lane)))
    ego = world.spawn_vehicle(0, x, y, yaw)
    for _ in range(400):
        world.set_control(ego, 0.0, 0.0, 1.0)
        world.step()
        assert not world.collisions


# Changing lanes.


def test_nobody_cuts_in_on_a_client_that_holds_its_speed():
    begun = 0
    for seed in range(8):
        world, ego = start(seed, vehicles=90)
        lane = int((world.vehicle(ego).d - 2.0) // LANE_WIDTH)
        changes = world.vehicles["lane_changes"].copy()
        for _ in range(1000):
            row = world.vehicle(ego)
            throttle, brake = pedals(VehicleCommand(0.0, target_speed=CRUISE_SPEED), row.speed)
            world.set_control(ego, throttle, lane_keeping_steer(row, lane), brake)
            before = world.vehicles.copy()
            world.step()
            if any(c.id == ego for c in world.collisions):
                break  # it ran into somebody, as one does who neither brakes nor steers
            new = world.vehicles[world.vehicles["lane_changes"] > changes]
            changes = world.vehicles["lane_changes"].copy()
            begun += len(new)
            for driver in new[new["lane"] == lane]:
                was = before[before["id"] == driver["id"]][0]
                gap = abs(float(ahead_of(before[0], was))) - 0.5 * (was["length"] + row.length)
                behind = float(ahead_of(before[0], was)) > 0.0
                assert (
                    gap
                    > (BACK_ROOM + CLIENT_CLOSING_TIME * (before[0]["speed"] - was["speed"]) if behind else 4.0) * 0.9
                )
    assert begun > 20


def test_a_faster_driver_overtakes_a_slower_one_and_returns_to_its_lane():
    world = crafted(
        {"s": 500.0, "lane": 2, "speed": 17.0, "desired_speed": 18.0},
        {"s": 560.0, "lane": 2, "speed": 14.0, "desired_speed": 14.0, "leftmost_lane": 2, "length": 8.6, "width": 2.5},
    )
    while float(ahead_of(world.vehicle(1), world.vehicle(2))) > -60.0 or world.vehicle(1).lane != 2:
        world.step()
        assert not world.collisions and world.elapsed < 90.0
    assert world.vehicle(1).lane_changes == 2
    assert world.vehicle(2).lane_changes == 0


def test_two_drivers_do_not_choose_the_same_gap():
    """Both sides of an empty lane want it at the same moment: one waits."""
    for offset in (-4.0, 0.0, 4.0):
        world = crafted(
            {"s": 500.0, "lane": 1, "home_lane": 2, "speed": 16.0, "desired_speed": 16.0, "think_in": 0.0},
            {"s": 500.0 + offset, "lane": 3, "home_lane": 2, "speed": 16.0, "desired_speed": 16.0, "think_in": 0.0},
        )
        for _ in range(600):
            world.step()
            assert not world.collisions
        assert drivers(world)["lane_changes"].min() == 0 or abs(ahead_of(world.vehicle(1), world.vehicle(2))) > 10.0


def test_a_row_that_blocks_every_lane_falls_apart():
    world = crafted(
        *({"s": 500.0 + 2.0 * lane, "lane": lane, "speed": 15.0, "desired_speed": 15.0} for lane in range(LANES))
    )
    for _ in range(600):
        world.step()
        assert not world.collisions
    rows = drivers(world)
    spread = max(float(ahead_of(a, b)) for a in rows for b in rows)
    assert spread > 28.0
    assert rows["speed"].min() > 12.0


# The reference driver.


@pytest.mark.slow
def test_the_planner_drives_19_of_20_episodes_of_50_s_clean_and_overtakes(long):
    clean, overtaken, episodes = 0, 0, 200 if long else 20
    for seed in range(episodes):
        world, ego = start(seed)
        world.step()
        planner = Planner((-WHEEL_ANGLE, 0.0, WHEEL_ANGLE), CRUISE_SPEED, BRAKE * MAX_BRAKING)
        ahead = ahead_of(world.vehicle(ego), world.vehicles) > 0.0
        for _ in range(1000):
            wanted = tuple(ACTIONS["wheels"].values())[planner.observe(world, ego)]
            throttle, brake = pedals(wanted, world.vehicle(ego).speed)
            world.set_control(ego, throttle, wanted.steer, brake)
            world.step()
            relative = ahead_of(world.vehicle(ego), world.vehicles)
            passed = ahead & (relative < 0.0) & (relative > -100.0) & (world.vehicles["driver"] == TRAFFIC)
            overtaken += passed.sum()
            ahead = relative > 0.0
            if world.collisions or not 2.0 < world.vehicle(ego).d < ROAD_EDGE:
                break
        else:
            clean += 1
        assert world.vehicle(ego).driver == CLIENT
    print(f"{clean} of {episodes} clean, {overtaken} overtaken")
    assert clean == episodes if long else clean >= 19
    assert overtaken > 3 * episodes
