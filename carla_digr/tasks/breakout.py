"""Breakout: the Atari 2600 game in the Arcade Learning Environment, with the usual preprocessing.

| action | name | effect |
|---|---|---|
| 0 | noop | nothing |
| 1 | fire | serves the ball, if there is none |
| 2 | right | paddle to the right |
| 3 | left | paddle to the left |

An action is held for 4 frames. The state is the last two actions' pictures, the older first: uint8 (2, 84, 84), each
the maximum over its last two frames, grey, scaled by area (Mnih et al. 2015). A game starts with 1 to 30 frames without
action. The ball of every life is served for the player; from then both pictures of the state are of this life.

Evaluation: an episode is a whole game of five lives, the reward its points (at most 864: two walls of 108 bricks).
Training: an episode is one life, the reward the sign of the points (Mnih et al. 2015); after a lost life the game goes
on. Truncation: max_frames of one game.

The emulators are driven one by one: ale-py's own AtariVectorEnv (0.12.1) starts a new game after each lost life
(``episodic_life``), so that nothing but the first life is ever trained, shows neither RAM nor emulator state, and takes
1.6 times the processor time a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ale_py import Action, ALEInterface, ALEState, LoggerMode, roms
from numpy.typing import NDArray

from carla_digr.config import setting
from carla_digr.tasks.environment import BatchedEnvironment, Steps
from carla_digr.tasks.objects import SceneObject

ACTION_NAMES = ("noop", "fire", "right", "left")
_ACTIONS = (Action.NOOP, Action.FIRE, Action.RIGHT, Action.LEFT)
NOOP, FIRE, RIGHT, LEFT = range(4)
CLASSES = ("elsewhere", "paddle", "ball")
PADDLE, BALL = 1, 2
STACK = 2  # pictures of a state
FRAME_SKIP = 4  # frames an action is held
SIDE = 84  # pixels
OBSERVATION_SHAPE = (STACK, SIDE, SIDE)
SCREEN = (210, 160)  # pixels: rows, columns
_OBJECTS = [99, 101, 72, 108]  # RAM: x and y of the ball (y 0: none), x and half the width of the paddle
_FLOOR = 196  # screen row below which nothing is drawn
_FIELD = np.s_[32:_FLOOR, 8:152]  # of the screen, within the walls, which begin under the score
_WALL_TOP = 17
_BRICKS = np.s_[57:93, 8:152]  # of the screen: 6 rows of 18
_BRICK_ROWS, _BRICK = 6, (6, 8)  # a brick's pixels: rows, columns
_PADDLE_ROWS = slice(189, 193)
WALL_POINTS = 432  # of one whole wall: 36 bricks each of 1, 4 and 7 points


@dataclass(frozen=True)
class BreakoutConfig:
    """The Atari game Breakout; see this module."""

    repeat_action_probability: float = setting(0.0, minimum=0, maximum=1)  # sticky actions (Machado et al. 2018: 0.25)
    idle_frames_max: int = setting(30, minimum=1)  # a game starts with 1 to this many frames without action
    max_frames: int = setting(108_000, minimum=100)  # of one game at 60 a second: half an hour


class Breakout:
    """The task, as the offline stages see it."""

    Settings = BreakoutConfig
    name = "breakout"
    observation_shape = OBSERVATION_SHAPE
    action_names = ACTION_NAMES
    idle_action = NOOP
    expert = None

    def __init__(self, config: BreakoutConfig):
        self.config = config

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> BreakoutVecEnv:
        """Emulators in this process; see Task.make_vec_env and, for what ``evaluation`` changes, this module."""
        return BreakoutVecEnv(environments, seed, self.config, evaluation)


class BreakoutVecEnv(BatchedEnvironment):
    """N games.

    Args:
        environments: N.
        seed: game e of environment i follows from (seed, i, e) and the actions.
        config: of the task.
        evaluation: episodes are whole games and rewards points; else lives, and the points' sign.

    An episode's info has "metrics" ("score" in points, "steps") and "is_success" (the first wall is gone) if the game
    ended with it.
    """

    named_objects, least_named = "ball and paddle", 2
    plays = "sampled"  # the games of a greedy player are a few, which the frames without action choose from

    def __init__(self, environments: int, seed: int, config: BreakoutConfig, evaluation: bool = True):
        super().__init__(environments, OBSERVATION_SHAPE, len(_ACTIONS))
        self.games = [_Game(seed, i, config) for i in range(environments)]
        self.evaluation = evaluation

    def reset(self) -> NDArray[np.uint8]:
        """Start a new game everywhere; uint8 (N, 2, 84, 84)."""
        for game in self.games:
            game.start()
        return self.observe()

    def step(self, actions: Any) -> Steps:
        """One action everywhere; finished episodes restart."""
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in self.games]
        for i, (game, action) in enumerate(zip(self.games, actions, strict=True)):
            points, life_lost = game.act(_ACTIONS[action])
            rewards[i] = points if self.evaluation else np.sign(points)
            over, truncated = game.ale.game_over(with_truncation=False), game.frames >= game.config.max_frames
            if over or truncated or (life_lost and not self.evaluation):
                dones[i] = True
                infos[i] = {
                    "terminal_observation": game.pictures.copy(),
                    "TimeLimit.truncated": bool(truncated and not over and not (life_lost and not self.evaluation)),
                    "metrics": {},
                }
            if over or truncated:
                infos[i]["metrics"] = {"score": float(game.score), "steps": float(game.steps)}
                infos[i]["is_success"] = bool(game.score >= WALL_POINTS)
                game.start()
            elif life_lost:
                game.serve()
        return self.observe(), rewards, dones, infos

    def observe(self) -> NDArray[np.uint8]:
        """The states, uint8 (N, 2, 84, 84)."""
        return np.stack([game.pictures for game in self.games])

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the states shows in either picture, int8 (N, 84, 84): an index into CLASSES."""
        return np.stack([game.classes() for game in self.games])

    def importance(self) -> NDArray[np.int8]:
        """Where ball and paddle are, int8 (N, 84, 84): 1 there and 0 elsewhere; see tasks.KnowsImportance."""
        return importance_of(self.classes())

    def objects(self) -> list[list[SceneObject]]:
        """Ball, paddle, rows of bricks, walls and the line of the score; see tasks.objects.KnowsObjects.

        After ``set_state`` not before two actions: the emulators' screens are not part of a state.
        """
        return [game.scene() for game in self.games]

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything the following steps depend on besides the constructor's arguments.

        Except with sticky actions: ALE's state lacks the action that the very next frame may repeat.
        """
        emulators = [np.frombuffer(game.ale.cloneState(include_rng=True).serialize(), np.uint8) for game in self.games]
        return {
            "emulators": np.concatenate(emulators),
            "emulator_bytes": np.array([len(data) for data in emulators]),
            "pictures": self.observe(),
            "objects": np.stack([game.objects for game in self.games]),
            "counters": np.array([game.counters for game in self.games]),
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``."""
        ends = np.cumsum(state["emulator_bytes"])
        for i, data in enumerate(np.split(state["emulators"], ends[:-1])):
            self.games[i].ale.restoreState(ALEState(data.tobytes()))
            self.games[i].pictures = state["pictures"][i].copy()
            self.games[i].objects = state["objects"][i].copy()
            self.games[i].counters = tuple(state["counters"][i].tolist())


