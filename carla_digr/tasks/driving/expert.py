"""The full-state planner as a policy of the driving task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import BRAKE, CRUISE_SPEED, MAX_WHEEL_ANGLE
from carla_digr.simulator.planner import Planner
from carla_digr.simulator.vehicle import MAX_BRAKING
from carla_digr.tasks.driving.batch import DrivingVecEnv


class PlannerPolicy:
    """The full-state planner as a policy of a batch: one planner an environment, forgotten at an episode's end."""

    def __init__(self, env: DrivingVecEnv):
        self.env = env
        *steering, brake = env.commands
        angles = [command.steer * MAX_WHEEL_ANGLE for command in steering]
        self.planners = [Planner(angles, CRUISE_SPEED, BRAKE * MAX_BRAKING, brake.along_lane) for _ in env.episodes]
        self.started = env.started.copy()

    def __call__(self, observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        """One action an environment, (N,); the pictures are not looked at."""
        for i in np.flatnonzero(self.started != self.env.started):
            self.planners[i].reset()
        self.started = self.env.started.copy()
        drives = [episode.drive for episode in self.env.episodes]
        actions = [planner.observe(d.world, d.ego) for planner, d in zip(self.planners, drives, strict=True)]
        return np.array(actions, np.int64)
