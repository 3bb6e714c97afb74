"""The driving task: the same car on every route, episodes that resume exactly, a reward that tells danger."""

from __future__ import annotations

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.driving.control import (
    ACTIONS,
    BRAKE,
    CRUISE_SPEED,
    MAX_WHEEL_ANGLE,
    TICK,
    WHEEL_ANGLE,
    VehicleCommand,
    pedals,
)
from carla_digr.simulator.road import LANE_WIDTH, MEDIAN_HALF_WIDTH, ROAD_EDGE, Road, lane_center
from carla_digr.simulator.vehicle import MAX_STEER, step_bicycle
from carla_digr.simulator.world import World
from carla_digr.tasks import register_environments
from carla_digr.tasks.driving import DrivingConfig
from carla_digr.tasks.driving.batch import DrivingVecEnv
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.environment import DrivingEnv
from carla_digr.tasks.driving.reward import hazards, in_lanes, reward
from carla_digr.tasks.driving.servers import PACED, Pace
from carla_digr.tasks.environment import episode_seed

CONFIG = DrivingConfig()
ROAD = Road.ring()


WHEELS = tuple(ACTIONS["wheels"].values())


def keep_lane(drive: InProcessDrive) -> int:
    """The action a lane keeper with full state takes."""
    ego = drive.world.vehicle(drive.ego)
    offset = (ego["d"] - 2.0) % LANE_WIDTH - 0.5 * LANE_WIDTH
    _, _, heading = ROAD.project(ego["x"], ego["y"])
    angle = (ego["yaw"] - heading + math.pi) % (2 * math.pi) - math.pi
    wanted = -0.03 * offset - 0.9 * angle + ego["wheelbase"] * float(ROAD.curvature(ego["s"]))
    return int(np.clip(np.round(wanted / WHEEL_ANGLE), -1, 1)) + 1


def test_the_steering_scale_is_the_simulators():
    assert MAX_WHEEL_ANGLE == MAX_STEER
    assert WHEELS[0].steer == -WHEELS[2].steer == pytest.approx(-WHEEL_ANGLE / MAX_STEER)
    assert WHEELS[3].brake == BRAKE
    assert math.isnan(WHEELS[3].target_speed)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(-10.0, 60.0), st.floats(0.0, 60.0) | st.just(math.nan))
def test_pedals_stay_in_range_and_are_float32(throttle, brake, speed, target):
    for value in pedals(VehicleCommand(0.0, throttle, brake, target), speed):
        assert 0.0 <= value <= 1.0
        assert value == float(np.float32(value))


@given(st.floats(0.0, 35.0))
def test_the_cruise_control_reaches_and_holds_its_speed(start):
    x = y = yaw = 0.0
    speed = start
    for _ in range(400):
        throttle, brake = pedals(WHEELS[1], speed)
        x, y, yaw, speed, _ = step_bicycle(x, y, yaw, speed, 2.88, throttle, 0.0, brake, False, False, TICK)
    assert speed == pytest.approx(CRUISE_SPEED, abs=0.05)


def test_the_same_seed_and_actions_give_the_same_pictures():
    first, second = InProcessDrive(), InProcessDrive()
    actions = np.random.default_rng(0).integers(0, 4, 40)
    second.reset(1)  # what happened before does not matter
    second.step(WHEELS[0])
    assert np.array_equal(first.reset(5).image, second.reset(5).image)
    for action in actions:
        a, b = first.step(WHEELS[int(action)]), second.step(WHEELS[int(action)])
        assert np.array_equal(a.image, b.image)
        assert (a.x, a.y, a.yaw, a.speed, a.collision) == (b.x, b.y, b.yaw, b.speed, b.collision)
    assert not np.array_equal(a.image, first.reset(6).image)


def test_a_lane_keeper_stays_on_an_empty_road_through_every_curve():
    drive = InProcessDrive(vehicles=0)
    frame = drive.reset(3)
    travelled = 0.0
    while travelled < ROAD.length:
        drive.advance(WHEELS[keep_lane(drive)])
        assert drive.incident() == (None, False, False, False)
        travelled += float(drive.world.vehicle(drive.ego)["speed"]) * TICK
    assert drive.frame().frame > frame.frame