class _Game:
    """One emulator and its state as the policy sees it."""

    def __init__(self, seed: int, index: int, config: BreakoutConfig):
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.seed, self.index, self.config = seed, index, config
        self.game = -1
        self.frames = self.steps = self.score = self.lives = 0  # of this game
        self.pictures = np.zeros(OBSERVATION_SHAPE, np.uint8)
        self.objects = np.zeros((STACK, 2, len(_OBJECTS)), np.uint8)  # in the two frames of each picture
        self.screens = np.zeros((STACK, 2, *SCREEN), np.uint8)  # those two frames
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", config.repeat_action_probability)
        self.ale.loadROM(_rom())

    @property
    def counters(self) -> tuple[int, ...]:
        """What the emulator does not know."""
        return self.game, self.frames, self.steps, self.score, self.lives

    @counters.setter
    def counters(self, values: tuple[int, ...]) -> None:
        self.game, self.frames, self.steps, self.score, self.lives = values

    def start(self) -> None:
        """Start a new game and serve its first ball."""
        self.game += 1
        rng = np.random.default_rng((self.seed, self.index, self.game))
        if self.config.repeat_action_probability:  # only loading takes the emulator's seed
            self.ale.setInt("random_seed", int(rng.integers(2**31)))
            self.ale.loadROM(_rom())
        self.ale.reset_game()
        idle_frames = int(rng.integers(1, self.config.idle_frames_max + 1))
        for _ in range(idle_frames):
            self.ale.act(Action.NOOP)
        self.frames, self.steps, self.score, self.lives = idle_frames, 0, 0, self.ale.lives()
        self.serve()

    def serve(self) -> None:
        """Bring a new life's ball into play, as stable-baselines3's FireResetEnv does; no brick is in its reach."""
        self.act(Action.FIRE)
        self.pictures[:] = self.pictures[-1]
        self.objects[:] = self.objects[-1]
        self.screens[:] = self.screens[-1]
        self.steps -= 1

    def act(self, action: Action) -> tuple[int, bool]:
        """Hold an action for FRAME_SKIP frames, less where the game ends.

        Returns:
            points, whether a life was lost.
        """
        points = 0
        for kept in (self.pictures, self.objects, self.screens):
            kept[0] = kept[1]
        for frame in range(FRAME_SKIP):
            points += self.ale.act(action)
            self.frames += 1
            over = self.ale.game_over(with_truncation=False)
            if over:
                self.screens[1] = self.ale.getScreenGrayscale()
                self.objects[1] = self.ale.getRAM()[_OBJECTS]
                break
            if frame >= FRAME_SKIP - 2:
                self.ale.getScreenGrayscale(self.screens[1, frame % 2])
                self.objects[1, frame % 2] = self.ale.getRAM()[_OBJECTS]
        self.pictures[1] = _picture(self.screens[1])
        self.steps += 1
        self.score += points
        lives = self.ale.lives()
        lost, self.lives = lives < self.lives, lives
        return points, lost

    def classes(self) -> NDArray[np.int8]:
        """The pixels that ball and paddle touch, int8 (84, 84)."""
        result = np.zeros((SIDE, SIDE), np.int8)
        for ball_x, ball_y, paddle_x, half_width in self.objects.reshape(-1, len(_OBJECTS)).astype(int):
            paddle = result[_touched(paddle_x - 47, 189, 2 * half_width, 4)]
            paddle[paddle == 0] = PADDLE
            if ball_y:
                result[_touched(ball_x - 49, ball_y + 9, 2, 4)] = BALL
        return result

    def scene(self) -> list[SceneObject]:
        """What can be taken out of the pictures, which are put together anew from the screens with it painted black.

        Black is behind everything, but for a ball before bricks, which has their colour (`_pieces`).
        """
        assert np.array_equal([_picture(pair) for pair in self.screens], self.pictures), "too early after set_state"
        frames = self.screens.reshape(-1, *SCREEN)
        values = self.objects.reshape(-1, len(_OBJECTS)).astype(int)
        pieces = [_pieces(*pair) for pair in zip(frames, values, strict=True)]
        away = 189 - (values[-1, 1] + 9) if values[-1, 1] else SCREEN[0]  # the ball from the paddle's row
        nearness = {"ball": 1.0, "paddle": 1 / (1 + abs(float(away)))}
        objects = []
        for kind, name in pieces[0]:
            shown = np.stack([piece[kind, name] for piece in pieces])
            if not shown.any():
                continue
            screens = np.where(shown, 0, frames).reshape(self.screens.shape)
            mask = _picture(shown * np.uint8(255)) > 0
            without = np.stack([_picture(pair) for pair in screens])
            needed = kind in nearness
            objects.append(SceneObject(kind, name, mask, without, needed, nearness.get(kind, 0.0), needed))
        return objects


