"""The table of methods on any policy: the closed form equals autograd's, targets, and what is refused."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from test_saliency import make_policy, random_states
from torch import nn

from carla_digr import checkpoint
from carla_digr.attacks import ATTACKS
from carla_digr.config import PolicyConfig
from carla_digr.distributions import DISTRIBUTIONS, divergence_of_others
from carla_digr.errors import UserError
from carla_digr.evaluation.saliency_methods import DIGR_LINEAR, saliency_methods
from carla_digr.live.viewer.page_decision import map_title
from carla_digr.policy import ActorCritic, InputRecipe, TorchPolicy
from carla_digr.saliency import METHODS
from carla_digr.saliency.gradient import input_contrast, input_gradient
from carla_digr.saliency.linear import linear_maps, pixel_divergence
from carla_digr.saliency.perturbation import Perturbation, gaussian_blur

COARSE = Perturbation(4.0, 3.0, stride=8)


class Wrapped(nn.Module):
    """An ActorCritic as a stranger would write it: only its forward pass, layer by layer."""

    def __init__(self, policy):
        super().__init__()
        layers = []
        for convolution in copy.deepcopy(policy.convolutions):
            layers += [convolution, nn.ReLU()]
        layers += [nn.Flatten(), copy.deepcopy(policy.trunk), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.actor, self.critic = copy.deepcopy(policy.policy_head), copy.deepcopy(policy.value_head)

    def forward(self, x):
        features = self.features(x)
        return self.actor(features), self.critic(features)


class Continuous(nn.Module):
    """Two dimensions and, where asked for, their log standard deviations."""

    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 20 * 20, outputs)
        ).double()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def policy():
    return make_policy()


@pytest.fixture
def foreign(policy):
    return TorchPolicy(Wrapped(policy).double(), policy.input_shape, policy.actions)


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_foreign_copy_of_an_actor_critic_has_its_maps(policy, foreign, name, target):
    states = random_states(2)
    ours = METHODS[name](policy, states, target, COARSE)
    theirs = METHODS[name](foreign, states, target, COARSE)
    assert ours.shape == (2, 64, 64) and (ours >= 0).all() and ours.any()
    assert torch.allclose(theirs, ours, rtol=1e-6, atol=1e-9 * float(ours.max()))


@pytest.mark.parametrize("name", METHODS)
def test_a_target_gives_another_map_than_the_decision(policy, name):
    states = random_states(1)
    maps = [METHODS[name](policy, states, target, COARSE) for target in (None, 0, 1)]
    normalised = [m / m.max() for m in maps if m.any()]  # SARFA has none where the action does not become less likely
    assert len(normalised) >= 2
    for k, first in enumerate(normalised):
        for second in normalised[k + 1 :]:
            assert (first - second).abs().max() > 1e-3


def test_the_target_of_the_vanilla_gradient_is_its_log_odds(policy):
    states = random_states(2).requires_grad_(True)
    log_pi = policy(states)[0].log_softmax(dim=1)
    odds = log_pi[:, 2] - torch.log1p(-log_pi[:, 2].exp())
    (expected,) = torch.autograd.grad(odds.sum(), states)
    assert torch.allclose(METHODS["vg"](policy, states.detach(), 2), expected.abs().amax(dim=1))


@pytest.mark.parametrize("kind", ["gaussian", "squashed_gaussian", "deterministic"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"sarfa"}))
def test_continuous_policies_are_explained(kind, name):
    torch.manual_seed(0)
    network = Continuous(DISTRIBUTIONS[kind].outputs(2))
    policy = TorchPolicy(network, (3, 64, 64), 2, kind)
    states = random_states(2)
    maps = METHODS[name](policy, states, None, COARSE)
    assert maps.shape == (2, 64, 64) and maps.any() and torch.isfinite(maps).all()
    steer = METHODS[name](policy, states, 0, COARSE)
    assert not torch.allclose(steer / steer.max(), maps / maps.max(), atol=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "deterministic"])
def test_the_gradient_map_of_a_continuous_policy_is_the_divergence_to_second_order(kind):
    torch.manual_seed(0)
    policy = TorchPolicy(Continuous(DISTRIBUTIONS[kind].outputs(2)), (3, 64, 64), 2, kind)
    states = random_states(1)[:, :, :64, :64]
    raw = METHODS["vg"](policy, states)[0]
    row, column = (int(i) for i in np.unravel_index(int(raw.argmax()), raw.shape))
    outputs = policy(states)[0]
    found = []
    for channel in range(3):
        moved = states.clone()
        moved[0, channel, row, column] += 1e-4
        found.append(DISTRIBUTIONS[kind].divergence(outputs, policy(moved)[0]))
    assert float(raw.max()) == pytest.approx(float((2 * torch.stack(found).detach().max()).sqrt()) / 1e-4, rel=1e-3)


def test_sarfa_and_attacks_of_a_continuous_policy_are_refused_in_a_sentence():
    policy = TorchPolicy(Continuous(2), (3, 64, 64), 2, "deterministic")
    with pytest.raises(UserError, match="this policy is continuous; use gb"):
        METHODS["sarfa"](policy, random_states(1), None, COARSE)
    with pytest.raises(UserError, match="this policy is continuous"):
        ATTACKS["FGSM"](policy, random_states(1), 0.01, torch.Generator())


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_a_foreign_policy_are_those_on_ours(policy, foreign, attack):
    states = random_states(2)
    ours, theirs = (ATTACKS[attack](p, states, 0.02, torch.Generator().manual_seed(1)) for p in (policy, foreign))
    assert torch.allclose(ours, theirs, atol=1e-9)
    assert not torch.equal(ours, states)


def test_a_policy_that_offers_less_is_refused_by_the_methods_that_can(foreign):
    foreign.offers = "logits"
    with pytest.raises(UserError, match=r"needs the policy's gradient, .* its logits; use one of gb, sarfa"):
        METHODS["vg"](foreign, random_states(1))
    assert METHODS["gb"](foreign, random_states(1), None, COARSE).any()


@pytest.fixture
def broken(monkeypatch):
    """The name of a method whose package cannot be loaded."""
    point = EntryPoint("broken", "a_package_that_fails:METHOD", "carla_digr.methods")
    monkeypatch.setitem(METHODS._points, point.name, point)
    return point.name


@pytest.mark.filterwarnings("ignore:The package .* cannot be loaded")
def test_a_package_that_cannot_be_loaded_costs_its_own_method_alone(policy, foreign, broken):
    policy = policy.float()
    methods, left_out = saliency_methods(policy, policy, COARSE)
    assert methods.keys() == {METHODS[name].title for name in METHODS if name != broken} | {DIGR_LINEAR}
    assert left_out.keys() == {broken}
    assert "a_package_that_fails" in left_out[broken]
    assert map_title(broken, "brake") == "broken of brake"
    foreign.offers = "logits"
    with pytest.raises(UserError, match=r"needs the policy's gradient, .* use one of gb, sarfa"):
        METHODS["vg"](foreign, random_states(1))


def test_an_action_that_does_not_exist_is_refused(policy):
    with pytest.raises(UserError, match="no action 9: the policy has the actions 0 to 3"):
        METHODS["vg"](policy, random_states(1), 9)


class Functional(nn.Module):
    """A network whose activations no layer shows, or are others than ReLU."""

    def __init__(self, activation):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 5, 3), nn.Linear(4 * 20 * 20, 3)
        self.layer = nn.ReLU()
        self.activation = activation

    def forward(self, x):
        return self.head(self.activation(self.layer(self.convolution(x)) - 0.1).flatten(1))


@pytest.mark.parametrize(("activation", "reason"), [(torch.relu, "no layer shows"), (torch.tanh, "has Tanh")])
@pytest.mark.parametrize("name", ["gbp", "smoothgrad"])
def test_guided_backpropagation_never_is_silently_the_gradient(name, activation, reason):
    policy = TorchPolicy(Functional(activation), (3, 64, 64), 3)
    with pytest.raises(UserError, match=reason):
        METHODS[name](policy, random_states(1).float())


# --- the linearised map ---


class Linear(nn.Module):
    """A softmax policy whose logits are linear in the state: eq. 3 to second order has nothing to linearise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 16 * 16, 4).double()

    def forward(self, x):
        return self.head(x.flatten(1))


