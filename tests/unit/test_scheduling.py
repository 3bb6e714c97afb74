"""Who goes before the ordinary processes, and who does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, resource, subprocess, sys, threading
from carla_digr.scheduling import go_first, goes_first, this_thread_goes_first
alone, user = sys.argv[1] == "alone", int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
if user:
    os.setuid(user)
end = threading.Event()
beside = threading.Thread(target=end.wait)
beside.start()
granted = this_thread_goes_first(1) if sys.argv[1] == "one" else go_first(1, alone)
later = threading.Thread(target=end.wait)
later.start()
child = subprocess.Popen(["sleep", "60"])
scheduled = [os.sched_getscheduler(thread) for thread in (0, beside.native_id, later.native_id, child.pid)]
child.kill()
end.set()
print(granted, *(policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR for policy in scheduled), goes_first(os.getpid()))
"""


def outcome(alone: str, user: int) -> list[bool]:
    """Whether it was granted; whether main thread, another one, a later one and a child go first; what is told."""
    command = [sys.executable, "-c", PROGRAM, alone, str(user)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    return [word == "True" for word in printed.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux schedules so")
@pytest.mark.parametrize("alone", ["one", "alone", "all"])
def test_who_goes_first_and_whose_children(alone):
    granted, main, beside, later, child, told = outcome(alone, 0)
    if not granted:
        pytest.skip("the system grants no real-time scheduling here")
    assert main and told
    assert [beside, later, child] == [alone == "all"] * 3


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can become who may not")
def test_who_may_not_goes_on_as_before():
    assert outcome("all", 65534) == [False] * 6
