"""The package's executables. A node module loads torch, carla and more, so it is imported only here: a Ctrl-C in that
second ends the process without a traceback, as SIGTERM does anyway."""

from __future__ import annotations

import importlib
import sys

try:
    from carla_digr.errors import end_on_ctrl_c, tell
except ModuleNotFoundError:
    sys.exit(
        "carla-digr: This needs the Python package carla_digr, which pip installs: docs/ros.md of its source says how."
    )


def _run(node: str) -> None:
    end_on_ctrl_c(0)
    try:
        status = importlib.import_module(f"carla_digr_ros.{node}").main()
    except Exception as error:  # such as a missing package
        status = tell(error)
    sys.exit(status)


def carla_bridge() -> None:
    """Drive the simulator."""
    _run("carla_bridge")


def explainer() -> None:
    """Decide and explain."""
    _run("explainer")


def viewer() -> None:
    """Serve the web page."""
    _run("viewer")


def recorder() -> None:
    """Record a drive."""
    _run("recorder")


def player() -> None:
    """Replay a recording."""
    _run("player")


def measure() -> None:
    """Measure a drive."""
    _run("measure")


def ctl() -> None:
    """Say one thing to a running drive."""
    _run("ctl")


def stages() -> None:
    """Serve the offline stages as actions."""
    _run("stages")


def run_stage() -> None:
    """Run one offline stage."""
    _run("run_stage")
