"""stable-baselines3's .zip: the policy's tensors, and what the JSON beside them says in plain text.

``data`` holds each attribute of the algorithm as JSON or as a base64 pickle with, next to it, the text of its first
level. The pickles are never loaded; the text is enough for the policies of the library.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carla_digr.errors import UserError
from carla_digr.importing import layers
from carla_digr.importing.found import Found
from carla_digr.importing.layers import Geometry, Layer, Weighted
from carla_digr.importing.options import ImportOptions
from carla_digr.importing.reading import Archive, load, tensors_of

# Class of torch -> name of carla_digr.networks.ACTIVATIONS
ACTIVATIONS = {
    "ReLU": "relu",
    "LeakyReLU": "leaky_relu",
    "Tanh": "tanh",
    "ELU": "elu",
    "CELU": "celu",
    "SELU": "selu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Mish": "mish",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Sigmoid": "sigmoid",
    "Identity": "identity",
}
LOG_STD_RANGE = (-20.0, 2.0)  # stable_baselines3.sac.policies
ELSEWHERE = "export its network with torch.onnx.export or torch.export.save (docs/policies.md shows how)"


def find(file: Path, archive: Archive, options: ImportOptions) -> Found:
    """The policy of a PPO, A2C, DQN, SAC, TD3 or DDPG.

    Raises:
        UserError: it is another algorithm, or a policy that the file does not describe.
    """
    data = archive.json("data")
    tensors = tensors_of(load(file, archive.read("policy.pth")), file)
    space, kwargs = _text(data, "observation_space"), _text(data, "policy_kwargs")
    policy = str(_text(data, "policy_class").get("__module__", "stable_baselines3"))
    if not policy.startswith(("stable_baselines3.", "sb3_contrib.")) and policy != "stable_baselines3":
        raise UserError(
            f"{file} has a policy class of its own, from {policy}, which the file does not describe; {ELSEWHERE}."
        )
    shape = space.get("_shape")
    picture = isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and 0 < n < 2**16 for n in shape)
    if not picture or "Dict" in str(space.get(":type:")):
        raise UserError(f"{file} observes no single picture (shape {shape}); only policies on pictures are explained.")
    if data.get("use_sde") is True:
        raise UserError(f"{file} explores by gSDE, whose deviations depend on hidden layers; {ELSEWHERE}.")
    if any("lstm" in name for name in tensors):
        raise UserError(f"{file} is recurrent (an LSTM); a map explains policies on pictures without memory only.")
    if any(name.startswith("quantile_net") for name in tensors):
        raise UserError(f"{file} is a QR-DQN, whose outputs are quantiles; {ELSEWHERE} with their mean as output.")
    assert isinstance(shape, list)
    channels, height, width = shape
    reader = _Reader(file, tensors, kwargs, options, (channels, height, width))
    value: list[Layer] | None = None
    if any(name.startswith("q_net.") for name in tensors):
        name, output = "DQN", "q_values"
        *shared, last = reader.chain("q_net.features_extractor", "q_net.q_net", "relu")
        outputs = [last]
    elif any(name.startswith("actor.") for name in tensors):
        name, output, (*shared, last) = reader.actor()
        outputs = [last]
    else:
        name, output = "actor-critic (PPO, A2C)", "gaussian" if "log_std" in tensors else "logits"
        shared, outputs, value = reader.actor_critic()
    reader.check_all_used()
    network, description = layers.network(shared, outputs, value)
    _check_actions(file, _text(data, "action_space"))
    scale = (1 / 255, "") if kwargs.get("normalize_images", True) is not False else (1.0, "")
    if space.get("dtype", "uint8") != "uint8":
        scale = (1 / 255, "pixels divided by 255")
    shape = (channels, height, width)
    found = layers.found(file, f"stable-baselines3 {name}", network, description, shape, output)
    found.scale = scale
    for item in reader.assumed:
        found.assume(*item)
    return found


def _text(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _check_actions(file: Path, space: dict[str, Any]) -> None:
    """Refuse an action space of several actions at once."""
    kind = str(space.get(":type:", "")).strip("<>'").split(".")[-1]
    if kind in ("MultiDiscrete", "MultiBinary", "Dict", "Tuple"):
        raise UserError(f"{file} takes several actions at once ({kind}), which is no one decision; {ELSEWHERE}.")


class _Reader:
    """Takes modules out of the policy's tensors, and knows in the end which nobody took."""

    def __init__(
        self,
        file: Path,
        tensors: dict[str, Tensor],
        kwargs: dict[str, Any],
        options: ImportOptions,
        shape: tuple[int, int, int],
    ):
        self.file, self.tensors, self.kwargs, self.options, self.shape = file, tensors, kwargs, options, shape
        self.used: set[str] = set()
        self.assumed: list[tuple[str, str]] = []

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a module, by their names in it."""
        found = {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }
        self.used |= {f"{prefix}.{name}" for name in found}
        return found

    def activation(self, default: str) -> str:
        """Between the layers of the MLP."""
        text = self.kwargs.get("activation_fn")
        if self.options.activation or text is None:
            return self.options.activation or default
        name = re.sub(r"^<class '|'>$", "", str(text))
        if not name.startswith("torch.nn.") or name.split(".")[-1] not in ACTIVATIONS:
            raise UserError(
                f"{self.file} has the activation {name}; give a known one with --activation, or {ELSEWHERE}."
            )
        return ACTIVATIONS[name.split(".")[-1]]

    def extractor(self, prefix: str) -> list[Layer]:
        """The features extractor: the library's Nature CNN, or one of the user's whose layers follow each other."""
        tensors = self.under(prefix)
        kind = re.sub(r"^<class '|'>$", "", str(self.kwargs.get("features_extractor_class", "NatureCNN")))
        if not tensors:
            return [layers.plain("flatten")]
        modules = layers.modules(tensors)
        unknown = [module.name for module in modules if not module.kind]
        nature = [module.name for module in modules] == ["cnn.0", "cnn.2", "cnn.4", "linear.0"]
        own = kind.startswith("stable_baselines3.") or kind == "NatureCNN"
        if unknown or (own and not nature):
            name = (unknown or [modules[0].name])[0]
            raise UserError(
                f"{self.file} has an extractor {kind} with {prefix}.{name}, which is not known; {ELSEWHERE}."
            )
        kernels = [tuple(module.tensors["weight"].shape[2:]) for module in modules if module.kind == "conv"]
        # What the options say of activation and convolutions is of the MLP and of a user's own extractor
        options = replace(self.options, activation=None, strides=None, paddings=None) if own else self.options
        geometry = Geometry.of(self.file, [kernel[0] for kernel in kernels], "relu", options)
        if not own:
            self._assume(f"{kind.split('.')[-1]}'s layers follow each other with ReLU between them", "--activation")
            if geometry.assumed:
                strides = ", ".join(map(str, geometry.strides))
                self._assume(f"its strides are {strides}, without padding", "--strides, --paddings")
        rows, columns = geometry.size_after(*self.shape[1:], kernels)  # type: ignore[arg-type]
        first = next((module for module in modules if module.kind == "linear"), None)
        channels = next((len(m.tensors["weight"]) for m in reversed(modules) if m.kind == "conv"), self.shape[0])
        if rows < 1 or (first is not None and first.tensors["weight"].shape[1] != rows * columns * channels):
            raise UserError(
                f"{self.file}: the strides {', '.join(map(str, geometry.strides))} do not fit the sizes of its "
                f"extractor {kind}; give --strides and --paddings, or {ELSEWHERE}."
            )
        items = layers.chain(modules, geometry, spatial=True, head=False)
        return items if first is not None else [*items, layers.plain("flatten")]

    def _assume(self, what: str, option: str) -> None:
        if (what, option) not in self.assumed:
            self.assumed.append((what, option))

    def mlp(self, prefix: str, activation: str, head: bool = False) -> list[Layer]:
        """Linear layers with an activation after each, but for a head's last."""
        result: list[Layer] = []
        for module in layers.modules(self.under(prefix)):
            result += [self._linear(module, prefix), layers.plain(activation)]
        return result[:-1] if head else result

    def linear(self, name: str) -> list[Layer]:
        """A linear layer, alone."""
        return [self._linear(Weighted(name, self.under(name)), "")]

    def _linear(self, module: Weighted, prefix: str) -> Layer:
        if module.kind != "linear":
            name = f"{prefix}.{module.name}".strip(".")
            raise UserError(f"{self.file} lacks a linear layer {name}; save the policy again, or {ELSEWHERE}.")
        return layers.linear(module.tensors)

    def chain(self, extractor: str, mlp: str, default: str) -> list[Layer]:
        """An extractor and the head behind it."""
        return [*self.extractor(extractor), *self.mlp(mlp, self.activation(default), head=True)]

    def actor_critic(self) -> tuple[list[Layer], list[Layer], list[Layer]]:
        """Layers shared, of the outputs and of the value."""
        activation = self.activation("tanh")
        sides = [
            self.mlp("mlp_extractor.policy_net", activation) + self.linear("action_net"),
            self.mlp("mlp_extractor.value_net", activation) + self.linear("value_net"),
        ]
        shared = self.mlp("mlp_extractor.shared_net", activation)  # before stable-baselines3 1.8
        if "log_std" in self.tensors:
            log_std = self.tensors["log_std"]
            self.used.add("log_std")
            sides[0].append(({"layer": "log_deviation", "size": log_std.numel()}, {"log_std": log_std.flatten()}))
        one = self.under("features_extractor")
        both = [self.under(f"{side}_features_extractor") for side in ("pi", "vf")]
        if not both[0] and not both[1]:
            return self.extractor("features_extractor") + shared, sides[0], sides[1]
        if both[0].keys() == both[1].keys() and all(torch.equal(both[0][k], both[1][k]) for k in both[0]):
            return self.extractor("pi_features_extractor") + shared, sides[0], sides[1]
        if one and shared:
            raise UserError(f"{self.file} shares hidden layers but not its extractor, which is not known; {ELSEWHERE}.")
        return (
            [],
            self.extractor("pi_features_extractor") + sides[0],
            self.extractor("vf_features_extractor") + sides[1],
        )

    def actor(self) -> tuple[str, str, list[Layer]]:
        """SAC's or TD3's actor: name of the algorithm, output, layers."""
        for prefix in ("critic", "critic_target", "actor_target"):
            self.under(prefix)
        extractor = self.extractor("actor.features_extractor")
        activation = self.activation("relu")
        if "actor.log_std.weight" in self.tensors:
            bounds = dict(zip(("minimum", "maximum"), LOG_STD_RANGE, strict=True))
            heads = layers.beside(
                self.linear("actor.mu"), [*self.linear("actor.log_std"), layers.plain("clamp", **bounds)]
            )
            return "SAC", "squashed_gaussian", [*extractor, *self.mlp("actor.latent_pi", activation), heads]
        mlp = self.mlp("actor.mu", activation, head=True)
        return "TD3 or DDPG", "deterministic", [*extractor, layers.plain("identity"), *mlp, layers.plain("tanh")]

    def check_all_used(self) -> None:
        """Refuse a policy with parts that nobody took."""
        known = ("q_net_target.", "features_extractor.", "log_std")
        left = [name for name in self.tensors if name not in self.used and not name.startswith(known)]
        if left:
            raise UserError(f"{self.file} has a part that is not known, {left[0]}; {ELSEWHERE}.")
