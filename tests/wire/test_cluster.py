"""The stages on two Ray nodes of this machine: the same bytes as without, also where one of the nodes is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from simulator_process import Simulator, eventually
from test_servers import TINY, address, assert_left_alone

from carla_digr import checkpoint
from carla_digr.files import sha256_of
from carla_digr.policy import ActorCritic
from carla_digr.tasks import make_task, parse_config

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TOKEN = "0123456789abcdef" * 2
ROOMS = {
    "task": "red_fetch_green",
    "seed": 3,
    "policy": {"convolutions": [[8, 8, 4], [8, 4, 2], [8, 3, 1]], "features": 16},
    "saliency_dataset": {"maps": 240, "shard_size": 4, "stride": 4, "state_interval": 3, "environments": 4},
    "evaluation": {
        "episodes": 16,
        "environments": 4,
        "saliency_states": 4,
        "examples": 1,
        "table_states": 4,
        "slow_states": 2,
        "attack_episodes": 2,
        "attack_epsilons": [0.05],
    },
}


class Nodes:
    """A head and other nodes on loopback, with token authentication, as `ray start` makes them."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of its sockets have at most 107 letters
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        self._started: list[subprocess.Popen[str]] = []
        log = self.start(
            "--head", "--port=0", "--node-ip-address=127.0.0.2", "--include-dashboard=false",
            f"--temp-dir={self.directory}",
        )  # fmt: skip
        found = re.search(r"address='(127\.0\.0\.2:\d+)'", log)
        assert found, log
        self.address = found[1]

    def start(self, *options: str, **environment: str) -> str:
        """One more node, of one processor; what it said."""
        command = [shutil.which("ray") or "ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
        pipe = subprocess.PIPE
        node = subprocess.Popen(
            command,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**self.environment, **environment},
        )
        self._started.append(node)
        said = ""
        assert node.stdout is not None
        for line in node.stdout:
            said += line
            if "--block" in line:
                return said
        raise AssertionError(said)

    def add(self, *servers: str, **environment: str) -> None:
        """A node that has these servers."""
        resources = json.dumps({f"simulator:{server}": 1 for server in servers})
        self.start(
            f"--address={self.address}", "--node-ip-address=127.0.0.3", f"--resources={resources}", **environment
        )

    def kill(self, number: int = -1) -> None:
        """All processes of a node at once, as a machine that loses its power."""
        node = self._started.pop(number)
        os.killpg(node.pid, signal.SIGKILL)
        node.communicate(timeout=30)

    def close(self) -> None:
        while self._started:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def command(self, stage: str, file: Path, out: Path, ray: str | None = None) -> subprocess.Popen[str]:
        """A stage on the nodes."""
        arguments = [stage, str(file), "--out", str(out), "--ray", ray or self.address]
        return subprocess.Popen(
            [sys.executable, "-m", "carla_digr.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def ends(self, process: subprocess.Popen[str], status: int = 0) -> str:
        """What a stage said; nothing of it is left running."""
        said = process.communicate(timeout=600)[0]
        assert process.returncode == status, said
        assert "Traceback" not in said, said
        eventually(lambda: not re.search(r"ray::_(call|Drive)", processes()), 30.0)
        return said


def here(stage: str, file: Path, out: Path, *more: str) -> None:
    """The same without a cluster, in a process as it is there."""
    subprocess.run([sys.executable, "-m", "carla_digr.cli", stage, str(file), "--out", str(out), *more], check=True)


def processes() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.close()


@pytest.fixture
def rooms(tmp_path) -> tuple[Path, Path]:
    """A configuration, and a directory with a teacher of random weights."""
    torch.manual_seed(1)
    config = parse_config(ROOMS, "rooms")
    out = tmp_path / "there"
    file = tmp_path / "rooms.yaml"
    file.write_text(yaml.safe_dump(ROOMS))
    task = make_task(config)
    names = list(task.action_names)
    policy = ActorCritic(config.policy, *task.observation_shape, len(names))
    out.mkdir()
    for role in ("teacher", "student"):
        checkpoint.save(
            out / f"{role}.safetensors", policy, {"task": config.task, "role": role, "action_names": names, "steps": 0}
        )
    return file, out


def test_a_dataset_is_the_same_where_a_node_is_killed_in_the_middle(nodes, rooms, tmp_path):
    file, out = rooms
    nodes.add()
    manifest = out / "dataset" / "manifest.json"

    def shards() -> int:
        return len(json.loads(manifest.read_text())["shards"]) if manifest.exists() else 0

    stage = nodes.command("make-dataset", file, out)
    eventually(lambda: shards() > 1 or stage.poll() is not None, 120.0)
    assert shards() < 50
    nodes.kill()
    nodes.ends(stage)
    here("make-dataset", file, tmp_path, "--weights", str(out / "teacher.safetensors"))
    names = sorted(path.name for path in (tmp_path / "dataset").glob("*.safetensors"))
    assert len(names) == 61
    for name in names:
        assert (tmp_path / "dataset" / name).read_bytes() == (out / "dataset" / name).read_bytes()


def test_an_evaluation_is_the_same_where_a_node_is_killed_in_the_middle(nodes, rooms, tmp_path):
    file, out = rooms
    nodes.add()
    parts = out / "evaluation" / "parts.json"
    stage = nodes.command("evaluate", file, out)
    eventually(lambda: parts.exists() or stage.poll() is not None, 120.0)
    nodes.kill()
    early = nodes.command("make-dataset", file, out)  # which the head tells of the node as if it were alive
    nodes.ends(early)
    nodes.ends(stage)
    weights = [f"--{role}={out / f'{role}.safetensors'}" for role in ("teacher", "student")]
    here("evaluate", file, tmp_path, *weights)
    one, two = (json.loads((place / "evaluation" / "results.json").read_text()) for place in (tmp_path, out))
    for name in ("performance", "robustness"):
        assert one[name] == two[name] and one[name]


def test_a_teacher_is_trained_beside_its_servers_with_the_bytes_of_one_in_process(nodes, tmp_path):
    servers = [Simulator(), Simulator()]
    one, two = map(address, servers)
    nodes.add(one)
    nodes.add(two)
    values = {**TINY, "environment": {**TINY["environment"], "simulators": [one, two]}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert "cut" not in nodes.ends(nodes.command("train-teacher", file, tmp_path / "there"))
    file.write_text(yaml.safe_dump(TINY))
    here("train-teacher", file, tmp_path / "here")
    assert sha256_of(tmp_path / "here" / "teacher.safetensors") == sha256_of(tmp_path / "there" / "teacher.safetensors")
    assert_left_alone(*servers)

    values["teacher"] = {**TINY["teacher"], "total_steps": 14400}
    file.write_text(yaml.safe_dump(values))
    stage = nodes.command("train-teacher", file, tmp_path / "killed")
    state = tmp_path / "killed" / "teacher" / "state.safetensors"
    eventually(lambda: state.exists() or stage.poll() is not None, 120.0)
    nodes.kill()
    nodes.add(two)
    said = nodes.ends(stage)
    assert "Its episode is cut; the others drive on" in said
    assert f"{two} drives again" in said
    assert checkpoint.read_card(tmp_path / "killed" / "teacher.safetensors")["steps"] == 14400
    assert_left_alone(*servers)
    for server in servers:
        server.stop()


def test_what_cannot_be_is_told_in_one_sentence(nodes, rooms, tmp_path):
    file, out = rooms
    driving = tmp_path / "driving.yaml"
    there = {**TINY, "environment": {**TINY["environment"], "simulators": ["127.0.0.1:9", "127.0.0.1:10"]}}
    driving.write_text(yaml.safe_dump(there))

    def told(stage: str, config: Path, ray: str | None = None) -> str:
        lines = nodes.ends(nodes.command(stage, config, out, ray), 2).strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("carla-digr: "), lines
        return lines[0]

    assert "No Ray head answers on 127.0.0.2:1, where a cluster was to be" in told("make-dataset", file, "127.0.0.2:1")
    with socket.create_server(("127.0.0.2", 0)) as other:  # listens, and says nothing
        where = f"127.0.0.2:{other.getsockname()[1]}"
        assert f"No Ray head answers on {where}" in told("make-dataset", file, where)
        nodes.environment["RAY_ADDRESS"] = where
        assert f"No Ray head answers on {where}" in told("make-dataset", file, "auto")
        del nodes.environment["RAY_ADDRESS"]
    assert "must be given as auto or as host:port, not 'here'" in told("make-dataset", file, "here")
    assert "name them in environment.simulators" in told("train-teacher", file)
    assert "No node of the cluster has the resource simulator:127.0.0.1:9" in told("train-teacher", driving)
    nodes.environment["RAY_AUTH_TOKEN"] = TOKEN[::-1]
    assert "cannot be joined: Authentication token is missing or incorrect; " in told("make-dataset", file)
    nodes.environment["RAY_AUTH_TOKEN"] = TOKEN
    altered = tmp_path / "sitecustomize.py"
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    altered.write_text("import ray\nray.__version__ = '2.0.9'\n")
    nodes.environment["PYTHONPATH"] = paths
    assert re.search(r"runs Ray [\d.]+ with .*, this machine Ray 2\.0\.9 with ", told("make-dataset", file))
    nodes.environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    altered.write_text("import carla_digr\ncarla_digr.__version__ = '0.0.9'\n")
    nodes.add(PYTHONPATH=paths)
    assert re.search(
        r"The node 127\.0\.0\.3 has carla_digr 0\.0\.9 .* install the same everywhere", told("make-dataset", file)
    )
