"""A drive in a bag: which messages belong to which frame, and what they say. No ROS in here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys.store import Typestore
from tqdm import tqdm

from carla_digr.errors import UserError
from carla_digr.recordings import topics
from carla_digr.recordings.bag import Bag, Channel, channel_types
from carla_digr.recordings.bounds import MESSAGE_BYTES, Limits, too_much
from carla_digr.recordings.definitions import types_of
from carla_digr.recordings.recorder import Timeline
from carla_digr.recordings.topics import (
    COMPRESSED_TYPE,
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


PICTURES = (PICTURE_TYPE, COMPRESSED_TYPE)
COMPRESSED_IMAGE = f"{IMAGE}/compressed"  # the pictures, where a recording was explained that has compressed ones
LEADING = 4  # things that decide, which are kept of a frame
MOTION_AGE = 500_000_000  # ns that another recorder's odometry may be older than the picture it is shown with


class Decoder:
    """Turns the bytes of a bag's messages into objects with the fields that the bag's own definitions name."""

    def __init__(self) -> None:
        self._stores: dict[str, Typestore | None] = {}
        self._known = types_of(PICTURE_TYPE, "")
        self._older: set[str] = set()  # types without some fields that the known ones have

    def __call__(self, channel: Channel, data: bytes) -> Any:
        """A message, of a known type with all fields that are known.

        Raises:
            UserError: the type is unknown, or has other fields of the same names, or the bytes do not fit it.
        """
        if channel.type not in self._stores:
            self._stores[channel.type] = None  # where it fails, it would fail again, and slowly
            self._stores[channel.type] = self._types(channel)
        store = self._stores[channel.type]
        try:
            if store is None or (channel.type not in PICTURES and len(data) > MESSAGE_BYTES):
                raise ValueError
            message = store.deserialize_cdr(data, channel.type)
            return converted(self._known, channel.type, message) if channel.type in self._older else message
        except Exception as error:  # rosbags documents none of what broken bytes raise
            raise UserError(f"A message of the topic {channel.topic} is damaged: it is no {channel.type}.") from error

    def _types(self, channel: Channel) -> Typestore:
        if channel.type in PICTURES:  # by one of many small fields, a picture's bytes would be millions of things
            return self._known
        store = channel_types(channel)
        try:
            store.get_msgdef(channel.type)
        except Exception as error:  # a type in it is missing, or holds itself
            raise UserError(f"The type {channel.type} of the topic {channel.topic} cannot be read.") from error
        for name in store.fielddefs.keys() & self._known.fielddefs.keys():
            fields, known = dict(store.fielddefs[name][1]), dict(self._known.fielddefs[name][1])
            lacking = known.keys() - fields.keys()
            own = name == channel.type or name.startswith("carla_digr_msgs/")
            if (lacking and not own) or any(fields[field] != known[field] for field in fields.keys() & known.keys()):
                raise UserError(f"The type {name} of the topic {channel.topic} is another one than is known here.")
            if lacking and name == channel.type:
                self._older.add(name)
        return store


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


def restamped(data: bytes, stamp: int) -> bytes:
    """A CDR message that begins with a header, with another stamp (ns)."""
    time = struct.pack("<iI" if data[1] & 1 else ">iI", *divmod(stamp, 10**9))
    return data[:FIRST] + time + data[FIRST + 8 :]


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


class Thing(NamedTuple):
    """What decides on a frame, with the fields of carla_digr_msgs/ExplainedObject."""

    id: int
    kind: str
    lane: int
    distance: float
    share: float
    effect: float
    action: int
    flips: bool
    left: int
    top: int
    right: int
    bottom: int


@dataclass
class Frame:
    """One frame of a drive.

    ``stamp`` is the header's, ns; ``time`` the same on the drive's `Timeline`. ``camera``, ``observation`` (what the
    policy saw, during an attack) and ``saliency`` are the times of these messages in the bag, ns; ``policy`` is the
    policy's decision and ``fallback`` the bridge's in its place. ``trust`` is what was known then of an earlier
    frame's map. None: there is no such message. ``sentence`` says what decides, empty if nobody did; ``objects`` are
    those with the largest effects, and ``said`` is the time of the message about them.
    """

    stamp: int
    time: int
    camera: int
    observation: int | None = None
    saliency: int | None = None
    said: int | None = None
    facts: Any = None
    odometry: Any = None
    policy: Any = None
    fallback: Any = None
    sentence: str = ""
    objects: tuple[Thing, ...] = ()
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
    """What a bag has of a drive: ``frames`` in order of time, the recording's ``facts``, and ``ignored``, sentences.

    ``camera`` is the topic with the ``pictures``, how many they are in all. ``timed``: their stamps were no use, so the
    recording's times are theirs.
    """

    frames: list[Frame]
    facts: dict[str, str]
    ignored: list[str]
    camera: str = IMAGE
    pictures: int = 0
    timed: bool = False


def read_drive(
    bag: Bag,
    camera: str = IMAGE,
    seen: Callable[[Channel, int, bytes], None] | None = None,
    odometry: str = ODOMETRY,
) -> Drive:
    """Find the frames of a bag: every picture with what has its stamp.

    Where most pictures' stamps are zero or repeat, they have the bag's own times instead. Odometry of another topic
    than the drive's belongs to the next pictures.

    Args:
        bag: the open bag.
        camera: the topic with the pictures, raw or compressed.
        odometry: the topic with the ego's motion.
        seen: called for every message of the drive's topics, in order of time. Without it the pictures stay packed
            where the bag's index is enough.

    Raises:
        UserError: there are no pictures, or the bag is damaged.
    """
    filled = {(channel.topic, channel.type) for channel in bag.channels if bag.counts[channel]}
    if camera == IMAGE and (IMAGE, PICTURE_TYPE) not in filled and (COMPRESSED_IMAGE, COMPRESSED_TYPE) in filled:
        camera = COMPRESSED_IMAGE
    types = {topic: kind for topic, kind in TYPES.items() if topic not in (IMAGE, ODOMETRY)}
    types |= {odometry: TYPES[ODOMETRY]}
    types |= {camera: COMPRESSED_TYPE if (camera, COMPRESSED_TYPE) in filled else PICTURE_TYPE}
    ignored = [
        f"{channel.topic} is {channel.type}, not {types[channel.topic]}"
        for channel in bag.channels
        if channel.topic in types and channel.type != types[channel.topic]
    ]
    wanted = {c for c in bag.channels if c.type == types.get(c.topic)}
    names = {OBSERVATION: "observation", SALIENCY: "saliency", camera: "camera"}
    found = None if seen or odometry != ODOMETRY else _read_by_index(bag, wanted, names)
    read = found or _read_all(bag, wanted, names, seen, odometry)
    if read.damaged:
        ignored.append(f"{read.damaged} messages are damaged")
    if read.timed:
        ignored.append(f"the stamps on {camera} are zero or repeat: the recording's own times are taken")
    frames = [Frame(time=time, **frame) for time, frame in sorted(read.parts.items()) if "camera" in frame]
    pictures = sum(bag.counts[channel] for channel in wanted if channel.topic == camera)
    if 0 < len(frames) < pictures:
        ignored.append(f"{pictures - len(frames)} pictures on {camera} are damaged or repeat a stamp")
    if not frames:
        others = sorted({topic for topic, kind in filled if kind in (PICTURE_TYPE, COMPRESSED_TYPE)})
        remedy = f"name one of its picture topics: {', '.join(others)}" if others else "it has no pictures at all"
        raise UserError(f"The recording {bag.path} has no pictures on {camera}; {remedy}.")
    return Drive(frames, read.facts, ignored, camera, pictures, read.timed)


class _Read(NamedTuple):
    """``parts``: time of a frame on the drive's `Timeline` -> fields of its `Frame`; the recording's ``facts``;
    ``placed``: every message has its time on the timeline as its time in the bag too; ``damaged`` messages; ``timed``:
    the bag's times stand for the pictures' stamps, most of which are zero or repeat."""

    parts: dict[int, dict[str, Any]]
    facts: dict[str, str]
    placed: bool
    damaged: int = 0
    timed: bool = False


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
    odometry: str = ODOMETRY,
) -> _Read:
    """What the messages of some channels say about the frames."""
    parts: dict[int, dict[str, Any]] = {}
    facts: dict[str, str] = {}
    pictures: list[tuple[int, int, int]] = []  # stamp, place and time of each
    motions: list[tuple[int, int, Any]] = []  # place, time and message of another recorder's odometry
    placed, damaged, kept = True, 0, 0
    most = Limits.of(bag.size).at_once // 2
    decode, timeline = Decoder(), Timeline()
    total = sum(bag.counts[channel] for channel in wanted)
    with tqdm(total=total, unit="message", unit_scale=True, desc="reading", mininterval=1, delay=1) as progress:
        for channel, time, data in bag.read(wanted=lambda channel: channel in wanted):
            progress.update()
            if seen is not None:
                seen(channel, time, data)
            kept += 0 if channel.topic in names else len(data)
            if kept > most:
                raise too_much(bag.path, f"says more than {most >> 20} MiB about its frames")
            try:
                message: Any = None if channel.topic in names else decode(channel, data)
                if channel.topic == FACTS_TOPIC:
                    facts = _facts(message.data)
                    continue
                stamp = stamp_of(data)
            except UserError:
                damaged += 1
                continue
            place = timeline.place(channel.topic, stamp)
            placed = placed and place == time
            if names.get(channel.topic) == "camera":
                pictures.append((stamp, place, time))
                continue
            if channel.topic == odometry != ODOMETRY:
                motions.append((place, time, message))
                continue
            frame = parts.setdefault(place, {"stamp": stamp})
            if channel.topic in names:
                frame[names[channel.topic]] = time
            elif channel.topic == DECISION:
                frame["fallback" if message.fallback else "policy"] = message
            elif channel.topic == OBJECTS:
                frame["said"], frame["sentence"] = time, message.sentence
                frame["objects"] = tuple(
                    Thing(*(getattr(thing, name) for name in Thing._fields)) for thing in message.objects[:LEADING]
                )
            elif channel.topic == TRUST:
                frame["trust"] = message
            else:
                frame["facts" if channel.topic == FRAME else "odometry"] = message
    distinct = {place for stamp, place, _ in pictures if stamp}
    timed = len(pictures) > 1 and 2 * len(distinct) < len(pictures)
    for stamp, place, time in pictures:
        parts.setdefault(time if timed else place, {"stamp": time if timed else stamp})["camera"] = time
    _add_motions(parts, motions, timed)
    return _Read(parts, facts, placed, damaged, timed)


def _add_motions(parts: dict[int, dict[str, Any]], motions: list[tuple[int, int, Any]], timed: bool) -> None:
    """Give every frame the last odometry before it, if that is not too old; by the bag's times if the frames are."""
    there = sorted(((time if timed else place, message) for place, time, message in motions), key=itemgetter(0))
    index = -1
    for place in sorted(parts):
        while index + 1 < len(there) and there[index + 1][0] <= place:
            index += 1
        if index >= 0 and place - there[index][0] <= MOTION_AGE:
            parts[place].setdefault("odometry", there[index][1])


def _facts(text: str) -> dict[str, str]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {str(k): str(v) for k, v in facts.items()} if isinstance(facts, Mapping) else {}
