"""A drive over CARLA's protocol in a process of its own, so that the client library can take no more than it down.

The library's Traffic Manager ends its process with an abort when the server hangs or dies at the wrong moment, and a
tick of its may never return.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import RETRY, DriveFrame, VehicleCommand
from carla_digr.errors import SimulatorGone, UserError

if TYPE_CHECKING:
    from carla_digr.driving.scenario import Scenario

CALLS = 2  # as many times the limit of one call may an answer take; what does not answer a call says so itself
RESET = 60.0  # s more for an episode's start: on a CARLA server, traffic gets to roll first
START = 60.0  # s that a process may take to start besides the connection's time limit
LEAVE = 10.0  # s that it may take to tidy up before it is killed
FAREWELL = 3.0  # s of them where another process takes over
PART = 0.5  # s of a wait

T = TypeVar("T")
Answer = tuple[dict[str, Any], list[NDArray[Any]]]
"""JSON-ready facts and arrays."""
Work = Callable[["Scenario", Any], Callable[[dict[str, Any]], Answer]]
"""Made with the drive and the settings of the job, what answers a request."""


class SimulatorProcess:
    """A process with a drive on one simulator, which answers requests until this end closes.

    It runs from the start on; :meth:`ready` waits until it is connected, and ``map_name`` and ``map_hash`` say then to
    which map.

    Args:
        work: of a module's own level, called in the process.
        settings: that ``work`` gets.
        simulator: see :meth:`Scenario.connect`, like the following.
        host: where the simulator runs.
        port: its port for calls.
        timeout: s for connecting and for each call.
        options: more of them.
    """

    def __init__(self, work: Work, settings: Any, simulator: str, host: str, port: int, timeout: float, **options: Any):
        self._make = lambda: SimulatorProcess(work, settings, simulator, host, port, timeout, **options)
        self.address, self._timeout = f"{host}:{port}", timeout
        self.map_name = self.map_hash = ""
        self._hangs = False
        context = multiprocessing.get_context("spawn")  # threads and locks of this process must not be copied
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, work, settings, simulator, host, port, timeout, options)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait for the connection.

        Raises:
            UserError: there is none.
        """
        told = self.answer(START)[0]
        self.map_name, self.map_hash = told["map"], told["hash"]

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request, JSON-ready; one answer is to be taken for each.

        Raises:
            SimulatorGone: the process has ended.
        """
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
        except OSError:
            raise self._gone() from None

    def answer(self, more: float = 0.0) -> Answer:
        """The answer to the oldest request without one.

        Args:
            more: s that it may take besides CALLS calls.

        Raises:
            SimulatorGone: the simulator does not answer, or the process has ended or hangs.
            UserError: the process says why it ends.
        """
        try:
            if not wait_awake(self._pipe.poll, CALLS * self._timeout + more):
                self._hangs = True
                raise SimulatorGone(f"The drive on {self.address} hangs; start its simulator again and connect anew.")
            facts = json.loads(self._pipe.recv_bytes())
            if "error" in facts:
                raise (SimulatorGone if facts["gone"] else UserError)(facts["error"])
            shapes = facts.pop("arrays", [])
            arrays = [np.frombuffer(self._pipe.recv_bytes(), kind).reshape(shape) for kind, shape in shapes]
        except (EOFError, OSError):
            raise self._gone() from None
        return facts, arrays

    def reconnect(self, patience: float, given_up: Callable[[], bool] = lambda: False) -> SimulatorProcess:
        """The same in a new process; the old one is ended, at once if it hangs.

        Args:
            patience: s in which the simulator must answer again.
            given_up: whether nobody waits for it any more.

        Raises:
            UserError: that of the last try.
        """
        deadline = time.monotonic() + patience
        self.close(0.0 if self._hangs else FAREWELL)  # what it leaves on the simulator, the next session removes
        failure = UserError(f"No simulator answers on {self.address}; start it again.")
        while True:
            if accepts(self.address):  # a process takes seconds to start
                again = self._make()
                try:
                    again.ready()
                    return again
                except UserError as error:
                    again.close()
                    failure = error
            if time.monotonic() >= deadline or given_up():
                raise failure
            time.sleep(RETRY)

    def close(self, leave: float = LEAVE) -> None:
        """Have the process tidy up and end, killed after ``leave`` seconds; safe to call twice."""
        self._pipe.close()
        self._process.join(leave)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def _gone(self) -> SimulatorGone:
        self._process.join(LEAVE)
        code = self._process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        return SimulatorGone(f"The process that drove on {self.address} ended {how}; connect anew.")


def wait_awake(wait: Callable[[float], T], seconds: float) -> T:
    """What ``wait(seconds)`` gives, from waits of PART until one gives anything.

    Each counts as PART, however long it took: a stage that was stopped, by Ctrl-Z or for the night, has not waited for
    all of that time, in which those that it waits for may have been stopped too.
    """
    while True:
        found = wait(min(seconds, PART))
        seconds -= PART
        if found or seconds <= 0.0:
            return found


def address_of(text: str) -> tuple[str, int]:
    """Host and port of a simulator.

    Raises:
        UserError: they are none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"A simulator must be given as host:port, not {text!r}.")
    return host, int(port)


