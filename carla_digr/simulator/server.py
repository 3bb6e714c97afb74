"""The embedded highway as a server that speaks CARLA 0.9.16's protocol: sockets and time.

One process, one thread, two TCP ports: msgpack-rpc on the first, streams on the second. Must not run in the process
of a CARLA client, which holds Python's global lock while it waits for answers.

    python -m carla_digr.simulator.server --port 2000
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from carla_digr.errors import UserError, tell
from carla_digr.scheduling import DRIVES, go_first
from carla_digr.simulator import add_server_options, calls, recorder_calls, sensors, streaming, walker_calls, wire
from carla_digr.simulator.batches import apply_batch
from carla_digr.simulator.connections import STALL_LIMIT, Connection, Connections, RpcConnection, StreamConnection
from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.frames import advance
from carla_digr.simulator.process import bind, end, exit_with, listen, run_instances
from carla_digr.simulator.refusals import REFUSED, refusal
from carla_digr.simulator.road import MAP_NAME
from carla_digr.simulator.rpc import METHODS, answer
from carla_digr.simulator.world import Camera

OFFERED = (calls, recorder_calls, walker_calls)  # what fills METHODS
OPENDRIVE_MAP = "OpenDriveMap"  # what clients call the map of the OpenDRIVE text they sent before
ANNOUNCED_LIMIT = 0.5  # s a tick waits for streams whose token was handed out
EPISODE_SWITCH_LIMIT = 1.0  # s after which a new episode begins even if its client does not come back
PARENT_CHECK = 0.25  # s
FAREWELL = 3.0  # s that SIGINT leaves clients to disconnect
HOLD_LIMIT = 5.0  # s a frame waits for clients that read slowly; then they are disconnected
MAX_COMPLAINTS = 200  # calls whose refusal goes to the log
BATCH_SLICE = 0.01  # s of a batch before the other clients are heard again

NewEpisode = Callable[[int, int, wire.EpisodeSettings, int], Episode]

log = logging.getLogger(__name__)


class Server:
    """Binds both ports and serves until the process ends.

    Args:
        host: address to listen on.
        port: of the RPC channel, streams are one above; 0 takes two free ones.
        new_episode: makes an episode from its number, first frame, settings and the port of the streams.
        all_sensors: whether to compile the code of sensors that drives do not have too, 10 s the very first time.
            Otherwise the first client that has one waits for it.

    Raises:
        UserError: a port cannot be had.
    """

    def __init__(self, host: str, port: int, new_episode: NewEpisode = Episode, all_sensors: bool = True):
        self._new_episode = new_episode
        self._clients = Connections(self._forget)
        self._rpc = bind(host, port)
        self.port: int = self._rpc.getsockname()[1]
        self._streaming = bind(host, port + 1 if port else 0)
        self.streaming_port: int = self._streaming.getsockname()[1]
        self._clients.welcome(self._rpc, RpcConnection)
        self._clients.welcome(self._streaming, StreamConnection)
        self._announced: list[tuple[int, RpcConnection, float]] = []
        """Streams whose token was handed out: id, to whom, and until when ticks wait for them."""
        self._ticks: deque[tuple[RpcConnection, int]] = deque()
        """tick_cue calls not answered yet."""
        self._batches: deque[RpcConnection] = deque()
        """Whose batch is under way, the next to go on with first."""
        self._held_since: float | None = None
        """When the next frame began to wait for clients that have not read the last ones."""
        self._switch: tuple[RpcConnection, float, bool] | None = None
        """A new episode that was asked for: by whom, when at the latest, and whether settings are reset."""
        self._complained: set[str] = set()
        """Calls whose refusal the log has."""
        self._next_step = time.monotonic()
        self._leave_at: float | None = None
        self._episode = Episode(1, 0, wire.EpisodeSettings(), self.streaming_port)
        self._warm_up(all_sensors)
        # A collection over all that numba has loaded, for one client's long call, takes two frames of the others.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000)
        # Only now: a client that got through would time out while the numba code is being compiled.
        for listener in (self._rpc, self._streaming):
            listen(listener)

    def leave(self) -> None:
        """End soon: when the last client has gone, at the latest after FAREWELL.

        A Ctrl-C in a terminal and the end of a ROS launch reach simulator and clients together, and may come twice; a
        client that is in the middle of a tick would otherwise wait for its time limit instead of tidying up.
        """
        self._leave_at = self._leave_at or time.monotonic() + FAREWELL

    def serve(self, parent: int | None) -> None:
        """Serve until :meth:`leave`, which the end of the process ``parent`` of this one calls too, if there is one."""
        check = 0.0
        while True:
            for connection in self._clients.wait(self._timeout()):
                if connection in self._clients:
                    self._read(connection)
            self._go_on_with_batch()
            now = time.monotonic()
            if self._leave_at is not None and (now >= self._leave_at or not self._clients):
                self._episode.tape.stop()
                return
            if self._switch is not None and now >= self._switch[1]:
                self._begin_episode()
            self._step_if_due(now)
            if now >= check:
                check = now + PARENT_CHECK
                if parent is not None and os.getppid() != parent:
                    self.leave()
                self._clients.close_silent(now)

    # -------------------------------------------------------------------------------------------------- frames

    def _warm_up(self, all_sensors: bool) -> None:
        """Compile or load the numba code before the first client waits for it, and make the first frame."""
        vehicle = self._episode.world.spawn_vehicle(0, *self._episode.world.road.spawn_points[0])
        camera = Camera(vehicle, -9.5, 0.0, 4.2, -0.1, 0.0, 0.0, 32, 32, 48.0)
        self._episode.world.render(camera)
        self._episode.world.depths(camera)
        if all_sensors:
            sensors.warm_up(self._episode.world, camera)
        self._step()
        self._episode = self._new_episode(1, self._episode.world.frame, wire.EpisodeSettings(), self.streaming_port)
        self._step()

    def _timeout(self) -> float:
        """Seconds until something is due without any message."""
        if self._batches:
            return 0.0
        now = time.monotonic()
        due = now + PARENT_CHECK
        if self._ticks:
            limits = [limit for _, _, limit in self._announced] + [
                c.taken + STALL_LIMIT for c in self._clients.slow(now)
            ]
            due = min(limits, default=now)
        if self._switch is not None:
            due = min(due, self._switch[1])
        if not self._episode.settings.synchronous:
            due = min(due, self._next_step)
        return max(0.0, due - now)

    def _step_if_due(self, now: float) -> None:
        """Tick for the client that asked, or by the clock in asynchronous mode."""
        if not self._episode.settings.synchronous:
            while self._ticks:
                self._answer_tick(self._episode.world.frame + 1)
            if now >= self._next_step:
                self._step()
                self._next_step = max(self._next_step + self._episode.delta, now)
            return
        self._announced = [a for a in self._announced if now < a[2]]
        if not self._ticks:
            self._held_since = None  # whoever waited has given up
        if not self._ticks or self._announced:
            return
        if awaited := self._clients.slow(now):
            self._held_since = self._held_since or now
            if now - self._held_since > HOLD_LIMIT:
                log.warning("a client that reads too slowly was disconnected")
                for connection in awaited:
                    self._clients.close(connection)
        else:
            self._held_since = None
            self._step()  # one frame at a time: other clients are heard in between
            self._answer_tick(self._episode.world.frame)

    def _step(self) -> None:
        """Advance one frame and send its messages: sensors first, then the world state."""
        for stream, message in advance(self._episode, self._clients.subscribers):
            self._clients.publish(stream, message)

    def _answer_tick(self, frame: int) -> None:
        connection, call_id = self._ticks.popleft()
        self._clients.send(connection, wire.response(call_id, wire.value(frame)))

    def _begin_episode(self) -> None:
        """Replace the world; its streams end, frames go on counting."""
        assert self._switch is not None
        old, (_, _, reset) = self._episode, self._switch
        self._switch = None
        settings = wire.EpisodeSettings() if reset else old.settings
        self._episode = self._new_episode(old.number + 1, old.world.frame, settings, self.streaming_port)
        self._episode.traffic_managers = old.traffic_managers
        old.tape.stop()
        self._episode.tape = replace(old.tape, playback=None)
        self._end_dead_streams()

    # --------------------------------------------------------------------------------------------------- calls

    def _dispatch(self, connection: RpcConnection, request: wire.Request) -> None:
        name, arguments = request.method, request.arguments
        if name == "tick_cue":
            if self._episode.takes_tick(id(connection)):
                self._ticks.append((connection, request.call_id))
            return
        if name == "apply_batch":
            connection.batch = request.call_id, apply_batch(self._episode, arguments[0] if arguments else None)
            self._batches.append(connection)
            return
        result: Any
        if name == "get_sensor_token":
            result = self._announce(connection, arguments)
        elif name in ("load_new_episode", "copy_opendrive_to_file"):
            result = self._load(connection, name, arguments)
        elif name in METHODS:
            if name == "get_episode_info" and self._switch is not None and self._switch[0] is connection:
                self._begin_episode()  # the client has dropped its old world by now
            result = self._answer(name, arguments)
            if request.asynchronous and (said := wire.error_in(result)):  # whose client does not look at the answer
                self._complain(name, said)
        else:
            self._complain(name, refusal(name))
            if name not in REFUSED:
                self._clients.send(connection, wire.refusal(request.call_id, refusal(name)))
                return
            result = (wire.value_error if REFUSED[name].returns else wire.void_error)(refusal(name))
        self._clients.send(connection, wire.response(request.call_id, result))
        if name == "destroy_actor":
            self._end_dead_streams()

    def _complain(self, name: str, sentence: str) -> None:
        """Say in the log what a client will not tell its user; of each call the first time."""
        if name not in self._complained and len(self._complained) < MAX_COMPLAINTS:
            self._complained.add(name)
            log.warning("%.60s: %s", name, sentence)

    def _answer(self, name: str, arguments: list[Any]) -> list[Any]:
        try:
            return answer(self._episode, name, arguments)
        except Exception:  # a defect met by one client must not end the drive of the others
            log.exception("%s failed", name)
            error = f"{name}: internal error of the simulator, see its log"
            return wire.value_error(error) if METHODS[name].returns else wire.void_error(error)

    def _go_on_with_batch(self) -> None:
        """Give the batch whose turn it is its time; when it is done, answer it and what its client has sent since."""
        if not self._batches:
            return
        connection = self._batches.popleft()
        assert connection.batch is not None
        (call_id, batch), end = connection.batch, time.monotonic() + BATCH_SLICE
        result: list[Any]
        try:
            while time.monotonic() < end:
                next(batch)
            self._batches.append(connection)
            return
        except StopIteration as done:
            result = done.value
        except CallFailed as error:
            result = [wire.value_error(str(error))]
        except Exception:  # see _answer
            log.exception("apply_batch failed")
            result = [wire.value_error("apply_batch: internal error of the simulator, see its log")]
        connection.batch = None
        self._clients.send(connection, wire.response(call_id, result))
        self._end_dead_streams()
        self._serve(connection)

    def _serve(self, connection: RpcConnection) -> None:
        """Dispatch what a client has sent, up to the first batch."""
        try:
            while connection.batch is None and connection in self._clients:  # an unread answer may have closed it
                request = next(connection.requests, None)
                if request is None:
                    return
                self._dispatch(connection, request)
        except wire.ProtocolError as error:
            log.warning("a client was disconnected: %s", error)
            self._clients.close(connection)

    def _announce(self, connection: RpcConnection, arguments: list[Any]) -> list[Any]:
        match arguments:
            case [int(stream)] if stream in self._episode.streams:
                self._announced.append((stream, connection, time.monotonic() + ANNOUNCED_LIMIT))
                return wire.value((streaming.token(stream, self.streaming_port),))
        return wire.value_error(f"there is no stream {arguments!r:.40}")

    def _load(self, connection: RpcConnection, name: str, arguments: list[Any]) -> list[Any]:
        """Promise a new episode; it begins when this client, having dropped its world, asks for the episode again."""
        match name, arguments:
            case "load_new_episode", [str(map_name), bool(reset), *_]:
                if map_name.rsplit("/", 1)[-1] not in ("", MAP_NAME, OPENDRIVE_MAP):
                    return wire.void_error(f"this simulator has no map {map_name!r:.80}, only {MAP_NAME}")
                self._switch = connection, time.monotonic() + EPISODE_SWITCH_LIMIT, reset
                return wire.done()
            case "copy_opendrive_to_file", [str(text), *_]:
                if text.split() == self._episode.world.road.opendrive().split():
                    return wire.done()
                return wire.void_error(f"this simulator builds no road from OpenDRIVE but its own, {MAP_NAME}")
        return wire.void_error(f"{name}: wrong arguments")

    # --------------------------------------------------------------------------------------------- connections

    def _forget(self, connection: RpcConnection) -> None:
        """Drop what a client that is gone was waiting for."""
        self._announced = [a for a in self._announced if a[1] is not connection]
        self._ticks = deque(t for t in self._ticks if t[0] is not connection)
        if connection.batch is not None:
            self._batches.remove(connection)

    def _end_dead_streams(self) -> None:
        self._clients.close_streams_but(self._episode.streams)
        self._announced = [a for a in self._announced if a[0] in self._episode.streams]

    def _read(self, connection: Connection) -> None:
        if isinstance(connection, RpcConnection) and connection.batch is not None:
            return  # what it sends waits for its batch
        data = self._clients.receive(connection)
        if not data:
            return
        if isinstance(connection, RpcConnection):
            connection.requests = connection.reader.feed(data)
            self._serve(connection)
        elif isinstance(connection, StreamConnection) and not connection.stream:
            connection.incoming += data[: streaming.SUBSCRIPTION.size - len(connection.incoming)]
            if len(connection.incoming) == streaming.SUBSCRIPTION.size:
                self._subscribe(connection, streaming.SUBSCRIPTION.unpack(connection.incoming)[0])

    def _subscribe(self, connection: StreamConnection, stream: int) -> None:
        # An unknown stream is left open and silent until the time limit: closed at once, the client of a sensor that
        # somebody else destroyed would reconnect without pause.
        if stream not in self._episode.streams:
            return
        self._clients.subscribe(connection, stream)
        for i, (announced, _, _) in enumerate(self._announced):
            if announced == stream:
                del self._announced[i]
                break
        if stream == streaming.WORLD_STREAM:
            self._clients.send(connection, self._episode.state())  # or a client of a halted world would see it empty


def run(
    host: str,
    port: int,
    parent: int | None = None,
    new_episode: NewEpisode = Episode,
    all_sensors: bool = True,
    realtime: bool = False,
) -> None:
    """Serve until SIGTERM, SIGINT or the end of the parent process.

    SIGTERM ends it at once, SIGINT and the end of the parent when its clients have left, see :meth:`Server.leave`.

    Args:
        parent: the process with which to end, which must be the one that started this; None: with no other.
        new_episode, all_sensors: see :class:`Server`.
        realtime: go before the machine's ordinary processes where the system grants it.

    Raises:
        UserError: a port cannot be had.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end())
    if parent is not None:
        exit_with(parent)
    server = Server(host, port, new_episode, all_sensors)
    signal.signal(signal.SIGINT, lambda *_: server.leave())
    if parent is not None:
        exit_with(parent, server.leave)
    if realtime:
        go_first(DRIVES)
    print(
        f"carla_digr simulator ready: CARLA {wire.VERSION} protocol on {host}:{server.port}, "
        f"streams on {server.streaming_port}",
        flush=True,
    )
    server.serve(parent)
    end()


