"""`evaluate --quick` on Red-Fetch-Green: the paper's tables and figures, from tiny policies."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest

from carla_digr.cli import main
from carla_digr.evaluation.red_fetch_green import TABLE_1
from carla_digr.evaluation.saliency_methods import DIGR_LINEAR
from carla_digr.saliency import METHODS
from carla_digr.saliency.methods import Method


def brightness(policy, states, *, target=None):
    """A method that a package might add."""
    return states.amax(dim=1)


@pytest.mark.slow
def test_quick_writes_every_table_and_figure_and_takes_a_method_that_the_paper_does_not_have(
    copied_run, tiny_yaml, monkeypatch
):
    monkeypatch.setitem(METHODS._own, "bright", Method("Brightness", "the picture", "frame", brightness))
    out = copied_run("teacher.safetensors", "teacher.json", "student.safetensors", "student.json", "distill")
    for suffix in ("safetensors", "json"):
        shutil.copy(out / f"student.{suffix}", out / f"student_distillation.{suffix}")
    assert main(["evaluate", str(tiny_yaml), "--out", str(out), "--quick"]) == 0
    directory = out / "evaluation-quick"
    results = json.loads((directory / "results.json").read_text())
    titles = {method.title for method in METHODS.values()}
    assert set(results["table_1"]) == titles | {DIGR_LINEAR} > {*TABLE_1, "Brightness"}
    for row in results["table_1"].values():
        assert 0 <= row["auc"] <= 1 and 0 <= row["important"] <= 128 and 0 <= row["unimportant"] <= 2048
    assert results["table_1"]["SARFA"]["states"] == 8 and results["table_1"]["DIGR"]["states"] == 200
    assert list(results["robustness"]) == ["teacher", "distillation only", "DIGR"]
    for by_attack in results["robustness"].values():
        assert list(by_attack) == ["FGSM", "PGD", "MI-FGSM", "MAD", "uniform noise"]
        clean = {curve["0"]["mean"] for curve in by_attack.values()}
        assert len(clean) == 1  # without an attack the curves meet
    causal = results["causal"]
    assert causal["scenes"] == 6 and causal["named"] == "balls" and causal["needed"] == "target and agent"
    assert set(causal["effects"]["student"]) == {"target", "distractor", "wall", "agent"}
    assert causal["rows"].keys() == {"teacher", "student"} and "Brightness" in causal["rows"]["student"]
    report = (directory / "report.md").read_text()
    (row,) = (line for line in report.splitlines() if line.startswith("| Brightness") and line.endswith("| 200 |"))
    assert "(" not in row  # no figures of the paper's beside it
    assert "72.52" in report and "| SARFA |" in report
    for name in ("figure_time", "figure_maps", "figure_causal", "figure_attacks", "figure_training"):
        picture = cv2.imread(str(directory / f"{name}.png"))
        assert picture is not None and np.ptp(picture) > 200, name
        assert f"({name}.png)" in report
