"""The explainer: decision and map of one frame, without ROS or CARLA."""

from __future__ import annotations

import dataclasses

import live_support
import numpy as np
import pytest
import torch

from carla_digr import checkpoint
from carla_digr.config import PolicyConfig
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.live.composition import ATTACKS
from carla_digr.policy import ActorCritic, to_input
from carla_digr.saliency import METHODS
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.perturbation import Perturbation

NAMES = ["left", "keep", "right", "brake"]
CONFIG = PolicyConfig(convolutions=((8, 8, 4), (8, 4, 2), (8, 3, 1)), features=32, activation="softplus")


@pytest.fixture
def policy():
    torch.manual_seed(0)
    model = ActorCritic(CONFIG, 3, 48, 64, len(NAMES))
    with torch.no_grad():
        model.policy_head.weight.mul_(200.0)
    return model


@pytest.fixture
def explainer(policy):
    return Explainer(policy, {"action_names": NAMES, "weights_sha256": "0123456789abcdef" * 4}, "digr")


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_decision_and_map_are_those_of_the_formulas(explainer, policy, seed):
    rgb = picture(seed)
    decision = explainer.decide(rgb)
    saliency = explainer.explain(decision)

    state = torch.tensor(rgb / 255.0, dtype=torch.float32).permute(2, 0, 1)[None].requires_grad_()
    logits, value = policy(state)
    pi = logits.softmax(dim=1)[0]
    np.testing.assert_allclose(decision.probabilities, pi.detach(), rtol=1e-5)
    assert decision.action == int(pi.argmax())
    assert decision.value == pytest.approx(float(value.detach()), rel=1e-5)
    assert decision.finite
    # Eq. 2 word for word: abs(sum_a pi_a d pi_a / d s), then the maximum over channels, divided by its maximum.
    slopes = [torch.autograd.grad(pi[a], state, retain_graph=True)[0] for a in range(len(NAMES))]
    raw = sum(pi[a].detach() * slopes[a] for a in range(len(NAMES))).abs().amax(dim=1)[0]
    np.testing.assert_allclose(saliency.map, raw / raw.max(), atol=2e-5)
    assert not saliency.flat
    assert saliency.map.dtype == np.float32 and saliency.map.shape == (48, 64)
    assert saliency.map.min() >= 0.0 and saliency.map.max() == 1.0


def test_the_map_belongs_to_its_decision_whatever_was_decided_since(explainer):
    first = explainer.decide(picture(1))
    expected = explainer.explain(first).map
    again = explainer.decide(picture(1))
    explainer.decide(picture(2))
    np.testing.assert_array_equal(explainer.explain(again).map, expected)


def test_a_picture_that_is_a_view_with_any_strides_is_as_good_as_a_copy(explainer):
    bgra = np.random.default_rng(3).integers(0, 256, (48, 64, 4), np.uint8)
    view = bgra[:, :, 2::-1]
    np.testing.assert_array_equal(
        explainer.decide(view).probabilities, explainer.decide(np.ascontiguousarray(view)).probabilities
    )


def test_a_map_without_gradient_is_flagged_and_not_amplified(policy):
    with torch.no_grad():
        policy.policy_head.weight.zero_()
    explainer = Explainer(policy, {"action_names": NAMES, "weights_sha256": "0" * 64})
    saliency = explainer.explain(explainer.decide(picture()))
    assert saliency.flat
    assert not saliency.map.any()


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (np.zeros((64, 48, 3), np.uint8), "uint8 64 x 48 x 3"),
        (np.zeros((48, 64), np.uint8), "uint8 48 x 64"),
        (np.zeros((48, 64, 3), np.float32), "float32 48 x 64 x 3"),
    ],
)
def test_a_wrong_picture_is_refused_by_what_was_expected_and_what_came(explainer, wrong, got):
    with pytest.raises(UserError) as refusal:
        explainer.decide(wrong)
    assert "uint8 picture of 48 x 64 x 3" in str(refusal.value)
    assert f"but got {got}" in str(refusal.value)


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.2])
def test_an_attack_stays_within_epsilon_and_makes_the_preferred_action_less_likely(explainer, attack, epsilon):
    rgb = picture()
    attacked = explainer.attacked(rgb, attack, epsilon)
    assert attacked.dtype == np.uint8 and attacked.shape == rgb.shape
    assert np.abs(attacked.astype(int) - rgb).max() <= epsilon * 255
    before, after = explainer.decide(rgb), explainer.decide(attacked)
    if epsilon:
        assert after.probabilities[before.action] < before.probabilities[before.action]
    else:
        np.testing.assert_array_equal(attacked, rgb)


