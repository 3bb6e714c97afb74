"""The TCP connections of a simulator's clients, none of which can make the others wait: who is there and what is sent.

Nothing here waits: what a client leaves unread is kept up to a limit, then frames pass it by or it is disconnected.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from carla_digr.simulator import wire
from carla_digr.simulator.batches import Answers

SILENT_LIMIT = 10.0  # s a streaming connection may stay without a valid subscription
UNREAD_LIMIT = 8 * 2**20  # bytes a client may leave unread before frames wait for it or its connection is dropped
STALL_LIMIT = 1.0  # s without reading after which a client is no longer waited for
MAX_CONNECTIONS = 500
CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER value with which closing forgets what the kernel still holds

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Connection:
    """A client's TCP connection on one of the two ports."""

    socket: socket.socket
    outgoing: bytearray = field(default_factory=bytearray)
    """What the kernel has not taken yet."""
    opened: float = field(default_factory=time.monotonic)
    taken: float = 0.0
    """When the kernel last took something of it."""


@dataclass(eq=False)
class RpcConnection(Connection):
    """Calls come in, answers go out, in the same order."""

    reader: wire.RequestReader = field(default_factory=wire.RequestReader)
    requests: Iterator[wire.Request] = field(default_factory=lambda: iter(()))
    """What has arrived and was not answered yet."""
    batch: tuple[int, Answers] | None = None
    """The apply_batch under way, and the number of the call."""


@dataclass(eq=False)
class StreamConnection(Connection):
    """Says once which stream it wants, then only listens."""

    incoming: bytes = b""
    stream: int = 0


class Connections:
    """All there are, and who listens to which stream.

    Args:
        forget: called with an RPC connection that was closed.

    Attributes:
        subscribers: listeners of each stream that has any.
    """

    def __init__(self, forget: Callable[[RpcConnection], None]):
        self.subscribers: dict[int, list[StreamConnection]] = {}
        self._forget = forget
        self._selector = selectors.DefaultSelector()
        self._all: set[Connection] = set()

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._all

    def __len__(self) -> int:
        return len(self._all)

    def welcome(self, listener: socket.socket, kind: type[Connection]) -> None:
        """Let clients in through a listening socket, as connections of a kind."""
        self._selector.register(listener, selectors.EVENT_READ, kind)

    def wait(self, timeout: float) -> list[Connection]:
        """Wait for clients, at most so many seconds; take in new ones and send what was left.

        Returns:
            Connections that have something to be read.
        """
        readable = []
        for key, events in self._selector.select(timeout):
            if not isinstance(key.data, Connection):
                assert isinstance(key.fileobj, socket.socket)
                self._accept(key.fileobj, key.data)
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                readable.append(key.data)
        return readable

    def _accept(self, listener: socket.socket, kind: type[Connection]) -> None:
        try:
            client, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.01)  # the listener stays readable; do not spin until a client leaves
            return
        if len(self._all) >= MAX_CONNECTIONS:
            client.close()
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 4 * CHUNK)  # tells slow from stalled
        connection = kind(client)
        self._all.add(connection)
        self._selector.register(client, selectors.EVENT_READ, connection)

    def receive(self, connection: Connection) -> bytes:
        """What has arrived, b"" for nothing; the connection is closed when its client has closed it."""
        try:
            data = connection.socket.recv(CHUNK)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.close(connection)
        return data

    def subscribe(self, connection: StreamConnection, stream: int) -> None:
        """Have a client listen to a stream."""
        connection.stream = stream
        self.subscribers.setdefault(stream, []).append(connection)

    def close(self, connection: Connection) -> None:
        """Close a connection that may be closed already."""
        if connection not in self._all:
            return
        self._all.discard(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if isinstance(connection, StreamConnection) and connection.stream:
            listeners = self.subscribers[connection.stream]
            listeners.remove(connection)
            if not listeners:
                del self.subscribers[connection.stream]
        elif isinstance(connection, RpcConnection):
            self._forget(connection)

    def close_silent(self, now: float) -> None:
        """Close streaming connections that never asked for a stream that exists."""
        for connection in list(self._all):
            silent = isinstance(connection, StreamConnection) and not connection.stream
            if silent and now - connection.opened > SILENT_LIMIT:
                self.close(connection)

    def close_streams_but(self, alive: Collection[int]) -> None:
        """Close the connections of all streams that are not among these."""
        for stream in [s for s in self.subscribers if s not in alive]:
            for connection in list(self.subscribers[stream]):
                self.close(connection)

    def slow(self, now: float) -> list[StreamConnection]:
        """Listeners who read, but have not yet taken so much that the next frame of large pictures would pile up."""
        return [
            connection
            for listeners in self.subscribers.values()
            for connection in listeners
            if len(connection.outgoing) > UNREAD_LIMIT and now - connection.taken < STALL_LIMIT
        ]

    def publish(self, stream: int, message: bytes) -> None:
        """Send a message to all who listen to a stream."""
        for connection in list(self.subscribers.get(stream, ())):
            self.send(connection, message)

    def send(self, connection: Connection, data: bytes) -> None:
        """Send without ever waiting; a client that leaves too much unread loses frames, then its connection."""
        if connection not in self._all:
            return
        if connection.outgoing:
            if len(connection.outgoing) > UNREAD_LIMIT:
                if isinstance(connection, StreamConnection) and time.monotonic() - connection.taken < STALL_LIMIT:
                    return  # it reads, but slower than the clock of an asynchronous world: this frame passes it by
                log.warning("a client that does not read was disconnected")
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self.close(connection)
                return
            connection.outgoing += data
            return
        try:
            sent = connection.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close(connection)
            return
        if sent < len(data):
            connection.taken = time.monotonic()
            connection.outgoing += memoryview(data)[sent:]
            self._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def _flush(self, connection: Connection) -> None:
        try:
            sent = connection.socket.send(connection.outgoing)
        except BlockingIOError:
            return
        except OSError:
            self.close(connection)
            return
        del connection.outgoing[:sent]
        connection.taken = time.monotonic()
        if not connection.outgoing:
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
