"""The tasks: what the offline stages train and explain on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from carla_digr.config import Config

if TYPE_CHECKING:
    import numpy as np
    from stable_baselines3.common.vec_env import VecEnv


class Task(Protocol):
    """One control task with picture observations and discrete actions."""

    @property
    def name(self) -> str:
        """As configurations and checkpoints call it."""

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """C, H, W."""

    @property
    def action_names(self) -> tuple[str, ...]:
        """One name per action, in the order of the policy's logits."""

    @property
    def expert(self) -> Callable[[Any], Callable[[np.ndarray], np.ndarray]] | None:
        """Makes, for environments of this task, a policy that sees their full state; None where there is none.

        The policy is called with the observations, like the learned ones, and returns actions (N,).
        """

    @property
    def idle_action(self) -> int | None:
        """The action that does nothing, if there is one: a baseline of evaluation."""

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> VecEnv:
        """Environments that step together and reset themselves.

        ``evaluation`` False allows the task what only helps PPO, such as longer decisions.

        Observations are uint8 (N, C, H, W). Episode e of environment i is a function of (seed, i, e) and the actions.
        At an episode's end its info has "metrics", a dict of floats that evaluation averages, and "is_success".

        For training that resumes exactly, the VecEnv has ``get_state() -> dict[str, numpy array]`` and
        ``set_state(state)``; without them a resumed training starts new episodes.
        """


class KnowsImportance(Protocol):
    """A VecEnv whose task knows which pixels matter: its maps can be scored."""

    def importance(self) -> np.ndarray:
        """int8 (N, H, W) of the present observations: 1 important, 0 unimportant, -1 not counted."""


def make_task(config: Config) -> Task:
    """The task that a configuration names."""
    if config.task == "red_fetch_green":
        from carla_digr.tasks.red_fetch_green import RedFetchGreen

        return RedFetchGreen(config.environment)
    if config.task == "driving":
        from carla_digr.tasks.driving import Driving

        return Driving(config.environment)
    if config.task == "breakout":
        from carla_digr.tasks.breakout import Breakout

        return Breakout(config.environment)
    raise ValueError(f"no task {config.task!r}")