def test_driving_straight_leaves_the_lanes_and_ends_the_episode():
    env = DrivingEnv(CONFIG)
    env.reset(seed=1)
    for _ in range(1000):
        _, value, terminated, truncated, info = env.step(1)
        if terminated or truncated:
            break
    assert terminated
    assert value == -1.0
    assert info["off_road"] or info["collision"]


@pytest.mark.parametrize("config", [CONFIG, DrivingConfig(steering_penalty=0.01, change_penalty=0.02)])
def test_the_batch_gives_what_single_episodes_give(config):
    batch = DrivingVecEnv(2, 7, config, evaluation=True)
    single = [DrivingEnv(config) for _ in range(2)]
    pictures = batch.reset()
    for i, env in enumerate(single):
        assert np.array_equal(pictures[i].transpose(1, 2, 0), env.reset(seed=episode_seed(7, i, 0))[0])
    rng = np.random.default_rng(1)
    for _ in range(25):
        actions = rng.integers(0, 4, 2)
        pictures, rewards, dones, _ = batch.step(actions)
        for i, env in enumerate(single):
            picture, value, terminated, _, _ = env.step(int(actions[i]))
            assert not terminated and not dones[i]
            assert np.array_equal(pictures[i].transpose(1, 2, 0), picture)
            assert rewards[i] == pytest.approx(value, abs=1e-6)


def test_a_batch_leaves_out_what_nobody_asks_for_and_nothing_else():
    batches = [DrivingVecEnv(3, 7, CONFIG, evaluation=True) for _ in range(2)]
    batches[1].look_away()
    seen, unseen = (batch.reset() for batch in batches)
    assert seen.any() and not unseen.any()
    rng = np.random.default_rng(1)
    ended = 0
    for step in range(120):
        if step == 20:
            batches[1].resting[2] = True
            time = batches[1].metrics(2)
        actions = rng.integers(0, 4, 3)
        whole, spared = (batch.step(actions) for batch in batches)
        moving = slice(3 if step < 20 else 2)
        for one, other in zip(whole[1:], spared[1:], strict=True):
            if one is whole[3]:
                assert [i.get("metrics") for i in one[moving]] == [i.get("metrics") for i in other[moving]]
            else:
                assert np.array_equal(one[moving], other[moving])
        ended += int(whole[2][moving].sum())
        assert not spared[0].any()
    assert ended, "the comparison must cross an episode's end"
    assert spared[1][2] == 0 and not spared[2][2] and batches[1].metrics(2) == time


def test_a_batch_continues_exactly_from_its_state():
    rng = np.random.default_rng(2)
    actions = rng.integers(0, 3, (80, 3))
    first = DrivingVecEnv(3, 11, CONFIG, evaluation=False)
    first.reset()
    for step in actions[:30]:
        first.step(step)
    state = first.get_state()
    second = DrivingVecEnv(3, 11, CONFIG, evaluation=False)
    second.reset()
    second.set_state(state)
    ended = 0
    for step in actions[30:]:
        a, b = first.step(step), second.step(step)
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])
        assert np.array_equal(a[2], b[2])
        assert [info.get("metrics") for info in a[3]] == [info.get("metrics") for info in b[3]]
        ended += int(a[2].sum())
    assert ended, "the comparison must cross an episode's end"


def test_an_episode_is_cut_after_its_time_and_tells_its_figures():
    env = DrivingVecEnv(1, 0, DrivingConfig(vehicles=0, episode_seconds=3.0), evaluation=True)
    env.reset()
    for tick in range(60):
        drive = env.episodes[0].drive
        _, rewards, dones, infos = env.step(np.array([keep_lane(drive)]))
        assert rewards[0] > 0
        assert bool(dones[0]) == (tick == 59)
    assert infos[0]["TimeLimit.truncated"]
    metrics = infos[0]["metrics"]
    assert metrics["clean"] == 1.0
    assert metrics["seconds"] == pytest.approx(3.0)
    assert metrics["distance"] == pytest.approx(66.0, abs=0.2)


