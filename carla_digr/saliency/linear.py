"""The linearised perturbation map: eq. 3 to second order, by one Jacobian instead of a forward pass a pixel.

Blending a blurred copy in around pixel i (eq. 3) changes the state by G_i delta, delta = blur(s) - s and G_i a bump at
i. To first order the outputs change by c(i) = sum over pixels and channels of G_i J delta, J the Jacobian of the
outputs, and to second order the divergence from the undisturbed decision is 1/2 c^T F c, F the Fisher metric of the
outputs: of logits half the variance of c under pi. J is taken on the way to the blurred picture, at s + t delta, for at
s itself a network's gradient says nothing of where the change leads.

``differentiable_maps`` is the same map for training: one ordinary backward pass through it trains the weights.
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
NEGLIGIBLE = 0.01  # of the Fisher metric's weight: a row with less is left out where a frame must not wait


def linear_maps(
    policy: Policy,
    states: Tensor,
    target: int | None = None,
    blur_sigma: float = BLUR_SIGMA,
    radius: float = BUMP_RADIUS,
    t: float = TOWARDS_BLUR,
    outputs: Tensor | None = None,
    negligible: float = 0.0,
) -> Tensor:
    """M = 1/2 c^T F c by pixel, c_k = G_r * sum over channels of J_k delta.

    Args:
        policy: the policy to explain.
        states: float (B, C, H, W) in [0, 1].
        target: the divergence of this action or dimension alone.
        blur_sigma: standard deviation of the blurred copy, pixels.
        radius: standard deviation of the bump, pixels.
        t: where the Jacobian is taken, 0 at the state, 1 at its blurred copy.
        outputs: the policy's at the states, if they are known.
        negligible: share of the metric's weight below which one of ``fisher_rows`` is left out of an ActorCritic's map
            of what it decided. A decided policy has one or two rows that count, and a row costs a backward pass.

    Returns:
        float (B, H, W), not negative, not normalised.
    """
    distribution = DISTRIBUTIONS[policy.output]
    with torch.no_grad():
        if outputs is None:
            outputs = policy(states)[0]
        delta = gaussian_blur(states, blur_sigma) - states
        if negligible and target is None and isinstance(policy, ActorCritic):
            rows, importance = fisher_rows(outputs)
            counts = (importance >= negligible * importance.sum(dim=1, keepdim=True)).sum(dim=1)
            first = importance.argsort(dim=1, descending=True)[:, : max(1, int(counts.max()))]
            rows = rows.gather(1, first[:, :, None].expand(-1, -1, rows.shape[2]))
            change = _changes(policy, states + t * delta, rows, delta, radius)
            return (importance.gather(1, first)[:, :, None, None] * change.square()).sum(dim=1) / 2
        contrast = (jacobian(policy, states + t * delta) * delta[:, None]).sum(dim=2)
        change = gaussian_blur(contrast, radius)
        return distribution.metric(outputs[:, None, None], change.permute(0, 2, 3, 1), target) / 2


def differentiable_maps(policy: ActorCritic, states: Tensor, logits: Tensor, signs: Tensor | None = None) -> Tensor:
    """``linear_maps`` of a softmax policy, differentiable in its weights.

    The Jacobian's rows are not the logits' but those of ``fisher_rows``. Where time matters, the first ones are taken
    as they are and the others summed with random signs to one more: the expectation over the signs is the map.

    Args:
        policy: the network.
        states: float (B, C, H, W) in [0, 1].
        logits: float (B, A), the policy's at the states; the gradient flows through them too.
        signs: float (B, A - R), 1 or -1 at random, for R rows in all; None: all A - 1, exactly.

    Returns:
        float (B, H, W), not negative, not normalised.
    """
    delta = gaussian_blur(states, BLUR_SIGMA) - states
    rows, importance = fisher_rows(logits)
    if signs is not None:
        exact = rows.shape[1] - signs.shape[1]
        scaled = rows[:, exact:] * (importance[:, exact:].clamp(min=1e-30).sqrt() * signs)[:, :, None]
        rows = torch.cat([rows[:, :exact], scaled.sum(dim=1, keepdim=True)], dim=1)
        importance = torch.cat([importance[:, :exact], torch.ones_like(importance[:, :1])], dim=1)
    change = _changes(policy, states + TOWARDS_BLUR * delta, rows, delta, BUMP_RADIUS)
    return (importance[:, :, None, None] * change.square()).sum(dim=1) / 2


def _changes(policy: ActorCritic, at: Tensor, rows: Tensor, delta: Tensor, radius: float) -> Tensor:
    """(B, R, H, W): G_r * sum over channels of (rows J) delta, for rows (B, R, A) and the Jacobian J at ``at``."""
    gradients = input_gradient(policy, policy.trace(at)[2], rows)
    return gaussian_blur((gradients * delta[:, None]).sum(dim=2), radius)


def fisher_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The variance under pi as a sum of squares: Var_pi[c] = sum_k d_k (u_k . c)^2.

    With the actions in descending order of probability, u_k is c_k less the mean of c over those after it, and
    d_k = pi_k s_k / (pi_k + s_k) with s_k the probability of those after it: the variance between k and the rest, the
    rest's own following in the next terms. No small number is a difference of large ones.

    Args:
        logits: float (B, A).

    Returns:
        u float (B, A - 1, A) in the order of the logits, and d float (B, A - 1), differentiable.
    """
    ordered, order = logits.sort(dim=1, descending=True)
    log_pi = ordered.log_softmax(dim=1)
    tails = log_pi.flip(1).logcumsumexp(dim=1).flip(1)  # log of pi_k + s_k
    importance = (log_pi[:, :-1] + tails[:, 1:] - tails[:, :-1]).exp()
    after = torch.ones(logits.shape[1], logits.shape[1], dtype=torch.bool).triu(1)[:-1]
    shares = (log_pi[:, None] - tails[:, 1:, None]).masked_fill(~after, -torch.inf).exp()
    rows = torch.eye(logits.shape[1], dtype=logits.dtype)[:-1] - shares
    return rows.gather(2, order.argsort(dim=1)[:, None].expand_as(rows)), importance


def jacobian(policy: Policy, states: Tensor) -> Tensor:
    """d output_k / d s: float (B, K, C, H, W), of logits each less the first one's, a shift no decision depends on."""
    if isinstance(policy, ActorCritic):
        with torch.no_grad():
            _, _, hidden = policy.trace(states)
            rows = torch.eye(policy.actions, dtype=states.dtype)[1:]
            rows[:, 0] = -1
            found = input_gradient(policy, hidden, rows.expand(len(states), -1, -1))
        return torch.cat([torch.zeros_like(found[:, :1]), found], dim=1)
    leaf = states.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = policy(leaf)[0]
        if DISTRIBUTIONS[policy.output].discrete:
            outputs = outputs - outputs[:, :1]
        sums = outputs.sum(dim=0).unbind()
    return torch.stack([torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in sums], dim=1)
