"""Steering along the lane: the curvature of reference lines, and what a car makes of it."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.driving.control import ACTIONS, CRUISE_SPEED, VehicleCommand, commands_of, steering
from carla_digr.driving.lane import lane_curvature, reference_lines
from carla_digr.errors import UserError
from carla_digr.simulator.road import CURVATURE, LENGTH, Road, lane_center
from carla_digr.tasks.driving import Driving
from carla_digr.tasks.driving.batch import DrivingVecEnv
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.settings import DrivingConfig

ROAD = Road.ring()
LANE = tuple(ACTIONS["lane"].values())
KEEP = ACTIONS["lane"]["keep"]


def opendrive(*geometries: str) -> str:
    return f'<OpenDRIVE><road id="7"><planView>{"".join(geometries)}</planView></road></OpenDRIVE>'


def geometry(shape: str, length: float, s: float = 0.0, x: float = 0.0, y: float = 0.0, heading: float = 0.0) -> str:
    return f'<geometry s="{s!r}" x="{x!r}" y="{y!r}" hdg="{heading!r}" length="{length!r}">{shape}</geometry>'


def test_the_ring_comes_back_from_its_opendrive_text_to_the_bit():
    lines = reference_lines(ROAD.opendrive())
    for index, piece in enumerate(ROAD.pieces):
        assert np.array_equal(lines[index + 1][0, 1:], piece[1:])


def test_a_lane_is_as_curved_as_its_distance_from_the_reference_line_makes_it():
    for lane in range(4):
        d = lane_center(lane)
        for s in np.linspace(0.0, ROAD.length, 60, endpoint=False):
            x, y, heading = (float(v) for v in ROAD.pose(s + 1.0, d))
            reference = float(ROAD.curvature(s + 1.0))
            expected = 0.0 if reference == 0.0 else 1.0 / (1.0 / reference - d)
            assert lane_curvature(ROAD.pieces, x, y, heading) == pytest.approx(expected, abs=1e-9)
            assert lane_curvature(ROAD.pieces, x, y, heading + math.pi) == pytest.approx(-expected, abs=1e-9)


def test_keeping_the_lane_keeps_it_wherever_on_the_ring_without_another_decision():
    drive = InProcessDrive(vehicles=0)
    turned = set()
    for seed in range(40):
        drive.reset(seed)
        ego = drive.world.vehicle(drive.ego)
        offset = float(ego["d"])
        for _ in range(100):
            drive.advance(KEEP)
            turned.add(round(drive.curvature(), 3))
        assert abs(float(ego["d"]) - offset) < 0.6  # m; where curves begin between two ticks it is turned a little
    assert {-0.004, 0.0, 0.003} <= turned


def test_braking_follows_the_lane_too():
    drive = InProcessDrive(vehicles=0)
    for seed in range(8):
        drive.reset(seed)
        ego = drive.world.vehicle(drive.ego)
        offset = float(ego["d"])
        for _ in range(140):
            drive.advance(ACTIONS["lane"]["brake"])
        assert abs(float(ego["d"]) - offset) < 0.2
        assert float(ego["speed"]) < 0.1 * CRUISE_SPEED


@given(st.floats(-0.1, 0.1), st.sampled_from(LANE))
def test_the_wheel_angle_of_a_curve_drives_that_curve(curvature, wanted):
    steer = steering(wanted, curvature)
    assert steer == float(np.float32(steer))
    angle = (steer - wanted.steer) * math.radians(70.0)
    driven = math.tan(angle) * math.cos(math.atan(0.5 * math.tan(angle))) / 2.88
    assert driven == pytest.approx(curvature, abs=1e-6)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_absolute_steering_does_not_know_the_lane(curvature):
    for wanted in ACTIONS["wheels"].values():
        assert steering(wanted, curvature) == float(np.float32(wanted.steer))


def test_an_arc_of_a_cubic_and_of_a_spiral_is_curved_as_the_formulas_say():
    line = reference_lines(opendrive(geometry('<spiral curvStart="0.0" curvEnd="-0.02"/>', 100.0)))[7]
    assert line[:, LENGTH].sum() == pytest.approx(100.0)
    middle = line[:, 0] + 0.5 * line[:, LENGTH]
    assert np.allclose(line[:, CURVATURE], 0.0002 * middle)  # y points the other way: a right-hand curve
    # u = p, v = p^2 / 200 has the curvature 0.01 / (1 + (p / 100)^2)^1.5
    cubic = '<paramPoly3 aU="0" bU="1" cU="0" dU="0" aV="0" bV="0" cV="0.005" dV="0" pRange="arcLength"/>'
    for shape in (cubic, '<poly3 a="0" b="0" c="0.005" d="0"/>'):
        line = reference_lines(opendrive(geometry(shape, 50.0, heading=0.3)))[7]
        p = line[:, 0] + 0.5 * line[:, LENGTH]
        assert np.allclose(line[:, CURVATURE], -0.01 / (1 + (p / 100) ** 2) ** 1.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<OpenDRIVE>",
        '<!DOCTYPE a [<!ENTITY b "c">]><OpenDRIVE/>',
        opendrive(geometry("<clothoid/>", 1.0)),
        opendrive(geometry("<spiral/>", 1.0)),
        opendrive(geometry('<spiral curvStart="0" curvEnd="0"/>', 1e300)),
        opendrive(geometry("<line/>", math.nan)),
        opendrive(geometry("", 1.0)),
        opendrive('<geometry s="0"><line/></geometry>'),
        "<OpenDRIVE><road><planView/></road></OpenDRIVE>",
    ],
)
def test_a_broken_map_is_refused_in_a_sentence(text):
    with pytest.raises(UserError, match=r"OpenDRIVE map.*another map"):
        reference_lines(text)


@given(st.text(max_size=200))
def test_any_text_is_a_map_or_refused(text):
    for candidate in (text, opendrive(text), opendrive(geometry(text, 10.0))):
        with contextlib.suppress(UserError):
            reference_lines(candidate)


def test_a_card_says_whether_its_actions_follow_the_lane():
    card = {"action_names": list(ACTIONS["lane"])}
    assert commands_of(card) == LANE
    assert commands_of({"action_names": list(ACTIONS["wheels"])}) == tuple(ACTIONS["wheels"].values())
    own = {"action_names": ["go"], "controls": [{"steer": 0.1, "along_lane": True}]}
    assert commands_of(own) == (VehicleCommand(0.1, along_lane=True),)
    with pytest.raises(UserError, match="along_lane must be true or false"):
        commands_of({"action_names": ["go"], "controls": [{"along_lane": 1}]})


def test_another_action_than_the_one_before_costs_its_price_and_is_counted():
    free, priced = (DrivingVecEnv(1, 3, DrivingConfig(actions="lane", change_penalty=p), True) for p in (0.0, 0.25))
    free.reset(), priced.reset()
    actions = [2, 2, 1, 1, 2, 3]
    differences = []
    for action in actions:
        differences.append(float(free.step([action])[1][0] - priced.step([action])[1][0]))
    assert np.allclose(differences, [0.0, 0.0, 0.25, 0.0, 0.25, 0.25], atol=1e-6)
    assert free.episodes[0].metrics()["action_changes"] == pytest.approx(3 / 5)


def test_random_scenery_is_another_picture_of_the_same_drive_and_resumes_to_the_bit():
    usual, other = DrivingConfig(), DrivingConfig(random_scenery=1.0)
    a, b = DrivingVecEnv(2, 5, usual, evaluation=False), DrivingVecEnv(2, 5, other, evaluation=False)
    assert not np.array_equal(a.reset(), b.reset())
    assert b.episodes[0].drive.scene != b.episodes[1].drive.scene
    for _ in range(3):
        a.step([1, 1])
        b.step([1, 1])
    for here, there in zip(a.episodes, b.episodes, strict=True):
        assert np.array_equal(here.drive.world.vehicles, there.drive.world.vehicles)
    again = DrivingVecEnv(2, 5, other, evaluation=False)
    again.reset()
    again.set_state(b.get_state())
    assert np.array_equal(again.observe(), b.observe())
    assert np.array_equal(again.step([0, 2])[0], b.step([0, 2])[0])
    assert np.array_equal(Driving(other).make_vec_env(2, 5).reset(), Driving(usual).make_vec_env(2, 5).reset())
    assert np.array_equal(Driving(other).varied().make_vec_env(2, 5).reset(), DrivingVecEnv(2, 5, other, False).reset())


def test_the_same_instant_in_another_scenery_shows_the_same_road_and_leaves_the_drive_as_it_was():
    env, untouched = (DrivingVecEnv(4, 5, DrivingConfig(random_scenery=0.5), evaluation=False) for _ in range(2))
    assert np.array_equal(env.reset(), untouched.reset())
    assert {episode.drive.scene > 0 for episode in env.episodes} == {True, False}
    own = env.observe()
    bare = np.stack([episode.drive.picture_in(0) for episode in env.episodes])
    others = [env.in_other_scenery(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(others[0], others[1]) and not np.array_equal(others[0], others[2])
    for i, objects in enumerate(env.objects()):
        (scenery,) = (item for item in objects if item.kind == "scenery")
        assert np.array_equal(bare[i], scenery.without) and not np.array_equal(bare[i], own[i])
    without = [[np.array_equal(there[i], bare[i]) for i in range(4)] for there in others]
    assert {True, False} <= set(np.ravel(without)) and not (others[0] == own).all(axis=(1, 2, 3)).any()
    assert np.array_equal(env.step([1, 2, 0, 1])[0], untouched.step([1, 2, 0, 1])[0])
