"""Red-Fetch-Green: the paper's MiniGrid task, batched.

A room of 8x8 cells with walls round it holds a red agent, a green ball (the target) and a blue and a yellow ball
(distractors) at random places. The state is MiniGrid's own picture of the whole room, 8 pixels a cell, without
highlight: uint8 (3, 64, 64), put together from tile pictures that MiniGrid drew once.

| action | name | effect |
|---|---|---|
| 0 | left | turn left |
| 1 | right | turn right |
| 2 | forward | move one cell, unless a wall or a ball is there |
| 3 | pickup | take the ball in front: the episode ends |

Reward: 1 - 0.9 * steps / max_steps (MiniGrid's) when the green ball is taken, else 0. Termination: any ball is taken.
Truncation: max_steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np

from carla_digr.config import setting
from carla_digr.tasks.environment import BatchedEnvironment, Steps
from carla_digr.tasks.objects import SceneObject

SIZE = 8  # cells
TILE = 8  # pixels
ACTION_NAMES = ("left", "right", "forward", "pickup")
LEFT, RIGHT, FORWARD, PICKUP = range(4)
OBSERVATION_SHAPE = (3, SIZE * TILE, SIZE * TILE)
BALLS = ("green", "blue", "yellow")  # the target first
_STEP = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])  # x, y for MiniGrid's directions right, down, left, up
# Tile numbers: floor, wall, the balls, the agent in its four directions.
_FLOOR, _WALL, _BALL, _AGENT = 0, 1, 2, 5


@dataclass(frozen=True)
class RedFetchGreenConfig:
    """The Red-Fetch-Green room; it has no settings besides the length of an episode."""

    max_steps: int = setting(256, minimum=1)  # MiniGrid's default for 8x8 rooms: 4 * 8 * 8


class RedFetchGreen:
    """The task, as the offline stages see it."""

    Settings = RedFetchGreenConfig
    name = "red_fetch_green"
    observation_shape = OBSERVATION_SHAPE
    action_names = ACTION_NAMES
    idle_action = None
    expert = None

    def __init__(self, config: RedFetchGreenConfig):
        self.config = config

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> RedFetchGreenVecEnv:
        """Batched environments, for training and evaluation the same; see Task.make_vec_env."""
        return RedFetchGreenVecEnv(environments, seed, self.config.max_steps)


class RedFetchGreenVecEnv(BatchedEnvironment):
    """N rooms in numpy arrays.

    Args:
        environments: N.
        seed: episode e of environment i follows from (seed, i, e).
        max_steps: length at which an episode is truncated.
    """

    named_objects, least_named, plays = "balls", 2, "greedy"

    def __init__(self, environments: int, seed: int = 0, max_steps: int = 256):
        super().__init__(environments, OBSERVATION_SHAPE, len(ACTION_NAMES))
        self.base_seed = seed
        self.max_steps = max_steps
        self.episode = np.full(environments, -1, np.int64)
        self.steps = np.zeros(environments, np.int64)
        self.agent = np.zeros((environments, 2), np.int64)  # x, y in cells
        self.direction = np.zeros(environments, np.int64)
        self.balls = np.zeros((environments, len(BALLS), 2), np.int64)
        self._rows = np.arange(environments)

    def reset(self) -> np.ndarray:
        """Start a new episode everywhere; uint8 (N, 3, 64, 64)."""
        for i in range(self.num_envs):
            self._start_episode(i)
        return self.observe()

    def _start_episode(self, i: int) -> None:
        self.episode[i] += 1
        rng = np.random.default_rng((self.base_seed, i, int(self.episode[i])))
        inner = SIZE - 2
        cells = rng.permutation(inner * inner)[: 1 + len(BALLS)]
        places = np.stack([cells % inner + 1, cells // inner + 1], axis=1)
        self.agent[i], self.balls[i] = places[0], places[1:]
        self.direction[i] = rng.integers(4)
        self.steps[i] = 0

    def step(self, actions: Any) -> Steps:
        """One step everywhere; finished episodes restart."""
        actions = np.asarray(actions)
        self.direction = (self.direction + (actions == RIGHT) - (actions == LEFT)) % 4
        self.steps += 1
        ahead = self.agent + _STEP[self.direction]
        ball_ahead = (self.balls == ahead[:, None]).all(axis=2)  # (N, 3)
        blocked = ball_ahead.any(axis=1) | ((ahead < 1) | (ahead > SIZE - 2)).any(axis=1)
        moving = (actions == FORWARD) & ~blocked
        self.agent[moving] = ahead[moving]
        taken = ball_ahead & (actions == PICKUP)[:, None]
        success = taken[:, 0]
        terminated = taken.any(axis=1)
        truncated = (self.steps >= self.max_steps) & ~terminated
        rewards = np.where(success, 1 - 0.9 * self.steps / self.max_steps, 0).astype(np.float32)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in self._rows]
        if not dones.any():
            return self.observe(), rewards, dones, infos
        self.balls[taken] = 0  # carried: no longer in the room; the corner cell is a wall and hides nothing
        last = self.observe()
        for i in np.flatnonzero(dones):
            infos[i] = {
                "terminal_observation": last[i].copy(),
                "TimeLimit.truncated": bool(truncated[i]),
                "is_success": bool(success[i]),
                "metrics": {"success": float(success[i]), "steps": float(self.steps[i])},
            }
            self._start_episode(int(i))
        last[dones] = self.observe(np.flatnonzero(dones))
        return last, rewards, dones, infos

    def cells(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Tile numbers (N, 8, 8), indexed [y, x], of the environments ``rows`` (default all)."""
        rows = self._rows if rows is None else rows
        cells = np.full((len(rows), SIZE, SIZE), _WALL)
        cells[:, 1:-1, 1:-1] = _FLOOR
        every = np.arange(len(rows))
        for ball in range(len(BALLS)):
            x, y = self.balls[rows, ball].T
            here = x > 0
            cells[every[here], y[here], x[here]] = _BALL + ball
        x, y = self.agent[rows].T
        cells[every, y, x] = _AGENT + self.direction[rows]
        return cells

    def observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Pictures uint8 (N, 3, 64, 64) of the environments ``rows`` (default all)."""
        return pictures_of(self.cells(rows))

    def importance(self) -> np.ndarray:
        """Which pixels matter, int8 (N, 64, 64).

        1 on the tiles of the agent and the target, 0 on empty floor, -1 (not counted) on walls and distractors:
        the split of the paper's Table 1.
        """
        return importance_of(self.cells())

    def objects(self) -> list[list[SceneObject]]:
        """Balls, walls and agent of the present rooms, with floor in their place; see tasks.objects.KnowsObjects.

        Without its walls or its agent no room was ever seen, without a ball none but the one in which it is taken.
        """
        cells = self.cells()
        return [self._objects_of(i, cells[i]) for i in range(self.num_envs)]

    def _objects_of(self, i: int, cells: np.ndarray) -> list[SceneObject]:
        places: dict[str, tuple[str, np.ndarray]] = {
            f"{colour} ball": ("distractor" if ball else "target", cells == _BALL + ball)
            for ball, colour in enumerate(BALLS)
        }
        places |= {"walls": ("wall", cells == _WALL), "agent": ("agent", cells >= _AGENT)}
        pictures = pictures_of(np.stack([np.where(here, _FLOOR, cells) for _, here in places.values()]))
        objects = []
        for (name, (kind, here)), without in zip(places.items(), pictures, strict=True):
            mask = here.repeat(TILE, axis=0).repeat(TILE, axis=1)
            named = kind in ("target", "distractor")
            away = np.abs(np.argwhere(here)[0, ::-1] - self.agent[i]).sum() if named else 0
            nearness = 1 / (1 + float(away)) if named else 0.0
            objects.append(SceneObject(kind, name, mask, without, named, nearness, kind in ("target", "agent")))
        return objects

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything the following steps depend on besides the constructor's arguments."""
        return {name: getattr(self, name).copy() for name in ("episode", "steps", "agent", "direction", "balls")}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``."""
        for name, value in state.items():
            getattr(self, name)[:] = value


class RedFetchGreenEnv(gymnasium.Env):
    """One room as an ordinary gymnasium environment, registered as ``carla_digr/RedFetchGreen-v0``."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (gymnasium's interface)

    def __init__(self, max_steps: int = 256, render_mode: str | None = None):
        self.render_mode = render_mode
        self._max_steps = max_steps
        self._batch = RedFetchGreenVecEnv(1, 0, max_steps)
        self.observation_space = self._batch.observation_space
        self.action_space = self._batch.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new episode; the same seed gives the same episodes."""
        super().reset(seed=seed)
        if seed is not None:
            self._batch = RedFetchGreenVecEnv(1, seed, self._max_steps)
        return self._batch.reset()[0], {}

    def step(self, action: int):
        """One step; see the module's table."""
        observations, rewards, dones, infos = self._batch.step(np.array([action]))
        info = infos[0]
        observation = info.pop("terminal_observation", observations[0])
        truncated = info.pop("TimeLimit.truncated", False)
        return observation, float(rewards[0]), bool(dones[0]) and not truncated, truncated, info

    def render(self) -> np.ndarray:
        """The picture as uint8 (64, 64, 3)."""
        return self._batch.observe()[0].transpose(1, 2, 0)


