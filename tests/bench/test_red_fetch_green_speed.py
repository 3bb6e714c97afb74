"""How fast the Red-Fetch-Green environments are on this machine; `pytest -s` shows the figure."""

from __future__ import annotations

import time

import numpy as np

from carla_digr.tasks.red_fetch_green import ACTION_NAMES, RedFetchGreenVecEnv

ENVIRONMENTS = 16
GOAL = 80_000  # environment steps per second of one core's time


def test_sixteen_environments_reach_the_goal():
    env = RedFetchGreenVecEnv(ENVIRONMENTS)
    env.reset()
    actions = np.random.default_rng(0).integers(len(ACTION_NAMES), size=(5000, ENVIRONMENTS))
    rates = []
    for part in np.split(actions, 5):
        start = time.process_time()
        for row in part:
            env.step(row)
        rates.append(part.size / (time.process_time() - start))
    print(f"\n{np.median(rates):,.0f} environment steps per CPU-second (from {min(rates):,.0f} to {max(rates):,.0f})")
    assert np.median(rates) >= GOAL
