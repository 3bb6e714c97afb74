"""Normals, optical flow, events and radar points against the depths and pictures of the same camera."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.simulator.events import LEAST_THRESHOLD, LUMA, Contrast, EventCamera
from carla_digr.simulator.optics import Look, flow, normals
from carla_digr.simulator.radar import Cone, detections
from carla_digr.simulator.renderer import Pose, camera_axes
from carla_digr.simulator.road import Road
from carla_digr.simulator.sensors import normals_picture
from carla_digr.simulator.shading import ID_BARRIER, ID_LINE, ID_ROAD, ID_SKY, ID_TERRAIN, ID_VEGETATION
from carla_digr.simulator.vehicle import KINDS, TRUCK
from carla_digr.simulator.world import Camera, World

ROAD = Road.ring()
SIZE, FOV = 96, 70.0
FOCAL = SIZE / 2 / math.tan(math.radians(FOV) / 2)


def busy(seed: int) -> World:
    world = World(ROAD)
    ego = world.spawn_vehicle(0, *ROAD.spawn_points[3 * seed])
    world.set_target_velocity(
        ego, *(20.0 * math.cos(world.vehicle(ego)["yaw"]), 20.0 * math.sin(world.vehicle(ego)["yaw"]))
    )
    world.spawn_traffic(seed, 60, ego)
    world.step()
    return world


def camera(world: World, pitch: float = -0.15, turned: float = 0.0, roll: float = 0.0) -> Camera:
    return Camera(int(world.vehicles["id"][0]), -6.0, 0.3, 3.5, pitch, turned, roll, SIZE, SIZE, FOV)


def rays(pose: Pose) -> np.ndarray:
    """(SIZE, SIZE, 3), of one metre along the optical axis."""
    j, i = np.mgrid[:SIZE, :SIZE] + 0.5
    inside = np.stack([np.ones((SIZE, SIZE)), (i - SIZE / 2) / FOCAL, (SIZE / 2 - j) / FOCAL], axis=-1)
    return inside @ camera_axes(*pose[3:])


def points(world: World, eye: Camera) -> np.ndarray:
    """(SIZE, SIZE, 3), where in the world each pixel lies."""
    pose = world.pose(eye)
    with np.errstate(invalid="ignore"):
        return np.array(pose[:3]) + rays(pose) * world.depths(eye)[..., None].astype(float)


views = st.tuples(st.integers(0, 8), st.floats(-0.4, 0.1), st.floats(-3.0, 3.0), st.floats(-0.3, 0.3))


@pytest.mark.filterwarnings("ignore:invalid value")  # of points of the sky
@settings(max_examples=10, deadline=None)
@given(views)
def test_normals_are_those_of_the_surface_that_the_depths_have(view):
    seed, *angles = view
    world = busy(seed)
    eye = camera(world, *angles)
    facing = normals(world.depths(eye), world.instances(eye), world.pose(eye), FOV)
    ids, place = world.instances(eye), points(world, eye)
    assert (facing[ids == ID_SKY] == 0.0).all()
    assert (facing[np.isin(ids, (ID_ROAD, ID_LINE, ID_TERRAIN))] == (0.0, 0.0, 1.0)).all()
    np.testing.assert_allclose(np.linalg.norm(facing[ids != ID_SKY], axis=-1), 1.0, atol=1e-5)
    assert ((facing * rays(world.pose(eye))).sum(axis=-1)[ids != ID_SKY] < 1e-4).all()  # they look at the camera
    # Where five pixels in a row lie in one straight line of space they are of one face: its normal stands on it.
    checked = 0
    for axis in (0, 1):
        shift = [np.roll(place, -k, axis) for k in (-2, -1, 0, 1, 2)]
        same = np.all([np.roll(ids, -k, axis) == ids for k in (-2, -1, 1, 2)], axis=0) & (ids > 0)
        along = shift[3] - shift[1]
        length = np.linalg.norm(along, axis=-1)
        with np.errstate(invalid="ignore"):
            bend = sum(
                np.linalg.norm(np.cross(s - shift[2], along), axis=-1) / length**2
                for s in (shift[0], shift[1], shift[4])
            )
        inside = np.zeros((SIZE, SIZE), bool)
        inside[2:-2, 2:-2] = True
        flat = same & inside & (bend < 1e-3) & (world.depths(eye) < 60.0)
        lean = np.abs((facing * along).sum(axis=-1)[flat]) / length[flat]
        assert np.quantile(lean, 0.95) < 0.02 if lean.size else True
        checked += int(flat.sum())
    assert checked > 0 or (ids > 0).sum() < 500


def test_normals_of_a_truck_and_of_the_barrier_are_known():
    world = World(ROAD)
    kind = next(i for i, k in enumerate(KINDS) if k.body == TRUCK)
    x, y, yaw = (float(v) for v in ROAD.spawn_points[0])
    world.spawn_vehicle(kind, x, y, yaw)
    behind = Camera(0, x - 12.0 * math.cos(yaw), y - 12.0 * math.sin(yaw), 1.5, 0.0, yaw, 0.0, 41, 41, 8.0)
    facing = normals(world.depths(behind), world.instances(behind), world.pose(behind), 8.0)
    np.testing.assert_allclose(facing[20, 20], (-math.cos(yaw), -math.sin(yaw), 0.0), atol=1e-3)
    picture = normals_picture(world, behind)
    np.testing.assert_allclose(picture[20, 20, 2::-1] / 127.5 - 1.0, facing[20, 20], atol=0.005)
    left = Camera(0, x, y, 1.2, -0.2, yaw - math.pi / 2, 0.0, 41, 41, 8.0)  # onto the barrier's steep face
    at, ids = normals(world.depths(left), world.instances(left), world.pose(left), 8.0), world.instances(left)
    assert (ids == ID_BARRIER).sum() > 50
    across = at[ids == ID_BARRIER] @ (-math.sin(yaw), math.cos(yaw), 0.0)
    assert np.median(across) > 0.7


@settings(max_examples=8, deadline=None)
@given(views, st.integers(1, 3))
def test_flow_leads_back_to_the_same_point_of_the_same_thing(view, frames):
    """What a pixel shows was, before, where its flow says: there the picture before has the same place of it."""
    seed, *angles = view
    world = busy(seed)
    eye = camera(world, *angles)

    def look() -> Look:
        movers = world.movers()
        return Look(world.pose(eye), movers[:, 0].astype(np.int64), movers[:, 1:4])

    before, place_before, ids_before = look(), points(world, eye), world.instances(eye)
    table_before = world.movers()
    for _ in range(frames):
        world.step()
    now, place, ids = look(), points(world, eye), world.instances(eye)
    moved = flow(world.depths(eye), ids, FOV, now, before)
    j, i = np.mgrid[:SIZE, :SIZE] + 0.5
    u, v = i - moved[..., 0] * SIZE / 2, j + moved[..., 1] * SIZE / 2
    inside = (u > 1) & (u < SIZE - 1) & (v > 1) & (v < SIZE - 1) & np.isfinite(place).all(axis=-1)
    row, column = v[inside].astype(int), u[inside].astype(int)
    same = (ids_before[row, column] == ids[inside]) & (ids[inside] != ID_VEGETATION)
    there, here, thing = place_before[row, column], place[inside].copy(), ids[inside]
    table = world.movers()
    for ident in np.unique(thing[thing > 0]):
        (a,), (b,) = table[table[:, 0] == ident], table_before[table_before[:, 0] == ident]
        turn = b[3] - a[3]
        offset = here[thing == ident] - (a[1], a[2], 0.0)
        c, s = math.cos(turn), math.sin(turn)
        here[thing == ident] = offset @ np.array([(c, s, 0), (-s, c, 0), (0, 0, 1)]) + (b[1], b[2], 0.0)
    with np.errstate(invalid="ignore"):
        miss = np.linalg.norm(there - here, axis=-1)[same]
    distance = world.depths(eye)[inside][same]
    near = distance < 25.0
    assert same.mean() > 0.8
    # Half a pixel of the picture before, seen at a slant, is what it may be beside.
    assert np.quantile(miss[near], 0.9) < 1.5 if near.any() else True
    assert np.median(miss[near] / distance[near]) < 0.05 if near.any() else True
    assert np.abs(moved[ids == ID_SKY]).max(initial=0.0) < 0.3


def test_flow_of_a_known_approach():
    """Straight on at a wall: a point at the edge of the picture goes outwards by focal * x * (1/Z - 1/(Z + step))."""
    depth, ids = np.full((SIZE, SIZE), 10.0, np.float32), np.full((SIZE, SIZE), -6, np.int32)
    none = np.zeros(0, np.int64), np.zeros((0, 3))
    now, before = Look((0, 0, 1, 0, 0, 0), *none), Look((-1.0, 0, 1, 0, 0, 0), *none)
    moved = flow(depth, ids, FOV, now, before)
    edge = (SIZE / 2 - 0.5) / FOCAL * 10.0
    pixels = FOCAL * edge * (1 / 10.0 - 1 / 11.0)
    assert moved[SIZE // 2, -1, 0] * SIZE / 2 == pytest.approx(pixels, rel=1e-4)
    assert moved[0, SIZE // 2, 1] * SIZE / 2 == pytest.approx(pixels, rel=1e-4)  # upwards is positive
    assert moved[SIZE // 2, 0, 0] < 0.0 < -moved[-1, SIZE // 2, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.floats(0.05, 0.6), st.floats(0.05, 0.6), st.booleans(), st.sampled_from([0, 10**7])
)
def test_events_are_the_changes_of_brightness(seed, up, down, use_log, rest):
    draw = np.random.default_rng(seed)
    contrast = Contrast(up, down, refractory_period_ns=rest, use_log=use_log)
    eye, at = EventCamera(contrast, 0), 3.0
    pictures = np.clip(draw.integers(0, 255, (5, 6, 1)) + draw.integers(-9, 9, (4, 5, 6, 4)), 0, 255).astype(np.uint8)
    level = pictures[..., :3] @ np.array(LUMA)
    level = np.log(0.001 + level / 255) if use_log else level
    assert len(eye(pictures[0], at)) == 0
    reference = level[0].copy()
    last: dict[tuple[int, int], int] = {}
    for number, picture in enumerate(pictures[1:], start=1):
        events = eye(picture, at + 0.05 * number)
        assert (np.diff(events["t"]) >= 0).all()
        begun = round((at + 0.05 * (number - 1)) * 1e9)
        assert ((events["t"] >= begun) & (events["t"] <= begun + 50_000_001)).all()
        if rest:
            for event in events:
                key = int(event["y"]), int(event["x"])
                assert event["t"] - last.get(key, -(10**18)) >= rest
                last[key] = int(event["t"])
            continue
        for event in events:
            change = level[number][event["y"], event["x"]] - level[number - 1][event["y"], event["x"]]
            assert (change > 0) == event["pol"]
            reference[event["y"], event["x"]] += up if event["pol"] else -down
        moved = level[number] - level[number - 1]
        gap = level[number] - reference
        assert (gap[moved > 1e-6] < up + 1e-6).all() and (gap[moved < -1e-6] > -down - 1e-6).all()
    assert LEAST_THRESHOLD > 0.0


def test_radar_points_lie_where_the_depths_are_and_tell_how_things_come_nearer():
    world = busy(2)
    ego = world.vehicle(int(world.vehicles["id"][0]))
    pose = (float(ego["x"]), float(ego["y"]), 2.0, -0.05, float(ego["yaw"]), 0.0)
    own = float(ego["vx"]), float(ego["vy"])
    seen = detections(world, pose, own, Cone(40.0, 10.0, 90.0, 40_000), 0.05, np.random.default_rng(1))
    assert 200 < len(seen) <= 2000
    velocity, azimuth, altitude, distance = seen.T.astype(float)
    assert np.abs(np.degrees(azimuth)).max() <= 20.01 and np.abs(np.degrees(altitude)).max() <= 5.01
    assert distance.max() <= 90.0
    forward = np.cos(altitude) * np.cos(azimuth)
    a, b = np.tan(azimuth), np.tan(altitude) / np.cos(azimuth)
    eye = Camera(0, *pose, 400, 400, 44.0)
    focal = 200 / math.tan(math.radians(22.0))
    row, column = (200 - b * focal).astype(int), (200 + a * focal).astype(int)
    depth, ids = world.depths(eye)[row, column], world.instances(eye)[row, column]
    beside = np.abs(depth - distance * forward) < 0.05 * distance + 0.3
    assert beside[ids != ID_VEGETATION].mean() > 0.9
    movers = {int(row[0]): row for row in world.movers()}
    ray = np.stack([forward, np.cos(altitude) * np.sin(azimuth), np.sin(altitude)], axis=-1) @ camera_axes(*pose[3:])
    hit = beside & (ids > 0)
    expected = [(movers[int(i)][4:] - own) @ r[:2] for i, r in zip(ids[hit], ray[hit], strict=True)]
    assert hit.sum() > 5
    assert np.mean(np.abs(velocity[hit] - expected) < 1e-3) > 0.9
    ground = beside & (ids < 0)
    np.testing.assert_allclose(velocity[ground], -(ray[ground, :2] @ own), atol=1e-3)
