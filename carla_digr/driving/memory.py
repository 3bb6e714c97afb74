"""The memory of a server on this machine, which on long trainings grows."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

LISTENS = "0A"  # the state of a socket in /proc/net/tcp

_found: dict[tuple[str, int], Path] = {}  # who listened where; to look through all processes takes over 10 ms


def resident(host: str, port: int) -> int | None:
    """Resident memory, in bytes, of the process that listens on a port of this machine.

    Returns:
        None where it cannot be known: another machine or system, or another user's process.
    """
    with contextlib.suppress(KeyError, OSError):
        return _resident(_found[host, port])
    try:
        with socket.socket() as trial:
            trial.bind((host, 0))  # refused where the address is another machine's
        sockets = {f"socket:[{inode}]" for inode in _listening(port)}
        process = next(path.parents[1] for path in Path("/proc").glob("[0-9]*/fd/*") if _target(path) in sockets)
        _found[host, port] = process
        return _resident(process)
    except (OSError, StopIteration, ValueError):
        return None


def _resident(process: Path) -> int:
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _listening(port: int) -> list[str]:
    """Inodes of the sockets that listen there; https://docs.kernel.org/networking/proc_net_tcp.html."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = row.split()
            if fields[3] == LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                found.append(fields[9])
    return found


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
