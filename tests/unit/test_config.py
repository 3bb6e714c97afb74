"""Configurations: strict keys and types, errors that name file, key and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from carla_digr.config import find_config, shipped_configs
from carla_digr.errors import UserError
from carla_digr.tasks import load_config, parse_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_load_and_survive_a_card(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert name.startswith(config.task) or config.task == "gymnasium"
    assert parse_config(json.loads(json.dumps(config.to_dict())), "card") == config


def test_every_task_of_ours_has_a_configuration_of_its_name_that_is_found_without_a_path(tmp_path, monkeypatch):
    assert {"red_fetch_green", "driving", "breakout", "driving_paper"} <= set(shipped_configs())
    assert not {"live", "rollout"} & set(shipped_configs())  # of other jobs
    monkeypatch.chdir(tmp_path)
    assert load_config("driving") == load_config(ROOT / "configs" / "driving.yaml")
    (tmp_path / "driving").mkdir()  # a run's directory, say
    assert find_config("driving").samefile(ROOT / "configs" / "driving.yaml")
    with pytest.raises(UserError, match=r"drivin: No such file or directory \(did you mean 'driving'"):
        load_config("drivin")
    (tmp_path / "mine").write_text("task: breakout")
    assert load_config("mine").task == "breakout"


def test_cards_of_every_task_have_keys_that_are_of_driving_now():
    old = {"task": "red_fetch_green", "evaluation": {"episodes": 3, "attack_seconds": 20.0, "drive_seconds": 600.0}}
    config = parse_config(old, "card")
    assert config.evaluation.episodes == 3 and "attack_seconds" not in config.to_dict()["evaluation"]
    kept = parse_config({**old, "task": "driving"}, "card").evaluation
    assert (kept.attack_seconds, kept.drive_seconds) == (20.0, 600.0)
    with pytest.raises(UserError, match=r"evaluation\.attack_second' .*'attack_seconds'"):
        parse_config({"task": "driving", "evaluation": {"attack_second": 1}}, "card")


def test_a_configuration_is_checked_without_torch_or_a_training_library():
    code = "import sys\nfrom carla_digr.config import shipped_configs\nfrom carla_digr.tasks import load_config\n"
    code += "for name in shipped_configs(): load_config(name)\n"
    code += "heavy = {'torch', 'stable_baselines3', 'numba', 'minigrid'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("task: red_fetch_green\nteacher: {epoch: 3}", ["teacher.epoch", "'epochs'"]),
        ("task: red_fetch_green\ntaecher: {}", ["taecher", "'teacher'"]),
        ("task: red_fetch_green\nenvironment: {max_step: 3}", ["environment.max_step", "'max_steps'"]),
        ("task: red_fetch", ["task", "red_fetch_green", "'red_fetch'"]),
        ("seed: 1", ["task"]),
        ("task: red_fetch_green\nteacher: {epochs: 2.5}", ["teacher.epochs", "whole number", "2.5"]),
        ("task: red_fetch_green\nteacher: {epochs: true}", ["teacher.epochs", "whole number"]),
        ("task: red_fetch_green\nteacher: {epochs: '4'}", ["teacher.epochs", "whole number"]),
        ("task: red_fetch_green\nteacher: {gamma: 1.5}", ["teacher.gamma", "[0, 1]"]),
        ("task: red_fetch_green\nteacher: {gamma: .nan}", ["teacher.gamma", "[0, 1]"]),
        ("task: red_fetch_green\nteacher: {learning_rate: .inf}", ["teacher.learning_rate"]),
        ("task: red_fetch_green\nteacher: {learning_rate: null}", ["teacher.learning_rate", "nothing"]),
        ("task: red_fetch_green\nteacher: 3", ["teacher", "mapping"]),
        ("task: red_fetch_green\ndistill: {loss: cover}", ["distill.loss", "coverage"]),
        ("task: red_fetch_green\ndistill: {floor: [0.1]}", ["distill.floor", "2 entries"]),
        ("task: red_fetch_green\npolicy: {convolutions: [[1, 2]]}", ["policy.convolutions[0]", "3 entries"]),
        ("task: red_fetch_green\npolicy: {convolutions: []}", ["policy.convolutions", "empty"]),
        ("task: red_fetch_green\nseed: 1\nseed: 2", ["seed", "twice"]),
        ("task: [", ["YAML"]),
        ("- task", ["mapping"]),
    ],
)
def test_a_wrong_configuration_is_one_sentence_that_names_file_and_key(tmp_path, text, parts):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message
    for part in [str(path), *parts]:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml.*No such file"):
        load_config(tmp_path / "absent.yaml")


def test_numbers_in_exponent_notation_are_numbers(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text("task: red_fetch_green\nteacher: {learning_rate: 1e-3, learning_rate_end: 2E-5, target_kl: null}")
    teacher = load_config(path).teacher
    assert (teacher.learning_rate, teacher.learning_rate_end, teacher.target_kl) == (1e-3, 2e-5, None)
