"""What a live drive must hold, measured on its topics: every frame decided and explained, in time, at 20 Hz.

No ROS in here: the node `measure` hands in what arrives. Times are seconds of one clock of one machine.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import TICK
from carla_digr.scheduling import goes_first

RATE = 1.0 / TICK  # Hz
RATE_TOLERANCE = 0.1  # Hz
OVERLAY_P99_MS = 1000.0 * TICK  # one period
ENDURANCE_FRAMES = 6000  # 5 minutes, from which on drift and growth of memory must hold too
DRIFT_PERCENT = 0.1
GROWTH_PERCENT = 5.0
ANSWERS = ("decision", "saliency", "overlay")
OBJECTS = "objects"  # may be left out where they would come late, and then are not counted as lost


@dataclass
class _Frame:
    """All that has arrived with one stamp; what never came is None or absent."""

    published: float | None = None
    number: int | None = None
    episode: int = 0
    collision: bool = False
    over: bool = False
    fallback: bool = False
    speed: float = 0.0
    answers: dict[str, float] = field(default_factory=dict)  # kind -> time of arrival
    page_age: float | None = None


class Measurement:
    """Matches the messages of a drive by their stamp (simulation time in ns).

    The window begins with the first frame of which everything has arrived (until then subscriptions are still being
    matched) and ends ``frames`` frames later; inside it nothing may be missing.
    """

    def __init__(self, frames: int):
        self.wanted = frames
        self._frames: dict[int, _Frame] = {}
        self._first: int | None = None
        self._count = 0  # pictures since the first

    @property
    def started(self) -> bool:
        """Whether the window has begun."""
        return self._first is not None

    @property
    def full(self) -> bool:
        """Whether the window has all its pictures; the answers to the last ones may still be under way."""
        return self._count >= self.wanted

    def picture(self, stamp: int, published: float) -> None:
        """A camera picture left the bridge at ``published``."""
        self._at(stamp).published = published
        self._count += self._first is not None
        self._look_for_the_start(stamp)

    def answer(self, kind: str, stamp: int, arrived: float) -> None:
        """A message of a kind in ANSWERS, or the frame's objects, arrived."""
        self._at(stamp).answers.setdefault(kind, arrived)
        self._look_for_the_start(stamp)

    def fallback(self, stamp: int) -> None:
        """The bridge braked on this frame."""
        self._at(stamp).fallback = True

    def facts(self, stamp: int, number: int, episode: int, collision: bool, over: bool) -> None:
        """What the bridge says about a frame: ``over`` from the frame on that ends the episode."""
        frame = self._at(stamp)
        frame.number, frame.episode, frame.collision, frame.over = number, episode, collision, over

    def motion(self, stamp: int, speed: float) -> None:
        """The ego's speed in m/s at a frame."""
        self._at(stamp).speed = speed

    def on_the_page(self, stamp: int, age: float) -> None:
        """A reader of the web page got a frame ``age`` s after the page's server had it."""
        self._at(stamp).page_age = age

    def _at(self, stamp: int) -> _Frame:
        return self._frames.setdefault(stamp, _Frame())

    def _look_for_the_start(self, stamp: int) -> None:
        frame = self._frames[stamp]
        if self._first is None and frame.published is not None and all(kind in frame.answers for kind in ANSWERS):
            self._first = stamp
            self._count = 1

    def figures(self) -> dict[str, Any]:
        """The figures of the window; times in ms, distances in m."""
        first = self._first if self._first is not None else math.inf
        window = [frame for stamp, frame in sorted(self._frames.items()) if stamp >= first]
        pictures = [frame for frame in window if frame.published is not None][: self.wanted]
        if pictures:
            window = window[: window.index(pictures[-1]) + 1]
        published = np.array([frame.published for frame in pictures], float)
        seconds = float(published[-1] - published[0]) if len(published) > 1 else 0.0
        endings = [after for before, after in itertools.pairwise(pictures) if after.over and not before.over]
        return {
            "frames": len(pictures),
            "first_frame": pictures[0].number if pictures else None,
            "frames_lost": _gaps(pictures),
            **{f"frames_without_{kind}": sum(kind not in frame.answers for frame in pictures) for kind in ANSWERS},
            "frames_without_objects": sum(OBJECTS not in frame.answers for frame in pictures),
            "stamps_without_picture": sum(frame.published is None for frame in window),
            "rate_hz": (len(published) - 1) / seconds if seconds else 0.0,
            "rate_drift_percent": _drift(np.diff(published)),
            "period_ms": _percentiles(np.diff(published)),
            "frame_to_decision_ms": _percentiles(_latencies(pictures, "decision")),
            "frame_to_overlay_ms": _percentiles(_latencies(pictures, "overlay")),
            "frame_to_objects_ms": _percentiles(_latencies(pictures, OBJECTS)),
            "frames_read_from_page": sum(frame.page_age is not None for frame in pictures),
            "page_age_ms": _percentiles([frame.page_age for frame in pictures if frame.page_age is not None]),
            "fallbacks": sum(frame.fallback for frame in pictures),
            "collisions": sum(frame.collision for frame in endings),
            "road_departures": sum(not frame.collision for frame in endings),
            "distance_m": sum(abs(frame.speed) for frame in pictures) / RATE,
        }


