"""The ring: closed, smooth, invertible, and the same road for carla.Map."""

from __future__ import annotations

import itertools

import carla
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.simulator.road import (
    CURVATURE,
    HEADING0,
    LANES,
    LENGTH,
    MAP_NAME,
    PAVED_EDGE,
    S0,
    X0,
    Y0,
    Road,
    lane_center,
)

ROAD = Road.ring()


def test_pieces_join_without_gap_or_kink_and_the_ring_closes():
    ends = ROAD.pieces[:, S0] + ROAD.pieces[:, LENGTH]
    headings = ROAD.pieces[:, HEADING0] + ROAD.pieces[:, CURVATURE] * ROAD.pieces[:, LENGTH]
    assert np.allclose(ends[:-1], ROAD.pieces[1:, S0], atol=1e-9)
    assert np.allclose(headings[:-1], ROAD.pieces[1:, HEADING0], atol=1e-12)
    assert abs(headings[-1] - headings[0]) == pytest.approx(2 * np.pi, abs=1e-9) or headings[-1] == pytest.approx(
        ROAD.pieces[0, HEADING0] - 2 * np.pi, abs=1e-9
    )
    for end, start in zip(ends, [*ROAD.pieces[1:, [X0, Y0]], ROAD.pieces[0, [X0, Y0]]], strict=True):
        x, y, _ = ROAD.pose(end - 1e-9, 0.0)
        assert np.hypot(x - start[0], y - start[1]) < 1e-8


def test_both_carriageways_are_clear_of_the_rest_of_the_ring():
    s = np.arange(0.0, ROAD.length, 2.0)
    x, y, _ = ROAD.pose(s, 0.0)
    along = np.abs((s[:, None] - s + ROAD.length / 2) % ROAD.length - ROAD.length / 2)
    apart = np.hypot(x[:, None] - x, y[:, None] - y)
    assert apart[along > 100.0].min() > 2 * PAVED_EDGE + 20.0


@given(st.floats(0.0, 1.0, exclude_max=True), st.floats(-100.0, 100.0))
def test_projection_inverts_pose(fraction, d):
    s = fraction * ROAD.length
    x, y, heading = ROAD.pose(s, d)
    s_back, d_back, heading_back = ROAD.project(x, y)
    assert abs((s_back - s + ROAD.length / 2) % ROAD.length - ROAD.length / 2) < 1e-6
    assert d_back == pytest.approx(d, abs=1e-6)
    assert np.cos(heading_back - heading) == pytest.approx(1.0, abs=1e-9)


@given(st.floats(-1500.0, 1500.0), st.floats(-1500.0, 1500.0))
def test_projection_is_the_nearest_point(x, y):
    s, d, _ = ROAD.project(x, y)
    fx, fy, _ = ROAD.pose(s, 0.0)
    dense_x, dense_y, _ = ROAD.pose(np.arange(0.0, ROAD.length, 1.0), 0.0)
    found = np.hypot(fx - x, fy - y)
    assert found <= np.hypot(dense_x - x, dense_y - y).min() + 1e-6
    assert abs(d) <= found + 1e-6


def test_carla_map_has_the_same_lanes_to_a_centimetre():
    carla_map = carla.Map(MAP_NAME, ROAD.opendrive())
    rng = np.random.default_rng(0)
    for _ in range(500):
        piece, lane = int(rng.integers(len(ROAD.pieces))), int(rng.integers(LANES))
        ds = float(rng.uniform(0.0, ROAD.pieces[piece, LENGTH]))
        waypoint = carla_map.get_waypoint_xodr(piece + 1, -2 - lane, ds)
        place, rotation = waypoint.transform.location, waypoint.transform.rotation
        x, y, heading = ROAD.pose(ROAD.pieces[piece, S0] + ds, lane_center(lane))
        assert np.hypot(place.x - x, place.y - y) < 0.01
        assert np.cos(np.radians(rotation.yaw) - heading) > 1 - 1e-6
        assert waypoint.lane_width == pytest.approx(3.6)


def test_carla_map_projects_onto_the_same_lane():
    carla_map = carla.Map(MAP_NAME, ROAD.opendrive())
    rng = np.random.default_rng(1)
    for s in rng.uniform(0.0, ROAD.length, 500):
        lane = int(rng.integers(LANES))
        x, y, _ = ROAD.pose(s, lane_center(lane) + rng.uniform(-1.5, 1.5))
        waypoint = carla_map.get_waypoint(carla.Location(float(x), float(y), 0.0))
        _, d, _ = ROAD.project(waypoint.transform.location.x, waypoint.transform.location.y)
        assert waypoint.lane_id == -2 - lane
        assert d == pytest.approx(lane_center(lane), abs=0.01)


