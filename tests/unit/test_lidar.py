"""Lidar beams end on the surfaces that the cameras show."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.simulator import lidar, sensors
from carla_digr.simulator.lidar import NOTHING, Beams, scan
from carla_digr.simulator.renderer import camera_axes, depths, instances
from carla_digr.simulator.road import Road
from carla_digr.simulator.shading import ID_RAIL, ID_VEGETATION
from carla_digr.simulator.world import World

ROAD = Road.ring()
LEVEL = Beams(channels=1, range=150.0, points_per_second=7200, upper_fov=0.0, lower_fov=0.0)


def busy(seed: int) -> World:
    world = World(ROAD)
    ego = world.spawn_vehicle(0, *ROAD.spawn_points[3 * seed])
    world.spawn_traffic(seed, 60, ego)
    return world


def above(world: World, height: float, pitch: float = 0.0, turned: float = 0.0):
    """The pose of a sensor over the first vehicle."""
    ego = world.vehicles[0]
    return float(ego["x"]), float(ego["y"]), height, pitch, float(ego["yaw"]) + turned, 0.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9), height=st.floats(2.0, 6.0), pitch=st.floats(-0.4, 0.2), turned=st.floats(-3.1, 3.1))
def test_beams_end_where_the_cameras_look(seed, height, pitch, turned):
    world, size, fov = busy(seed), 96, 80.0
    pose, table = above(world, height, pitch, turned), world.drawn()
    focal = size / 2 / math.tan(math.radians(fov) / 2)
    rows, columns = np.mgrid[:size, :size] + 0.5
    rays = np.stack([np.full((size, size), focal), columns - size / 2, size / 2 - rows], axis=-1).reshape(-1, 3)
    along = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    found, ids, cosines = lidar.cast(ROAD, np.array(pose[:3]), table, along @ camera_axes(*pose[3:]), 110.0, 0)
    seen = instances(ROAD, pose, size, size, fov, table).ravel()
    depth = depths(ROAD, pose, size, size, fov, table).ravel() / along[:, 0]
    # Leaves are drawn with holes, and rails' posts, which a beam may pass; lines are as wide as their pixels there.
    solid = (depth < 100.0) & ~np.isin(seen, (ID_VEGETATION, ID_RAIL)) & ~np.isin(ids, (ID_VEGETATION, ID_RAIL))
    assert solid.sum() > 500
    assert np.mean(np.abs(found - depth)[solid] < 0.01 * depth[solid] + 0.02) > 0.99
    assert np.mean(ids[solid] == seen[solid]) > 0.98
    assert ((cosines[ids != NOTHING] > 0) & (cosines[ids != NOTHING] <= 1 + 1e-9)).all()
    assert (found[ids == NOTHING] == 110.0).all()


def test_a_turn_takes_as_long_as_it_should_and_a_part_of_it_is_that_part():
    world = busy(1)
    pose = above(world, 2.4)
    whole = scan(ROAD, pose, world.drawn(), LEVEL, 0.0, 0.1)
    parts, angle = [], 0.0
    for _ in range(4):
        part = scan(ROAD, pose, world.drawn(), LEVEL, angle, 0.025)
        parts.append(part.points)
        angle = part.angle
    assert whole.angle == pytest.approx(0.0) and angle == pytest.approx(0.0)
    np.testing.assert_allclose(np.concatenate(parts), whole.points, atol=1e-5)


def test_channels_are_told_apart_and_within_range():
    world = busy(2)
    beams = Beams(channels=8, range=40.0, points_per_second=8000, upper_fov=5.0, lower_fov=-25.0)
    seen = scan(ROAD, above(world, 2.4), world.drawn(), beams, 90.0, 0.05)
    assert seen.counts.sum() == len(seen.points) == len(seen.ids) and len(seen.counts) == 8
    distance = np.linalg.norm(seen.points, axis=1)
    assert distance.max() <= 40.0
    channel = np.repeat(np.arange(8), seen.counts)
    np.testing.assert_allclose(
        np.degrees(np.arcsin(seen.points[:, 2] / distance)), np.linspace(5.0, -25.0, 8)[channel], atol=1e-3
    )


def test_echoes_get_lost_as_the_attributes_say_and_alike_for_equal_seeds():
    world = busy(3)
    seen = scan(ROAD, above(world, 2.4), world.drawn(), Beams(range=80.0), 0.0, 1.0)
    given_ = {
        "noise_seed": 7,
        "noise_stddev": 0.1,
        "atmosphere_attenuation_rate": 0.01,
        "dropoff_general_rate": 0.3,
        "dropoff_intensity_limit": 0.5,
        "dropoff_zero_intensity": 1.0,
    }
    counts, echoes = sensors.Echoes(given_)(seen)
    again = sensors.Echoes(given_)(seen)
    assert counts.sum() == len(echoes) and (again[1] == echoes).all()
    distance = np.linalg.norm(seen.points, axis=1)
    kept = 0.7 * np.minimum(np.exp(-0.01 * distance) / 0.5, 1.0)
    assert len(echoes) == pytest.approx(kept.sum(), abs=5 * math.sqrt((kept * (1 - kept)).sum()))
    lossless = sensors.Echoes({**given_, "dropoff_general_rate": 0.0, "dropoff_zero_intensity": 0.0})(seen)[1]
    displaced = np.linalg.norm(lossless["point"], axis=1) - distance
    assert len(lossless) == len(distance) and displaced.std() == pytest.approx(0.1, rel=0.05)
    np.testing.assert_allclose(lossless["intensity"], np.exp(-0.01 * distance), rtol=1e-5)


def test_a_frame_of_the_usual_lidar_takes_a_fraction_of_a_frame():
    world = busy(4)
    pose, table = above(world, 2.4), world.drawn()
    scan(ROAD, pose, table, Beams(range=100.0), 0.0, 0.05)
    took = []
    for _ in range(20):
        begun = time.process_time()
        scan(ROAD, pose, table, Beams(range=100.0), 0.0, 0.05)
        took.append(time.process_time() - begun)
    assert min(took) < 0.010  # 1.1 ms on a core of an AMD EPYC
