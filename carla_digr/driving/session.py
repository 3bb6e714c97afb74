"""A session with a CARLA 0.9.16 server: connect, own the tick, match frames, leave the server as it was found.

Works against a CARLA server and against the embedded simulator alike; this package is the only one that imports
``carla``. Rules that hold on real servers: one client owns the tick, data are matched by frame number and never by
"latest", only own actors are destroyed, sensors before what carries them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import carla

from carla_digr.driving.control import TICK
from carla_digr.errors import SimulatorGone, UserError

VERSION = "0.9.16"
"""The only server version this client speaks; others have other message layouts."""
ROLE = "carla_digr"
"""First word of our actors' role_name; host and process id follow, so that a later session knows whose they are."""
_owners: dict[str, Session] = {}
"""Which session of this process owns a server's tick, by address."""
OWNER_WAIT = 1.0  # s in which a living tick owner moves the world
_TIME_OUT = re.compile(r"time-out of (\d+)ms")
"""How the client library's error begins when the server does not answer."""
CLOSE_TIMEOUT = 2.0  # s a call may take while cleaning up
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that would end the program without cleaning up."""


class Session:
    """The one owner of a server's tick, in synchronous mode with fixed steps of 0.05 s.

    Made by :meth:`connect`. Use as a context manager or call :meth:`close`; interpreter exit, SIGTERM and SIGHUP (where
    the program has no handler of its own) also lead there.
    """

    def __init__(self, client: carla.Client, host: str, port: int, timeout: float):
        self.client = client
        self.address = f"{host}:{port}"
        self.timeout = timeout
        self.gone = False
        """Whether the simulator stopped answering."""
        self.frame = 0
        self.ticking_from: int | None = None
        """The frame before the one that a tick under way asks for; other threads may read it."""
        self.found_synchronous = False
        """Whether the world was in synchronous mode when the session came."""
        self.found_rendered = True
        """Whether it was rendered then; it is while the session lasts."""
        self._world_id = 0
        """Of the world that the session has its actors in; one that is loaded later has another."""
        self._closed = False
        self._tidying = False
        """Whether :meth:`close` has begun to tidy up; a signal may have ended it."""
        self._found: carla.WorldSettings | None = None
        """The settings to give back."""
        self._actors: list[carla.Actor] = []
        self._listening: list[tuple[carla.Sensor, weakref.ref[Callable[[Any], object]]]] = []
        self._farewells: list[Callable[[], None]] = []
        atexit.register(self.close)
        self._handle_signals()
        try:
            self._own_tick()
            _owners[self.address] = self
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, host: str, port: int, timeout: float = 10.0) -> Session:
        """Connect to a server and take over its tick.

        Args:
            timeout: seconds for the connection, and later for every call and tick.

        Raises:
            UserError: nothing listens there in time, its version is another one, or another client owns the tick.
            SimulatorGone: it does not answer: it hangs, or it is no CARLA server.
        """
        _wait_for_port(host, port, timeout)
        client = carla.Client(host, port, worker_threads=1)  # one: sensor data are handled in the order they come in
        client.set_timeout(timeout)
        _have_a_cache(client)
        try:
            version = client.get_server_version()
        except RuntimeError as error:
            raise SimulatorGone(
                f"{host}:{port} accepts connections but does not answer as a CARLA server ({describe(error)}); "
                "check the port."
            ) from None
        if version != VERSION:
            raise UserError(
                f"The server at {host}:{port} is CARLA {version}, this client is {VERSION}; "
                f"start a CARLA {VERSION} server or the embedded simulator."
            )
        try:
            return cls(client, host, port, timeout)
        except RuntimeError as error:
            raise UserError(f"The simulator at {host}:{port} broke off: {describe(error)}; start it again.") from None

    def _own_tick(self) -> None:
        self.world = self.client.get_world()
        found = self.world.get_settings()
        self.found_synchronous = found.synchronous_mode
        if found.synchronous_mode:
            self._refuse_if_owned()
            found.synchronous_mode = False  # its owner is dead, or the world would move
        self._found = found
        settings = self.world.get_settings()
        self.found_rendered = not settings.no_rendering_mode
        settings.synchronous_mode, settings.no_rendering_mode = True, False
        settings.fixed_delta_seconds = TICK
        self.world.apply_settings(settings)
        snapshot = self.world.get_snapshot()
        self.frame, self._world_id = snapshot.frame, snapshot.id
        self.map = self.world.get_map()
        self.blueprints = self.world.get_blueprint_library()
        self._remove_leftovers()

    def _refuse_if_owned(self) -> None:
        """Refuse a server whose tick a living client owns: the world moves, or its actors name a living process.

        Raises:
            UserError: there is such a client.
        """
        if self.address in _owners:
            raise UserError(f"This process already owns the tick of {self.address}; close that session first.")
        with contextlib.suppress(RuntimeError):  # the state a new subscriber is sent, or none
            self.world.wait_for_tick(OWNER_WAIT / 2)
        before = self.world.get_snapshot().frame
        with contextlib.suppress(RuntimeError):
            self.world.wait_for_tick(OWNER_WAIT)
        after = self.world.get_snapshot().frame
        owners = {owner for actor in self.world.get_actors() if (owner := _owner(actor)) and owner.alive}
        owners.discard(_Owner(socket.gethostname(), os.getpid()))  # left by a session that lost its simulator
        if after == before and not owners:
            return
        who = str(owners.pop()) if owners else "Another client"
        raise UserError(
            f"{who} owns the tick of {self.address}; stop it (if it is dead already, restart the simulator), "
            "or use another simulator."
        )

    def _remove_leftovers(self) -> None:
        """Destroy what killed sessions of this program on this machine left behind."""
        here = socket.gethostname()
        ours = [a for a in self.world.get_actors() if (owner := _owner(a)) and owner.host == here]
        for actor in sorted(ours, key=lambda a: not a.type_id.startswith("sensor.")):
            actor.destroy()

    # ------------------------------------------------------------------------------------------------- frames

    def tick(self) -> carla.WorldSnapshot:
        """Advance one frame and return its state.

        Raises:
            SimulatorGone: no answer comes within the time limit, or somebody has loaded the world anew.
            UserError: somebody else ticks too.
        """
        try:
            self.ticking_from = self.world.get_snapshot().frame
            frame = self.world.tick(self.timeout)
            snapshot = self.world.get_snapshot()
        except RuntimeError as error:
            raise self.lost(describe(error)) from None
        finally:
            self.ticking_from = None
        if snapshot.id != self._world_id:
            self.gone = True
            self._actors.clear()  # they went with the old world
            raise SimulatorGone(f"Another client has loaded the world of {self.address} anew; connect anew.")
        if self.frame and (frame != self.frame + 1 or snapshot.frame != frame):
            raise UserError(
                f"Another client also ticks {self.address}: frame {max(frame, snapshot.frame)} came after "
                f"{self.frame}; only one client may own the tick."
            )
        self.frame = frame
        return snapshot

    def lost(self, reason: str) -> SimulatorGone:
        """Mark the simulator as gone; the error to raise."""
        self.gone = True
        return SimulatorGone(f"The simulator at {self.address} is gone ({reason}); start it again and connect anew.")

    # ------------------------------------------------------------------------------------------------- actors

    def blueprint(self, name: str, **attributes: object) -> carla.ActorBlueprint:
        """A blueprint with our role name and the attributes set; UserError if the server does not have it."""
        try:
            blueprint = self.blueprints.find(name)
        except IndexError:
            raise UserError(
                f"The simulator at {self.address} has no blueprint {name!r}; start a CARLA {VERSION} server or the "
                "embedded simulator."
            ) from None
        if blueprint.has_attribute("role_name"):
            blueprint.set_attribute("role_name", f"{ROLE} {socket.gethostname()} {os.getpid()}")
        for attribute, value in attributes.items():
            blueprint.set_attribute(attribute, str(value))
        return blueprint

    def spawn(
        self, blueprint: carla.ActorBlueprint, transform: carla.Transform, parent: carla.Actor | None = None
    ) -> carla.Actor:
        """Make an actor that the session destroys when it closes.

        Raises:
            UserError: the server refuses it.
            SimulatorGone: it does not answer.
        """
        try:
            actor = self.world.spawn_actor(blueprint, transform, attach_to=parent)
        except RuntimeError as error:
            if _TIME_OUT.match(str(error)):
                raise self.lost(describe(error)) from None
            raise UserError(
                f"{self.address} does not spawn {blueprint.id} ({describe(error)}); restart the simulator."
            ) from None
        self._actors.append(actor)
        return actor

    def listen(self, sensor: carla.Sensor, receive: Callable[[Any], object]) -> None:
        """Have ``receive`` called in the client's thread with each message of a sensor; :meth:`close` ends it."""
        self._listening = [(other, held) for other, held in self._listening if held() is not None]
        self._listening.append((sensor, listen(sensor, receive)))

    def destroy(self, actor: carla.Actor) -> None:
        """Destroy an actor made by :meth:`spawn`, if nobody else has.

        Raises:
            SimulatorGone: the server does not answer.
        """
        if actor not in self._actors:  # gone with its world
            return
        try:
            if isinstance(actor, carla.Sensor) and actor.is_listening():
                actor.stop()
            # Not asked for is_alive before: until the first tick the library reads it from uninitialised memory.
            if not actor.destroy():  # somebody else has, or there was no answer
                self.client.get_server_version()
        except RuntimeError as error:
            raise self.lost(describe(error)) from None
        self._actors.remove(actor)

    # ---------------------------------------------------------------------------------------------------- end

    def before_close(self, farewell: Callable[[], None]) -> None:
        """Have ``farewell`` called, the last given first, before the own actors are destroyed."""
        self._farewells.append(farewell)

    def close(self) -> None:
        """Stop the sensors, destroy the own actors, last made first, and give the server its settings back.

        Safe to call twice. A server that does not answer now is left to a further call, and to the end of the
        interpreter: it may only be hung, and what is left on it would stand there for ever. So is one whose tidying a
        signal interrupts.
        """
        if self._closed:
            return
        self._stop_listening()
        if _owners.get(self.address, self) is not self:  # a later session, which has removed what this one left
            self._end()
            return
        _owners.pop(self.address, None)
        self.client.set_timeout(CLOSE_TIMEOUT)
        if self.gone and not self._answers():
            return
        if self._found is not None:
            self._tidy(self._found)
        if not self.gone:
            self._end()

    def _stop_listening(self) -> None:
        """Have the client's thread let go of what it calls, which at the end of the interpreter it must not hold."""
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for sensor, held in self._listening:
            while held() is not None and time.monotonic() < deadline:
                with contextlib.suppress(RuntimeError):  # where its thread closes the same connection
                    if sensor.is_listening():
                        sensor.stop()
                time.sleep(0.001)
        self._listening.clear()

    def _tidy(self, found: carla.WorldSettings) -> None:
        """Leave the server as it was found; ``gone`` says afterwards whether it stopped answering."""
        more = self.gone or self._tidying  # made by calls without an answer, or lost track of by what was interrupted
        self.gone, self._tidying = False, True
        self.frame = 0  # a tick without an answer may have happened all the same
        while self._farewells and not self.gone:
            with contextlib.suppress(RuntimeError, UserError):  # the rest is tidied up all the same
                self._farewells.pop()()
        if self.gone:
            return
        try:
            while self._actors:
                self.destroy(self._actors[-1])
            if more:
                self._remove_leftovers()
            self.world.apply_settings(found)
        except (RuntimeError, SimulatorGone):
            self.gone = True

    def _answers(self) -> bool:
        try:
            self.client.get_server_version()
        except RuntimeError:
            return False
        return True

    def _end(self) -> None:
        self._closed = True
        atexit.unregister(self.close)
        self._restore_signals()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle_signals(self) -> None:
        self._handled: list[signal.Signals] = []
        if threading.current_thread() is threading.main_thread():
            self._handled = [n for n in ENDING if signal.getsignal(n) is signal.SIG_DFL]
        for number in self._handled:
            signal.signal(number, _exit_on_signal)

    def _restore_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._handled:
                if signal.getsignal(number) is _exit_on_signal:
                    signal.signal(number, signal.SIG_DFL)


