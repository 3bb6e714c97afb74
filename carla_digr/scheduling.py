"""Cores, and real-time scheduling where the system grants it: who must answer within a frame goes before who need not.

Linux grants it to root and to those whose limit RTPRIO (ulimit -r) is high enough; see sched(7).
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

# Priorities: simulator, bridge and what measures them; the explainer's decisions and maps; its objects.
DRIVES, ANSWERS, BESIDE = 3, 2, 1


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to_one_core(number: int) -> None:
    """Have all present threads of this process, and those that they begin, take turns on one of its cores.

    Threads that only ever wait for each other lose more by waking each other on another core than they gain.

    Args:
        number: of the process among those that are alike, so that each has another core.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread.name), {cores[number % len(cores)]})


def go_first(priority: int, alone: bool = False) -> bool:
    """Have this process's threads go before every ordinary one of the machine.

    Args:
        priority: of SCHED_RR, from 1; larger ones go before smaller ones.
        alone: only the calling thread and those that Python does not know, which are the middleware's: what works
            beside the frames, and what is started later, stays ordinary.

    Returns:
        Whether the system grants it; if not, nothing changes.
    """
    if not hasattr(os, "SCHED_RESET_ON_FORK"):  # not Linux
        return False
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK if alone else os.SCHED_RR
    beside = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()} if alone else set()
    for thread in (int(entry.name) for entry in Path("/proc/self/task").iterdir()):
        if thread not in beside and not _schedule(thread, policy, priority):
            return False
    return True


def this_thread_goes_first(priority: int) -> bool:
    """As `go_first` the calling thread alone, and nothing that it starts."""
    return hasattr(os, "SCHED_RESET_ON_FORK") and _schedule(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, priority)


def _schedule(thread: int, policy: int, priority: int) -> bool:
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except PermissionError:
        return False
    except ProcessLookupError:  # it has ended
        pass
    return True


def goes_first(process: int) -> bool:
    """Whether the main thread of a process goes before the ordinary ones; False where nobody can know."""
    try:
        return os.sched_getscheduler(process) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
    except (AttributeError, OSError):
        return False
