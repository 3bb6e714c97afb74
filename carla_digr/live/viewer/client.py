"""What a client of the page is sent: newest frame wins, and nothing piles up for one that is slow, frozen or gone."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from aiohttp import web

from carla_digr.live.viewer.message import encode

WINDOW = 8  # frames sent but not yet answered by a client; covers a stutter of 0.4 s at 20 Hz
BEAT_SECONDS = 1.0  # silence after which a client is told that the connection still stands


class Frame:
    """One published frame; its message is encoded at most once, and only if a client wants it.

    Args:
        header: of the message, with the frame's ``sequence``.
        rgb, saliency: as `message.encode` takes them.
    """

    def __init__(self, header: dict[str, Any], rgb: np.ndarray, saliency: np.ndarray | None):
        self.header = header
        self.sequence: int = header["sequence"]
        self.rgb = rgb
        self.saliency = saliency
        self._message: bytes | None = None

    def message(self) -> bytes:
        """What is sent of it."""
        if self._message is None:
            self._message = encode(self.header, self.rgb, self.saliency)
        return self._message


class Client:
    """One WebSocket: a mailbox that holds the newest frame only, and the frames it has not answered yet.

    Args:
        number: its own.
        websocket: where it listens.
        offered: sequence of the last frame that is not for it.
    """

    def __init__(self, number: int, websocket: web.WebSocketResponse, offered: int):
        self.number = number
        self.websocket = websocket
        self.connected = time.monotonic()
        self.ready = asyncio.Event()
        self.silent = False  # nothing has been to be done for BEAT_SECONDS
        self.waiting: Frame | None = None
        self.untold: dict[str, Mapping[str, Any]] = {}  # the last message of each kind that it has not been sent
        self.unanswered: deque[int] = deque()
        self.offered = offered  # sequence of the last frame this client was offered
        self.sent = 0
        self.dropped = 0

    def offer(self, frame: Frame) -> None:
        """Put a frame in the place of the one that waits, unless it was offered before."""
        if frame.sequence <= self.offered:
            return
        self.dropped += frame.sequence - self.offered - 1 + (self.waiting is not None)
        self.offered = frame.sequence
        self.waiting = frame
        self.ready.set()

    def tell(self, kind: str, message: Mapping[str, Any]) -> None:
        """Send it a message, JSON-ready, in the place of one of this kind that still waits."""
        self.untold[kind] = message
        self.ready.set()

    def answered(self, sequence: int) -> None:
        """Take its answer to a frame, which stands for those before too."""
        while self.unanswered and self.unanswered[0] <= sequence:
            self.unanswered.popleft()
        self.ready.set()

    async def send(self) -> None:
        """Send the newest frame whenever the client keeps up, and a sign of life whenever there is none."""
        while True:
            # asyncio.wait_for may swallow a cancellation (Python 3.11): this task would be there for ever.
            beat = asyncio.get_running_loop().call_later(BEAT_SECONDS, self._fall_silent)
            try:
                await self.ready.wait()
            finally:
                beat.cancel()
            self.ready.clear()
            if self.silent:
                self.silent = False
                if not self.unanswered:
                    await self.websocket.send_str('{"type":"beat"}')
            while self.untold:
                await self.websocket.send_json(self.untold.pop(next(iter(self.untold))))
            if self.waiting is None or len(self.unanswered) >= WINDOW:
                continue
            frame, self.waiting = self.waiting, None
            self.unanswered.append(frame.sequence)
            self.sent += 1
            await self.websocket.send_bytes(frame.message())

    def _fall_silent(self) -> None:
        self.silent = True
        self.ready.set()
