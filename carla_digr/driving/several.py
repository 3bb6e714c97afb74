"""Whether several simulators can be trained on together: each by itself, then what they have in common."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from carla_digr.driving.acceptance import check_simulator
from carla_digr.driving.drive_process import DriveProcess, address_of
from carla_digr.driving.training_probe import MANY, TICKS, TIMED
from carla_digr.errors import UserError
from carla_digr.files import atomic_write

TRAFFIC = 20  # vehicles on each while all drive


def check_simulators(
    addresses: Sequence[str], timeout: float = 20.0, full: bool = False, report: Path | None = None
) -> bool:
    """``check_simulator`` of each, one after the other; then whether they have one map, and drive at the same time.

    Args:
        addresses: host:port of each.
        report: a JSON file for the reports of all, by address, and "together".

    Returns:
        Whether all checks passed.

    Raises:
        UserError: an address is none, or named twice.
    """
    for address in addresses:
        address_of(address)
        if addresses.count(address) > 1:
            raise UserError(f"The simulator {address} is named twice; name each once.")
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="carla_digr-") as directory:
        for number, address in enumerate(addresses):
            print(f"{address}:", flush=True)
            file = Path(directory) / f"{number}.json"
            child = multiprocessing.get_context("spawn").Process(
                target=_check, args=(address, timeout, full, file), name=address
            )  # the client library may take its process down
            child.start()
            child.join()
            told = json.loads(file.read_text()) if file.exists() else {}
            reports[address] = {"passed": child.exitcode == 0, **told}
    print(f"all {len(addresses)}:", flush=True)
    lines = [_line("maps", "the same everywhere", "load the same map everywhere", lambda: _maps(reports))]
    if all("kind" in entry.get("figures", {}) for entry in reports.values()):
        what = "decisions on all at the same time"
        lines.append(_line("together", what, "give each a GPU of its own", lambda: _together(reports, timeout)))
    if report is not None:
        with atomic_write(report) as out:
            out.write(json.dumps({"servers": reports, "together": lines}, indent=1).encode())
    return all(entry["passed"] for entry in [*reports.values(), *lines])


def _check(address: str, timeout: float, full: bool, report: Path) -> None:
    host, port = address_of(address)
    raise SystemExit(not check_simulator(host, port, timeout, full=full, report=report))


def _line(what: str, expected: str, remedy: str, attempt: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    try:
        good, seen = attempt()
    except UserError as error:
        good, seen = False, str(error).removesuffix(".")
    line = f"{'pass' if good else 'FAIL'}  {what}: expected {expected}; saw {seen}"
    print(line if good else f"{line}; what to do: {remedy}", flush=True)
    return {"check": what, "passed": good, "expected": expected, "saw": seen}


def _maps(reports: dict[str, Any]) -> tuple[bool, str]:
    names = {address: entry.get("figures", {}).get("map", "none") for address, entry in reports.items()}
    seen = ", ".join(f"{name} on {address}" for address, name in names.items())
    return len(set(names.values())) == 1 and "none" not in names.values(), seen


def _together(reports: dict[str, Any], timeout: float) -> tuple[bool, str]:
    """In step, as the stages drive: each decision waits for the slowest."""
    drives = []
    for address, entry in reports.items():
        drives.append(DriveProcess(entry["figures"]["kind"], *address_of(address), timeout, vehicles=TRAFFIC))
    with ThreadPoolExecutor(len(drives)) as pool:
        try:
            list(pool.map(DriveProcess.ready, drives))
            list(pool.map(lambda drive: drive.reset(5), drives))
            start = time.perf_counter()
            for _ in range(TIMED * TICKS):
                list(pool.map(DriveProcess.drive_on, drives))
            rate = TIMED * len(drives) / (time.perf_counter() - start)
        finally:
            list(pool.map(DriveProcess.close, drives))
    return True, f"{rate:.0f} decisions a second in all, {MANY:,} in {MANY / rate / 3600.0:.1f} h without learning"
