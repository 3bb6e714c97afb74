"""How a node of this package starts, spins, ends and tells what went wrong."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.qos import qos_policy_name_from_kind, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription

from carla_digr.errors import UserError, sentence, tell
from carla_digr_ros.parameters import declare
from carla_digr_ros.receiving import Receiver, subscribe
from carla_digr_ros.topics import Topic

SPIN_SECONDS = 0.5  # longest time until a node sees that it was asked to stop


class Stop:
    """Whether SIGINT or SIGTERM has come; set up before anything that takes long.

    Python's own handlers, not rclpy's: they work when SIGINT was inherited as ignored, and no KeyboardInterrupt
    lands in the middle of a tick.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, stack: object) -> None:
        self.requested = True


class ManagedNode(LifecycleNode):
    """A node with ROS 2's managed life cycle.

    With ``autostart`` (the default) it configures and activates itself and its process ends when that fails, so that
    it works by itself, from `carla-digr live` and from a launch file; without, it waits for the transitions. A
    transition that fails has its reason in the log. The shutdown transition ends the process, with status 0.

    A node defines what of `configure`, `activate`, `deactivate` and `close` it needs. While it is not active, it has
    none of the subscriptions made by `listen`, and the publishers made by `advertise` are silent.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.autostart = declare(
            self, "autostart", True, "configure and activate at the start; false: wait for lifecycle transitions"
        )
        self.configured = self.active = self.finalized = False
        self.incompatible_qos: dict[str, str] = {}  # topic -> policy of which an endpoint does not match ours
        self._refusal: UserError | None = None
        self._starting = False
        self.heard: list[Subscription] = []  # gone while the node is not active

    def start(self) -> None:
        """Configure and activate.

        Raises:
            UserError: the node cannot.
        """
        self._starting = True  # who asked for it tells the reason
        for transition in (self.trigger_configure, self.trigger_activate):
            if transition() is not TransitionCallbackReturn.SUCCESS:
                raise self._refusal or RuntimeError(f"{self.get_name()} does not start")
        self._starting = False

    def configure(self) -> None:
        """Get ready.

        Raises:
            UserError: what is needed is not there.
        """

    def activate(self) -> None:
        """Begin.

        Raises:
            UserError: the node cannot.
        """

    def deactivate(self) -> None:
        """Pause."""

    def close(self) -> None:
        """Give back what `configure` took; safe to call twice."""

    def advertise(self, topic: Topic) -> LifecyclePublisher:
        """A publisher of a topic of the table, silent while the node is not active."""

        def mismatch(event) -> None:
            self._mismatch(publisher.topic_name, event, "a subscriber gets nothing from it")

        events = PublisherEventCallbacks(incompatible_qos=mismatch, use_default_callbacks=False)
        publisher = self.create_lifecycle_publisher(topic.type, topic.relative, topic.offered, event_callbacks=events)
        return publisher

    def listen(self, topic: Topic, callback: Callable[..., None]) -> None:
        """Subscribe with the table's quality of service, or with best effort where a publisher offers no more."""

        def mismatch(event) -> None:
            policy = self._mismatch(reliable.topic_name, event, "nothing comes from a publisher of it")
            if policy == "RELIABILITY" and self.executor is not None:
                self.executor.create_task(take_what_is_offered)  # not within the subscription's own callback

        def take_what_is_offered() -> None:
            if reliable in self.heard:
                self.get_logger().info(f"Taking {reliable.topic_name} with best effort from now on")
                self.heard.remove(reliable)
                self.destroy_subscription(reliable)
                self.heard.append(subscribe(self, topic, callback, qos_profile_sensor_data))

        events = SubscriptionEventCallbacks(incompatible_qos=mismatch, use_default_callbacks=False)
        reliable = subscribe(self, topic, callback, events=events)
        self.heard.append(reliable)

    def _mismatch(self, topic: str, event, consequence: str) -> str:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        self.incompatible_qos[topic] = policy
        self.get_logger().warning(f"Incompatible QoS on {topic} ({policy}): {consequence}")
        return policy

    def _try(self, action: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            action()
        except Exception as error:
            reason = sentence(error)
            self._refusal = UserError(reason or f"{self.get_name()} has failed: {error!r}")
            if reason is None:
                raise
            if not self._starting:
                self.get_logger().error(reason)
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take what is needed."""
        verdict = self._try(self.configure)
        self.configured = verdict is TransitionCallbackReturn.SUCCESS
        return verdict

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let the publishers speak, then begin."""
        super().on_activate(state)
        self.active = True
        verdict = self._try(self.activate)
        if verdict is not TransitionCallbackReturn.SUCCESS:
            self.active = False
            super().on_deactivate(state)
        return verdict

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop, then silence the publishers."""
        self.active = False
        while self.heard:
            self.destroy_subscription(self.heard.pop())
        verdict = self._try(self.deactivate)
        super().on_deactivate(state)
        return verdict

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give back what was taken."""
        self.configured = False
        return self._try(self.close)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the process."""
        self.active, self.finalized = False, True
        return TransitionCallbackReturn.SUCCESS


def spin(node: Node, executor: SingleThreadedExecutor, stop: Stop) -> None:
    """Run callbacks until the process is asked to stop."""
    while not (stop.requested or getattr(node, "finalized", False)):
        executor.spin_once(timeout_sec=SPIN_SECONDS)


def run(make: Callable[[], Node], work: Callable[[Any, SingleThreadedExecutor, Stop], None] = spin) -> int:
    """Run one node until SIGINT or SIGTERM, or the shutdown transition.

    Args:
        make: creates the node; called after rclpy is initialised.
        work: the node's main loop, called with the node, the executor that has it, and what asks it to stop.

    Returns:
        Exit status: 0, or 2 after an error that is told in a sentence, on standard error; 1 where that comes while a
        node only answers, which it did well until then.
    """
    stop, answering = Stop(), False
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
        try:
            executor = Receiver()
            executor.add_node(node)
            if isinstance(node, ManagedNode) and node.autostart:
                node.start()
            gc.collect()
            gc.freeze()  # a full collection over all that torch and rclpy have loaded takes longer than a frame
            answering = work is spin
            work(node, executor, stop)
        finally:
            close = getattr(node, "close", None)
            if close is not None:
                close()
            node.destroy_node()
    except ExternalShutdownException:
        pass
    except Exception as error:
        status = tell(error)
        return 1 if answering else status
    finally:
        rclpy.try_shutdown()
    return 0
