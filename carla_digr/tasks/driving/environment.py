"""One highway as an ordinary gymnasium environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from carla_digr.driving.control import ACTIONS, IMAGE_SIZE, TICK, VehicleCommand
from carla_digr.driving.episode import RunningEpisode
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.reward import less_effort, reward_seen
from carla_digr.tasks.driving.settings import DrivingConfig

if TYPE_CHECKING:
    from carla_digr.driving.scenario import Scenario


class DrivingEnv(gymnasium.Env):
    """One highway as an ordinary gymnasium environment; registered as ``carla_digr/Driving-v0``.

    Args:
        config: of the task; the default one if None.
        drive: where to drive. None: in this process. A :class:`carla_digr.driving.scenario.Scenario` drives over
            CARLA's protocol, where pictures and rewards are the same.
        decision_ticks: ticks a decision lasts, by default the configuration's.

    Observations are uint8 (128, 128, 3) RGB, actions Discrete; see carla_digr.tasks.driving for both, for the
    reward and for when an episode ends.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / TICK)}  # noqa: RUF012  (gymnasium's interface)

    def __init__(
        self,
        config: DrivingConfig | None = None,
        drive: InProcessDrive | Scenario | None = None,
        decision_ticks: int | None = None,
        render_mode: str | None = None,
    ):
        self.config = config or DrivingConfig()
        self.render_mode = render_mode
        self.decision_ticks = decision_ticks or self.config.decision_ticks
        self.drive = drive or InProcessDrive(self.config.vehicles)
        self.observation_space = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.commands = tuple(ACTIONS[self.config.actions].values())
        self.action_space = spaces.Discrete(len(self.commands))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """A new episode; the same seed gives the same episode."""
        super().reset(seed=seed)
        self.running = RunningEpisode(self.config.episode_seconds)
        self.last = self.drive.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self.last_action = -1
        return np.ascontiguousarray(self.last.image), self._info()

    def step(self, action: int):
        """One decision."""
        wanted, changed = self.commands[int(action)], self.last_action not in (-1, int(action))
        self.last_action = int(action)
        for _ in range(self.decision_ticks):
            self.last = self.drive.step(wanted)
            last = self.last
            self.running.count(last.speed, last.collision, last.off_road, last.road_ends, last.struck)
            if self.running.terminated or last.struck:
                break
        terminated, truncated = self.running.terminated, self.running.truncated
        value = -1.0 if terminated else self._reward(wanted, changed)
        return np.ascontiguousarray(self.last.image), value, terminated, truncated, self._info()

    def _reward(self, wanted: VehicleCommand, changed: bool) -> float:
        seconds = self.decision_ticks * TICK
        if isinstance(self.drive, InProcessDrive):
            value = self.drive.reward(self.config, seconds)
        else:
            value = reward_seen(self.config, seconds, self.last.speed, self.drive.situation())
        return less_effort(self.config, value, seconds, wanted, changed)

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