def test_the_linear_map_is_eq3_on_a_linear_policy():
    policy = TorchPolicy(Linear(), (3, 16, 16), 4)
    states = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    blur, radius, mass = 3.0, 1.5, 20.0
    maps = linear_maps(policy, states, blur=blur / 16, radius=radius, mass=mass)[0]
    delta = gaussian_blur(states, blur) - states
    outputs = policy(states)[0]
    for row, column in ((0, 0), (8, 5), (15, 3)):
        spot = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
        spot[0, 0, row, column] = mass
        bump = gaussian_blur(spot, radius)  # a mirrored blur is symmetric: what i gets is what i gives
        divergence = DISTRIBUTIONS["logits"].divergence(outputs, policy(states + bump * delta)[0]).detach()
        assert float(maps[row, column]) == pytest.approx(float(divergence), rel=1e-9)


@pytest.mark.parametrize("target", [None, 3])
def test_the_linear_map_is_its_formula(policy, target):
    states = random_states(2)
    delta = gaussian_blur(states, states.shape[2] * 10 / 128) - states
    between = (states + 0.35 * delta).requires_grad_(True)
    logits = policy(between)[0]
    rows = [torch.autograd.grad(logits[:, a].sum(), between, retain_graph=True)[0] for a in range(policy.actions)]
    contrast = torch.stack([gaussian_blur((row * delta).sum(dim=1, keepdim=True), 1.5)[:, 0] for row in rows], dim=-1)
    before = policy(states)[0].detach()[:, None, None, :]
    expected = DISTRIBUTIONS["logits"].divergence(before, before + 30 * contrast, target)
    assert torch.allclose(
        METHODS["linear"](policy, states, target), expected, rtol=1e-7, atol=1e-10 * float(expected.max())
    )


