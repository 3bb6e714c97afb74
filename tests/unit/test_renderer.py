"""The renderer against an independent pinhole projection in numpy, and properties any camera must keep."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.errors import UserError
from carla_digr.simulator.bodies import models
from carla_digr.simulator.palette import PALETTES
from carla_digr.simulator.renderer import VehicleTable, _draw, camera_axes, depths, instances, render
from carla_digr.simulator.road import (
    DASH_LENGTH,
    LANE_WIDTH,
    LANES,
    LINE_WIDTH,
    MEDIAN_HALF_WIDTH,
    PAVED_EDGE,
    RAIL_OFFSET,
    ROAD_EDGE,
    Road,
    lane_center,
)
from carla_digr.simulator.shading import ID_BARRIER, ID_LINE, ID_RAIL, ID_ROAD, ID_SKY, ID_TERRAIN
from carla_digr.simulator.vehicle import BUS, CAR, KINDS, TRUCK

ROAD = Road.ring()
FOV = 48.0


def vehicles(*rows) -> VehicleTable:
    """Rows of (id, kind, x, y, yaw, brake light)."""
    ids, kind, x, y, yaw, brake = (list(column) for column in zip(*rows, strict=True))
    color = [KINDS[k].colors[0] for k in kind]
    return VehicleTable(
        np.array(ids, np.int32),
        np.array(kind, np.int64),
        np.array(x, np.float64),
        np.array(y, np.float64),
        np.array(yaw, np.float64),
        np.array(color, np.uint8),
        np.array(brake, np.bool_),
    )


def on_road(ident: int, kind: int, s: float, d: float, brake: bool = False):
    x, y, heading = (float(v) for v in ROAD.pose(s, d))
    return ident, kind, x, y, heading + (math.pi if d < 0 else 0.0), brake


def chase(s: float, d: float):
    """The training camera behind a car at (s, d)."""
    x, y, yaw = (float(v) for v in ROAD.pose(s, d))
    return x - 9.5 * math.cos(yaw), y - 9.5 * math.sin(yaw), 4.2, math.radians(-9.0), yaw, 0.0


def busy(s: float, seed: int) -> VehicleTable:
    """An ego on lane 1 and 27 others ahead, on all eight lanes."""
    rng = np.random.default_rng(seed)
    rows = [on_road(1, 0, s, lane_center(1))]
    for i in range(27):
        side = 1 if i % 3 else -1
        rows.append(
            on_road(
                i + 2,
                int(rng.integers(len(KINDS))),
                s + 12 + 7.0 * i,
                side * lane_center(int(rng.integers(LANES))),
                bool(i % 2),
            )
        )
    return vehicles(*rows)


def project(pose, width: int, height: int, fov: float, points) -> np.ndarray:
    """(N, 3): column, row (pixels, continuous) and depth (m) of world points; CARLA's pinhole written out anew."""
    x, y, z, pitch, yaw, roll = pose
    p = np.atleast_2d(points) - (x, y, z)
    # Undo yaw about z, then pitch about the camera's y, then roll about its x (left-handed, y to the right).
    c, s = math.cos(yaw), math.sin(yaw)
    p = np.stack([p[:, 0] * c + p[:, 1] * s, p[:, 1] * c - p[:, 0] * s, p[:, 2]], axis=1)
    c, s = math.cos(pitch), math.sin(pitch)
    p = np.stack([p[:, 0] * c + p[:, 2] * s, p[:, 1], p[:, 2] * c - p[:, 0] * s], axis=1)
    c, s = math.cos(roll), math.sin(roll)
    p = np.stack([p[:, 0], p[:, 1] * c - p[:, 2] * s, p[:, 2] * c + p[:, 1] * s], axis=1)
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    return np.stack([width / 2 + focal * p[:, 1] / p[:, 0], height / 2 - focal * p[:, 2] / p[:, 0], p[:, 0]], axis=1)


def box_corners(row) -> np.ndarray:
    _, kind, x, y, yaw, _ = row
    k = KINDS[kind]
    signs = np.array([(a, b, c) for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (0, 1)])
    local = signs * (k.length, k.width, k.height)
    c, s = math.cos(yaw), math.sin(yaw)
    return np.stack([x + local[:, 0] * c - local[:, 1] * s, y + local[:, 0] * s + local[:, 1] * c, local[:, 2]], axis=1)


