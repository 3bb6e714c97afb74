"""The other saliency methods against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from test_saliency import STRIDED, make_policy, random_states
from torch.nn import functional as F

from carla_digr.policy import TorchPolicy
from carla_digr.saliency.baselines import grad_cam, guided_backpropagation, integrated_gradients, smooth_grad
from carla_digr.saliency.gradient import vanilla_gradient
from carla_digr.saliency.perturbation import Perturbation, perturbed_outputs, sarfa, sarfa_maps


def explained(policy, states):
    return policy(states)[0].softmax(dim=1).square().sum(dim=1) / 2


@pytest.mark.parametrize("method", [guided_backpropagation, grad_cam, integrated_gradients, smooth_grad])
def test_every_method_gives_one_map_a_state_and_leaves_the_policy_alone(method):
    policy, states = make_policy(), random_states(3)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    maps = method(policy, states)
    assert maps.shape == (3, 64, 64) and (maps >= 0).all() and maps.any() and not maps.requires_grad
    assert torch.allclose(method(policy, states[:1])[0], maps[0]) or method is smooth_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_guided_backpropagation_passes_only_positive_gradients(activation):
    policy, states = make_policy(activation=activation), random_states(1)
    _, _, hidden = policy.trace(states)
    pi = policy(states)[0].softmax(dim=1)
    c = pi * (pi - pi.square().sum(dim=1, keepdim=True))
    g = (c @ policy.policy_head.weight).clamp(min=0) * policy.activation_derivative(hidden[-1])
    g = (g @ policy.trunk.weight).view_as(hidden[-2])
    for layer, before in zip(reversed(policy.convolutions), reversed(hidden[:-1]), strict=True):
        size = states if layer is policy.convolutions[0] else hidden[list(policy.convolutions).index(layer) - 1]
        rest = [(n - layer.kernel_size[0]) % layer.stride[0] for n in size.shape[2:]]
        g = g.clamp(min=0) * policy.activation_derivative(before)
        g = F.conv_transpose2d(g, layer.weight, stride=layer.stride, output_padding=rest)
    expected = g.abs().amax(dim=1)
    guided = guided_backpropagation(policy, states)
    assert torch.allclose(guided, expected, rtol=1e-6, atol=1e-7 * float(expected.detach().max()))
    assert not torch.allclose(guided, vanilla_gradient(policy, states), rtol=0.1)


def test_grad_cam_looks_at_the_decisions_own_convolutions():
    """Not at those of a critic of its own, which run last."""

    class Apart(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.actor, self.critic = (
                torch.nn.Sequential(
                    torch.nn.Conv2d(3, 4, 8, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(900, outputs)
                )
                for outputs in (3, 1)
            )

        def forward(self, x):
            return self.actor(x), self.critic(x)

    torch.manual_seed(0)
    network = Apart()
    states = random_states(2).float()
    apart = grad_cam(TorchPolicy(network, (3, 64, 64), 3), states)
    assert apart.any() and torch.equal(apart, grad_cam(TorchPolicy(network.actor, (3, 64, 64), 3), states))


def test_grad_cam_is_its_formula():
    policy, states = make_policy(), random_states(2)
    x = states
    for convolution in policy.convolutions[:-1]:
        x = F.relu(convolution(x))
    activations = F.relu(policy.convolutions[-1](x))
    logits = policy.policy_head(F.relu(policy.trunk(activations.flatten(1))))
    (gradients,) = torch.autograd.grad((logits.softmax(dim=1).square() / 2).sum(), activations)
    cam = F.relu((gradients.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1, keepdim=True))
    expected = F.interpolate(cam, (64, 64), mode="bilinear")[:, 0]
    assert torch.allclose(grad_cam(policy, states), expected)


def test_integrated_gradients_is_the_mean_gradient_on_the_way_from_black():
    policy, states = make_policy(STRIDED, "softplus"), random_states(1)
    points = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)[:, None, None, None] * states
    gradient = torch.zeros_like(states)
    for part in points.split(100):
        part.requires_grad_(True)
        gradient += torch.autograd.grad(explained(policy, part).sum(), part)[0].sum(dim=0)
    expected = (gradient / 1000).abs().amax(dim=1)
    assert (integrated_gradients(policy, states) - expected).abs().max() < 1e-3 * expected.max()


def test_smooth_grad_without_noise_is_guided_backpropagation_and_with_noise_is_reproducible():
    policy, states = make_policy(), random_states(2)
    plain = guided_backpropagation(policy, states)
    assert torch.allclose(smooth_grad(policy, states, sigma=0.0), plain)
    noisy = smooth_grad(policy, states)
    assert not torch.allclose(noisy, plain)
    torch.rand(1)
    assert torch.equal(smooth_grad(policy, states), noisy)


def test_sarfa_is_its_papers_formula():
    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([0.6, 0.3, 0.1], [0.4, 0.3, 0.3]))
    dp = 0.2
    # among the others: p 0.75 and 0.25, perturbed 0.5 and 0.5
    k = 1 / (1 + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert float(sarfa(p.log(), q.log())) == pytest.approx(2 * k * dp / (k + dp))
    assert float(sarfa(q.log(), p.log())) == 0  # the perturbation made the action more probable
    specific = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64)  # the others keep their ratio of 3 to 1
    assert float(sarfa(p.log(), specific.log())) == pytest.approx(2 * 0.4 / 1.4)


def test_sarfa_maps_apply_it_to_every_pixel():
    policy, states = make_policy(), random_states(1)
    settings = Perturbation(4.0, 3.0, stride=8)
    maps = sarfa_maps(policy, states, settings)
    logits, perturbed = policy(states)[0][0], perturbed_outputs(policy, states, settings)[0]
    assert float(maps[0, 10, 50]) == pytest.approx(float(sarfa(logits, perturbed[10, 50]).detach()))
    assert maps.shape == (1, 64, 64) and (maps >= 0).all() and (maps <= 1).all()
