"""The recorder's files: what the actors of an episode did, frame by frame, behind CARLA's start_recorder.

A file is a line that says so, then msgpack: a Header and one Frame after the other, poses as arrays of 64-bit numbers.
It is whole or not there, and read as what comes from outside: within limits, and checked.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from carla_digr.files import atomic_write, open_regular
from carla_digr.simulator import wire
from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.wire import AttributeValue, Transform, Weather

DIRECTORY = Path("runs/recorder")
MAGIC = b"carla_digr recorder 1\n"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
LARGEST = 512 * 2**20  # bytes of a file: 40 minutes with 100 vehicles at 20 Hz
LARGEST_PART = 16 * 2**20  # bytes of a frame
FARTHEST = 1e6  # m, m/s and rad that are believed

MOTION = np.dtype(
    [
        ("id", "<i8"),
        *((name, "<f8") for name in ("x", "y", "yaw", "speed", "vx", "vy", "yaw_rate", "ax", "ay")),
        *((name, "<f8") for name in ("throttle", "steer", "brake")),
        *((name, "?") for name in ("hand_brake", "reverse", "brake_light")),
    ]
)
"""A vehicle: the columns of traffic.VEHICLE by which it moves and shows itself."""
STEPS = np.dtype([("id", "<i8"), *((name, "<f8") for name in ("x", "y", "z", "yaw", "vx", "vy"))])
"""A walker or prop: m, degrees, m/s."""

log = logging.getLogger(__name__)


class Header(NamedTuple):
    """Where and when something was recorded."""

    map: str
    date: str


class Recorded(NamedTuple):
    """An actor as it was made; the place of one that is attached is relative."""

    id: wire.U32
    type: str
    parent: int
    attributes: list[AttributeValue]
    place: Transform


class Contact(NamedTuple):
    """Two that touched; a part of the map has the id 0 and a name."""

    id: int
    other: int
    name: str


class Frame(NamedTuple):
    """One frame: seconds since the recording began, who came and went, MOTION, STEPS, contacts, changed weather."""

    stamp: float
    came: list[Recorded]
    went: list[int]
    vehicles: bytes
    figures: bytes
    contacts: list[Contact]
    weather: Weather | None


class Writer:
    """A recording under way.

    Args:
        path: where it will be once it is closed.
        header: its first part.

    Attributes:
        known: ids of the actors that the last frame had.
        weather: that it had.

    Raises:
        OSError: there can be no such file.
    """

    def __init__(self, path: Path, header: Header, began: float):
        self.path, self.began = path, began
        self.known: set[int] = set()
        self.weather: Weather | None = None
        self._whole = contextlib.ExitStack()
        self._file = self._whole.enter_context(atomic_write(path))
        self._size = 0
        self._write(MAGIC + wire.pack(header))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)

    def add(self, frame: Frame) -> bool:
        """Write a frame; False if this was the last one that there is room for."""
        self._write(wire.pack(frame._replace(weather=wire.optional(frame.weather))))  # type: ignore[arg-type]
        return self._size < LARGEST - LARGEST_PART

    def close(self) -> None:
        """Give the file its name."""
        self._whole.close()

    def give_up(self, error: OSError) -> None:
        """Remove what there is of it."""
        with contextlib.suppress(OSError):
            self._whole.__exit__(type(error), error, error.__traceback__)


@dataclass
class Tape:
    """The recorder and replayer of a server.

    Args:
        directory: of all files; clients name files in it.
        writer: what is being recorded.
        playback: what is being replayed.
        time_factor: how fast.
        ignore_hero: whether vehicles with that role stay as they are.
        ignore_spectator: whether the spectator does.
    """

    directory: Path = DIRECTORY
    writer: Writer | None = None
    playback: Any = None
    time_factor: float = 1.0
    ignore_hero: bool = False
    ignore_spectator: bool = True

    def path(self, name: str) -> Path:
        """The file of a name.

        Raises:
            CallFailed: it is none, or leads out of the directory.
        """
        if not NAME.fullmatch(name):
            raise CallFailed(
                f"{name!r:.120} is no name of a recording: letters, digits, '.', '_' and '-', no directories; "
                f"they all are in {self.directory.absolute()} on the server"
            )
        return self.directory / name

    def start(self, name: str, header: Header, began: float) -> Writer:
        """Begin a file, and end the one under way."""
        self.stop()
        try:
            self.writer = Writer(self.path(name), header, began)
        except OSError as error:
            raise CallFailed(f"cannot record into {self.directory.absolute()}: {error.strerror}") from None
        return self.writer

    def add(self, frame: Frame) -> None:
        """Write a frame; a full disk ends the recording, not the server."""
        assert self.writer is not None
        try:
            if self.writer.add(frame):
                return
            log.warning("the recording %s ends: it has reached %d bytes", self.writer.path.name, LARGEST)
        except OSError as error:
            log.warning("the recording %s is lost: %s", self.writer.path.name, error.strerror)
            self.writer.give_up(error)
            self.writer = None
            return
        self.stop()

    def stop(self) -> None:
        """End the file under way, if there is one."""
        writer, self.writer = self.writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                log.warning("the recording %s is lost: %s", writer.path.name, error.strerror)


def header(map_name: str) -> Header:
    """That of a recording that begins now."""
    return Header(map_name, time.strftime("%Y-%m-%d %H:%M:%S"))


def motions(frame: Frame) -> NDArray[np.void]:
    """(N,) of MOTION."""
    return _checked(frame.vehicles, MOTION)


def steps(frame: Frame) -> NDArray[np.void]:
    """(N,) of STEPS."""
    return _checked(frame.figures, STEPS)


def _checked(data: bytes, kind: np.dtype) -> NDArray[np.void]:
    if len(data) % kind.itemsize:
        raise CallFailed("the recording is damaged: a part of it has another length than it must have")
    table = np.frombuffer(data, kind)
    numbers = [name for name in kind.names or () if kind[name] == np.dtype("<f8")]
    if not all((np.abs(table[name]) < FARTHEST).all() for name in numbers):
        raise CallFailed("the recording is damaged: a number in it is none that a world has")
    return table


def read(path: Path) -> tuple[Header, Iterator[Frame]]:
    """A recording; its frames are read one by one.

    Raises:
        CallFailed: there is no such file or it is no recording; the frames raise it where the file is damaged.
    """
    try:
        file = open_regular(path, LARGEST)
    except OSError as error:
        raise CallFailed(f"cannot read the recording {path.absolute()}: {error.strerror}") from None
    if file.read(len(MAGIC)) != MAGIC:
        file.close()
        raise CallFailed(f"{path.absolute()} is no recording of this simulator; it cannot read those of CARLA")
    parts = _parts(file, path)
    try:
        return wire.decoder(Header)(next(parts)), map(_frame, parts)
    except (StopIteration, wire.ProtocolError):
        raise CallFailed(f"the recording {path.absolute()} is damaged") from None


def _parts(file: IO[bytes], path: Path) -> Iterator[Any]:
    with file:
        unpacker = msgpack.Unpacker(file, raw=False, max_buffer_size=LARGEST_PART, unicode_errors="strict")
        while True:
            try:
                yield unpacker.unpack()
            except msgpack.OutOfData:
                return
            except Exception as error:  # msgpack raises half a dozen unrelated types for malformed input
                raise CallFailed(f"the recording {path.absolute()} is damaged: {error}") from None


_decode = wire.decoder(Frame)


def _frame(part: Any) -> Frame:
    try:
        frame = _decode(part)
    except wire.ProtocolError as error:
        raise CallFailed(f"the recording is damaged: {error}") from None
    if not math.isfinite(frame.stamp):
        raise CallFailed("the recording is damaged: a frame has no time")
    return frame
