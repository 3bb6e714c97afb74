"""A drive's messages into a bag, each with its time, once a second."""

from __future__ import annotations

import json
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
WAITING_BYTES = 1 << 26  # that wait for room on a full disk before messages are dropped


class Timeline:
    """Stamps of a drive as one time that never runs back: a simulator that is started again begins anew at 0.

    Topics arrive one before the other, so each is watched for itself: where its stamps fall back by more than
    JUMP_BACK, it goes over to the next clock, which goes on where the first topic to notice found the one before.
    """

    def __init__(self) -> None:
        self.now: int | None = None  # ns, the latest time
        self._offsets = [0]  # ns, of each clock
        self._topics: dict[str, tuple[int, int]] = {}  # clock and latest stamp

    def place(self, topic: str, stamp: int) -> int:
        """The time in ns of a topic's stamp in ns."""
        clock, latest = self._topics.get(topic, (len(self._offsets) - 1, stamp))
        if stamp < latest - JUMP_BACK:
            clock, latest = clock + 1, stamp
            if clock == len(self._offsets):
                assert self.now is not None
                self._offsets.append(self.now - stamp)
        self._topics[topic] = clock, max(stamp, latest)
        time = stamp + self._offsets[clock]
        self.now = time if self.now is None else max(self.now, time)
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
    """

    path: Path
    channels: list[Channel]
    facts: Mapping[str, str]
    problem: str = ""
    dropped: int = 0
    _early: deque[tuple[Channel, bytes]] = field(default_factory=lambda: deque(maxlen=100))
    _timeline: Timeline = field(default_factory=Timeline)

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

    def add(self, channel: Channel, data: bytes, time: int | None) -> None:
        """A message (CDR) with its time in ns; None: it has none."""
        now = self._timeline.now
        if now is None and time is None:
            self._early.append((channel, data))
            return
        if self._bag.waiting > WAITING_BYTES:
            self.dropped += 1
            return
        time = now if time is None else self._timeline.place(channel.topic, time)
        assert time is not None
        if now is None:
            text = self._store.types[self._facts_channel.type](json.dumps(dict(self.facts)))
            facts = bytes(self._store.serialize_cdr(text, self._facts_channel.type))
            for early, content in [(self._facts_channel, facts), *self._early]:
                self._bag.write(early.topic, early.type, time, content)
            self._early.clear()
        self._bag.write(channel.topic, channel.type, time, data)

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
            self._bag.close(self.facts)
            if not self.messages:  # the drive was ended before its first frame
                shutil.rmtree(self.path)
        except OSError as error:
            self.problem = (
                f"Cannot finish the recording {self.path}: {reason(error)}; make room and run "
                f"`carla-digr repair {self.path}`."
            )