def _pieces(screen: NDArray[np.uint8], values: NDArray[np.int64]) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """Pixels of a screen by the kind and the name of what is painted there, bool (210, 160).

    A brick is a cell of which more than half is lit. The ball, drawn in the colour of the bricks' row that it is in, is
    what else is lit above the paddle: at a bounce RAM is a frame ahead of the screen. Where two overlap in one colour
    the pixels are of neither.

    Args:
        values: of _OBJECTS.
    """
    ball_x, ball_y, paddle_x, half_width = values
    lit = screen > 0
    field, bricks, ball, paddle, below = (np.zeros(SCREEN, bool) for _ in range(5))
    field[_FIELD] = below[_PADDLE_ROWS] = True
    height, width = _BRICK
    cells = lit[_BRICKS].reshape(_BRICK_ROWS, height, -1, width).mean(axis=(1, 3)) > 0.5
    bricks[_BRICKS] = cells.repeat(height, axis=0).repeat(width, axis=1)
    if ball_y:
        ball[ball_y + 9 : ball_y + 13, max(ball_x - 49, 0) : max(ball_x - 47, 0)] = True
    paddle[_PADDLE_ROWS, paddle_x - 47 : paddle_x - 47 + 2 * half_width] = True
    line = np.arange(SCREEN[0])[:, None]
    top = _BRICKS[0].start
    rows = {
        ("bricks", f"row {k + 1} of bricks"): bricks & (line >= top + k * height) & (line < top + (k + 1) * height)
        for k in range(_BRICK_ROWS)
    }
    return {
        ("ball", "ball"): lit & field & np.where(below, ball & ~paddle, ~bricks),
        ("paddle", "paddle"): lit & field & below & ~ball,
        **{name: row & ~ball for name, row in rows.items()},
        ("wall", "walls"): lit & ~field & (line >= _WALL_TOP),
        ("score", "score and lives"): lit & (line < _WALL_TOP),
    }


def importance_of(classes: NDArray[np.int8]) -> NDArray[np.int8]:
    """``BreakoutVecEnv.importance`` of its ``classes``."""
    return (classes > 0).astype(np.int8)


def _touched(x: int, y: int, width: int, height: int) -> tuple[slice, slice]:
    """Rows and columns of the state that a box of the screen, in its pixels, contributes to."""
    rows = slice(y * SIDE // SCREEN[0], -(-min(y + height, _FLOOR) * SIDE // SCREEN[0]))
    return rows, slice(max(0, x) * SIDE // SCREEN[1], -(-(x + width) * SIDE // SCREEN[1]))


def _picture(screens: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The maximum of screens uint8 (N, 210, 160), scaled by area to uint8 (84, 84)."""
    return cv2.resize(np.maximum.reduce(screens), (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(
        np.uint8, copy=False
    )


def _rom() -> Path:
    path = roms.get_rom_path("breakout")
    assert path is not None  # part of the ale-py package
    return path