def in_hull(corners: np.ndarray, points: np.ndarray, slack: float) -> np.ndarray:
    """Which points lie in the convex hull of 2-D corners, up to ``slack``: no direction separates them."""
    angle = np.linspace(0, 2 * math.pi, 1440, endpoint=False)
    directions = np.stack([np.cos(angle), np.sin(angle)])
    return ((points @ directions) <= (corners @ directions).max(axis=0) + slack).all(axis=1)


EDGES = [(MEDIAN_HALF_WIDTH, "yellow"), (ROAD_EDGE, "white")] + [
    (MEDIAN_HALF_WIDTH + i * LANE_WIDTH, "white") for i in range(1, LANES)
]


@settings(max_examples=60, deadline=None)
@given(
    s=st.floats(0, ROAD.length - 1e-6),
    edge=st.sampled_from(EDGES),
    own=st.booleans(),
    yaw=st.floats(-3, 3),
    roll=st.floats(-0.3, 0.3),
)
def test_painted_lines_lie_where_the_road_has_them_to_a_centimetre(s, edge, own, yaw, roll):
    offset, color = edge
    dashed = MEDIAN_HALF_WIDTH < offset < ROAD_EDGE
    if dashed:  # look at the end of a dash
        s = (math.floor(s / ROAD.dash_period) * ROAD.dash_period + DASH_LENGTH) % ROAD.length
    side = 1 if own else -1
    x, y, _ = (float(v) for v in ROAD.pose(s, side * offset))
    size, fov = 256, 10.0  # 5 mm a pixel
    pose = (x + 0.2, y - 0.1, 7.0, math.radians(-89.0), yaw, roll)
    picture = render(ROAD, pose, size, size, fov, VehicleTable.empty(), 0, 1).astype(int)
    ids = instances(ROAD, pose, size, size, fov, VehicleTable.empty())

    along = np.linspace(-0.4, 0.4, 41)
    if dashed:
        along = along[np.abs(along) > 0.011]
    for across, painted in ((-1, False), (1, False), (-1, True), (1, True)):
        # A centimetre outside or inside the line's border.
        half = 0.5 * LINE_WIDTH + (-0.01 if painted else 0.01)
        d = offset + math.copysign(half, across)
        px, py, _ = ROAD.pose((s + along) % ROAD.length, side * d)
        at = project(pose, size, size, fov, np.stack([px, py, np.zeros_like(px)], axis=1))
        seen = ((at[:, :2] >= 0) & (at[:, :2] < size)).all(axis=1)
        assert seen.sum() > 20
        column, row = at[seen, 0].astype(int), at[seen, 1].astype(int)
        expected = np.full(seen.sum(), painted) & ((along[seen] < 0) | (not dashed))
        np.testing.assert_array_equal(ids[row, column] == ID_LINE, expected)
        blue, green, red = (picture[row, column, i] for i in range(3))
        if color == "white":
            np.testing.assert_array_equal(blue > 170, expected)
        else:
            np.testing.assert_array_equal(red - blue > 90, expected)
        assert (abs(green - red)[~expected] < 25).all()  # asphalt is grey


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("turn", [0.0, math.pi / 2, math.pi, 2.5, -0.6])
def test_a_vehicle_covers_the_projection_of_its_box_and_nothing_beyond(kind, turn):
    x, y = -3000.0, 2500.0  # open country: nothing stands in the way
    row = (7, kind, x, y, 0.4, False)
    size, fov, far = 320, 12.0, 75.0
    yaw = 0.4 + turn
    height = KINDS[kind].height / 2
    pose = (x - far * math.cos(yaw), y - far * math.sin(yaw), height, 0.0, yaw, 0.0)
    silhouette = instances(ROAD, pose, size, size, fov, vehicles(row)) == 7
    alone = np.argwhere(silhouette)[:, ::-1] + 0.5
    hull = project(pose, size, size, fov, box_corners(row))[:, :2]
    assert in_hull(hull, alone, 1e-6).all()
    # The silhouette reaches the box's sides and roof (what perspective adds to the near end stays out) and the ground.
    middle = project(pose, size, size, fov, [(x, y, 0.0), (x, y, KINDS[kind].height)])
    assert alone[:, 1].max() >= middle[0, 1] - 2.0
    assert alone[:, 1].min() <= middle[1, 1] + 2.0
    assert np.ptp(alone[:, 0]) >= 0.93 * np.ptp(hull[:, 0])
    assert len(alone) >= 0.68 * np.ptp(hull[:, 0]) * np.ptp(hull[:, 1])


