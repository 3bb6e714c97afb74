"""Any registered gymnasium environment with picture observations and discrete actions as a task.

Its observation becomes a state so: the entry ``observation_key`` of a dict, an action held for ``frame_skip`` steps,
grey if asked for, scaled by area to ``size``, the last ``stack`` pictures along the channels, the oldest first; before
an episode's first step its first picture is repeated.

An episode's metrics are "return" (rewards as the environment gives them), "length" (decisions) and, where its info has
"is_success", "success". Training, and not evaluation, may clip rewards to their sign and end an episode with each life
(Mnih et al. 2015), after which the game goes on.

Episode e of environment i begins by ``reset(seed)`` with a seed of (seed, i, e). What a batch saves is which episodes
run and the actions in them: it goes on by playing these again, which any environment that keeps to its seed can do. An
episode that does not come out the same is left, and the next one begun.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from carla_digr.config import setting
from carla_digr.errors import UserError
from carla_digr.tasks.environment import BatchedEnvironment, Steps, episode_seed

if TYPE_CHECKING:
    from carla_digr.policy import InputRecipe

IDLE = ("noop", "no-op", "no op", "idle", "nothing", "do nothing")  # names of an action that does nothing
MOST_CHANNELS = 16  # of one observation; a longer axis is no channel axis
# Beginning of an id -> package that registers it, and what is installed with pip for it
PACKAGES = {
    "ALE/": ("ale_py", "carla_digr[atari]"),
    "MiniGrid-": ("minigrid", "carla_digr[minigrid]"),
    "BabyAI-": ("minigrid", "carla_digr[minigrid]"),
}


@dataclass(frozen=True)
class GymnasiumConfig:
    """Which environment, and how its observations become states; see this module."""

    id: str  # such as ALE/Pong-v5
    module: str | None = None  # imported first, where that is what registers the id
    kwargs: dict[str, Any] = field(default_factory=dict)  # of gymnasium.make
    # In this order: a name of gymnasium.wrappers or module:Class, or a mapping of one such name to its arguments
    wrappers: tuple[Any, ...] = setting((), empty=True)
    observation_key: str | None = None  # the picture in a dict of observations; none: the only one that is a picture
    frame_skip: int = setting(1, minimum=1)  # steps that an action is held
    grey: bool = False
    size: tuple[int, int] | None = setting(None, minimum=1)  # rows, columns; none: as they are
    stack: int = setting(1, minimum=1)  # pictures of a state
    max_steps: int | None = setting(None, minimum=1)  # decisions after which an episode is cut; none: the environment's
    actions: tuple[str, ...] | None = None  # their names; none: the environment's, or action 0, action 1, ...
    clip_rewards: bool = False  # training: the reward's sign
    episodic_life: bool = False  # training: an episode ends with a life


class GymnasiumTask:
    """The task, as the offline stages see it.

    Raises:
        UserError: the environment cannot be made, its observations are no pictures, or its actions are not discrete.
    """

    Settings = GymnasiumConfig
    name = "gymnasium"
    expert = None

    def __init__(self, config: GymnasiumConfig):
        self.config = config
        game = _Game(config, 0, 0)
        try:
            self.observation_shape = game.shape
            self.action_names = game.action_names()
        finally:
            game.env.close()
        idle = [k for k, name in enumerate(self.action_names) if name in IDLE]
        self.idle_action = idle[0] if idle else None

    @property
    def recipe(self) -> InputRecipe:
        """What a state is made of."""
        from carla_digr.policy import InputRecipe  # loads torch, which a configuration need not

        channels = self.observation_shape[0] // self.config.stack
        if channels in (1, 3):
            return InputRecipe("grey" if channels == 1 else "rgb", stack=self.config.stack)
        return InputRecipe("grey", stack=self.observation_shape[0])

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> GymnasiumVecEnv:
        """Environments in this process; see Task.make_vec_env."""
        return GymnasiumVecEnv(environments, seed, self.config, evaluation)


class GymnasiumVecEnv(BatchedEnvironment):
    """N environments, one after the other.

    Args:
        environments: N.
        seed: episode e of environment i follows from (seed, i, e) and the actions.
        config: of the task.
        evaluation: rewards are the environment's, and episodes whole.
    """

    def __init__(self, environments: int, seed: int, config: GymnasiumConfig, evaluation: bool = True):
        self.games = [_Game(config, seed, i) for i in range(environments)]
        super().__init__(environments, self.games[0].shape, self.games[0].actions)
        self.config, self.evaluation = config, evaluation

    def reset(self) -> NDArray[np.uint8]:
        """Start a new episode everywhere."""
        for game in self.games:
            game.start()
        return self.observe()

    def step(self, actions: Any) -> Steps:
        """One decision everywhere; finished episodes restart."""
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in self.games]
        for i, (game, action) in enumerate(zip(self.games, actions, strict=True)):
            lives = game.lives
            reward = game.act(int(action))
            clip = self.config.clip_rewards and not self.evaluation
            rewards[i] = np.sign(reward) if clip else reward
            over = game.terminated or game.truncated
            life_lost = self.config.episodic_life and not self.evaluation and 0 < game.lives < lives
            if not (over or life_lost):
                continue
            dones[i] = True
            infos[i] = {
                "terminal_observation": game.state.copy(),
                "TimeLimit.truncated": game.truncated and not game.terminated,
                "metrics": {},
            }
            if over:
                infos[i]["metrics"] = {"return": game.total, "length": float(len(game.taken))}
                if game.success is not None:
                    infos[i]["is_success"] = game.success
                    infos[i]["metrics"]["success"] = float(game.success)
                game.start()
        return self.observe(), rewards, dones, infos

    def observe(self) -> NDArray[np.uint8]:
        """The present states, uint8 (N, C, H, W)."""
        return np.stack([game.state for game in self.games])

    def get_state(self) -> dict[str, np.ndarray]:
        """The running episodes' numbers and the actions taken in each."""
        return {
            "episodes": np.array([game.episode for game in self.games]),
            "lengths": np.array([len(game.taken) for game in self.games]),
            "actions": np.concatenate([np.array(game.taken, np.int32) for game in self.games]),
            "last": self.observe(),
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``; where an episode does not come out as it was, begin the next one."""
        ends = np.cumsum(state["lengths"])
        parts = np.split(state["actions"], ends[:-1])
        for game, episode, actions, last in zip(self.games, state["episodes"], parts, state["last"], strict=True):
            game.episode = int(episode) - 1
            game.start()
            for action in actions:
                game.act(int(action))
                if game.terminated or game.truncated:
                    break
            if len(game.taken) < len(actions) or not np.array_equal(game.state, last):
                game.start()

    def close(self) -> None:
        """Close the environments."""
        for game in self.games:
            game.env.close()


class _Game:
    """One environment and its state as the policy sees it.

    Attributes:
        state: uint8 (C, H, W).
        taken: actions of this episode; total: its rewards; success: of its last info, None where that has none.
        lives: that the player has left, 0 where the environment knows none.
        terminated, truncated: the episode's end.
    """

    def __init__(self, config: GymnasiumConfig, seed: int, index: int):
        self.config, self.seed, self.index = config, seed, index
        self.env = make(config)
        try:
            if not isinstance(self.env.action_space, spaces.Discrete):
                raise UserError(
                    f"Key environment.id: {config.id} has the actions {self.env.action_space}, but discrete ones are "
                    f"needed; ask for them in environment.kwargs if it has some, as CarRacing by continuous: false."
                )
            self.actions, self.first = int(self.env.action_space.n), int(self.env.action_space.start)
            self.key, self.channels_first, picture = _picture_space(self.env.observation_space, config)
            channels, height, width = picture
            if config.grey and channels not in (1, 3):
                raise UserError(
                    f"Key environment.grey: the pictures of {config.id} have {channels} channels; only those of RGB "
                    f"pictures can be made grey."
                )
            height, width = config.size or (height, width)
            self.shape = ((1 if config.grey else channels) * config.stack, height, width)
        except UserError:
            self.env.close()
            raise
        self.episode = -1
        self.state = np.zeros(self.shape, np.uint8)

    def action_names(self) -> tuple[str, ...]:
        """One name an action."""
        own = self.config.actions
        if own is not None:
            if len(own) != self.actions:
                raise UserError(
                    f"Key environment.actions has {len(own)} names, but {self.config.id} has {self.actions} actions."
                )
            return own
        return _names_of(self.env, self.actions) or tuple(f"action {k}" for k in range(self.actions))

    def start(self) -> None:
        """Start the next episode."""
        self.episode += 1
        observation, info = self.env.reset(seed=episode_seed(self.seed, self.index, self.episode))
        self.state[:] = np.tile(self._picture(observation), (self.config.stack, 1, 1))
        self.taken: list[int] = []
        self.total = 0.0
        self.success: bool | None = None
        self.terminated = self.truncated = False
        self.lives = self._lives(info)

    def act(self, action: int) -> float:
        """Hold an action for ``frame_skip`` steps, less where the episode ends; the sum of their rewards."""
        reward = 0.0
        for _ in range(self.config.frame_skip):
            observation, value, terminated, truncated, info = self.env.step(action + self.first)
            reward += float(value)
            self.terminated, self.truncated = bool(terminated), bool(truncated)
            if terminated or truncated:
                break
        self.taken.append(action)
        self.total += reward
        self.truncated |= self.config.max_steps is not None and len(self.taken) >= self.config.max_steps
        if "is_success" in info:
            self.success = bool(info["is_success"])
        self.lives = self._lives(info)
        picture = self._picture(observation)
        self.state[: -len(picture)] = self.state[len(picture) :].copy()
        self.state[-len(picture) :] = picture
        return reward

    def _picture(self, observation: Any) -> NDArray[np.uint8]:
        """One picture of the state, uint8 (channels, H, W)."""
        picture = np.asarray(observation if self.key is None else observation[self.key])
        if picture.ndim == 2:
            picture = picture[:, :, None]
        elif self.channels_first:
            picture = picture.transpose(1, 2, 0)
        if self.config.grey and picture.shape[2] == 3:
            picture = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)[:, :, None]
        if self.config.size is not None and picture.shape[:2] != self.config.size:
            size = self.config.size[::-1]
            picture = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
            picture = picture.reshape(*self.config.size, -1)
        return picture.transpose(2, 0, 1)

    def _lives(self, info: dict[str, Any]) -> int:
        return int(info.get("lives", 0)) if self.config.episodic_life else 0


def make(config: GymnasiumConfig) -> gymnasium.Env:
    """The environment with its wrappers.

    Raises:
        UserError: the id, the module or a wrapper is not known, lacks a package, or does not take its arguments.
    """
    packages = [names for prefix, names in PACKAGES.items() if config.id.startswith(prefix)]
    for module, install in [*packages, *([(config.module, None)] if config.module else [])]:
        _import(module, "environment.module" if install is None else f"environment.id {config.id}", install)
    try:
        env = gymnasium.make(config.id, disable_env_checker=True, **config.kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(
            f"Key environment.id: {config.id} needs a package that is not installed: {_sentence(error)} "
            f"(pip install 'gymnasium[box2d]' for CarRacing and its like)."
        ) from error
    except gymnasium.error.UnregisteredEnv as error:
        near = difflib.get_close_matches(config.id, list(gymnasium.registry), 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(
            f"Key environment.id: there is no gymnasium environment '{config.id}'{hint}; name the package that "
            f"registers it in environment.module."
        ) from error
    except gymnasium.error.Error as error:
        raise UserError(f"Key environment.id: gymnasium cannot make '{config.id}': {_sentence(error)}.") from error
    except (TypeError, ImportError, ValueError) as error:
        raise UserError(
            f"Key environment.id: {config.id} cannot be made with these environment.kwargs: {_sentence(error)}."
        ) from error
    for k, wrapper in enumerate(config.wrappers):
        env = _wrapped(env, wrapper, f"environment.wrappers[{k}]")
    return env


def _wrapped(env: gymnasium.Env, wrapper: Any, key: str) -> gymnasium.Env:
    name: Any = wrapper
    arguments: Any = {}
    if isinstance(wrapper, dict) and len(wrapper) == 1:
        ((name, arguments),) = wrapper.items()
        arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{key} must be a wrapper's name, or a mapping of one name to its arguments, not {wrapper!r}.")
    module, colon, attribute = name.partition(":")
    known = gymnasium.wrappers.__all__
    if not colon:
        module, attribute = "gymnasium.wrappers", name
    found = getattr(_import(module, key), attribute, None) if colon or name in known else None
    if found is None:
        near = difflib.get_close_matches(attribute, known, 1)
        hint = f" (did you mean '{near[0]}'?)" if near and not colon else ""
        raise UserError(
            f"{key}: there is no wrapper '{name}'{hint}; give a name of gymnasium.wrappers or module:Class."
        )
    try:
        return found(env, **arguments)
    except Exception as error:  # whatever a stranger's wrapper raises
        raise UserError(f"{key}: {name} cannot be applied with {arguments}: {_sentence(error)}.") from error


def _import(module: str, key: str, install: str | None = None) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        remedy = f"pip install '{install}'" if install else "install it, or correct the name"
        raise UserError(f"{key}: cannot import {module} ({_sentence(error)}); {remedy}.") from error


def _sentence(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _picture_space(space: spaces.Space, config: GymnasiumConfig) -> tuple[str | None, bool, tuple[int, int, int]]:
    """Where the picture is in an observation.

    Returns:
        The dict's key, or None; whether its channels come first; C, H, W.
    """
    key = config.observation_key
    if isinstance(space, spaces.Dict):
        pictures = [name for name, part in space.items() if _axes(part) is not None]
        if key is None and len(pictures) == 1:
            key = pictures[0]
        if key not in space.spaces:
            raise UserError(
                f"Key environment.observation_key must name a picture among the observations of {config.id}, which are "
                f"{', '.join(space.spaces)}, not {key!r}."
            )
        space = space[key]
    elif key is not None:
        raise UserError(f"Key environment.observation_key: the observations of {config.id} are no dict; leave it out.")
    axes = _axes(space)
    if axes is None:
        raise UserError(
            f"Key environment.id: {config.id} does not show pictures (uint8, height x width x channels) but {space}; "
            f"a wrapper in environment.wrappers may, such as AddRenderObservation with environment.kwargs "
            f"render_mode: rgb_array."
        )
    return key, *axes


def _axes(space: spaces.Space) -> tuple[bool, tuple[int, int, int]] | None:
    """Whether the channels of a picture come first, and C, H, W; None: it is no picture."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return None
    if len(space.shape) == 2:
        return False, (1, *space.shape)
    first, middle, last = space.shape
    if min(first, last) > MOST_CHANNELS:
        return None
    return (True, (first, middle, last)) if first < last else (False, (last, first, middle))


def _names_of(env: gymnasium.Env, count: int) -> tuple[str, ...] | None:
    """The names of an environment's actions, if it tells them and there are as many as actions."""
    for layer in _layers(env):
        meanings = getattr(layer, "get_action_meanings", None)
        names: list[str] = []
        if callable(meanings):
            names = [str(name) for name in meanings()]
        elif isinstance(enumeration := getattr(layer, "actions", None), type):
            names = [str(item.name) for item in enumeration] if issubclass(enumeration, enum.Enum) else []
        if len(names) == count:
            return tuple(name.lower().replace("_", " ") for name in names)
    return None


def _layers(env: Any) -> Iterator[Any]:
    """The wrappers from the outermost, then the environment."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env
