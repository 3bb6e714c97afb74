"""Gradient saliency: the paper's eq. 2, written as forward operations.

The input gradient of an ActorCritic is computed layer by layer instead of by autograd. Without gradients enabled that
is the fastest way to a map; with them, DIGR's double backward becomes one ordinary backward through these operations.
Other policies' gradients are autograd's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from carla_digr.distributions import DISTRIBUTIONS, combined, eq2_weights
from carla_digr.policy import ActorCritic, Policy

# A map whose largest value is at or below this counts as having no gradient: float32 holds values down to 1e-38, so
# above it the map still has all its digits, however confident the policy is.
FLAT = 1e-30


def vanilla_gradient(policy: Policy, states: Tensor, target: int | None = None) -> Tensor:
    """Raw saliency by eq. 2, the maximum over channels of abs(sum_a pi_a d pi_a / d s).

    Args:
        policy: the policy to explain. Of a continuous one the map is sqrt(sum_k G_k (d output_k / d s)^2), G the Fisher
            metric: the square root of twice the divergence's second order, pixel by pixel.
        states: float (B, C, H, W) in [0, 1].
        target: explain this action's log-odds, or this dimension's mean, instead.

    Returns:
        float (B, H, W), not normalised; see ``normalise``.
    """
    if isinstance(policy, ActorCritic):
        with torch.no_grad():
            logits, _, hidden = policy.trace(states)
            return saliency_from_trace(policy, logits, hidden, target)
    distribution = DISTRIBUTIONS[policy.output]
    leaf = states.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = policy(leaf)[0]
    rows = distribution.gradients(outputs.detach(), target).unbind(dim=1)
    gradients = [torch.autograd.grad(outputs, leaf, row, retain_graph=True)[0] for row in rows]
    importance = distribution.importance(outputs.detach(), target)
    return combined(importance, torch.stack(gradients, dim=1)).amax(dim=1)


def saliency_from_trace(policy: ActorCritic, logits: Tensor, hidden: list[Tensor], target: int | None = None) -> Tensor:
    """``vanilla_gradient`` where ``policy.trace`` has been called already."""
    return input_gradient(policy, hidden, map_weights(logits, target)).abs().amax(dim=1)


def map_weights(logits: Tensor, target: int | None = None) -> Tensor:
    """What each logit's gradient counts in eq. 2's map, or in an action's own, float (B, A)."""
    return eq2_weights(logits) if target is None else DISTRIBUTIONS["logits"].gradients(logits, target)[:, 0]


