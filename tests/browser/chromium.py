"""Where the browser is, and how it is started."""

from __future__ import annotations

import shutil

import pytest

# Chromium's own traffic (updates, sync, field trials) is off: what is left is the page's.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str:
    """Path of the browser; its absence fails the tests, for the page is not to ship untried."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.fail("No Chromium found for the browser tests: install the Debian package chromium (make browser).")
