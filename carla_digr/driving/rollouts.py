"""Episodes of a policy on one or several simulators at once, a process for each, measured like the offline ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from carla_digr.config import setting
from carla_digr.driving.control import VehicleCommand
from carla_digr.driving.drive_process import DriveProcess, address_of
from carla_digr.driving.episode import RunningEpisode
from carla_digr.errors import SimulatorGone, UserError
from carla_digr.simulator.road import MAP_NAME

IDLE = 0.2  # s between looks for an episode
Decide = Callable[[NDArray[np.uint8]], VehicleCommand]
"""Picture, uint8 (H, W, 3) RGB, to command; called by one thread at a time."""


@dataclass(frozen=True)
class RolloutConfig:
    """Where and how long to drive."""

    simulators: tuple[str, ...]  # host:port of each
    kind: Literal["embedded", "carla"] = "embedded"  # whose traffic: the embedded highway's, or the Traffic Manager's
    vehicles: int = setting(64, minimum=0, maximum=400)
    roads: tuple[int, ...] | None = None  # OpenDRIVE ids of the roads on which episodes start
    spawn_points: tuple[int, ...] | None = None  # indices of the map's spawn points at which they start
    episodes: int = setting(20, minimum=1)
    episode_seconds: float = setting(50.0, minimum=1)
    seed: int = setting(0, minimum=0, maximum=2**30)  # of the first episode; every further one adds 1
    timeout: float = setting(10.0, minimum=0.1)  # s for each call
    patience: float = setting(60.0, minimum=0)  # s in which a simulator that hung or died must be back


def drive_episodes(
    config: RolloutConfig,
    driver: Callable[[], Decide] | None,
    finished: Callable[[dict[str, Any]], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Drive all episodes; which simulator drives which one depends on who is free.

    An episode during which its simulator hangs or dies, or the client library aborts, is driven again once the
    simulator is back, or by another one if it does not come back within ``patience``.

    Args:
        driver: called at the start of each episode, gives who decides in it: a policy may remember pictures, and those
            of other episodes and simulators are not its own. None: the scripted driver.
        finished: called with each episode as it ends

    Returns:
        One dict an episode, in the order of their seeds: seed, simulator (address), map (its name), and
        ``RunningEpisode.figures``.

    Raises:
        UserError: a simulator cannot be connected at the start, or none is left.
    """
    addresses = [address_of(text) for text in config.simulators]
    drives: list[DriveProcess] = []
    work = _Work(config, driver, finished)
    try:
        for host, port in addresses:
            where = {"roads": config.roads or (), "spawn_points": config.spawn_points or ()}
            drives.append(DriveProcess(config.kind, host, port, config.timeout, vehicles=config.vehicles, **where))
        for drive in drives:
            drive.ready()
        with ThreadPoolExecutor(len(drives)) as pool:
            try:
                workers = [pool.submit(work.drive, i, drives) for i in range(len(drives))]
                failures = [error for worker in workers if (error := worker.exception()) is not None]
            finally:
                work.stop.set()
    finally:
        for drive in drives:
            drive.close()
    unexpected = [error for error in failures if not isinstance(error, UserError)]
    if unexpected or len(work.results) < config.episodes:
        raise (unexpected or failures)[0]
    return [work.results[i] for i in range(config.episodes)]


def summary(episodes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of each figure over the episodes."""
    names = ("clean", "seconds", "distance", "mean_speed")
    return {name: float(np.mean([episode[name] for episode in episodes])) for name in names}


def simulator_name(kind: str, episodes: Sequence[dict[str, Any]]) -> str:
    """On what episodes were driven, whoever their traffic was made by."""
    maps = sorted({episode["map"] for episode in episodes})
    if kind == "embedded" or maps == [MAP_NAME]:
        return "the embedded highway" + (" with a Traffic Manager's traffic" if kind == "carla" else "")
    return f"CARLA 0.9.16 ({', '.join(maps)})"


class _Work:
    """Episodes to be driven and those that were."""

    def __init__(
        self,
        config: RolloutConfig,
        driver: Callable[[], Decide] | None,
        finished: Callable[[dict[str, Any]], object],
    ):
        self.config, self.driver, self.finished = config, driver, finished
        self.results: dict[int, dict[str, Any]] = {}
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(config.episodes):
            self._waiting.put(i)

    def drive(self, worker: int, drives: list[DriveProcess]) -> None:
        """Drive episodes on one simulator until all are done; ``drives[worker]`` is replaced after a reconnection."""
        while not self.stop.is_set() and len(self.results) < self.config.episodes:
            try:
                number = self._waiting.get(timeout=IDLE)
            except queue.Empty:
                continue  # another simulator may yet give its episode back
            try:
                try:
                    episode = self._episode(drives[worker], number)
                except SimulatorGone:
                    drives[worker] = drives[worker].reconnect(self.config.patience)
                    episode = self._episode(drives[worker], number)
            except BaseException:
                self._waiting.put(number)
                raise
            with self._lock:
                where = {"simulator": self.config.simulators[worker], "map": drives[worker].map_name}
                self.results[number] = {**episode, **where}
                self.finished(self.results[number])

    def _episode(self, drive: DriveProcess, number: int) -> dict[str, Any]:
        seed = self.config.seed + number
        decide = self.driver and self.driver()
        frame = drive.reset(seed)
        episode = RunningEpisode(self.config.episode_seconds)
        while not episode.over and not self.stop.is_set():
            if decide is None:
                frame = drive.drive_on()
            else:
                with self._lock:
                    command = decide(frame.image)
                frame = drive.step(command)
            episode.count(frame.speed, frame.collision, frame.off_road, frame.road_ends, frame.struck)
        return {"seed": seed, **episode.figures()}
