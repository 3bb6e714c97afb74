"""What each object of a state does to the teacher's decision, as a target for where the student's map lies.

The effect of an object is KL(pi(s) || pi(s')), s' being the same instant without it (tasks.objects). A map's share on
an object is its mass on the object's pixels; the loss compares the shares with the effects, object by object, so that
of the pixels that matter at all most of the map goes to those that matter most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.policy import Policy, to_input
from carla_digr.saliency.metrics import widened
from carla_digr.tasks.objects import SceneObject

LEAST_EFFECT = 0.02  # sum over a state's objects, nats: where nothing decides, shares of nothing are noise


@dataclass(frozen=True)
class ObjectEffects:
    """The objects of all states, one after the other.

    Attributes:
        states: int64 (T,), number of each object's state, ascending.
        masks: uint8 (T, H, ceil(W / 8)), the pixels that show it, packed by ``np.packbits``.
        effects: float32 (T,), KL(pi || pi') of the teacher.
    """

    states: Tensor
    masks: Tensor
    effects: Tensor

    def of(self, rows: Tensor) -> ObjectEffects:
        """Those of the states ``rows``, int64 (B,), whose numbers are from now on 0 to B - 1."""
        first, last = (torch.searchsorted(self.states, rows, right=right) for right in (False, True))
        counts = last - first
        states = torch.arange(len(rows)).repeat_interleave(counts)
        offsets = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        index = first.repeat_interleave(counts) + offsets
        return ObjectEffects(states, self.masks[index], self.effects[index])

    def totals(self, count: int) -> Tensor:
        """The sum of the effects in each of the ``count`` states: float32 (count,)."""
        return torch.zeros(count).index_add(0, self.states, self.effects)

    def widened(self, margin: int, width: int) -> ObjectEffects:
        """With masks that have everything within ``margin`` pixels too, of states ``width`` pixels wide."""
        masks = [
            np.packbits(widened(np.unpackbits(part.numpy(), axis=2, count=width).view(np.int8), margin), axis=2)
            for part in self.masks.split(256)
        ]
        return ObjectEffects(self.states, torch.from_numpy(np.concatenate(masks)), self.effects)


def outputs_without(policy: Policy, state: NDArray[np.uint8], objects: list[SceneObject]) -> Tensor:
    """The policy's outputs at a state (C, H, W) and without each of its objects: float64 (1 + K, outputs)."""
    pictures = torch.from_numpy(np.stack([state, *(item.without for item in objects)]))
    with torch.no_grad():
        return policy(to_input(pictures))[0].double()


class EffectsOfStates:
    """Collects ``ObjectEffects`` while states are collected."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.states: list[int] = []
        self.masks: list[NDArray[np.uint8]] = []
        self.effects: list[Tensor] = []
        self.seen = 0

    def look(self, env: Any, observations: NDArray[np.uint8]) -> None:
        """Note the objects of the present observations (N, C, H, W).

        Raises:
            UserError: the task has no notion of objects.
        """
        if not hasattr(env, "objects"):
            raise UserError("This task cannot take objects out of its world; set saliency_dataset.effects: false.")
        for state, objects in zip(observations, env.objects(), strict=True):
            outputs = outputs_without(self.policy, state, objects)
            self.effects.append(DISTRIBUTIONS[self.policy.output].divergence(outputs[:1], outputs[1:]).float())
            self.states += [self.seen] * len(objects)
            self.masks += [np.packbits(item.mask, axis=1) for item in objects]
            self.seen += 1

    def of_first(self, count: int) -> ObjectEffects:
        """Those of the first ``count`` states.

        Raises:
            UserError: there are none.
        """
        kept = sum(number < count for number in self.states)
        if not kept:
            raise UserError("No state has an object that could be taken out; set saliency_dataset.effects: false.")
        return ObjectEffects(
            torch.tensor(self.states[:kept], dtype=torch.int64),
            torch.from_numpy(np.stack(self.masks[:kept])),
            torch.cat(self.effects)[:kept],
        )


def target_shares(objects: ObjectEffects, count: int, width: int, power: float) -> tuple[Tensor, Tensor]:
    """What share of a map each object of ``count`` states should have, and on which pixels.

    Args:
        objects: numbered from 0 to count - 1; K at most in one state.
        width: of the states, pixels.
        power: shares are in proportion to the effects raised to it; above 1 the largest has more than its part.

    Returns:
        shares float (count, K + 1), the last for the pixels of no object, which is 0, or 1 where nothing has an effect;
        and what each pixel counts for each of them, float (count, K + 1, H, W), 1 in sum: a pixel of several objects
        counts for each in proportion to its share.
    """
    per_state = torch.bincount(objects.states, minlength=count)
    columns = torch.arange(len(objects.states)) - (per_state.cumsum(0) - per_state)[objects.states]
    most, height = int(per_state.max()), objects.masks.shape[1]
    shares = torch.zeros(count, most + 1)
    shares[objects.states, columns] = objects.effects.clamp(min=0) ** power
    total = shares.sum(dim=1, keepdim=True)
    shares = shares / total.clamp(min=1e-30)
    shares[:, -1] = (total[:, 0] <= 0).float()
    pixels = torch.zeros(count, most + 1, height, width)
    masks = torch.from_numpy(np.unpackbits(objects.masks.numpy(), axis=2, count=width)).float()
    pixels[objects.states, columns] = masks * (shares[objects.states, columns] + 1e-6)[:, None, None]
    covered = pixels.sum(dim=1)
    pixels[:, -1] = (covered == 0).float()
    return shares, pixels.div_(torch.where(covered == 0, torch.ones_like(covered), covered)[:, None])


def shares_on(maps: Tensor, pixels: Tensor) -> Tensor:
    """The shares of maps (B, H, W) on each object and on nothing: (B, K + 1), 1 in sum; see ``target_shares``."""
    mass = torch.bmm(pixels.flatten(2), maps.flatten(1)[:, :, None])[:, :, 0]
    return mass / mass.sum(dim=1, keepdim=True).clamp(min=1e-30)


def effects_loss(maps: Tensor, shares: Tensor, pixels: Tensor, floor: float) -> Tensor:
    """KL(shares || the map's shares), each of which counts for ``floor`` more than it is, by state: float (B,)."""
    found = shares_on(maps, pixels)
    return (shares * (shares.clamp(min=1e-30).log() - (found + floor).log())).sum(dim=1)
