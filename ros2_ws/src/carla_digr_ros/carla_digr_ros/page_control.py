"""The page's controls: what it may say to the drive, and what it is told of what others have said.

Requests come from the page's server in threads of its own, which wait for the answers that the node's executor takes;
so no frame waits for a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterDescriptor, ParameterEvent
from rclpy.parameter import parameter_value_to_python
from rclpy.publisher import Publisher
from rclpy.task import Future

from carla_digr.errors import UserError
from carla_digr.live.questions import shipped_policies
from carla_digr.saliency import METHODS
from carla_digr_ros import topics
from carla_digr_ros.controls import (
    BRIDGE,
    EXPLAINER,
    NODES,
    PAGE,
    PLAYER,
    RECORDER,
    Controls,
    Setting,
    manual_control,
)
from carla_digr_ros.running import ManagedNode

# Of all settings those that cannot hurt: the watchdog's are for who stands at the machine.
OFFERED = (
    *("method", "target", "explanation", "objects", "trust", "attack", "attack_epsilon", "opacity", "colormap"),
    *("weather", "vehicles"),
)
OFFERED_OF_A_REPLAY = ("rate", *OFFERED)
RATES = ("0.1", "0.25", "0.5", "1", "2", "4", "8")  # of a replay
LONGEST_VALUE = 100  # characters, of what a stranger may have set


class PageControl:
    """Does what pages ask for (`viewer.control.Controls`), and tells them how the drive is set.

    Args:
        node: the viewer.
        manual: of topics.MANUAL.
        tell: `ViewerServer.tell`; ``told`` is all that it was given so far.
        replays: a player's recording is seen, which can be held and stepped, and no drive.
    """

    def __init__(
        self, node: ManagedNode, manual: Publisher, tell: Callable[[Mapping[str, Any]], None], replays: bool = False
    ):
        self._node, self._manual, self._tell, self._replays = node, manual, tell, replays
        self._controls = Controls(node, _wait, PLAYER if replays else BRIDGE)
        self._nodes = (PLAYER, EXPLAINER, PAGE) if replays else NODES
        self._offered = OFFERED_OF_A_REPLAY if replays else OFFERED
        self._one_at_a_time = threading.Lock()
        self._settings: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set()  # nodes whose settings the pages have been told
        self._asking = ThreadPoolExecutor(1)
        self._policies = [] if replays else shipped_policies("driving")
        self.told: dict[str, Any] = {"policies": self._policies, "replay": replays}

    def do(self, words: Sequence[str]) -> str:
        """Do what the words say, and return what to tell.

        Raises:
            UserError: they say nothing that a page may say, or it cannot be done.
        """
        match words:
            case ["drive" | "reset" | "policy" | "record", *_] if self._replays:
                raise UserError("A replay can be held and stepped, and have another rate: here is no drive.")
            case ["set", name, _] if self._replays and name not in self._settings:
                raise UserError(f"This replay has no {name} to set.")
            case ["drive", *command]:
                message = manual_control(command)
                message.header.frame_id = topics.PAGE
                self._manual.publish(message)
                return "driving"
            case ["policy", name] if name not in self._policies:
                raise UserError(f"The page offers no policy {name}; choose one of {', '.join(self._policies)}.")
            case ["set", name, _] if name not in self._offered:
                raise UserError(f"The page sets no {name}; choose one of {', '.join(self._offered)}.")
        with self._one_at_a_time:
            return self._controls.do(words)

    def policy(self, _: int) -> tuple[str, str]:
        """Weights and module of the policy that drives.

        Raises:
            UserError: nobody says them.
        """
        with self._one_at_a_time:
            weights, module = self._controls.values(EXPLAINER, ("weights", "module"))
        return weights, module

    def hear(self, message: DiagnosticArray) -> None:
        """What a node says about itself."""
        for status in message.status:
            node = status.name.partition(":")[0]
            values = {pair.key: pair.value[:LONGEST_VALUE] for pair in status.values}
            if self._replays:  # of the drive's own nodes it is the recording that speaks
                if node == PLAYER:
                    self._say({"paused": values.get("paused") == "True"})
                if node not in self._node.get_node_names():
                    continue
            elif node == BRIDGE:
                told = {key: values.get(key, "") for key in ("control", "episode", "seed")}
                self._say({**told, "paused": values.get("paused") == "True"})
            elif node == RECORDER:
                self._say({"recording": status.message != "not active"})
            if node in self._nodes and node not in self._known:
                self._known.add(node)
                self._asking.submit(self._ask, node)

    def changed(self, event: ParameterEvent) -> None:
        """Parameters of a node, by whomever."""
        node = event.node.rpartition("/")[2]
        if event.node != f"{self._node.get_namespace().rstrip('/')}/{node}" or node not in self._known:
            return
        if event.new_parameters:  # it has begun anew
            self._asking.submit(self._ask, node)
        for parameter in event.changed_parameters:
            if (setting := self._settings.get(parameter.name)) is not None:
                value = parameter_value_to_python(parameter.value)
                setting["value"] = f"{value:g}" if parameter.name == "rate" else _short(value)
        self._say({"settings": {name: dict(setting) for name, setting in self._settings.items()}})

    def close(self) -> None:
        """Take no more requests."""
        self._asking.shutdown(wait=False, cancel_futures=True)

    def _ask(self, node: str) -> None:
        try:
            with self._one_at_a_time:
                found = self._controls.settings((node,))
        except UserError as error:
            self._known.discard(node)  # its next word begins anew
            self._node.get_logger().debug(str(error))
            return
        self._settings.update({name: _described(name, found[name]) for name in self._offered if name in found})
        self._say({"settings": {name: dict(setting) for name, setting in self._settings.items()}})

    def _say(self, state: Mapping[str, Any]) -> None:
        news = {key: value for key, value in state.items() if self.told.get(key) != value}
        if news:
            self.told.update(news)
            self._tell(news)


def _wait(future: Future, seconds: float) -> None:
    """Wait in a thread beside the executor's."""
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait(seconds)


def _described(name: str, setting: Setting) -> dict[str, Any]:
    """A setting for the page, JSON-ready."""
    descriptor: ParameterDescriptor = setting.descriptor
    ranges = [*descriptor.floating_point_range, *descriptor.integer_range]
    choices = descriptor.additional_constraints.removeprefix("one of: ").split(", ")
    if name == "rate":
        return {"value": f"{setting.value:g}", "description": descriptor.description, "range": None, "choices": RATES}
    if name == "method":  # of those that keep up with a drive
        choices = [key for key, method in METHODS.loadable().items() if method.speed == "frame"]
    return {
        "value": _short(setting.value),
        "description": descriptor.description,
        "range": [ranges[0].from_value, ranges[0].to_value] if ranges else None,
        "choices": choices if descriptor.additional_constraints else None,
    }


def _short(value: Any) -> Any:
    return value[:LONGEST_VALUE] if isinstance(value, str) else value
