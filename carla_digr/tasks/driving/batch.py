"""The batch of highways that the stages train and measure on."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import ACTIONS, IMAGE_SIZE, TICK, DriveFrame, VehicleCommand
from carla_digr.driving.episode import RunningEpisode
from carla_digr.scheduling import usable_cores
from carla_digr.simulator.road import Road
from carla_digr.simulator.traffic import VEHICLE
from carla_digr.tasks.driving.classes import importance_of
from carla_digr.tasks.driving.drive import SCENES, InProcessDrive
from carla_digr.tasks.driving.objects import scene_objects
from carla_digr.tasks.driving.reward import less_effort
from carla_digr.tasks.driving.settings import DrivingConfig
from carla_digr.tasks.environment import BatchedEnvironment, Steps, episode_seed
from carla_digr.tasks.objects import SceneObject

PASSED = 100.0  # m within which a vehicle that was ahead a decision ago has been overtaken, not gone round the ring
_METRICS = (
    "clean",
    "collision",
    "off_road",
    "seconds",
    "driven",
    "distance",
    "overtakes",
    "mean_speed",
    "action_changes",
)


class TaskDrive(Protocol):
    """What the task's episodes need of a drive, wherever it is."""

    def reset(self, seed: int) -> DriveFrame:
        """See control.Drive."""

    def advance(self, wanted: VehicleCommand) -> None:
        """Apply a command and advance one tick."""

    def speed(self) -> float:
        """The ego's speed in m/s."""

    def incident(self) -> tuple[str | None, bool, bool, bool]:
        """Of the last tick: collision, off_road, road_ends and struck of control.DriveFrame."""

    def frame(self) -> DriveFrame:
        """The present frame with its picture."""

    def reward(self, config: DrivingConfig, seconds: float) -> float:
        """Reward of the last ``seconds`` if nothing ended in them."""

    def ahead(self) -> dict[int, float]:
        """m along the road from the ego to vehicles that drive in its direction, negative behind it, by their ids."""


