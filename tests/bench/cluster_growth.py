"""How rollouts grow with servers, and maps with nodes: docs/cluster.md.

``python tests/bench/cluster_growth.py OUT``: decisions a second of random actions on 1, 2, 4 and 8 embedded servers of
this machine, without Ray and from one Ray node that has them all, with the processor time of a decision: of the stage's
process, which many nodes share, of the drives and Ray beside the servers, and of the servers. Then shards of maps a
second on a Ray head with one processor, and with a second node beside it; a shard is 4 of 240 maps of Red-Fetch-Green's
network with random weights, every 4th pixel. Writes ``servers.json`` and ``servers.png``; what is not measured anew
stays as it was there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from carla_digr import checkpoint
from carla_digr.policy import ActorCritic
from carla_digr.tasks import make_task, parse_config
from carla_digr.tasks.driving import Driving, DrivingConfig

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "wire")]
from simulator_process import Simulator, eventually  # noqa: E402
from test_cluster import ROOMS, TOKEN, Nodes  # noqa: E402
from test_servers import address  # noqa: E402

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # which Ray reads where it is imported
from carla_digr.training.cluster import Cluster  # noqa: E402

SERVERS = (1, 2, 4, 8)
ACTIONS = (0, 1, 1, 1, 2)
WARM = 10  # decisions before those that count
HERE, RAY, SHARDS = PARTS = ("without Ray", "from a Ray node", "shards")


def processor_seconds(pids: Iterable[int]) -> float:
    """What processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def below(parent: int) -> list[int]:
    """The processes that this one has begun, and those that they have."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            of = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(of, []).append(int(path.parent.name))
    found, todo = [], [parent]
    while todo:
        todo += (more := children.get(todo.pop(), []))
        found += more
    return found


def rollout(addresses: tuple[str, ...], servers: list[int], seconds: float) -> dict[str, float]:
    """Decisions a second on servers, and the milliseconds of processor time that one takes in this process, in the
    drives (and Ray) and in the servers."""
    env = Driving(DrivingConfig(simulators=addresses, timeout=30.0)).make_vec_env(len(addresses), 1, evaluation=False)
    try:
        env.reset()
        rng = np.random.default_rng(0)
        for _ in range(WARM):
            env.step(rng.choice(ACTIONS, len(addresses)))
        drives = [pid for pid in below(os.getpid()) if pid not in servers]
        before = time.process_time(), processor_seconds(drives), processor_seconds(servers)
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            env.step(rng.choice(ACTIONS, len(addresses)))
            count += len(addresses)
        took = time.perf_counter() - begun
        after = time.process_time(), processor_seconds(drives), processor_seconds(servers)
        parts = {
            name: 1e3 * (b - a) / count
            for name, a, b in zip(("stage, ms", "drive, ms", "server, ms"), before, after, strict=True)
        }
        return {"decisions/s": count / took, **parts}
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
    eventually(lambda: done() == ROOMS["saliency_dataset"]["maps"] // 4 or stage.poll() is not None, 300.0)
    rate = (done() - first) / (time.perf_counter() - begun)
    nodes.ends(stage)
    return rate


def plot(path: Path, table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Decisions a second, and the processor time of one, by servers."""
    figure = Figure(figsize=(9.0, 3.2))
    rates, parts = figure.subplots(1, 2)
    for name, rows in table.items():
        counts = list(map(int, rows))
        rates.semilogx(counts, [row["decisions/s"] for row in rows.values()], "o-", base=2, label=name)
        for part, style in (("stage, ms", "o-"), ("drive, ms", "s--"), ("server, ms", "^:")):
            label = f"{part.removesuffix(', ms')}, {name}"
            parts.semilogx(counts, [row[part] for row in rows.values()], style, base=2, label=label)
    for axes, title in ((rates, "decisions of 0.1 s a second"), (parts, "processor time of a decision, ms")):
        axes.set_xticks(SERVERS, [str(count) for count in SERVERS])
        axes.minorticks_off()
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("embedded servers, on two cores with all else")
        axes.set_ylabel(title)
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def grow(
    rows: dict[str, dict[str, float]],
    counts: list[int],
    seconds: float,
    address_of_ray: str | None,
    servers: list[Simulator],
) -> None:
    """Add ``rollout`` on so many of the servers each, here or from the nodes of a cluster, to the rows."""
    with contextlib.nullcontext() if address_of_ray is None else Cluster(address_of_ray):
        for count in counts:
            some = servers[:count]
            row = rollout(tuple(map(address, some)), [server.process.pid for server in some], seconds)
            rows[str(count)] = row
            said = ", ".join(f"{key} {value:.2f}" for key, value in row.items())
            print(f"{count} servers, {said}; load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    """Measure, print a line each and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each rollout (default: %(default)s)")
    parser.add_argument("--servers", nargs="+", type=int, default=SERVERS, help="how many (default: 1, 2, 4 and 8)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="that are measured now (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "servers.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    nodes = Nodes() if {RAY, SHARDS} & {*args.parts} else None
    servers = [Simulator() for _ in range(max(args.servers))] if {HERE, RAY} & {*args.parts} else []
    try:
        if HERE in args.parts:
            grow(results.setdefault(HERE, {}), args.servers, args.seconds, None, servers)
        if RAY in args.parts and nodes is not None:
            nodes.add(*map(address, servers))
            grow(results.setdefault(RAY, {}), args.servers, args.seconds, nodes.address, servers)
            nodes.kill()
        for server in servers:
            server.stop()
        for count in (1, 2) if SHARDS in args.parts and nodes is not None else ():
            if count == 2:
                nodes.add()
            with tempfile.TemporaryDirectory() as directory:
                rate = shards(nodes, Path(directory))
            print(f"{count} nodes of one processor: {rate:.2f} shards/s; load {os.getloadavg()[0]:.1f}", flush=True)
            results.setdefault(SHARDS, {})[str(count)] = rate
    finally:
        if nodes is not None:
            nodes.close()
        for server in servers:
            server.stop()
        file.write_text(json.dumps(results, indent=1) + "\n")
    if rollouts := {name: results[name] for name in (HERE, RAY) if name in results}:
        plot(args.out / "servers.png", rollouts)


if __name__ == "__main__":
    main()
