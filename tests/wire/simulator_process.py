"""The simulator as tests meet it: always its own process, for the client holds Python's lock while it waits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

READY = re.compile(r"ready: .* on 127\.0\.0\.1:(\d+), streams on (\d+)")


class Simulator:
    """A running simulator process, by default on ports of its own.

    Parameters:
        altered: a program that runs in the process before it serves
        options: of the server's command line
    """

    def __init__(self, port: int = 0, altered: str = "", options: Sequence[str] = ()) -> None:
        program = f"{textwrap.dedent(altered)}\nfrom carla_digr.simulator.server import main\nmain()"
        command = [sys.executable, "-c", program, "--port", str(port), "--parent", str(os.getpid()), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = READY.search(line)
        assert found, (line, self.process.communicate(timeout=10))
        self.port, self.streaming_port = map(int, found.groups())

    def stop(self) -> str:
        """End it; what it wrote to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        return self.process.communicate(timeout=10)[1]

    def memory(self) -> int:
        """Resident memory in bytes."""
        return resident(self.process.pid)


def processor_time(process: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> int:
    """Resident memory of a process in bytes."""
    with open(f"/proc/{process}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def eventually(condition: Callable[[], bool], limit: float = 20.0) -> None:
    """Return once the condition holds; fail if it does not within the limit in seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def run_client(program: str, simulator: Simulator) -> subprocess.Popen:
    """A process with a session of its own; the program says "here" when it has got there."""
    text = textwrap.dedent(program).replace("PORT", str(simulator.port))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", text], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
