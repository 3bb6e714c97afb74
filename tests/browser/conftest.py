"""A real headless Chromium, and a page of the viewer that notes every request it makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import FLAGS, find_chromium
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from carla_digr.live.viewer.server import ViewerServer


# Not wider than a module: while Playwright runs, other tests of this process could not use asyncio.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def viewer() -> Iterator[ViewerServer]:
    with ViewerServer(port=0) as server:
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    context.add_init_script("try { localStorage.setItem('carla_digr hints', 'dismissed') } catch {}")
    yield context
    context.close()
