"""Settings all tests share."""

import pytest
from hypothesis import settings

# The first example of a property compiles numba code; a deadline would measure that.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="drive 200 episodes and many minutes where otherwise a part of them is driven",
    )


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether the full length of a proof is asked for."""
    return pytestconfig.getoption("long")
