"""Frame in; decision, then saliency map of the same frame out. No ROS, no CARLA."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr import checkpoint
from carla_digr.attacks import ATTACKS
from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, Policy, device_of, device_under
from carla_digr.saliency import DEFAULT, METHODS
from carla_digr.saliency.compiled import CompiledNetwork
from carla_digr.saliency.gradient import map_weights, normalise_one, saliency_from_trace
from carla_digr.saliency.linear import BUMP_MASS, against_the_preferred, contrast_maps, linear_maps
from carla_digr.saliency.perturbation import Perturbation
from carla_digr.saliency.windows import Changes, changed_features, kernels

MANY = 8  # of so many pixels one that changes leaves little as it was
WARM_UPS = 3  # passes after which TorchScript has compiled a network, forward and backward


@dataclass(frozen=True)
class Decision:
    """What the policy decided for one frame.

    ``outputs`` is float32 (K,), what the network gave. Of a policy with discrete actions ``probabilities`` is float32
    (A,) and ``action`` the index of the largest; of a continuous one they are empty and -1. ``value`` is the critic's
    estimate, NaN where there is no critic; ``inference_ms`` the time from the picture to here. Values of a broken
    policy may be NaN: see ``finite``.
    """

    action: int
    probabilities: NDArray[np.float32]
    value: float
    inference_ms: float
    outputs: NDArray[np.float32] = field(repr=False, compare=False)
    state: Tensor = field(repr=False, compare=False)  # (1, C, H, W), what was decided on
    trace: list[Any] | None = field(repr=False, compare=False)  # an ActorCritic's hidden layers, for the map
    activated: list[Any] = field(repr=False, compare=False)  # its convolutions after the activation
    critic: bool = True  # whether there is a value

    @property
    def finite(self) -> bool:
        """Whether the policy's outputs are numbers."""
        value = math.isfinite(self.value) or not self.critic
        return value and bool(np.isfinite(self.outputs).all() and np.isfinite(self.probabilities).all())


@dataclass(frozen=True)
class Saliency:
    """The map of one frame: float32 (H, W) in [0, 1], largest value 1, all 0 if ``flat`` (no gradient)."""

    map: NDArray[np.float32]
    flat: bool
    saliency_ms: float


