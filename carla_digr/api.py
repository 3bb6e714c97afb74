"""The public functions `carla_digr.load_policy`, `decide` and `explain`: pictures in, decisions and maps out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from carla_digr import checkpoint
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.policy import Policy, device_of
from carla_digr.saliency import DEFAULT


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy and what its card says.

    Attributes:
        network: the torch module, states float (B, C, H, W) in [0, 1] -> outputs (B, K) and values (B,) or None.
        card: the checkpoint's card, see docs/policies.md.
    """

    network: Policy
    card: dict[str, Any]

    @property
    def action_names(self) -> tuple[str, ...]:
        """One name an action, in the order of the outputs."""
        return tuple(self.card["action_names"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """C, H, W of a state; several pictures lie one after the other along C."""
        return self.network.input_shape


class Decisions(NamedTuple):
    """What a policy decides for N frames.

    Attributes:
        actions: int64 (N,), indices of the most probable actions; -1 of a continuous policy.
        probabilities: float32 (N, A); (N, 0) of a continuous policy.
        values: float32 (N,), the critic's; NaN without a critic.
        outputs: float32 (N, K), the network's.
    """

    actions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    values: NDArray[np.float32]
    outputs: NDArray[np.float32]


def load_policy(name_or_path: str | os.PathLike[str], module: str | None = None, device: str = "cpu") -> LoadedPolicy:
    """Load a policy.

    Args:
        name_or_path: one that ships, such as "driving_student" (they lie in carla_digr/weights), or a .safetensors file
            with its card beside it, as the stages and ``carla-digr import`` write them.
        module: "package.module:factory", the code of its own that the card asks for, if it does and you trust it.
        device: where it is to compute, "cpu", "cuda" or "auto": on a GPU if there is one.

    Raises:
        carla_digr.errors.UserError: weights or card are missing or damaged, the network cannot be built, or there is no
            GPU where one is asked for.
    """
    network, card = checkpoint.load(name_or_path, module=module)
    network.to(device_of(device))
    return LoadedPolicy(network, card)


def decide(policy: LoadedPolicy | Policy, frames: ArrayLike, resize: bool = False) -> Decisions:
    """What a policy decides for consecutive frames.

    Args:
        policy: of `load_policy`, or any `carla_digr.policy.Policy`, such as a TorchPolicy around your module.
        frames: uint8 (N, H, W, C), RGB or, for a policy of grey pictures, with C = 1; or one frame (H, W, C). A policy
            that decides on several frames takes those before as a part of the state, at the beginning the first one
            repeated; or states whole, C being all their channels.
        resize: scale frames of another size than the policy's.

    Raises:
        carla_digr.errors.UserError: the frames are not of the policy's size or type.
    """
    explainer = _explainer(policy, resize=resize)
    decisions = [explainer.decide(frame) for frame in _frames(frames)]
    return Decisions(
        np.array([decision.action for decision in decisions], np.int64),
        np.stack([decision.probabilities for decision in decisions]),
        np.array([decision.value for decision in decisions], np.float32),
        np.stack([decision.outputs for decision in decisions]),
    )


def explain(
    policy: LoadedPolicy | Policy,
    frames: ArrayLike,
    method: str = DEFAULT,
    target: str | int | None = None,
    resize: bool = False,
) -> NDArray[np.float32]:
    """What the policy looks at in consecutive frames; frame by frame the maps of a live drive.

    Args:
        policy: as in `decide`.
        frames: as in `decide`.
        method: a key of `carla_digr.METHODS`.
        target: the action to explain, by name or index, or the dimension of a continuous one; None: what was decided.
        resize: scale frames of another size than the policy's.

    Returns:
        float32 (N, H, W) in [0, 1] of the policy's size, each map's largest value 1, or all 0 where nothing matters.

    Raises:
        carla_digr.errors.UserError: the frames do not fit the policy, or there is no such method or action.
    """
    explainer = _explainer(policy, method, target, resize)
    return np.stack([explainer.explain(explainer.decide(frame)).map for frame in _frames(frames)])


def _explainer(
    policy: LoadedPolicy | Policy, method: str = DEFAULT, target: str | int | None = None, resize: bool = False
) -> Explainer:
    if not isinstance(policy, LoadedPolicy):
        names = [f"action {number}" for number in range(policy.actions)]
        policy = LoadedPolicy(policy, {"action_names": names, "weights_sha256": ""})
    return Explainer(policy.network, policy.card, method, target, resize)


def _frames(frames: ArrayLike) -> NDArray[Any]:
    """Frames one by one, though there be one alone.

    Raises:
        UserError: there is none.
    """
    array = np.asarray(frames)
    if not len(array):
        raise UserError("There are no frames; give at least one.")
    return array[None] if array.ndim < 4 else array
