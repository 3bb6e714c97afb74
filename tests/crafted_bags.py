"""MCAP files written byte by byte, so that they can be anything: what an adversary, or a broken recorder, leaves."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import drive_bags
from backports import zstd

from carla_digr.recordings import topics
from carla_digr.recordings.readers import CHANNEL, CHUNK, FOOTER, MAGIC, MESSAGE, SCHEMA

HEADER, INDEX, STATISTICS = 1, 8, 11  # opcodes
U16, U32, U64 = (struct.Struct(f"<{kind}").pack for kind in "HIQ")


def record(opcode: int, content: bytes) -> bytes:
    return bytes([opcode]) + U64(len(content)) + content


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return U32(len(value)) + value


def message(channel: int, time: int, data: bytes) -> bytes:
    return record(MESSAGE, U16(channel) + U32(0) + U64(time) * 2 + data)


def chunk(content: bytes, start: int = 0, end: int = 0, size: int | None = None, packed: bytes | None = None) -> bytes:
    """A chunk record, by wish with another size, or other packed bytes, than its content has."""
    packed = zstd.compress(content) if packed is None else packed
    size = len(content) if size is None else size
    return record(CHUNK, U64(start) + U64(end) + U64(size) + U32(0) + text("zstd") + U64(len(packed)) + packed)


def zeros(size: int) -> bytes:
    """So many zeros, packed."""
    return zstd.compress(bytes(1 << 20)) * (size >> 20)


@dataclass
class File:
    """An MCAP file with a camera's topic, /cam, or with the drive's."""

    qos: str = ""
    definitions: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=lambda: {topics.IMAGE: topics.PICTURE_TYPE})
    data: bytes = b""
    indexes: bytes = b""
    messages: int = 1
    _counts: dict[int, int] = field(default_factory=dict)

    def channels(self) -> bytes:
        found = b""
        for number, (topic, kind) in enumerate(self.types.items(), 1):
            known = kind in drive_bags.STORE.types
            definition = self.definitions.get(topic, "")
            if topic not in self.definitions and known:
                definition = drive_bags.STORE.generate_msgdef(kind, ros_version=2)[0]
            found += record(SCHEMA, U16(number) + text(kind) + text("ros2msg") + text(definition))
            metadata = text("offered_qos_profiles") + text(self.qos)
            found += record(CHANNEL, U16(number) * 2 + text(topic) + text("cdr") + text(metadata))
        return found

    def add(self, piece: bytes, start: int, end: int, size: int, times: int = 1) -> None:
        """A chunk, which the index names ``times`` times."""
        place = len(MAGIC) + len(self.head()) + len(self.data)
        self.data += piece
        offsets = b"".join(U16(number) + U64(place + len(piece)) for number in range(1, len(self.types) + 1))
        entry = U64(start) + U64(end) + U64(place) + U64(len(piece)) + text(offsets) + U64(100_000)
        (packed,) = struct.unpack_from("<Q", piece, 9 + 32 + 4)
        self.indexes += record(INDEX, entry + text("zstd") + U64(packed) + U64(size)) * times

    def add_messages(self, found: list[tuple[int, int, bytes]], **how) -> None:
        """A chunk of messages: channel, time and data of each."""
        content = b"".join(message(*one) for one in found)
        times = [time for _, time, _ in found]
        self.add(chunk(content, min(times), max(times), **how), min(times), max(times), len(content))
        for number, _, _ in found:
            self._counts[number] = self._counts.get(number, 0) + 1

    @staticmethod
    def head() -> bytes:
        return record(HEADER, text("ros2") + text("crafted"))

    def write(self, path: Path, summary: bool = True) -> Path:
        first = MAGIC + self.head() + self.data
        counts = self._counts or dict.fromkeys(range(1, len(self.types) + 1), self.messages)
        total = sum(counts.values())
        statistics = U64(total) + U16(1) + U32(1) + U32(0) + U32(0) + U32(1) + U64(0) + U64(2**62)
        statistics += text(b"".join(U16(number) + U64(count) for number, count in counts.items()))
        end = self.channels() + self.indexes + record(STATISTICS, statistics) if summary else b""
        if not summary:
            first = MAGIC + self.head() + self.channels() + self.data
        footer = record(FOOTER, U64(len(first) if summary else 0) + U64(0) + U32(0))
        path.write_bytes(first + end + footer + MAGIC)
        return path
