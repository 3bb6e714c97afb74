"""Node `player`: publishes a recording's messages as the drive did, and ends with it."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import QosDurability, QosReliability
from rosbags.typesys.store import Typestore
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger

from carla_digr.errors import UserError
from carla_digr.images import Crop, to_rgb
from carla_digr.recordings.bag import Bag, Channel, channel_types, open_bag
from carla_digr.recordings.definitions import typestore
from carla_digr.recordings.drive import COMPRESSED_IMAGE, Decoder, converted, stamp_of
from carla_digr.recordings.playback import LONGEST_GAP, Playback
from carla_digr.recordings.topics import COMPRESSED_TYPE, PICTURE_TYPE
from carla_digr_ros import topics
from carla_digr_ros.conversion import to_message
from carla_digr_ros.diagnostics import OK, WARN, Recent, Reporter, Seldom
from carla_digr_ros.parameters import declare
from carla_digr_ros.receiving import message_of
from carla_digr_ros.running import ManagedNode, Stop, run

TABLE = {topic.name: topic for topic in topics.TOPICS}
ANEW = {
    topic.name
    for topic in (topics.SALIENCY, topics.OVERLAY, topics.OBSERVATION, topics.OBJECTS, topics.TRUST, topics.DIAGNOSTICS)
}
CLOCK_SECONDS = 0.02  # between two messages on /clock where the recording has none
LISTENERS_SECONDS = 60.0  # longest wait for the listeners
LAST_SECONDS = 2.0  # longest wait until the last messages have arrived

Send = Callable[[bytes, int], None]  # of a message's bytes and its time in the recording, ns


class Player(ManagedNode):
    """Publishes at the recorded times; services ``~/pause`` (std_srvs/SetBool) and ``~/step`` (Trigger) hold it."""

    def __init__(self) -> None:
        super().__init__("player")
        self._path = Path(declare(self, "bag", "", "the recording: a bag's directory, or its .mcap or .db3 file"))
        self._start = declare(self, "start", 0.0, "s of the recording left out at its beginning", (0.0, 1e9))
        self._duration = declare(self, "duration", 0.0, "s of the recording to replay; 0: to its end", (0.0, 1e9))
        self._loop = declare(self, "loop", False, "begin again at the end")
        self._explanations = declare(
            self, "explanations", True, "false: leave the policy's decisions, maps and overlays to an explainer"
        )
        self._listeners = declare(self, "listeners", [""], "nodes that must listen before the first message goes out")
        self._camera = declare(self, "camera", topics.IMAGE.name, "the recording's pictures, raw or compressed")
        self._odometry = declare(self, "odometry", topics.ODOMETRY.name, "the recording's topic with the car's motion")
        self._crop = Crop.parse(declare(self, "crop", "", "the part of each picture to show, x,y,w,h; empty: all"))
        self._damaged = 0
        self._damage_told = Seldom()
        rate = declare(self, "rate", 1.0, "speed of the replay", (0.01, 100.0), changed=self._change_rate)
        paused = declare(self, "paused", False, "begin with a pause")
        self._playback = Playback(time.monotonic, rate, paused)
        self._open = contextlib.ExitStack()
        self._bag: Bag | None = None
        self._channels: dict[Channel, Send] = {}
        self._outs: list[Publisher] = []
        self._own_clock: Publisher | None = None  # ours, where the recording has none
        self._sent, self._passes = Recent(), 0
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/step", self._on_step)
        self._reporter = Reporter(self, "replay", self._status)

    def configure(self) -> None:
        """Open the recording.

        Raises:
            UserError: it cannot be opened, or nothing of it can be replayed.
        """
        self._bag = self._open.enter_context(open_bag(self._path))
        length = (self._bag.end - self._bag.start) * 1e-9
        if self._start >= length:
            raise UserError(f"{self._path} is {length:.1f} s long and cannot start at {self._start:g} s.")
        filled = {channel.topic for channel in self._bag.channels if self._bag.counts[channel]}
        if self._camera == topics.IMAGE.name and self._camera not in filled and COMPRESSED_IMAGE in filled:
            self._camera = COMPRESSED_IMAGE
        known = typestore(Path(get_package_share_directory("carla_digr_msgs")) / "msg")
        for channel in self._bag.channels:
            if channel.topic in ANEW and not self._explanations:
                continue
            try:
                self._channels[channel] = self._sender(channel, known)
            except UserError as error:
                self.get_logger().warning(f"Not replayed: {error}")
        if not self._channels:
            raise UserError(f"Nothing of {self._path} can be replayed: no type of its messages is known here.")
        if topics.CLOCK.name not in {channel.topic for channel in self._channels}:
            self._own_clock = topics.CLOCK.publisher(self)

    def close(self) -> None:
        """Close the recording."""
        self._channels.clear()
        while self._outs:
            self.destroy_publisher(self._outs.pop())
        self._open.close()

    def run(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Replay while the node is active, to the end of the recording."""

        def going() -> bool:
            return self.active and not stop.requested

        while not (stop.requested or self.finalized):
            if not self.active:
                executor.spin_once(timeout_sec=0.1)
                continue
            self._wait_for_the_listeners(executor, going)
            while going():
                self._replay(executor, going)
                for sentence in self._bag.damage if self._bag else ():
                    self.get_logger().warning(sentence)
                if going() and not self._loop:
                    self._wait_for_the_last()
                    return

    def _replay(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        """One pass."""
        assert self._bag is not None
        self._passes += 1
        start = self._bag.start + round(self._start * 1e9)
        end = start + round(self._duration * 1e9) if self._duration else None
        wanted = self._channels.keys()
        pictures = {c for c in wanted if c.topic == self._camera} or set(wanted)
        for channel in wanted if self._start else ():
            if _qos(channel).durability is DurabilityPolicy.TRANSIENT_LOCAL:  # what a late listener would have got
                for _, _, data in self._bag.read(None, start, lambda other, latched=channel: other == latched):  # type: ignore[misc]
                    self._channels[channel](data, start)
        self._playback.begin(start)
        before = start
        for channel, moment, data in self._bag.read(start, end, lambda channel: channel in wanted):
            if moment - before > LONGEST_GAP * 1e9:
                self.get_logger().warning(f"Nothing for {(moment - before) * 1e-9:.0f} s: going on after the gap")
                self._playback.begin(moment)
            before = moment
            self._wait_until_due(executor, going, moment, channel in pictures)
            if not going():
                return
            self._channels[channel](data, moment)

    def _wait_until_due(
        self, executor: SingleThreadedExecutor, going: Callable[[], bool], moment: int, frame: bool
    ) -> None:
        while going() and (delay := self._playback.delay(moment, frame)) > 0.0:
            if delay < 0.002:
                time.sleep(delay)
                break
            self._tick()
            executor.spin_once(timeout_sec=min(delay - 0.001, CLOCK_SECONDS if self._own_clock else 0.1))
        if frame:
            executor.spin_once(timeout_sec=0.0)  # services and reports are heard however fast it goes
        self._tick(moment)
        self._sent.add(-1000.0 * self._playback.delay(moment, frame))

    def _tick(self, moment: int | None = None) -> None:
        """Tell the time, where no /clock was recorded."""
        if self._own_clock is not None:
            clock = Clock()
            clock.clock.sec, clock.clock.nanosec = divmod(moment or self._playback.position, 10**9)
            self._own_clock.publish(clock)

    def _wait_for_the_listeners(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        """Until the nodes that the replay is for get all that they subscribe to, so that they miss nothing of it."""
        wanted = set(filter(None, self._listeners))
        end = time.monotonic() + LISTENERS_SECONDS
        while going() and wanted:
            subscriptions = {p: self.get_subscriptions_info_by_topic(p.topic_name) for p in self._outs}
            found = {info.node_name for infos in subscriptions.values() for info in infos}
            matched = all(p.get_subscription_count() >= len(infos) for p, infos in subscriptions.items())
            if wanted <= found and matched:
                return
            if time.monotonic() > end:
                self.get_logger().warning(f"Not listening: {', '.join(sorted(wanted - found))}; beginning without them")
                return
            executor.spin_once(timeout_sec=0.1)

    def _wait_for_the_last(self) -> None:
        end = time.monotonic() + LAST_SECONDS
        for publisher in self._outs:
            publisher.wait_for_all_acked(Duration(seconds=max(0.0, end - time.monotonic())))

    # --- what is published ---

    def _sender(self, channel: Channel, known: Typestore) -> Send:
        """What publishes a message of a channel, given its bytes.

        Raises:
            UserError: its type is not known here.
        """
        places = {self._camera: topics.IMAGE.name, self._odometry: topics.ODOMETRY.name}
        name = places.get(channel.topic, channel.topic)
        if name in places.values() and channel.topic not in places:
            raise UserError(f"{channel.topic}: another topic takes its place.")
        drives = channel.topic == topics.IMAGE.name and self._crop is None  # as the drive published it
        if name == topics.IMAGE.name and not drives and channel.type in (PICTURE_TYPE, COMPRESSED_TYPE):
            return self._picture_sender(channel)
        topic = TABLE.get(name)
        publisher: Publisher
        if topic is None:
            publisher = self.create_publisher(_message_class(channel), channel.topic.lstrip("/"), _qos(channel))
        elif topic.type_name == channel.type:
            publisher = topic.publisher(self)
        else:
            raise UserError(f"{channel.topic} is {channel.type}, not {topic.type_name}.")
        self._outs.append(publisher)
        current = channel.type not in known.types or (
            channel_types(channel).hash_rihs01(channel.type) == known.hash_rihs01(channel.type)
        )
        if not current:
            self.get_logger().info(f"{channel.topic} has an older {channel.type}: what it lacks is zero or empty")
        decode = Decoder()

        def send(data: bytes, moment: int) -> None:
            try:
                if not current:
                    message = converted(known, channel.type, decode(channel, data))
                    data = bytes(known.serialize_cdr(message, channel.type))
                # The explainer's decisions are left to it; the bridge's own belong to the drive.
                ours = topic is topics.DECISION and not self._explanations
                wanted = not ours or message_of(data, topics.DECISION.type).fallback
            except (UserError, ValueError) as error:
                self._leave_out("message", channel, error)
                return
            if wanted:
                publisher.publish(data)

        return send

    def _picture_sender(self, channel: Channel) -> Send:
        """What publishes the pictures of any camera as the drive's: rgb8, cropped, and with a stamp."""
        publisher, decode = topics.IMAGE.publisher(self), Decoder()
        self._outs.append(publisher)

        def send(data: bytes, moment: int) -> None:
            try:
                message = decode(channel, data)
                rgb = to_rgb(message)
                rgb = self._crop.of(rgb) if self._crop else rgb
            except (UserError, ValueError) as error:
                self._leave_out("picture", channel, error)
                return
            header = Header(frame_id=message.header.frame_id)
            header.stamp.sec, header.stamp.nanosec = divmod(stamp_of(data) or moment, 10**9)
            publisher.publish(to_message(rgb, "rgb8", header))

        return send

    def _leave_out(self, what: str, channel: Channel, error: Exception) -> None:
        self._damaged += 1
        if self._damage_told():
            self.get_logger().warning(f"Left out a {what} on {channel.topic}: {error}")

    # --- services and diagnostics ---

    def _change_rate(self, rate: float) -> None:
        self._playback.rate = rate

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._playback.pause(request.data)
        self._reporter.report()
        response.success, response.message = True, "paused" if request.data else "going on"
        return response

    def _on_step(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._playback.step()
        self._reporter.report()
        response.success, response.message = True, "paused after the next frame"
        return response

    def _status(self):
        if self._bag is None:
            return WARN, "not configured", {}
        at = (self._playback.position - self._bag.start) * 1e-9
        values = {
            "recording": str(self._path),
            "position (s)": at,
            "length (s)": (self._bag.end - self._bag.start) * 1e-9,
            "paused": self._playback.paused,
            "rate": self._playback.rate,
            "passes": self._passes,
            "messages left out": self._damaged,
            "damage": " ".join(self._bag.damage),
            "messages (Hz)": self._sent.rate(),
            "lateness p99 (ms)": self._sent.latency(99),
        }
        return OK, f"paused at {at:.2f} s" if self._playback.paused else f"at {at:.2f} s", values


def _message_class(channel: Channel) -> type:
    """The class of a channel's messages.

    Raises:
        UserError: the type's package is not installed.
    """
    package, _, name = channel.type.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        raise UserError(f"{channel.topic}: the type {channel.type} is not installed.") from None


def _qos(channel: Channel) -> QoSProfile:
    """What the topic's first publisher offered."""
    offered = channel.qos[0] if channel.qos else None
    best_effort = offered is not None and offered.reliability is QosReliability.BEST_EFFORT
    latched = offered is not None and offered.durability is QosDurability.TRANSIENT_LOCAL
    return QoSProfile(
        depth=10,
        reliability=ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def main() -> int:
    """Run the node; its exit status."""
    return run(Player, Player.run)