def listen(sensor: carla.Sensor, receive: Callable[[Any], object]) -> weakref.ref[Callable[[Any], object]]:
    """Have ``receive`` called with each message of a sensor, in a thread of the client library.

    Returns:
        What is alive until the sensor was stopped and that thread has let go of ``receive``. Wait for that before the
        interpreter ends: the thread needs Python's lock to call ``receive`` and to let go of it, and an ending
        interpreter ends a thread that asks for it, which the library answers with an abort.
    """

    def deliver(message: Any) -> None:
        receive(message)

    sensor.listen(deliver)
    return weakref.ref(deliver)


class SensorStream:
    """The data of one sensor, taken by frame number.

    Args:
        sensor: starts to listen; one message a frame is expected.
    """

    def __init__(self, session: Session, sensor: carla.Sensor):
        self._session = session
        self._name = sensor.type_id
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        session.listen(sensor, self._queue.put)

    def take(self, frame: int) -> Any:
        """The message of ``frame``; older ones are dropped.

        Raises:
            SimulatorGone: it has not come within the session's time limit, or a later one has: then it will not come.
        """
        data = self.poll(frame, self._session.timeout)
        if data is None:
            raise self._session.lost(f"{self._name} sent nothing for frame {frame} in {self._session.timeout:g} s")
        return data

    def poll(self, frame: int, timeout: float) -> Any:
        """The message of ``frame``, or None if it has not come after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                data = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if data.frame == frame:
                return data
            if data.frame > frame:
                raise self._session.lost(f"{self._name} skipped frame {frame}")


class _Owner(NamedTuple):
    """Whose an actor with our role name is."""

    host: str
    process: int

    @property
    def alive(self) -> bool:
        """Whether that process runs; on another machine, which cannot be looked up, it is taken to."""
        if self.host != socket.gethostname():
            return True
        try:
            state = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    def __str__(self) -> str:
        return f"The process {self.process} on {self.host}"


def _owner(actor: carla.Actor) -> _Owner | None:
    match actor.attributes.get("role_name", "").split():
        case [word, host, process] if word == ROLE and process.isdigit():
            return _Owner(host, int(process))
    return None


def _wait_for_port(host: str, port: int, timeout: float) -> None:
    """Return once something accepts connections there; a server that is just starting gets the whole time limit."""
    if not 0 < port < 65536:
        raise UserError(f"Port {port} does not exist; choose one from 1 to 65535.")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() + 0.1 >= deadline:
                raise UserError(
                    f"No simulator answers on {host}:{port} ({error.strerror or error}); start one with "
                    f"'carla-digr simulator --port {port}', or a CARLA {VERSION} server."
                ) from None
        time.sleep(0.1)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _have_a_cache(client: carla.Client) -> None:
    """Where the client cannot keep what it downloads at home, let it do so in a directory of this process.

    It downloads where walkers may go when it connects, and without a place for that it fails.
    """
    cache = Path(os.environ.get("HOME", "/"), "carlaCache")
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):
        directory = tempfile.mkdtemp(prefix="carla-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        client.set_files_base_folder(directory)


def describe(error: Exception) -> str:
    """What an error of the client library says, in a few words."""
    if found := _TIME_OUT.match(str(error)):
        return f"no answer in {int(found[1]) / 1000:g} s"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
