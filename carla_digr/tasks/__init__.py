"""The tasks: what the offline stages train and explain on; the table of them, and the configurations that name one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from carla_digr.config import Config, EvaluationConfig, kind_of, listed, parse_section, read_yaml
from carla_digr.errors import UserError
from carla_digr.registry import Registry

if TYPE_CHECKING:
    import numpy as np


class Task(Protocol):
    """One control task with picture observations and discrete actions.

    A class of it is made with one argument, its settings. It may have a class attribute ``Evaluation``, a dataclass
    derived from ``config.EvaluationConfig``, where its evaluation has settings of its own, and ``report``, the name of
    a module of its evaluation (see ``evaluation.report.TaskReport``). A task may have ``recipe``, the
    ``policy.InputRecipe`` of its observations; without it three channels are one RGB picture, and any other number as
    many grey ones; and ``most_environments``, how many can be had at once, None: any number.
    """

    @property
    def Settings(self) -> type:
        """Frozen dataclass of the configuration's section ``environment``."""

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

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> Batch:
        """Environments that step together and reset themselves.

        ``evaluation`` False allows the task what only helps PPO, such as longer decisions.

        Observations are uint8 (N, C, H, W). Episode e of environment i is a function of (seed, i, e) and the actions.
        At an episode's end its info has "metrics", a dict of floats that evaluation averages, and where the task knows
        it, "is_success".

        For training that resumes exactly, the batch has ``get_state() -> dict[str, numpy array]``,
        ``set_state(state)`` and ``observe()``; without them a resumed training starts new episodes. A batch on
        simulators that may be lost has ``present`` and ``shown``, bool (N,): which environments took the last step, and
        whose observations are new.
        """


class Batch(Protocol):
    """What ``Task.make_vec_env`` returns: ``environment.BatchedEnvironment``, or a VecEnv of stable-baselines3."""

    num_envs: int
    observation_space: Any
    action_space: Any

    def reset(self) -> Any:
        """See BatchedEnvironment."""

    def step(self, actions: np.ndarray) -> Any:
        """See BatchedEnvironment."""

    def close(self) -> None:
        """See BatchedEnvironment."""


class Varies(Protocol):
    """What a task has besides if its training shows more variety than its evaluation."""

    def varied(self) -> Task:
        """The same task whose batches all have that variety: for the stages that follow the teacher's training."""


class KnowsImportance(Protocol):
    """A batch whose task knows which pixels matter: its maps can be scored."""

    def importance(self) -> np.ndarray:
        """int8 (N, H, W) of the present observations: 1 important, 0 unimportant, -1 not counted."""


class KnowsScenery(Protocol):
    """A batch whose task can show what no decision should depend on otherwise: a student can be taught to ignore it."""

    def in_other_scenery(self, rng: np.random.Generator) -> np.ndarray:
        """The present observations, uint8 (N, C, H, W), in sceneries that ``rng`` draws."""


class SparesWork(Protocol):
    """A batch that need not do what nobody asks for.

    Attributes:
        resting: bool (N,), to be set by whoever steps: environments that a step leaves as they are, with the reward 0.
    """

    resting: np.ndarray

    def look_away(self) -> None:
        """From now on nobody looks at the observations: all zero will do."""


TASKS: Registry[Any] = Registry(
    "task",
    "carla_digr.tasks",
    {
        "red_fetch_green": "carla_digr.tasks.red_fetch_green:RedFetchGreen",
        "driving": "carla_digr.tasks.driving:Driving",
        "breakout": "carla_digr.tasks.breakout:Breakout",
        "gymnasium": "carla_digr.tasks.gymnasium_task:GymnasiumTask",
    },
)
"""Classes of tasks by name."""


def make_task(config: Config) -> Task:
    """The task that a configuration names."""
    return TASKS[config.task](config.environment)


def load_config(path: str | Path) -> Config:
    """Read and check a task's YAML file, or the configuration of that name that ships.

    Raises:
        UserError: the file is missing or not YAML, or a key or value in it is wrong.
    """
    return parse_config(read_yaml(path), str(path))


def parse_config(values: Any, source: str) -> Config:
    """Check plain values, as YAML or a checkpoint's card gives them, and build a Config.

    Args:
        values: nested dicts, lists and scalars.
        source: what to call the origin of the values in an error.

    Raises:
        UserError: a key or value is wrong.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: the configuration must be a mapping of sections, not {kind_of(values)}.")
    task = values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{source}: key 'task' must be one of {listed(TASKS)}, not {task!r}.")
    kind = TASKS[task]
    environment = parse_section(kind.Settings, values.get("environment") or {}, source, "environment")
    section = getattr(kind, "Evaluation", EvaluationConfig)
    measured = values.get("evaluation")
    if isinstance(measured, dict):
        of_driving = _ONCE_COMMON - {field.name for field in fields(section)}
        measured = {key: value for key, value in measured.items() if key not in of_driving}
    evaluation = parse_section(section, {} if measured is None else measured, source, "evaluation")
    return parse_section(Config, {**values, "environment": environment, "evaluation": evaluation}, source, "")


_ONCE_COMMON = {"attack_seconds", "drive_seconds"}  # in cards of every task; read, and of no effect but on driving


def register_environments() -> None:
    """Make our tasks known to ``gymnasium.make`` as ``carla_digr/RedFetchGreen-v0`` and ``carla_digr/Driving-v0``."""
    from gymnasium.envs.registration import register, registry

    for name, entry in (
        ("carla_digr/RedFetchGreen-v0", "carla_digr.tasks.red_fetch_green:RedFetchGreenEnv"),
        ("carla_digr/Driving-v0", "carla_digr.tasks.driving.environment:DrivingEnv"),
    ):
        if name not in registry:
            register(name, entry)