def accepts(address: str) -> bool:
    """Whether something listens at host:port."""
    try:
        socket.create_connection(address_of(address), 1.0).close()
    except OSError:
        return False
    return True


class DriveProcess:
    """A :class:`carla_digr.driving.control.Drive` in another process, with :class:`Scenario`'s errors.

    It takes the arguments of :meth:`Scenario.connect`, which the process calls.
    """

    def __init__(self, simulator: str, host: str, port: int, timeout: float, **options: Any):
        self._process = SimulatorProcess(_drive, None, simulator, host, port, timeout, **options)

    @property
    def map_name(self) -> str:
        """Of the simulator, once it is connected."""
        return self._process.map_name

    def ready(self) -> DriveProcess:
        """Wait for the connection.

        Raises:
            UserError: there is none.
        """
        self._process.ready()
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
        """Drive on in a new process; the old one is ended.

        Raises:
            UserError: that of the last try.
        """
        self._process = self._process.reconnect(patience)
        return self

    def close(self) -> None:
        """Have the process tidy up and end; safe to call twice."""
        self._process.close()

    def _frame(self, request: dict[str, Any], more: float = 0.0) -> DriveFrame:
        self._process.ask(request)
        facts, (picture,) = self._process.answer(more)
        return DriveFrame(image=picture, **facts)


def _drive(drive: Scenario, _: None) -> Callable[[dict[str, Any]], Answer]:
    from carla_digr.driving.scripted import ScriptedDriver

    driver = ScriptedDriver()

    def answer(request: dict[str, Any]) -> Answer:
        if "seed" in request:
            driver.reset()
            frame = drive.reset(request["seed"])
        elif not request:
            frame = drive.step(driver.command(drive))
        else:
            frame = drive.step(VehicleCommand(**request["command"]))
        return {name: value for name, value in vars(frame).items() if name != "image"}, [frame.image]

    return answer


def _serve(
    pipe: Connection,
    work: Work,
    settings: Any,
    simulator: str,
    host: str,
    port: int,
    timeout: float,
    options: dict[str, Any],
) -> None:
    """The process: one answer a request, until the other end of the pipe is closed."""
    from carla_digr.driving.highway import identity
    from carla_digr.driving.scenario import Scenario  # which the other end, that may never drive, need not load

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that asks; its end ends this one
    with contextlib.suppress(EOFError, OSError):
        try:
            with Scenario.connect(simulator, host, port, timeout, **options) as drive:
                answer = work(drive, settings)
                name, digits = identity(drive.session.map)
                pipe.send_bytes(json.dumps({"map": name, "hash": digits}).encode())
                while True:
                    facts, arrays = answer(json.loads(pipe.recv_bytes()))
                    shapes = [(array.dtype.str, array.shape) for array in arrays]
                    pipe.send_bytes(json.dumps({**facts, "arrays": shapes}).encode())
                    for array in arrays:
                        pipe.send_bytes(array.tobytes())
        except UserError as error:
            told = {"error": str(error), "gone": isinstance(error, SimulatorGone)}
            pipe.send_bytes(json.dumps(told).encode())
