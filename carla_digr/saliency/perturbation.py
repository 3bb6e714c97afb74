"""Perturbation saliency: the paper's eq. 3 with Gaussian blur (Greydanus et al. 2018), and SARFA.

The saliency of pixel i is KL(pi(s) || pi(m(s, i))). m(s, i) = s * (1 - K_i) + blur(s) * K_i blends in a blurred copy
around i; K_i is a Gaussian bump of height 1 and standard deviation ``radius`` centred on i, equal for all channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, Policy
from carla_digr.saliency.windows import blended_logits


@dataclass(frozen=True)
class Perturbation:
    """Settings of eq. 3.

    Attributes:
        radius: standard deviation of the bump, pixels.
        blur_sigma: standard deviation of the blurred copy, pixels.
        stride: pixels between perturbed centres; 1 perturbs at every pixel, as the definition says. With more the
            perturbed outputs in between are interpolated (cubic), which is far smoother than their KL.
        score: what tells the perturbed decision from the undisturbed one; see ``perturbation_maps``.
        batch: perturbed states in one forward pass, about; a core's cache holds no more of them.
    """

    radius: float = 5.0
    blur_sigma: float = 3.0
    stride: int = 4
    score: Literal["kl", "logits"] = "kl"
    batch: int = 64

    @classmethod
    def from_settings(cls, settings: Any) -> Perturbation:
        """The settings that a dataset was, or is to be, made with.

        Args:
            settings: the section ``saliency_dataset`` of a configuration, or that of a checkpoint's card, a mapping;
                what it lacks is the default.
        """
        values = settings if isinstance(settings, Mapping) else vars(settings)
        return cls(**{name: values[name] for name in ("radius", "blur_sigma", "stride", "score") if name in values})


def perturbation_maps(policy: Policy, states: Tensor, perturbation: Perturbation, target: int | None = None) -> Tensor:
    """Raw perturbation saliency.

    By the score "kl" it is eq. 3. By "logits" it is half the squared distance of the outputs (Greydanus et al. 2018,
    eq. 2), of logits each less their mean, which the policy does not depend on. A confident policy's probabilities
    hardly change while it still prefers the same action, whatever is hidden from it; its logits do change.

    Args:
        policy: the policy to explain.
        states: float (B, C, H, W) in [0, 1].
        perturbation: its settings.
        target: count what is done to this action or dimension alone: the divergence between "it" and "another one", or
            its own logit's change.

    Returns:
        float (B, H, W), not negative, not normalised.
    """
    distribution = DISTRIBUTIONS[policy.output]
    with torch.no_grad():
        outputs = policy(states)[0][:, None, None, :]
        perturbed = perturbed_outputs(policy, states, perturbation)
        if perturbation.score == "kl":
            # In float32 the terms of a divergence of 1e-6 cancel to rounding, which of a nearly uniform policy is all.
            return distribution.divergence(outputs.double(), perturbed.double(), target).to(outputs.dtype)
        change = perturbed - outputs
        change = change - change.mean(dim=-1, keepdim=True) if distribution.discrete else change
        squares = change.square()
        return (squares.sum(dim=-1) if target is None else squares[..., target]) / 2


def sarfa_maps(policy: Policy, states: Tensor, perturbation: Perturbation, target: int | None = None) -> Tensor:
    """Raw saliency by SARFA (Puri et al. 2020, eq. 1 to 5) of the most probable action, with the same perturbation.

    The authors' published code computes the divergence of the other actions the other way round, KL(p_rest || p'_rest);
    here it is as the paper says.

    Args:
        policy, states, perturbation: as for ``perturbation_maps``.
        target: of this action instead.

    Returns:
        float (B, H, W) in [0, 1].

    Raises:
        UserError: the policy is continuous: SARFA is of the probabilities of actions.
    """
    if not DISTRIBUTIONS[policy.output].discrete:
        raise UserError("SARFA explains the choice between actions, and this policy is continuous; use gb.")
    with torch.no_grad():
        logits = policy(states)[0][:, None, None, :]
        return sarfa(logits, perturbed_outputs(policy, states, perturbation), target)


def sarfa(logits: Tensor, perturbed: Tensor, target: int | None = None) -> Tensor:
    """The harmonic mean of relevance and specificity for an action a, by default the most probable one of ``logits``.

    dp = p(a) - p'(a), how much the perturbation takes from the action (relevance); K = 1 / (1 + KL(p'_rest || p_rest)),
    how little it changes the others among themselves; 2 K dp / (K + dp), 0 where dp is not positive.

    Args:
        logits: float (..., A), of the state.
        perturbed: float (..., A), broadcastable with it.
        target: a.

    Returns:
        float (...).
    """
    logits, perturbed = torch.broadcast_tensors(logits, perturbed)
    action = logits.argmax(dim=-1, keepdim=True)
    action = action if target is None else torch.full_like(action, target)
    dp = (logits.softmax(dim=-1) - perturbed.softmax(dim=-1)).gather(-1, action).squeeze(-1).clamp(min=0)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, action, False)
    rest, perturbed_rest = (
        values[others].view(*values.shape[:-1], -1).log_softmax(dim=-1) for values in (logits, perturbed)
    )
    k = 1 / (1 + (perturbed_rest.exp() * (perturbed_rest - rest)).sum(dim=-1))
    return 2 * k * dp / (k + dp)


@torch.no_grad()
def perturbed_outputs(policy: Policy, states: Tensor, perturbation: Perturbation) -> Tensor:
    """Outputs for m(s, i) for every pixel i: float (B, H, W, K), without gradients."""
    height, width = states.shape[2:]
    rows, columns = (_centres(n, perturbation.stride) for n in (height, width))
    bumps_y, bumps_x = (
        _bumps(centres, n, perturbation.radius).to(states.dtype) for centres, n in ((rows, height), (columns, width))
    )
    to_rows, to_columns = (_interpolation(centres, n).to(states) for centres, n in ((rows, height), (columns, width)))
    differences = gaussian_blur(states, perturbation.blur_sigma) - states
    if isinstance(policy, ActorCritic) and len(policy.convolutions):
        outputs = blended_logits(policy, states, differences, bumps_y, bumps_x, perturbation.batch)
    else:
        outputs = _blended_outputs(policy, states, differences, bumps_y, bumps_x, perturbation.batch)
    return torch.einsum("yr,brca,xc->byxa", to_rows, outputs, to_columns)


def _blended_outputs(
    policy: Policy, states: Tensor, differences: Tensor, bumps_y: Tensor, bumps_x: Tensor, batch: int
) -> Tensor:
    """As ``blended_logits``, of any policy: each perturbed picture is made and goes through the whole network."""
    result = []
    bumps_y, bumps_x = bumps_y.to(states), bumps_x.to(states)
    for state, difference in zip(states, differences, strict=True):
        grid = []
        for index in torch.arange(len(bumps_y) * len(bumps_x)).split(batch):
            bump = bumps_y[index // len(bumps_x), :, None] * bumps_x[index % len(bumps_x), None, :]
            grid.append(policy(torch.addcmul(state[None], bump[:, None], difference[None]))[0])
        result.append(torch.cat(grid).view(len(bumps_y), len(bumps_x), -1))
    return torch.stack(result)


def gaussian_blur(states: Tensor, sigma: float) -> Tensor:
    """Blur with the borders mirrored at the picture's edge, float (B, C, H, W)."""
    blur_y, blur_x = (_blurring(n, sigma, states.dtype).to(states.device) for n in states.shape[2:])
    return blur_y @ (states @ blur_x.T)


