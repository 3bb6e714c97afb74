"""Where networks compute: one setting, no mixing, and the same results within rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from carla_digr import load_policy
from carla_digr.checkpoint import load
from carla_digr.cli import main
from carla_digr.config import PolicyConfig
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.policy import ActorCritic, device_of, device_under, to_input
from carla_digr.saliency import METHODS
from carla_digr.saliency.linear import differentiable_maps
from carla_digr.saliency.perturbation import Perturbation
from carla_digr.tasks import load_config
from carla_digr.training.distill import distill
from carla_digr.training.saliency_dataset import load_dataset, make_dataset
from carla_digr.training.supervision import saliency_loss
from carla_digr.training.teacher import train_teacher

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
WITHOUT_META = {"sarfa", "linear"}  # their shapes depend on values


@pytest.fixture
def elsewhere() -> ActorCritic:
    """A network on a device without values, which refuses tensors of another as a GPU does."""
    return ActorCritic(PolicyConfig(((8, 8, 4), (8, 4, 2)), 16), 3, 128, 128, 4).to("meta")


@pytest.mark.parametrize("name", sorted(set(METHODS) - WITHOUT_META))
def test_a_method_computes_where_the_policy_is(elsewhere, name):
    states = to_input(torch.zeros(2, 3, 128, 128, dtype=torch.uint8, device=device_under(elsewhere)))
    found = METHODS[name](elsewhere, states, perturbation=Perturbation(stride=32))
    assert found.device == device_under(elsewhere) and found.shape == (2, 128, 128)
    with pytest.raises(RuntimeError, match="device"):
        found + torch.zeros(128)


def test_what_distillation_differentiates_is_where_the_policy_is(elsewhere):
    states = torch.zeros(2, 3, 128, 128, device="meta")
    logits = elsewhere.trace(states)[0]
    maps = differentiable_maps(elsewhere, states, logits)
    penalised = torch.zeros(2, 128, 128, dtype=torch.bool, device="meta")
    for kind in ("coverage", "log_ratio", "share", "paper"):
        assert saliency_loss(kind, maps[:, None], penalised, 0.01).device.type == "meta"


def test_without_a_gpu_auto_is_the_processor_and_cuda_a_sentence(tmp_path, tiny_yaml, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="finds no GPU here; set it to auto or cpu"):
        device_of("cuda")
    with pytest.raises(UserError, match="finds no GPU here"):
        load_policy("driving_student", device="cuda")
    with pytest.raises(UserError, match="finds no GPU here"):
        Explainer.from_checkpoint("driving_student", device="cuda")
    assert device_under(load_policy("driving_student", device="auto").network) == torch.device("cpu")
    np.savez(tmp_path / "frames.npz", frames=np.zeros((1, 128, 128, 3), np.uint8))
    explain = ["explain", str(tmp_path / "frames.npz"), "--out", str(tmp_path / "maps"), "--device", "cuda"]
    assert main([*explain, "--weights", "driving_student"]) == 2
    assert "The setting device is cuda" in capsys.readouterr().err
    file = tmp_path / "cuda.yaml"
    file.write_text(tiny_yaml.read_text() + "\ndevice: cuda\n")
    assert main(["train-teacher", str(file), "--out", str(tmp_path)]) == 2
    assert "The setting device is cuda" in capsys.readouterr().err


@gpu
@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_explainer_on_a_gpu_says_what_it_says_on_the_processor(method):
    frame = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    here, there = (Explainer.from_checkpoint("driving_student", None, method, device=d) for d in ("cpu", "cuda"))
    one, two = here.decide(frame), there.decide(frame)
    assert one.action == two.action and np.allclose(one.outputs, two.outputs, atol=1e-3)
    assert np.allclose(here.explain(one).map, there.explain(two).map, atol=0.05)
    divergence, actions = there.instead(two, to_input(torch.zeros(2, 3, 128, 128, dtype=torch.uint8)))
    assert divergence.shape == actions.shape == (2,)
    assert there.attacked(frame, "fgsm", 0.01).shape == frame.shape


@gpu
@pytest.mark.long
def test_a_gpu_gives_what_the_processor_gives_and_jobs_go_from_one_to_the_other(tmp_path, tiny_yaml):
    config = load_config(tiny_yaml)
    short = replace(config, teacher=replace(config.teacher, total_steps=config.teacher.checkpoint_interval))
    train_teacher(replace(short, device="cuda"), tmp_path)
    train_teacher(config, tmp_path)  # goes on without
    teacher = tmp_path / "teacher.safetensors"
    make_dataset(config, tmp_path, teacher)
    make_dataset(replace(config, device="cuda"), tmp_path / "gpu", teacher)
    here, there = load_dataset(tmp_path / "dataset"), load_dataset(tmp_path / "gpu" / "dataset")
    assert torch.equal(here.states[:4], there.states[:4])
    assert torch.allclose(here.maps[:4].float(), there.maps[:4].float(), atol=1e-2)
    half = replace(config, distill=replace(config.distill, iterations=config.distill.iterations // 2))
    distill(replace(half, device="cuda"), tmp_path, teacher)
    distill(config, tmp_path, teacher)
    assert load(tmp_path / "student.safetensors", config.task)[1]["steps"] > 0
    assert main(["evaluate", str(tiny_yaml), "--quick", "--out", str(tmp_path)]) == 0
