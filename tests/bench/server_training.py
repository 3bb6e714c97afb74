"""How much of the in-process rate a training on embedded servers has, and how much of a slow server's own rate it uses.

``python tests/bench/server_training.py``: PPO of configs/driving.yaml with two environments, in process and on two
embedded servers by turns, decisions a second from the end of the first update on. Then ticks a second of a server with
the trait ``slow``, by a client that does nothing else, and of environments on one and two such servers with random
actions, by turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from carla_digr.driving.session import Session
from carla_digr.tasks import load_config
from carla_digr.tasks.driving import Driving, DrivingConfig
from carla_digr.training import prepare_process
from carla_digr.training.teacher import train_teacher

sys.path[:0] = [str(Path(__file__).parents[1] / "wire")]
from simulator_process import Simulator  # noqa: E402
from test_servers import address  # noqa: E402

SLOW = 0.08  # s a frame at most, see the trait
WARM = 4  # decisions before those that count


def training(updates: int, simulators: tuple[str, ...] | None) -> float:
    """Decisions a second of a training of two environments, from the end of its first update on."""
    config = load_config(Path("driving"))
    teacher = replace(config.teacher, environments=2, total_steps=2 * config.teacher.rollout_steps * updates)
    environment = replace(config.environment, simulators=simulators)
    with tempfile.TemporaryDirectory() as out:
        train_teacher(replace(config, teacher=teacher, environment=environment), Path(out))
        head, first, *_, last = Path(out, "teacher", "curve.csv").read_text().splitlines()
    rows = [dict(zip(head.split(","), row.split(","), strict=True)) for row in (first, last)]
    steps = [float(row["steps"]) for row in rows]
    seconds = [steps[i] / float(row["steps_per_second"]) for i, row in enumerate(rows)]
    return (steps[1] - steps[0]) / (seconds[1] - seconds[0])


def own_rate(server: Simulator, ticks: int) -> float:
    """Ticks a second of a client that does nothing else."""
    with Session.connect("127.0.0.1", server.port) as session:
        begun = time.perf_counter()
        for _ in range(ticks):
            session.tick()
        return ticks / (time.perf_counter() - begun)


def used_rate(servers: list[Simulator], ticks: int) -> float:
    """Ticks a second of each server under environments that nobody learns from."""
    config = DrivingConfig(simulators=tuple(map(address, servers)), vehicles=20)
    env = Driving(config).make_vec_env(len(servers), 1, evaluation=False)
    try:
        env.reset()
        rng = np.random.default_rng(0)
        for _ in range(WARM):
            env.step(rng.choice((0, 1, 1, 1, 2), len(servers)))
        begun, restarts, decisions = time.perf_counter(), 0.0, ticks // config.training_decision_ticks
        for _ in range(decisions):
            before = time.perf_counter()
            if env.step(rng.choice((0, 1, 1, 1, 2), len(servers)))[2].any():
                restarts += time.perf_counter() - before  # ticks that are not counted
                decisions -= 1
        return decisions * config.training_decision_ticks / (time.perf_counter() - begun - restarts)
    finally:
        env.close()


def main() -> None:
    """Measure, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2, help="of each (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=24, help="of each training (default: %(default)s)")
    parser.add_argument("--ticks", type=int, default=200, help="of slow servers (default: %(default)s)")
    args = parser.parse_args()
    prepare_process()
    if args.updates:
        two = [Simulator(), Simulator()]
        here, there = [], []
        training(2, None)  # the first of a process is slower
        for _ in range(args.turns):
            here.append(training(args.updates, None))
            there.append(training(args.updates, tuple(map(address, two))))
            print(
                f"in process {here[-1]:.0f}/s, on servers {there[-1]:.0f}/s; load {os.getloadavg()[0]:.1f}", flush=True
            )
        print(f"{sum(there) / sum(here):.2f} of the rate in process")
        for server in two:
            server.stop()
    if args.ticks:
        slow = [Simulator(options=["--traits", f"slow={SLOW}"]) for _ in range(2)]
        rates = [
            [own_rate(slow[0], args.ticks), *(used_rate(slow[:k], args.ticks) for k in (1, 2))]
            for _ in range(args.turns)
        ]
        alone, one, both = np.array(rates).mean(axis=0)
        print(f"{alone:.1f} ticks a second alone, {one / alone:.0%} used on one, {both / alone:.0%} on two in step")
        for server in slow:
            server.stop()


if __name__ == "__main__":
    main()
