"""All four stages by command on two simulators, killed and resumed on the way, while one of the simulators dies."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import sys

import pytest
import yaml
from simulator_process import Simulator, eventually
from test_acceptance import ANOTHER_VERSION
from test_servers import TINY, address, assert_left_alone

from carla_digr.checkpoint import read_card
from carla_digr.cli import main

EVALUATION = {
    "episodes": 4,
    "environments": 2,
    "saliency_states": 4,
    "examples": 1,
    "table_states": 4,
    "slow_states": 2,
    "attack_episodes": 2,
    "attack_epsilons": [0.02],
    "attack_seconds": 1.0,
    "drive_seconds": 20.0,
}
BEGUN = {
    "train-teacher": "teacher/state.safetensors",
    "make-dataset": "dataset",
    "distill": "distill/state.safetensors",
    "evaluate": "evaluation/parts.json",
}
"""What a stage has written when it is killed."""


def command(stage, file, out, log):
    arguments = [sys.executable, "-m", "carla_digr.cli", stage, str(file), "--out", str(out)]
    return subprocess.Popen(arguments, stdout=log, stderr=log)


def children_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def ended(pids: list[int]) -> bool:
    return (
        not pids
        or not subprocess.run(["ps", "-o", "pid=", *map(str, pids)], capture_output=True, text=True).stdout.split()
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kind, options",
    [("embedded", []), ("carla", ["--like", "carla", "--traits=-slow"])],
    ids=["ordinary", "like carla"],
)
def test_all_stages_outlive_their_own_end_and_a_servers(kind, options, tmp_path):
    servers = [Simulator(options=options) for _ in range(2)]
    values = {**TINY, "evaluation": EVALUATION}
    values["environment"] = {
        **TINY["environment"],
        "simulators": [address(server) for server in servers],
        "kind": kind,
        "vehicles": 8,
        "timeout": 4.0,
    }
    values["teacher"] = {**TINY["teacher"], "total_steps": 960}
    values["saliency_dataset"] = {**TINY["saliency_dataset"], "maps": 40, "shard_size": 4}
    values["distill"] = {**TINY["distill"], "iterations": 40}
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(values))
    for stage, begun in BEGUN.items():
        with (tmp_path / f"{stage}.log").open("w") as log:
            first = command(stage, file, out, log)
            eventually((out / begun).exists, 180.0)
            drives = children_of(first)
            first.send_signal(signal.SIGKILL)
            first.wait()
            eventually(lambda pids=drives: ended(pids), 40.0)
            again = command(stage, file, out, log)
            if stage != "make-dataset":
                time_of = (out / begun).stat().st_mtime_ns
                eventually(lambda t=time_of, b=begun: (out / b).stat().st_mtime_ns != t, 180.0)
                port = servers[1].port
                servers[1].stop()
                told = tmp_path / f"{stage}.log"
                eventually(lambda told=told: re.search("episode is cut|is waited for", told.read_text()), 60.0)
                servers[1] = Simulator(port, options=options)
            assert again.wait(900) == 0, (tmp_path / f"{stage}.log").read_text()
        text = (tmp_path / f"{stage}.log").read_text()
        assert "Traceback" not in text
        if stage == "train-teacher":
            assert re.search("Its episode is cut; the others drive on", text)
    assert read_card(out / "teacher.safetensors")["steps"] == 960
    assert len(json.loads((out / "dataset" / "manifest.json").read_text())["shards"]) == 10
    assert (out / "distill" / "curve.csv").read_text().splitlines()[-1].startswith("40")
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert {*results["performance"]} >= {"teacher, greedy", "student, greedy", "expert with full state"}
    assert results["truth"]["DIGR"]["states"] == 4 and "causal" not in results
    assert_left_alone(*servers)
    for server in servers:
        assert "Traceback" not in server.stop()


@pytest.mark.long
def test_a_server_with_another_map_or_none_to_drive_on_ends_the_stage_with_a_sentence(
    shared_simulator, tmp_path, capsys
):
    town = Simulator(options=["--traits", "town,limits"])
    file = tmp_path / "run.yaml"

    def refused(*simulators: Simulator, **environment) -> str:
        environment = {**TINY["environment"], "simulators": [address(s) for s in simulators], **environment}
        teacher = {**TINY["teacher"], "environments": len(simulators), "minibatch_size": 48}
        file.write_text(yaml.safe_dump({**TINY, "environment": environment, "teacher": teacher}))
        assert main(["train-teacher", str(file), "--out", str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        return [line for line in lines if line.startswith("carla-digr: ")][-1]

    other, older = Simulator(), Simulator(altered=ANOTHER_VERSION)
    assert "load the same map everywhere" in refused(shared_simulator, other, town, kind="carla")
    assert "0.9.15" in refused(shared_simulator, older)
    assert "twice; each drives one environment" in refused(shared_simulator, shared_simulator)
    assert "has no spawn point on the road 77" in refused(shared_simulator, roads=[77])
    assert "is not the embedded highway" in refused(town)
    gone = Simulator()
    gone.stop()
    assert "No simulator answers" in refused(shared_simulator, gone, timeout=1.0)
    assert not multiprocessing.active_children()
    assert_left_alone(shared_simulator, other, town)
    for simulator in (other, older, town):
        simulator.stop()
