"""The paper's other gradient-based maps, by captum.

Each explains f(s) = sum_a pi(a|s)^2 / 2, the function whose gradient eq. 2 is, so that the methods differ in nothing
else. Each takes a policy and float states (B, C, H, W) in [0, 1] and returns raw maps, float (B, H, W), not negative:
the maximum over channels of the absolute attribution, as for eq. 2.
"""

from __future__ import annotations

import warnings

import torch
from captum.attr import GuidedBackprop, IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel
from torch import Tensor, nn

from carla_digr.policy import SOFTPLUS_BETA, ActorCritic


def guided_backpropagation(policy: ActorCritic, states: Tensor) -> Tensor:
    """Springenberg et al. 2015: backward through ReLUs only where the gradient is positive, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks")  # on modules that live only here
        return _reduce(GuidedBackprop(_Explained(policy)).attribute(_leaf(states)))


def grad_cam(policy: ActorCritic, states: Tensor) -> Tensor:
    """Selvaraju et al. 2017 on the last convolution, bilinearly enlarged."""
    model = _Explained(policy)
    maps = LayerGradCam(model, model.last_convolution).attribute(_leaf(states), relu_attributions=True)
    return LayerAttribution.interpolate(maps, states.shape[2:], "bilinear")[:, 0].detach()


def integrated_gradients(policy: ActorCritic, states: Tensor, steps: int = 50) -> Tensor:
    """Sundararajan et al. 2017 from the black picture.

    The mean gradient is not multiplied by the input: black floor would be zero by that alone, while the paper's
    Table 1 has most of the map's mass there.
    """
    method = IntegratedGradients(_Explained(policy), multiply_by_inputs=False)
    return _reduce(method.attribute(_leaf(states), n_steps=steps, internal_batch_size=256))


def smooth_grad(policy: ActorCritic, states: Tensor, sigma: float = 0.15, samples: int = 20, seed: int = 0) -> Tensor:
    """Smilkov et al. 2017 on guided backpropagation: the mean over noisy copies of the state."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks")
        torch.manual_seed(seed)
        tunnel = NoiseTunnel(GuidedBackprop(_Explained(policy)))
        maps = tunnel.attribute(_leaf(states), nt_type="smoothgrad", nt_samples=samples, stdevs=sigma)
    return _reduce(maps)


class _Explained(nn.Module):
    """The policy as modules, as captum's hooks need it, with the explained function as its output, (B,)."""

    def __init__(self, policy: ActorCritic):
        super().__init__()
        layers: list[nn.Module] = []
        for layer in [*policy.convolutions, policy.trunk]:
            if layer is policy.trunk:
                layers.append(nn.Flatten())
            relu = policy.config.activation == "relu"
            layers += [layer, nn.ReLU() if relu else nn.Softplus(SOFTPLUS_BETA)]
        self.layers = nn.Sequential(*layers, policy.policy_head)
        self.last_convolution = policy.convolutions[-1]

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states).softmax(dim=1).square().sum(dim=1) / 2


def _leaf(states: Tensor) -> Tensor:
    return states.detach().clone().requires_grad_(True)


def _reduce(attributions: Tensor) -> Tensor:
    return attributions.detach().abs().amax(dim=1)
