"""`carla-digr explain`: a recording whose pictures another policy, or the same by another method, has explained.

Maps take long, copying does not: interrupted and given again, the command takes the maps that it had made from its
unfinished recording and makes the rest.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.driving.control import UNKNOWN, Neighbour, commands_of
from carla_digr.errors import UserError
from carla_digr.explainer import Decision, Explainer
from carla_digr.files import sha256_of
from carla_digr.images import Crop, to_array, to_rgb
from carla_digr.objects import Narrator, explain_objects, fields_of, viewed_objects
from carla_digr.recordings import drive as drive_bag
from carla_digr.recordings.bag import (
    Bag,
    BagWriter,
    Channel,
    channel_types,
    new_bag,
    offered_qos,
    open_bag,
)
from carla_digr.recordings.definitions import definition, typestore
from carla_digr.recordings.drive import COMPRESSED_IMAGE, Decoder, Drive, Frame, blank, converted, restamped, stamp_of
from carla_digr.recordings.repair import Salvage
from carla_digr.recordings.topics import (
    COMPRESSED_TYPE,
    DECISION,
    FACTS_TOPIC,
    IMAGE,
    INSTANCES,
    OBJECT_TYPE,
    OBJECTS,
    OBSERVATION,
    ODOMETRY,
    OVERLAY,
    PICTURE_TYPE,
    SALIENCY,
    TRUST,
    TYPES,
    VEHICLES,
)
from carla_digr.saliency import DEFAULT
from carla_digr.saliency.overlay import overlay

GAP = 500_000_000  # ns between two frames from which on the later one begins anew for policies that see several
KNOWN_FRAMES = 40  # whose segmentation and decision wait for each other
OURS = {topic: TYPES[topic] for topic in (FACTS_TOPIC, DECISION, SALIENCY, OVERLAY, OBJECTS)}  # that are made anew


class Explained(NamedTuple):
    """What `explain_bag` has done.

    ``frames`` with a map, ``resumed`` of them from an interrupted command; pictures that were ``refused``, by reason;
    ``left_out``: a sentence for each topic that could not be copied, and for what else is amiss.
    """

    frames: int
    resumed: int
    refused: Counter[str]
    left_out: list[str]
    policy_hash: str


def explain_bag(
    path: Path,
    out: Path,
    method: str = DEFAULT,
    weights: Path | None = None,
    camera: str = IMAGE,
    wrong_size: str = "refuse",
    target: str | None = None,
    module: str | None = None,
    odometry: str = ODOMETRY,
    crop: Crop | None = None,
    device: str = "cpu",
) -> Explained:
    """Copy a recording with new decisions, maps and overlays in place of those in it, and where it has a segmentation
    of its pictures with new objects.

    The same recording, policy, method and machine give the same bytes. Maps by ``digr`` with the policy that drove are
    those of the drive. Fallbacks of the bridge stay; times that were measured are NaN.

    Args:
        path: the recording.
        out: the new one, which appears once it is complete.
        method: a key of `carla_digr.saliency.METHODS`.
        weights: the policy; None: the one that drove, if it ships with the package.
        camera: the topic with the pictures, raw or compressed.
        wrong_size: "refuse" or "resize" a picture of another size than the policy's.
        target: the action that is explained, by name or index; None: what was decided.
        module: the policy's own code, see `carla_digr.checkpoint.load`.
        odometry: the topic with the ego's motion.
        crop: the part of each picture that is explained, of which no objects are told; None: all of it.
        device: where the policy computes, "cpu", "cuda" or "auto": on a GPU if there is one.

    Raises:
        UserError: a recording, weights, a method or a name that does not do.
    """
    if out.exists():  # said before the long reading, not after it
        raise UserError(f"{out} exists already: choose another name for the new recording.")
    with open_bag(path) as bag:
        drive = drive_bag.read_drive(bag, camera, odometry=odometry)
        policy = weights or policy_that_drove(path, drive)
        resize = wrong_size == "resize"
        explainer = Explainer.from_checkpoint(policy, None, method, target, resize, module, device)
        return _Copy(bag, drive, explainer, odometry, crop).write(out)


def policy_that_drove(path: Path, drive: Drive) -> Path:
    """The weights that ship and have the hash of the policy that drove.

    Raises:
        UserError: the recording names no policy, or one that does not ship.
    """
    names = {frame.policy.policy_hash for frame in drive.frames if frame.policy is not None}
    names = names or {name for key, name in drive.facts.items() if key == "policy_hash"}
    for shipped in sorted(WEIGHTS_DIRECTORY.glob("driving_*.safetensors")):
        if names == {sha256_of(shipped)[:12]}:
            return shipped
    who = " and ".join(sorted(names)) or "an unknown policy"
    raise UserError(f"{path} was driven by {who}, which does not ship: name a policy with --weights.")


class Maps(NamedTuple):
    """The serialised messages of a frame's map and overlay."""

    saliency: bytes
    overlay: bytes


