"""Recordings: rosbag2 bags, written as MCAP with zstd chunks, read whatever their storage; ROS 1 bags are read too.

No ROS in here: messages are the bytes that a subscription gives raw. The format: https://mcap.dev/spec and rosbag2's
metadata.yaml, both by rosbags.
"""

from __future__ import annotations

import heapq
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from backports import zstd
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag1 import ReaderError as Ros1ReaderError
from rosbags.rosbag2 import CompressionFormat, CompressionMode, ReaderError, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import PendingChunk
from rosbags.typesys.store import Typestore

from carla_digr.errors import UserError
from carla_digr.files import exclusive
from carla_digr.recordings.bounds import too_much
from carla_digr.recordings.definitions import ALL_STATEMENTS, STATEMENTS, definition, ros1_types, statements, types_of
from carla_digr.recordings.readers import McapReader, Reader, Ros1Reader
from carla_digr.recordings.sqlite import Sqlite3Reader
from carla_digr.recordings.topics import COMPRESSED_TYPE, PICTURE_TYPE

CHUNK_BYTES = (1 << 20) - 64  # of messages in a chunk; less than at what rosbags ends one
SUFFIXES = (".mcap", ".db3", ".bag")
NAME = "recording"  # of the file in bags made from other bags: equal content, equal bytes


class Channel(NamedTuple):
    """A topic of a bag: its type, the type's definition (msg or IDL text) and what its publishers offered."""

    topic: str
    type: str
    definition: str
    qos: tuple[Qos, ...] = ()


def offered_qos(latched: bool = False) -> tuple[Qos, ...]:
    """A reliable publisher's quality of service."""
    zero = QosTime(0, 0)
    durability = QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE
    keep, liveliness = QosHistory.KEEP_LAST, QosLiveliness.AUTOMATIC
    return (Qos(keep, 10, QosReliability.RELIABLE, durability, zero, zero, liveliness, zero, False),)


def channel_types(channel: Channel) -> Typestore:
    """The types that a channel's definition names, or the known ones where it has none (rosbag2 before version 8).

    Raises:
        UserError: the definition cannot be read, or the type is unknown.
    """
    which = f"The type {shown(channel.type)} of the topic {shown(channel.topic)}"
    try:
        store = types_of(channel.type, channel.definition)
    except Exception as error:  # rosbags documents none of what a broken definition raises
        raise UserError(f"{which} has no readable definition.") from error
    if channel.type not in store.types:
        raise UserError(f"{which} is not known here.")
    return store


class _Tail:
    """The end of a growing file: what is written waits in memory until `commit` finds room for it on disk."""

    def __init__(self, path: Path):
        self._file = FileIO(path, "ab")
        self._committed = path.stat().st_size
        self.waiting = bytearray()

    def write(self, data: bytes) -> int:
        self.waiting += data
        return len(data)

    def tell(self) -> int:
        return self._committed + len(self.waiting)

    def commit(self) -> None:
        """Write what waits.

        Raises:
            OSError: there is no room; what fits is on disk then, and the rest waits for the next call.
        """
        while self.waiting:
            written = self._file.write(self.waiting)
            del self.waiting[:written]
            self._committed += written

    def close(self) -> None:
        try:
            self.commit()
        finally:
            self._file.close()