def pictures_of(cells: np.ndarray) -> np.ndarray:
    """Pictures uint8 (N, 3, 64, 64) of tile numbers (N, 8, 8)."""
    rows = _tile_rows().take(cells, axis=0, mode="clip")  # (N, y, x, 3 * tile row)
    rows = rows.reshape(-1, SIZE, SIZE, 3, TILE).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(rows).view(np.uint8).reshape(-1, *OBSERVATION_SHAPE)


def importance_of(cells: np.ndarray) -> np.ndarray:
    """``RedFetchGreenVecEnv.importance`` of tile numbers (N, 8, 8): int8 (N, 64, 64)."""
    label = np.full(_AGENT + 4, -1, np.int8)
    label[[_FLOOR, _BALL]] = 0, 1
    label[_AGENT:] = 1
    return label[cells].repeat(TILE, axis=1).repeat(TILE, axis=2)


@lru_cache(maxsize=1)
def _tile_rows() -> np.ndarray:
    """Pictures by MiniGrid of floor, wall, green, blue and yellow ball, and the agent in four directions.

    uint64 (9, 3 * 8): channels and rows of a tile, the 8 pixels of a row as one number, which copies six times as fast
    as single pixels do.
    """
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Ball, Wall

    objects = [None, Wall(), *(Ball(color) for color in BALLS)]
    pictures = [Grid.render_tile(item, tile_size=TILE) for item in objects]
    pictures += [Grid.render_tile(None, agent_dir=direction, tile_size=TILE) for direction in range(4)]
    tiles = np.stack(pictures).astype(np.uint8).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(tiles).view(np.uint64).reshape(len(tiles), -1)