def test_every_model_stays_inside_its_box():
    mesh = models()
    for kind, vehicle in enumerate(KINDS):
        faces = slice(mesh.start[kind], mesh.start[kind + 1])
        corners = np.concatenate([c[:n] for c, n in zip(mesh.corners[faces], mesh.sides[faces], strict=True)])
        low, high = corners.min(axis=0), corners.max(axis=0)
        np.testing.assert_allclose(high[:2], (vehicle.length / 2, vehicle.width / 2), atol=1e-9)
        np.testing.assert_allclose(low, (-vehicle.length / 2, -vehicle.width / 2, 0.0), atol=1e-9)
        assert high[2] == pytest.approx(vehicle.height)


POSES = st.tuples(
    st.floats(-40, 40),
    st.floats(-40, 40),
    st.floats(0.3, 25),
    st.floats(-1.5, 1.2),
    st.floats(-3.2, 3.2),
    st.floats(-0.5, 0.5),
)
ROWS = st.lists(
    st.tuples(
        st.integers(0, len(KINDS) - 1),
        st.floats(-30, 30),
        st.floats(-30, 30),
        st.floats(-3.2, 3.2),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def around(pose):
    """The pose moved to a curve of the ring."""
    x, y, _ = (float(v) for v in ROAD.pose(330.0, 6.0))
    return pose[0] + x, pose[1] + y, *pose[2:]


def near_by(rows) -> VehicleTable:
    x, y, _ = (float(v) for v in ROAD.pose(330.0, 6.0))
    return vehicles(*((i + 1, kind, x + a, y + b, yaw, brake) for i, (kind, a, b, yaw, brake) in enumerate(rows)))


@settings(max_examples=60, deadline=None)
@given(
    pose=POSES,
    rows=ROWS,
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    fov=st.floats(5, 150),
    ss=st.integers(1, 3),
)
def test_any_camera_gives_the_same_opaque_picture_again(pose, rows, width, height, fov, ss):
    table = near_by(rows)  # vehicles may cross the near plane or enclose the camera
    first = render(ROAD, around(pose), width, height, fov, table, 0, ss)
    assert first.shape == (height, width, 4) and first.dtype == np.uint8 and first.flags.c_contiguous
    assert (first[..., 3] == 255).all()
    render(ROAD, chase(900.0, 6.0), width, height, fov, busy(900.0, 1), 2, ss)  # leaves its traces in the buffers
    np.testing.assert_array_equal(first, render(ROAD, around(pose), width, height, fov, table, 0, ss))


@settings(max_examples=60, deadline=None)
@given(pose=POSES, rows=ROWS, fov=st.floats(20, 90))
def test_culling_loses_nothing_a_wider_picture_shows(pose, rows, fov):
    table, pose = near_by(rows), around(pose)
    wide_fov = math.degrees(2 * math.atan(3 * math.tan(math.radians(fov) / 2)))
    narrow = instances(ROAD, pose, 48, 48, fov, table)
    wide = instances(ROAD, pose, 144, 144, wide_fov, table)[48:96, 48:96]
    assert (narrow != wide).mean() < 0.002  # pixel centres on an edge may fall to either side


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, len(KINDS) - 1)),
    gap=st.floats(12, 60),
    shift=st.floats(-4, 4),
    yaw=st.floats(-0.5, 0.5),
)
def test_the_nearer_vehicle_hides_the_farther_one(kinds, gap, shift, yaw):
    s = 30.0
    near = on_road(5, kinds[0], s, 7.0)
    far = on_road(9, kinds[1], s + gap, 7.0 + shift)
    far = (*far[:4], far[4] + yaw, False)
    pose = chase(s - 14, 7.0)

    def see(*rows):
        return instances(ROAD, pose, 128, 128, FOV, vehicles(*rows))

    near_alone, far_alone = see(near) == 5, see(far) == 9
    for both in (see(near, far), see(far, near)):
        np.testing.assert_array_equal(both == 5, near_alone)
        np.testing.assert_array_equal(both == 9, far_alone & ~near_alone)


@settings(max_examples=20, deadline=None)
@given(pose=POSES, seed=st.integers(0, 9), scenery=st.integers(0, 3))
def test_ids_without_colours_are_those_of_the_coloured_picture(pose, seed, scenery):
    pose, table, size = around(pose), busy(330.0, seed), 96
    _, coloured = _draw(ROAD, pose, size, size, FOV, table, 0, 1, seed=scenery)
    np.testing.assert_array_equal(instances(ROAD, pose, size, size, FOV, table, scenery), coloured)


