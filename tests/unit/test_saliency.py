"""Saliency: eq. 2 and eq. 3 against their definitions, scores and overlay."""

from __future__ import annotations

from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from carla_digr import checkpoint
from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.config import PolicyConfig, SaliencyDatasetConfig
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic
from carla_digr.saliency import metrics
from carla_digr.saliency.gradient import (
    eq2_weights,
    input_gradient,
    log_probability_weights,
    normalise,
    vanilla_gradient,
)
from carla_digr.saliency.overlay import COLORMAPS, overlay, rgb_of
from carla_digr.saliency.perturbation import Perturbation, gaussian_blur, perturbation_maps, perturbed_outputs
from carla_digr.saliency.windows import Changes, changed_features

TILE_ALIGNED = ((6, 8, 8), (8, 3, 1), (8, 3, 1))
STRIDED = ((6, 8, 4), (8, 4, 2), (8, 3, 2))


def make_policy(convolutions=STRIDED, activation="relu", height=64, width=64, sharpness=30.0):
    torch.manual_seed(1)
    policy = ActorCritic(PolicyConfig(convolutions, 32, activation), 3, height, width, 4).double()
    with torch.no_grad():
        policy.policy_head.weight *= sharpness
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


def random_states(count, height=64, width=64, channels=3):
    return torch.rand(count, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def eq2_by_autograd(policy, states):
    states = states.clone().requires_grad_(True)
    pi = policy(states)[0].softmax(dim=1)
    (g,) = torch.autograd.grad((pi.square() / 2).sum(), states)
    return g


@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("convolutions", [TILE_ALIGNED, STRIDED], ids=["tile-aligned", "strided"])
@pytest.mark.parametrize("size", [(64, 64), (67, 90)])
def test_the_written_out_input_gradient_equals_autograd(convolutions, activation, size):
    policy, states = make_policy(convolutions, activation, *size), random_states(2, *size)
    logits, _, hidden = policy.trace(states)
    g = input_gradient(policy, hidden, eq2_weights(logits))
    expected = eq2_by_autograd(policy, states)
    assert (g - expected).abs().max() < 1e-7 * expected.abs().max()  # softplus is linear from 20 on in torch


def test_eq2_equals_finite_differences_of_its_definition():
    policy, states = make_policy(activation="softplus"), random_states(1)
    raw = vanilla_gradient(policy, states)[0]
    rng = np.random.default_rng(0)
    h = 1e-6
    for y, x in rng.integers(64, size=(12, 2)):
        g = []
        for channel in range(3):
            step = torch.zeros_like(states)
            step[0, channel, y, x] = h
            with torch.no_grad():
                pi, after, before = (policy(s)[0].softmax(dim=1)[0] for s in (states, states + step, states - step))
            g.append(abs(float((pi * (after - before) / (2 * h)).sum())))
        assert float(raw[y, x]) == pytest.approx(max(g), rel=1e-5, abs=1e-9)


def test_the_loss_of_a_map_has_the_gradient_that_double_backward_gives():
    policy, states = make_policy(activation="softplus"), random_states(2)
    logits, _, hidden = policy.trace(states)
    ours = torch.autograd.grad(input_gradient(policy, hidden, eq2_weights(logits)).abs().sum(), policy.trunk.weight)[0]
    inputs = states.clone().requires_grad_(True)
    pi = policy(inputs)[0].softmax(dim=1)
    (g,) = torch.autograd.grad((pi.square() / 2).sum(), inputs, create_graph=True)
    (expected,) = torch.autograd.grad(g.abs().sum(), policy.trunk.weight)
    assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_saturated_policy_keeps_its_map_in_float32():
    """Eq. 2 as written loses it to cancellation."""
    policy, states = make_policy(sharpness=300.0), random_states(4)
    with torch.no_grad():
        policy.policy_head.bias += torch.tensor([40.0, 0, 0, 0])
        exact, flat = normalise(vanilla_gradient(policy, states))
        probability = policy(states)[0].softmax(dim=1).amax(dim=1)
    assert (1 - probability < 1e-9).all() and not flat.any()
    single, flat = normalise(vanilla_gradient(policy.float(), states.float()))
    assert not flat.any()
    assert (single - exact).abs().max() < 1e-3
    literal = eq2_by_autograd(policy, states.float()).abs().amax(dim=1)
    literal = literal / literal.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    assert (literal - exact).abs().max() > 0.1


def test_log_probability_weights_are_the_derivative_of_the_best_actions_log_probability():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    loss = -logits.log_softmax(dim=1).amax(dim=1).sum()
    (expected,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(log_probability_weights(logits.detach()), expected)


def test_a_map_without_gradient_is_flagged_not_amplified():
    policy, states = make_policy().float(), random_states(3).float()
    with torch.no_grad():
        policy.trunk.bias[:] = -100.0  # every feature is dead
    maps, flat = normalise(vanilla_gradient(policy, states))
    assert flat.all() and not maps.any()


def test_normalise_flags_only_the_map_concerned():
    raw = torch.stack([torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [1.0, 4.0]]), torch.full((2, 2), torch.nan)])
    maps, flat = normalise(raw)
    assert flat.tolist() == [True, False, True]
    assert maps[1].tolist() == [[0.0, 0.5], [0.25, 1.0]]
    assert not maps[0].any() and not maps[2].any()


