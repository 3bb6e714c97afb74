"""The offline stages from the command line, end to end."""

from __future__ import annotations

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from carla_digr.cli import main


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
    for row in results["saliency"].values():
        assert 0 <= row["auc"] <= 1 and 0 <= row["share"] <= 1 and row["milliseconds"] > 0
    assert results["saliency"]["teacher, Gaussian-blur perturbation"]["agreement"] == pytest.approx(1)
    report = (tmp_path / "evaluation" / "report.md").read_text()
    assert all(policy in report for policy in results["performance"])
    picture = cv2.imread(str(tmp_path / "evaluation" / "examples.png"))
    assert picture is not None and np.ptp(picture) > 200

    # what was measured is kept, and equal when asked again
    assert main(["evaluate", str(tiny_yaml), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("make-dataset", "Cannot read the policy weights"),
        ("distill", "Cannot read the policy weights"),
        ("evaluate", "Cannot read the policy weights"),
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


def test_help_needs_no_heavy_import():
    code = "import sys; from carla_digr.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'torch', 'numpy', 'numba', 'stable_baselines3', 'carla'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
