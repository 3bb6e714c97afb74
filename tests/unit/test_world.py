"""The world: the same calls give the same bits, contacts are what geometry says, bad input changes nothing."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from carla_digr.errors import UserError
from carla_digr.simulator.contacts import RAIL_HALF_WIDTH, box_overlap
from carla_digr.simulator.road import BARRIER_HALF_WIDTH, LANE_WIDTH, RAIL_OFFSET, Road, lane_center
from carla_digr.simulator.traffic import CLIENT
from carla_digr.simulator.vehicle import KINDS
from carla_digr.simulator.world import STATIC, Camera, SpawnCollision, World

ROAD = Road.ring()
LANE_1 = lane_center(1)


def world_with_ego(s=100.0, d=LANE_1, speed=0.0, kind=0):
    """A world with one client's vehicle along the road, and its id."""
    world = World(ROAD)
    x, y, yaw = (float(value) for value in ROAD.pose(s, d))
    ego = world.spawn_vehicle(kind, x, y, yaw)
    world.set_target_velocity(ego, speed * math.cos(yaw), speed * math.sin(yaw))
    return world, ego


def eventful_drive(steps=400):
    """A world in which two clients' vehicles drive wildly through traffic that comes and goes."""
    world = World()
    points = world.road.spawn_points
    first = world.spawn_vehicle(0, *points[10])
    second = world.spawn_vehicle(8, *points[31])
    world.set_target_velocity(first, 20.0 * math.cos(points[10, 2]), 20.0 * math.sin(points[10, 2]))
    world.spawn_traffic(7, 64, first)
    for k in range(steps):
        world.set_control(first, 0.6, 0.002 * math.sin(0.1 * k), 0.8 if k % 90 > 75 else 0.0)
        world.set_control(second, 0.4, 0.0, 0.0, hand_brake=k % 200 > 150, reverse=k % 300 > 280)
        if k == 250:
            world.destroy_traffic()
            world.place(first, *points[77])
            world.spawn_traffic(8, 40, second)
        world.step()
    return world


def digest(world):
    return hashlib.sha256(world.vehicles.tobytes() + repr((world.frame, world.elapsed)).encode()).hexdigest()


def test_the_same_calls_give_the_same_bits_also_in_another_process():
    here = digest(eventful_drive())
    assert here == digest(eventful_drive())
    code = "from tests.unit.test_world import *; print(digest(eventful_drive()))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == here


def test_a_drive_continues_from_a_stored_state_bit_for_bit():
    world = eventful_drive(333)
    resumed = World()
    resumed.spawn_traffic(99, 5)
    resumed.set_state(world.get_state())
    for w in (world, resumed):
        for _ in range(150):
            w.step()
    assert digest(world) == digest(resumed)
    assert world.new_id() == resumed.new_id()


def test_a_stored_state_is_a_copy():
    world, ego = world_with_ego(speed=10.0)
    state = world.get_state()
    world.step()
    assert state["vehicles"]["x"][0] != world.vehicle(ego).x


def test_a_state_of_another_table_layout_is_refused():
    with pytest.raises(ValueError, match="another version"):
        World().set_state({"vehicles": np.zeros(3), "frame": 0, "last_id": 0, "elapsed": 0.0})


def test_inputs_are_rounded_to_float32():
    a, ego = world_with_ego(speed=20.0)
    b, _ = world_with_ego(speed=20.0)
    a.set_control(ego, 0.1, 0.003, 0.0)
    b.set_control(ego, float(np.float32(0.1)), float(np.float32(0.003)), 0.0)
    a.set_target_velocity(ego, 17.3, 0.1)
    b.set_target_velocity(ego, float(np.float32(17.3)), float(np.float32(0.1)))
    for _ in range(50):
        a.step()
        b.step()
    assert digest(a) == digest(b)


def test_a_long_step_is_several_short_ones():
    a, ego = world_with_ego(speed=20.0)
    b, _ = world_with_ego(speed=20.0)
    for w in (a, b):
        w.spawn_traffic(3, 30, ego)
    a.step(0.1)
    b.step(0.05)
    b.step(0.05)
    assert a.vehicles.tobytes() == b.vehicles.tobytes()
    assert (a.frame, b.frame) == (1, 2)
    with pytest.raises(ValueError, match="forward"):
        a.step(0.0)