def run_with(arguments: argparse.Namespace) -> None:
    """Serve with the options of :func:`add_server_options`.

    Raises:
        UserError: a port cannot be had, or there is no such trait.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    new_episode: NewEpisode = Episode
    if arguments.like or arguments.traits:
        from carla_digr.simulator import awkward

        sizes = awkward.chosen_traits(arguments.like, arguments.traits)
        new_episode = awkward.episodes(sizes, abs(arguments.seed))
    if arguments.instances != 1:
        options = ["--host", arguments.host, f"--traits={arguments.traits}", "--seed", str(arguments.seed)]
        options += ["--like", arguments.like] if arguments.like else []
        options += ["--realtime"] if arguments.realtime else []
        run_instances(arguments.instances, arguments.port, arguments.parent, options)
        return
    whole = arguments.parent is None or arguments.whole  # who starts one for itself drives by cameras
    run(arguments.host, arguments.port, arguments.parent, new_episode, whole, arguments.realtime)


def main() -> None:
    """``python -m carla_digr.simulator.server``."""
    parser = argparse.ArgumentParser(description="Embedded highway that speaks CARLA 0.9.16's protocol.")
    add_server_options(parser)
    try:
        run_with(parser.parse_args())
    except UserError as error:
        sys.exit(tell(error))


if __name__ == "__main__":
    main()