class BagWriter:
    """A new bag. What has been written is safe from a kill after the next `commit`.

    Pictures stand in chunks of their own: who looks for all the rest of a drive need not unpack them.

    Args:
        path: the bag's directory, which must not exist.
        channels: all topics; their schemas stand before the first message.

    Attributes:
        messages: how many have been written.
        earlier: the unfinished file of an interrupted command for the same bag, see `new_bag`.

    Raises:
        UserError: the path exists or cannot be made.
    """

    def __init__(self, path: Path, channels: list[Channel]):
        self.path = path
        self.earlier: Path | None = None
        try:
            self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
            self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
            self._writer.open()
        except Exception as error:
            raise UserError(f"Cannot make the recording {path}: {reason(error)}.") from error
        storage: Any = self._writer.storage
        self._storage = storage
        storage.compressor = partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: 1})
        storage.bio.close()  # with the file's header in it
        self._tail = storage.bio = _Tail(storage.path)
        self._connections = {}
        for channel in channels:
            self._connections[channel.topic, channel.type] = self._writer.add_connection(
                channel.topic, channel.type, typestore=channel_types(channel), offered_qos_profiles=channel.qos
            )
        storage.chunk.message_start_time = 0  # as in every chunk without messages
        storage.close_chunk()  # the schemas, before both kinds of chunks
        self._pictures = PendingChunk(2**63 - 1, 0, BytesIO(), defaultdict(list))  # as rosbags begins one
        self.messages = 0

    @property
    def waiting(self) -> int:
        """Bytes that wait in memory for room on the disk."""
        return len(self._tail.waiting)

    def write(self, topic: str, message_type: str, time: int, data: bytes) -> None:
        """Add a message (CDR) at ``time`` in ns; it waits in memory."""
        connection = self._connections[topic, message_type]
        if message_type in (PICTURE_TYPE, COMPRESSED_TYPE):
            if self._pictures.bio.tell() + len(data) > CHUNK_BYTES:
                self._end_chunks()
            self._swap()
            self._writer.write(connection, time, data)
            self._swap()
        else:
            self._writer.write(connection, time, data)
        self.messages += 1

    def _swap(self) -> None:
        """The other kind of chunk is written next."""
        self._storage.chunk, self._pictures = self._pictures, self._storage.chunk

    def _end_chunks(self) -> None:
        """Both, that of the pictures last: so readers find messages of the same time in the same order everywhere."""
        for _ in range(2):
            if self._storage.chunk.msgs:
                self._storage.close_chunk()
            self._swap()

    def commit(self) -> None:
        """End the chunks and hand them to the operating system.

        Raises:
            OSError: the disk is full or broken; what did not fit waits for the next call.
        """
        self._end_chunks()
        self.flush()

    def flush(self) -> None:
        """Hand the chunks that are full to the operating system; unlike `commit`, this changes no byte of the bag.

        Raises:
            OSError: as `commit`.
        """
        self._tail.commit()

    def close(self, facts: Mapping[str, str] | None = None) -> None:
        """Write index and metadata.yaml; ``facts`` go to its custom_data.

        Raises:
            OSError: no room; `repair` makes a bag of what is there.
        """
        self._end_chunks()
        for key, value in (facts or {}).items():
            self._writer.set_custom_data(key, value)
        self._writer.close()


def shown(name: str) -> str:
    """A name from a recording, for a sentence."""
    return name if name.isprintable() and len(name) < 80 else f"{name[:80]!r}"


