"""Whether a map is about the policy: what its pixels do to the decision, and what is left of it without the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, Policy


def exchanged_logits(
    policy: Policy, states: Tensor, others: Tensor, maps: Tensor, shares: Sequence[float], batch: int = 128
) -> Tensor:
    """Logits while the pixels of ``states`` are replaced by those of ``others``, the most salient ones first.

    With a blurred copy for ``others`` this is the deletion of Petsiuk et al. 2018, and with the two swapped their
    insertion. The mean of the preferred action's probability over the shares is their score.

    Args:
        states, others: float (B, C, H, W).
        maps: float (B, H, W); of equal values the first pixel is the first.
        shares: of the pixels, in [0, 1].

    Returns:
        float (B, len(shares), A).
    """
    pixels = maps[0].numel()
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = (
        torch.empty_like(order)
        .scatter_(1, order, torch.arange(pixels, device=order.device).expand_as(order))
        .view(len(maps), 1, *maps.shape[1:])
    )
    with torch.no_grad():
        by_share = [
            torch.cat(
                [
                    policy(torch.where(r < round(share * pixels), o, s))[0]
                    for s, o, r in zip(states.split(batch), others.split(batch), rank.split(batch), strict=True)
                ]
            )
            for share in shares
        ]
    return torch.stack(by_share, dim=1)


def randomised(policy: Policy, seed: int) -> Iterator[tuple[str, Policy]]:
    """The policy with more and more of its layers drawn anew, from the last to the first (Adebayo et al. 2018).

    Yields:
        The name of the layer that was drawn last, and the policy. A layer gets the network's own initialisation, scaled
        to the norm that its trained weights had, so that the logits stay in a range in which maps have a gradient; its
        bias is 0.

    Raises:
        UserError: the policy does not show its layers.
    """
    broken: Any = copy.deepcopy(policy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(policy, ActorCritic):
            fresh = ActorCritic(policy.config, *policy.input_shape, actions=policy.actions)
            names = ["policy head", "trunk", *(f"convolution {k}" for k in range(len(policy.convolutions), 0, -1))]
            layers = [(p.policy_head, p.trunk, *reversed(p.convolutions)) for p in (broken, fresh)]
        else:
            found = _layers_drawn_anew(broken)
            names = list(found)
            layers = [tuple(pair[k] for pair in found.values()) for k in range(2)]
    for name, layer, drawn in zip(names, *layers, strict=True):
        with torch.no_grad():
            weight = drawn.weight.to(layer.weight.device)
            layer.weight.copy_(weight * (layer.weight.norm() / weight.norm()))
            if layer.bias is not None:
                layer.bias.zero_()
        yield name, copy.deepcopy(broken)


def _layers_drawn_anew(policy: Any) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By name, from the last to the first, the linear and convolutional layers and a fresh copy of each."""
    if policy.offers != "layers":
        raise UserError(f"The policy shows no layers, only its {policy.offers}: none of them can be drawn anew.")
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, layer in reversed(list(policy.network.named_modules())):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fresh = copy.deepcopy(layer)
            fresh.reset_parameters()
            pairs[name] = layer, fresh
    return pairs
