"""The offline stages from the command line, end to end."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from test_teacher import start, wait_for

from carla_digr import checkpoint
from carla_digr.cli import main
from carla_digr.errors import UserError
from carla_digr.evaluation.evaluate import _Parts, _reference_maps, evaluate, task_report
from carla_digr.evaluation.saliency_methods import DIGR_LINEAR
from carla_digr.policy import ActorCritic
from carla_digr.saliency import METHODS
from carla_digr.tasks import load_config, make_task
from carla_digr.training.rollout import load_policy
from carla_digr.training.saliency_dataset import load_dataset, make_dataset
from carla_digr.training.state import only_job_in


@pytest.mark.slow
def test_the_four_stages_leave_a_report(tmp_path, tiny_yaml, tiny_run, capsys):
    stages = ("train-teacher", "make-dataset", "distill", "evaluate")
    for stage in stages:
        assert main([stage, str(tiny_yaml), "--out", str(tmp_path)]) == 0
    for name in ("teacher.safetensors", "student.safetensors"):  # the seed decides
        assert (tmp_path / name).read_bytes() == (tiny_run / name).read_bytes()
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert set(results["performance"]) == {
        "teacher, sampled",
        "teacher, greedy",
        "student, sampled",
        "student, greedy",
        "random",
    }
    for row in results["performance"].values():
        assert 0 <= row["success"]["mean"] <= 1
    assert set(results["saliency"]) == {method.title for method in METHODS.values()} | {DIGR_LINEAR}
    for row in results["saliency"].values():
        assert 0 <= row["auc"] <= 1 and 0 <= row["share"] <= 1 and row["milliseconds"] > 0
    assert results["saliency"]["Gaussian-Blur Perturbation"]["agreement"] == pytest.approx(1)
    report = (tmp_path / "evaluation" / "report.md").read_text()
    assert all(policy in report for policy in results["performance"])
    picture = cv2.imread(str(tmp_path / "evaluation" / "figure_maps.png"))
    assert picture is not None and np.ptp(picture) > 200

    # what was measured is kept, and equal when asked again
    assert main(["evaluate", str(tiny_yaml), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text()) == results


@pytest.mark.slow
def test_an_evaluation_by_several_processes_has_the_same_figures(tmp_path, tiny_yaml, tiny_run):
    found = []
    weights = tiny_run / "teacher.safetensors", tiny_run / "student.safetensors"
    for processes in (1, 3):
        out = tmp_path / str(processes)
        evaluate(load_config(tiny_yaml), out, *weights, processes=processes)
        found.append(json.loads((out / "evaluation" / "results.json").read_text()))
    for name in ("performance", "robustness", "table_1", "causal"):
        assert found[0][name] == found[1][name] and found[0][name]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_what_a_killed_process_of_an_evaluation_had_is_measured_all_the_same(tmp_path, tiny_yaml):
    parts = _Parts(tmp_path / "parts.json", load_config(tiny_yaml))
    nothing = tmp_path / "nothing.safetensors"  # which a process cannot begin with
    with parts.beside(2, (load_config(tiny_yaml), nothing, nothing, None, tmp_path), ["one", "two"]):
        assert parts.get("one", lambda: 1) == 1 and parts.get("two", lambda: 2) == 2
    assert json.loads((tmp_path / "parts.json").read_text())["finished"] == {"one": 1, "two": 2}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("make-dataset", "Cannot read the policy weights"),
        ("distill", "Cannot read the policy weights"),
    ],
)
def test_a_stage_without_its_input_is_one_sentence(tmp_path, tiny_yaml, capsys, stage, sentence):
    assert main([stage, str(tiny_yaml), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("carla-digr: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_wrong_key_is_status_2_and_one_line(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("task: red_fetch_green\nteacher: {total_step: 3}")
    assert main(["train-teacher", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"carla-digr: {path}: unknown key 'teacher.total_step' (did you mean 'total_steps'?).\n"
    )


def test_a_wrong_seed_is_refused(tiny_yaml, capsys):
    assert main(["train-teacher", str(tiny_yaml), "--seed", "-1"]) == 2
    assert "--seed must lie in" in capsys.readouterr().err


def test_an_output_path_that_is_a_file_is_refused(tmp_path, tiny_yaml, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    assert main(["train-teacher", str(tiny_yaml), "--out", str(path / "run")]) == 2
    assert f"{path} is not a writable directory" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_is_status_130_and_one_sentence(tmp_path, tiny_yaml):
    process = start("train-teacher", tiny_yaml, tmp_path, stderr=subprocess.PIPE)
    try:
        wait_for((tmp_path / "teacher" / "state.safetensors").exists, process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert error.decode().endswith("\ncarla-digr: Interrupted; run the same command again to resume.\n")
    assert b"Traceback" not in error


def test_a_second_job_in_the_same_directory_is_refused(tmp_path, tiny_yaml, capsys):
    with only_job_in(tmp_path / "teacher"):
        assert main(["train-teacher", str(tiny_yaml), "--out", str(tmp_path)]) == 2
    assert "Another job is at work in" in capsys.readouterr().err
    with only_job_in(tmp_path / "teacher"):
        pass  # let go of


def test_a_policy_of_another_picture_size_is_refused(tmp_path, tiny_run, tiny_config):
    card = json.loads((tiny_run / "teacher.json").read_text())
    policy = ActorCritic(tiny_config.policy, 3, 72, 64, 4)
    checkpoint.save(tmp_path / "other.safetensors", policy, card)
    with pytest.raises(UserError, match=r"takes pictures \(3, 72, 64\) .* now has \(3, 64, 64\)"):
        load_policy(tmp_path / "other.safetensors", make_task(tiny_config))


@pytest.mark.parametrize("score", ["kl", "logits"])
def test_maps_are_held_against_those_that_the_dataset_keeps_its_score_included(tmp_path, tiny_run, tiny_config, score):
    """A map that marks what the dataset keeps has no share outside of it, by either score."""
    dataset = replace(tiny_config.saliency_dataset, score=score, maps=8, workers=1)
    config = replace(tiny_config, saliency_dataset=dataset)
    teacher, card = checkpoint.load(tiny_run / "teacher.safetensors")
    with torch.no_grad():  # a policy that hardly prefers anything has divergences of the size of float32's rounding
        teacher.policy_head.weight.mul_(50.0)
    checkpoint.save(tmp_path / "teacher.safetensors", teacher, card)
    make_dataset(config, tmp_path, tmp_path / "teacher.safetensors")
    made = load_dataset(tmp_path / "dataset")
    reference = _reference_maps(config, teacher, made.states.numpy())
    assert torch.allclose(reference, made.maps.float(), atol=1e-3)


def test_a_task_of_another_package_may_name_a_report_of_its_own():
    own = SimpleNamespace(name="theirs", report="carla_digr.evaluation.breakout")
    assert task_report(own) is importlib.import_module("carla_digr.evaluation.breakout")
    assert task_report(SimpleNamespace(name="theirs")) is importlib.import_module("carla_digr.evaluation.any_task")


def test_help_needs_no_heavy_import():
    code = "import sys; from carla_digr.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'torch', 'numpy', 'numba', 'stable_baselines3', 'carla'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
