"""The files of the page, and the headers that go with everything."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

STATIC = Path(__file__).parent / "static"
ASSETS = {  # path on the server: (file, content type)
    "/": ("index.html", "text/html"),
    "/viewer.js": ("viewer.js", "text/javascript"),
    "/figures.js": ("figures.js", "text/javascript"),
    "/plots.js": ("plots.js", "text/javascript"),
    "/clip.js": ("clip.js", "text/javascript"),
    "/control.js": ("control.js", "text/javascript"),
    "/hints.js": ("hints.js", "text/javascript"),
    "/objects.js": ("objects.js", "text/javascript"),
    "/picture.js": ("picture.js", "text/javascript"),
    "/ask.js": ("ask.js", "text/javascript"),
    "/save.js": ("save.js", "text/javascript"),
    "/recording.js": ("recording.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/viewer.css": ("viewer.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/vendor/uPlot.iife.min.js": ("vendor/uPlot.iife.min.js", "text/javascript"),
    "/vendor/uPlot.min.css": ("vendor/uPlot.min.css", "text/css"),
    "/vendor/uPlot.LICENSE.txt": ("vendor/uPlot.LICENSE.txt", "text/plain"),
}
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def asset(path: Path, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    """What answers a request for a file, which is read once."""
    body = path.read_bytes()
    etag = hashlib.sha256(body).hexdigest()[:16]
    # no-cache: a browser asks each time, so a new version of the package is never mixed with an old page.
    headers = {"ETag": f'"{etag}"', "Cache-Control": "no-cache"}

    async def get(request: web.Request) -> web.Response:
        if any(tag.value == etag for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return get


async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Let nothing from elsewhere into the page, and the page into nothing else."""
    response.headers.update(SECURITY_HEADERS)