def test_carla_map_follows_the_ring_without_end():
    carla_map = carla.Map(MAP_NAME, ROAD.opendrive())
    x, y, _ = ROAD.spawn_points[0]
    start = waypoint = carla_map.get_waypoint(carla.Location(x, y, 0.0))
    travelled = 0.0
    while travelled < ROAD.length * 1.1:
        (following,) = waypoint.next(5.0)
        travelled += following.transform.location.distance(waypoint.transform.location)
        waypoint = following
        assert waypoint.lane_id == start.lane_id


EVERY_LANE = {  # by id, from the left edge of the road to its right one
    5: carla.LaneType.Shoulder,
    **dict.fromkeys(range(4, 0, -1), carla.LaneType.Driving),
    -1: carla.LaneType.Median,
    **dict.fromkeys(range(-2, -6, -1), carla.LaneType.Driving),
    -6: carla.LaneType.Shoulder,
}


@pytest.fixture(scope="module")
def carla_map():
    return carla.Map(MAP_NAME, ROAD.opendrive())


def all_waypoints(carla_map, at=0.37):
    """One on every lane of every piece."""
    for piece, length in enumerate(ROAD.pieces[:, LENGTH].tolist()):
        for lane in EVERY_LANE:
            yield carla_map.get_waypoint_xodr(piece + 1, lane, at * length)


def test_lanes_are_where_their_number_says(carla_map):
    borders = [2.0, *(2.0 + 3.6 * i for i in range(1, LANES + 1)), 2.0 + 3.6 * LANES + 2.6]
    middles = {-2 - i: 0.5 * (a + b) for i, (a, b) in enumerate(itertools.pairwise(borders))}
    middles |= {1 + i: -0.5 * (a + b) for i, (a, b) in enumerate(itertools.pairwise(borders))}
    middles[-1] = 0.0
    for waypoint in all_waypoints(carla_map):
        place = waypoint.transform.location
        _, d, heading = ROAD.project(place.x, place.y)
        assert waypoint.lane_type == EVERY_LANE[waypoint.lane_id]
        assert d == pytest.approx(middles[waypoint.lane_id], abs=0.01)
        against = waypoint.lane_id > 0
        assert np.cos(np.radians(waypoint.transform.rotation.yaw) - heading) == pytest.approx(-1.0 if against else 1.0)
        found = carla_map.get_waypoint(place, lane_type=carla.LaneType.Any)
        assert (found.lane_id, found.lane_type) == (waypoint.lane_id, waypoint.lane_type)


@pytest.mark.parametrize("turn", ["get_left_lane", "get_right_lane"])
def test_a_walk_that_stops_at_the_next_driving_lane_ends(carla_map, turn):
    for start in all_waypoints(carla_map):
        walked, lane = [start.lane_id], getattr(start, turn)()
        while lane is not None and lane.lane_type != carla.LaneType.Driving:
            assert lane.lane_id not in walked
            walked.append(lane.lane_id)
            lane = getattr(lane, turn)()
        if lane is None:
            assert turn == "get_right_lane"
            assert walked[-1] in (5, -6)


def test_lanes_lie_beside_each_other_as_one_drives_on_them(carla_map):
    for start in all_waypoints(carla_map):
        right = start.get_right_lane()
        outer = None if start.lane_id in (5, -6) else start.lane_id + (1 if start.lane_id > 0 else -1)
        assert (right and right.lane_id) == outer
        if right is not None and start.lane_id != -1:
            assert right.get_left_lane().lane_id == start.lane_id


def test_every_lane_leads_on_and_back(carla_map):
    for start in all_waypoints(carla_map):
        (ahead,) = start.next(30.0)
        (back,) = ahead.previous(30.0)
        assert ahead.lane_id == back.lane_id == start.lane_id
        assert ahead.lane_type == back.lane_type == start.lane_type
        assert back.transform.location.distance(start.transform.location) < 0.1
        run = start.next_until_lane_end(10.0)
        assert {(w.road_id, w.lane_id) for w in run} == {(start.road_id, start.lane_id)}
        assert start.previous_until_lane_start(10.0)


