"""Settings all tests share."""

import signal
from pathlib import Path

import live_support
import pytest
from hypothesis import settings

from carla_digr.live.supervisor import free_domain

# The first example of a property compiles numba code; a deadline would measure that.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a shell's background: processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_FOLDERS = {"ros", "faults", "browser", "wire", "package"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="drive 200 episodes and many minutes where otherwise a part of them is driven",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what starts drives, servers and browsers or makes virtual environments; leave out what is long."""
    left_out = [item for item in items if item.get_closest_marker("long") and not config.getoption("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether the full length of a proof is asked for."""
    return pytestconfig.getoption("long")


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
