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
        env.look_away()
        *steering, brake = env.commands
        angles = [command.steer * MAX_WHEEL_ANGLE for command in steering]
        self.planners = [Planner(angles, CRUISE_SPEED, BRAKE * MAX_BRAKING, brake.along_lane) for _ in env.episodes]
        self.started = env.started.copy()

    def __call__(self, observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        """One action an environment, (N,), of those that rest any; the pictures are not looked at."""
        for i in np.flatnonzero(self.started != self.env.started):
            self.planners[i].reset()
        self.started = self.env.started.copy()
        actions = np.zeros(len(self.planners), np.int64)
        for i in np.flatnonzero(~self.env.resting):
            drive = self.env.episodes[i].drive
            actions[i] = self.planners[i].observe(drive.world, drive.ego)
        return actions
