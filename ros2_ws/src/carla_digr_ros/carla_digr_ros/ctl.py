"""`ctl`: says one thing to a running drive and ends, for scripts without ROS tools; `carla-digr ctl` starts it.

| words | what it does |
|---|---|
| `pause`, `resume`, `step` | holds the drive, lets it go on, one frame of a held drive |
| `reset [SEED]` | a new episode |
| `policy FILE` | another policy drives |
| `set NAME VALUE` | a parameter of the nodes that have it |
| `list` | what can be set, with its value and what it means |
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import yaml
from carla_digr_msgs.srv import SetPolicy
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.parameter_client import AsyncParameterClient
from rclpy.task import Future
from rclpy.utilities import remove_ros_args
from std_srvs.srv import SetBool, Trigger

from carla_digr.errors import UserError
from carla_digr_ros.running import SPIN_SECONDS, Stop, run

PAGE = "viewer"
NODES = ("carla_bridge", "explainer", PAGE)  # whose parameters can be set
PAGE_SECONDS = 1.5  # that the page has to be found
ANSWER_SECONDS = 10.0  # that a node has to be found and to answer
POLICY_SECONDS = 60.0  # the same for loading a policy
# rclpy's own, which a drive does not change; weights change by `policy`.
HIDDEN = ("use_sim_time", "start_type_description_service", "weights")
USAGE = "Say pause, resume, step, reset [SEED], policy FILE, set NAME VALUE or list."


class Control(Node):
    """Asks the nodes of a drive."""

    def __init__(self) -> None:
        super().__init__("ctl")
        self.words = remove_ros_args(sys.argv)[1:]
        self._stop: Stop | None = None

    def run(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Do what the words say.

        Raises:
            UserError: they say nothing that can be done, a node refuses, or there is no drive.
        """
        self._stop = stop
        match self.words:
            case ["pause" | "resume" as verb]:
                answer = self._call(SetBool, "carla_bridge/pause", SetBool.Request(data=verb == "pause"))
            case ["step"]:
                answer = self._call(Trigger, "carla_bridge/step", Trigger.Request())
            case ["reset", *seed] if len(seed) <= 1:
                for number in seed:
                    self._set("seed", number, ("carla_bridge",))
                answer = self._call(Trigger, "carla_bridge/reset", Trigger.Request())
            case ["policy", file]:
                weights = str(Path(file).absolute()) if Path(file).exists() else file
                request = SetPolicy.Request(weights=weights)
                answer = self._call(SetPolicy, "explainer/set_policy", request, POLICY_SECONDS)
                answer.message = answer.message or f"Policy {answer.policy_hash} drives."
            case ["set", name, value]:
                self._set(name, value)
                return
            case ["list"]:
                self._list()
                return
            case _:
                raise UserError(USAGE)
        if not answer.success:
            raise UserError(answer.message)
        print(answer.message)

    def _call(self, kind: Any, name: str, request: Any, seconds: float = ANSWER_SECONDS) -> Any:
        client: Client = self.create_client(kind, name)
        self._find(client.wait_for_service, name.partition("/")[0])
        return self._wait_for(client.call_async(request), seconds, name)

    def _find(self, wait: Any, node: str) -> None:
        if not wait(ANSWER_SECONDS):
            where = self.get_namespace()
            raise UserError(f"There is no {node} in this ROS domain and the namespace {where}: is the drive running?")

    def _settable(self, nodes: tuple[str, ...]) -> dict[str, list[tuple[AsyncParameterClient, ParameterDescriptor]]]:
        """By name the parameters that may change while their nodes run."""
        found: dict[str, list[tuple[AsyncParameterClient, ParameterDescriptor]]] = {}
        for node in nodes:
            client = AsyncParameterClient(self, node)
            if node == PAGE and not client.wait_for_services(PAGE_SECONDS):
                continue  # a drive may have none
            self._find(client.wait_for_services, node)
            names = self._wait_for(client.list_parameters(), ANSWER_SECONDS, node).result.names
            described = self._wait_for(client.describe_parameters(names), ANSWER_SECONDS, node).descriptors
            for descriptor in described:
                if not descriptor.read_only and descriptor.name not in HIDDEN and "." not in descriptor.name:
                    found.setdefault(descriptor.name, []).append((client, descriptor))
        return found

    def _set(self, name: str, text: str, nodes: tuple[str, ...] = NODES) -> None:
        settable = self._settable(nodes)
        if name not in settable:
            raise UserError(f"A drive has no {name} to set; choose one of {', '.join(sorted(settable))}.")
        for client, descriptor in settable[name]:
            new = Parameter(name, value=_value(name, text, descriptor.type))
            (verdict,) = self._wait_for(client.set_parameters([new]), ANSWER_SECONDS, name).results
            if not verdict.successful:
                raise UserError(verdict.reason or f"{name} cannot be {text}.")
        print(f"{name}: {text}")

    def _list(self) -> None:
        for name, ((client, descriptor), *_) in sorted(self._settable(NODES).items()):
            (value,) = self._wait_for(client.get_parameters([name]), ANSWER_SECONDS, name).values
            among = f" ({descriptor.additional_constraints})" if descriptor.additional_constraints else ""
            print(f"{name}: {parameter_value_to_python(value)!r}  {descriptor.description}{among}")

    def _wait_for(self, future: Future, seconds: float, what: str) -> Any:
        assert self.executor is not None and self._stop is not None
        end = time.monotonic() + seconds
        while not future.done():
            if self._stop.requested or time.monotonic() > end:
                raise UserError(f"No answer from {what} within {seconds:.0f} s.")
            self.executor.spin_once(timeout_sec=SPIN_SECONDS)
        return future.result()


def _value(name: str, text: str, kind: int) -> Any:
    """A parameter's value from its text, of the type it has.

    Raises:
        UserError: the text is none.
    """
    kind = Parameter.Type(kind)
    if kind is Parameter.Type.STRING:
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = None
    if kind is Parameter.Type.DOUBLE and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not kind.check(value):
        wanted = {Parameter.Type.BOOL: "true or false", Parameter.Type.INTEGER: "a whole number"}
        raise UserError(f"{name} must be {wanted.get(kind, 'a number')}, not {text!r:.80}.")
    return value


def main() -> int:
    """Say it; the exit status."""
    return run(Control, Control.run)