def _gaps(pictures: list[_Frame]) -> int:
    """Frame numbers that are missing between two frames of one episode."""
    missing = 0
    for before, after in itertools.pairwise(pictures):
        if before.number is not None and after.number is not None and before.episode == after.episode:
            missing += after.number - before.number - 1
    return missing


def _drift(periods: NDArray[np.float64]) -> float | None:
    """How much shorter the median period of the last quarter is than that of the first, in percent."""
    quarter = len(periods) // 4
    if not quarter:
        return None
    return float(100.0 * (np.median(periods[:quarter]) / np.median(periods[-quarter:]) - 1.0))


def _latencies(pictures: list[_Frame], kind: str) -> list[float]:
    return [
        frame.answers[kind] - frame.published
        for frame in pictures
        if frame.published is not None and kind in frame.answers
    ]


def _percentiles(seconds: Any) -> dict[str, float | None]:
    if len(seconds) == 0:
        return {"p50": None, "p99": None, "max": None}
    p50, p99, largest = np.percentile(seconds, [50, 99, 100]) * 1000.0
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(float(largest), 3)}


def criteria(figures: Mapping[str, Any], frames: int, memory: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What must hold, beside what was measured: a list of {figure, must, measured, held}.

    ``memory`` is `Memory.report`'s; it and the rate's drift must hold from ENDURANCE_FRAMES on.
    """
    p99, drift = figures["frame_to_overlay_ms"]["p99"], figures["rate_drift_percent"]
    rows = [
        ("frames", f">= {frames}", figures["frames"], figures["frames"] >= frames),
        *(
            (name, "0", figures[name], figures[name] == 0)
            for name in (
                "frames_lost",
                *(f"frames_without_{kind}" for kind in ANSWERS),
                "stamps_without_picture",
            )
        ),
        (
            "rate_hz",
            f"{RATE} +- {RATE_TOLERANCE}",
            figures["rate_hz"],
            abs(figures["rate_hz"] - RATE) <= RATE_TOLERANCE,
        ),
        ("frame_to_overlay_ms.p99", f"< {OVERLAY_P99_MS}", p99, p99 is not None and p99 < OVERLAY_P99_MS),
    ]
    if frames >= ENDURANCE_FRAMES:
        small = drift is not None and abs(drift) < DRIFT_PERCENT
        rows.append(("rate_drift_percent", f"0 +- {DRIFT_PERCENT}", drift, small))
        for name, row in memory.items():
            growth = row["growth_percent"]
            held = growth is not None and growth < GROWTH_PERCENT
            rows.append((f"memory of {name}: growth_percent", f"< {GROWTH_PERCENT}", growth, held))
    return [
        {"figure": figure, "must": must, "measured": measured, "held": bool(held)}
        for figure, must, measured, held in rows
    ]


class Memory:
    """Resident memory of processes, from /proc.

    Args:
        processes: name -> process id.
    """

    def __init__(self, processes: Mapping[str, int]):
        self._processes = dict(processes)
        self._samples: dict[str, list[float | None]] = {name: [] for name in processes}

    def sample(self) -> None:
        """Look now; call it at even intervals."""
        for name, pid in self._processes.items():
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                self._samples[name].append(None)
            else:
                self._samples[name].append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    def report(self) -> dict[str, dict[str, float | None]]:
        """Per process, in MB: the median of the samples' second tenth (the first one warms up) and of the last one.

        None where a process or samples are missing.
        """
        found = {}
        for name, samples in self._samples.items():
            tenth = max(1, len(samples) // 10)
            early, late = samples[tenth : 2 * tenth], samples[-tenth:]
            start, end = (float(np.median(s)) if s and None not in s else None for s in (early, late))  # type: ignore[arg-type]
            growth = None if start is None or end is None else 100.0 * (end / start - 1.0)
            found[name] = {"start_mb": start, "end_mb": end, "growth_percent": growth}
        return found


class ProcessorTime:
    """CPU seconds of processes and of the machine since this object was made, from /proc.

    Args:
        processes: name -> process id.
    """

    def __init__(self, processes: Mapping[str, int]):
        self._processes = dict(processes)
        self._tick = os.sysconf("SC_CLK_TCK")
        self._before = {name: self._used(pid) for name, pid in self._processes.items()}
        self._machine_before = self._machine()

    def report(self, seconds: float) -> dict[str, Any]:
        """Over the ``seconds`` since the start: CPU time of each process and who goes first; the load."""
        processes = {}
        for name, pid in self._processes.items():
            used, before = self._used(pid), self._before[name]
            spent = used - before if used is not None and before is not None else None
            processes[name] = {
                "cpu_s": None if spent is None else round(spent, 2),
                "cpu_percent": None if spent is None else round(100.0 * spent / seconds, 1),
                "realtime": goes_first(self._processes[name]),
            }
        busy, total = (after - before for after, before in zip(self._machine(), self._machine_before, strict=True))
        return {
            "processes": processes,
            "machine": {
                "cores": os.cpu_count(),
                "busy_percent": round(100.0 * busy / total, 1) if total else None,
                "load_average": os.getloadavg(),
            },
        }

    def _used(self, pid: int) -> float | None:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / self._tick  # utime + stime, all threads

    def _machine(self) -> tuple[int, int]:
        """Busy and total clock ticks of all cores since boot."""
        times = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(times) - times[3] - times[4], sum(times)  # without idle and iowait
