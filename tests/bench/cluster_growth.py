"""How rollouts grow with servers, and maps with nodes: docs/cluster.md.

``python tests/bench/cluster_growth.py [--seconds 6]``: decisions a second of random actions on 1, 2, 4 and 8 embedded
servers of this machine, without Ray; then shards of maps a second on a Ray head with one processor, and with a second
node beside it. A shard is 4 of 240 maps of Red-Fetch-Green's network with random weights, every 4th pixel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from carla_digr import checkpoint
from carla_digr.policy import ActorCritic
from carla_digr.tasks import make_task, parse_config
from carla_digr.tasks.driving import Driving, DrivingConfig

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "wire")]
from simulator_process import Simulator, eventually  # noqa: E402
from test_cluster import ROOMS, Nodes  # noqa: E402
from test_servers import address  # noqa: E402

SERVERS = (1, 2, 4, 8)
ACTIONS = (0, 1, 1, 1, 2)


def rollout(addresses: tuple[str, ...], seconds: float) -> float:
    """Decisions a second on servers."""
    env = Driving(DrivingConfig(simulators=addresses, timeout=30.0)).make_vec_env(len(addresses), 1, evaluation=False)
    try:
        env.reset()
        rng, count = np.random.default_rng(0), 0
        for _ in range(5):
            env.step(rng.choice(ACTIONS, len(addresses)))
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            env.step(rng.choice(ACTIONS, len(addresses)))
            count += len(addresses)
        return count / (time.perf_counter() - begun)
    finally:
        env.close()


def shards(nodes: Nodes, directory: Path) -> float:
    """Shards of maps a second, from the first one on."""
    file = directory / "rooms.yaml"
    file.write_text(yaml.safe_dump(ROOMS))
    task = make_task(config := parse_config(ROOMS, "rooms"))
    names = list(task.action_names)
    torch.manual_seed(1)
    policy = ActorCritic(config.policy, *task.observation_shape, len(names))
    card = {"task": config.task, "role": "teacher", "action_names": names, "steps": 0}
    checkpoint.save(directory / "teacher.safetensors", policy, card)
    manifest = directory / "dataset" / "manifest.json"

    def done() -> int:
        return len(json.loads(manifest.read_text())["shards"]) if manifest.exists() else 0

    stage = nodes.command("make-dataset", file, directory)
    eventually(lambda: done() > 0 or stage.poll() is not None, 120.0)
    begun, first = time.perf_counter(), done()
    nodes.ends(stage)
    return (done() - first) / (time.perf_counter() - begun)


def main() -> None:
    """Measure and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each rollout (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    servers = [Simulator() for _ in range(max(SERVERS))]
    addresses = tuple(map(address, servers))
    for count in SERVERS:
        print(f"{count} servers: {rollout(addresses[:count], args.seconds):.0f} decisions/s", flush=True)
    for server in servers:
        server.stop()
    nodes = Nodes()
    try:
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as directory:
                print(f"{count} processors on as many nodes: {shards(nodes, Path(directory)):.2f} shards/s", flush=True)
            if count == 1:
                nodes.add()
    finally:
        nodes.close()
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
