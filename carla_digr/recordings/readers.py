"""rosbags' readers within `bounds.Limits`; those of files made of chunks leave out damaged ones and count them."""

from __future__ import annotations

import heapq
import stat
from collections.abc import Collection, Generator, Iterator
from contextlib import suppress
from functools import partial
from io import SEEK_CUR, BytesIO
from operator import itemgetter
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO
from zlib import crc32

from backports import zstd
from rosbags import rosbag1
from rosbags.interfaces import Connection
from rosbags.rosbag1.reader import Header, IndexData, RecordType, decompressors, read_bytes, read_uint32
from rosbags.rosbag2 import Reader as AnyReader
from rosbags.rosbag2 import ReaderError
from rosbags.rosbag2 import reader as rosbag2
from rosbags.rosbag2.storage_mcap import DECOMPRESSORS, ChunkInfo
from rosbags.rosbag2.storage_mcap import McapReader as Mcap

from carla_digr.errors import UserError
from carla_digr.files import read_regular
from carla_digr.recordings.bounds import CHANNELS, Limits, check_chunks, check_yaml, too_much, unpack
from carla_digr.recordings.sqlite import Sqlite3Reader

MAGIC = b"\x89MCAP0\r\n"
FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK = 2, 3, 4, 5, 6  # opcodes of MCAP, https://mcap.dev/spec#records
RECORD, FIELDS = Struct("<BQ"), Struct("<HIQQ")  # opcode, length; a message's channel, sequence and times
Message = tuple[Connection, int, bytes]

# rosbags checks the size of a chunk once it is unpacked; this unpacks one byte more than that at most.
DECOMPRESSORS |= {name: partial(unpack, name) for name in ("zstd", "lz4")}


def is_regular(path: Path) -> bool:
    """Whether it is a file that can be read from its beginning to its end, not a pipe, say."""
    return stat.S_ISREG(path.stat().st_mode)


