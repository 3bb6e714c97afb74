"""A task's batch as stable-baselines3 wants its environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from carla_digr.tasks import Batch


def as_vec_env(batch: Batch) -> VecEnv:
    """The batch itself if it is a VecEnv already, else wrapped into one."""
    return batch if isinstance(batch, VecEnv) else BatchVecEnv(batch)


class BatchVecEnv(VecEnv):
    """A batch behind stable-baselines3's interface; attributes and methods of an environment are the batch's."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.render_mode = None
        super().__init__(batch.num_envs, batch.observation_space, batch.action_space)

    def reset(self) -> Any:
        """Start a new episode everywhere."""
        return self.batch.reset()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions of the next ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> Any:
        """One step everywhere."""
        return self.batch.step(self._actions)

    def close(self) -> None:
        """Close the batch."""
        self.batch.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once per environment."""
        owner = self if hasattr(self, attr_name) else self.batch
        return [getattr(owner, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the attribute of the batch."""
        setattr(self.batch, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call the method of the batch once per environment."""
        return [getattr(self.batch, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False for _ in self._get_indices(indices)]
