"""The linearised perturbation map: eq. 3 to second order, by one Jacobian instead of a forward pass a pixel.

Blending a blurred copy in around pixel i (eq. 3) changes the state by G_i delta, delta = blur(s) - s and G_i a bump at
i. To first order the outputs change by c(i) = sum over pixels and channels of G_i J delta, J the Jacobian of the
outputs, and to second order the divergence from the undisturbed decision is 1/2 c^T F c, F the Fisher metric of the
outputs: of logits half the variance of c under pi. J is taken on the way to the blurred picture, at s + t delta, for at
s itself a network's gradient says nothing of where the change leads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.policy import ActorCritic, Policy
from carla_digr.saliency.gradient import input_gradient
from carla_digr.saliency.perturbation import gaussian_blur

BLUR_SIGMA = 10.0  # pixels; no car is left of the picture
BUMP_RADIUS = 1.5  # pixels, standard deviation of G
TOWARDS_BLUR = 0.35  # t


def linear_maps(
    policy: Policy,
    states: Tensor,
    target: int | None = None,
    blur_sigma: float = BLUR_SIGMA,
    radius: float = BUMP_RADIUS,
    t: float = TOWARDS_BLUR,
) -> Tensor:
    """M = 1/2 c^T F c by pixel, c_k = G_r * sum over channels of J_k delta.

    Args:
        policy: the policy to explain.
        states: float (B, C, H, W) in [0, 1].
        target: the divergence of this action or dimension alone.
        blur_sigma: standard deviation of the blurred copy, pixels.
        radius: standard deviation of the bump, pixels.
        t: where the Jacobian is taken, 0 at the state, 1 at its blurred copy.

    Returns:
        float (B, H, W), not negative, not normalised.
    """
    distribution = DISTRIBUTIONS[policy.output]
    with torch.no_grad():
        outputs = policy(states)[0]
        delta = gaussian_blur(states, blur_sigma) - states
        contrast = (jacobian(policy, states + t * delta) * delta[:, None]).sum(dim=2)
        change = gaussian_blur(contrast, radius)
        return distribution.metric(outputs[:, None, None], change.permute(0, 2, 3, 1), target) / 2


def jacobian(policy: Policy, states: Tensor) -> Tensor:
    """d output_k / d s: float (B, K, C, H, W), of logits each less the first one's, a shift no decision depends on."""
    if isinstance(policy, ActorCritic):
        with torch.no_grad():
            _, _, hidden = policy.trace(states)
            rows = torch.eye(policy.actions, dtype=states.dtype)[1:]
            rows[:, 0] = -1
            repeated = [layer.repeat_interleave(len(rows), dim=0) for layer in hidden]
            gradients = input_gradient(policy, repeated, rows.repeat(len(states), 1))
        found = gradients.view(len(states), len(rows), *states.shape[1:])
        return torch.cat([torch.zeros_like(found[:, :1]), found], dim=1)
    leaf = states.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = policy(leaf)[0]
        if DISTRIBUTIONS[policy.output].discrete:
            outputs = outputs - outputs[:, :1]
        sums = outputs.sum(dim=0).unbind()
    return torch.stack([torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in sums], dim=1)