def test_generated_waypoints_and_topology_hold_both_carriageways(carla_map):
    driving = {i for i, kind in EVERY_LANE.items() if kind == carla.LaneType.Driving}
    every = carla_map.generate_waypoints(10.0)
    assert {w.lane_id for w in every} == driving
    assert len(every) == pytest.approx(2 * LANES * ROAD.length / 10.0, rel=0.05)
    ends = carla_map.get_topology()
    assert len(ends) == 2 * LANES * len(ROAD.pieces)
    for begin, end in ends:
        assert begin.lane_id == end.lane_id
        assert begin.lane_id in driving


lane_places = st.tuples(
    st.integers(0, len(ROAD.pieces) - 1), st.sampled_from(sorted(EVERY_LANE)), st.floats(0.01, 0.99)
)


@given(lane_places, st.floats(0.5, 400.0))
def test_from_anywhere_the_way_on_and_back_is_as_long_as_it_was_asked_for(carla_map, place, distance):
    piece, lane, share = place
    start = carla_map.get_waypoint_xodr(piece + 1, lane, share * float(ROAD.pieces[piece, LENGTH]))
    (ahead,), (behind,) = start.next(distance), start.previous(distance)
    for there, back in ((ahead, ahead.previous), (behind, behind.next)):
        assert (there.lane_id, there.lane_type) == (start.lane_id, start.lane_type)
        (again,) = back(distance)
        assert again.transform.location.distance(start.transform.location) < 0.2
    s, d, _ = (float(v) for v in ROAD.project(start.transform.location.x, start.transform.location.y))
    on, beside, _ = (float(v) for v in ROAD.project(ahead.transform.location.x, ahead.transform.location.y))
    gone = (on - s) * (1 if lane < 0 else -1) % ROAD.length
    assert gone == pytest.approx(distance, abs=0.2) or gone == pytest.approx(distance - ROAD.length, abs=0.2)
    assert beside == pytest.approx(d, abs=0.02)


@given(lane_places)
def test_neighbours_lie_a_lane_apart_at_the_same_place_of_the_road(carla_map, place):
    piece, lane, share = place
    start = carla_map.get_waypoint_xodr(piece + 1, lane, share * float(ROAD.pieces[piece, LENGTH]))
    for side, neighbour in ((-1.0, start.get_left_lane()), (1.0, start.get_right_lane())):
        if neighbour is None:
            continue
        (s0, d0), (s1, d1) = (
            [float(v) for v in ROAD.project(w.transform.location.x, w.transform.location.y)[:2]]
            for w in (start, neighbour)
        )
        assert min(abs(s1 - s0), ROAD.length - abs(s1 - s0)) < 0.1
        assert abs(d1 - d0) == pytest.approx((start.lane_width + neighbour.lane_width) / 2, abs=0.05)
        assert (d1 - d0) * side * (1.0 if lane < 0 else -1.0) > 0.0


def test_the_topology_leads_around_and_back_to_where_it_began(carla_map):
    after = {(a.road_id, a.lane_id): (b.road_id, b.lane_id) for a, b in carla_map.get_topology()}
    for start in after:
        way = [start]
        while (there := after[way[-1]]) != start:
            assert there not in way
            way.append(there)
        assert len(way) == len(ROAD.pieces)


def test_the_median_is_marked_yellow_on_both_sides(carla_map):
    for waypoint in all_waypoints(carla_map):
        if waypoint.lane_id in (-1, 1, -2):
            left = waypoint.left_lane_marking
            assert (left.type, left.color) == (carla.LaneMarkingType.Solid, carla.LaneMarkingColor.Yellow)
            assert left.lane_change == carla.LaneChange.NONE
    for lane, side in ((-5, "right"), (4, "right")):
        edge = getattr(carla_map.get_waypoint_xodr(1, lane, 5.0), f"{side}_lane_marking")
        assert (edge.type, edge.color) == (carla.LaneMarkingType.Solid, carla.LaneMarkingColor.White)


def test_spawn_points_survive_float32():
    points = ROAD.spawn_points
    assert np.array_equal(points[:, :2], points[:, :2].astype(np.float32).astype(np.float64))
    assert np.array_equal(points[:, 2], np.radians(np.degrees(points[:, 2]).astype(np.float32).astype(np.float64)))
    _, d, _ = ROAD.project(points[:, 0], points[:, 1])
    assert np.abs(d - np.tile([lane_center(i) for i in range(LANES)], len(points) // LANES)).max() < 1e-3