def records(stream: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """Opcode and length of the records of MCAP from where a stream is to ``end``; it stands at each one's content.

    Raises:
        ReaderError: one goes beyond the end.
    """
    place = stream.tell()
    while place < end:
        head = stream.read(RECORD.size)
        opcode, length = RECORD.unpack(head) if len(head) == RECORD.size else (0, end)
        place += RECORD.size + length
        if place > end:
            raise ReaderError("it ends inside a record")
        yield opcode, length
        stream.seek(place)


def chunk_content(data: bytes, most: int) -> bytes:
    """What is packed in the content of a chunk record.

    Raises:
        ValueError: it is damaged, or of more than ``most`` bytes.
        Exception: decompressors' own.
    """
    size, crc, length = Struct("<16xQII").unpack_from(data)
    place = 32 + length
    packed = data[place + 8 : place + 8 + int.from_bytes(data[place : place + 8], "little")]
    content = unpack(data[32:place].decode(), packed, min(size, most))
    if len(content) != size or (crc and crc32(content) != crc):
        raise ValueError("it is damaged")
    return content


class McapReader(Mcap):
    """An MCAP file.

    Attributes:
        damaged: where the chunks begin that could not be read.
    """

    path: Path

    def __init__(self, path: Path, limits: Limits | None = None):
        super().__init__(path)
        self.damaged: set[int] = set()
        self._given, self._scanned = limits, False

    def open(self) -> None:
        """Open it.

        Raises:
            UserError: it is beyond its limits.
        """
        self._limits = self._given or Limits.of(self.path.stat().st_size)
        super().open()
        times = ((chunk.message_start_time, chunk.message_end_time, chunk.uncompressed_size) for chunk in self.chunks)
        check_chunks(self.path, times, self._limits)

    def read_index(self) -> None:
        """Read the summary, once it is known to be within the limits."""
        assert self.bio
        self.bio.seek(self.data_end)
        self._survey(self.bio, self.path.stat().st_size - 8, [0, 0, 0, 0])
        super().read_index()

    def meta_scan(self) -> None:
        """Read all of a file without an index, once it is known to be within the limits."""
        self._check_all()
        super().meta_scan()

    def _check_all(self) -> None:
        assert self.bio
        if not self._scanned:
            self.bio.seek(self.data_start)
            self._survey(self.bio, self.data_end, [0, 0, 0, 0])
            self._scanned = True

    def _survey(self, stream: BinaryIO, end: int, counts: list[int]) -> None:
        """Count records, channels, bytes of YAML and of unpacked chunks, of which none is kept.

        Raises:
            UserError: there are too many.
        """
        for opcode, length in records(stream, end):
            counts[0] += 1
            if counts[0] > self._limits.records:
                raise too_much(self.path, f"has more than {self._limits.records} records")
            if opcode == CHANNEL:
                counts[1] += 1
                counts[2] += length
                if counts[1] > CHANNELS:
                    raise too_much(self.path, f"has more than {CHANNELS} topics")
                if counts[2] > self._limits.yaml:
                    raise too_much(self.path, f"has {counts[2] >> 10} kiB of topics")
                check_yaml(self.path, stream.read(length), self._limits)
            elif opcode == CHUNK and stream is self.bio:
                content = chunk_content(stream.read(length), self._limits.at_once)
                counts[3] += len(content)
                if counts[3] > self._limits.total:
                    raise too_much(self.path, f"unpacks to more than {self._limits.total >> 20} MiB")
                self._survey(BytesIO(content), len(content), counts)

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Generator[Message, None, None]:
        """The messages in order of time, without those of damaged chunks.

        Raises:
            UserError: there are too many.
        """
        if not self.chunks:
            self._check_all()
            yield from super().messages(connections, start, stop)
            return
        by_id = {connection.id: connection for connection in connections}
        first, last = 0 if start is None else start, 2**64 if stop is None else stop
        seen = [0]
        chunks = [
            self._messages_of(chunk, by_id, first, last, seen)
            for chunk in self.chunks
            if first <= chunk.message_end_time
            and chunk.message_start_time < last
            and any(chunk.channel_count.get(number) for number in by_id)
        ]
        for time, _, connection, data in heapq.merge(*chunks, key=itemgetter(0, 1)):
            if connection is not None:
                yield connection, time, data

    def _messages_of(
        self, chunk: ChunkInfo, by_id: dict[int, Connection], start: int, stop: int, seen: list[int]
    ) -> Iterator[tuple[int, int, Connection | None, bytes]]:
        """The messages of a chunk, each with its time and the chunk's place, after one that says when it begins.

        Args:
            seen: how many records there have been.
        """
        place = chunk.chunk_start_offset
        yield chunk.message_start_time, 0, None, b""
        found: list[tuple[int, int, Connection, bytes]] = []
        start, stop = max(start, chunk.message_start_time), min(stop, chunk.message_end_time + 1)
        assert self.bio
        try:
            self.bio.seek(place + RECORD.size)
            data = chunk_content(self.bio.read(chunk.chunk_length - RECORD.size), chunk.uncompressed_size)
            after = 0
            while after < len(data):
                opcode, length = RECORD.unpack_from(data, after)
                begin = after + RECORD.size
                after = begin + length
                if after > len(data):
                    raise ReaderError("a message is longer than its chunk")
                seen[0] += 1
                if opcode == MESSAGE:
                    number, _, time, _ = FIELDS.unpack_from(data, begin)
                    if number in by_id and start <= time < stop:
                        found.append((time, place, by_id[number], data[begin + FIELDS.size : after]))
        except Exception:  # zstd's, lz4's, struct's; what stands before a broken record is whole
            self.damaged.add(place)
        if seen[0] > self._limits.records:
            raise too_much(self.path, f"has more than {self._limits.records} records")
        data = b""
        found.sort(key=itemgetter(0))
        yield from found


STORAGES: dict[str, Any] = {"mcap": McapReader, "sqlite3": Sqlite3Reader}


class DirectoryReader(rosbag2.DirectoryReader):
    """A bag's directory with metadata.yaml."""

    path: Path

    def open(self) -> None:
        """Open it.

        Raises:
            UserError: it is beyond its limits.
            OSError: metadata.yaml cannot be read.
        """
        files = [file for file in self.path.iterdir() if not file.is_dir()]
        for file in files:
            if not is_regular(file):
                raise ReaderError(f"{file.name} is no regular file")
        self._limits = Limits.of(sum(file.stat().st_size for file in files))
        check_yaml(self.path, read_regular(self.path / "metadata.yaml", 1 << 30), self._limits)
        for file in files:
            self._check_packed(file)
        limited: Any = {name: partial(kind, limits=self._limits) for name, kind in STORAGES.items()}
        self.STORAGE_PLUGINS = limited
        super().open()
        self._packed = self.metadata.compression_mode == "message"
        self.metadata = self.metadata._replace(compression_mode=None)

    def _check_packed(self, file: Path) -> None:
        """Refuse a file that rosbags would unpack to too large a one."""
        total = 0
        with file.open("rb") as start:
            if start.read(6) in (b"\x89MCAP0", b"SQLite") or file.name == "metadata.yaml":
                return
        with suppress(zstd.ZstdError, EOFError), zstd.open(file) as content:
            while block := content.read(1 << 20):
                total += len(block)
                if total > self._limits.total:
                    raise too_much(self.path, f"unpacks to more than {self._limits.total >> 20} MiB")

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Generator[Message, None, None]:
        """The messages, file by file.

        Raises:
            UserError: they are too large unpacked.
        """
        total = 0
        for connection, time, data in super().messages(connections, start, stop):
            if self._packed:
                data = unpack("zstd", data, self._limits.at_once)
                total += len(data)
                if len(data) > self._limits.at_once or total > self._limits.total:
                    raise too_much(self.path, f"unpacks to more than {self._limits.total >> 20} MiB")
            yield connection, time, data


class Reader(AnyReader):
    """A bag of ROS 2: a directory with metadata.yaml, or an MCAP or sqlite3 file."""

    path: Path
    STORAGE_PLUGINS: Any = {  # noqa: RUF012  (the library's is one too)
        "dir": DirectoryReader,
        ".mcap": McapReader,
        ".db3": Sqlite3Reader,
    }

    def open(self) -> None:
        """Open it.

        Raises:
            UserError: it is beyond its limits.
            ReaderError: it is no recording.
            Exception: rosbags' own.
        """
        if not self.path.is_dir() and not is_regular(self.path):
            raise ReaderError("it is no regular file")
        super().open()

    @property
    def files(self) -> list[McapReader | Sqlite3Reader]:
        """The readers of its files."""
        return list(getattr(self.storage, "storages", [self.storage]))


class Ros1Reader(rosbag1.Reader):
    """A bag of ROS 1.

    Attributes:
        damaged: where the chunks begin that could not be read.
    """

    path: Path

    def __init__(self, path: Path):
        super().__init__(path)
        self.damaged: set[int] = set()

    def open(self) -> None:
        """Open it.

        Raises:
            UserError: it is beyond its limits.
            ReaderError: it is no recording.
            Exception: rosbags' own.
        """
        if not is_regular(self.path):
            raise ReaderError("it is no regular file")
        self._size = self.path.stat().st_size
        self._limits = Limits.of(self._size)
        self._unpacked = self._indexed = 0
        super().open()
        if len(self.connections) > CHANNELS:
            raise too_much(self.path, f"has more than {CHANNELS} topics")

    @property
    def message_count(self) -> int:
        """How many messages the index has."""
        return sum(connection.msgcount for connection in self.connections)

    def read_index_data(self, pos: int, indexes: dict[int, list[Any]]) -> None:
        """Read a part of the index, each only once."""
        assert self.bio
        before = self.bio.tell()
        super().read_index_data(pos, indexes)
        self._indexed += self.bio.tell() - before
        if self._indexed > self._size:
            raise ReaderError("its index is longer than the file")

    def read_chunk(self) -> Any:
        """Read a chunk's header."""
        chunk = super().read_chunk()
        name = next(name for name, function in decompressors.items() if function is chunk.decompressor)
        return chunk._replace(decompressor=partial(self._unpack, "" if name == "none" else name))

    def _unpack(self, compression: str, data: bytes) -> bytes:
        content = unpack(compression, data, self._limits.at_once)
        self._unpacked += len(content)
        if len(content) > self._limits.at_once or self._unpacked > self._limits.total:
            raise too_much(self.path, f"unpacks to more than {self._limits.total >> 20} MiB")
        return content

    def messages(
        self, connections: Collection[Connection] = (), start: int | None = None, stop: int | None = None
    ) -> Generator[Message, None, None]:
        """The messages in order of time, without those of damaged chunks.

        Raises:
            UserError: they are too large unpacked.
        """
        self._unpacked = 0
        by_id = {connection.id: connection for connection in connections or self.connections}
        for entry in heapq.merge(*(self.indexes[number] for number in by_id)):
            if stop is not None and entry.time >= stop:
                return
            if entry.chunk_pos in self.damaged or (start is not None and entry.time < start):
                continue
            try:
                number, data = self._message_at(entry)
                connection = by_id[number]
            except UserError:
                raise
            except Exception:  # bz2's, lz4's, struct's, rosbags'
                self.damaged.add(entry.chunk_pos)
                continue
            yield connection, entry.time, data

    def _message_at(self, entry: IndexData) -> tuple[int, bytes]:
        """Connection and content of a message, http://wiki.ros.org/Bags/Format/2.0."""
        if self.current_chunk[0] != entry.chunk_pos:
            chunk = self.chunks[entry.chunk_pos]
            assert self.bio
            self.bio.seek(chunk.datapos)
            content = chunk.decompressor(read_bytes(self.bio, chunk.datasize))
            self.current_chunk = entry.chunk_pos, BytesIO(content)
        stream = self.current_chunk[1]
        stream.seek(entry.offset)
        header = Header.read(stream)
        while header.get_uint8("op") == RecordType.CONNECTION:
            stream.seek(read_uint32(stream), SEEK_CUR)
            header = Header.read(stream)
        if header.get_uint8("op") != RecordType.MSGDATA or header.get_time("time") != entry.time:
            raise ReaderError("a message is not where the index says")
        return header.get_uint32("conn"), read_bytes(stream, read_uint32(stream))
