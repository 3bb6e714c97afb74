"""The node `run_stage`: sends one goal to the node `stages`, logs how far it is, and ends as the stage ended."""

from __future__ import annotations

import math
import time

from action_msgs.msg import GoalStatus
from carla_digr_msgs.action import RunStage
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future

from carla_digr.errors import UserError
from carla_digr.training import STAGES
from carla_digr_ros.parameters import declare
from carla_digr_ros.running import SPIN_SECONDS, Stop, run
from carla_digr_ros.stages import END_SECONDS, action_name

START_SECONDS = 60.0  # that the node `stages` has to appear
ANSWER_SECONDS = 3.0  # after which it is asked again
LOG_SECONDS = 10.0  # between two lines while a phase goes on


class StageClient(Node):
    """A goal and what comes back."""

    def __init__(self) -> None:
        super().__init__("run_stage")
        names = tuple(action_name(stage) for stage in STAGES)
        stage = declare(self, "stage", names[0], "the stage to run", choices=names)
        self.goal = RunStage.Goal(
            config=declare(self, "config", "", "a task's YAML file, or the name of an installed one"),
            out=declare(self, "out", "", "directory of results and saved states; empty: runs/<task>"),
            seed=declare(self, "seed", -1, "replaces the configuration's; -1: does not", (-1, 2**31 - 1)),
        )
        self.client: ActionClient = ActionClient(self, RunStage, stage)
        self._logged, self._logged_at = ("", 0), time.monotonic()

    def log(self, message: RunStage.Impl.FeedbackMessage) -> None:
        """One line at the end of each phase, and now and then before."""
        told, now = message.feedback, time.monotonic()
        over = told.done == told.total and (told.phase, told.done) != self._logged
        if not over and now < self._logged_at + LOG_SECONDS:
            return
        self._logged, self._logged_at = (told.phase, told.done), now
        line = f"{told.phase}: {told.done} of {told.total}"
        if not math.isnan(told.rate):
            line += f", {told.rate:.4g} {told.unit}/s, {told.seconds_left:.0f} s left"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in zip(told.figures, told.values, strict=True))
        self.get_logger().info(f"{line}; {figures}" if figures else line)


def follow(node: StageClient, executor: SingleThreadedExecutor, stop: Stop) -> None:
    """Send the goal and wait for its result; SIGINT and SIGTERM cancel it.

    Raises:
        UserError: the stage did not succeed, or there is no node `stages`.
    """
    gone = "The node stages does not answer; start it: ros2 run carla_digr_ros stages."
    deadline = time.monotonic() + START_SECONDS
    while not node.client.server_is_ready():
        if stop.requested or time.monotonic() > deadline:
            raise UserError(gone)
        executor.spin_once(timeout_sec=SPIN_SECONDS)
    # The answer of a node that does not know yet who listens is lost (rmw_fastrtps's issue 842); a goal whose answer
    # is lost would run all the same: so one that asks for nothing goes before, again and again until it is answered.
    asked: list[Future] = []
    while not any(each.done() for each in asked):
        if stop.requested or time.monotonic() > deadline:
            raise UserError(gone)
        asked.append(node.client.send_goal_async(RunStage.Goal()))
        executor.spin_until_future_complete(asked[-1], ANSWER_SECONDS)
    sent = node.client.send_goal_async(node.goal, feedback_callback=node.log)
    executor.spin_until_future_complete(sent, START_SECONDS)
    goal = sent.result()
    if goal is None:
        raise UserError(gone)
    if not goal.accepted:
        raise UserError("The node stages takes no goal: it is not active; ros2 lifecycle set /stages activate.")
    result = goal.get_result_async()
    give_up = math.inf
    while not result.done() and node.client.server_is_ready() and time.monotonic() < give_up:
        if stop.requested and give_up == math.inf:
            give_up = time.monotonic() + END_SECONDS + 1.0
            goal.cancel_goal_async()
        executor.spin_until_future_complete(result, SPIN_SECONDS)
    ended = result.result()
    if ended is None:
        raise UserError("The node stages has ended; the stage resumes with the same goal.")
    if ended.status != GoalStatus.STATUS_SUCCEEDED:
        raise UserError(ended.result.message)
    node.get_logger().info(ended.result.message)


def main() -> int:
    """Run one stage; the exit status is 0 if it succeeded."""
    return run(StageClient, follow)
