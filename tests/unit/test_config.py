"""Configurations: strict keys and types, errors that name file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from carla_digr.config import ENVIRONMENTS, load_config, parse_config
from carla_digr.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    [
        *ENVIRONMENTS,
        "red_fetch_green_stride4",
        "red_fetch_green_paper",
        "driving_paper",
        "driving_longer",
        "driving_annotation",
    ],
)
def test_shipped_configurations_load_and_survive_a_card(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert name.startswith(config.task)
    assert parse_config(config.to_dict(), "card") == config


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
