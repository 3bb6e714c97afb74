"""Which recordings a page may look at: those that were opened at the start, or those of a folder, by their names."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from carla_digr.errors import UserError
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.recordings.bag import storage_files

KEPT = 3  # that were looked at last stay open
LISTED = 1000


class Opened:
    """The recordings that were named at the start."""

    names: Sequence[str] = ()

    def __init__(self, recorded: Recorded):
        self._found = recorded, json.dumps(recorded.description()).encode()

    def find(self, names: Sequence[str]) -> tuple[Recorded, bytes]:
        """They, whatever is asked for, and their description as JSON."""
        return self._found


class Shelf:
    """The recordings of a folder, one or two at a time; a browser names those that are listed, and no path.

    Args:
        folder: whose directories with recordings are listed, anew each time.
        opens: opens one recording, or two side by side.
    """

    def __init__(self, folder: Path, opens: Callable[[list[Path]], Recorded]):
        self._folder, self._opens = folder, opens
        self._open: OrderedDict[tuple[str, ...], tuple[Recorded, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of the recordings that are there now, the newest first."""
        found = [path for path in self._folder.iterdir() if path.is_dir() and is_bag(path)]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.name for path in found[:LISTED]]

    def find(self, names: Sequence[str]) -> tuple[Recorded, bytes]:
        """Recordings and their description as JSON. Callable from any thread.

        Raises:
            LookupError: they are not listed, or not one or two.
            UserError: they cannot be opened.
        """
        key = tuple(names)
        with self._lock:
            if key not in self._open:
                if len(key) not in (1, 2) or not set(key) <= set(self.names):
                    raise LookupError(f"no recordings {key}")
                recorded = self._opens([self._folder / name for name in key])
                self._open[key] = recorded, json.dumps(recorded.description()).encode()
                while len(self._open) > KEPT:  # their files are closed once nobody reads in them any more
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]


def source(recorded: Recorded | Shelf) -> Opened | Shelf:
    """Where a server's recordings come from."""
    return recorded if isinstance(recorded, Shelf) else Opened(recorded)


def is_bag(path: Path) -> bool:
    """Whether a directory is a recording."""
    try:
        return (path / "metadata.yaml").is_file() or bool(storage_files(path))
    except (UserError, OSError):
        return False


def add_routes(router: web.UrlDispatcher, source: Opened | Shelf) -> None:
    """Serve recordings; those of a shelf are named by ``?bag=NAME``, twice for two."""

    async def find(request: web.Request) -> tuple[Recorded, bytes]:
        names = request.query.getall("bag", [])
        try:
            return await asyncio.get_running_loop().run_in_executor(None, source.find, names)
        except LookupError:
            raise web.HTTPNotFound(text="There is no such recording here: choose one of the list.\n") from None
        except UserError as error:
            raise web.HTTPUnprocessableEntity(text=f"{error}\n") from None

    async def get_names(_: web.Request) -> web.Response:
        return web.json_response(list(source.names), headers={"Cache-Control": "no-store"})

    async def get_description(request: web.Request) -> web.Response:
        _, description = await find(request)
        response = web.Response(body=description, content_type="application/json")
        response.enable_compression()
        return response

    async def get_frame(request: web.Request) -> web.Response:
        recorded, _ = await find(request)
        side, index = int(request.match_info["side"]), int(request.match_info["index"])
        try:
            body = await asyncio.get_running_loop().run_in_executor(None, recorded.message, side, index)
        except LookupError:
            raise web.HTTPNotFound(text=f"There is no frame {index} in recording {side}.\n") from None
        except UserError as error:
            raise web.HTTPUnprocessableEntity(text=f"{error}\n") from None
        return web.Response(body=body, content_type="application/octet-stream")

    router.add_get("/api/recordings", get_names)
    router.add_get("/api/recording", get_description)
    router.add_get(r"/api/recording/{side:\d}/{index:\d{1,9}}", get_frame)
