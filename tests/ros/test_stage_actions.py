"""The offline stages as actions: real processes of the node, of its client and of the stages."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import live_support
import pytest
import yaml
from live_support import until

from carla_digr.live.composition import Process

CONFIG = {
    "task": "red_fetch_green",
    "policy": {"convolutions": [[8, 8, 4], [8, 4, 2], [8, 3, 1]], "features": 16},
    "environment": {"max_steps": 40},
    "teacher": {
        "total_steps": 1280,
        "environments": 8,
        "rollout_steps": 16,
        "minibatch_size": 64,
        "checkpoint_interval": 128,
    },
    "saliency_dataset": {"maps": 8, "shard_size": 4, "stride": 8, "environments": 4},
}
ENDLESS = 10_000_000
ANSWER_SECONDS = 3.0  # after which it is asked again


@pytest.fixture
def config(tmp_path):
    """Writes the configuration with another length of the teacher's training."""

    def write(total_steps: int = CONFIG["teacher"]["total_steps"]) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, "teacher": {**CONFIG["teacher"], "total_steps": total_steps}}))
        return str(path)

    return write


class Goal:
    """A goal that was sent, what comes back, and what of it is there yet."""

    def __init__(self, client: Client, stage: str, **fields):
        from carla_digr_msgs.action import RunStage
        from rclpy.action import ActionClient

        self.client, self.feedback = client, []
        self.action = ActionClient(client.node, RunStage, stage)
        client.until(self.action.server_is_ready)
        self._be_known(RunStage.Goal())
        sent = self.action.send_goal_async(
            RunStage.Goal(**fields), feedback_callback=lambda message: self.feedback.append(message.feedback)
        )
        client.until(sent.done)
        self.handle = sent.result()
        self.accepted = self.handle.accepted
        self.future = self.handle.get_result_async() if self.accepted else None

    def _be_known(self, nothing) -> None:
        """Ask for nothing until an answer comes: those of a node which does not know yet who listens are lost.

        See rmw_fastrtps's issue 842. A goal whose answer is lost would run all the same.
        """
        attempts = []

        def answered() -> bool:
            if not attempts or time.monotonic() > attempts[-1][0] + ANSWER_SECONDS:
                attempts.append((time.monotonic(), self.action.send_goal_async(nothing)))
            return any(sent.done() for _, sent in attempts)

        self.client.until(answered)

    def result(self, told=lambda: True) -> tuple[int, object]:
        """Status and result, once they are there, and what is to be told by then: the last feedback may come after."""
        self.client.until(lambda: self.future.done() and told())
        self.action.destroy()
        return self.future.result().status, self.future.result().result


class Client:
    """Sends goals from this process."""

    def __init__(self, observer: live_support.Observer):
        self.node, self.until = observer.node, observer.until

    def send(self, stage: str, **fields) -> Goal:
        return Goal(self, stage, **fields)


@pytest.fixture
def client(observe):
    return Client(observe())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_goals_run_the_stages_and_tell_how_far_they_are(start, client, config, tmp_path):
    from action_msgs.msg import GoalStatus

    start(Process("stages"))
    out = tmp_path / "out"
    goal = client.send("train_teacher", config=config(), out=str(out), seed=5)
    status, result = goal.result(lambda: bool(goal.feedback) and goal.feedback[-1].done == 1280)
    assert (status, result.success) == (GoalStatus.STATUS_SUCCEEDED, True), result.message
    assert result.output == str(out / "teacher.safetensors") and "1280 steps" in result.message
    assert json.loads((out / "teacher.json").read_text())["seed"] == 5
    first, last = goal.feedback[0], goal.feedback[-1]
    assert (first.phase, first.done, first.total, first.unit) == ("teacher", 0, 1280, "step")
    assert math.isnan(first.rate) and math.isnan(first.seconds_left)
    assert (last.done, last.seconds_left) == (1280, 0) and last.rate > 0
    figures = dict(zip(last.figures, last.values, strict=True))
    assert set(figures) == {"return", "length", "success"} and 0 < figures["length"] <= 40

    goal = client.send("make_dataset", config=config(), out=str(out), seed=5)
    phases = ["states", "maps"]
    status, _ = goal.result(lambda: list(dict.fromkeys(feedback.phase for feedback in goal.feedback)) == phases)
    assert status == GoalStatus.STATUS_SUCCEEDED

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("task: red_fetch_green\nteacher: {total_step: 3}")
    for fields, sentence in (
        ({"config": str(wrong)}, "unknown key 'teacher.total_step' (did you mean 'total_steps'?)"),
        ({"config": "no/such.yaml"}, "Cannot read the configuration no/such.yaml"),
        ({}, "The goal has no config"),
        ({"config": config(), "seed": -7}, "--seed must lie in"),
        ({"config": "red_fetch_green"}, f"Cannot read the policy weights {tmp_path / 'none' / 'teacher.safetensors'}"),
    ):
        status, result = client.send("distill", **{"out": str(tmp_path / "none"), **fields}).result()
        assert (status, result.success, result.output) == (GoalStatus.STATUS_ABORTED, False, "")
        assert sentence in result.message and "\n" not in result.message
    assert not (tmp_path / "none").exists()


