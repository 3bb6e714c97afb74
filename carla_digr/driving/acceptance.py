"""Whether the drive can run on a simulator: what it relies on, tried one by one, with a line for each.

Needs the simulator for itself, for about a minute or, in full, at most about ten, and leaves it as it was found.
"""

from __future__ import annotations

import json
import os
import platform
import threading
from pathlib import Path
from typing import Any

from carla_digr.driving.checks import CHECKS, Check, Visit
from carla_digr.errors import UserError
from carla_digr.files import atomic_write

STALL = 90.0, 300.0  # s that one line may take besides a call's limit, quick and in full
LOST = "a call of the client library never returned"


def check_simulator(
    host: str,
    port: int,
    timeout: float = 20.0,
    simulator: str = "",
    full: bool = False,
    report: Path | None = None,
) -> bool:
    """Try everything the drive relies on; print a line a check, and say what to do where one fails.

    Args:
        timeout: seconds for each call.
        simulator: "embedded" or "carla", which have different traffic; empty: the server's blueprints decide.
        full: measure longer, and many resets, for FULL_SECONDS.
        report: a JSON file for the lines and all figures behind them.

    Returns:
        Whether all checks passed. After a check that broke off, the remaining ones are not tried.
    """
    visit = Visit(host, port, timeout, simulator, full)
    lines: list[dict[str, Any]] = []
    broke_off = False
    try:
        for check in CHECKS:
            if broke_off:
                print(f"  --  {check.what}: not tried")
                continue
            watchdog = threading.Timer(STALL[full] + timeout, _give_up, (check, lines, visit, report))
            watchdog.daemon = True
            watchdog.start()
            good, seen, broke_off = _attempt(check, visit)
            watchdog.cancel()
            line = f"{'pass' if good else 'FAIL'}  {check.what}: expected {check.expected}; saw {seen}"
            print(line if good else f"{line}; what to do: {check.remedy}", flush=True)
            lines.append(_line(check, good, seen))
        _write(report, lines, visit)  # before leaving, where a lost server may end the process
    finally:
        visit.leave()
    return not broke_off and all(line["passed"] for line in lines)


def _write(report: Path | None, lines: list[dict[str, Any]], visit: Visit) -> None:
    if report is not None:
        system = {"python": platform.python_version(), "system": platform.platform(), "full": visit.until > 0.0}
        with atomic_write(report) as file:
            file.write(json.dumps({**system, "checks": lines, "figures": visit.figures}, indent=1).encode())


def _give_up(check: Check, lines: list[dict[str, Any]], visit: Visit, report: Path | None) -> None:
    """End the process: a call of the client library never returned, and no time limit of its own holds."""
    print(f"FAIL  {check.what}: {LOST}; what to do: run the check again, the server is not to blame", flush=True)
    _write(report, [*lines, _line(check, False, LOST)], visit)
    os._exit(1)


def _line(check: Check, good: bool, seen: str) -> dict[str, Any]:
    return {"check": check.what, "passed": good, "expected": check.expected, "saw": seen}


def _attempt(check: Check, visit: Visit) -> tuple[bool, str, bool]:
    """Whether it is good, what was seen, and whether it broke off."""
    try:
        return *check.attempt(visit), False
    except (UserError, RuntimeError) as error:
        return False, str(error).strip().removesuffix("."), True
