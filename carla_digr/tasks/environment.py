"""What the batched environments of the tasks share; no training library is needed for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

# observations uint8 (N, C, H, W), rewards float32 (N,), dones bool (N,), infos
Steps = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]


class BatchedEnvironment:
    """N environments of one task that step together and start their next episode by themselves.

    A subclass may have, besides what stands here, ``get_state`` and ``set_state`` (see tasks.Task), ``importance`` (see
    tasks.KnowsImportance) and ``classes() -> int8 (N, H, W)``, what each pixel of the present observations shows.

    Args:
        environments: N.
        shape: C, H, W of an observation.
        actions: how many there are.
    """

    def __init__(self, environments: int, shape: tuple[int, int, int], actions: int):
        self.num_envs = environments
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(actions)

    def reset(self) -> NDArray[np.uint8]:
        """Start a new episode everywhere; observations uint8 (N, C, H, W)."""
        raise NotImplementedError

    def step(self, actions: Any) -> Steps:
        """One action (N,) everywhere; finished episodes restart.

        Returns:
            As stable-baselines3's VecEnv: observations uint8 (N, C, H, W), those of a new episode where one began;
            rewards float32 (N,); dones bool (N,); infos, one dict an environment. The info of an episode's end has
            "terminal_observation", "TimeLimit.truncated" (it was cut), "metrics" and, where the task knows it,
            "is_success".
        """
        raise NotImplementedError

    def observe(self) -> NDArray[np.uint8]:
        """The present observations, uint8 (N, C, H, W)."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what is held."""


def episode_seed(seed: int, environment: int, episode: int) -> int:
    """Seed in [0, 2^31) of one episode; 31 bits because CARLA's blueprint attributes are signed."""
    return int(np.random.SeedSequence((seed, environment, episode)).generate_state(1)[0] >> 1)
