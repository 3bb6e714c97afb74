"""How long a stage waits for its drives, where it was stopped meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from carla_digr.driving.drive_process import PART, wait_awake

STOPPED = """
import multiprocessing, threading, time
from carla_digr.driving.drive_process import wait_awake
here, there = multiprocessing.Pipe()
def work():
    for _ in range(5):
        time.sleep(0.1)  # work, of which some is left when it goes on
    there.send("done")
threading.Thread(target=work).start()
print("waits", flush=True)
print(wait_awake(here.poll, 3.0))
"""


def test_a_process_that_was_stopped_and_goes_on_has_not_waited_meanwhile():
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.3)  # longer than the wait was to be
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "True\n"


def test_a_wait_for_what_does_not_come_is_as_long_as_asked_for():
    parts: list[float] = []
    assert not wait_awake(lambda part: bool(parts.append(part)), 4 * PART + 0.1)
    assert sum(parts) == 4 * PART + 0.1 and max(parts) == PART
    parts.clear()
    assert not wait_awake(lambda part: bool(parts.append(part)), 0.0)
    assert parts == [0.0]
