"""Node `viewer`: matches what belongs to one frame by its stamp and feeds the web page."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from carla_digr_msgs.msg import DriveFrame, DrivingDecision, ExplainedObjects, MapTrust
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rcl_interfaces.msg import ParameterEvent
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from carla_digr.live.composition import PAGE_IS_AT
from carla_digr.live.viewer.asking import Asking
from carla_digr.live.viewer.page_decision import page_decision
from carla_digr.live.viewer.server import ViewerServer
from carla_digr.saliency.overlay import COLORMAP, COLORMAPS
from carla_digr_ros import topics
from carla_digr_ros.conversion import to_array, to_rgb
from carla_digr_ros.diagnostics import OK, WARN, Recent, Reporter
from carla_digr_ros.page_control import PageControl
from carla_digr_ros.parameters import declare
from carla_digr_ros.running import ManagedNode, run

PATIENCE = 4  # newer pictures after which a frame is shown without what is still missing
SAID = 1.0  # s of the drive that a sentence is shown; it comes after its frame is on the page
MOST_OBJECTS = 100  # of a frame
MOST_ACTIONS, LONGEST_NAME, LONGEST_SENTENCE = 1000, 100, 1000  # that the page is sent
KNOWN_FRAMES = 40  # whose parts wait for their picture
EVENTS_KEPT = 100  # changes of parameters
JUMP = 1.0  # s that a frame must be older than the newest to be taken for a new beginning of time


@dataclass
class Parts:
    """What has arrived of one frame; ``arrived`` is the picture's time on the monotonic clock in s."""

    rgb: NDArray | None = None
    observation: NDArray | None = None  # what the policy saw in its place, during an attack
    arrived: float = math.nan
    facts: DriveFrame | None = None
    odometry: Odometry | None = None
    decision: DrivingDecision | None = None
    fallback: DrivingDecision | None = None
    saliency: NDArray | None = None

    def complete(self) -> bool:
        """Whether nothing more is to be waited for: after a decision comes a map, after a lone fallback nothing."""
        if self.rgb is None:
            return False
        if self.decision is None:
            return self.fallback is not None
        if self.decision.attack and self.observation is None:
            return False
        return self.saliency is not None or self.decision.unexplained


