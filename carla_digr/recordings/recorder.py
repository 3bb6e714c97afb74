"""A drive's messages into a bag, each with its time, once a second."""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rosbags.typesys import Stores, get_typestore

from carla_digr.recordings.bag import BagWriter, Channel, offered_qos, reason
from carla_digr.recordings.definitions import definition
from carla_digr.recordings.topics import FACTS_TOPIC, TYPES

JUMP_BACK = 10**9  # ns; less is a late message
JUMP_AHEAD = 3600 * 10**9  # ns; less is a gap
CLOCKS = 16  # the last ones, to which stamps may belong
LAST_TIME = 1 << 62  # ns, that a bag can hold for certain
WAITING_BYTES = 1 << 26  # that wait for room on a full disk before messages are dropped


class Timeline:
    """Stamps of a drive as one time that neither runs back nor jumps ahead, whatever clock they are of.

    A simulator that is started again begins anew at 0, and a stranger's messages have a clock of their own. Topics, and
    what several publishers of one send, arrive one before the other, so each is watched for itself: where its stamps
    fall back by more than JUMP_BACK or run ahead by more than ``ahead``, it goes over to the latest clock they fit,
    or to a new one, which goes on where the one before is.

    Args:
        ahead: ns; None: a recording's stamps may have gaps of any length.

    Attributes:
        now: ns, the latest time; None: there was no stamp yet.
        jumps: how often a new clock was begun.
    """

    def __init__(self, ahead: int | None = None) -> None:
        self.now: int | None = None
        self.jumps = 0
        self._ahead = math.inf if ahead is None else ahead
        self._offsets = deque([0], CLOCKS)  # ns, of each clock
        self._sources: dict[tuple[str, str], tuple[int, int]] = {}  # offset and latest stamp
        self._topics: set[str] = set()

    def place(self, topic: str, stamp: int, source: str = "") -> int:
        """The time in ns of a topic's stamp in ns; ``source``: which of its publishers it is of, if that is known."""
        now = self.now
        if now is None:
            now = max(stamp, 0)
        known = self._sources.get((topic, source))
        if known is not None and -JUMP_BACK <= stamp - known[1] <= self._ahead:
            offset, latest = known
        else:
            late = JUMP_BACK if topic in self._topics else self._ahead  # a topic's first messages may have waited
            fitting = [offset for offset in self._offsets if -late <= stamp + offset - now <= self._ahead]
            if not fitting:
                fitting = [now - stamp]
                self._offsets += fitting
                self.jumps += 1
            offset, latest = fitting[-1], stamp
        self._sources[topic, source] = offset, max(stamp, latest)
        self._topics.add(topic)
        time = max(stamp + offset, 0)
        self.now = max(now, time)
        return time


@dataclass
class Recorder:
    """Writes a drive's messages with the time that they carry, and goes on when the disk is full.

    One thread may call. The first message of the bag is FACTS_TOPIC's, so that even a recording that was killed
    says which policy drove. Messages without a time of their own get the latest one.

    Args:
        path: the new bag's directory.
        channels: the drive's topics.
        facts: what is known at the start.
        notes: what is known at the end, besides.
    """

    path: Path
    channels: list[Channel]
    facts: Mapping[str, str]
    problem: str = ""
    dropped: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    _early: deque[tuple[Channel, bytes]] = field(default_factory=lambda: deque(maxlen=100))
    _timeline: Timeline = field(default_factory=lambda: Timeline(JUMP_AHEAD))

    def __post_init__(self) -> None:
        store = get_typestore(Stores.ROS2_KILTED)
        self._store = store
        kind = TYPES[FACTS_TOPIC]
        self._facts_channel = Channel(FACTS_TOPIC, kind, definition(store, kind), offered_qos(latched=True))
        self._bag = BagWriter(self.path, [self._facts_channel, *self.channels])

    @property
    def messages(self) -> int:
        """Messages in the bag."""
        return self._bag.messages

    def add(self, channel: Channel, data: bytes, time: int | None, source: str = "") -> None:
        """A message (CDR) with its time in ns, None: it has none; ``source``: as of `Timeline.place`."""
        now = self._timeline.now
        if now is None and time is None:
            self._early.append((channel, data))
            return
        if self._bag.waiting > WAITING_BYTES:
            self.dropped += 1
            return
        time = now if time is None else self._timeline.place(channel.topic, time, source)
        assert time is not None
        time = min(time, LAST_TIME)
        if now is None:
            text = self._store.types[self._facts_channel.type](json.dumps(dict(self.facts)))
            facts = bytes(self._store.serialize_cdr(text, self._facts_channel.type))
            for early, content in [(self._facts_channel, facts), *self._early]:
                self._bag.write(early.topic, early.type, time, content)
            self._early.clear()
        self._bag.write(channel.topic, channel.type, time, data)

    @property
    def jumps(self) -> int:
        """How often stamps came that fit no clock of the recording, which went on where it was."""
        return self._timeline.jumps

    def commit(self) -> None:
        """Once a second: what has been added is on disk, or ``problem`` says why not."""
        try:
            self._bag.commit()
        except OSError as error:
            self.problem = f"Cannot write the recording {self.path}: {reason(error)}."
        else:
            self.problem = ""

    def close(self) -> None:
        """Finish the bag, or remove it if there is nothing in it; if that fails, ``problem`` says so."""
        try:
            if self.jumps:
                self.notes["jumps_of_the_clock"] = str(self.jumps)
            self._bag.close({**self.facts, **self.notes})
            if not self.messages:  # the drive was ended before its first frame
                shutil.rmtree(self.path)
        except OSError as error:
            self.problem = (
                f"Cannot finish the recording {self.path}: {reason(error)}; make room and run "
                f"`carla-digr repair {self.path}`."
            )
