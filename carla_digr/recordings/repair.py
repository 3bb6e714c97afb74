"""What is whole of an unfinished or damaged recording, as a new bag."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mcap.records import Channel as ChannelRecord
from mcap.records import Chunk, Message, Schema
from mcap.stream_reader import StreamReader, breakup_chunk
from rosbags.interfaces import Qos
from rosbags.rosbag2.metadata import parse_qos
from tqdm import tqdm

from carla_digr.errors import UserError
from carla_digr.recordings.bag import Channel, channel_types, new_bag, storage_file


class Repaired(NamedTuple):
    """What `repair` has saved; ``cut``: the file ended in the middle of a record."""

    messages: int
    topics: int
    seconds: float
    damaged_chunks: int
    cut: bool


def repair(path: Path, out: Path) -> Repaired:
    """Make a whole bag of all complete chunks and messages of an unfinished or damaged MCAP bag, which stays as it is.

    Raises:
        UserError: there is nothing to save, it is not MCAP, or ``out`` exists.
    """
    if not path.exists():
        raise UserError(f"There is no recording {path}.")
    file = storage_file(path) if path.is_dir() else path
    if file.suffix == ".db3":
        raise UserError(f"{file} is an sqlite3 recording; repair it with sqlite3's own `.recover`.")
    salvage = Salvage(file)
    used: dict[int, Channel] = {}
    for number, _, _ in salvage.messages("surveying"):
        if number in salvage.channels:
            used[number] = salvage.channels[number]
    # Channels that stand behind their messages (the first chunk was damaged, the summary is whole) count too.
    used |= {number: salvage.channels[number] for number in salvage.unknown & set(salvage.channels)}
    if not used:
        raise UserError(f"Nothing can be saved from {file}: there is no complete message in it.")
    damaged, cut = salvage.damaged_chunks, salvage.cut
    first = last = None
    channels = {(channel.topic, channel.type): channel for channel in used.values()}
    with new_bag(out, list(channels.values())) as bag:
        for number, time, data in salvage.messages("saving"):
            if number not in used:
                continue
            bag.write(used[number].topic, used[number].type, time, data)
            first, last = min(time, first or time), max(time, last or time)
            bag.flush()
        count = bag.messages
    assert first is not None and last is not None
    return Repaired(count, len(channels), (last - first) * 1e-9, damaged, cut)


@dataclass
class Salvage:
    """Reads every whole record of an MCAP file, in the file's order, and counts the damage."""

    file: Path
    schemas: dict[int, Schema] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)  # channels of messages that came before them
    damaged_chunks: int = 0
    cut: bool = False

    def messages(self, doing: str = "") -> Iterator[tuple[int, int, bytes]]:
        """Channel number, time in ns and CDR bytes of every whole message; ``doing`` names a bar of progress."""
        self.damaged_chunks, self.cut = 0, False
        size = self.file.stat().st_size
        with (
            self.file.open("rb") as stream,
            tqdm(
                total=size, unit="B", unit_scale=True, desc=doing, mininterval=1, delay=1, disable=not doing
            ) as progress,
        ):
            # A length beyond the file's end is damage, not a reason to ask for that much memory.
            records = StreamReader(stream, emit_chunks=True, record_size_limit=max(size, 1)).records
            while True:
                try:
                    record = next(records, None)
                except Exception:  # the end of the file inside a record, or bytes that are none
                    self.cut = True
                    return
                if record is None:
                    return
                progress.update(stream.tell() - progress.n)
                parts = [record]
                if isinstance(record, Chunk):
                    try:
                        parts = breakup_chunk(record, validate_crc=True)
                    except Exception:  # zstd's, struct's and the text decoder's errors
                        self.damaged_chunks += 1
                        continue
                for part in parts:
                    if isinstance(part, Schema):
                        self.schemas[part.id] = part
                    elif isinstance(part, ChannelRecord) and part.schema_id in self.schemas:
                        self._add(part)
                    elif isinstance(part, Message):
                        if part.channel_id not in self.channels:
                            self.unknown.add(part.channel_id)
                        yield part.channel_id, part.log_time, part.data

    def _add(self, record: ChannelRecord) -> None:
        if record.id in self.channels:
            return  # the summary repeats what the first chunk says
        schema, qos = self.schemas[record.schema_id], tuple[Qos, ...]()
        with contextlib.suppress(Exception):  # damaged; what was offered is not needed to read
            qos = tuple(parse_qos(record.metadata.get("offered_qos_profiles", "")))
        channel = Channel(record.topic, schema.name, schema.data.decode(errors="replace"), qos)
        with contextlib.suppress(UserError):
            channel_types(channel)
            self.channels[record.id] = channel