class ViewerNode(ManagedNode):
    """Subscribes to picture, decision and map; serves the page on ``host``:``port``."""

    def __init__(self) -> None:
        super().__init__("viewer")
        self._host = declare(self, "host", "127.0.0.1", "address the page is served on")
        self._port = declare(self, "port", 8765, "port of the page, 0 for a free one", (0, 65535))
        self._colormap = declare(
            self, "colormap", COLORMAP, "colours of the map", choices=tuple(COLORMAPS), changed=self._change_colormap
        )
        self._replays = declare(self, "replays", False, "a player's recording is shown: the page holds and steps that")
        self._server: ViewerServer | None = None
        self._manual = self.advertise(topics.MANUAL)
        self._control: PageControl | None = None
        self._frames: dict[tuple[int, int], Parts] = {}  # by stamp, in order of arrival
        self._shown = Recent()
        self._incomplete = 0
        self._newest = (0, 0)
        self._said: ExplainedObjects | None = None
        self._judged: MapTrust | None = None
        # Run after what waits of the other topics: of several frames at once all pictures may be taken first.
        self._overdue = self.create_guard_condition(self._show_overdue)
        Reporter(self, "web page", self._status)

    def configure(self) -> None:
        """Serve the page."""
        self._control = PageControl(self, self._manual, self._tell, self._replays)
        asking = Asking(self._control.policy)
        self._server = ViewerServer(
            self._host, self._port, colormap=self._colormap, controls=self._control, asking=asking
        )
        self._tell(self._control.told)
        # Not by the log, which all nodes of the domain can read: the address has the token.
        print(f"{PAGE_IS_AT}{self._server.address}", flush=True)

    def activate(self) -> None:
        """Feed it."""
        self.listen(topics.FRAME, self._on_frame)
        self.listen(topics.ODOMETRY, self._on_odometry)
        self.listen(topics.IMAGE, self._on_image)
        self.listen(topics.DECISION, self._on_decision)
        self.listen(topics.OBSERVATION, self._on_observation)
        self.listen(topics.SALIENCY, self._on_saliency)
        self.listen(topics.OBJECTS, self._on_objects)
        self.listen(topics.TRUST, self._on_trust)
        self.listen(topics.DIAGNOSTICS, self._on_diagnostics)
        events = self.create_subscription(ParameterEvent, "/parameter_events", self._on_parameters, EVENTS_KEPT)
        self.heard.append(events)

    def close(self) -> None:
        """End the page's server."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.close()
            self._server = None

    def _change_colormap(self, colormap: str) -> None:
        self._colormap = colormap
        if self._server is not None:
            self._server.change_colormap(colormap)

    def _tell(self, state: Mapping[str, Any]) -> None:
        if self._server is not None:
            self._server.tell(state)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        if self._control is not None:
            self._control.hear(message)

    def _on_parameters(self, event: ParameterEvent) -> None:
        if self._control is not None:
            self._control.changed(event)

    def _on_frame(self, message: DriveFrame) -> None:
        with self._parts_of(message.header) as parts:
            parts.facts = message

    def _on_odometry(self, message: Odometry) -> None:
        with self._parts_of(message.header) as parts:
            parts.odometry = message

    def _on_image(self, message: Image) -> None:
        picture = to_rgb(message)
        with self._parts_of(message.header) as parts:
            parts.rgb, parts.arrived = picture, time.monotonic()

    def _on_decision(self, message: DrivingDecision) -> None:
        texts = (*message.action_names, message.policy_hash, message.method, message.target, message.attack)
        if max(len(message.action_names), len(message.probabilities)) > MOST_ACTIONS:
            raise ValueError(f"a decision between more than {MOST_ACTIONS} actions")
        if any(len(text) > LONGEST_NAME for text in texts):
            raise ValueError(f"a decision with a name of more than {LONGEST_NAME} characters")
        with self._parts_of(message.header) as parts:
            if message.fallback:
                parts.fallback = message
            else:
                parts.decision = message

    def _on_observation(self, message: Image) -> None:
        picture = to_rgb(message)
        with self._parts_of(message.header) as parts:
            parts.observation = picture

    def _on_saliency(self, message: Image) -> None:
        if message.encoding != "32FC1":
            raise ValueError(f"a map is 32FC1, not {message.encoding[:LONGEST_NAME]!r}")
        saliency = to_array(message)
        with self._parts_of(message.header) as parts:
            parts.saliency = saliency

    def _on_objects(self, message: ExplainedObjects) -> None:
        if len(message.sentence) > LONGEST_SENTENCE:
            raise ValueError(f"a sentence of more than {LONGEST_SENTENCE} characters")
        if len(message.objects) > MOST_OBJECTS or any(len(thing.kind) > LONGEST_NAME for thing in message.objects):
            raise ValueError(
                f"more than {MOST_OBJECTS} objects, or one with a name of more than {LONGEST_NAME} characters"
            )
        self._said = message

    def _on_trust(self, message: MapTrust) -> None:
        self._judged = message

    def _trust(self, key: tuple[int, int]) -> tuple[float, float] | None:
        """The last agreement with a perturbation map, and its age in s."""
        if self._judged is None:
            return None
        told = self._judged.header.stamp
        since = _seconds(key) - _seconds((told.sec, told.nanosec))
        return (self._judged.agreement, self._judged.age + since) if since >= 0.0 else None

    def _what_decides(self, key: tuple[int, int]) -> ExplainedObjects:
        """What was said last; nothing, if that is too long ago."""
        if self._said is None:
            return ExplainedObjects()
        said = self._said.header.stamp
        recent = 0.0 <= _seconds(key) - _seconds((said.sec, said.nanosec)) <= SAID
        return self._said if recent else ExplainedObjects()

    @contextmanager
    def _parts_of(self, header: Header) -> Iterator[Parts]:
        """The parts of a header's frame, to be filled; then frames are shown that wait for nothing more."""
        key = header.stamp.sec, header.stamp.nanosec
        if _seconds(key) < _seconds(self._newest) - JUMP:
            self._frames, self._newest = {}, (0, 0)
        if key not in self._frames and key <= self._newest:
            yield Parts()  # shown already
            return
        frame = self._frames.setdefault(key, Parts())
        yield frame
        while len(self._frames) > KNOWN_FRAMES:
            del self._frames[next(iter(self._frames))]
        if key in self._frames and frame.complete():
            self._show(key)
        elif len(self._pictured()) > PATIENCE:
            self._overdue.trigger()

    def _pictured(self) -> list[tuple[int, int]]:
        """The stamps of waiting frames whose picture has come."""
        return [stamp for stamp, parts in self._frames.items() if parts.rgb is not None]

    def _show_overdue(self) -> None:
        while len(pictures := self._pictured()) > PATIENCE:
            self._incomplete += 1
            self._show(pictures[0])

    def _show(self, key: tuple[int, int]) -> None:
        frame = self._frames[key]
        # What is older comes too late; the page runs forward only.
        self._newest = max(self._newest, key)
        self._frames = {stamp: parts for stamp, parts in self._frames.items() if stamp > key}
        said = self._what_decides(key)
        decision = page_decision(
            frame.decision,
            frame.fallback,
            frame.facts,
            frame.odometry,
            said.sentence,
            self._trust(key),
            said.objects,
        )
        if frame.saliency is not None:
            decision["saliency_flat"] = not frame.saliency.any()
        if frame.saliency is not None:
            decision["latency_ms"] = (time.monotonic() - frame.arrived) * 1000.0
        self._shown.add(decision.get("latency_ms", math.nan))
        assert self._server is not None and frame.rgb is not None
        number = frame.facts.frame if frame.facts else 0  # a camera without a bridge has no numbers
        seen = frame.rgb if frame.observation is None else frame.observation
        self._server.publish(_seconds(key), number, seen, frame.saliency, decision)

    def _status(self):
        if self._server is None:
            return WARN, "not configured", {}
        page = self._server.status()
        values: dict[str, object] = {
            "page": self._server.url,
            "frames (Hz)": self._shown.rate(),
            "frame to map p50 (ms)": self._shown.latency(50),
            "frame to map p99 (ms)": self._shown.latency(99),
            "frames shown incomplete": self._incomplete,
            "clients": len(page["clients"]),
            "frames dropped for slow clients": sum(client["dropped"] for client in page["clients"]),
        }
        if self._shown.rate() == 0.0:
            return WARN, "No frames", values
        return OK, f"{self._shown.rate():.1f} frames/s, {len(page['clients'])} clients", values


def _seconds(stamp: tuple[int, int]) -> float:
    return stamp[0] + stamp[1] * 1e-9


def main() -> int:
    """Run the node; its exit status."""
    return run(ViewerNode)
