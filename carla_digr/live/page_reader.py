"""Stands in for a browser with the web page open, where there is none: reads and answers the page's stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable

import aiohttp

RETRY_SECONDS = 0.2


class PageReader:
    """Connects to a page's WebSocket as soon as it is there and answers every frame, in a thread of its own.

    Args:
        page: the page's address, "http://host:port/".
        seen: called in that thread for every frame, with its stamp in ns and its age in s since the server got it.
    """

    def __init__(self, page: str, seen: Callable[[int, float], None]):
        self._page = page
        self._seen = seen
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._read())
        self._thread = threading.Thread(target=self._run, name="page reader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Disconnect and end the thread."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    async def _read(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.ws_connect(self._page + "ws", max_msg_size=0) as stream:
                        async for message in stream:
                            if message.type is aiohttp.WSMsgType.BINARY:
                                header = json.loads(message.data[4 : 4 + int.from_bytes(message.data[:4], "little")])
                                await stream.send_str(str(header["sequence"]))
                                # The server's clock is this machine's monotonic one.
                                self._seen(round(header["stamp"] * 1e9), time.monotonic() - header["published"])
                await asyncio.sleep(RETRY_SECONDS)
