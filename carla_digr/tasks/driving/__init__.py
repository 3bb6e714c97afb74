"""Highway driving: keep the lane, steer around slower traffic, hit nothing.

Actions (:data:`carla_digr.driving.control.ACTION_NAMES`), one for each decision:

| action | wheel angle | speed |
|---|---|---|
| 0 left | -0.02 rad | 22 m/s held by the cruise control |
| 1 keep | 0 | 22 m/s held |
| 2 right | +0.02 rad | 22 m/s held |
| 3 brake | 0 | brakes with about 4 m/s2 |

The wheels take their angle at once and the speed is held, so one picture is a sufficient state but for the speed while
braking. The observation is what a camera 9.5 m behind and 4.2 m above the ego sees, 128x128 RGB; the ego itself is
visible in it. An episode ends when the ego touches anything or its centre leaves the driving lanes, and is cut
(truncated) after ``episode_seconds``.

The reward is in highway_reward.py; over CARLA's protocol it is progress and the terminal -1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from carla_digr.config import DrivingConfig
from carla_digr.driving.control import (
    ACTION_NAMES,
    BRAKE,
    CAMERA,
    CRUISE_SPEED,
    EGO_BLUEPRINT,
    IMAGE_SIZE,
    TICK,
    WHEEL_ANGLE,
    Drive,
    DriveFrame,
    VehicleCommand,
    command,
    pedals,
    signed_speed,
    start_index,
)
from carla_digr.simulator.planner import Planner
from carla_digr.simulator.road import MEDIAN_HALF_WIDTH, ROAD_EDGE, Road, project_to
from carla_digr.simulator.traffic import ONCOMING, VEHICLE
from carla_digr.simulator.vehicle import KINDS, MAX_BRAKING
from carla_digr.simulator.world import Camera, World
from carla_digr.tasks.driving.classes import SAMPLES, class_picture, importance_of
from carla_digr.tasks.driving.reward import hazards, reward

OBSERVATION_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
EGO_KIND = [kind.blueprint for kind in KINDS].index(EGO_BLUEPRINT)


class Driving:
    """The task, as the offline stages see it."""

    name = "driving"
    observation_shape = OBSERVATION_SHAPE
    action_names = ACTION_NAMES
    idle_action = ACTION_NAMES.index("keep")

    def __init__(self, config: DrivingConfig):
        self.config = config

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> DrivingVecEnv:
        """Highways in this process; see Task.make_vec_env."""
        return DrivingVecEnv(environments, seed, self.config, evaluation)

    def expert(self, env: DrivingVecEnv) -> PlannerPolicy:
        """The full-state planner, the upper reference of learned policies."""
        return PlannerPolicy(env)


class PlannerPolicy:
    """The full-state planner as a policy of a batch: one planner an environment, forgotten at an episode's end."""

    def __init__(self, env: DrivingVecEnv):
        self.env = env
        self.planners = [Planner(WHEEL_ANGLE, CRUISE_SPEED, BRAKE * MAX_BRAKING) for _ in env.episodes]
        self.started = env.started.copy()

    def __call__(self, observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        """One action an environment, (N,); the pictures are not looked at."""
        for i in np.flatnonzero(self.started != self.env.started):
            self.planners[i].reset()
        self.started = self.env.started.copy()
        drives = [episode.drive for episode in self.env.episodes]
        actions = [planner.observe(d.world, d.ego) for planner, d in zip(self.planners, drives, strict=True)]
        return np.array(actions, np.int64)


class InProcessDrive:
    """The embedded highway stepped in this process: what training drives on.

    Implements :class:`carla_digr.driving.control.Drive`; the same seed and commands give the same frames as a
    :class:`carla_digr.driving.scenario.Scenario` on the simulator process.
    """

    def __init__(self, vehicles: int = 64, road: Road | None = None):
        self.vehicles = vehicles
        self.road = road or Road.ring()
        self.world = World(self.road)
        self.ego = 0

    def reset(self, seed: int) -> DriveFrame:
        """Start an episode; see :meth:`Drive.reset`."""
        self.world = World(self.road)
        points = self.road.spawn_points
        x, y, yaw = points[start_index(seed, len(points))]
        self._mount(self.world.spawn_vehicle(EGO_KIND, x, y, yaw))
        self.world.set_target_velocity(self.ego, CRUISE_SPEED * math.cos(yaw), CRUISE_SPEED * math.sin(yaw))
        self.world.spawn_traffic(seed, self.vehicles, self.ego)
        self.world.step(TICK)
        return self.frame()

    def _mount(self, ego: int) -> None:
        """Make a vehicle the ego, with the task's camera on it."""
        self.ego = ego
        self.camera = Camera(
            parent=ego,
            x=CAMERA["x"],
            y=CAMERA["y"],
            z=CAMERA["z"],
            pitch=math.radians(CAMERA["pitch"]),
            yaw=math.radians(CAMERA["yaw"]),
            roll=math.radians(CAMERA["roll"]),
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            fov=CAMERA["fov"],
        )

    def advance(self, wanted: VehicleCommand) -> None:
        """Apply a command and advance one tick without a picture."""
        throttle, brake = pedals(wanted, self.speed())
        self.world.set_control(self.ego, throttle, wanted.steer, brake)
        self.world.step(TICK)

    def speed(self) -> float:
        """The ego's speed in m/s, as it can be seen over CARLA's protocol too."""
        ego = self.world.vehicle(self.ego)
        return signed_speed(ego["vx"], ego["vy"], ego["yaw"])

    def step(self, wanted: VehicleCommand) -> DriveFrame:
        """Apply a command, advance 0.05 s and return the frame."""
        self.advance(wanted)
        return self.frame()

    def incident(self) -> tuple[str | None, bool]:
        """What the ego hit in the last tick, and whether its centre is off the driving lanes."""
        hits = [contact.other_name for contact in self.world.collisions if contact.id == self.ego]
        return (hits[0] if hits else None), not MEDIAN_HALF_WIDTH < self.world.vehicle(self.ego)["d"] < ROAD_EDGE

    def frame(self) -> DriveFrame:
        """The present frame with its picture."""
        ego = self.world.vehicle(self.ego)
        collision, off_road = self.incident()
        return DriveFrame(
            frame=self.world.frame,
            stamp=self.world.elapsed,
            image=self.world.render(self.camera)[:, :, 2::-1],
            x=float(np.float32(ego["x"])),
            y=float(np.float32(ego["y"])),
            yaw=float(np.float32(ego["yaw"])),
            speed=self.speed(),
            collision=collision,
            off_road=off_road,
        )

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the present picture shows, int8 (H, W); see tasks.highway_classes."""
        size = IMAGE_SIZE * SAMPLES
        return class_picture(self.world.instances(replace(self.camera, width=size, height=size)), self.ego)

    def reward(self, config: DrivingConfig, seconds: float) -> float:
        """Reward of the last ``seconds`` if nothing ended in them."""
        ego = self.world.vehicle(self.ego)
        closing, alongside = hazards(self.world.vehicles, self.world.index(self.ego), self.road.length)
        heading = project_to(self.road.pieces, ego["x"], ego["y"])[2]
        drift = float(ego["speed"] * math.sin(ego["yaw"] - heading))
        return reward(config, seconds, ego["speed"], ego["d"], drift, closing, alongside)

    def restore(self, state: dict[str, Any], ego: int) -> None:
        """Continue from ``World.get_state`` with the ego of this id."""
        self.world = World(self.road)
        self.world.set_state(state)
        self._mount(ego)

    def close(self) -> None:
        """Nothing to release."""


class Episode:
    """One highway with its ego: actions in, pictures, rewards and the episode's figures out."""

    def __init__(self, config: DrivingConfig, road: Road, decision_ticks: int):
        self.config = config
        self.decision_ticks = decision_ticks
        self.drive = InProcessDrive(config.vehicles, road)

    def reset(self, seed: int) -> DriveFrame:
        """Start the episode of this seed."""
        frame = self.drive.reset(seed)
        self.ticks = 0
        self.distance = 0.0
        self.overtaken = 0
        self.ahead = self._relative() > 0.0
        return frame

    def step(self, action: int) -> tuple[DriveFrame, float, bool, bool]:
        """One decision: frame, reward, terminated, truncated."""
        wanted = command(action)
        for _ in range(self.decision_ticks):
            self.drive.advance(wanted)
            self.ticks += 1
            self.distance += float(self.drive.world.vehicle(self.drive.ego)["speed"]) * TICK
            if self.drive.incident() != (None, False):
                break
        frame = self.drive.frame()
        terminated = frame.collision is not None or frame.off_road
        truncated = not terminated and self.ticks * TICK >= self.config.episode_seconds - 1e-9
        relative = self._relative()
        self.overtaken += int((self.ahead & (relative < 0.0) & (relative > -100.0)).sum())
        self.ahead = relative > 0.0
        if terminated:
            return frame, -1.0, True, False
        return frame, self.drive.reward(self.config, self.decision_ticks * TICK), False, truncated

    def metrics(self, frame: DriveFrame) -> dict[str, float]:
        """Figures of the episode that ``frame`` ends."""
        clean = frame.collision is None and not frame.off_road
        seconds = self.ticks * TICK
        return {
            "clean": float(clean),
            "collision": float(frame.collision is not None),
            "off_road": float(frame.off_road),
            "seconds": seconds,
            "driven": seconds / self.config.episode_seconds,
            "distance": self.distance,
            "overtakes": float(self.overtaken),
            "mean_speed": self.distance / seconds,
        }

    def _relative(self) -> NDArray[np.float64]:
        """Distance along the road from the ego to every vehicle, in [-ring / 2, ring / 2); 0 for the oncoming."""
        world = self.drive.world
        ring = world.road.length
        relative = (world.vehicles["s"] - world.vehicle(self.drive.ego)["s"] + 0.5 * ring) % ring - 0.5 * ring
        return np.where(world.vehicles["driver"] == ONCOMING, 0.0, relative)

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything the following steps depend on."""
        world = self.drive.world.get_state()
        return {
            "vehicles": world["vehicles"].view(np.uint8).reshape(len(world["vehicles"]), -1).copy(),
            "ahead": self.ahead.copy(),
            "counters": np.array([world["frame"], world["last_id"], self.drive.ego, self.ticks, self.overtaken]),
            "sums": np.array([world["elapsed"], self.distance]),
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``."""
        frame, last_id, ego, self.ticks, self.overtaken = (int(value) for value in state["counters"])
        elapsed, self.distance = (float(value) for value in state["sums"])
        vehicles = np.ascontiguousarray(state["vehicles"]).view(VEHICLE)[:, 0]
        self.drive.restore({"vehicles": vehicles, "frame": frame, "last_id": last_id, "elapsed": elapsed}, ego)
        self.ahead = state["ahead"].astype(bool)


class DrivingVecEnv(VecEnv):
    """N highways in one process, stepped by as many threads as it has cores; see Task.make_vec_env.

    The simulator's compiled code runs without Python's lock, and no highway knows of another: the number of threads
    changes nothing but the time.

    Args:
        environments: N.
        seed: episode e of environment i follows from (seed, i, e).
        config: of the task.
        evaluation: decisions last ``decision_ticks`` instead of ``training_decision_ticks``.
    """

    def __init__(self, environments: int, seed: int, config: DrivingConfig, evaluation: bool):
        self.render_mode = None
        super().__init__(
            environments, spaces.Box(0, 255, OBSERVATION_SHAPE, np.uint8), spaces.Discrete(len(ACTION_NAMES))
        )
        self.base_seed = seed
        road = Road.ring()
        ticks = config.decision_ticks if evaluation else config.training_decision_ticks
        self.episodes = [Episode(config, road, ticks) for _ in range(environments)]
        self.started = np.zeros(environments, np.int64)
        self.observations = np.zeros((environments, *OBSERVATION_SHAPE), np.uint8)
        threads = min(environments, usable_cores())
        self._shares = [range(k, environments, threads) for k in range(threads)]
        self._threads = ThreadPoolExecutor(threads, "highway")

    def reset(self) -> NDArray[np.uint8]:
        """Start a new episode everywhere; uint8 (N, 3, 128, 128)."""
        for i in range(self.num_envs):
            self._start_episode(i)
        return self.observations.copy()

    def _start_episode(self, i: int) -> None:
        seed = episode_seed(self.base_seed, i, int(self.started[i]))
        self.started[i] += 1
        self.observations[i] = self.episodes[i].reset(seed).image.transpose(2, 0, 1)

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions of the next ``step_wait``."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One decision everywhere, as stable-baselines3 defines it; finished episodes restart."""
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]

        def advance(share: Iterable[int]) -> None:
            for i in share:
                episode = self.episodes[i]
                frame, rewards[i], terminated, truncated = episode.step(int(self._actions[i]))
                self.observations[i] = frame.image.transpose(2, 0, 1)
                if terminated or truncated:
                    dones[i] = True
                    infos[i] = {
                        "terminal_observation": self.observations[i].copy(),
                        "TimeLimit.truncated": truncated,
                        "is_success": not terminated,
                        "metrics": episode.metrics(frame),
                    }
                    self._start_episode(i)

        list(self._threads.map(advance, self._shares))  # raises here what a thread raised
        return self.observations.copy(), rewards, dones, infos

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the present observations shows, int8 (N, 128, 128); see tasks.highway_classes."""
        return np.stack([episode.drive.classes() for episode in self.episodes])

    def importance(self) -> NDArray[np.int8]:
        """Which pixels matter, int8 (N, 128, 128); see tasks.KnowsImportance."""
        return importance_of(self.classes())

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

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the batch, once per environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the attribute of the batch."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call the method of the batch once per environment."""
        return [getattr(self, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False for _ in self._get_indices(indices)]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def episode_seed(seed: int, environment: int, episode: int) -> int:
    """Seed in [0, 2^31) of one episode; 31 bits because CARLA's blueprint attributes are signed."""
    return int(np.random.SeedSequence((seed, environment, episode)).generate_state(1)[0] >> 1)


class DrivingEnv(gymnasium.Env):
    """One highway as an ordinary gymnasium environment; registered as ``carla_digr/Driving-v0``.

    Parameters:
        config: of the task; the default one if None.
        drive: where to drive. None: in this process, with the shaped reward. A
            :class:`carla_digr.driving.scenario.Scenario` drives over CARLA's protocol; the pictures are the same, the
            reward is progress and the terminal -1, for the traffic's state is not part of a picture.
        decision_ticks: ticks a decision lasts, by default the configuration's.

    Observations are uint8 (128, 128, 3) RGB, actions Discrete(4); see the module's docstring for both, for the reward
    and for when an episode ends.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / TICK)}  # noqa: RUF012  (gymnasium's interface)

    def __init__(
        self,
        config: DrivingConfig | None = None,
        drive: Drive | None = None,
        decision_ticks: int | None = None,
        render_mode: str | None = None,
    ):
        self.config = config or DrivingConfig()
        self.render_mode = render_mode
        self.decision_ticks = decision_ticks or self.config.decision_ticks
        self.drive = drive or InProcessDrive(self.config.vehicles)
        self.observation_space = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.action_space = spaces.Discrete(len(ACTION_NAMES))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new episode; the same seed gives the same episode."""
        super().reset(seed=seed)
        self.ticks = 0
        self.last = self.drive.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return np.ascontiguousarray(self.last.image), self._info()

    def step(self, action: int):
        """One decision."""
        for _ in range(self.decision_ticks):
            self.last = self.drive.step(command(int(action)))
            self.ticks += 1
            terminated = self.last.collision is not None or self.last.off_road
            if terminated:
                break
        truncated = not terminated and self.ticks * TICK >= self.config.episode_seconds - 1e-9
        return np.ascontiguousarray(self.last.image), self._reward(terminated), terminated, truncated, self._info()

    def _reward(self, terminated: bool) -> float:
        if terminated:
            return -1.0
        seconds = self.decision_ticks * TICK
        if isinstance(self.drive, InProcessDrive):
            return self.drive.reward(self.config, seconds)
        return self.config.progress_reward * self.last.speed / CRUISE_SPEED * seconds / 0.1

    def _info(self) -> dict[str, Any]:
        return {
            "frame": self.last.frame,
            "stamp": self.last.stamp,
            "speed": self.last.speed,
            "collision": self.last.collision,
            "off_road": self.last.off_road,
        }

    def render(self) -> NDArray[np.uint8]:
        """The picture, uint8 (128, 128, 3) RGB."""
        return np.ascontiguousarray(self.last.image)

    def close(self) -> None:
        """Release the drive."""
        self.drive.close()


gymnasium.register("carla_digr/Driving-v0", f"{__name__}:DrivingEnv")
