"""`combine`: several seeds' evaluations as one."""

from __future__ import annotations

import copy
import json

import cv2
import numpy as np
import pytest

from carla_digr.cli import main
from carla_digr.evaluation.seeds import over_seeds


def evaluation(seed, success, auc):
    point = {"mean": success, "standard_deviation": 9.0, "standard_error": 9.0}
    return {
        "task": "red_fetch_green",
        "seed": seed,
        "config": {"evaluation": {"attack_episodes": 50}},
        "student": {"weights_sha256": f"{seed:064x}"},
        "performance": {"teacher, sampled": {"success": point}},
        "saliency": {"DIGR": {"auc": auc, "share": None, "milliseconds": 1.0}},
        "table_1": {"DIGR": {"auc": auc, "states": 100}},
        "robustness": {"DIGR": {"FGSM": {"0": point, "0.04": point}}},
    }


@pytest.fixture
def evaluations(tmp_path):
    directories = []
    for seed, success, auc in ((0, 0.9, 0.98), (1, 1.0, 1.0), (2, 0.8, 0.99)):
        directory = tmp_path / f"seed{seed}"
        directory.mkdir()
        (directory / "results.json").write_text(json.dumps(evaluation(seed, success, auc)))
        directories.append(str(directory))
    return directories


def test_every_figure_is_the_mean_and_deviation_over_the_seeds(tmp_path, evaluations, capsys):
    out = tmp_path / "all"
    assert main(["combine", *evaluations, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["seeds"] == [0, 1, 2]
    expected = {"mean": 0.9, "standard_deviation": 0.1, "standard_error": 0.1 / 3**0.5}
    assert results["performance"]["teacher, sampled"]["success"] == pytest.approx(expected)
    assert results["robustness"]["DIGR"]["FGSM"]["0.04"] == pytest.approx(expected)
    assert results["table_1"]["DIGR"]["auc"]["mean"] == pytest.approx(0.99)
    assert "share" not in results["saliency"]["DIGR"]
    report = (out / "report.md").read_text()
    assert "seeds 0, 1, 2" in report and "| DIGR | FGSM | 0.9 ± 0.1 | 0.9 ± 0.1 |" in report
    assert capsys.readouterr().out.strip() == report.strip()
    assert np.ptp(cv2.imread(str(out / "figure_attacks.png"))) > 200


def test_one_value_each_is_kept_apart_from_trees():
    trees = [{"a": {"b": 1.0}, "c": 2}, {"a": {"b": 3.0}, "d": 5}]
    combined = over_seeds(copy.deepcopy(trees))
    assert list(combined) == ["a"] and combined["a"]["b"]["mean"] == 2.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda results: results.update(task="driving"), "is of the task driving"),
        (lambda results: results["student"].update(weights_sha256=f"{0:064x}"), "evaluate the same student"),
        (lambda results: results.pop("saliency"), "is not the result of an evaluation"),
    ],
)
def test_what_does_not_belong_together_is_one_sentence(tmp_path, evaluations, capsys, change, sentence):
    path = tmp_path / "seed1" / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    assert main(["combine", *evaluations, "--out", str(tmp_path / "all")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "all").exists()


def test_a_missing_evaluation_is_named(tmp_path, capsys):
    assert main(["combine", str(tmp_path / "none"), "--out", str(tmp_path / "all")]) == 2
    assert "none/results.json: No such file or directory" in capsys.readouterr().err
