"""The four stages on Breakout in a tiny configuration, and its report."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from carla_digr.cli import main
from carla_digr.evaluation.breakout import UNIFORM, truth_row
from carla_digr.saliency import METHODS
from carla_digr.tasks import load_config, parse_config
from carla_digr.tasks.breakout import BALL, PADDLE
from carla_digr.training.teacher import train_teacher

TINY = {
    "task": "breakout",
    "seed": 1,
    "policy": {"convolutions": [[4, 8, 4], [4, 4, 2], [4, 3, 1]], "features": 16},
    "environment": {"max_frames": 400},
    "teacher": {"total_steps": 256, "environments": 4, "rollout_steps": 32, "epochs": 1, "minibatch_size": 64},
    "saliency_dataset": {"maps": 12, "radius": 8, "stride": 14, "state_interval": 3, "environments": 4},
    "distill": {
        "iterations": 6,
        "environments": 2,
        "environment_steps": 1,
        "buffer_states": 200,
        "saliency_batch": 4,
        "buffer_batch": 4,
        "held_out": 0.3,
    },
    "evaluation": {
        "episodes": 3,
        "environments": 3,
        "saliency_states": 9,
        "slow_states": 4,
        "examples": 2,
        "causal_scenes": 5,
        "causal_environments": 2,
    },
}


@pytest.mark.slow
def test_the_stages_end_in_a_report_with_scores_maps_and_play(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    for stage in ("train-teacher", "make-dataset", "distill", "evaluate"):
        assert main([stage, str(path), "--out", str(tmp_path)]) == 0
    curve = (tmp_path / "teacher" / "curve.csv").read_text().splitlines()
    assert "score" in curve[0].split(",") and curve[-1].startswith("256,")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert set(results["truth"]) == {*results["saliency"], UNIFORM}
    assert len(results["saliency"]) == len(METHODS) + 1  # the student's linearised map too
    assert results["truth"]["SARFA"]["states"] <= 4 and results["truth"][UNIFORM]["states"] == 9
    assert 0.001 < results["truth"][UNIFORM]["share"]["0"] < 0.02 and results["truth"][UNIFORM]["auc"] == 0.5
    causal = results["causal"]
    assert (
        causal["scenes"] == 5
        and causal["named"] == causal["needed"] == "ball and paddle"
        and causal["plays"] == "sampled"
    )
    assert set(causal["effects"]["student"]) == {"ball", "paddle", "bricks", "wall", "score"}
    assert results["performance"]["always noop"]["score"]["mean"] == 0  # nobody hits the ball back
    report = (tmp_path / "evaluation" / "report.md").read_text()
    for said in (
        "paper's teacher: 320",
        "| teacher, sampled |",
        "(play.gif)",
        "(figure_maps.png)",
        "(figure_causal.png)",
        f"| {UNIFORM} |",
    ):
        assert said in report
    with Image.open(io.BytesIO((tmp_path / "evaluation" / "play.gif").read_bytes())) as play:
        assert play.n_frames > 50 and play.size == (320, 210)
    picture = cv2.imread(str(tmp_path / "evaluation" / "figure_maps.png"))
    assert picture is not None and np.ptp(picture) > 200


@pytest.mark.slow
def test_a_training_in_two_parts_is_the_training_in_one(tmp_path):
    config = parse_config(TINY, "tiny")  # with a constant learning rate
    half = replace(config, teacher=replace(config.teacher, total_steps=128))
    for parts, out in (((half, config), tmp_path / "two"), ((config,), tmp_path / "one")):
        for part in parts:
            train_teacher(part, out)
    assert (tmp_path / "two" / "teacher.safetensors").read_bytes() == (
        tmp_path / "one" / "teacher.safetensors"
    ).read_bytes()


def test_truth_of_maps_that_mark_the_ball_the_paddle_or_beside_them():
    classes = np.zeros((4, 84, 84), np.int8)
    classes[:, 76:78, 30:39] = PADDLE
    classes[:, 50:52, 40:42] = BALL
    maps = np.zeros((4, 84, 84), np.float32)
    maps[0][classes[0] == BALL] = 1
    maps[1][classes[1] == PADDLE] = 1
    maps[2, 54, 40] = 1  # three pixels under the ball; the fourth marks nothing
    row = truth_row(maps, classes)
    assert row["states"] == 3
    assert row["ball"] == pytest.approx(1 / 3) and row["paddle"] == pytest.approx(1 / 3)
    assert row["share"] == pytest.approx({"0": 2 / 3, "2": 2 / 3, "4": 1.0})
    assert row["pointing"] == pytest.approx({"0": 2 / 3, "2": 2 / 3, "4": 1.0})
    assert 0.6 < row["auc"] < 0.95
    nothing = truth_row(maps[3:], classes[3:])
    assert nothing["states"] == 0 and nothing["auc"] is None and nothing["share"]["2"] is None


def test_the_configuration_that_ships_is_the_papers_but_for_what_it_says():
    config = load_config("configs/breakout.yaml")
    assert config.teacher.environments * config.teacher.rollout_steps % config.teacher.minibatch_size == 0
    assert config.saliency_dataset.maps == 10_000
    assert config.saliency_dataset.threshold == 0.1 and config.teacher.gamma == 0.99
