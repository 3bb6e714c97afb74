"""The linearised perturbation map: eq. 3 with one Jacobian instead of a forward pass a pixel.

Blending a blurred copy in around pixel i (eq. 3) changes the state by G_i delta, delta = blur(s) - s and G_i a bump at
i. To first order the outputs change by c(i) = sum over pixels and channels of G_i J delta, J the Jacobian of the
outputs, and the map is the divergence of the decision from the one with the outputs so changed. J is taken on the way
to the blurred picture, at s + t delta, for at s itself a network's gradient says nothing of where the change leads.

``differentiable_maps`` is the same map to second order, 1/2 c^T F c with F the Fisher metric of the outputs (of logits
half the variance of c under pi), for training: one ordinary backward pass through it trains the weights.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carla_digr.distributions import DISTRIBUTIONS, MOST_CHANGE, divergence_of_others
from carla_digr.policy import ActorCritic, Policy
from carla_digr.saliency.gradient import input_contrast, input_gradient
from carla_digr.saliency.perturbation import gaussian_blur

BLUR = 10 / 128  # standard deviation of the blur, of the picture's height; no car is left of a picture
BUMP_RADIUS = 1.5  # pixels, standard deviation of G
BUMP_MASS = 30.0  # sum of G over the pixels; eq. 3's has 157, one of this radius and the height 1 has 14
TOWARDS_BLUR = 0.35  # t
ROUNDED = 1e-2  # least of a map's largest value in the probability of all other actions, for float32 to do


def linear_maps(
    policy: Policy,
    states: Tensor,
    target: int | None = None,
    blur: float = BLUR,
    radius: float = BUMP_RADIUS,
    mass: float = BUMP_MASS,
    outputs: Tensor | None = None,
) -> Tensor:
    """KL(pi(z) || pi(z + c)) by pixel, z the outputs and c_k = mass * G_r * sum over channels of J_k delta.

    Args:
        policy: the policy to explain.
        states: float (B, C, H, W) in [0, 1].
        target: the divergence of this action or dimension alone.
        blur: standard deviation of the blurred copy's blur, of the picture's height.
        radius: standard deviation of the bump, pixels.
        mass: sum of the bump over the pixels.
        outputs: the policy's at the states, if they are known.

    Returns:
        float (B, H, W), not negative, not normalised.
    """
    with torch.no_grad():
        if outputs is None:
            outputs = policy(states)[0]
        delta = gaussian_blur(states, blur * states.shape[2]) - states
        at = states + TOWARDS_BLUR * delta
        if isinstance(policy, ActorCritic) and target is None:
            others, rows = against_the_preferred(outputs)
            contrast = input_contrast(policy, policy.trace(at)[2], mass * rows, delta)
            return contrast_maps(outputs, others, contrast, radius)
        contrast = (jacobian(policy, at) * delta[:, None]).sum(dim=2)
        change = gaussian_blur(mass * contrast, radius).permute(0, 2, 3, 1)
        return DISTRIBUTIONS[policy.output].divergence_after(outputs[:, None, None], change, target)


def contrast_maps(logits: Tensor, others: Tensor, contrast: Tensor, radius: float = BUMP_RADIUS) -> Tensor:
    """The maps of what the picture's pixels do to the logits of all actions but the preferred one, less its.

    Args:
        logits: float (B, A), of the states.
        others: int64 (B, A - 1), see ``against_the_preferred``.
        contrast: float (B, A - 1, H, W), of the rows there times the bump's mass.
        radius: standard deviation of the bump, pixels.

    Returns:
        float (B, H, W), not negative, not normalised.
    """
    return pixel_divergence(logits.softmax(dim=1).gather(1, others), _bumps(contrast, radius))


def against_the_preferred(logits: Tensor) -> tuple[Tensor, Tensor]:
    """All actions but the preferred one, (B, A - 1), and rows that are their logits less its, float (B, A - 1, A)."""
    preferred = F.one_hot(logits.argmax(dim=1), logits.shape[1])
    others = (1 - preferred).nonzero()[:, 1].view(len(logits), -1)
    return others, (F.one_hot(others, logits.shape[1]) - preferred[:, None]).to(logits.dtype)


def _bumps(contrast: Tensor, radius: float) -> Tensor:
    """``gaussian_blur`` of maps float (B, R, H, W), without a gradient, by OpenCV's filter where that can be."""
    if contrast.dtype != torch.float32 or contrast.device.type != "cpu":
        return gaussian_blur(contrast, radius)
    found = np.empty(contrast.shape, np.float32)
    size = 2 * int(4 * radius + 0.5) + 1  # as there
    for before, after in zip(contrast.flatten(0, 1).numpy(), found.reshape(-1, *found.shape[2:]), strict=True):
        cv2.GaussianBlur(before, (size, size), radius, after, borderType=cv2.BORDER_REFLECT)
    return torch.from_numpy(found)