@settings(max_examples=40, deadline=None)
@given(pose=POSES, seed=st.integers(0, 9), fov=st.floats(20, 120))
def test_depth_and_ray_of_a_pixel_lead_to_what_the_pixel_shows(pose, seed, fov):
    pose, table, size = around(pose), busy(330.0, seed), 96
    ids = instances(ROAD, pose, size, size, fov, table)
    depth = depths(ROAD, pose, size, size, fov, table).astype(float)
    np.testing.assert_array_equal(np.isinf(depth), ids == ID_SKY)

    axes = camera_axes(*pose[3:])
    offset = (np.arange(size) + 0.5 - size / 2) / (size / 2 / math.tan(math.radians(fov) / 2))
    rays = axes[0] + offset[None, :, None] * axes[1] - offset[:, None, None] * axes[2]
    points = np.array(pose[:3]) + np.where(np.isinf(depth), 0.0, depth)[..., None] * rays
    near = (depth < 400.0) & (np.abs(points[..., 2]) < 20.0)  # the road is projected exactly, roundings are not
    ground = np.isin(ids, (ID_ROAD, ID_LINE, ID_TERRAIN)) & near
    assert np.abs(points[ground][:, 2]).max(initial=0.0) < 1e-4
    _, d, _ = ROAD.project(points[..., 0], points[..., 1])
    clear = near & (np.abs(np.abs(d) - PAVED_EDGE) > 0.02 * depth)
    assert (np.abs(d)[clear & np.isin(ids, (ID_ROAD, ID_LINE))] < PAVED_EDGE).all()
    assert (np.abs(d)[clear & (ids == ID_TERRAIN)] > PAVED_EDGE).all()
    # Far pieces of the barrier and the rails are straight.
    assert np.abs(d[near & (ids == ID_BARRIER)]).max(initial=0.0) < 0.45
    assert np.abs(np.abs(d[near & (ids == ID_RAIL)]) - RAIL_OFFSET).max(initial=0.0) < 0.2
    for i, ident in enumerate(table.id):
        mine = points[ids == ident] - (table.x[i], table.y[i], 0.0)
        c, s = math.cos(table.yaw[i]), math.sin(table.yaw[i])
        kind = KINDS[table.kind[i]]
        slack = 1e-3
        assert (np.abs(mine[:, 0] * c + mine[:, 1] * s) < kind.length / 2 + slack).all()
        assert (np.abs(mine[:, 1] * c - mine[:, 0] * s) < kind.width / 2 + slack).all()
        assert ((mine[:, 2] > -slack) & (mine[:, 2] < kind.height + slack)).all()


def test_supersampling_changes_edges_only():
    pictures = [
        render(ROAD, chase(330.0, 5.6), 128, 128, FOV, busy(330.0, 3), 0, ss)[..., :3].astype(int) for ss in (1, 2, 3)
    ]
    for coarse, fine in pairwise(pictures):
        difference = np.abs(coarse - fine)
        assert 0 < difference.mean() < 2.5
        assert (difference.max(axis=2) > 24).mean() < 0.08


def test_a_finer_picture_averages_to_the_coarse_one():
    table = busy(80.0, 2)
    coarse = render(ROAD, chase(80.0, 5.6), 128, 128, FOV, table, 0, 2)[..., :3].astype(float)
    fine = render(ROAD, chase(80.0, 5.6), 512, 512, FOV, table, 0, 2)[..., :3].astype(float)
    assert np.abs(fine.reshape(128, 4, 128, 4, 3).mean(axis=(1, 3)) - coarse).mean() < 2.0


def test_the_training_picture_shows_what_a_driver_needs():
    s, d = 60.0, lane_center(1)
    ahead = on_road(2, 0, s + 30, d)
    pose = chase(s, d)
    ids = instances(ROAD, pose, 128, 128, FOV, vehicles(on_road(1, 0, s, d), ahead))
    ego = np.argwhere(ids == 1)
    assert abs(ego[:, 1].mean() - 63.5) < 1.0 and ego[:, 0].max() > 110 and len(ego) > 800
    assert 6 <= np.ptp(np.argwhere(ids == 2)[:, 1]) + 1 <= 8  # a car 30 m ahead
    for what, least in ((ID_SKY, 3000), (ID_ROAD, 5000), (ID_LINE, 60), (ID_BARRIER, 150), (ID_RAIL, 20)):
        assert (ids == what).sum() >= least, what


def test_brake_lights_are_seen():
    s, d = 60.0, lane_center(1)
    calm, braking = (
        render(ROAD, chase(s, d), 128, 128, FOV, vehicles(on_road(2, 0, s + 20, d, brake)))[..., :3].astype(int)
        for brake in (False, True)
    )
    changed = np.abs(calm - braking).max(axis=2) > 20
    assert 2 <= changed.sum() <= 40
    assert (braking[changed][:, 2] > calm[changed][:, 2]).all()