class Episode:
    """One highway with its ego: actions in, pictures, rewards and the episode's figures out."""

    def __init__(self, config: DrivingConfig, drive: TaskDrive, decision_ticks: int):
        self.config = config
        self.decision_ticks = decision_ticks
        self.commands = tuple(ACTIONS[config.actions].values())
        self.drive = drive

    def reset(self, seed: int) -> DriveFrame:
        """Start the episode of this seed."""
        frame = self.drive.reset(seed)
        self.running = RunningEpisode(self.config.episode_seconds)
        self.overtaken = self.changes = 0
        self.last_action = -1
        self.before = self.drive.ahead()
        return frame

    def command(self, action: int) -> VehicleCommand:
        """What an action stands for."""
        return self.commands[action]

    def step(self, action: int) -> tuple[DriveFrame, float, bool, bool]:
        """One decision: frame, reward, terminated, truncated."""
        wanted = self.command(action)
        changed = self.last_action not in (-1, action)
        self.changes += changed
        self.last_action = action
        for _ in range(self.decision_ticks):
            self.drive.advance(wanted)
            self.running.count(self.drive.speed(), *self.drive.incident())
            if self.running.terminated or self.running.struck or self.running.road_ends:
                break
        frame = self.drive.frame()
        ahead = self.drive.ahead()
        self.overtaken += sum(-PASSED < ahead[i] < 0.0 < far for i, far in self.before.items() if i in ahead)
        self.before = ahead
        if self.running.terminated:
            return frame, -1.0, True, False
        seconds = self.decision_ticks * TICK
        value = less_effort(self.config, self.drive.reward(self.config, seconds), seconds, wanted, changed)
        return frame, value, False, self.running.truncated

    def metrics(self) -> dict[str, float]:
        """Figures of the episode so far; collision is whether something was hit."""
        figures = self.running.figures()
        decisions = max(self.running.ticks // self.decision_ticks - 1, 1)
        figures |= {
            "collision": figures["collision"] is not None,
            "overtakes": self.overtaken,
            "action_changes": self.changes / decisions,
        }
        return {name: float(figures[name]) for name in _METRICS}


class HighwayEpisode(Episode):
    """An episode in this process, which can be saved and continued."""

    drive: InProcessDrive

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything the following steps depend on."""
        world = self.drive.world.get_state()
        return {
            "vehicles": world["vehicles"].view(np.uint8).reshape(len(world["vehicles"]), -1).copy(),
            "ahead": np.array([self.before.get(i, 0.0) > 0.0 for i in self.drive.world.ids()]),
            "counters": np.array(
                [world["frame"], world["last_id"], self.drive.ego, self.running.ticks, self.overtaken]
            ),
            "actions": np.array([self.last_action, self.changes]),
            "scene": np.array([self.drive.scene]),
            "sums": np.array([world["elapsed"], self.running.distance]),
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``."""
        frame, last_id, ego, ticks, self.overtaken = (int(value) for value in state["counters"])
        elapsed, distance = (float(value) for value in state["sums"])
        self.running = RunningEpisode(self.config.episode_seconds)
        self.running.ticks, self.running.distance = ticks, distance
        vehicles = np.ascontiguousarray(state["vehicles"]).view(VEHICLE)[:, 0]
        self.drive.restore({"vehicles": vehicles, "frame": frame, "last_id": last_id, "elapsed": elapsed}, ego)
        self.before = dict(zip(self.drive.world.ids(), state["ahead"].astype(float).tolist(), strict=True))
        self.last_action, self.changes = (int(value) for value in state.get("actions", (-1, 0)))
        self.drive.set_scene(int(state.get("scene", (0,))[0]))


class DrivingVecEnv(BatchedEnvironment):
    """N highways in one process, stepped by as many threads as it has cores; see Task.make_vec_env.

    The simulator's compiled code runs without Python's lock, and no highway knows of another: the number of threads
    changes nothing but the time.

    Args:
        environments: N.
        seed: episode e of environment i follows from (seed, i, e).
        config: of the task.
        evaluation: decisions last ``decision_ticks`` instead of ``training_decision_ticks``.
        varied: ``random_scenery`` counts, by default in training.

    Attributes:
        resting: see tasks.SparesWork.
    """

    def __init__(
        self, environments: int, seed: int, config: DrivingConfig, evaluation: bool, varied: bool | None = None
    ):
        super().__init__(environments, (3, IMAGE_SIZE, IMAGE_SIZE), len(ACTIONS[config.actions]))
        self.base_seed = seed
        road = Road.ring()
        ticks = config.decision_ticks if evaluation else config.training_decision_ticks
        scenery = config.random_scenery if (not evaluation if varied is None else varied) else 0.0
        self.episodes = [
            HighwayEpisode(config, InProcessDrive(config.vehicles, road, scenery), ticks) for _ in range(environments)
        ]
        self.commands = self.episodes[0].commands
        self.started = np.zeros(environments, np.int64)
        self.resting = np.zeros(environments, bool)
        self.observations = np.zeros((environments, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        threads = min(environments, usable_cores())
        self._shares = [range(k, environments, threads) for k in range(threads)]
        self._threads = ThreadPoolExecutor(threads, "highway")

    def reset(self) -> NDArray[np.uint8]:
        """Start a new episode everywhere; uint8 (N, 3, 128, 128)."""
        for i in range(self.num_envs):
            self._start_episode(i)
        return self.observe()

    def _start_episode(self, i: int) -> None:
        seed = episode_seed(self.base_seed, i, int(self.started[i]))
        self.started[i] += 1
        self.observations[i] = self.episodes[i].reset(seed).image.transpose(2, 0, 1)

    def step(self, actions: Any) -> Steps:
        """One decision everywhere; finished episodes restart."""
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]

        def advance(share: Iterable[int]) -> None:
            for i in share:
                if self.resting[i]:
                    continue
                episode = self.episodes[i]
                frame, rewards[i], terminated, truncated = episode.step(int(actions[i]))
                self.observations[i] = frame.image.transpose(2, 0, 1)
                if terminated or truncated:
                    dones[i] = True
                    infos[i] = {
                        "terminal_observation": self.observations[i].copy(),
                        "TimeLimit.truncated": truncated,
                        "is_success": not terminated,
                        "metrics": episode.metrics(),
                    }
                    self._start_episode(i)

        list(self._threads.map(advance, self._shares))  # raises here what a thread raised
        return self.observe(), rewards, dones, infos

    def look_away(self) -> None:
        """See tasks.SparesWork."""
        for episode in self.episodes:
            episode.drive.blind = True

    def metrics(self, i: int) -> dict[str, float]:
        """Figures of the present episode of environment i."""
        return self.episodes[i].metrics()

    def observe(self) -> NDArray[np.uint8]:
        """The present observations, uint8 (N, 3, 128, 128)."""
        return self.observations.copy()

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the present observations shows, int8 (N, 128, 128); see driving.classes."""
        return np.stack([episode.drive.classes() for episode in self.episodes])

    def importance(self) -> NDArray[np.int8]:
        """Which pixels matter, int8 (N, 128, 128); see tasks.KnowsImportance."""
        return importance_of(self.classes())

    named_objects, least_named, plays = "vehicles", 2, "greedy"

    def objects(self) -> list[list[SceneObject]]:
        """What can be taken out of the present pictures; see tasks.objects.KnowsObjects."""
        return [scene_objects(episode.drive) for episode in self.episodes]

    def in_other_scenery(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Half of them without trees and houses, the others in a drawn scene; see tasks.KnowsScenery."""
        scenes = np.where(rng.random(self.num_envs) < 0.5, 0, rng.integers(1, SCENES, self.num_envs))
        drives = [episode.drive for episode in self.episodes]
        return np.stack(list(self._threads.map(InProcessDrive.picture_in, drives, scenes.tolist())))

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything the following steps depend on besides the constructor's arguments."""
        state = {"started": self.started.copy()}
        for i, episode in enumerate(self.episodes):
            state.update({f"{i}.{key}": value for key, value in episode.get_state().items()})
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``."""
        self.started[:] = state["started"]
        for i, episode in enumerate(self.episodes):
            prefix = f"{i}."
            episode.set_state({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
            self.observations[i] = episode.drive.frame().image.transpose(2, 0, 1)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
