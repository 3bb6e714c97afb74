"""`evaluate` on driving: every table and figure from the weights that ship, over a few short drives."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import yaml

from carla_digr.cli import main
from carla_digr.evaluation.causal import COLUMNS, CONTRAST, FLAT, NEAR, OTHER, RANDOM_WEIGHTS
from carla_digr.evaluation.decision import RANDOM, REMOVED, area
from carla_digr.evaluation.driving import MARGINS
from carla_digr.evaluation.report import known_mean
from carla_digr.saliency import METHODS
from carla_digr.tasks.driving.classes import CLASSES

SHORT = {
    "task": "driving",
    "seed": 5,
    "environment": {"episode_seconds": 2.0},
    "saliency_dataset": {"radius": 5.0, "stride": 16, "state_interval": 4, "environments": 4},
    "evaluation": {
        "episodes": 2,
        "environments": 2,
        "saliency_states": 4,
        "examples": 2,
        "table_states": 12,
        "slow_states": 4,
        "causal_scenes": 3,
        "causal_interval": 10,
        "causal_environments": 2,
        "attack_episodes": 1,
        "attack_epsilons": [0.02],
        "attack_seconds": 1.0,
        "drive_seconds": 6.0,
    },
}
FIGURES = ("causal", "attacks", "mass", "truth", "decision", "randomised", "sequence")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    out = tmp_path_factory.mktemp("driving")
    (out / "short.yaml").write_text(yaml.safe_dump(SHORT))
    assert main(["evaluate", str(out / "short.yaml"), "--out", str(out)]) == 0
    directory = out / "evaluation"
    return directory, json.loads((directory / "results.json").read_text()), (directory / "report.md").read_text()


@pytest.mark.slow
def test_every_map_of_both_policies_is_held_against_what_decides(evaluation):
    _, results, report = evaluation
    causal = results["causal"]
    assert causal["scenes"] == 3 and causal["named"] == "vehicles" and 0 <= causal["changes"] <= 1
    controls = {FLAT, OTHER, CONTRAST, NEAR, RANDOM_WEIGHTS}
    titles = {method.title for method in METHODS.values()} - {"DIGR"}
    for whose in ("teacher", "student"):
        assert causal["rows"][whose].keys() == titles | controls
        assert set(causal["effects"][whose]) >= {"vehicle", "lane line", "barrier", "guard rail"}
        for row in causal["rows"][whose].values():
            assert row.keys() == COLUMNS.keys()
            assert 0 <= row["nothing"]["mean"] <= 1 and row["nothing"]["count"] == 3
    assert "## Which object decides?" in report and "Linearised Perturbation" in report


@pytest.mark.slow
def test_every_method_is_held_against_the_truth(evaluation):
    _, results, report = evaluation
    slow = {method.title for method in METHODS.values() if method.speed == "slow"}
    for name, row in results["truth"].items():
        assert row["states"] == (4 if name in slow else 12)
        assert list(row["by_class"]) == list(CLASSES)
        assert sum(row["by_class"].values()) == pytest.approx(1, abs=1e-4)
        # More pixels count as relevant with every margin, so no figure may fall.
        for figures in (row["relevant"], row["chance"]):
            assert len(figures) == len(MARGINS) and figures == sorted(figures)
        assert f"| {name} |" in report
    assert results["truth"]["Gaussian-Blur Perturbation"]["correlation"] == pytest.approx(1)
    assert results["truth"]["Gaussian-Blur Perturbation"]["overlap"] == pytest.approx(1)


@pytest.mark.slow
def test_the_curves_start_and_end_where_no_and_all_pixels_are_removed(evaluation):
    _, results, _ = evaluation
    for by_order in results["decision"].values():
        ends = {(row["deletion"][0], row["deletion"][-1]) for row in by_order.values()}
        assert len(ends) == 1  # whatever the order
        whole, blank = ends.pop()
        for row in by_order.values():
            assert row["insertion"][0] == pytest.approx(blank, abs=1e-6)
            assert row["insertion"][-1] == pytest.approx(whole, abs=1e-6)
            assert row["kept"][0] == 1
        assert RANDOM in by_order
    assert area([1.0] * len(REMOVED)) == pytest.approx(1)
    assert area(list(REMOVED)) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_long_drive_adds_up(evaluation):
    _, results, report = evaluation
    drive = results["drive"]
    assert drive["seconds"] == pytest.approx(6.0)
    assert 0 < drive["longest"] <= drive["distance"] <= 6.0 * 30
    assert f"{drive['collisions']:.0f} collisions" in report


@pytest.mark.slow
def test_every_figure_is_there_and_shows_something(evaluation):
    directory, results, report = evaluation
    for name in FIGURES:
        picture = cv2.imread(str(directory / f"figure_{name}.png"))
        assert picture is not None and np.ptp(picture) > 200, name
        assert f"(figure_{name}.png)" in report
    ok, movie = cv2.imreadanimation(str(directory / "drive.webp"))
    assert ok and len(movie.frames) > 10
    assert not np.array_equal(movie.frames[0], movie.frames[-1])
    assert results["perturbation_delay"]["every_pixel"] > results["perturbation_delay"]["stride"] > 0


def test_missing_values_are_left_out_of_means():
    assert known_mean([1.0, math.nan, 3.0]) == 2
    assert known_mean([math.nan]) is None
    assert known_mean([[1.0, math.nan], [3.0, math.nan]]) == [2, None]