def plain_perturbation_map(policy, state, radius, sigma, distance):
    """Eq. 3 one mask at a time, blurred by OpenCV; ``distance`` takes two rows of logits."""
    picture = state.numpy().transpose(1, 2, 0)
    reach = 2 * int(4 * sigma + 0.5) + 1
    blurred = cv2.GaussianBlur(picture, (reach, reach), sigma, borderType=cv2.BORDER_REFLECT)
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    with torch.no_grad():
        before = policy(state[None])[0][0]
        result = np.zeros((height, width))
        for y in range(height):
            for x in range(width):
                mask = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * radius**2))[..., None]
                mixed = torch.from_numpy((picture * (1 - mask) + blurred * mask).transpose(2, 0, 1))
                result[y, x] = float(distance(before, policy(mixed[None])[0][0]))
    return result


def test_blur_equals_opencvs():
    state = random_states(1, 40, 56)
    expected = cv2.GaussianBlur(state[0].numpy().transpose(1, 2, 0), (25, 25), 3.0, borderType=cv2.BORDER_REFLECT)
    assert np.allclose(gaussian_blur(state, 3.0)[0].numpy().transpose(1, 2, 0), expected)


def kl(z, perturbed):
    p, q = z.log_softmax(dim=0), perturbed.log_softmax(dim=0)
    return (p.exp() * (p - q)).sum()


def half_squared_distance(z, perturbed):
    return 0.5 * ((z - z.mean()) - (perturbed - perturbed.mean())).square().sum()


@pytest.mark.parametrize(("score", "distance"), [("kl", kl), ("logits", half_squared_distance)])
def test_the_batched_map_equals_the_plain_definition_and_the_fast_path_is_near(score, distance):
    policy, states = (
        make_policy(height=36, width=32, convolutions=((6, 8, 4), (8, 3, 1), (8, 2, 1))),
        random_states(1, 36, 32),
    )
    states = gaussian_blur(states, 1.0)  # pictures have structure larger than a pixel
    plain = plain_perturbation_map(policy, states[0], 4.0, 3.0, distance)
    exact = perturbation_maps(policy, states, Perturbation(4.0, 3.0, stride=1, score=score, batch=100))[0].numpy()
    assert np.allclose(exact, plain, atol=1e-12)
    fast = perturbation_maps(policy, states, Perturbation(4.0, 3.0, stride=2, score=score))[0].numpy()
    assert np.abs(fast - plain).max() < 0.05 * plain.max()
    assert ((fast / fast.max() > 0.1) != (plain / plain.max() > 0.1)).mean() < 0.01


