"""A drive in a bag: which messages belong to which frame, and what they say. No ROS in here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys.store import Typestore
from tqdm import tqdm

from carla_digr.errors import UserError
from carla_digr.recordings import topics
from carla_digr.recordings.bag import Bag, Channel, channel_types
from carla_digr.recordings.recorder import Timeline
from carla_digr.recordings.topics import (
    DECISION,
    FACTS_TOPIC,
    FRAME,
    IMAGE,
    OBJECTS,
    OBSERVATION,
    ODOMETRY,
    PICTURE_TYPE,
    SALIENCY,
    TRUST,
)

# What is read of a drive.
TYPES = {
    topic: topics.TYPES[topic]
    for topic in (IMAGE, OBSERVATION, SALIENCY, DECISION, FRAME, ODOMETRY, OBJECTS, TRUST, FACTS_TOPIC)
}


class Decoder:
    """Turns the bytes of a bag's messages into objects with the fields that the bag's own definitions name."""

    def __init__(self) -> None:
        self._stores: dict[str, Typestore] = {}

    def __call__(self, channel: Channel, data: bytes) -> Any:
        """A message.

        Raises:
            UserError: the type is unknown, or the bytes do not fit it.
        """
        if channel.type not in self._stores:
            self._stores[channel.type] = channel_types(channel)
        try:
            return self._stores[channel.type].deserialize_cdr(data, channel.type)
        except Exception as error:  # rosbags documents none of what broken bytes raise
            raise UserError(f"A message of the topic {channel.topic} is damaged: it is no {channel.type}.") from error


FIRST, LISTED = 4, 8  # byte of a CDR message at which its first field begins, or the first one in a list


def stamp_of(data: bytes, place: int = FIRST) -> int:
    """ns; the stamp of a CDR message that begins with a header or is a Clock, or with a list of messages with headers.

    Args:
        place: FIRST or LISTED.

    Raises:
        UserError: the message is shorter than that.
    """
    if len(data) < place + 8:
        raise UserError("A message of the recording is damaged: it is too short for its header.")
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, place)
    return seconds * 10**9 + nanoseconds


def blank(store: Typestore, message_type: str, **fields: Any) -> Any:
    """A message of a type with some of its fields set, and zero, empty text, empty array in the others."""

    def default(kind: Nodetype, detail: Any) -> Any:
        if kind == Nodetype.BASE:
            return {"string": "", "bool": False}.get(detail[0], 0)
        if kind == Nodetype.NAME:
            return blank(store, detail)
        (inner, name), length = detail[0], detail[1] if kind == Nodetype.ARRAY else 0
        if inner == Nodetype.BASE and name[0] != "string":
            return np.zeros(length, {"octet": "uint8", "char": "uint8"}.get(name[0], name[0]))
        return [default(inner, name)] * length

    names = store.get_msgdef(message_type).fields
    values = {name: fields.pop(name) if name in fields else default(*detail) for name, detail in names}
    assert not fields, f"{message_type} has no {', '.join(fields)}"
    return store.types[message_type](**values)


def converted(store: Typestore, message_type: str, message: Any) -> Any:
    """A message of an older or newer definition of a type as the store's: what is missing is zero or empty."""
    names = [name for name, _ in store.get_msgdef(message_type).fields if hasattr(message, name)]
    return blank(store, message_type, **{name: getattr(message, name) for name in names})


@dataclass
class Frame:
    """One frame of a drive.

    ``stamp`` is the header's, ns; ``time`` the same on the drive's `Timeline`. ``camera``, ``observation`` (what the
    policy saw, during an attack) and ``saliency`` are the times of these messages in the bag, ns; ``policy`` is the
    policy's decision and ``fallback`` the bridge's in its place. ``trust`` is what was known then of an earlier
    frame's map. None: there is no such message. ``sentence`` says what decides, empty if nobody did.
    """

    stamp: int
    time: int
    camera: int
    observation: int | None = None
    saliency: int | None = None
    facts: Any = None
    odometry: Any = None
    policy: Any = None
    fallback: Any = None
    sentence: str = ""
    trust: Any = None

    def picture(self, camera: str) -> tuple[str, int]:
        """Topic and time of the picture that the policy saw, ``camera`` being the camera's topic."""
        return (camera, self.camera) if self.observation is None else (OBSERVATION, self.observation)

    @property
    def number(self) -> int:
        """The simulator's number of the frame, 0 if nothing says it."""
        return next((m.frame for m in (self.facts, self.policy, self.fallback) if m is not None), 0)