# Contacts.

boxes = st.tuples(
    st.floats(-6, 6), st.floats(-6, 6), st.floats(-math.pi, math.pi), st.floats(0.5, 6), st.floats(0.4, 2)
).map(np.array)


def corners(box):
    """(4, 2) corners in order."""
    x, y, yaw, length, width = box
    forward, right = np.array([math.cos(yaw), math.sin(yaw)]), np.array([-math.sin(yaw), math.cos(yaw)])
    return np.array(
        [(x, y) + i * length * forward + j * width * right for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
    )


def common_area(a, b):
    """Area of the intersection: box a clipped by the four half planes of box b (Sutherland and Hodgman, 1974)."""
    polygon = list(corners(a))
    for normal_yaw, reach in ((0.0, b[3]), (math.pi, b[3]), (math.pi / 2, b[4]), (-math.pi / 2, b[4])):
        normal = np.array([math.cos(b[2] + normal_yaw), math.sin(b[2] + normal_yaw)])
        inside = [reach - normal @ (p - b[:2]) for p in polygon]
        clipped = []
        for k in range(len(polygon)):
            p, q, u, v = polygon[k - 1], polygon[k], inside[k - 1], inside[k]
            if (u >= 0) != (v >= 0):
                clipped.append(p + (q - p) * u / (u - v))
            if v >= 0:
                clipped.append(q)
        polygon = clipped
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2


@given(boxes, boxes)
@settings(max_examples=300)
def test_boxes_overlap_exactly_when_their_intersection_has_an_area(a, b):
    depth, _, _ = box_overlap(a, b)
    assume(abs(depth) > 1e-3)
    assert (depth > 0) == (common_area(a, b) > 0)


@given(boxes, boxes)
@settings(max_examples=200)
def test_moving_by_the_depth_along_the_normal_parts_two_boxes_and_less_does_not(a, b):
    depth, nx, ny = box_overlap(a, b)
    assume(depth > 1e-3)
    assert nx * (b[0] - a[0]) + ny * (b[1] - a[1]) >= 0.0
    shift = np.array([nx, ny, 0.0, 0.0, 0.0])
    assert box_overlap(a, b + 1.001 * depth * shift)[0] <= 0.0
    assert common_area(a, b + 0.99 * depth * shift) > 0.0


def clearances(row):
    """Free metres to the barrier and to the guard rail, from points of the outline a few centimetres apart."""
    outline = corners((row.x, row.y, row.yaw, 0.5 * row.length, 0.5 * row.width))
    part = np.linspace(0.0, 1.0, 200)[:, None]
    points = np.concatenate([a + part * (b - a) for a, b in zip(outline, np.roll(outline, -1, axis=0), strict=True)])
    side = -1.0 if row.d < 0.0 else 1.0
    offsets = side * ROAD.project(points[:, 0], points[:, 1])[1]
    return offsets.min() - BARRIER_HALF_WIDTH, RAIL_OFFSET - RAIL_HALF_WIDTH - offsets.max()


@given(
    st.integers(0, len(KINDS) - 1),
    st.floats(0, 2700),
    st.one_of(st.floats(-21, -15), st.floats(-5, 5), st.floats(15, 21)),
    st.floats(-math.pi, math.pi),
)
@settings(max_examples=200)
def test_barrier_and_rails_are_touched_exactly_where_the_outline_reaches_them(kind, s, d, angle):
    world = World(ROAD)
    vehicle = world.spawn_vehicle(kind, *(float(v) for v in ROAD.pose(20.0, lane_center(2))))
    x, y, heading = (float(v) for v in ROAD.pose(s, d))
    world.place(vehicle, x, y, heading + angle)
    to_barrier, to_rail = clearances(world.vehicle(vehicle))
    assume(abs(to_barrier) > 0.02 and abs(to_rail) > 0.02)
    world.step()
    assert bool(world.collisions) == (to_barrier < 0.0 or to_rail < 0.0)
    if world.collisions:
        (contact,) = world.collisions
        nearer = "static.barrier" if to_barrier < to_rail else "static.guardrail"
        assert (contact.id, contact.other, contact.other_name) == (vehicle, STATIC, nearer)
        assert min(clearances(world.vehicle(vehicle))) > -0.02, "it was not put back beside the obstacle"


def test_a_rear_end_collision_is_felt_by_both_and_keeps_the_momentum():
    world, ego = world_with_ego(s=100.0, speed=15.0)
    x, y, yaw = (float(v) for v in ROAD.pose(120.0, LANE_1))
    other = world.spawn_vehicle(8, x, y, yaw)
    while not world.collisions:
        before = world.vehicle(ego).speed
        world.step()
        assert world.frame < 100
    mine, theirs = world.collisions
    assert (mine.id, mine.other, mine.other_name) == (ego, other, KINDS[8].blueprint)
    assert (theirs.id, theirs.other, theirs.other_name) == (other, ego, KINDS[0].blueprint)
    assert np.allclose(mine.impulse, -np.array(theirs.impulse))
    assert np.hypot(*mine.impulse[:2]) > 1000.0
    momentum = KINDS[0].mass * world.vehicle(ego).speed + KINDS[8].mass * world.vehicle(other).speed
    assert momentum == pytest.approx(KINDS[0].mass * before, rel=0.02)
    assert world.vehicle(ego).speed == pytest.approx(world.vehicle(other).speed, abs=0.1)


# Coming and going.


def test_a_pose_that_went_through_float32_degrees_is_the_spawn_point_again():
    world = World(ROAD)
    for index in (0, 17, 101, 200):
        x, y, yaw = ROAD.spawn_points[index]
        degrees = float(np.float32(math.degrees(yaw))) + 0.01
        vehicle = world.spawn_vehicle(0, float(np.float32(x)) + 0.004, y - 0.003, math.radians(degrees))
        row = world.vehicle(vehicle)
        assert (row.x, row.y, row.yaw) == (x, y, yaw)
        world.place(vehicle, x + 0.5, y, yaw)
        assert world.vehicle(vehicle).x == float(np.float32(x + 0.5))


def test_nothing_is_spawned_into_a_vehicle_the_barrier_or_a_rail():
    world, ego = world_with_ego(s=100.0)
    before = world.get_state()
    for s, d, what in ((102.0, LANE_1, "vehicle 1"), (300.0, 0.5, "barrier"), (300.0, 19.0, "guard rail")):
        x, y, yaw = (float(v) for v in ROAD.pose(s, d))
        with pytest.raises(SpawnCollision, match=what):
            world.spawn_vehicle(0, x, y, yaw)
    assert issubclass(SpawnCollision, UserError)
    assert world.ids() == [ego]
    assert world.get_state()["vehicles"].tobytes() == before["vehicles"].tobytes()


def test_ids_are_never_used_again_and_rows_follow_their_ids():
    world = World(ROAD)
    ids = [world.spawn_vehicle(i % len(KINDS), *point) for i, point in enumerate(ROAD.spawn_points[::2])]
    place = {i: (world.vehicle(i).x, world.vehicle(i).y) for i in ids}
    assert len(ids) > 64 and len(set(ids)) == len(ids)
    for i in ids[::3]:
        assert world.destroy(i)
        assert not world.destroy(i)
    assert world.ids() == [i for i in ids if i not in ids[::3]]
    assert all((world.vehicle(i).x, world.vehicle(i).y) == place[i] for i in world.ids())
    assert world.new_id() > max(ids)


def test_destroying_the_traffic_leaves_the_clients_vehicles():
    world, ego = world_with_ego()
    world.spawn_traffic(1, 64, ego)
    assert len(world.ids()) == 1 + 64 + 24
    world.destroy_traffic()
    assert world.ids() == [ego]
    assert world.vehicle(ego).driver == CLIENT


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_no_usable_number_is_refused_and_changes_nothing(bad):
    world, ego = world_with_ego(speed=10.0)
    before = world.vehicles.tobytes()
    for call in (
        lambda: world.set_control(ego, bad, 0.0, 0.0),
        lambda: world.set_control(ego, 0.0, bad, 0.0),
        lambda: world.set_control(ego, 0.0, 0.0, bad),
        lambda: world.set_target_velocity(ego, bad, 0.0),
        lambda: world.place(ego, bad, 0.0, 0.0),
        lambda: world.spawn_vehicle(0, 0.0, bad, 0.0),
    ):
        with pytest.raises(ValueError, match="number"):
            call()
    assert world.vehicles.tobytes() == before


def test_an_unknown_vehicle_is_named():
    world = World(ROAD)
    for call in (
        lambda: world.vehicle(5),
        lambda: world.place(5, 0.0, 0.0, 0.0),
        lambda: world.set_control(5, 0.0, 0.0, 0.0),
        lambda: world.set_target_velocity(5, 0.0, 0.0),
        lambda: world.spawn_traffic(1, 10, 5),
    ):
        with pytest.raises(KeyError, match="5"):
            call()


# Motion.


@given(st.floats(0, 2700), st.floats(-20, 30), st.floats(0, 1), st.floats(-1, 1), st.floats(0, 1), st.booleans())
@settings(max_examples=100)
def test_velocity_acceleration_and_yaw_rate_are_those_of_the_motion(s, speed, throttle, steer, brake, reverse):
    world, ego = world_with_ego(s=s, d=lane_center(2), speed=speed)
    world.set_control(ego, throttle, 0.05 * steer, brake, reverse=reverse)
    world.step()
    assume(not world.collisions)
    a = world.vehicle(ego).copy()
    world.step()
    assume(not world.collisions)
    b = world.vehicle(ego)
    assert math.hypot(b.x - a.x, b.y - a.y) == pytest.approx(0.025 * abs(a.speed + b.speed), abs=2e-3)
    assert (b.vx, b.vy) == pytest.approx((b.speed * math.cos(b.yaw), b.speed * math.sin(b.yaw)))
    assert (b.ax, b.ay) == pytest.approx(((b.vx - a.vx) / 0.05, (b.vy - a.vy) / 0.05), abs=1e-5)
    assert b.yaw == pytest.approx(a.yaw + 0.05 * b.yaw_rate, abs=1e-9) or abs(b.yaw - a.yaw) > 6.0
    assert ROAD.pose(b.s, b.d)[:2] == (pytest.approx(b.x, abs=1e-6), pytest.approx(b.y, abs=1e-6))


def test_a_client_that_holds_its_lane_drives_a_full_lap_without_a_jump():
    world, ego = world_with_ego(s=5.0, d=LANE_1, speed=22.0)
    travelled, last = 0.0, world.vehicle(ego).s
    for _ in range(2600):
        row = world.vehicle(ego)
        heading = float(ROAD.pose(row.s, row.d)[2])
        angle = (row.yaw - heading + math.pi) % (2 * math.pi) - math.pi
        bend = ROAD.curvature(row.s) / (1 - ROAD.curvature(row.s) * row.d)
        wheel = math.atan(row.wheelbase * (bend - 0.3 * angle - 0.02 * (row.d - LANE_1)))
        world.set_control(ego, 0.0855, wheel / math.radians(70.0), 0.0)
        world.step()
        row = world.vehicle(ego)
        assert not world.collisions and abs(row.d - LANE_1) < 0.25 * LANE_WIDTH
        travelled += (row.s - last + 0.5 * ROAD.length) % ROAD.length - 0.5 * ROAD.length
        last = row.s
    assert travelled > ROAD.length + 50.0


# Pictures.


def test_a_camera_on_a_vehicle_sees_what_one_in_its_place_sees():
    world, ego = world_with_ego(s=700.0, speed=20.0)
    world.spawn_traffic(5, 64, ego)
    world.step()
    pitch = math.radians(-9.0)
    row = world.vehicle(ego)
    x, y = row.x - 9.5 * math.cos(row.yaw), row.y - 9.5 * math.sin(row.yaw)
    carried = world.render(Camera(ego, -9.5, 0.0, 4.2, pitch, 0.0, 0.0, 128, 96, 48.0))
    standing = world.render(Camera(0, x, y, 4.2, pitch, row.yaw, 0.0, 128, 96, 48.0))
    assert carried.shape == (96, 128, 4) and carried.dtype == np.uint8
    assert np.array_equal(carried, standing)
    assert not np.array_equal(carried, world.render(Camera(0, x, y, 9.0, pitch, row.yaw, 0.0, 128, 96, 48.0)))