@pytest.mark.parametrize(
    ("convolutions", "height", "width", "radius", "stride", "count"),
    [
        (TILE_ALIGNED, 64, 64, 2.5, 1, 1),
        (STRIDED, 67, 90, 5.0, 5, 3),
        (STRIDED, 84, 84, 3.0, 7, 6),
        (((4, 5, 3),), 40, 51, 1.0, 2, 2),
        (((4, 5, 3), (5, 4, 3), (6, 2, 2)), 66, 57, 0.3, 1, 1),  # every layer leaves out positions that a bump is on
        (((4, 3, 1), (5, 3, 1), (6, 3, 1)), 33, 31, 20.0, 8, 1),  # a bump is everywhere
    ],
)
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_windows_give_what_whole_passes_give(convolutions, height, width, radius, stride, count, activation):
    policy, states = make_policy(convolutions, activation, height, width), random_states(count, height, width)
    settings = Perturbation(radius, 3.0, stride, batch=30)
    with torch.no_grad():
        windows, whole = (perturbed_outputs(way, states, settings) for way in (policy, Whole(policy)))
        change = (whole - policy(states)[0][:, None, None]).abs().max()
    assert (windows - whole).abs().max() < 1e-8 * change  # softplus is linear from 20 on in torch's


@pytest.mark.parametrize("weights", sorted(WEIGHTS_DIRECTORY.glob("*.safetensors")), ids=lambda path: path.stem)
def test_windows_of_the_shipped_networks_are_as_exact_as_whole_passes(weights):
    policy, card = checkpoint.load(weights)
    settings = replace(Perturbation.from_settings(card["config"]["saliency_dataset"]), stride=9, score="logits")
    channels, *size = policy.input_shape
    states = gaussian_blur(random_states(1, *size, channels), 1.0)
    windows, whole = (perturbation_maps(way, states.float(), settings) for way in (policy, Whole(policy)))
    exact = perturbation_maps(Whole(policy.double()), states, settings)
    assert (windows - exact).abs().max() < max(1e-5 * exact.max(), 2 * (whole - exact).abs().max())


NETWORKS = [  # the third sees some pixels more often than others; the last two leave pixels at the borders unseen
    (TILE_ALIGNED, 64, 64),
    (STRIDED, 84, 84),
    (((4, 5, 3), (5, 4, 3)), 40, 51),
    (STRIDED, 67, 90),
    (((4, 3, 4), (3, 1, 2)), 40, 43),
]


def some_pixels(rng, count, height, width, channels):
    """A few pixels of each state but the last, one of them in a corner."""
    changed = np.zeros((count, height, width), np.bool_)
    for picture in changed[:-1]:
        row, column = rng.integers(height), rng.integers(width)
        picture[row : row + 9, column : column + 12] = rng.random((9, 12))[: height - row, : width - column] < 0.6
    changed[0, -1, -1] = True
    places = changed.nonzero()
    return Changes(*places, rng.random((len(places[0]), channels)))


def from_features(policy, features):
    return policy.policy_head(policy.activation(policy.trunk(features)))


@pytest.mark.parametrize(("convolutions", "height", "width"), NETWORKS)
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_states_that_differ_in_a_few_pixels_have_the_logits_of_whole_passes(convolutions, height, width, activation):
    policy, state = make_policy(convolutions, activation, height, width), random_states(1, height, width)
    rng, activated = np.random.default_rng(0), []
    with torch.no_grad():
        usual = policy.trace(state, activated)[0]
        for count in (1, 5):
            changes = some_pixels(rng, count, height, width, 3)
            whole = policy(torch.from_numpy(changes.made(state[0].numpy(), count)))[0]
            found = from_features(policy, changed_features(policy, state, activated, changes, count))
            assert (found - whole).abs().max() <= 1e-8 * max((whole - usual).abs().max(), 1e-3)


