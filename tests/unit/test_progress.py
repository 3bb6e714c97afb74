"""Progress of the stages as lines of JSON, for programs that start them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_teacher import start, wait_for

from carla_digr.cli import main


@pytest.mark.slow
def test_a_stage_tells_programs_how_far_it_is(copied_run, tiny_yaml, tiny_config, capfd):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    assert main(["distill", str(tiny_yaml), "--out", str(out), "--progress", "json"]) == 0
    told, errors = capfd.readouterr()
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert {line["phase"] for line in lines} == {"distill"} and not errors.strip()
    done = [line["done"] for line in lines]
    assert done == sorted(done) and done[0] == 0 and done[-1] == tiny_config.distill.iterations
    assert all((line["total"], line["unit"]) == (tiny_config.distill.iterations, "it") for line in lines)
    assert lines[0]["seconds_left"] is None and lines[0]["figures"] == {}
    assert lines[-1]["seconds_left"] == 0 and lines[-1]["rate"] > 0
    assert 0 <= lines[-1]["figures"]["share"] <= 1
    assert told.splitlines()[-1].startswith(f"{out / 'student.safetensors'}: ")


@pytest.mark.slow
def test_a_bar_is_drawn_for_people(copied_run, tiny_yaml, capfd):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    assert main(["distill", str(tiny_yaml), "--out", str(out)]) == 0
    told, drawn = capfd.readouterr()
    assert "distill: 100%" in drawn and "share=" in drawn and not told.startswith("{")


@pytest.mark.slow
def test_a_stage_that_resumes_counts_on(tmp_path, tiny_yaml, tiny_config):
    process = start("train-teacher", tiny_yaml, tmp_path)
    try:
        wait_for((tmp_path / "teacher" / "state.safetensors").exists, process)
    finally:
        process.kill()
        process.wait()
    command = [sys.executable, "-m", "carla_digr.cli", "train-teacher", str(tiny_yaml), "--out", str(tmp_path)]
    again = subprocess.run([*command, "--progress", "json"], check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in again.stdout.splitlines() if line.startswith("{")]
    placed = [line for line in lines if line["done"]]
    assert placed[0]["rate"] is None  # of this run, which has not made a step yet
    resumed = [line["done"] for line in placed]
    assert resumed[0] >= tiny_config.teacher.checkpoint_interval
    assert resumed[-1] == lines[-1]["total"] == tiny_config.teacher.total_steps
