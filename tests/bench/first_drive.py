"""How clean a drive is over CARLA's protocol, start by start: speeds, distances from the lane, how episodes end.

``python tests/bench/first_drive.py OUT.json [--episodes N] [--servers N] [--weights FILE] [-- OPTIONS]``: what is after
``--`` are options of the simulators, such as ``--like carla``. Without weights the scripted driver drives. An episode
whose server hangs is driven again; OUT.json is written after each, and goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import carla
import numpy as np

from carla_digr.driving.control import CRUISE_SPEED, TICK, DriveFrame, commands_of
from carla_digr.driving.drive_process import DriveProcess
from carla_digr.driving.episode import RunningEpisode
from carla_digr.errors import SimulatorGone

sys.path.insert(0, str(Path(__file__).parents[1] / "wire"))
from simulator_process import Simulator

START = 40  # ticks that count as the start: 2 s
CHANGING = 0.8  # m from the middle of a lane beyond which a car is on the way to another


class Trace:
    """Where an episode's ego was in its lane, and how fast."""

    def __init__(self, road_map: carla.Map):
        self.map, self.speeds, self.offsets, self.lanes = road_map, [], [], []

    def add(self, frame: DriveFrame) -> None:
        """One more frame."""
        lane = self.map.get_waypoint(carla.Location(frame.x, frame.y, 0.0))
        right, middle = lane.transform.get_right_vector(), lane.transform.location
        self.speeds.append(frame.speed)
        self.offsets.append((frame.x - middle.x) * right.x + (frame.y - middle.y) * right.y)
        self.lanes.append(lane.lane_id)

    def figures(self) -> dict[str, Any]:
        """Of the start, and how far from its lane it ever was except on the way to another."""
        off = np.array(self.speeds[: START + 1]) - CRUISE_SPEED
        good = np.flatnonzero(np.abs(off) <= 0.5)
        return {
            "first_speed": self.speeds[0],
            "start_speeds": [float(off.min()), float(off.max())],
            "until_cruise": TICK * int(good[0]) if len(good) else None,
            "start_offset": float(np.abs(self.offsets[: START + 1]).max()),
            "offset": self._farthest(),
            "end_offset": abs(self.offsets[-1]),
            "lane_changes": int(np.count_nonzero(np.diff(self.lanes))),
        }

    def _farthest(self) -> float:
        away, lanes = np.abs(self.offsets), np.array(self.lanes)
        rising = np.flatnonzero(np.diff((away > 0.25).astype(int), prepend=0, append=0))
        kept = away.copy()
        for begin, end in zip(rising[::2], rising[1::2], strict=True):
            if len(set(lanes[begin:end])) > 1 or away[begin:end].max() > CHANGING:
                kept[begin:end] = 0.0
        return float(kept.max())


class Bench:
    """Episodes on some simulators, each with a thread."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.done = json.loads(args.out.read_text()) if args.out.exists() else []
        seeds = {episode["seed"] for episode in self.done}
        self.waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for seed in range(args.seed, args.seed + args.episodes):
            if seed not in seeds:
                self.waiting.put(seed)
        self.lock = threading.Lock()
        self.explainer = None
        if args.weights:
            from carla_digr.explainer import Explainer  # here: drives start in processes that run this file again

            self.explainer = Explainer.from_checkpoint(args.weights)
        self.commands = commands_of(self.explainer.card) if self.explainer else None

    def serve(self) -> None:
        """Drive on a simulator of its own until no seed is left."""
        simulator = Simulator(options=self.args.server)
        client = carla.Client("127.0.0.1", simulator.port)
        client.set_timeout(20.0)
        road_map = client.get_world().get_map()
        options = {"timeout": self.args.timeout, "vehicles": self.args.vehicles}
        drive = DriveProcess(self.args.kind, "127.0.0.1", simulator.port, **options).ready()
        try:
            while True:
                seed = self.waiting.get_nowait()
                lost = 0
                while True:
                    try:
                        episode = self.episode(drive, seed, road_map)
                        break
                    except SimulatorGone as error:
                        lost += 1
                        print(seed, error, flush=True)
                        drive = drive.reconnect(60.0)
                with self.lock:
                    self.done.append({**episode, "lost": lost})
                    self.args.out.write_text(json.dumps(self.done, indent=1))
                    print(json.dumps(self.done[-1]), flush=True)
        except queue.Empty:
            pass
        finally:
            drive.close()
            simulator.stop()

    def episode(self, drive: DriveProcess, seed: int, road_map: carla.Map) -> dict[str, Any]:
        """One episode's figures."""
        begin = time.perf_counter()
        frame = drive.reset(seed)
        reset = time.perf_counter() - begin
        trace, running = Trace(road_map), RunningEpisode(self.args.seconds)
        trace.add(frame)
        first = frame.collision
        while not running.over:
            if self.explainer is None:
                frame = drive.drive_on()
            else:
                with self.lock:
                    action = self.explainer.decide(frame.image).action
                frame = drive.step(self.commands[action])
            trace.add(frame)
            running.count(frame.speed, frame.collision, frame.off_road, frame.road_ends)
        wall = time.perf_counter() - begin
        return {"seed": seed, **running.figures(), **trace.figures(), "first": first, "reset": reset, "wall": wall}


def summary(done: list[dict[str, Any]]) -> str:
    """One line of all episodes."""
    clean = np.array([episode["clean"] for episode in done], float)
    error = math.sqrt(clean.mean() * (1.0 - clean.mean()) / len(clean))
    late = [e["seed"] for e in done if e["until_cruise"] is None]
    return (
        f"{len(done)} episodes: {100 * clean.mean():.1f} % clean (standard error {100 * error:.1f}), "
        f"{np.mean([e['distance'] for e in done]):.0f} m at {np.mean([e['mean_speed'] for e in done]):.1f} m/s; first "
        f"speed {min(e['first_speed'] for e in done):.2f} to {max(e['first_speed'] for e in done):.2f} m/s, never "
        f"within 0.5 m/s of the cruise speed in 2 s: {late}; farthest from the lane "
        f"{max(e['offset'] for e in done):.2f} m (more than 0.5 m in {sum(e['offset'] > 0.5 for e in done)}), in the "
        f"first 2 s {max(e['start_offset'] for e in done):.2f} m; collisions in the first frame "
        f"{sum(e['first'] is not None for e in done)}, struck {sum(e['struck'] for e in done)}; episodes "
        f"driven again {sum(e['lost'] for e in done)}"
    )


def main() -> None:
    """Drive and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--vehicles", type=int, default=20)
    parser.add_argument("--kind", default="carla")
    parser.add_argument("--timeout", type=float, default=20.0)
    parser.add_argument("--weights", type=Path)
    own, _, server = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split())
    args.server = server.split()
    bench = Bench(args)
    threads = [threading.Thread(target=bench.serve) for _ in range(args.servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(summary(bench.done))


if __name__ == "__main__":
    main()
