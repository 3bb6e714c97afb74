"""Highway driving: keep the lane, steer around slower traffic, hit nothing.

Actions (:data:`carla_digr.driving.control.ACTIONS`), one for each decision, of the set that the configuration names:

| ``wheels`` | ``lane`` | wheel angle; of ``lane`` added to what the lane's curve asks for | speed |
|---|---|---|---|
| 0 left | 0 left | -0.02 rad | 22 m/s held by the cruise control |
| | 1 slightly left | -0.006 rad | 22 m/s held |
| 1 keep | 2 keep | 0 | 22 m/s held |
| | 3 slightly right | +0.006 rad | 22 m/s held |
| 2 right | 4 right | +0.02 rad | 22 m/s held |
| 3 brake | 5 brake | 0 | brakes with about 4 m/s2 |

The wheels take their angle at once and the speed is held, so one picture is a sufficient state but for the speed while
braking. The observation is what a camera 9.5 m behind and 4.2 m above the ego sees, 128x128 RGB; the ego itself is
visible in it. An episode ends when the ego touches anything or its centre leaves the driving lanes, and is cut
(truncated) after ``episode_seconds``.

The reward is in reward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from carla_digr.driving.control import ACTIONS, IMAGE_SIZE
from carla_digr.tasks.driving.settings import DrivingConfig, DrivingEvaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from carla_digr.tasks.driving.batch import DrivingVecEnv
    from carla_digr.tasks.driving.servers import ServersVecEnv


class Driving:
    """The task, as the offline stages see it."""

    Settings = DrivingConfig
    Evaluation = DrivingEvaluation
    name = "driving"
    observation_shape = (3, IMAGE_SIZE, IMAGE_SIZE)

    def __init__(self, config: DrivingConfig, varied: bool = False):
        self.config = config
        self._varied = varied
        self.action_names = tuple(ACTIONS[config.actions])
        self.idle_action = self.action_names.index("keep")

    @property
    def most_environments(self) -> int | None:
        """That can be had at once: as many as simulators, where it is driven on such."""
        return len(self.config.simulators) if self.config.simulators else None

    def make_vec_env(self, environments: int, seed: int, evaluation: bool = True) -> DrivingVecEnv | ServersVecEnv:
        """Highways in this process, or those of ``simulators``; see Task.make_vec_env."""
        if self.config.simulators:
            from carla_digr.tasks.driving.servers import ServersVecEnv

            return ServersVecEnv(environments, seed, self.config, evaluation)
        from carla_digr.tasks.driving.batch import DrivingVecEnv  # loads the simulator, which a configuration need not

        return DrivingVecEnv(environments, seed, self.config, evaluation, self._varied or not evaluation)

    def varied(self) -> Driving:
        """The task with the training's weathers and sceneries in every batch; see Varies."""
        return Driving(self.config, varied=True)

    def expert(self, env: Any) -> Callable[[NDArray[np.uint8]], NDArray[np.int64]]:
        """Who sees the full state, the upper reference of learned policies: the planner, on servers the script."""
        if self.config.simulators:
            return env.scripted
        from carla_digr.tasks.driving.expert import PlannerPolicy

        return PlannerPolicy(env)