@pytest.mark.parametrize("weights", sorted(WEIGHTS_DIRECTORY.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_few_pixels_of_the_shipped_networks_are_as_exact_as_whole_passes(weights):
    policy, _ = checkpoint.load(weights)
    channels, *size = policy.input_shape
    state = gaussian_blur(random_states(1, *size, channels), 1.0)
    changes, activated = some_pixels(np.random.default_rng(0), 9, *size, channels), []
    with torch.no_grad():
        policy.trace(state.float(), activated)
        in_float32 = changes._replace(values=changes.values.astype(np.float32))
        found = from_features(policy, changed_features(policy, state.float(), activated, in_float32, 9))
        made = torch.from_numpy(changes.made(state[0].numpy(), 9))
        whole = policy(made.float())[0]
        exact = policy.double()(made)[0]
    assert (found - exact).abs().max() < max(1e-6 * exact.abs().max(), 2 * (whole - exact).abs().max())


class Whole:
    """An actor-critic as a policy of which nothing is known."""

    def __init__(self, policy):
        self._policy, self.output = policy, policy.output

    def __call__(self, states):
        return self._policy(states)


def test_the_logits_distance_marks_what_a_confident_policys_probabilities_hide():
    policy, states = make_policy(), random_states(1)
    with torch.no_grad():
        policy.policy_head.bias[0] = 60.0  # whatever is blurred, the probability of action 0 is 1
    by_kl = perturbation_maps(policy, states, Perturbation(4.0, stride=8))
    by_logits = perturbation_maps(policy, states, Perturbation(4.0, stride=8, score="logits"))
    with torch.no_grad():
        policy.policy_head.bias[0] = 0.0
    unsure = perturbation_maps(policy, states, Perturbation(4.0, stride=8, score="logits"))
    assert by_kl.max() < 1e-20 and torch.allclose(by_logits, unsure) and unsure.max() > 1e-6


def test_interpolated_logits_are_exact_where_the_policy_ignores_the_place():
    policy, states = make_policy(), torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64)  # blurring changes nothing
    logits = perturbed_outputs(policy, states, Perturbation(5.0, stride=4))
    with torch.no_grad():
        assert torch.allclose(logits, policy(states)[0][:, None, None].expand(1, 64, 64, 4))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_auc_is_the_probability_of_the_right_order(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert metrics.auc(np.array(positive), np.array(negative)) == pytest.approx(np.mean(pairs))


def test_scores_count_what_table_1_counts():
    importance = np.array([[[1, 1, 0, 0, -1]]], np.int8)
    maps = np.array([[[1.0, 0.25, 0.5, 0.0, 0.9]]], np.float32)
    scores = metrics.score(maps, importance)
    assert (scores.important, scores.unimportant, scores.auc) == (1.25, 0.5, 0.75)


def test_scores_refuse_what_cannot_be_scored():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.score(np.zeros((1, 2, 2)), np.zeros((1, 2, 3), np.int8))
    with pytest.raises(ValueError, match="needs important and unimportant"):
        metrics.score(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), np.int8))


def test_the_overlay_keeps_the_picture_where_nothing_is_salient_and_colours_the_rest():
    rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    saliency = np.zeros((16, 16), np.float32)
    saliency[3, 4] = 1
    for colormap in COLORMAPS:
        result = overlay(rgb, saliency, 1.0, colormap)
        assert result.dtype == np.uint8 and result.shape == rgb.shape
        assert np.array_equal(np.delete(result.reshape(-1, 3), 52, 0), np.delete(rgb.reshape(-1, 3), 52, 0))
        brightest = cv2.applyColorMap(np.array([[255]], np.uint8), COLORMAPS[colormap])[0, 0, ::-1]
        assert np.array_equal(result[3, 4], brightest)
    assert np.array_equal(overlay(rgb, saliency, 0.0), rgb)


