"""Divergences, metrics and explained functions of what a policy's outputs may mean."""

from __future__ import annotations

import pytest
import torch

from carla_digr.distributions import DISTRIBUTIONS, combined, eq2_weights

ACTIONS = 3
TARGETS = [None, 0, 2]


def outputs_of(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DISTRIBUTIONS[kind].outputs(ACTIONS), generator=generator, dtype=torch.float64) / 2


def as_torch(kind: str, outputs: torch.Tensor, target: int | None) -> torch.distributions.Distribution:
    """The same distribution by torch, of the action or of what the target leaves of it."""
    if kind in ("logits", "q_values"):
        categorical = torch.distributions.Categorical(logits=outputs)
        return categorical if target is None else torch.distributions.Bernoulli(categorical.probs[..., target])
    mean, log_sigma = outputs.chunk(2, dim=-1) if kind != "deterministic" else (outputs, torch.zeros_like(outputs))
    mean, log_sigma = (x if target is None else x[..., target, None] for x in (mean, log_sigma))
    normal = torch.distributions.Normal(mean, log_sigma.exp())
    if kind == "squashed_gaussian":
        tanh = [torch.distributions.TanhTransform(cache_size=1)]
        return torch.distributions.Independent(torch.distributions.TransformedDistribution(normal, tanh), 1)
    return torch.distributions.Independent(normal, 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_divergence_is_what_sampling_finds(kind, target):
    p, q = outputs_of(kind, 4, 1), outputs_of(kind, 4, 2)
    first, second = as_torch(kind, p, target), as_torch(kind, q, target)
    torch.manual_seed(0)
    samples = first.sample((200_000,))
    ratio = first.log_prob(samples) - second.log_prob(samples)
    error = ratio.std(dim=0) / 200_000**0.5
    closed = DISTRIBUTIONS[kind].divergence(p, q, target)
    assert ((closed - ratio.mean(dim=0)).abs() < 5 * error + 1e-9).all()
    assert (closed > 0).all() and (DISTRIBUTIONS[kind].divergence(p, p, target) == 0).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 20.0])
def test_the_divergence_after_a_change_is_the_divergence(kind, target, size):
    outputs = outputs_of(kind, 5)
    change = size * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if "gaussian" in kind:
        change[:, change.shape[1] // 2 :] /= max(size, 1.0)  # a standard deviation does not change by e^20
    distribution = DISTRIBUTIONS[kind]
    expected = distribution.divergence(outputs, outputs + change, target)
    torch.testing.assert_close(distribution.divergence_after(outputs, change, target), expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_divergence_after_a_tiny_change_keeps_its_digits_in_float32(kind, target):
    outputs = outputs_of(kind, 5)
    change = 1e-3 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    distribution = DISTRIBUTIONS[kind]
    for step in (1.0, 1e-6, 1e-12):
        exact = distribution.divergence_after(outputs, step * change, target)
        found = distribution.divergence_after(outputs.float(), step * change.float(), target)
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_gradients_are_those_of_the_explained_functions(kind, target):
    outputs = outputs_of(kind, 4).requires_grad_(True)
    distribution = DISTRIBUTIONS[kind]
    explained = distribution.explained(outputs, target)
    rows = [
        torch.autograd.grad(explained[:, k].sum(), outputs, retain_graph=True)[0] for k in range(explained.shape[1])
    ]
    assert torch.allclose(distribution.gradients(outputs.detach(), target), torch.stack(rows, dim=1))
    assert distribution.importance(outputs.detach(), target).shape == explained.shape


def test_the_target_of_a_confident_policy_keeps_its_digits_in_float32():
    logits = torch.tensor([[30.0, 0.0, -1.0]])
    exact = DISTRIBUTIONS["logits"].gradients(logits.double(), 0)
    assert torch.allclose(DISTRIBUTIONS["logits"].gradients(logits, 0).double(), exact, rtol=1e-6)
    change = torch.tensor([[0.1, 0.3, -0.2]])
    for target in (0, 1, None):
        found = DISTRIBUTIONS["logits"].divergence_after(logits, change, target)
        exact = DISTRIBUTIONS["logits"].divergence_after(logits.double(), change.double(), target)
        assert float(found) > 0 and torch.allclose(found.double(), exact, rtol=1e-4, atol=0.0)


def test_attributions_are_combined_in_the_metric():
    attributions = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    importance = torch.tensor([[1.0, 4.0, 0.0], [2.0, 1.0, 1.0]])
    expected = sum(importance[:, k, None, None, None] * attributions[:, k] ** 2 for k in range(3)).sqrt()
    assert torch.allclose(combined(importance, attributions), expected)
    assert torch.equal(combined(torch.ones(2, 1), attributions[:, :1]), attributions[:, 0].abs())


def test_eq2_weights_are_eq2():
    logits = outputs_of("logits", 4).requires_grad_(True)
    pi = logits.softmax(dim=1)
    rows = [torch.autograd.grad(pi[:, a].sum(), logits, retain_graph=True)[0] for a in range(ACTIONS)]
    assert torch.allclose(eq2_weights(logits), sum(pi[:, a, None] * rows[a] for a in range(ACTIONS)))