def test_kinds_of_bodies_differ_in_shape():
    areas = {}
    for body in (CAR, TRUCK, BUS):
        kind = next(i for i, k in enumerate(KINDS) if k.body == body)
        areas[body] = (
            instances(ROAD, chase(40.0, 7.4), 128, 128, FOV, vehicles(on_road(1, kind, 55.0, 7.4))) == 1
        ).sum()
    assert areas[TRUCK] > 1.5 * areas[CAR]
    assert areas[BUS] > 1.5 * areas[CAR]


def test_palettes_differ_everywhere():
    pictures = [
        render(ROAD, chase(80.0, 5.6), 128, 128, FOV, busy(80.0, 2), i).astype(float) for i in range(len(PALETTES))
    ]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b)[..., :3].mean() > 6.0
    np.testing.assert_array_equal(
        render(ROAD, chase(80.0, 5.6), 64, 64, FOV, busy(80.0, 2), PALETTES[3]),
        render(ROAD, chase(80.0, 5.6), 64, 64, FOV, busy(80.0, 2), 3),
    )


def test_threads_do_not_disturb_each_other():
    jobs = [(chase(100.0 * i, 5.6), busy(100.0 * i, i)) for i in range(8)]
    alone = [render(ROAD, pose, 96, 96, FOV, table) for pose, table in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: render(ROAD, job[0], 96, 96, FOV, job[1]), jobs * 4))
    for i, picture in enumerate(together):
        np.testing.assert_array_equal(picture, alone[i % 8])


@given(st.floats(-1.5, 1.5), st.floats(-4, 4), st.floats(-3, 3))
def test_camera_axes_are_a_left_handed_frame(pitch, yaw, roll):
    axes = camera_axes(pitch, yaw, roll)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(axes), 1.0)  # right x up = forward: the world is left-handed too
    at = project(
        (1.0, 2.0, 3.0, pitch, yaw, roll), 100, 100, 90.0, np.array([1.0, 2.0, 3.0]) + np.array([2.0, 0.5, 0.25]) @ axes
    )
    np.testing.assert_allclose(at[0], (50 + 12.5, 50 - 6.25, 2.0))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"width": 0}, "0x32"),
        ({"height": 9000}, "32x9000"),
        ({"fov_deg": 180.0}, "180"),
        ({"fov_deg": float("nan")}, "nan"),
        ({"palette": 5}, "palette 5"),
        ({"supersample": 4}, "Supersampling 4"),
        ({"camera_pose": (0, 0, float("inf"), 0, 0, 0)}, "finite"),
    ],
)
def test_what_cannot_be_drawn_is_named(changed, named):
    arguments = {
        "camera_pose": (0, 0, 4, 0, 0, 0),
        "width": 32,
        "height": 32,
        "fov_deg": 60.0,
        "palette": 0,
        "supersample": 2,
    }
    with pytest.raises(UserError, match=named):
        render(ROAD, vehicles=VehicleTable.empty(), **(arguments | changed))


@pytest.mark.parametrize(
    "pose", [(1e9, -1e9, 5, 0, 0, 0), (0, 0, -3, 0.2, 0, 0), (0, 0, 0, 0, 0, 0), (0, 0, 1e7, -1.57, 0, 0)]
)
def test_cameras_far_away_or_under_the_ground_draw_something(pose):
    assert render(ROAD, pose, 40, 30, 90.0, busy(0.0, 0)).shape == (30, 40, 4)


def test_a_picture_does_not_depend_on_those_drawn_before():
    """Buffers and rays are kept from picture to picture; here with numbers that overflow in between."""
    table = busy(400.0, 3)
    poses = [chase(400.0, lane_center(1)), chase(2000.0, lane_center(2)), (10.0, 6.0, 3.0, 0.2, 1.0, 0.7)]
    expected = {}
    with ThreadPoolExecutor(1) as fresh:  # a thread has buffers of its own
        for i, pose in enumerate(poses):
            expected[i] = fresh.submit(render, ROAD, pose, 96, 64, FOV, table).result()
    for between in [
        (1e300, -1e300, 5.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 1e300, -1.0, 0.0, 0.0),
        (0.0, 6.0, -2.0, 0.3, 9.0, 1.0),
    ]:
        for i, pose in enumerate(poses):
            render(ROAD, between, 96, 64, FOV, table, palette=3)
            assert (render(ROAD, pose, 96, 64, FOV, table) == expected[i]).all(), (between, i)