@pytest.mark.parametrize(
    ("channels", "shown"),
    [(None, None), (1, [0, 0, 0]), (2, [1, 1, 1]), (3, [0, 1, 2]), (4, [3, 3, 3]), (6, [3, 4, 5]), (12, [9, 10, 11])],
)
def test_grey_pictures_and_stacks_are_shown_as_the_newest_picture(channels, shown):
    picture = np.random.default_rng(0).integers(0, 256, (8, 9, channels) if channels else (8, 9), dtype=np.uint8)
    saliency = np.random.default_rng(1).random((8, 9), dtype=np.float32)
    newest = picture[..., shown] if channels else np.stack([picture] * 3, axis=-1)
    assert np.array_equal(overlay(picture, saliency), overlay(np.ascontiguousarray(newest), saliency))
    if channels:
        assert np.array_equal(rgb_of(picture.transpose(2, 0, 1)[None])[0], newest)


@pytest.mark.parametrize(
    "picture", [np.zeros((8, 9, 3), np.float32), np.zeros(8, np.uint8), np.zeros((8, 9, 0), np.uint8)]
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match="uint8"):
        overlay(picture, np.zeros(picture.shape[:2], np.float32))


def test_the_overlay_blends_by_opacity_and_saliency():
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    saliency = np.random.default_rng(1).random((32, 32), dtype=np.float32)
    levels = (saliency * 255).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    alpha = (0.6 * levels / 255)[..., None]
    expected = rgb * (1 - alpha) + colours * alpha
    assert np.abs(overlay(rgb, saliency, 0.6) - expected).max() < 2.5


def test_the_overlay_names_what_is_wrong():
    rgb, saliency = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32)
    with pytest.raises(UserError, match="no colormap 'jett'"):
        overlay(rgb, saliency, 1.0, "jett")
    with pytest.raises(ValueError, match="differ in size"):
        overlay(rgb, saliency[:3])


def test_transposed_convolution_of_every_kernel_and_stride_equals_autograd():
    torch.manual_seed(0)
    for kernel, stride in [(1, 1), (2, 1), (3, 2), (4, 2), (6, 3), (8, 4), (5, 5), (8, 8)]:
        layers = ((5, kernel, stride), (4, 2, 1), (3, 1, 1))
        policy = ActorCritic(PolicyConfig(layers, 6, "softplus"), 2, 25, 22, 3).double()
        states = torch.rand(1, 2, 25, 22, dtype=torch.float64)
        _, _, hidden = policy.trace(states)
        g = input_gradient(policy, hidden, F.one_hot(torch.tensor([1]), 3).double())
        inputs = states.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(policy(inputs)[0][:, 1].sum(), inputs)
        assert torch.allclose(g, expected, rtol=1e-6, atol=1e-12), (kernel, stride)


@pytest.mark.parametrize("score", ["kl", "logits"])
def test_the_perturbation_of_a_configuration_or_card_is_the_one_that_its_dataset_was_made_with(score):
    settings = SaliencyDatasetConfig(radius=2.5, blur_sigma=1.5, stride=3, score=score)
    expected = Perturbation(2.5, 1.5, 3, score)
    assert Perturbation.from_settings(settings) == expected
    assert Perturbation.from_settings(asdict(settings)) == expected  # as a card has it
    assert Perturbation.from_settings({"radius": 4.0, "maps": 3}) == Perturbation(4.0)  # of an old card


def test_a_perturbation_map_of_a_nearly_uniform_policy_is_no_rounding():
    torch.manual_seed(0)
    policy = ActorCritic(PolicyConfig(), 3, 64, 64, 5)
    states, settings = torch.rand(2, 3, 64, 64), Perturbation(4.0, 3.0, stride=4)
    found = perturbation_maps(policy, states, settings)
    exact = perturbation_maps(policy.double(), states.double(), settings)
    assert float(exact.max()) < 1e-6
    assert float((found - exact).abs().max()) < 1e-2 * float(exact.max())
