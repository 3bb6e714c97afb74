"""The graphs of a network against the formulas they stand for, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from carla_digr.config import PolicyConfig
from carla_digr.policy import ActorCritic
from carla_digr.saliency.compiled import CompiledNetwork
from carla_digr.saliency.gradient import input_contrast, input_gradient, normalise, normalise_one
from carla_digr.saliency.linear import BLUR, TOWARDS_BLUR
from carla_digr.saliency.perturbation import gaussian_blur

NETWORKS = {
    "driving": (((16, 8, 4), (32, 4, 2), (32, 3, 2)), (3, 128, 128), "softplus"),
    "relu": (((8, 4, 2), (8, 2, 2)), (1, 36, 52), "relu"),  # of kernels that are the stride, or twice it
    "awkward": (((4, 5, 2), (6, 3, 1), (5, 4, 3)), (2, 33, 41), "softplus"),  # pixels that no kernel reaches
    "one layer": (((4, 4, 2),), (4, 20, 20), "softplus"),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", [1.0, 30.0])  # of the weights: then most of a softplus is straight
def test_the_graphs_are_the_formulas(name, scale):
    convolutions, shape, activation = NETWORKS[name]
    torch.manual_seed(0)
    policy = ActorCritic(PolicyConfig(convolutions=convolutions, features=24, activation=activation), *shape, 5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(scale ** (1 / len(list(policy.parameters()))))
            parameter.add_(0.01 * torch.randn_like(parameter))
    compiled = CompiledNetwork(policy)
    states, weights = torch.rand(3, *shape), torch.randn(4, 5)
    logits, value, hidden, activated = compiled.decide(states.numpy())
    one = compiled.decide(states[:1].numpy())
    gradient = compiled.gradient_map(weights[:1].numpy(), one[2])
    contrast = compiled.contrast(states[:1].numpy(), weights.numpy())
    with torch.no_grad():
        exact = policy.double()
        states, weights = states.double(), weights.double()
        true_activated: list[torch.Tensor] = []
        true_logits, true_value, true_hidden = exact.trace(states, true_activated)
        assert close(logits, true_logits) and close(value, true_value)
        assert all(close(*pair) for pair in zip(hidden, true_hidden, strict=True))
        assert all(close(*pair) for pair in zip(activated, true_activated, strict=True))
        assert close(compiled.outputs(states.float().numpy()), true_logits)
        assert close(compiled.logits(true_activated[-1].flatten(1).float().numpy()), true_logits)
        trace = [layer[:1] for layer in true_hidden]
        assert close(gradient, input_gradient(exact, trace, weights[:1]).abs().amax(dim=1))
        delta = gaussian_blur(states[:1], BLUR * shape[1]) - states[:1]
        at = exact.trace(states[:1] + TOWARDS_BLUR * delta)[2]
        assert close(contrast, input_contrast(exact, at, weights[None], delta)[0])


def close(found: np.ndarray, true: torch.Tensor) -> bool:
    """Within 1e-5 of the largest."""
    assert found.shape == tuple(true.shape) and found.dtype == np.float32
    return float(np.abs(found - true.numpy()).max()) < 1e-5 * float(true.abs().max())


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_no_number_that_a_broken_network_gives_is_hidden(activation):
    policy = ActorCritic(PolicyConfig(activation=activation), 3, 128, 128, 4)
    with torch.no_grad():
        policy.convolutions[1].bias[0] = float("nan")
    logits, value, *_ = CompiledNetwork(policy).decide(np.random.default_rng(0).random((1, 3, 128, 128), np.float32))
    assert not np.isfinite(logits).any() and not np.isfinite(value).any()


@pytest.mark.parametrize("largest", [0.0, 1e-31, 0.3, float("inf"), float("nan")])
def test_a_map_alone_is_normalised_as_in_a_batch(largest):
    found = np.random.default_rng(1).random((5, 7), np.float32) * np.float32(min(1.0, np.nan_to_num(largest)))
    found[2, 3] = largest
    alone, flat = normalise_one(found)
    batch, flags = normalise(torch.from_numpy(found[None]))
    np.testing.assert_array_equal(alone, batch[0].numpy())
    assert flat == bool(flags[0]) and alone.dtype == np.float32
