"""Fixtures of the tests with ROS nodes."""

from __future__ import annotations

import live_support
import pytest

from carla_digr.live.supervisor import free_domain


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return live_support.make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def domain():
    with free_domain() as number:
        yield number


@pytest.fixture
def start(domain, tmp_path):
    with live_support.stage(domain, tmp_path) as start:
        yield start


@pytest.fixture
def observe(domain):
    observers = []

    def make(*names, qos=None):
        observers.append(live_support.Observer(domain, *names, qos=qos))
        return observers[-1]

    yield make
    for observer in observers:
        observer.close()