@lru_cache(maxsize=16)
def _blurring(n: int, sigma: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is kept serves training too
        return torch.from_numpy(blur_matrix(n, sigma)).to(dtype)


def _centres(n: int, stride: int) -> np.ndarray:
    """Perturbed centres along an axis of n pixels, as even as the stride allows, pixels."""
    count = max(1, round(n / stride)) if stride > 1 else n
    return (np.arange(count) + 0.5) * n / count - 0.5


def _bumps(centres: np.ndarray, n: int, radius: float) -> Tensor:
    """exp(-(x - centre)^2 / (2 radius^2)): float64 (centres, n)."""
    offsets = np.arange(n)[None, :] - centres[:, None]
    return torch.from_numpy(np.exp(-(offsets**2) / (2 * radius**2)))


def _interpolation(centres: np.ndarray, n: int) -> Tensor:
    """Matrix (n, centres) from values at evenly spaced centres to all n pixels: Catmull-Rom, linear beyond the ends."""
    count = len(centres)
    if count == n or count == 1:
        return torch.eye(n, dtype=torch.float64) if count == n else torch.ones(n, 1, dtype=torch.float64)
    position = (np.arange(n) - centres[0]) / (centres[1] - centres[0])
    left = np.clip(np.floor(position).astype(int), 0, count - 2)
    t = position - left
    outside = (t < 0) | (t > 1)
    cubic = np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], axis=1) / 2
    linear = np.stack([0 * t, 1 - t, t, 0 * t], axis=1)
    kernel = np.where(outside[:, None], linear, cubic)
    matrix = np.zeros((n, count + 2))  # one ghost point before and after, extrapolated linearly
    for k in range(4):
        matrix[np.arange(n), left + k] += kernel[:, k]
    matrix[:, 1] += 2 * matrix[:, 0]
    matrix[:, 2] -= matrix[:, 0]
    matrix[:, -2] += 2 * matrix[:, -1]
    matrix[:, -3] -= matrix[:, -1]
    return torch.from_numpy(matrix[:, 1:-1])


@lru_cache(maxsize=32)
def blur_matrix(n: int, sigma: float) -> np.ndarray:
    """Gaussian blur of n pixels with mirrored borders as a matrix (n, n); the kernel ends at 4 sigma."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    matrix = np.zeros((n, n))
    for offset, value in zip(range(-reach, reach + 1), kernel / kernel.sum(), strict=True):
        source = (np.arange(n) + offset) % (2 * n)  # ... 1 0 | 0 1 ... n-1 | n-1 ...
        np.add.at(matrix, (np.arange(n), np.minimum(source, 2 * n - 1 - source)), value)
    return matrix
