"""What arrives from outside is taken in one place: what cannot be read or is refused is counted and told, no more."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from inspect import iscoroutinefunction
from typing import Any, TypeVar

from rclpy.event_handler import EventHandler, SubscriptionEventCallbacks
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message
from rclpy.service import Service
from rclpy.subscription import Subscription
from rclpy.timer import Timer

from carla_digr.errors import UserError
from carla_digr_ros.topics import Topic

TOLD_SECONDS = 5.0  # for which diagnostics show a refusal; the log has the first of those that follow each other closer
REASON = 200  # characters of it, some of which the sender may have chosen
EVENTS_SECONDS = 0.25  # between two looks at them
# s for which messages of a topic are taken before others are looked at: a wait set for each of a stranger's burst would
# hold up a frame. Less than a picture takes, whose number another topic has.
IN_A_ROW = 0.002
SHORTEST = 8  # bytes of a message; of shorter ones the middleware's decoder may read what is not theirs

Work = Callable[[], Coroutine[None, None, None]]
Message = TypeVar("Message")


class Receiver(SingleThreadedExecutor):
    """Runs a node's callbacks one after the other; no message and no request ends it, whoever has sent them.

    A callback refuses what does not fit by a ValueError or a UserError. rclpy's own executor raises what a callback
    raises, and does not run the others of a node any more where a request's bytes are none.

    Events of the middleware, such as a publisher whose quality of service does not fit, wait until they are looked
    at: each publisher and subscription has some, and to wait for them with every message was most of its cost.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.refused: Counter[str] = Counter()  # messages and requests, by topic and service
        self._last = (0.0, "")  # when, and what
        self._events_due, self._for_events = 0.0, True

    @property
    def refusal(self) -> str:
        """What was refused in the last seconds, and why; "" if nothing."""
        moment, what = self._last
        return what if time.monotonic() - moment < TOLD_SECONDS else ""

    def _wait_for_ready_callbacks(self, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        self._for_events = now >= self._events_due
        if self._for_events:
            self._events_due = now + EVENTS_SECONDS
        return super()._wait_for_ready_callbacks(*args, **kwargs)

    def can_execute(self, entity: Any) -> bool:
        """Whether to wait for it: not while its callbacks may not run, nor for an event that was just looked for."""
        if isinstance(entity, EventHandler) and not self._for_events:
            return False
        return super().can_execute(entity)

    def _make_handler(self, entity: Any, node: Node, take: Callable[[Any], Work | None]) -> Any:
        if isinstance(entity, (Subscription, Timer)) and not iscoroutinefunction(entity.callback):
            return AtOnce(entity, take)
        return super()._make_handler(entity, node, take)

    def _take_subscription(self, sub: Subscription) -> Work | None:
        return self._guarded(sub.topic_name, super()._take_subscription, sub)

    def _take_service(self, srv: Service) -> Work | None:
        return self._guarded(srv.service_name, super()._take_service, srv)

    def _guarded(self, name: str, take: Callable[[Any], Work | None], source: Any) -> Work | None:
        try:
            work = take(source)
        except Exception as error:  # the middleware's
            self._refuse(name, error)
            return None
        if work is None:
            return None

        async def answer() -> None:
            try:
                await work()
            except Exception as error:
                self._refuse(name, error)

        return answer

    def _refuse(self, name: str, error: Exception) -> None:
        self.refused[name] += 1
        before = self.refusal
        self._last = time.monotonic(), f"Refused what came on {name}: {str(error)[:REASON]}"
        if not before:  # what is no refusal of a callback's tells where it comes from
            where = (
                "" if isinstance(error, (ValueError, UserError)) else "\n" + "".join(traceback.format_exception(error))
            )
            get_logger("receiver").warning(self._last[1] + where)


class AtOnce:
    """What a subscription or a timer has, run where the executor asks a task to run.

    rclpy's task wakes the executor twice for each callback, so that other threads see what has become free: of one
    thread these are two more wait sets a message, and most of what a message costs.
    """

    def __init__(self, entity: Subscription | Timer, take: Callable[[Any], Work | None]):
        self._entity, self._take = entity, take

    def __call__(self) -> None:
        """Run it to its end, unless a callback that waits keeps the others of its group from running."""
        group = self._entity.callback_group
        if group is None or not group.beginning_execution(self._entity):
            return
        try:
            begun = time.monotonic()
            while (work := self._take(self._entity)) is not None:
                with contextlib.suppress(StopIteration):
                    work().send(None)
                if isinstance(self._entity, Timer) or time.monotonic() - begun > IN_A_ROW:
                    break
        finally:
            group.ending_execution(self._entity)

    def exception(self) -> None:
        """None: what a callback raises is raised by the call."""

    def result(self) -> None:
        """None."""


def message_of(data: bytes, kind: type[Message]) -> Message:
    """A message of a class from its bytes (CDR).

    Raises:
        ValueError: they are no such message.
    """
    try:
        if len(data) >= SHORTEST:
            return deserialize_message(data, kind)
    except Exception:  # noqa: S110 - rclpy documents none
        pass
    raise ValueError(f"{len(data)} bytes that are no {kind.__name__}")


def subscribe(
    node: Node,
    topic: Topic,
    callback: Callable[[Any], None],
    qos: QoSProfile | None = None,
    events: SubscriptionEventCallbacks | None = None,
) -> Subscription:
    """A subscription to a topic of the table, to be run by a `Receiver`.

    The bytes are read here: where the middleware reads them, one that it cannot read keeps a later one waiting. Of
    more than the topic's largest message they are refused unread, as reading them would hold up a frame.

    Args:
        node: whose subscription it is.
        topic: what to hear.
        callback: gets each message.
        qos: None: the table's.
        events: called back when publishers come and go, or do not match.
    """

    def take(data: bytes) -> None:
        if len(data) > topic.largest:
            raise ValueError(f"a message of {len(data):,} bytes, more than {topic.largest:,}")
        callback(message_of(data, topic.type))

    return node.create_subscription(
        topic.type, topic.relative, take, qos or topic.qos, event_callbacks=events, raw=True
    )