class Explainer:
    """A policy that explains itself, one frame at a time.

    The map is by default the linearised perturbation map (`saliency.linear`); `digr` is eq. 2 of the DIGR paper,
    abs(sum_a pi(a|s) d pi(a|s) / ds), the maximum over channels. Of an ActorCritic both are computed from what the
    decision's forward pass has left, and the decision is out before the map is begun. Other methods compute theirs from
    the state; most take longer than a frame lasts. A policy that decides on several frames gets those that were handed
    in before; see ``restart``. It computes where the policy's weights are, and hands out what lies in memory.

    Args:
        policy: the policy.
        card: its checkpoint's card; ``action_names``, ``weights_sha256`` and the perturbation that its dataset was made
            with are used.
        method: of the maps, a key of `carla_digr.saliency.METHODS`.
        target: the action, by name or index, or the dimension of a continuous one, that is explained; None: what was
            decided. It may be changed at any time.
        resize: scale pictures of another size than the policy's, by area, instead of refusing them.

    Raises:
        UserError: there is no such method or action, or the policy does not offer what the method needs.
    """

    def __init__(
        self,
        policy: Policy,
        card: dict[str, Any],
        method: str = DEFAULT,
        target: str | int | None = None,
        resize: bool = False,
    ):
        self._policy = policy
        self._device = device_under(policy)
        self.method = method
        self._perturbation = Perturbation.from_settings(card.get("config", {}).get("saliency_dataset", {}))
        self.card = card
        self.action_names: tuple[str, ...] = tuple(card["action_names"])
        self.policy_hash = checkpoint.policy_hash(card)
        channels, height, width = policy.input_shape
        self.image_shape = (height, width, channels // policy.recipe.stack)
        self.target = target
        self.resize = resize
        policy.eval()
        self._distribution = DISTRIBUTIONS[policy.output]
        self._actor_critic = policy if isinstance(policy, ActorCritic) else None
        self._compiled: CompiledNetwork | None = None
        if self._actor_critic is not None and self._device.type == "cpu":
            self._compiled, self._kernels = CompiledNetwork(self._actor_critic), kernels(self._actor_critic)
        self.single = policy.recipe.stack == 1
        self._pictures: deque[NDArray[np.uint8]] = deque(maxlen=policy.recipe.stack)
        self._generator = torch.Generator().manual_seed(0)  # of PGD's random starts

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        task: str | None = "driving",
        method: str = DEFAULT,
        target: str | int | None = None,
        resize: bool = False,
        module: str | None = None,
        device: str = "cpu",
    ) -> Explainer:
        """Load a policy and run it, so that the first frame is as fast as the others.

        Args:
            path: its weights.
            task: what it must be for; a card that names no task is of any. None: any.
            method, target, resize: of the explainer.
            module: see `checkpoint.load`.
            device: see `policy.device_of`. One frame at a time is fastest on the processor, with most networks.

        Raises:
            UserError: weights or card are missing, damaged or of another task, there is no such method or action, or no
                GPU where one is asked for.
        """
        policy, card = checkpoint.load(path, task, module)
        policy.to(device_of(device))
        explainer = cls(policy, card, method, target, resize)
        for _ in range(1 if isinstance(policy, ActorCritic) else WARM_UPS):
            explainer.explain(explainer.decide(np.zeros(explainer.image_shape, np.uint8)))
        explainer.restart()
        return explainer

    @property
    def method(self) -> str:
        """Of the maps, a key of `carla_digr.saliency.METHODS`; it may be changed at any time."""
        return self._method_name

    @method.setter
    def method(self, name: str) -> None:
        method = METHODS.find(name)
        method.check(self._policy)
        self._method_name, self._method = name, method

    @property
    def target(self) -> int | None:
        """Index of the action or dimension that is explained, None: the decision."""
        return self._target

    @target.setter
    def target(self, target: str | int | None) -> None:
        self._target = None if target is None else action_index(target, self.action_names)

    @property
    def target_name(self) -> str:
        """Its name; empty where the decision is explained."""
        return "" if self._target is None else self.action_names[self._target]

    @property
    def discrete(self) -> bool:
        """Whether the policy chooses between actions."""
        return self._distribution.discrete

    def restart(self) -> None:
        """Forget the frames before: the next one begins an episode, in which it stands for those that are missing."""
        self._pictures.clear()

    def decide(self, rgb: NDArray[np.uint8]) -> Decision:
        """The policy's most probable action for a frame.

        Args:
            rgb: uint8 (H, W, 3) RGB of the policy's size, or of any with ``resize``; for grey policies also (H, W) or
                (H, W, 1); or, of a policy that decides on several pictures, a whole state (H, W, C).

        Raises:
            UserError: the picture has another shape or type.
            RuntimeError: the policy has not one output for each action.
        """
        start = time.perf_counter()
        with torch.inference_mode():
            state = self._state(rgb)
            value: Tensor | np.float32 | None
            hidden: list[Any] | None = None
            activated: list[Any] = []
            if self._compiled is not None:
                logits, values, hidden, activated = self._compiled.decide(state.numpy())
                outputs, value = torch.from_numpy(logits), values[0]
            elif self._actor_critic is not None:
                outputs, value, hidden = self._actor_critic.trace(state, activated)
            else:
                outputs, value = self._policy(state)
            outputs = outputs.cpu()
            discrete = self._distribution.discrete
            probabilities = outputs.softmax(dim=1)[0].numpy() if discrete else np.zeros(0, np.float32)
        if outputs.shape != (1, self._distribution.outputs(len(self.action_names))):
            raise RuntimeError(f"output of shape {tuple(outputs.shape)} for {len(self.action_names)} actions")
        return Decision(
            action=int(probabilities.argmax()) if discrete else -1,
            probabilities=probabilities,
            value=math.nan if value is None else float(value),
            inference_ms=(time.perf_counter() - start) * 1000.0,
            outputs=outputs[0].numpy(),
            state=state,
            trace=hidden,
            activated=activated,
            critic=value is not None,
        )

    def attacked(self, rgb: NDArray[np.uint8], attack: str, epsilon: float) -> NDArray[np.uint8]:
        """The frame as an attacker would show it to the policy: uint8 (H, W, 3), rounded towards the true picture.

        Args:
            rgb: uint8 (H, W, 3) of the policy's size.
            attack: one of `carla_digr.attacks.ATTACKS`, small letters or capitals.
            epsilon: largest change of a channel of a pixel, 1 being the whole range.

        Raises:
            UserError: the picture has another shape or type, or the policy does not decide on one RGB picture.
        """
        if not self.single or self._policy.recipe.colour != "rgb":
            raise UserError("Attacks while driving change one RGB picture, and this policy decides on others.")
        rgb = self.fitted(rgb)
        state = self._state(rgb)
        changed = ATTACKS[attack.upper()](self._policy, state, epsilon, self._generator)
        change = (changed - state)[0].cpu()
        levels = torch.trunc(change * 255.0 + 1e-3 * change.sign()).permute(1, 2, 0).numpy()
        return (rgb + levels).clip(0, 255).astype(np.uint8)

    def fitted(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture in the policy's size, which its map is laid over: scaled if that was asked for."""
        height, width, _ = self.image_shape
        if not self.resize or rgb.shape[:2] == (height, width):
            return rgb
        return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)

    def explain(self, decision: Decision) -> Saliency:
        """The map of a decision's frame."""
        start = time.perf_counter()
        raw = self._raw_map(decision)
        normalised, flat = normalise_one(raw[0].cpu().numpy())
        return Saliency(
            map=normalised,
            flat=flat,
            saliency_ms=(time.perf_counter() - start) * 1000.0,
        )

    def _raw_map(self, decision: Decision) -> Tensor:
        """The map before it is normalised, float32 (1, H, W)."""
        gradient = self.method in ("digr", "vg")
        if self._actor_critic is None or not (gradient or self.method == "linear"):
            return self._method(self._policy, decision.state.clone(), self._target, self._perturbation)
        with torch.inference_mode():
            outputs = torch.from_numpy(decision.outputs)[None].to(self._device)
            if self._compiled is None:
                if gradient:
                    return saliency_from_trace(self._actor_critic, outputs, decision.trace or [], self._target)
                return linear_maps(self._actor_critic, decision.state, self._target, outputs=outputs)
            if gradient:
                weights = map_weights(outputs, self._target).numpy()
                return torch.from_numpy(self._compiled.gradient_map(weights, decision.trace or []))
            if self._target is not None:
                return linear_maps(self._actor_critic, decision.state, self._target, outputs=outputs)
            others, rows = against_the_preferred(outputs)
            contrast = self._compiled.contrast(decision.state.numpy(), (BUMP_MASS * rows[0]).numpy())
            return contrast_maps(outputs, others, torch.from_numpy(contrast)[None])

    def instead(
        self, decision: Decision, states: Tensor | Changes, count: int = 0
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What would be decided on other states, in one forward pass.

        Args:
            decision: what was decided.
            states: float32 (B, C, H, W) in [0, 1]; or in which pixels they differ from the decision's: where those are
                few, an ActorCritic computes only what they change.
            count: B, of changes.

        Returns:
            divergence: float32 (B,), of the decision from those on ``states``, nats; of the explained action alone if
                there is a target
            actions: (B,), the most probable ones; -1 of a continuous policy.
        """
        with torch.inference_mode():
            if isinstance(states, Changes):
                outputs = self._outputs_changed(decision, states, count)
            elif self._compiled is not None:
                outputs = torch.from_numpy(self._compiled.outputs(states.numpy()))
            else:
                outputs = self._policy(states.to(self._device))[0].cpu()
            decided = torch.from_numpy(decision.outputs)[None]
            divergence = self._distribution.divergence(decided, outputs, self._target)
        actions = outputs.argmax(dim=1) if self.discrete else torch.full((len(outputs),), -1)
        return divergence.numpy(), actions.numpy()

    def _outputs_changed(self, decision: Decision, changes: Changes, count: int) -> Tensor:
        few = len(changes.row) * MANY < count * decision.state[0, 0].numel()
        if few and decision.activated and self._actor_critic is not None:
            policy = self._actor_critic
            if self._compiled is None:
                features = changed_features(policy, decision.state, decision.activated, changes, count)
                return policy.policy_head(policy.activation(policy.trunk(features))).cpu()
            activated = [torch.from_numpy(layer) for layer in decision.activated]
            features = changed_features(policy, decision.state, activated, changes, count, self._kernels)
            return torch.from_numpy(self._compiled.logits(features.numpy()))
        states = changes.made(decision.state[0].cpu().numpy(), count)
        if self._compiled is not None:
            return torch.from_numpy(self._compiled.outputs(states))
        return self._policy(torch.from_numpy(states).to(self._device))[0].cpu()

    def _state(self, rgb: NDArray[np.uint8]) -> Tensor:
        recipe = self._policy.recipe
        if self._is_whole(rgb):
            return self._input(rgb.transpose(2, 0, 1))
        picture = recipe.picture(rgb, self.image_shape[:2], self.resize)
        if self.single:
            return self._input(picture)
        self._pictures.extend([picture] * (1 if self._pictures else recipe.stack))
        return self._input(np.concatenate(self._pictures))

    def _input(self, state: NDArray[np.uint8]) -> Tensor:
        # As `policy.to_input`, in one pass over the picture.
        scaled = np.divide(state[None], np.float32(255.0), dtype=np.float32, order="C")
        return torch.from_numpy(scaled).to(self._device)

    def _is_whole(self, frame: NDArray[np.uint8]) -> bool:
        """Whether it is a whole state of several pictures, (H, W, C); three channels are one RGB picture."""
        channels, *size = self._policy.input_shape
        whole = not self.single and channels != 3 and frame.shape == (*size, channels)
        return whole and frame.dtype == np.uint8


def action_index(action: str | int, names: tuple[str, ...]) -> int:
    """The index of an action given by its name or index.

    Raises:
        UserError: there is no such action.
    """
    text = str(action)
    index = names.index(text) if text in names else int(text) if text.isdecimal() else -1
    if not 0 <= index < len(names):
        raise UserError(f"There is no action '{action}' to explain; choose one of {', '.join(names)}.")
    return index
