"""What can be said to a running drive, as the services and parameters of its nodes: by `ctl`, and by the page.

| words | what it does |
|---|---|
| `pause`, `resume`, `step` | holds the drive, lets it go on, one frame of a held drive |
| `reset [SEED]` | a new episode |
| `policy FILE` | another policy drives |
| `set NAME VALUE` | a parameter of the nodes that have it |
| `record on`, `record off` | begins a bag, finishes it; of a drive that was started with a recorder |
| `drive STEER THROTTLE BRAKE` | a human's control, which holds for half a second |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from carla_digr_msgs.msg import VehicleControl
from carla_digr_msgs.srv import SetPolicy
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import ParameterDescriptor
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters
from rclpy.client import Client
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.task import Future
from std_srvs.srv import SetBool, Trigger

from carla_digr.errors import UserError

BRIDGE, EXPLAINER, PAGE, RECORDER, PLAYER = "carla_bridge", "explainer", "viewer", "recorder", "player"
NODES = (BRIDGE, EXPLAINER, PAGE)  # whose parameters can be set
MAYBE_SECONDS = {PAGE: 1.5, RECORDER: 5.0}  # that nodes have to be found that a drive may lack
ANSWER_SECONDS = 10.0  # that a node has to be found and to answer
POLICY_SECONDS = 60.0  # the same for loading a policy
# rclpy's own, which a drive does not change; weights change by `policy`.
HIDDEN = ("use_sim_time", "start_type_description_service", "weights")
USAGE = (
    "Say pause, resume, step, reset [SEED], policy FILE, set NAME VALUE, record on, record off, "
    "drive STEER THROTTLE BRAKE [SECONDS] or list."
)


@dataclass(frozen=True)
class Setting:
    """A parameter that may change while its nodes run; ``descriptor`` says what it means and its bounds."""

    value: Any
    descriptor: ParameterDescriptor
    nodes: tuple[str, ...]


class Controls:
    """Says one thing after the other to the nodes of a drive, from one thread at a time.

    Args:
        node: who asks.
        wait: waits until a future is done or so many seconds have passed.
        holder: the node that holds the drive, or the replay.
    """

    def __init__(self, node: Node, wait: Callable[[Future, float], None], holder: str = BRIDGE):
        self._node = node
        self._wait = wait
        self._holder = holder
        self._clients: dict[str, Client] = {}
        self._known: dict[str, Setting] = {}  # what was found so far: a change then takes one call, not four

    def do(self, words: Sequence[str]) -> str:
        """Do what the words say, and return what to tell.

        Raises:
            UserError: they say nothing that can be done, a node refuses, or there is no drive.
        """
        match words:
            case ["pause" | "resume" as verb]:
                answer = self._call(SetBool, f"{self._holder}/pause", SetBool.Request(data=verb == "pause"))
            case ["step"]:
                answer = self._call(Trigger, f"{self._holder}/step", Trigger.Request())
            case ["reset", *seed] if len(seed) <= 1:
                told = [self._set("seed", number, (BRIDGE,)) for number in seed]
                answer = self._call(Trigger, f"{BRIDGE}/reset", Trigger.Request())
                answer.message = "\n".join([*told, answer.message])
            case ["policy", file]:
                weights = str(Path(file).absolute()) if Path(file).exists() else file
                request = SetPolicy.Request(weights=weights)
                answer = self._call(SetPolicy, f"{EXPLAINER}/set_policy", request, POLICY_SECONDS)
                answer.message = answer.message or f"Policy {answer.policy_hash} drives."
            case ["set", name, value]:
                return self._set(name, value)
            case ["record", "on" | "off" as wanted]:
                return self._record(wanted == "on")
            case _:
                raise UserError(USAGE)
        if not answer.success:
            raise UserError(answer.message)
        return answer.message

    def settings(self, nodes: Sequence[str] = NODES) -> dict[str, Setting]:
        """What can be set, by name.

        Raises:
            UserError: a node is not there.
        """
        found: dict[str, Setting] = {}
        for node in nodes:
            try:
                listed = self._once(ListParameters, f"{node}/list_parameters", ListParameters.Request())
            except UserError:
                if node in MAYBE_SECONDS:
                    continue
                raise
            request = DescribeParameters.Request(names=listed.result.names)
            described = self._once(DescribeParameters, f"{node}/describe_parameters", request).descriptors
            live = [d for d in described if not d.read_only and d.name not in HIDDEN and "." not in d.name]
            values = self.values(node, [d.name for d in live])
            for descriptor, value in zip(live, values, strict=True):
                before = found.get(descriptor.name)
                now, others = (before.value, before.nodes) if before else (value, ())
                found[descriptor.name] = Setting(now, descriptor, (*others, node))
        for name, setting in found.items():
            known = self._known[name].nodes if name in self._known else ()
            self._known[name] = replace(setting, nodes=tuple(dict.fromkeys((*known, *setting.nodes))))
        return found

    def values(self, node: str, names: Sequence[str]) -> list[Any]:
        """The values of some parameters of a node.

        Raises:
            UserError: it is not there.
        """
        answer = self._once(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=list(names)))
        return [parameter_value_to_python(value) for value in answer.values]

    def _set(self, name: str, text: str, nodes: Sequence[str] = NODES) -> str:
        settings = self._known if name in self._known else self.settings(nodes)
        if name not in settings:
            raise UserError(f"A drive has no {name} to set; choose one of {', '.join(sorted(settings))}.")
        new = Parameter(name, value=_value(name, text, settings[name].descriptor.type)).to_parameter_msg()
        for node in settings[name].nodes:
            request = SetParameters.Request(parameters=[new])
            (verdict,) = self._call(SetParameters, f"{node}/set_parameters", request).results
            if not verdict.successful:
                raise UserError(verdict.reason or f"{name} cannot be {text}.")
        return f"{name}: {text}"

    def _record(self, on: bool) -> str:
        state = self._call(GetState, f"{RECORDER}/get_state", GetState.Request()).current_state.id
        if on == (state == State.PRIMARY_STATE_ACTIVE):
            return "recording" if on else "not recording"
        configured = state in (State.PRIMARY_STATE_INACTIVE, State.PRIMARY_STATE_ACTIVE)
        if on:
            steps = (*([] if configured else [Transition.TRANSITION_CONFIGURE]), Transition.TRANSITION_ACTIVATE)
        else:
            steps = Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP
        for step in steps:
            request = ChangeState.Request(transition=Transition(id=step))
            if not self._call(ChangeState, f"{RECORDER}/change_state", request, POLICY_SECONDS).success:
                raise UserError("The recorder does not do that; its log says why.")
        return "recording" if on else "not recording"

    def _call(self, kind: Any, name: str, request: Any, seconds: float = ANSWER_SECONDS) -> Any:
        if name not in self._clients:
            self._clients[name] = self._node.create_client(kind, name)
        self._find(self._clients[name].wait_for_service, name.partition("/")[0])
        return self._answer(self._clients[name].call_async(request), name, seconds)

    def _once(self, kind: Any, name: str, request: Any) -> Any:
        """As `_call` for what is seldom asked: a client that stays costs the node's executor with every message."""
        try:
            return self._call(kind, name, request)
        finally:
            self._node.destroy_client(self._clients.pop(name))

    def _find(self, wait: Callable[[float], bool], node: str) -> None:
        if wait(MAYBE_SECONDS.get(node, ANSWER_SECONDS)):
            return
        if node == RECORDER:
            raise UserError("This drive has no recorder: start it with --record DIRECTORY.")
        where = self._node.get_namespace()
        raise UserError(f"There is no {node} in this ROS domain and the namespace {where}: is the drive running?")

    def _answer(self, future: Future, what: str, seconds: float = ANSWER_SECONDS) -> Any:
        self._wait(future, seconds)
        if not future.done():
            raise UserError(f"No answer from {what} within {seconds:.0f} s.")
        return future.result()


def manual_control(words: Sequence[str]) -> VehicleControl:
    """The command that ``STEER THROTTLE BRAKE`` stand for.

    Raises:
        UserError: they are no numbers in range.
    """
    try:
        steer, throttle, brake = map(float, words)
    except ValueError:
        raise UserError(USAGE) from None
    ranges = ((steer, -1.0), (throttle, 0.0), (brake, 0.0))
    if not all(math.isfinite(number) and low <= number <= 1.0 for number, low in ranges):
        raise UserError("STEER must lie in [-1, 1], THROTTLE and BRAKE in [0, 1].")
    return VehicleControl(steer=steer, throttle=throttle, brake=brake)


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