@pytest.mark.parametrize("name", ["driving_calm_student", "driving_calm_teacher", "breakout_teacher"])
def test_the_linear_map_in_float32_is_that_of_float64(name):
    network = checkpoint.load(name)[0]
    generator = torch.Generator().manual_seed(3)
    smooth = gaussian_blur(torch.rand(4, *network.input_shape, generator=generator), 3.0)
    states = ((smooth - 0.5) * 2 + 0.5).clamp(0, 1)
    maps = linear_maps(network, states)
    weights = {key: value.double() for key, value in network.state_dict().items()}
    network.double().load_state_dict(weights)
    exact = linear_maps(network, states.double())
    largest = exact.amax(dim=(1, 2), keepdim=True)
    assert maps.dtype == torch.float32 and float(((maps - exact).abs() / largest).max()) < 1e-5


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 1, 6])
@pytest.mark.parametrize("unlikely", [0.9, 1e-2, 1e-7])
def test_the_divergence_of_a_map_has_its_digits_in_float32(scale, unlikely):
    generator = torch.Generator().manual_seed(0)
    pi = torch.rand(3, 4, generator=generator).softmax(dim=1) * torch.tensor([unlikely, 1, unlikely / 4])[:, None] / 2
    change = scale * torch.randn(3, 4, 9, 7, generator=generator)
    change[1, 0] *= 1e3  # what counts least changes most
    pi[1, 0] = 1e-7
    exact = divergence_of_others(pi.double()[:, None, None], change.double().permute(0, 2, 3, 1))
    found = pixel_divergence(pi, change)
    largest = exact.amax(dim=(1, 2), keepdim=True)
    assert found.dtype == torch.float32 and float(((found - exact).abs() / largest).max()) < 1e-5