class Earlier:
    """Gives back the maps in the unfinished recording of an interrupted command, in the order in which they were made.

    Only those of the same pictures by the same policy and method.

    Args:
        file: the unfinished recording.
        facts: the first message of the new one, which names policy and method.
    """

    def __init__(self, file: Path, facts: bytes):
        self._made = self._read(file, facts)
        self._next = next(self._made, None)

    def maps(self, time: int, picture: bytes) -> Maps | None:
        """What was made of a picture (CDR) at ``time`` in ns, asked for in order of time."""
        while self._next is not None and self._next[0] < time:
            self._next = next(self._made, None)
        if self._next is None or self._next[:2] != (time, picture):
            return None
        return self._next[2]

    @staticmethod
    def _read(file: Path, facts: bytes) -> Iterator[tuple[int, bytes, Maps]]:
        """Time, picture and maps of each frame."""
        salvage = Salvage(file)
        parts: dict[str, tuple[int, bytes]] = {}
        for number, time, data in salvage.messages():
            topic = salvage.channels[number].topic if number in salvage.channels else ""
            if topic == FACTS_TOPIC and data != facts:
                return
            topic = IMAGE if topic == COMPRESSED_IMAGE else topic
            if topic not in (FACTS_TOPIC, IMAGE, OBSERVATION, SALIENCY, OVERLAY):
                continue
            parts[topic] = time, data
            if topic == OVERLAY and FACTS_TOPIC in parts and parts[SALIENCY][0] == time:
                seen = parts.get(OBSERVATION)
                picture = seen if seen is not None and seen[0] == time else parts[IMAGE]
                yield time, picture[1], Maps(parts[SALIENCY][1], data)


@dataclass
class _Segmented:
    """What belongs to one frame's objects, in whatever order it comes."""

    decided: tuple[int, Frame, Any, Decision, np.ndarray] | None = None  # time, frame, header, decision, map
    labels: np.ndarray | None = None
    neighbours: dict[int, Neighbour] | None = None