def reason(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    text = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


# --- reading ---


class _Part(NamedTuple):
    """A topic of one of a bag's files; ``convert`` makes CDR of its messages' bytes, None: they are."""

    channel: Channel
    reader: Reader | Ros1Reader
    connection: Connection
    convert: Callable[[bytes], bytes] | None = None


def _part(reader: Reader | Ros1Reader, connection: Connection) -> _Part:
    topic, kind, text = connection.topic, connection.msgtype, connection.msgdef.data
    if isinstance(reader, Reader):
        qos: Any = connection.ext
        return _Part(Channel(topic, kind, text, tuple(qos.offered_qos_profiles)), reader, connection)
    try:
        store = ros1_types(kind, text)
    except Exception:  # rosbags documents none of what a broken definition raises
        return _Part(Channel(topic, kind, text), reader, connection)
    channel = Channel(topic, kind, definition(store, kind), offered_qos())
    return _Part(channel, reader, connection, lambda data: bytes(store.ros1_to_cdr(data, kind)))


class Bag:
    """An open bag: MCAP or sqlite3, a directory or the file in it, or several files as one; or a ROS 1 bag.

    Attributes:
        channels: its topics.
        start, end: ns of the first message and after the last one.
        messages: how many there are.
        counts: how many each channel has.
        size: on disk, bytes.

    Raises:
        UserError: reading the definitions of its types would take too long.
    """

    def __init__(self, path: Path, readers: Sequence[Reader | Ros1Reader]):
        self.path = path
        self.size = sum(file.stat().st_size for file in ([*path.iterdir()] if path.is_dir() else [path]))
        filled = [reader for reader in readers if reader.message_count]
        texts = {connection.msgdef.data for reader in filled for connection in reader.connections}
        if sum(lines for lines in map(statements, texts) if lines <= STATEMENTS) > ALL_STATEMENTS:
            raise too_much(path, f"has definitions of more than {ALL_STATEMENTS} lines")
        self._parts = [_part(reader, connection) for reader in filled for connection in reader.connections]
        self._files = [
            file for reader in readers for file in (reader.files if isinstance(reader, Reader) else [reader])
        ]
        self.channels = list(dict.fromkeys(part.channel for part in self._parts))
        self.start = min(reader.start_time for reader in filled)
        self.end = max(reader.end_time for reader in filled)
        self.messages = sum(reader.message_count for reader in filled)
        self.counts = dict.fromkeys(self.channels, 0)
        for part in self._parts:
            self.counts[part.channel] += part.connection.msgcount

    @property
    def damage(self) -> list[str]:
        """A sentence about what is damaged of that which has been read so far; none: there is nothing."""
        if not (count := self.damaged):
            return []
        parts = "places" if any(isinstance(file, Sqlite3Reader) for file in self._files) else "chunks"
        return [f"{count} damaged {parts} are left out, with the messages in them."]

    @property
    def damaged(self) -> int:
        """How many chunks or, of an sqlite3 file, places could not be read so far."""
        return sum(len(file.damaged) for file in self._files)

    def times(self, channels: Iterable[Channel]) -> dict[Channel, list[int]] | None:
        """The times in ns of the messages of some channels, from an MCAP file's index, with nothing unpacked.

        None: there is no such index.
        """
        file = self._files[0] if len(self._files) == 1 else None
        if not isinstance(file, McapReader) or file.bio is None:
            return None
        found, size = dict[Channel, list[int]](), file.path.stat().st_size
        for channel in channels:
            ids = [connection.id for connection in file.connections if connection.topic == channel.topic]
            if len(ids) != 1:
                return None
            places = [place for chunk in file.chunks if (place := chunk.message_index_offsets.get(ids[0]))]
            times = found[channel] = []
            for place in places:  # of records, https://mcap.dev/spec#message-index-op0x07
                file.bio.seek(place + 11)  # past opcode, length and channel
                entries = file.bio.read(int.from_bytes(file.bio.read(4), "little"))
                times += np.frombuffer(entries, "<u8", len(entries) // 16 * 2)[::2].tolist()
                if 16 * len(times) > size:
                    return None  # parts of the index are in it more than once
            if not places:
                return None
            times.sort()
        return found

    def read(
        self, start: int | None = None, end: int | None = None, wanted: Callable[[Channel], bool] = lambda _: True
    ) -> Iterator[tuple[Channel, int, bytes]]:
        """Channel, time in ns and CDR bytes of the messages in order of time, from ``start`` to before ``end``.

        Raises:
            UserError: the bag is damaged at some place.
        """
        parts = [part for part in self._parts if wanted(part.channel)]
        readers = list(dict.fromkeys(part.reader for part in parts))
        streams = [self._read(reader, [p for p in parts if p.reader is reader], start, end) for reader in readers]
        yield from streams[0] if len(streams) == 1 else heapq.merge(*streams, key=lambda message: message[1])

    def _read(
        self, reader: Reader | Ros1Reader, parts: list[_Part], start: int | None, end: int | None
    ) -> Iterator[tuple[Channel, int, bytes]]:
        """The messages of one file."""
        by_id = {part.connection.id: part for part in parts}
        messages = reader.messages([part.connection for part in parts], start, end)
        while True:
            try:
                connection, time, data = next(messages)
            except StopIteration:
                return
            except UserError:
                raise
            except Exception as error:  # decompressors and unpackers each have their own
                raise UserError(_damaged(self.path, error)) from error
            part = by_id[connection.id]
            try:
                content = bytes(data) if part.convert is None else part.convert(data)
            except Exception:  # of a damaged message; as empty ones are told from whole ones
                content = b""
            yield part.channel, time, content


@contextmanager
def open_bag(path: Path) -> Iterator[Bag]:
    """A bag to read.

    Raises:
        UserError: it is missing, no bag, of an unknown version, damaged, unfinished or empty.
    """
    if not path.exists():
        raise UserError(f"There is no recording {path}.")
    targets = [path]
    if path.is_dir() and not (path / "metadata.yaml").exists():
        targets = storage_files(path)
    elif path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no recording: name a bag's directory or its {' or '.join(SUFFIXES)} file.")
    with ExitStack() as opened:
        readers: list[Reader | Ros1Reader] = []
        for target in targets:
            try:
                reader = Ros1Reader(target) if target.suffix == ".bag" and target.is_file() else Reader(target)
                reader.open()
                opened.callback(reader.close)
                readers.append(reader)
            except UserError:
                raise
            except PermissionError as error:
                raise UserError(f"Cannot read the recording {path}: {reason(error)}.") from error
            except Exception as error:
                raise UserError(_damaged(path if len(targets) == 1 else target, error)) from error
        if not any(reader.message_count for reader in readers):
            raise UserError(f"The recording {path} is empty: there are no messages in it.")
        try:
            bag = Bag(path, readers)
        except (TypeError, ValueError) as error:  # of metadata.yaml: texts for numbers, lists for names
            raise UserError(_damaged(path, error)) from error
        yield bag


def storage_files(path: Path) -> list[Path]:
    """The .mcap, .db3 and .bag files of a bag's directory, in the order of their names.

    Raises:
        UserError: there is none.
    """
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"{path} is no recording: it has neither metadata.yaml nor a {' or '.join(SUFFIXES)} file.")
    return files


def storage_file(path: Path) -> Path:
    """The one file of a bag's directory.

    Raises:
        UserError: there is none, or there are several.
    """
    files = storage_files(path)
    if len(files) > 1:
        raise UserError(f"{path} has several files but no metadata.yaml: name one of them.")
    return files[0]


def _damaged(path: Path, error: Exception) -> str:
    known = isinstance(error, (ReaderError, Ros1ReaderError, sqlite3.Error, OSError))
    why = reason(error) if known else f"its content is not readable ({type(error).__name__})"
    remedies = {".bag": "`rosbag reindex`", ".db3": "sqlite3's `.recover`"}
    remedy = remedies.get(path.suffix, f"`carla-digr repair {path}`")
    return f"The recording {path} is unfinished or damaged: {why}; {remedy} saves what is whole."


@contextmanager
def new_bag(
    path: Path, channels: list[Channel], custom: Mapping[str, str] | None = None, resumes: bool = False
) -> Iterator[BagWriter]:
    """A bag that appears under its name once it is complete, or not at all.

    It is made in a hidden directory beside its name, ``.NAME.tmp``. What a killed command left there is removed by the
    next one for this name. If that ``resumes``, it is its `BagWriter.earlier`, and an interruption or a full disk
    leaves what there is, as a kill does.

    Raises:
        UserError: the name is taken, another command is making the same bag, or there is no room.
    """
    if path.exists():
        raise UserError(f"{path} exists already: choose another name for the new recording.")
    hidden = path.with_name(f".{path.name}.tmp")
    keep = False
    with ExitStack() as held:
        try:
            taken = f"Another command is making {path}: wait for it or choose another name."
            held.enter_context(exclusive(hidden, taken))
        except OSError as error:
            raise UserError(f"Cannot make the recording {path}: {reason(error)}.") from error
        try:
            earlier = _left_over(hidden) if resumes else None
            shutil.rmtree(hidden / NAME, ignore_errors=True)
            bag = BagWriter(hidden / NAME, channels)
            bag.earlier = earlier
            yield bag
            bag.close(custom)
            (hidden / NAME).rename(path)
        except (KeyboardInterrupt, MemoryError):
            keep = resumes
            raise
        except OSError as error:
            keep = resumes
            raise UserError(f"Cannot write the recording {path}: {reason(error)}.") from error
        finally:
            if not keep:
                shutil.rmtree(hidden, ignore_errors=True)


def _left_over(hidden: Path) -> Path | None:
    """The longest file that killed commands have left of a bag, moved out of the way of the new one."""
    last, kept = hidden / NAME / f"{NAME}.mcap", hidden / "earlier.mcap"
    if last.exists() and (not kept.exists() or last.stat().st_size > kept.stat().st_size):
        last.replace(kept)
    return kept if kept.exists() else None