def scene(gap: float, lateral: float, speed: float) -> tuple[np.ndarray, int]:
    """A world's table with the ego and one slower car ``gap`` metres ahead, centre to centre."""
    world = World(ROAD)
    ids = []
    for s, d in ((100.0, lane_center(1)), (100.0 + gap, lane_center(1) + lateral)):
        x, y, yaw = (float(v) for v in ROAD.pose(s, d))
        ids.append(world.spawn_vehicle(0, x, y, yaw))
    for vehicle, value in zip(ids, (CRUISE_SPEED, speed), strict=True):
        yaw = float(world.vehicle(vehicle)["yaw"])
        world.set_target_velocity(vehicle, value * math.cos(yaw), value * math.sin(yaw))
    return world.vehicles, 0


@settings(max_examples=30)
@given(st.floats(8.0, 60.0), st.floats(1.0, 20.0))
def test_a_nearer_car_ahead_is_more_dangerous(gap, step):
    near, _ = hazards(*scene(gap, 0.0, 15.0), ROAD.length)
    far, _ = hazards(*scene(gap + step, 0.0, 15.0), ROAD.length)
    assert 0.0 <= far <= near <= 1.0


def test_hazards_see_what_is_ahead_and_alongside_only():
    assert hazards(*scene(15.0, 0.0, 15.0), ROAD.length)[0] > 0.5
    assert hazards(*scene(15.0, LANE_WIDTH, 15.0), ROAD.length) == (0.0, 0.0)
    assert hazards(*scene(15.0, 0.0, 25.0), ROAD.length) == (0.0, 0.0)
    assert hazards(*scene(0.0, 2.2, 22.0), ROAD.length)[1] > 0.5
    assert hazards(*scene(-15.0, 0.0, 22.0), ROAD.length) == (0.0, 0.0)


def test_the_reward_prefers_the_lane_centre_and_speed():
    centre = in_lanes(lane_center(2))
    beside = in_lanes(lane_center(2) + 1.0)
    assert reward(CONFIG, 0.1, 22.0, centre, 0.0, 0.0, 0.0) == pytest.approx(0.01)
    assert reward(CONFIG, 0.1, 22.0, beside, 0.0, 0.0, 0.0) < reward(CONFIG, 0.1, 22.0, centre, 0.0, 0.0, 0.0)
    assert reward(CONFIG, 0.1, 10.0, centre, 0.0, 0.0, 0.0) < reward(CONFIG, 0.1, 22.0, centre, 0.0, 0.0, 0.0)
    assert reward(CONFIG, 0.1, 22.0, centre, 0.0, 0.5, 0.0) < 0.0
    assert reward(CONFIG, 0.05, 22.0, centre, 0.0, 0.0, 0.0) == pytest.approx(0.005)


@given(st.floats(0.0, 7.0), st.floats(0.0, 3.0), st.floats(0.1, 3.0))
def test_a_foreseen_edge_costs_alike_on_both_sides_and_only_on_the_way_to_it(to_edge, outwards, horizon):
    config = replace(CONFIG, edge_horizon=horizon, offset_penalty=0.0)

    def at(d: float, drift: float) -> float:
        return reward(config, 0.1, 22.0, in_lanes(d), drift, 0.0, 0.0)

    left, right = MEDIAN_HALF_WIDTH + to_edge, ROAD_EDGE - to_edge
    assert at(left, -outwards) == pytest.approx(at(right, outwards))
    assert at(right, outwards) <= at(right, 0.0)
    assert at(right, -min(outwards, 6.0 / horizon)) == pytest.approx(at(right, 0.0))  # rounding, where it is 1.4 m
    nearer = max(0.0, to_edge - outwards * horizon)
    assert at(right, outwards) == pytest.approx(at(ROAD_EDGE - nearer, 0.0))


def test_the_environment_keeps_gymnasiums_contract():
    register_environments()
    check_env(gymnasium.make("carla_digr/Driving-v0").unwrapped, skip_render_check=True)


def test_a_server_that_has_become_slow_is_named_once(caplog):
    quick, pace = Pace("gpu1:2010"), Pace("gpu1:2000")
    for seconds in (*[0.004] * PACED, *[0.012] * PACED):
        quick.took(seconds)
    for seconds in (*[0.04] * PACED, *[0.06] * PACED, *[0.09] * 3 * PACED):
        pace.took(seconds)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("gpu1:2000 takes 90 ms a decision, at first it took 40; start it again")