class _Copy:
    """Writes the new recording."""

    def __init__(self, bag: Bag, drive: Drive, explainer: Explainer, odometry: str, crop: Crop | None):
        self._bag, self._drive, self._explainer = bag, drive, explainer
        self._odometry, self._crop = odometry, crop
        self._commands = commands_of(explainer.card)
        self._facts = {
            **drive.facts,
            "driven_by": drive.facts.get("driven_by", drive.facts.get("policy_hash", "")),
            "policy_hash": explainer.policy_hash,
            "method": explainer.method,
        }
        if explainer.target is not None:
            self._facts["target"] = explainer.target_name
        if crop is not None:
            self._facts["crop"] = str(crop)
        self._frames = {frame.picture(drive.camera): frame for frame in drive.frames}
        segmented = {(channel.topic, channel.type) for channel in bag.channels if bag.counts[channel]}
        self._has_objects = {(topic, TYPES[topic]) for topic in (INSTANCES, VEHICLES)} <= segmented and crop is None
        self._segmented: dict[int, _Segmented] = {}  # by stamp, ns
        self._narrator = Narrator(explainer.action_names)
        self._decode, self._store = Decoder(), typestore()
        self._ours = {
            topic: Channel(topic, kind, definition(self._store, kind), offered_qos(latched=topic == FACTS_TOPIC))
            for topic, kind in OURS.items()
            if topic != OBJECTS or self._has_objects
        }
        self._left_out = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in drive.ignored]
        self._copied = {channel: self._copy_of(channel) for channel in bag.channels}
        self._resumed, self._refused = 0, Counter[str]()
        self._last: tuple[int, int] | None = None  # time and episode of the frame before

    def write(self, out: Path) -> Explained:
        """The new recording under its name.

        Raises:
            UserError: no picture could be explained, or there is no room.
        """
        channels = [*self._ours.values(), *filter(None, self._copied.values())]
        done = 0
        with (
            new_bag(out, channels, self._facts, resumes=True) as new,
            tqdm(total=len(self._frames), unit="frame", desc=self._explainer.method, mininterval=1) as progress,
        ):
            facts = self._serialized(FACTS_TOPIC, self._store.types[OURS[FACTS_TOPIC]](json.dumps(self._facts)))
            earlier = Earlier(new.earlier, facts) if new.earlier else None
            for number, (channel, time, data) in enumerate(self._bag.read()):
                if not number:
                    new.write(FACTS_TOPIC, OURS[FACTS_TOPIC], time, facts)
                copied = self._copied[channel]
                if channel.topic == self._drive.camera and self._drive.timed and (channel.topic, time) in self._frames:
                    data = restamped(data, time)
                if copied is not None:
                    new.write(copied.topic, copied.type, time, data)
                elif channel.topic == DECISION and channel.type == OURS[DECISION]:
                    self._keep_fallback(new, channel, time, data)
                if self._has_objects and channel.type == TYPES.get(channel.topic):
                    self._segment(new, channel, data)
                frame = self._frames.get((channel.topic, time))
                if frame is not None and channel.type in (PICTURE_TYPE, COMPRESSED_TYPE):
                    maps = earlier.maps(time, data) if earlier else None
                    done += self._explain(new, channel, time, data, frame, maps)
                    progress.update()
                new.flush()
            if not done:
                raise UserError(f"No picture of {self._bag.path} could be explained: {next(iter(self._refused))}")
        left_out = [*self._left_out, *self._bag.damage]
        return Explained(done, self._resumed, self._refused, left_out, self._explainer.policy_hash)

    def _copy_of(self, channel: Channel) -> Channel | None:
        """What a channel is in the new recording; None: it is left out."""
        camera, odometry = self._drive.camera, self._odometry
        instead = {IMAGE: camera, COMPRESSED_IMAGE: camera, ODOMETRY: odometry}.get(channel.topic, channel.topic)
        if channel.topic in (*OURS, TRUST) or instead != channel.topic:
            return None
        try:
            types = channel_types(channel)
        except UserError as error:
            self._left_out.append(str(error))
            return None
        picture = COMPRESSED_IMAGE if channel.type == COMPRESSED_TYPE else IMAGE
        topic = {camera: picture, odometry: ODOMETRY}.get(channel.topic, channel.topic)
        return Channel(topic, channel.type, channel.definition or definition(types, channel.type), channel.qos)

    def _keep_fallback(self, new: BagWriter, channel: Channel, time: int, data: bytes) -> None:
        """The bridge's own decisions belong to the drive; their definition becomes today's."""
        try:
            message = self._decode(channel, data)
        except UserError:
            return  # a damaged one, which has been told of
        if message.fallback:
            self._write(new, DECISION, time, converted(self._store, OURS[DECISION], message))

    def _explain(
        self, new: BagWriter, channel: Channel, time: int, data: bytes, frame: Frame, maps: Maps | None
    ) -> bool:
        episode = frame.facts.episode if frame.facts is not None else 0
        if self._last is None or episode != self._last[1] or not 0 < frame.time - self._last[0] <= GAP:
            self._explainer.restart()
            self._narrator.restart()
        self._last = frame.time, episode
        try:
            message = self._decode(channel, data)
            rgb = to_rgb(message)
            rgb = self._crop.of(rgb) if self._crop else rgb
            decision = self._explainer.decide(rgb)
        except (ValueError, UserError) as error:
            self._refused[str(error)] += 1
            return False
        if maps is None:
            saliency, picture = self._explainer.explain(decision).map, self._explainer.fitted(rgb)
            maps = Maps(
                self._serialized(SALIENCY, self._image(message.header, saliency, "32FC1")),
                self._serialized(OVERLAY, self._image(message.header, overlay(picture, saliency), "rgb8")),
            )
        else:
            self._resumed += 1
        self._write(new, DECISION, time, self._decision(message.header, decision, frame))
        new.write(SALIENCY, OURS[SALIENCY], time, maps.saliency)
        new.write(OVERLAY, OURS[OVERLAY], time, maps.overlay)
        if self._has_objects:
            saliency = to_array(self._store.deserialize_cdr(maps.saliency, OURS[SALIENCY]))
            parts = self._segmented.setdefault(frame.stamp, _Segmented())
            parts.decided = time, frame, message.header, decision, saliency
            self._say_objects(new, frame.stamp)
        return True

    def _segment(self, new: BagWriter, channel: Channel, data: bytes) -> None:
        """Keep a frame's segmentation, or its vehicles, and say its objects if they are the last that was missing."""
        if channel.topic not in (INSTANCES, VEHICLES):
            return
        try:
            message, parts = self._decode(channel, data), self._segmented.setdefault(stamp_of(data), _Segmented())
            if channel.topic == VEHICLES:
                parts.neighbours = {v.id: Neighbour(v.ahead, v.right, v.lane) for v in message.vehicles}
            else:
                parts.labels = to_rgb(message)
        except (ValueError, AttributeError, UserError):
            return  # a damaged one: the frame has no objects
        self._say_objects(new, stamp_of(data))

    def _say_objects(self, new: BagWriter, stamp: int) -> None:
        parts = self._segmented[stamp]
        if parts.decided is not None and parts.labels is not None and parts.neighbours is not None:
            time, frame, header, decision, saliency = parts.decided
            del self._segmented[stamp]
            seen = viewed_objects(parts.labels, parts.neighbours, saliency.shape)
            found = explain_objects(self._explainer, decision, saliency, seen)
            message = blank(
                self._store,
                OURS[OBJECTS],
                header=header,
                frame=frame.number,
                sentence=self._narrator.say(decision.action, found),
                objects=[blank(self._store, OBJECT_TYPE, **fields) for fields in fields_of(found)],
                policy_hash=self._explainer.policy_hash,
                objects_ms=math.nan,
            )
            self._write(new, OBJECTS, time, message)
        while len(self._segmented) > KNOWN_FRAMES:
            del self._segmented[next(iter(self._segmented))]

    def _decision(self, header: Any, decision: Decision, frame: Frame) -> Any:
        wanted = UNKNOWN if self._commands is None or decision.action < 0 else self._commands[decision.action]
        return blank(
            self._store,
            OURS[DECISION],
            header=header,
            frame=frame.number,
            action_names=list(self._explainer.action_names),
            probabilities=decision.probabilities,
            action=max(decision.action, 0),
            throttle=wanted.throttle,
            steer=wanted.steer if decision.finite else math.nan,
            brake=wanted.brake,
            target_speed=wanted.target_speed,
            along_lane=wanted.along_lane,
            value=decision.value,
            policy_hash=self._explainer.policy_hash,
            inference_ms=math.nan,
            saliency_ms=math.nan,
            method=self._explainer.method,
            target=self._explainer.target_name,
        )

    def _image(self, header: Any, picture: np.ndarray, encoding: str) -> Any:
        height, width = picture.shape[:2]
        data = np.frombuffer(np.ascontiguousarray(picture).tobytes(), np.uint8)
        fields = {"height": height, "width": width, "encoding": encoding, "step": len(data) // height, "data": data}
        return blank(self._store, PICTURE_TYPE, header=header, **fields)

    def _serialized(self, topic: str, message: Any) -> bytes:
        return bytes(self._store.serialize_cdr(message, OURS[topic]))

    def _write(self, new: BagWriter, topic: str, time: int, message: Any) -> None:
        new.write(topic, OURS[topic], time, self._serialized(topic, message))
