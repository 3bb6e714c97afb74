"""A drive over CARLA's protocol in a process of its own, so that the client library can take no more than it down.

The library's Traffic Manager ends its process with an abort when the server hangs or dies at the wrong moment.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from carla_digr.driving.control import DriveFrame, VehicleCommand
from carla_digr.driving.scenario import RETRY, Scenario
from carla_digr.driving.scripted import ScriptedDriver
from carla_digr.driving.session import SimulatorGone
from carla_digr.errors import UserError

CALLS = 6  # as many times the limit of one call may a frame take
RESET = 60.0  # s more for an episode's start: on a CARLA server, traffic gets to roll first
START = 60.0  # s that a process may take to start besides the connection's time limit
LEAVE = 10.0  # s that it may take to tidy up before it is killed


class DriveProcess:
    """A :class:`carla_digr.driving.control.Drive` in another process, with :class:`Scenario`'s errors.

    It takes the arguments of :meth:`Scenario.connect`, which the process calls. It runs from the start on;
    :meth:`ready` waits until it is connected, and ``map_name`` says then to which map.
    """

    def __init__(self, simulator: str, host: str, port: int, timeout: float, **options: Any):
        self._make: Callable[[], DriveProcess] = lambda: DriveProcess(simulator, host, port, timeout, **options)
        self.address, self._timeout = f"{host}:{port}", timeout
        self.map_name = ""
        context = multiprocessing.get_context("spawn")  # threads and locks of this process must not be copied
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, simulator, host, port, timeout, options))
        self._process.daemon = True
        self._process.start()
        theirs.close()

    def ready(self) -> DriveProcess:
        """Wait for the connection.

        Raises:
            UserError: there is none.
        """
        self.map_name = self._answer(START + CALLS * self._timeout)["map"].rpartition("/")[2]
        return self

    def reset(self, seed: int) -> DriveFrame:
        """Start an episode; see :meth:`Drive.reset`.

        Raises:
            SimulatorGone: the simulator does not answer, or the process has ended.
        """
        return self._frame({"seed": seed}, RESET)

    def step(self, command: VehicleCommand) -> DriveFrame:
        """Apply a command, advance 0.05 s and return the frame.

        Raises:
            SimulatorGone: the simulator does not answer, or the process has ended.
        """
        return self._frame({"command": asdict(command)})

    def drive_on(self) -> DriveFrame:
        """Let the scripted driver choose the command, advance 0.05 s and return the frame.

        Raises:
            SimulatorGone: the simulator does not answer, or the process has ended.
        """
        return self._frame({})

    def reconnect(self, patience: float) -> DriveProcess:
        """The same drive in a new process; the old one is ended.

        Raises:
            UserError: that of the last try.
        """
        deadline = time.monotonic() + patience
        self.close()
        while True:
            again = self._make()
            try:
                return again.ready()
            except UserError:
                again.close()
                if time.monotonic() >= deadline:
                    raise
            time.sleep(RETRY)

    def close(self) -> None:
        """Have the process tidy up and end; safe to call twice."""
        self._pipe.close()
        self._process.join(LEAVE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def _frame(self, request: dict[str, Any], more: float = 0.0) -> DriveFrame:
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            facts = self._answer(CALLS * self._timeout + more)
            picture = np.frombuffer(self._pipe.recv_bytes(), np.uint8)
        except (EOFError, OSError):
            raise self._gone() from None
        return DriveFrame(image=picture.reshape(facts.pop("shape")), **facts)

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            if not self._pipe.poll(limit):
                raise SimulatorGone(f"The drive on {self.address} hangs; start its simulator again and connect anew.")
            answer = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise self._gone() from None
        if "error" in answer:
            raise (SimulatorGone if answer["gone"] else UserError)(answer["error"])
        return answer

    def _gone(self) -> SimulatorGone:
        self._process.join(LEAVE)
        code = self._process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        return SimulatorGone(f"The process that drove on {self.address} ended {how}; connect anew.")


def _serve(pipe: Connection, simulator: str, host: str, port: int, timeout: float, options: dict[str, Any]) -> None:
    """The process: one answer a request, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that asks; its end ends this one
    with contextlib.suppress(EOFError, OSError):
        try:
            driver = ScriptedDriver()
            with Scenario.connect(simulator, host, port, timeout, **options) as drive:
                pipe.send_bytes(json.dumps({"map": drive.session.map.name}).encode())
                while True:
                    request = json.loads(pipe.recv_bytes())
                    if "seed" in request:
                        driver.reset()
                        frame = drive.reset(request["seed"])
                    elif not request:
                        frame = drive.step(driver.command(drive))
                    else:
                        frame = drive.step(VehicleCommand(**request["command"]))
                    facts = {name: value for name, value in vars(frame).items() if name != "image"}
                    pipe.send_bytes(json.dumps({**facts, "shape": frame.image.shape}).encode())
                    pipe.send_bytes(frame.image.tobytes())
        except UserError as error:
            answer = {"error": str(error), "gone": isinstance(error, SimulatorGone)}
            pipe.send_bytes(json.dumps(answer).encode())
