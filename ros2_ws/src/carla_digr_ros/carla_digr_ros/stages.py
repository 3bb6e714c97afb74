"""The node `stages`: the offline stages of a task as actions `train_teacher`, `make_dataset`, `distill`, `evaluate`.

A goal runs the `carla-digr` command of its stage in a process of its own, so that it can be cancelled at any moment and
what it saved stays good: the same goal resumes. Several goals may run at once, in directories of their own.
Deactivating the node ends them all, and an inactive one takes no goal.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from carla_digr_msgs.action import RunStage
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup

from carla_digr.config import find_config, shipped_configs
from carla_digr.errors import UserError, ending
from carla_digr.live.child import Child
from carla_digr.tasks import load_config
from carla_digr.training import STAGES, Stage
from carla_digr_ros.running import ManagedNode, run

NOT_ACTIVE = "The node stages is not active; the same goal resumes the stage when it is."
POLL_SECONDS = 0.05  # longest time that one goal keeps the node from its others
END_SECONDS = 8.0  # that a stage has to end when it is asked to


class Stages(ManagedNode):
    """One action server a stage."""

    def __init__(self) -> None:
        super().__init__("stages")
        self._children: list[RunningStage] = []
        group = ReentrantCallbackGroup()
        self._servers = [
            ActionServer(
                self,
                RunStage,
                action_name(stage),
                partial(self._execute, stage),
                callback_group=group,
                goal_callback=self._consider,
                cancel_callback=lambda goal: CancelResponse.ACCEPT,
            )
            for stage in STAGES
        ]

    def _consider(self, request: RunStage.Goal) -> GoalResponse:
        if self.active:
            return GoalResponse.ACCEPT
        self.get_logger().warning("A goal is refused: the node is not active")
        return GoalResponse.REJECT

    async def _execute(self, stage: Stage, goal: ServerGoalHandle) -> RunStage.Result:
        try:
            if not self.active:  # since the goal was accepted
                raise UserError(NOT_ACTIVE)
            out, command = command_line(stage, goal.request)
        except UserError as error:
            goal.abort()
            return RunStage.Result(message=str(error))
        self.get_logger().info(f"{stage.name} begins: {out}")
        child = RunningStage(command)
        self._children.append(child)
        while child.running:
            for progress in child.progress(POLL_SECONDS):
                goal.publish_feedback(feedback(progress))
            if goal.is_cancel_requested or child.interrupted:
                child.interrupt()
            await asyncio.sleep(0)  # the executor's turn
        for progress in child.progress(0.0):
            goal.publish_feedback(feedback(progress))
        self._children.remove(child)
        child.close()
        result = RunStage.Result(success=child.status == 0, message=child.message)
        if result.success:
            result.output = str(out / stage.output)
            goal.succeed()
        elif goal.is_cancel_requested:
            result.message = "The stage was cancelled; the same goal resumes it."
            goal.canceled()
        else:
            if child.interrupted:
                result.message = NOT_ACTIVE
            goal.abort()
        self.get_logger().info(f"{stage.name} is over: {result.message}")
        return result

    def deactivate(self) -> None:
        """Ask the stages that run to end."""
        for child in self._children:
            child.interrupt()

    def close(self) -> None:
        """End the stages that run; what they saved stays."""
        while any(child.running for child in self._children):
            for child in self._children:
                child.interrupt()
            time.sleep(POLL_SECONDS)

    def destroy_node(self) -> None:
        """Take the action servers along."""
        for server in self._servers:
            server.destroy()
        super().destroy_node()


class RunningStage(Child):
    """The process of a stage. It ends by itself when nobody reads any more what it says."""

    def __init__(self, command: list[str]):
        super().__init__(command)
        self._kill_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to end."""
        return self._kill_at is not None

    @property
    def status(self) -> int:
        """Its exit status, once it has ended."""
        return self.process.returncode

    @property
    def message(self) -> str:
        """What it has achieved or what went wrong, in its own words where it has any."""
        if self.sentence:
            return self.sentence
        if self.status == 0:
            return self.last_words
        return f"The stage {ending(self.status)}. Its last words: {self.last_words or 'none'}"

    def progress(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Its lines of progress (see `carla_digr.training.progress`) that have come, waiting so long for the first."""
        while not self.closed and select.select([self.output], [], [], seconds)[0]:
            yield from (json.loads(line) for line in self.read() if line.startswith('{"phase"'))
            seconds = 0.0

    def interrupt(self) -> None:
        """Ask it to end, as Ctrl-C does; from the next call on, kill it if that takes too long."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + END_SECONDS
            self.process.send_signal(signal.SIGINT)
        elif time.monotonic() > self._kill_at:
            os.killpg(self.process.pid, signal.SIGKILL)


def action_name(stage: Stage) -> str:
    """The stage's name with the characters that ROS allows."""
    return stage.name.replace("-", "_")


def command_line(stage: Stage, goal: RunStage.Goal) -> tuple[Path, list[str]]:
    """The absolute output directory, and the arguments to start a stage with.

    Raises:
        UserError: the configuration is missing or wrong.
    """
    if not goal.config:
        names = ", ".join(shipped_configs())
        raise UserError(f"The goal has no config: give it a YAML file or the name of one that ships ({names}).")
    path = find_config(goal.config)
    config = load_config(path)
    out = (Path(goal.out) if goal.out else Path("runs") / config.task).absolute()
    command = [sys.executable, "-m", "carla_digr.cli", stage.name, "--progress=json", f"--out={out}"]
    if goal.seed != -1:
        command.append(f"--seed={goal.seed}")
    return out, [*command, "--", str(path)]


def feedback(progress: dict[str, Any]) -> RunStage.Feedback:
    """A line of progress as a message."""

    def known(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return RunStage.Feedback(
        phase=progress["phase"],
        done=progress["done"],
        total=progress["total"] or 0,
        unit=progress["unit"],
        rate=known(progress["rate"]),
        seconds_left=known(progress["seconds_left"]),
        figures=list(progress["figures"]),
        values=[known(value) for value in progress["figures"].values()],
    )


def main() -> int:
    """Serve until SIGINT or SIGTERM."""
    return run(Stages)
