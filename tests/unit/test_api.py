"""`import carla_digr`: what it has, and that its maps are those of the drive."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import carla_digr
from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.config import PolicyConfig
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.policy import ActorCritic, InputRecipe, TorchPolicy

STUDENT = WEIGHTS_DIRECTORY / "driving_student.safetensors"


@pytest.fixture(scope="module")
def student():
    return carla_digr.load_policy("driving_student")


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def grey_stack():
    """A policy of four grey pictures."""
    torch.manual_seed(0)
    return ActorCritic(PolicyConfig(features=16), 4, 84, 84, 6, recipe=InputRecipe("grey", stack=4))


def test_every_public_name_is_there_and_no_other():
    for name in carla_digr.__all__:
        assert getattr(carla_digr, name) is not None
    assert set(carla_digr.__all__) <= set(dir(carla_digr))
    with pytest.raises(AttributeError, match="'explainn'"):
        _ = carla_digr.explainn


def test_what_type_checkers_see_is_what_there_is():
    source = ast.parse(Path(carla_digr.__file__).read_text())
    [seen] = [
        node for node in source.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    imported = {
        alias.asname: (node.module, alias.name)
        for node in seen.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert set(imported) == set(carla_digr.__all__) - {"__version__"}
    for name, (module, original) in imported.items():
        assert getattr(carla_digr, name) is getattr(importlib.import_module(module), original)


def test_a_policy_is_loaded_by_its_shipped_name_or_its_file(student):
    assert student.card == carla_digr.load_policy(STUDENT).card
    assert student.action_names == tuple(student.card["action_names"])
    assert student.input_shape == (3, 128, 128)
    with pytest.raises(UserError, match=r"driving_studet: .*did you mean 'driving_student'"):
        carla_digr.load_policy("driving_studet")


@pytest.mark.parametrize("method", ["digr", "linear", "ig"])
def test_maps_and_decisions_are_the_explainers(student, frames, method):
    explainer = Explainer.from_checkpoint(STUDENT, method=method)
    decisions = [explainer.decide(frame) for frame in frames[:2]]
    made = carla_digr.decide(student, frames[:2])
    assert made.actions.tolist() == [decision.action for decision in decisions]
    assert np.array_equal(made.probabilities, [decision.probabilities for decision in decisions])
    assert np.array_equal(made.values, np.float32([decision.value for decision in decisions]))
    maps = carla_digr.explain(student, frames[:2], method)
    assert maps.dtype == np.float32 and maps.shape == (2, 128, 128)
    assert np.array_equal(maps, [explainer.explain(decision).map for decision in decisions])


def test_one_frame_is_as_good_as_several(student, frames):
    assert np.array_equal(carla_digr.explain(student, frames[0]), carla_digr.explain(student, frames)[:1])
    assert carla_digr.decide(student, frames[0]).actions.shape == (1,)
    picture = carla_digr.overlay(frames[0], carla_digr.explain(student, frames[0])[0])
    assert picture.shape == frames[0].shape and picture.dtype == np.uint8


def test_another_action_can_be_explained_by_name_or_index(student, frames):
    [chosen] = carla_digr.decide(student, frames[:1]).actions
    other = (chosen + 1) % len(student.action_names)
    by_index = carla_digr.explain(student, frames[:1], target=int(other))
    assert np.array_equal(by_index, carla_digr.explain(student, frames[:1], target=student.action_names[other]))
    assert not np.array_equal(by_index, carla_digr.explain(student, frames[:1]))
    with pytest.raises(UserError, match="no action 'fly'"):
        carla_digr.explain(student, frames[:1], target="fly")


def test_wrong_frames_and_methods_are_one_sentence(student, frames):
    with pytest.raises(UserError, match="128 x 128 x 3"):
        carla_digr.explain(student, frames[:, :64])
    assert carla_digr.explain(student, frames[:, :64], resize=True).shape == (3, 128, 128)
    for nothing in (frames[:0], []):
        with pytest.raises(UserError, match="no frames"):
            carla_digr.decide(student, nothing)
        with pytest.raises(UserError, match="no frames"):
            carla_digr.explain(student, nothing)
    with pytest.raises(UserError, match="float"):
        carla_digr.decide(student, frames.astype(np.float32))
    with pytest.raises(UserError, match="did you mean 'digr'"):
        carla_digr.explain(student, frames, "dig")


def test_a_stack_is_made_of_the_frames_before_or_given_whole(grey_stack):
    frames = np.random.default_rng(1).integers(0, 256, (6, 84, 84, 1), dtype=np.uint8)
    stacks = np.stack([np.concatenate(frames[[max(n - k, 0) for k in (3, 2, 1, 0)]], axis=-1) for n in range(6)])
    assert stacks.shape == (6, 84, 84, 4)
    made, whole = carla_digr.decide(grey_stack, frames), carla_digr.decide(grey_stack, stacks)
    for one, other in zip(made, whole, strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(carla_digr.explain(grey_stack, frames), carla_digr.explain(grey_stack, stacks))


def test_any_module_is_explained(frames):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5))
    policy = TorchPolicy(network, (3, 16, 16), 5)
    small = frames[:, :16, :16]
    assert carla_digr.explain(policy, small, "vg").shape == (3, 16, 16)
    assert np.isnan(carla_digr.decide(policy, small).values).all()
    assert np.array_equal(
        carla_digr.explain(policy, small, "vg", target="action 2"), carla_digr.explain(policy, small, "vg", target=2)
    )
