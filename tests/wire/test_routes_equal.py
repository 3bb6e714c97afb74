"""The same seed and commands give the same frames in process and over CARLA's protocol."""

from __future__ import annotations

import numpy as np
import pytest

from carla_digr.driving.control import command
from carla_digr.driving.scenario import Scenario
from carla_digr.tasks.driving import DrivingEnv, InProcessDrive

DECISION_TICKS = 5  # a held wheel angle makes the drives leave their lane, meet traffic and crash


def actions(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.repeat(rng.choice([0, 1, 1, 1, 2, 3], count // DECISION_TICKS + 1), DECISION_TICKS)[:count]


@pytest.fixture(scope="module")
def drive(shared_simulator):
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port) as connected:
        yield connected


@pytest.mark.parametrize("seed", [1, 2, 77, 1])
def test_pictures_are_equal_to_the_byte(drive, seed):
    here = InProcessDrive()
    a, b = here.reset(seed), drive.reset(seed)
    start = a.frame - b.frame, a.stamp - b.stamp
    for i, action in enumerate(actions(seed, 150)):
        assert a.image.tobytes() == b.image.tobytes(), i
        assert (a.x, a.y, a.speed, a.off_road) == (b.x, b.y, b.speed, b.off_road)
        assert b.yaw == pytest.approx(a.yaw, abs=1e-6)
        assert a.frame - b.frame == start[0]
        assert a.stamp - b.stamp == pytest.approx(start[1], abs=1e-6)
        a, b = here.step(command(int(action))), drive.step(command(int(action)))


def test_the_environment_is_the_same_over_both_routes(drive):
    here, there = DrivingEnv(), DrivingEnv(drive=drive)
    for seed in (5, 6):
        a, b = here.reset(seed=seed)[0], there.reset(seed=seed)[0]
        crashed = None
        for i, action in enumerate(actions(seed, 100)):
            assert (a == b).all(), i
            a, _, over_here, _, facts = here.step(int(action))
            b, _, over_there, _, _ = there.step(int(action))
            if over_here or over_there:
                crashed = (over_here, facts)
                break
        # A contact comes on a connection of its own and may be told one frame after its picture.
        assert crashed is None or crashed[0]
