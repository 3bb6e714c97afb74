"""Frame in; decision, then saliency map of the same frame out. No ROS, no CARLA."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr import checkpoint
from carla_digr.attacks import fgsm, pgd
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, to_input
from carla_digr.saliency import METHODS
from carla_digr.saliency.gradient import normalise, saliency_from_trace
from carla_digr.saliency.methods import raw_maps
from carla_digr.saliency.perturbation import Perturbation

ATTACKS = {"fgsm": fgsm, "pgd": pgd}
"""What a picture can be attacked with while driving."""


@dataclass(frozen=True)
class Decision:
    """What the policy decided for one frame.

    ``probabilities`` is float32 (A,), ``action`` the index of the largest; ``value`` the critic's estimate;
    ``inference_ms`` the time from the picture to here. Values of a broken policy may be NaN: see ``finite``.
    """

    action: int
    probabilities: NDArray[np.float32]
    value: float
    inference_ms: float
    state: Tensor = field(repr=False, compare=False)  # (1, C, H, W), what was decided on
    trace: tuple[Tensor, list[Tensor]] = field(repr=False, compare=False)  # logits and hidden layers, for the map

    @property
    def finite(self) -> bool:
        """Whether the policy's outputs are numbers."""
        return bool(np.isfinite(self.probabilities).all()) and math.isfinite(self.value)


@dataclass(frozen=True)
class Saliency:
    """The map of one frame: float32 (H, W) in [0, 1], largest value 1, all 0 if ``flat`` (no gradient)."""

    map: NDArray[np.float32]
    flat: bool
    saliency_ms: float


class Explainer:
    """A policy that explains itself, one frame at a time.

    The map is eq. 2 of the DIGR paper, abs(sum_a pi(a|s) d pi(a|s) / ds), the maximum over channels, normalised. It is
    computed from what the decision's forward pass has left, so nothing is computed twice, and the decision is out
    before the map is begun. Other methods compute theirs from the picture; most take longer than a frame lasts.

    Args:
        policy: actor-critic for three channels.
        card: its checkpoint's card; ``action_names``, ``weights_sha256`` and the perturbation that its dataset was made
            with are used.
        method: of the maps, a key of `carla_digr.saliency.METHODS`.

    Raises:
        UserError: there is no such method.
    """

    def __init__(self, policy: ActorCritic, card: dict[str, Any], method: str = "digr"):
        if method not in METHODS:
            raise UserError(f"There is no saliency method '{method}'; choose one of {', '.join(METHODS)}.")
        self.method = method
        settings = card.get("config", {}).get("saliency_dataset", {})
        self._perturbation = Perturbation(
            radius=settings.get("radius", 5.0),
            blur_sigma=settings.get("blur_sigma", 3.0),
            stride=settings.get("stride", 4),
        )
        self.action_names: tuple[str, ...] = tuple(card["action_names"])
        self.policy_hash = checkpoint.policy_hash(card)
        channels, height, width = policy.input_shape
        self.image_shape = (height, width, channels)
        self._policy = policy.eval()
        self._generator = torch.Generator().manual_seed(0)  # of PGD's random starts

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], task: str = "driving", method: str = "digr") -> Explainer:
        """Load a policy and run it once, so that the first frame is as fast as the others.

        Raises:
            UserError: weights or card are missing, damaged or of another task, or there is no such method.
        """
        explainer = cls(*checkpoint.load(path, task), method)
        explainer.explain(explainer.decide(np.zeros(explainer.image_shape, np.uint8)))
        return explainer

    def decide(self, rgb: NDArray[np.uint8]) -> Decision:
        """The policy's most probable action for a frame.

        Args:
            rgb: uint8 (H, W, 3) of the policy's size.

        Raises:
            UserError: the picture has another shape or type.
            RuntimeError: the policy has not one output for each action.
        """
        start = time.perf_counter()
        with torch.inference_mode():
            state = self._state(rgb)
            logits, value, hidden = self._policy.trace(state)
            probabilities = logits.softmax(dim=1)[0].numpy()
        if probabilities.shape != (len(self.action_names),):
            raise RuntimeError(f"output of shape {tuple(logits.shape)} for {len(self.action_names)} actions")
        return Decision(
            action=int(probabilities.argmax()),
            probabilities=probabilities,
            value=float(value),
            inference_ms=(time.perf_counter() - start) * 1000.0,
            state=state,
            trace=(logits, hidden),
        )

    def attacked(self, rgb: NDArray[np.uint8], attack: str, epsilon: float) -> NDArray[np.uint8]:
        """The frame as an attacker would show it to the policy: uint8 (H, W, 3), rounded towards the true picture.

        Args:
            rgb: uint8 (H, W, 3) of the policy's size.
            attack: one of ATTACKS.
            epsilon: largest change of a channel of a pixel, 1 being the whole range.

        Raises:
            UserError: the picture has another shape or type.
        """
        with torch.inference_mode():
            state = self._state(rgb)
            change = ATTACKS[attack](self._policy, state, epsilon, self._generator) - state
            levels = torch.trunc(change[0] * 255.0 + 1e-3 * change[0].sign()).permute(1, 2, 0).numpy()
        return (rgb + levels).clip(0, 255).astype(np.uint8)

    def _state(self, rgb: NDArray[np.uint8]) -> Tensor:
        if rgb.shape != self.image_shape or rgb.dtype != np.uint8:
            expected = " x ".join(map(str, self.image_shape))
            got = " x ".join(map(str, rgb.shape))
            raise UserError(
                f"The policy needs a uint8 picture of {expected} (height x width x channels) but got {rgb.dtype} "
                f"{got}: set the camera to the policy's size."
            )
        return to_input(torch.from_numpy(rgb.transpose(2, 0, 1)[None].copy()))

    def explain(self, decision: Decision) -> Saliency:
        """The map of a decision's frame."""
        start = time.perf_counter()
        if self.method in ("digr", "vg"):
            with torch.inference_mode():
                raw = saliency_from_trace(self._policy, *decision.trace)
        else:
            raw = raw_maps(self.method, self._policy, decision.state.clone(), self._perturbation)
        maps, flat = normalise(raw)
        return Saliency(
            map=maps[0].numpy(),
            flat=bool(flat[0]),
            saliency_ms=(time.perf_counter() - start) * 1000.0,
        )
