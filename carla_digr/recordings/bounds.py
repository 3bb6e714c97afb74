"""How much a recording may make of its size: bytes unpacked, records, topics."""

from __future__ import annotations

import bz2
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from backports import zstd
from lz4.frame import LZ4FrameDecompressor

from carla_digr.errors import UserError

VARIABLE = "CARLA_DIGR_UNPACK"  # in the environment: how many times as much as usual a recording may make of its size
MESSAGE_BYTES = 1 << 16  # of a message that is no picture and is taken apart
CHANNELS = 4096  # of a recording

UNPACKERS: dict[str, Callable[[], Any]] = {
    "zstd": zstd.ZstdDecompressor,
    "lz4": LZ4FrameDecompressor,
    "bz2": bz2.BZ2Decompressor,
}


class Limits(NamedTuple):
    """Of a recording: bytes unpacked ``at_once`` and in ``total``; ``records``; bytes of ``yaml``, which rosbags reads
    at 50 kB a second.

    A recording of a standing car, of which all pictures are the same, is 80 times as large unpacked; and the index
    alone has 16 bytes for each message.
    """

    at_once: int
    total: int
    records: int
    yaml: int

    @classmethod
    def of(cls, size: int) -> Limits:
        """Of a recording of this size on disk, bytes.

        Raises:
            UserError: the environment's `VARIABLE` is no number.
        """
        text = os.environ.get(VARIABLE, "1")
        if not text.isdecimal() or not 0 < len(text) < 7:
            raise UserError(f"{VARIABLE} must be a whole number, such as 10, not {text[:20]!r}.")
        least, usual = (64 << 20, 512 << 20, 250_000, 512 << 10), (4 * size, 200 * size, size // 32, 0)
        return cls(*(int(text) * max(pair) for pair in zip(least, usual, strict=True)))


def check_yaml(path: Path, text: str | bytes, limits: Limits) -> None:
    """Refuse YAML that takes minutes to read, or grows by its aliases; recorders write neither.

    Raises:
        UserError: it is such.
    """
    text = text.encode() if isinstance(text, str) else text
    if len(text) > limits.yaml:
        raise too_much(path, f"has {len(text) >> 10} kiB of YAML")
    if re.search(rb"&\w", text) and re.search(rb"[*]\w", text):
        raise UserError(f"The recording {path} is not a recorder's: its YAML has aliases.")


def too_much(path: str | os.PathLike[str], what: str) -> UserError:
    """The error about a recording that is beyond its `Limits`."""
    return UserError(
        f"The recording {path} {what}, which is far more than recordings of its size have: if you trust it, allow more "
        f"with {VARIABLE}=10 in the environment."
    )


def unpack(compression: str, data: bytes, most: int) -> bytes:
    """The content of packed bytes, and one byte more than ``most`` where it is longer.

    Raises:
        ValueError: it ends early, or the compression is not known.
        Exception: the decompressors' own, of damaged bytes.
    """
    if not compression:
        return data
    if compression not in UNPACKERS:
        raise ValueError(f"the compression {compression[:20]!r} is not known")
    parts, left = [], most + 1
    while data and left:
        unpacker = UNPACKERS[compression]()
        parts.append(unpacker.decompress(data, left))
        left -= len(parts[-1])
        if not unpacker.eof and left:
            raise ValueError("packed data end early")
        data = unpacker.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_chunks(path: Path, chunks: Iterable[tuple[int, int, int]], limits: Limits) -> None:
    """Refuse a recording of chunks that are too large in all, or whose times overlap too much, for those lie in memory
    together.

    Args:
        chunks: time of the first and of the last message, and bytes unpacked.

    Raises:
        UserError: they are.
    """
    at_once = total = 0
    changes: list[tuple[int, int]] = []
    for start, end, size in chunks:
        total += size
        changes += (start, size), (max(start, end) + 1, -size)
    if total > limits.total:
        raise too_much(path, f"unpacks to more than {limits.total >> 20} MiB")
    for _, change in sorted(changes, key=lambda change: change[0]):
        at_once += change
        if at_once > limits.at_once:
            raise too_much(path, f"has chunks of more than {limits.at_once >> 20} MiB at one time")
