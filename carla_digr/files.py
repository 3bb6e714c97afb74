"""Files from outside, files that are whole or not there, directories for one process at a time, and hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from carla_digr.errors import UserError

WEIGHTS_BYTES = 2 << 30  # of the largest file of weights that is read
NOTES_BYTES = 64 << 20  # of the largest file of results or facts that stages write beside their pictures and weights


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a file from outside, which may be anything: nothing here waits, or reads without end.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than ``limit`` bytes; ``strerror`` says which.
    """
    with open_regular(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def open_regular(path: str | os.PathLike[str], limit: int) -> IO[bytes]:
    """As `read_regular`, open to be read in parts."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    status = os.fstat(file.fileno())
    problem = None
    if stat.S_ISDIR(status.st_mode):
        problem = OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif not stat.S_ISREG(status.st_mode):
        problem = OSError(errno.EINVAL, "It is not a regular file", str(path))
    elif status.st_size > limit:
        problem = OSError(errno.EFBIG, f"It is larger than {limit} bytes", str(path))
    if problem is not None:
        file.close()
        raise problem
    return file


def read_json(path: str | os.PathLike[str], limit: int = NOTES_BYTES) -> Any:
    """The value of a JSON file from outside.

    Raises:
        OSError: see `read_regular`.
        ValueError: it is not JSON, or is nested too deeply to be anything that was meant.
    """
    try:
        return json.loads(read_regular(path, limit))
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the name ``path`` only once it is complete on disk.

    The temporary file lies in the same directory, is synced and then renamed over ``path``; on an exception it is
    removed and ``path`` keeps its old content. Missing parent directories are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def allocate(path: Path, size: int) -> None:
    """Give a file its size and its room on the disk, so that a map of it in memory never meets a full one: SIGBUS.

    A new file is all zeros; of an old one nothing is changed.

    Raises:
        OSError: there is no room; a new file is removed.
    """
    new = not path.exists()
    with path.open("wb" if new else "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if new:
                path.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def exclusive(directory: Path, taken: str) -> Iterator[None]:
    """Make a directory and hold it against a second process; the system lets go of it however the first one ends.

    Args:
        directory: gets a file ``.lock``, for a network file system locks no directory itself.
        taken: what to tell whoever comes second.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(taken) from error
        yield


def shipped(name: str | os.PathLike[str], directory: Path, suffix: str) -> Path:
    """The file of this path if there is one, else the one of this bare name that ships in a directory."""
    own = Path(name)
    ours = directory / f"{name}{suffix}"
    return ours if ours.parent == directory and ours.is_file() and not own.is_file() else own


def sha256_of(path: str | os.PathLike[str], limit: int = 1 << 62) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits.

    Raises:
        OSError: as `read_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path, limit) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
