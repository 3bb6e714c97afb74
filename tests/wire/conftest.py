"""Simulator processes and sessions with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from simulator_process import Simulator

from carla_digr.driving.session import Session


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """A simulator of the test's own, to be ill-treated."""
    started = Simulator()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def shared_simulator() -> Iterator[Simulator]:
    """One simulator for all tests that leave it as they found it."""
    started = Simulator()
    yield started
    alive = started.process.poll() is None
    errors = started.stop()
    assert alive, errors
    assert "Traceback" not in errors


@pytest.fixture
def session(shared_simulator: Simulator) -> Iterator[Session]:
    """A session with the shared simulator: synchronous, 0.05 s, cleaned up afterwards."""
    with Session.connect("127.0.0.1", shared_simulator.port, 60.0) as connected:  # what first meets code compiles it
        yield connected
