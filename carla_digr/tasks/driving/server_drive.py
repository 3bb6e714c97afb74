"""The driving task's episodes on a CARLA server, in the process that has a session with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import IMAGE_SIZE, DriveFrame, VehicleCommand
from carla_digr.errors import UserError
from carla_digr.scheduling import keep_to_one_core
from carla_digr.tasks.driving.batch import Episode
from carla_digr.tasks.driving.classes import SAMPLES, class_picture_seen
from carla_digr.tasks.driving.reward import hazard, reward_seen
from carla_digr.tasks.driving.settings import DrivingConfig

if TYPE_CHECKING:
    from carla_digr.driving.drive_process import Answer
    from carla_digr.driving.scenario import Scenario
    from carla_digr.driving.scripted import ScriptedDriver
    from carla_digr.driving.situation import Situation
    from carla_digr.driving.surroundings import LabelCamera

SCRIPTED = -1
"""The action that leaves the command to the scripted driver, who sees map and vehicles."""


class ServerDrive:
    """A scenario as the task's episodes need it; see batch.TaskDrive."""

    def __init__(self, scenario: Scenario):
        self.scenario = scenario
        self._labels: LabelCamera | None = None
        self._always = False
        self._shown: Any = None

    def reset(self, seed: int) -> DriveFrame:
        """Start an episode."""
        return self._saw(self.scenario.reset(seed))

    def advance(self, wanted: VehicleCommand) -> None:
        """Apply a command and advance one tick."""
        self._saw(self.scenario.step(wanted))

    def _saw(self, frame: DriveFrame) -> DriveFrame:
        self._last = frame
        self.__dict__.pop("_situation", None)
        if self._labels is not None:
            self._shown = self._labels.poll(frame.frame, self.scenario.session.timeout)
        return frame

    @cached_property
    def _situation(self) -> Situation:
        return self.scenario.situation()

    def speed(self) -> float:
        """The ego's speed in m/s."""
        return self._last.speed

    def incident(self) -> tuple[str | None, bool, bool, bool]:
        """See batch.TaskDrive."""
        return self._last.collision, self._last.off_road, self._last.road_ends, self._last.struck

    def frame(self) -> DriveFrame:
        """The present frame with its picture."""
        return self._last

    def reward(self, config: DrivingConfig, seconds: float) -> float:
        """Reward of the last ``seconds`` if nothing ended in them."""
        return reward_seen(config, seconds, self._last.speed, self._situation)

    def ahead(self) -> dict[int, float]:
        """See batch.TaskDrive."""
        return {i: other.ahead for i, other in self._situation.others.items() if other.along}

    def watch_labels(self, always: bool) -> None:
        """Have ``classes``: of every frame, or of those for which ``label`` asks."""
        self._always = always
        if self._labels is None:
            self._labels = self.scenario.add_label_camera(SAMPLES * IMAGE_SIZE)

    def label(self, wanted: bool) -> None:
        """Have ``classes`` of the next frames, or not."""
        if self._labels is not None:
            self._labels.switch(wanted or self._always)

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the present picture shows, int8 (H, W); see classes.class_picture_seen.

        Raises:
            UserError: nothing has come that tells.
        """
        if self._shown is None:
            raise UserError(f"The instance camera on {self.scenario.session.address} sent no picture; start it again.")
        from carla_digr.driving.surroundings import rgb_of  # loads the client library, which only this process needs

        return class_picture_seen(rgb_of(self._shown), self.scenario.ego.id)


class ServerEpisode(Episode):
    """An episode on a server, which the scripted driver may drive."""

    drive: ServerDrive

    def __init__(self, config: DrivingConfig, drive: ServerDrive, decision_ticks: int, driver: ScriptedDriver):
        super().__init__(config, drive, decision_ticks)
        self._driver = driver

    def reset(self, seed: int) -> DriveFrame:
        """Start the episode of this seed."""
        self._driver.reset()
        return super().reset(seed)

    def command(self, action: int) -> VehicleCommand:
        """What an action stands for."""
        return self._driver.command(self.drive.scenario) if action == SCRIPTED else super().command(action)


class Job(NamedTuple):
    """What the process of a server is to know."""

    config: DrivingConfig
    decision_ticks: int
    number: int
    """Of the server among those of the batch."""


def answer_requests(scenario: Scenario, job: Job) -> Callable[[dict[str, Any]], Answer]:
    """Episodes on a server by requests.

    {"watch": true} puts the camera up for "classes" of each frame, {"watch": false} of those that are asked for.
    {"seed": s} starts an episode, in which the list "actions", if there is one, is taken at once; {"action": a} takes
    one decision. Both may have {"label": true}, for "classes" of the frame that they end with, and answer with the
    picture (3, H, W), the decision with "reward", "terminated", "truncated", "took" (s), at the end "metrics", and,
    asked with {"memory": true}, the server's in bytes, or null.
    {"classes": true} answers with what the picture shows, int8 (H, W), {"metrics": true} with the figures so far.
    """
    from carla_digr.driving.drive_process import address_of
    from carla_digr.driving.memory import resident
    from carla_digr.driving.scripted import ScriptedDriver

    if job.config.kind == "embedded":  # elsewhere the client's Traffic Manager has threads that work side by side
        keep_to_one_core(job.number)
    hazard(1.0, 0.0, 1.0, 1.0, 1.0, 0.0)  # loads its compiled code, for which no decision has the time
    drive = ServerDrive(scenario)
    episode = ServerEpisode(job.config, drive, job.decision_ticks, ScriptedDriver())

    def picture(frame: DriveFrame) -> list[NDArray[Any]]:
        return [frame.image.transpose(2, 0, 1)]

    def answer(request: dict[str, Any]) -> Answer:
        if "watch" in request:
            drive.watch_labels(request["watch"])
            return {}, []
        if "classes" in request:
            return {}, [drive.classes()]
        if "metrics" in request:
            return dict(episode.metrics()), []
        drive.label("label" in request)
        if "seed" in request:
            frame = episode.reset(request["seed"])
            for action in request.get("actions", ()):
                frame = episode.step(action)[0]
            return {}, picture(frame)
        begun = time.perf_counter()
        frame, value, terminated, truncated = episode.step(request["action"])
        facts: dict[str, Any] = {"reward": value, "terminated": terminated, "truncated": truncated}
        facts["took"] = time.perf_counter() - begun
        if "memory" in request:
            facts["memory"] = resident(*address_of(scenario.session.address))
        if terminated or truncated:
            facts["metrics"] = episode.metrics()
        return facts, picture(frame)

    return answer
