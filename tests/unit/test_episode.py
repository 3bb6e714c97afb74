"""The rule of an episode of driving: its end, its cut and its figures, the same whoever drives."""

from __future__ import annotations

import pytest

from carla_digr.driving.control import ACTIONS, TICK
from carla_digr.driving.episode import RunningEpisode
from carla_digr.driving.rollouts import RolloutConfig, _Work
from carla_digr.tasks.driving import DrivingConfig
from carla_digr.tasks.driving.batch import Episode
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.environment import DrivingEnv


def test_an_incident_ends_an_episode_even_in_its_last_tick():
    episode = RunningEpisode(2 * TICK)
    episode.count(20.0, None, False)
    assert not episode.over
    episode.count(22.0, None, True)
    assert episode.terminated and not episode.truncated
    figures = episode.figures()
    assert (figures["clean"], figures["collision"], figures["off_road"]) == (False, None, True)
    assert figures["driven"] == 1.0 and figures["distance"] == pytest.approx(42.0 * TICK)
    assert figures["mean_speed"] == pytest.approx(21.0)


def test_where_the_road_ends_an_episode_is_cut_and_clean():
    episode = RunningEpisode(100 * TICK)
    episode.count(20.0, None, False)
    episode.count(20.0, None, False, road_ends=True)
    assert episode.truncated and not episode.terminated and episode.figures()["clean"]
    episode.count(20.0, "static.barrier", False, road_ends=True)
    assert episode.terminated and not episode.truncated


def test_its_time_is_met_to_the_tick_whatever_the_rounding():
    for ticks in (1, 3, 7, 60, 1000):
        episode = RunningEpisode(ticks * TICK)
        for _ in range(ticks):
            assert not episode.over
            episode.count(1.0, None, False)
        assert episode.truncated and episode.figures()["clean"]


@pytest.mark.parametrize(("seed", "seconds"), [(1, 30.0), (2, 1.0)])  # off the lanes in a curve; cut
def test_the_batch_the_environment_and_a_rollout_end_alike(seed, seconds):
    config = DrivingConfig(episode_seconds=seconds, vehicles=20)
    batch = Episode(config, InProcessDrive(20), decision_ticks=1)
    batch.reset(seed)
    while True:
        _, _, terminated, truncated = batch.step(1)
        if terminated or truncated:
            break
    env = DrivingEnv(config)
    env.reset(seed=seed)
    while not env.running.over:
        ended = env.step(1)[2:4]
    settings = RolloutConfig(("a:1",), episode_seconds=seconds, seed=seed)
    work = _Work(settings, lambda: lambda _: ACTIONS["wheels"]["keep"], lambda _: None)
    rollout = work._episode(InProcessDrive(20), 0)  # type: ignore[arg-type]
    assert ended == (terminated, truncated)
    assert env.running.figures() == {name: value for name, value in rollout.items() if name != "seed"}
    metrics = batch.metrics()
    assert metrics["collision"] == float(rollout["collision"] is not None)
    for name in ("clean", "off_road", "seconds", "driven"):
        assert metrics[name] == float(rollout[name])
    assert metrics["distance"] == pytest.approx(rollout["distance"], rel=1e-5)  # over a protocol, float32 speeds