@pytest.mark.parametrize("convolutions", [((8, 8, 4), (8, 4, 2), (8, 3, 2)), ((8, 8, 8), (8, 3, 1)), ((8, 5, 2),)])
def test_the_contrast_is_the_gradient_times_the_change_on_any_first_convolution(convolutions):
    torch.manual_seed(0)
    policy = ActorCritic(PolicyConfig(convolutions, 16, "softplus"), 3, 48, 48, 4).double()
    generator = torch.Generator().manual_seed(1)
    states, delta, weights = (
        torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 48, 48), (3, 48, 48), (5, policy.actions))
    )
    hidden = policy.trace(states)[2]
    plain = (input_gradient(policy, hidden, weights) * delta[:, None]).sum(dim=2)
    torch.testing.assert_close(input_contrast(policy, hidden, weights, delta), plain, rtol=1e-10, atol=1e-14)
    one = torch.stack([input_gradient(policy, hidden, weights[:, k]) for k in range(5)], dim=1)
    torch.testing.assert_close(input_gradient(policy, hidden, weights), one, rtol=1e-10, atol=1e-14)


# --- recipes ---


def test_a_recipe_scales_and_lays_out_what_the_network_takes():
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean(dim=(1, 2))[:, :2]

    recipe = InputRecipe("rgb", scale=1.0, mean=(10.0, 20.0, 30.0), deviation=(2.0,), layout="hwc")
    policy = TorchPolicy(Watching(), (3, 5, 4), 2, recipe=recipe)
    pixels = torch.randint(0, 256, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    policy(pixels.double() / 255)
    expected = (pixels.double().permute(0, 2, 3, 1) - torch.tensor([10.0, 20.0, 30.0])) / 2
    assert torch.allclose(seen[-1], expected)


@pytest.mark.parametrize(
    ("recipe", "shape", "reason"),
    [
        (InputRecipe("grey", stack=4), (3, 8, 8), "4 grey pictures has 4 channels, but the policy takes 3"),
        (InputRecipe(mean=(0.1, 0.2)), (3, 8, 8), "mean has 2 numbers for 3 channels"),
        (InputRecipe(deviation=(0.0,)), (3, 8, 8), "must not be 0"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, shape, reason):
    with pytest.raises(UserError, match=reason):
        TorchPolicy(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), shape, 2, recipe=recipe)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Linear(5, 3), "does not take states of 3 x 8 x 8"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), r"gives \(2, 4\) for two states where 3 logits mean \(2, 3\)"),
        (nn.Flatten(0), "gives"),
    ],
)
def test_a_network_that_does_not_do_what_is_said_is_refused(network, reason):
    with pytest.raises(UserError, match=reason):
        TorchPolicy(network, (3, 8, 8), 3)


def test_a_recipe_makes_pictures_of_frames():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (6, 4, 3), np.uint8)
    grey = InputRecipe("grey", stack=3)
    luma = grey.picture(frame, (6, 4))
    assert luma.shape == (1, 6, 4) and luma.dtype == np.uint8
    np.testing.assert_allclose(luma[0], frame @ np.array([0.299, 0.587, 0.114]), atol=1)
    for already in (luma[0], luma[0, ..., None]):
        np.testing.assert_array_equal(grey.picture(already, (6, 4)), luma)
    np.testing.assert_array_equal(InputRecipe("bgr").picture(frame, (6, 4)), frame[..., ::-1].transpose(2, 0, 1))
    with pytest.raises(UserError, match="or ask for resizing"):
        grey.picture(frame, (12, 8))
    assert grey.picture(frame, (12, 8), resize=True).shape == (1, 12, 8)
    with pytest.raises(UserError, match="but got uint8 6 x 4"):
        InputRecipe("rgb").picture(luma[0], (6, 4))