def weighted_gradient(policy: Policy, states: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """sum_k w_k d output_k / d s with w = weights(outputs), which count as constants.

    Args:
        policy: the policy; an ActorCritic's gradient is the closed form, any other's autograd's.
        states: float (B, C, H, W) in [0, 1].
        weights: outputs float (B, K) -> what each one's gradient counts, float (B, K).

    Returns:
        float (B, C, H, W).
    """
    if isinstance(policy, ActorCritic):
        with torch.no_grad():
            logits, _, hidden = policy.trace(states)
            return input_gradient(policy, hidden, weights(logits))
    leaf = states.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = policy(leaf)[0]
    return torch.autograd.grad(outputs, leaf, weights(outputs.detach()))[0]


def normalise(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Each map divided by its maximum.

    Args:
        maps: float (B, H, W), not negative.

    Returns:
        maps in [0, 1], float (B, H, W), and flags, bool (B,): True where a map had no gradient (or one that is not
        finite); such a map is all zero instead of amplified noise.
    """
    largest = maps.amax(dim=(1, 2))
    flat = ~((largest > FLAT) & torch.isfinite(largest))
    scale = torch.where(flat, torch.ones_like(largest), largest)[:, None, None]
    found = maps / scale
    if flat.any():
        found[flat] = 0.0
    return found, flat


def normalise_one(saliency: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """``normalise`` of one map (H, W) in memory, in a tenth of the time."""
    largest = saliency.max()
    if FLAT < largest < math.inf:
        return saliency / largest, False
    return np.zeros_like(saliency), True


def log_probability_weights(logits: Tensor) -> Tensor:
    """The weights of the logits' gradients in d(-log pi(a*)) / d s, a* the most probable action: pi - onehot(a*)."""
    return balanced(logits.softmax(dim=1), F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype))


def balanced(weights: Tensor, action: Tensor) -> Tensor:
    """Weights of the logits (B, A) that sum to 0: the action's is the negative sum of the others'.

    Computed by itself it would be a difference of numbers near 1, without digits where the policy is confident.

    Args:
        weights: float (B, A); the action's own is not used.
        action: float (B, A), one-hot rows.
    """
    others = weights * (1 - action)
    return others - action * others.sum(dim=1, keepdim=True)


def input_gradient(policy: ActorCritic, hidden: list[Tensor], weights: Tensor) -> Tensor:
    """sum_b weights_b d logit_b / d s.

    Args:
        policy: the network.
        hidden: from ``policy.trace`` of the states.
        weights: float (B, A), what each logit's gradient counts; or (B, R, A) for R gradients of each state.

    Returns:
        float (B, C, H, W) or (B, R, C, H, W), differentiable in the network's parameters when gradients are enabled.
    """
    g = _first_gradient(policy, hidden, weights)
    g = _transposed(g, cast(nn.Conv2d, policy.convolutions[0]), policy.input_shape[1:])
    return g.view(*weights.shape[:-1], *g.shape[1:])


def input_contrast(policy: ActorCritic, hidden: list[Tensor], weights: Tensor, delta: Tensor) -> Tensor:
    """The sum over the channels of ``input_gradient`` times a change of the states.

    Args:
        policy, hidden: as there.
        weights: float (B, R, A).
        delta: float (B, C, H, W).

    Returns:
        float (B, R, H, W).
    """
    layer, (height, width) = cast(nn.Conv2d, policy.convolutions[0]), policy.input_shape[1:]
    in_channels, kernel = layer.weight.shape[1:3]
    stride = layer.stride[0]
    if kernel != 2 * stride or height % stride or width % stride:
        return (input_gradient(policy, hidden, weights) * delta[:, None]).sum(dim=2)
    g = _first_gradient(policy, hidden, weights).contiguous(memory_format=torch.channels_last)
    blocks = F.conv2d(g, of_blocks(layer), padding=1).permute(0, 2, 3, 1)
    rows, columns = height // stride, width // stride
    own = delta.view(-1, 1, in_channels, rows, stride, columns, stride).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    channels = (blocks.reshape(*weights.shape[:2], rows, columns, -1) * own).chunk(in_channels, dim=4)
    found = functools.reduce(torch.add, channels).view(*weights.shape[:2], rows, columns, stride, stride)
    return found.permute(0, 1, 2, 4, 3, 5).reshape(*weights.shape[:2], height, width)


def _first_gradient(policy: ActorCritic, hidden: list[Tensor], weights: Tensor) -> Tensor:
    """The gradient in what the first convolution gives: (B R, channels, rows, columns)."""
    *convolved, trunk = hidden
    rows = weights if weights.dim() == 3 else weights[:, None]
    g = (rows @ policy.policy_head.weight) * policy.activation_derivative(trunk)[:, None]
    g = g @ policy.trunk.weight
    for layer, before, below in zip(
        reversed(policy.convolutions), reversed(convolved), [*reversed(convolved[:-1]), None], strict=True
    ):
        g = g.view(*rows.shape[:2], *before.shape[1:]) * policy.activation_derivative(before)[:, None]
        g = g.flatten(0, 1)
        if below is not None:
            g = _transposed(g, layer, below.shape[2:])  # type: ignore[arg-type]
    return g


def _transposed(g: Tensor, layer: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """The transpose of a convolution without padding, applied to the gradient of its output.

    Where the kernel is the stride or twice the stride, each output block of stride x stride pixels sees 1 or 2x2
    positions, so it is a matrix product or a 2x2 convolution to blocks followed by a shuffle: several times faster than
    ``conv_transpose2d`` on a CPU.
    """
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    rest = (size[0] - kernel) % stride, (size[1] - kernel) % stride  # last pixels that no kernel reached
    out_channels, in_channels = layer.weight.shape[:2]
    batch, _, rows, columns = g.shape
    if kernel == stride:
        blocks = g.permute(0, 2, 3, 1).reshape(-1, out_channels) @ layer.weight.view(out_channels, -1)
        blocks = blocks.view(batch, rows, columns, in_channels, stride, stride).permute(0, 3, 1, 4, 2, 5)
        shuffled = blocks.reshape(batch, in_channels, rows * stride, columns * stride)
    elif kernel == 2 * stride:
        shuffled = F.pixel_shuffle(F.conv2d(g, of_blocks(layer), padding=1), stride)
    else:
        return F.conv_transpose2d(g, layer.weight, stride=stride, output_padding=rest)
    return F.pad(shuffled, (0, rest[1], 0, rest[0])) if any(rest) else shuffled


def of_blocks(layer: nn.Conv2d) -> Tensor:
    """The weights of the 2x2 convolution to blocks, float (in_channels stride^2, out_channels, 2, 2)."""
    out_channels, in_channels = layer.weight.shape[:2]
    stride = layer.stride[0]
    order = _block_order(out_channels, in_channels, stride)
    return layer.weight.flatten()[order].view(in_channels * stride**2, out_channels, 2, 2)


@functools.cache
def _block_order(out_channels: int, in_channels: int, stride: int) -> Tensor:
    """Where the weights of the 2x2 convolution to blocks stand among those of the convolution, flat int64."""
    with torch.inference_mode(False):  # what is kept serves training too
        places = torch.arange(out_channels * in_channels * (2 * stride) ** 2)
        places = places.view(out_channels, in_channels, 2, stride, 2, stride).flip(2, 4)
        return places.permute(1, 3, 5, 0, 2, 4).flatten()
