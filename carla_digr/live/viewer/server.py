"""The live web page's server: aiohttp in a thread of its own, one WebSocket message per frame, newest frame wins.

For the program that has the frames (the ROS viewer node, or any other)::

    from carla_digr.live.viewer.server import ViewerServer

    with ViewerServer(host="127.0.0.1", port=8765) as viewer:  # UserError if the port cannot be had
        print(viewer.url)                                       # http://127.0.0.1:8765/
        viewer.publish(stamp, frame, rgb, saliency, decision)   # any thread, never waits for a client
        viewer.status()                                         # the same dict as GET /api/status

The port is bound and served when the constructor returns; ``port=0`` takes a free one (see ``viewer.port``);
``close()`` may be called twice and ends within about a second, whatever the clients do.

``decision`` is a dict; the page shows what it finds and a dash for what is missing or not finite:

==================  ===============  =====================================================================
key                 type             meaning
==================  ===============  =====================================================================
action_names        list[str]        names of the A actions
probabilities       list[float]      policy's probabilities of the A actions
action              int              index of the action taken
throttle, brake     float [0, 1]     what was sent to the vehicle
steer               float [-1, 1]    what was sent to the vehicle, positive to the right
value               float            critic's value
policy_hash         str              first digits of the weights' SHA-256
map                 str              how the map is made, such as "DIGR" or "Vanilla Gradient of brake"
sentence            str, optional    what in view decides, in words
objects             list, optional   the same in figures: `page_decision.page_objects`
trust               float [-1, 1]    agreement of a recent map with a perturbation map of its frame
trust_age           float, s         since that frame
inference_ms        float, ms        policy forward pass
saliency_ms         float, ms        explanation
latency_ms          float, ms        camera frame to overlay
fallback            bool             the vehicle is not driven by the policy (watchdog): shown as an alarm
saliency_flat       bool             the map has no gradient to show
status              str, optional    a sentence to show; with ``fallback`` it is the alarm's text
events              list, optional   short names of what happened in this frame, e.g. ``["collision"]``
==================  ===============  =====================================================================

``saliency=None`` says that this frame has no explanation; the page says so and shows the camera alone.

Wire format, for other clients of ``/ws`` (all integers little-endian). A text message is JSON: first ``{"type":
"hello", ...}`` (with ``recording``: whether this page shows recordings, ``asking``: whether it answers questions, and
``colormap``: red, green and blue of the map's 256 levels, one after another), ``{"type": "colours", "colormap":
...}`` when these change, ``{"type": "state", ...}`` with what `tell` was given, and ``{"type": "beat"}`` about once a
second while there is no new frame. Requests of a page: docstrings of control.py and asking.py. A binary message is one
frame: uint32 n, then n bytes of JSON header (``sequence``, ``published`` (s, server's monotonic clock), ``frame``,
``stamp`` (s), ``width``, ``height``, ``jpeg_bytes``, ``saliency``: [height, width] or null, ``decision``), then the
JPEG picture, then the saliency map as height x width bytes. A client answers each frame by its ``sequence`` as text;
the server leaves at most ``client.WINDOW`` frames unanswered and then keeps only the newest frame for that client. That
bounds the memory and the age of the picture for a client that is slow, frozen or gone.

With recordings instead of a drive, ``GET /api/recording`` is `recorded.Recorded.description` and
``GET /api/recording/SIDE/INDEX`` a binary message of one frame, its header without what the description has already;
with a folder of them ``?bag=NAME`` of ``GET /api/recordings`` says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError

from carla_digr import __version__
from carla_digr.errors import UserError
from carla_digr.live.viewer.address import bind, host_name, is_address, is_loopback
from carla_digr.live.viewer.assets import ASSETS, STATIC, add_security_headers, asset
from carla_digr.live.viewer.client import Client, Frame
from carla_digr.live.viewer.control import Controls, Gate, answer, done, new_token
from carla_digr.live.viewer.message import plain
from carla_digr.saliency.overlay import COLORMAP, colours

if TYPE_CHECKING:
    from carla_digr.live.viewer.asking import Asking
    from carla_digr.live.viewer.recorded import Recorded
    from carla_digr.live.viewer.shelf import Shelf

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0  # that a request may take to arrive, and a connection may be idle
PING_SECONDS = 20.0  # WebSocket pings; a client that answers none for half of this is dropped


class ViewerServer:
    """Serves the live page; see the module's docstring for use, the decision's fields and the wire format.

    Args:
        host: address to bind. Loopback by default: to watch needs no login, so bind others only in a trusted network.
        port: TCP port, 0 for any free one.
        colormap: colours of the map, one of `carla_digr.saliency.overlay.COLORMAPS`; the page mixes them into the
            picture as `overlay` does. `change_colormap` changes them later.
        recorded: recordings to show instead of a live drive, or a folder of them; nothing is published then.
        controls: does what pages want that have the token of `address`; None: they can do nothing.
        asking: answers what such pages ask about a frame.
        allowed_hosts: names under which browsers may reach the page besides ``localhost``, IP addresses, ``host`` and
            this machine's own name. Other names are refused, so that no web site can reach the page by DNS rebinding.

    Raises:
        UserError: the address cannot be bound, or there is no such colour map.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8765,
        *,
        colormap: str = COLORMAP,
        recorded: Recorded | Shelf | None = None,
        controls: Controls | None = None,
        asking: Asking | None = None,
        allowed_hosts: Iterable[str] = (),
    ):
        self._colours = _numbers(colormap)  # used by the server's thread alone, once that runs
        self._recorded = recorded
        self._controls = controls
        self._asking = asking
        self._token = None if controls is None and asking is None else new_token()
        self._state: dict[str, Any] = {}  # the server's thread's, as
        self._doing: set[asyncio.Task[None]] = set()
        self._socket = bind(host, port)
        if not is_loopback(host):
            log.warning(
                "The page at %s is open to everybody who reaches this machine, who needs no login to look: better "
                "leave it on 127.0.0.1 and look at it through `ssh -L`.",
                host or "every address",
            )
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        machine = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), machine, f"{machine}.local"}
        self._names.update(name.lower() for name in allowed_hosts)
        self._clients: dict[int, Client] = {}
        self._connections = 0
        self._started = time.monotonic()

        self._lock = threading.Lock()  # guards what follows; held for a few assignments only
        self._newest: Frame | None = None
        self._sequence = 0
        self._publish_times: deque[float] = deque(maxlen=64)
        self._distribution_due = False
        self._closed = False

        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        serving: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(serving,), name="viewer", daemon=True)
        self._thread.start()
        serving.result()

    @property
    def url(self) -> str:
        """Address to open in a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}/" if ":" in host else f"http://{host}:{self.port}/"

    @property
    def address(self) -> str:
        """The same with the token, by which a page may control; for who started the server."""
        return self.url if self._token is None else f"{self.url}#token={self._token}"

    def publish(
        self,
        stamp: float,
        frame: int,
        rgb: np.ndarray,
        saliency: np.ndarray | None,
        decision: Mapping[str, Any],
        state: np.ndarray | None = None,
    ) -> None:
        """Show one frame. Callable from any thread; copies its arguments and returns at once.

        A frame that is still waiting for a client is replaced. After ``close()`` this does nothing.

        Args:
            stamp: the camera frame's time in s.
            frame: the camera frame's number.
            rgb: uint8 (H, W, 3).
            saliency: floating point (h, w) in [0, 1] (values outside are clipped), or None if there is none.
            decision: see the module's docstring.
            state: uint8 (H, W, C), what the policy saw, for questions about it; None: the picture.

        Raises:
            UserError: an array has the wrong shape or type.
        """
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
            raise UserError(f"The viewer needs a uint8 (H, W, 3) picture, not {rgb.dtype} {rgb.shape}: convert it.")
        if saliency is not None:
            if saliency.ndim != 2 or saliency.dtype.kind != "f":
                raise UserError(
                    f"The viewer needs a floating point (h, w) map, not {saliency.dtype} {saliency.shape}: convert it."
                )
            saliency = np.array(saliency, dtype=np.float32)
            if not np.isfinite(saliency).all():
                saliency = None
        now = time.monotonic()
        header: dict[str, Any] = {
            "published": round(now, 6),
            "frame": int(frame),
            "stamp": float(stamp),
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "saliency": None if saliency is None else list(saliency.shape),
            "decision": plain(decision),
        }
        picture = np.array(rgb, order="C")
        with self._lock:
            if self._closed:
                return
            self._sequence += 1
            self._newest = Frame({"sequence": self._sequence, **header}, picture, saliency)
            if self._asking is not None:
                self._asking.keep(self._sequence, picture if state is None else np.array(state))
            self._publish_times.append(now)
            if not self._distribution_due:
                self._distribution_due = True
                self._loop.call_soon_threadsafe(self._distribute)

    def change_colormap(self, colormap: str) -> None:
        """Show maps in other colours from now on, on open pages too. Callable from any thread.

        Raises:
            UserError: there is no such colour map.
        """
        numbers = _numbers(colormap)
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._recolour, numbers)

    def tell(self, state: Mapping[str, Any]) -> None:
        """Tell all pages, and those to come, what is so beside the frames. Callable from any thread.

        Args:
            state: the keys that have changed, with values in JSON's types.
        """
        changed = plain(state)
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._tell, changed)

    def status(self) -> dict[str, Any]:
        """Figures: ``published`` frames, ``rate_hz`` over the last 2 s, ``uptime_s``, the latest frame, the clients.

        ``latest`` is None or ``{frame, stamp, age_s}``; ``clients`` lists ``{id, connected_s, sent, dropped,
        unanswered}``, where ``dropped`` counts frames published since the client connected that it will never get.
        """
        now = time.monotonic()
        with self._lock:
            newest, published = self._newest, self._sequence
            recent = [moment for moment in self._publish_times if now - moment <= 2.0]
        rate = (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else 0.0
        latest = None
        if newest is not None:
            age = now - newest.header["published"]
            latest = {"frame": newest.header["frame"], "stamp": newest.header["stamp"], "age_s": round(age, 3)}
        return {
            "version": __version__,
            "uptime_s": round(now - self._started, 3),
            "published": published,
            "rate_hz": round(rate, 2),
            "latest": latest,
            "clients": [
                {
                    "id": client.number,
                    "connected_s": round(now - client.connected, 3),
                    "sent": client.sent,
                    "dropped": client.dropped,
                    "unanswered": len(client.unanswered),
                }
                for client in list(self._clients.values())
            ],
        }

    def close(self) -> None:
        """Tell the clients, free the port and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._asking is not None:
            self._asking.close()
        self._thread.join()

    def __enter__(self) -> ViewerServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What follows runs in the server's thread.

    def _run(self, serving: Future[None]) -> None:
        try:
            self._loop.run_until_complete(self._serve(serving))
        except Exception as error:
            log.exception("The web page's server ended")
            if not serving.done():
                serving.set_exception(error)
        finally:
            with self._lock:
                self._closed = True
            self._loop.close()
            self._socket.close()

    async def _serve(self, serving: Future[None]) -> None:
        app = web.Application(middlewares=[self._refuse_foreign_names])
        app.on_response_prepare.append(add_security_headers)
        for path, (name, content_type) in ASSETS.items():
            app.router.add_get(path, asset(STATIC / name, content_type))
        app.router.add_get("/api/status", self._get_status)
        app.router.add_get("/ws", self._websocket)
        if self._recorded is not None:
            from carla_digr.live.viewer import shelf  # and rosbags, which a live page does without

            shelf.add_routes(app.router, shelf.source(self._recorded))
        if self._asking is not None and self._token is not None:
            handler = self._asking.handler(self._token, self.tell)
            app.router.add_get(r"/api/ask/{side:\d}/{index:\d{1,15}}/{kind}", handler)
        requests = log.getChild("requests")
        requests.addFilter(_is_no_request_error)
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=requests,
            handle_signals=False,
            keepalive_timeout=REQUEST_SECONDS,
            shutdown_timeout=0.5,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket).start()
            serving.set_result(None)
            await self._stop.wait()
            farewells = [client.websocket.close(code=1001) for client in list(self._clients.values())]
            await asyncio.gather(*farewells, return_exceptions=True)
        finally:
            await runner.cleanup()

    def _distribute(self) -> None:
        with self._lock:
            self._distribution_due = False
            frame = self._newest
        if frame is not None:
            for client in self._clients.values():
                client.offer(frame)

    def _recolour(self, numbers: list[int]) -> None:
        self._colours = numbers
        for client in self._clients.values():
            client.tell("colours", {"type": "colours", "colormap": numbers})

    def _tell(self, changed: dict[str, Any]) -> None:
        self._state = {**self._state, **changed}
        for client in self._clients.values():
            client.tell("state", {"type": "state", **self._state})

    @web.middleware
    async def _refuse_foreign_names(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuse requests by a name that is not ours: a web site that rebinds its own name to this address."""
        name = host_name(request.host)
        if name is None or not (name in self._names or is_address(name)):
            called = request.host[:80].encode("ascii", "backslashreplace").decode()
            raise web.HTTPMisdirectedRequest(
                text=f"This server is not known as {called}: open it by its address, or allow the name.\n"
            )
        return await handler(request)

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(self.status(), headers={"Cache-Control": "no-store"})

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        origin = request.headers.get("Origin")  # browsers always send it, and pages cannot forge it
        if origin is not None and origin.partition("://")[2].lower() != request.host.lower():
            raise web.HTTPForbidden(text="Only this server's own page may open the stream.\n")
        websocket = web.WebSocketResponse(timeout=0.5, heartbeat=PING_SECONDS, compress=False, max_msg_size=1024)
        try:
            await websocket.prepare(request)
        except ValueError:  # of a key that is no base64, which aiohttp does not expect
            raise web.HTTPBadRequest(text="The handshake's key is malformed.\n") from None
        greeted = self._colours
        hello = {"type": "hello", "version": __version__, "now": time.monotonic(), "colormap": greeted}
        told = self._state
        shows = {"recording": self._recorded is not None, "asking": self._asking is not None}
        shows["shelf"] = hasattr(self._recorded, "names")
        await websocket.send_json({**hello, **shows})
        if told:
            await websocket.send_json({"type": "state", **told})
        with self._lock:
            newest, published = self._newest, self._sequence
        self._connections += 1
        client = Client(self._connections, websocket, offered=max(0, published - 1))
        if newest is not None:
            client.offer(newest)
        if self._colours is not greeted:  # changed meanwhile
            client.tell("colours", {"type": "colours", "colormap": self._colours})
        if self._state is not told:
            client.tell("state", {"type": "state", **self._state})
        self._clients[client.number] = client
        sender = asyncio.create_task(client.send())
        try:
            gate = Gate(self._token)
            async for message in websocket:
                if message.type == WSMsgType.TEXT and message.data.isdecimal():
                    client.answered(int(message.data))
                    continue
                try:
                    asked = gate.take(message.data if message.type == WSMsgType.TEXT else "")
                except (ValueError, TypeError, RecursionError):
                    await websocket.close(code=1008, message=b"expected a frame's sequence number or a request")
                    break
                if isinstance(asked, dict):
                    client.tell(f"answer {asked.get('id')}", asked)
                elif self._controls is None:
                    client.tell(f"answer {asked[0]}", answer(asked[0], False, "Here is no drive to control."))
                else:
                    gate.waiting += 1
                    task = asyncio.create_task(self._do(client, gate, *asked))
                    self._doing.add(task)
                    task.add_done_callback(self._doing.discard)
        finally:
            del self._clients[client.number]
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await sender
        return websocket

    async def _do(self, client: Client, gate: Gate, number: int, words: tuple[str, ...]) -> None:
        assert self._controls is not None
        told = await self._loop.run_in_executor(None, done, self._controls, number, words)
        gate.waiting -= 1
        client.tell(f"answer {number}", told)


def _is_no_request_error(record: logging.LogRecord) -> bool:
    """Whether a log's entry is about more than a malformed request, or a client that is gone."""
    return record.exc_info is None or not isinstance(record.exc_info[1], (HttpProcessingError, ConnectionError))


def _numbers(colormap: str) -> list[int]:
    """Red, green and blue of the 256 levels of a map, one after another.

    Raises:
        UserError: there is no such map.
    """
    return [int(value) for value in colours(colormap).ravel()]