def pixel_divergence(pi: Tensor, change: Tensor) -> Tensor:
    """``divergence_of_others`` for each pixel.

    Args:
        pi: float (B, R), probabilities of all actions but the preferred one.
        change: float (B, R, H, W), of their logits.

    Returns:
        float (B, H, W). In float32, where that has the digits: the error of what the exponential rounds away is 1e-7 of
        the sum of ``pi``, which is to be small beside the map's largest value.
    """
    if change.dtype == torch.float32:
        rows = change.clamp(max=MOST_CHANGE).flatten(2)
        found = torch.log1p((pi[:, None] @ rows.exp().sub_(1))[:, 0]) - (pi[:, None] @ rows)[:, 0]
        if bool((ROUNDED * pi.sum(dim=1) < found.amax(dim=1)).all()):
            return found.clamp_(min=0).view(-1, *change.shape[2:])
    return divergence_of_others(pi[:, None, None], change.permute(0, 2, 3, 1))


def differentiable_maps(policy: ActorCritic, states: Tensor, logits: Tensor, signs: Tensor | None = None) -> Tensor:
    """``linear_maps`` of a softmax policy to second order, for a bump of mass 1, differentiable in its weights.

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
    delta = gaussian_blur(states, BLUR * states.shape[2]) - states
    rows, importance = fisher_rows(logits)
    if signs is not None:
        exact = rows.shape[1] - signs.shape[1]
        scaled = rows[:, exact:] * (importance[:, exact:].clamp(min=1e-30).sqrt() * signs)[:, :, None]
        rows = torch.cat([rows[:, :exact], scaled.sum(dim=1, keepdim=True)], dim=1)
        importance = torch.cat([importance[:, :exact], torch.ones_like(importance[:, :1])], dim=1)
    contrast = input_contrast(policy, policy.trace(states + TOWARDS_BLUR * delta)[2], rows, delta)
    change = gaussian_blur(contrast, BUMP_RADIUS)
    return (importance[:, :, None, None] * change.square()).sum(dim=1) / 2


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
    after = torch.ones(logits.shape[1], logits.shape[1], dtype=torch.bool, device=logits.device).triu(1)[:-1]
    shares = (log_pi[:, None] - tails[:, 1:, None]).masked_fill(~after, -torch.inf).exp()
    rows = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)[:-1] - shares
    return rows.gather(2, order.argsort(dim=1)[:, None].expand_as(rows)), importance


def jacobian(policy: Policy, states: Tensor) -> Tensor:
    """d output_k / d s: float (B, K, C, H, W), of logits each less the first one's, a shift no decision depends on."""
    if isinstance(policy, ActorCritic):
        with torch.no_grad():
            rows = torch.eye(policy.actions, dtype=states.dtype, device=states.device)
            rows[:, 0] -= 1
            return input_gradient(policy, policy.trace(states)[2], rows.expand(len(states), -1, -1))
    leaf = states.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = policy(leaf)[0]
        if DISTRIBUTIONS[policy.output].discrete:
            outputs = outputs - outputs[:, :1]
        sums = outputs.sum(dim=0).unbind()
    return torch.stack([torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in sums], dim=1)
