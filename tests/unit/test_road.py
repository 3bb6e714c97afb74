"""The ring: closed, smooth, invertible, and the same road for carla.Map."""

from __future__ import annotations

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


def test_spawn_points_survive_float32():
    points = ROAD.spawn_points
    assert np.array_equal(points[:, :2], points[:, :2].astype(np.float32).astype(np.float64))
    assert np.array_equal(points[:, 2], np.radians(np.degrees(points[:, 2]).astype(np.float32).astype(np.float64)))
    _, d, _ = ROAD.project(points[:, 0], points[:, 1])
    assert np.abs(d - np.tile([lane_center(i) for i in range(LANES)], len(points) // LANES)).max() < 1e-3
