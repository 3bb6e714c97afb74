"""Whether a map is about the policy: what its pixels do to the decision, and what is left of it without the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from carla_digr.policy import ActorCritic


def exchanged_logits(
    policy: ActorCritic, states: Tensor, others: Tensor, maps: Tensor, shares: Sequence[float], batch: int = 128
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
        .scatter_(1, order, torch.arange(pixels).expand_as(order))
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


def randomised(policy: ActorCritic, seed: int) -> Iterator[tuple[str, ActorCritic]]:
    """The policy with more and more of its layers drawn anew, from the last to the first (Adebayo et al. 2018).

    Yields:
        The name of the layer that was drawn last, and the policy. A layer gets the network's own initialisation, scaled
        to the norm that its trained weights had, so that the logits stay in a range in which maps have a gradient.
    """
    broken = copy.deepcopy(policy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ActorCritic(policy.config, *policy.input_shape, actions=policy.actions)
    names = ["policy head", "trunk", *(f"convolution {k}" for k in range(len(policy.convolutions), 0, -1))]
    layers = [(p.policy_head, p.trunk, *reversed(p.convolutions)) for p in (broken, fresh)]
    for name, layer, drawn in zip(names, *layers, strict=True):
        with torch.no_grad():
            layer.weight.copy_(drawn.weight * (layer.weight.norm() / drawn.weight.norm()))
            layer.bias.zero_()
        yield name, copy.deepcopy(broken)
