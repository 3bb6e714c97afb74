"""What is whole of an unfinished or damaged recording, as a new bag."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mcap.data_stream import ReadDataStream
from mcap.records import Channel as ChannelRecord
from mcap.records import Schema
from rosbags.interfaces import Qos
from rosbags.rosbag2 import ReaderError
from rosbags.rosbag2.metadata import parse_qos
from rosbags.typesys.store import Typestore
from tqdm import tqdm

from carla_digr.errors import UserError
from carla_digr.recordings.bag import Channel, channel_types, new_bag, open_bag, storage_file
from carla_digr.recordings.bounds import CHANNELS, MESSAGE_BYTES, Limits, check_yaml, too_much
from carla_digr.recordings.definitions import ALL_STATEMENTS, STATEMENTS, statements
from carla_digr.recordings.readers import (
    CHANNEL,
    CHUNK,
    FIELDS,
    FOOTER,
    MAGIC,
    MESSAGE,
    SCHEMA,
    chunk_content,
    is_regular,
    records,
)
from carla_digr.recordings.topics import COMPRESSED_TYPE, PICTURE_TYPE


class Repaired(NamedTuple):
    """What `repair` has saved.

    ``damaged_chunks`` are places in an sqlite3 file; ``damaged_messages`` are not of their type and left out; ``cut``:
    the file ended in the middle of a record.
    """

    messages: int
    topics: int
    seconds: float
    damaged_chunks: int
    damaged_messages: int
    cut: bool


def repair(path: Path, out: Path) -> Repaired:
    """Make a whole bag of all that can be read of an unfinished or damaged MCAP or sqlite3 bag, which stays as it is.

    Messages that cannot be read, for they are not of their type, are left out.

    Raises:
        UserError: there is nothing to save, it is of another kind, or ``out`` exists.
    """
    if not path.exists():
        raise UserError(f"There is no recording {path}.")
    file = storage_file(path) if path.is_dir() else path
    if file.suffix == ".db3":
        return _repair_sqlite(file, out)
    if not is_regular(file):
        raise UserError(f"{file} is no recording: it is no regular file.")
    salvage = Salvage(file)
    used: dict[int, Channel] = {}
    readable = _Readable()
    for number, _, data in salvage.messages("surveying"):
        if number in salvage.channels and number not in used and readable(salvage.channels[number], data):
            used[number] = salvage.channels[number]
    # Channels that stand behind their messages (the first chunk was damaged, the summary is whole) count too.
    used |= {number: salvage.channels[number] for number in salvage.unknown & set(salvage.channels)}
    nothing = UserError(f"Nothing can be saved from {file}: there is no complete message in it.")
    if not used:
        raise nothing
    damaged, unreadable, cut = salvage.damaged_chunks, 0, salvage.cut
    first = last = None
    channels = {(channel.topic, channel.type): channel for channel in used.values()}
    with new_bag(out, list(channels.values())) as bag:
        for number, time, data in salvage.messages("saving"):
            if number not in salvage.channels:
                continue
            if number not in used or not readable(used[number], data):
                unreadable += 1
                continue
            bag.write(used[number].topic, used[number].type, time, data)
            first, last = min(time, first or time), max(time, last or time)
            bag.flush()
        count = bag.messages
        if first is None or last is None:
            raise nothing
    return Repaired(count, len(channels), (last - first) * 1e-9, damaged, unreadable, cut)


def _repair_sqlite(file: Path, out: Path) -> Repaired:
    readable, unreadable = _Readable(), 0
    with open_bag(file) as bag:
        channels = {(channel.topic, channel.type): channel for channel in bag.channels}
        with new_bag(out, list(channels.values())) as new:
            for channel, time, data in tqdm(bag.read(), "saving", bag.messages, unit="message", mininterval=1, delay=1):
                if readable(channel, data):
                    new.write(channel.topic, channel.type, time, data)
                    new.flush()
                else:
                    unreadable += 1
            count = new.messages
        return Repaired(count, len(channels), (bag.end - bag.start) * 1e-9, bag.damaged, unreadable, False)


class _Readable:
    """Whether a message is of its type, as far as the type is known and the message is small or a picture."""

    def __init__(self) -> None:
        self._stores: dict[Channel, Typestore | None] = {}

    def __call__(self, channel: Channel, data: bytes) -> bool:
        if channel not in self._stores:
            self._stores[channel] = None
            with contextlib.suppress(Exception):  # the library reads this type not at all: others may
                store = channel_types(channel)
                store.get_msgdef(channel.type)
                self._stores[channel] = store
        known = self._stores[channel]
        if known is None or (len(data) > MESSAGE_BYTES and channel.type not in (PICTURE_TYPE, COMPRESSED_TYPE)):
            return True
        try:
            known.deserialize_cdr(data, channel.type)
        except Exception:  # rosbags documents none of what broken bytes raise
            return False
        return True


@dataclass
class Salvage:
    """Reads every whole record of an MCAP file, in the file's order, and counts the damage."""

    file: Path
    schemas: dict[int, Schema] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)  # channels of messages that came before them
    damaged_chunks: int = 0
    cut: bool = False
    _definitions: set[str] = field(default_factory=set)

    def messages(self, doing: str = "") -> Iterator[tuple[int, int, bytes]]:
        """Channel number, time in ns and CDR bytes of every whole message; ``doing`` names a bar of progress.

        Raises:
            UserError: the file is far more unpacked than files of its size are.
        """
        self.damaged_chunks, self.cut = 0, False
        size = self.file.stat().st_size
        limits, total, count = Limits.of(size), 0, 0
        with (
            self.file.open("rb") as stream,
            tqdm(
                total=size, unit="B", unit_scale=True, desc=doing, mininterval=1, delay=1, disable=not doing
            ) as progress,
        ):
            for opcode, data in self._top_level(stream, size):
                progress.update(stream.tell() - progress.n)
                parts, content = [(opcode, data)], b""
                if opcode == CHUNK:
                    parts = []
                    try:
                        content = chunk_content(data, limits.at_once)
                        for kind, length in records(inner := BytesIO(content), len(content)):
                            parts.append((kind, inner.read(length)))
                    except Exception:  # zstd's, lz4's and struct's errors; what stands before a broken record is whole
                        self.damaged_chunks += 1
                total, count = total + len(content), count + len(parts)
                if total > limits.total or count > limits.records:
                    raise too_much(self.file, f"unpacks to {total >> 20} MiB of {count} records")
                for part in parts:
                    yield from self._taken(*part, limits)

    def _top_level(self, stream: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
        """Opcode and content of each record up to the footer, or to where the file is cut."""
        self.cut = True
        if stream.read(len(MAGIC)) != MAGIC:
            return
        with contextlib.suppress(ReaderError):
            for opcode, length in records(stream, size):
                if opcode == FOOTER:
                    self.cut = False
                    return
                yield opcode, stream.read(length)

    def _taken(self, opcode: int, data: bytes, limits: Limits) -> Iterator[tuple[int, int, bytes]]:
        """A record, if it is a message; a schema or a channel is kept."""
        if opcode == MESSAGE and len(data) >= FIELDS.size:
            number, _, time, _ = FIELDS.unpack_from(data)
            if number not in self.channels:
                self.unknown.add(number)
            yield number, time, data[FIELDS.size :]
        elif opcode in (SCHEMA, CHANNEL):
            with contextlib.suppress(Exception):  # damaged: mcap documents none of what that raises
                kind = Schema if opcode == SCHEMA else ChannelRecord
                record = kind.read(ReadDataStream(BytesIO(data)))
                if isinstance(record, Schema):
                    self.schemas[record.id] = record
                elif record.schema_id in self.schemas:
                    self._add(record, limits)

    def _add(self, record: ChannelRecord, limits: Limits) -> None:
        if record.id in self.channels or len(self.channels) == CHANNELS:
            return  # the summary repeats what the first chunk says
        schema, qos = self.schemas[record.schema_id], tuple[Qos, ...]()
        with contextlib.suppress(Exception):  # damaged; what was offered is not needed to read
            text = record.metadata.get("offered_qos_profiles", "")
            check_yaml(self.file, text, limits)
            qos = tuple(parse_qos(text))
        text = schema.data.decode(errors="replace")
        self._definitions |= {text} if statements(text) <= STATEMENTS else set()
        if sum(map(statements, self._definitions)) > ALL_STATEMENTS:
            return
        channel = Channel(record.topic, schema.name, text, qos)
        with contextlib.suppress(UserError):
            channel_types(channel)
            self.channels[record.id] = channel