@dataclass
class Drive:
    """What a bag has of a drive: ``frames`` in order of time, the recording's ``facts``, and ``ignored``, sentences."""

    frames: list[Frame]
    facts: dict[str, str]
    ignored: list[str]


def read_drive(bag: Bag, camera: str = IMAGE, seen: Callable[[Channel, int, bytes], None] | None = None) -> Drive:
    """Find the frames of a bag: every picture with what has its stamp.

    Args:
        bag: the open bag.
        camera: the topic with the pictures.
        seen: called for every message of the drive's topics, in order of time. Without it the pictures stay packed
            where the bag's index is enough.

    Raises:
        UserError: there are no pictures, or the bag is damaged.
    """
    types = TYPES | {camera: PICTURE_TYPE}
    ignored = [
        f"{channel.topic} is {channel.type}, not {types[channel.topic]}"
        for channel in bag.channels
        if channel.topic in types and channel.type != types[channel.topic]
    ]
    wanted = {c for c in bag.channels if c.type == types.get(c.topic) and (c.topic != IMAGE or camera == IMAGE)}
    names = {OBSERVATION: "observation", SALIENCY: "saliency", camera: "camera"}
    found = None if seen else _read_by_index(bag, wanted, names)
    parts, facts, _ = found or _read_all(bag, wanted, names, seen)
    frames = [Frame(time=time, **frame) for time, frame in sorted(parts.items()) if "camera" in frame]
    if not frames:
        pictures = sorted({c.topic for c in bag.channels if c.type == PICTURE_TYPE})
        others = f"name one of its picture topics: {', '.join(pictures)}" if pictures else "it has no pictures at all"
        raise UserError(f"The recording {bag.path} has no pictures on {camera}; {others}.")
    return Drive(frames, facts, ignored)


class _Read(NamedTuple):
    """``parts``: time of a frame on the drive's `Timeline` -> fields of its `Frame`; the recording's ``facts``;
    ``placed``: every message has its time on the timeline as its time in the bag too."""

    parts: dict[int, dict[str, Any]]
    facts: dict[str, str]
    placed: bool


def _read_by_index(bag: Bag, wanted: set[Channel], names: Mapping[str, str]) -> _Read | None:
    """As `_read_all`, but of the pictures only their times, from the bag's index.

    A picture's stamp is in the picture. But where every other message has the time in the bag that its stamp has on
    the drive's timeline, as the recorder writes them, and every picture has the time of some of them, their stamps
    are one. None: this is not so, or there is no index.
    """
    pictures = bag.times(channel for channel in wanted if channel.topic in names and bag.counts[channel])
    if pictures is None:
        return None
    read = _read_all(bag, {channel for channel in wanted if channel.topic not in names}, names)
    if not read.placed:
        return None
    for channel, times in pictures.items():
        for time in times:
            if time not in read.parts:
                return None
            read.parts[time][names[channel.topic]] = time
    return read


def _read_all(
    bag: Bag,
    wanted: set[Channel],
    names: Mapping[str, str],
    seen: Callable[[Channel, int, bytes], None] | None = None,
) -> _Read:
    """What the messages of some channels say about the frames."""
    parts: dict[int, dict[str, Any]] = {}
    facts: dict[str, str] = {}
    placed = True
    decode, timeline = Decoder(), Timeline()
    total = sum(bag.counts[channel] for channel in wanted)
    with tqdm(total=total, unit="message", unit_scale=True, desc="reading", mininterval=1, delay=1) as progress:
        for channel, time, data in bag.read(wanted=lambda channel: channel in wanted):
            progress.update()
            if seen is not None:
                seen(channel, time, data)
            if channel.topic == FACTS_TOPIC:
                facts = _facts(decode(channel, data).data)
                continue
            stamp = stamp_of(data)
            place = timeline.place(channel.topic, stamp)
            placed = placed and place == time
            frame = parts.setdefault(place, {"stamp": stamp})
            if channel.topic in names:
                frame[names[channel.topic]] = time
            elif channel.topic == DECISION:
                message = decode(channel, data)
                frame["fallback" if message.fallback else "policy"] = message
            elif channel.topic == OBJECTS:
                frame["sentence"] = decode(channel, data).sentence
            elif channel.topic == TRUST:
                frame["trust"] = decode(channel, data)
            else:
                frame["facts" if channel.topic == FRAME else "odometry"] = decode(channel, data)
    return _Read(parts, facts, placed)


def _facts(text: str) -> dict[str, str]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in facts.items()} if isinstance(facts, Mapping) else {}