def test_an_attack_on_a_wrong_picture_is_refused(explainer):
    with pytest.raises(UserError, match="uint8 picture of 48 x 64 x 3"):
        explainer.attacked(np.zeros((64, 48, 3), np.uint8), "fgsm", 0.02)


def test_a_policy_whose_output_does_not_fit_its_actions_is_refused(policy):
    explainer = Explainer(policy, {"action_names": NAMES[:3], "weights_sha256": "0" * 64})
    with pytest.raises(RuntimeError, match=r"output of shape \(1, 4\) for 3 actions"):
        explainer.decide(picture())


def test_outputs_that_are_not_numbers_are_seen(policy):
    with torch.no_grad():
        policy.policy_head.bias[0] = torch.nan
    explainer = Explainer(policy, {"action_names": NAMES, "weights_sha256": "0" * 64})
    decision = explainer.decide(picture())
    assert not decision.finite
    assert explainer.explain(decision).flat
    assert not dataclasses.replace(decision, probabilities=np.ones(4, np.float32), value=float("inf")).finite


def test_a_checkpoint_becomes_an_explainer_with_its_names_and_hash(policy, tmp_path):
    path = tmp_path / "student.safetensors"
    card = checkpoint.save(path, policy, {"task": "driving", "role": "student", "action_names": NAMES})
    explainer = Explainer.from_checkpoint(path)
    assert explainer.action_names == tuple(NAMES)
    assert explainer.policy_hash == card["weights_sha256"][:12]
    assert explainer.image_shape == (48, 64, 3)
    with pytest.raises(UserError, match="task driving"):
        Explainer.from_checkpoint(path, task="breakout")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_map_of_the_same_picture_twice(policy, method):
    card = {"action_names": NAMES, "weights_sha256": "0" * 64}
    card["config"] = {"saliency_dataset": {"radius": 3.0, "blur_sigma": 2.0, "stride": 8}}
    explainer = Explainer(policy, card, method)
    decision = explainer.decide(picture(1))
    saliency = explainer.explain(decision)
    assert saliency.map.shape == (48, 64) and saliency.map.dtype == np.float32
    assert saliency.map.max() == 1.0 and saliency.map.min() >= 0.0 and not saliency.flat
    np.testing.assert_array_equal(explainer.explain(explainer.decide(picture(1))).map, saliency.map)
    state = to_input(torch.from_numpy(picture(1).transpose(2, 0, 1)[None].copy()))
    raw = METHODS[method](policy, state, perturbation=Perturbation(radius=3.0, blur_sigma=2.0, stride=8))
    # Both ways are within 1e-5 of the map in float64.
    np.testing.assert_allclose(saliency.map, normalise(raw)[0][0].numpy(), atol=2e-5)


def test_perturbation_maps_are_made_as_the_dataset_of_the_card_was(policy):
    settings = {"radius": 3.0, "blur_sigma": 2.0, "stride": 8, "score": "logits"}
    card = {"action_names": NAMES, "weights_sha256": "0" * 64, "config": {"saliency_dataset": settings}}
    explainer = Explainer(policy, card, "gb")
    found = explainer.explain(explainer.decide(picture(2))).map
    state = to_input(torch.from_numpy(picture(2).transpose(2, 0, 1)[None].copy()))
    by_logits, by_kl = (
        normalise(METHODS["gb"](policy, state, perturbation=Perturbation(3.0, 2.0, 8, score)))[0][0].numpy()
        for score in ("logits", "kl")
    )
    np.testing.assert_allclose(found, by_logits, atol=1e-6)
    assert np.abs(by_logits - by_kl).max() > 0.01


def test_a_policy_of_several_frames_forgets_them_at_a_restart(policy, tmp_path):
    path = live_support.make_foreign_weights(tmp_path)
    explainer = Explainer.from_checkpoint(path, task=None, resize=True)
    first = [explainer.decide(picture(k)).probabilities for k in range(3)]
    explainer.restart()
    again = [explainer.decide(picture(k)).probabilities for k in range(3)]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(explainer.decide(picture(0)).probabilities, first[0])


def test_an_unknown_method_is_refused_by_the_known_ones(policy):
    with pytest.raises(UserError, match=r"no saliency method 'lime'.*; choose one of vg, gbp, gradcam"):
        Explainer(policy, {"action_names": NAMES, "weights_sha256": "0" * 64}, "lime")