def test_a_cancelled_stage_ends_and_the_same_goal_resumes_it(start, client, config, tmp_path):
    from action_msgs.msg import GoalStatus

    node = start(Process("stages"))
    out = tmp_path / "out"
    state = out / "teacher" / "state.safetensors"
    goal = client.send("train_teacher", config=config(ENDLESS), out=str(out))
    client.until(lambda: state.exists() and goal.feedback and goal.feedback[-1].done > 0)
    (stage,) = children(node.popen.pid)
    # a second goal for the same directory is refused, one for another stage runs beside the first
    status, result = client.send("train_teacher", config=config(ENDLESS), out=str(out)).result()
    assert status == GoalStatus.STATUS_ABORTED and "Another job is at work" in result.message
    status, result = client.send("make_dataset", config=config(), out=str(out)).result()
    assert status == GoalStatus.STATUS_SUCCEEDED, result.message
    assert alive(stage)

    goal.handle.cancel_goal_async()
    status, result = goal.result()
    assert (status, result.success) == (GoalStatus.STATUS_CANCELED, False)
    assert result.message == "The stage was cancelled; the same goal resumes it."
    assert not alive(stage) and state.exists()

    steps = json.loads((out / "teacher.json").read_text())["steps"]
    goal = client.send("train_teacher", config=config(steps + 256), out=str(out))
    status, result = goal.result()
    assert status == GoalStatus.STATUS_SUCCEEDED, result.message
    assert min(feedback.done for feedback in goal.feedback if feedback.done) >= steps
    assert json.loads((out / "teacher.json").read_text())["steps"] == steps + 256


def test_an_inactive_node_refuses_goals_and_a_deactivated_one_ends_what_runs(start, client, config, tmp_path):
    from action_msgs.msg import GoalStatus
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    node = start(Process("stages", parameters={"autostart": False}))
    service = client.node.create_client(ChangeState, "/stages/change_state")

    def change(transition: int) -> None:
        client.until(service.service_is_ready)
        answer = service.call_async(ChangeState.Request(transition=Transition(id=transition)))
        client.until(answer.done)
        assert answer.result().success

    fields = {"config": config(ENDLESS), "out": str(tmp_path / "out")}
    assert not client.send("train_teacher", **fields).accepted
    refused = start(Process("run_stage", parameters={"stage": "train_teacher", **fields}))
    assert refused.wait() == 2
    assert "carla-digr: The node stages takes no goal: it is not active" in refused.output

    change(Transition.TRANSITION_CONFIGURE)
    change(Transition.TRANSITION_ACTIVATE)
    goal = client.send("train_teacher", **fields)
    client.until(lambda: len(goal.feedback) > 1)
    (stage,) = children(node.popen.pid)
    change(Transition.TRANSITION_DEACTIVATE)
    status, result = goal.result()
    assert (status, result.success) == (GoalStatus.STATUS_ABORTED, False)
    assert result.message == "The node stages is not active; the same goal resumes the stage when it is."
    assert not alive(stage)
    assert not client.send("train_teacher", **fields).accepted
    change(Transition.TRANSITION_CLEANUP)
    change(Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
    assert node.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_stage_outlives_its_node(start, client, config, tmp_path, number):
    node = start(Process("stages"))
    goal = client.send("train_teacher", config=config(ENDLESS), out=str(tmp_path / "out"))
    client.until(lambda: len(goal.feedback) > 1)
    (stage,) = children(node.popen.pid)
    assert node.end(number) == (0 if number == signal.SIGINT else -number)
    until(lambda: not alive(stage))
    goal.action.destroy()


def test_the_client_ends_as_the_stage_does(start, config, tmp_path):
    def run_stage(stage: str, total_steps: int) -> Process:
        out = str(tmp_path / "out")
        return Process("run_stage", parameters={"stage": stage, "config": config(total_steps), "out": out})

    done = start(run_stage("train_teacher", 1280))
    node = start(Process("stages"))
    assert done.wait() == 0
    assert "teacher: 1280 of 1280, " in done.output and "teacher.safetensors: 1280 steps" in done.output
    failed = start(Process("run_stage", parameters={"stage": "distill", "config": "no/such.yaml"}))
    assert failed.wait() == 2
    assert "carla-digr: Cannot read the configuration no/such.yaml" in failed.output
    state = tmp_path / "out" / "teacher" / "state.safetensors"
    saved = state.stat().st_mtime_ns
    interrupted = start(run_stage("train_teacher", ENDLESS))
    until(lambda: state.stat().st_mtime_ns > saved)
    (stage,) = children(node.popen.pid)
    os.kill(interrupted.popen.pid, signal.SIGINT)
    assert interrupted.wait() == 2
    assert "carla-digr: The stage was cancelled; the same goal resumes it." in interrupted.output
    until(lambda: not alive(stage))
