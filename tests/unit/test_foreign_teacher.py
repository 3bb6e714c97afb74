"""A teacher of another architecture: its dataset, a student of it, their evaluation; what is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_run import TINY
from torch import nn

from carla_digr import checkpoint
from carla_digr.cli import main
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, InputRecipe, TorchPolicy
from carla_digr.tasks import make_task
from carla_digr.training.distill import distill
from carla_digr.training.rollout import load_policy
from carla_digr.training.state import load_state

ACTIONS = ("left", "right", "forward", "pickup")
FACTORY = f"{__name__}:network"


def network(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(384, outputs))


def save(path, actions=ACTIONS, shape=(3, 64, 64), outputs=4, **kwargs):
    """A policy without a critic, as `import` writes one: its card names no task."""
    torch.manual_seed(2)
    policy = TorchPolicy(network(outputs), shape, len(actions), **kwargs)
    with torch.no_grad():
        policy.network[3].weight.mul_(10)
    description = {"kind": "module", "factory": FACTORY}
    checkpoint.save(
        path, policy, {"task": None, "role": "imported", "action_names": list(actions), "network": description}
    )
    return policy


@pytest.mark.slow
def test_a_teacher_of_another_architecture_is_distilled_into_a_student_of_the_configurations_layers(tmp_path, capsys):
    path, weights = tmp_path / "tiny.yaml", tmp_path / "teacher.safetensors"
    values = {**TINY, "distill": {**TINY["distill"], "start": "random", "hard_states": 0.0, "loss": "none"}}
    path.write_text(yaml.safe_dump(values))
    save(weights, actions=("a", "b", "c", "d"))
    stages = [str(path), "--out", str(tmp_path), "--module", FACTORY]
    assert main(["make-dataset", *stages]) == 0
    assert "calls its actions a, b, c, d, which are taken for left, right, forward, pickup" in capsys.readouterr().err
    assert main(["distill", *stages]) == 0
    student, card = checkpoint.load(tmp_path / "student.safetensors")
    assert isinstance(student, ActorCritic) and student.config.convolutions == tuple(
        map(tuple, TINY["policy"]["convolutions"])
    )
    assert card["action_names"] == list(ACTIONS) and card["task"] == "red_fetch_green"
    history = load_state(tmp_path / "distill" / "state.safetensors")[1]["history"]
    assert history[-1]["kl"] < 0.7 * history[0]["kl"]  # it learns from it

    # interrupted and resumed with another student's layers: another job
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**values, "policy": {**TINY["policy"], "features": 8}}))
    assert main(["distill", str(other), *stages[1:]]) == 2
    assert "policy.features = 16, now it is 8" in capsys.readouterr().err

    assert main(["evaluate", *stages, "--teacher", str(weights)]) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["teacher"]["weights_sha256"] != results["student"]["weights_sha256"]
    assert {"DIGR", "Vanilla Gradient", "Grad-CAM", "SARFA"} <= set(results["saliency"])
    assert set(results["left_out"]) == {"Guided Backpropagation", "SmoothGrad"}  # of a network with tanh
    assert "SmoothGrad is left out: " in (tmp_path / "evaluation" / "report.md").read_text()
    assert list(results["robustness"]) == ["teacher", "DIGR"]


def test_a_student_cannot_begin_from_the_weights_of_another_network(tmp_path, tiny_config, tiny_run):
    shutil.copytree(tiny_run / "dataset", tmp_path / "dataset")
    save(tmp_path / "teacher.safetensors")
    manifest = tmp_path / "dataset" / "manifest.json"
    digest = json.loads((tmp_path / "teacher.json").read_text())["weights_sha256"]
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "teacher_sha256": digest}))
    with pytest.raises(UserError, match=r"another network than the student.*set distill\.start: random\.$"):
        distill(tiny_config, tmp_path, tmp_path / "teacher.safetensors", FACTORY)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"outputs": 8, "output": "gaussian"}, "continuous actions.* distilling it is not supported"),
        (
            {"actions": ("a", "b"), "outputs": 2},
            r"has 2 actions, but the task red_fetch_green has .* and 4;",
        ),
        ({"recipe": InputRecipe("bgr")}, "takes 1 bgr pictures, but the task red_fetch_green shows 1 rgb"),
    ],
)
def test_a_policy_that_does_not_fit_the_task_is_one_sentence(tmp_path, tiny_config, monkeypatch, changes, sentence):
    outputs = changes.get("outputs", 4)
    monkeypatch.setattr(f"{__name__}.network", lambda n=outputs, make=network: make(n))
    save(tmp_path / "other.safetensors", **changes)
    with pytest.raises(UserError, match=sentence):
        load_policy(tmp_path / "other.safetensors", make_task(tiny_config), FACTORY)


def test_a_policy_of_another_task_is_still_refused(tmp_path, tiny_run, tiny_config):
    card = json.loads((tiny_run / "teacher.json").read_text())
    policy, _ = checkpoint.load(tiny_run / "teacher.safetensors")
    checkpoint.save(tmp_path / "other.safetensors", policy, {**card, "task": "driving"})
    with pytest.raises(UserError, match="is a policy for the task driving; this needs one for red_fetch_green"):
        load_policy(tmp_path / "other.safetensors", make_task(tiny_config))
    other = replace(tiny_config, seed=4)
    assert load_policy(tiny_run / "teacher.safetensors", make_task(other))[1]["seed"] == 3
