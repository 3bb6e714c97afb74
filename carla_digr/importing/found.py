"""What a file was found to hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carla_digr.config import PolicyConfig
from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, InputRecipe

COMMON_SIZES = (84, 64, 96, 128, 72, 160, 224)  # of states in the literature, square; the first that fits is assumed

STATE_NUMBERS = 1 << 24  # of the largest state that is tried


@dataclass
class Found:
    """A network of another library, and what its file says of it.

    Attributes:
        format: what the file is, in words.
        network: the module, ready to run.
        description: what a card says of it, for `carla_digr.networks`.
        input_shape: C, H, W of a state.
        outputs: K, how many outputs the network gives.
        output: what they mean, as the file says or as is assumed.
        layout: order of the axes of the network's input.
        scale: what pixels are multiplied with, and how that was assumed, "" where the file says it.
        structure: the layers in words.
        archive: what goes beside the card.
        assumed: what the file does not say, with the option that says it.
        notes: sentences on what else the user should know.
    """

    format: str
    network: nn.Module
    description: dict[str, Any]
    input_shape: tuple[int, int, int]
    outputs: int
    output: str
    layout: Any = "chw"
    scale: tuple[float, str] = (1 / 255, "pixels divided by 255")
    structure: str = ""
    archive: bytes | None = None
    assumed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's state dict."""
        return self.network.state_dict()

    def assume(self, what: str, option: str) -> None:
        """Note what the file does not say."""
        self.assumed.append((what, option))

    def actions(self, output: str) -> int:
        """How many actions, or dimensions of an action, the outputs stand for.

        Raises:
            UserError: such outputs cannot be theirs.
        """
        each = DISTRIBUTIONS[output].outputs(1)
        if self.outputs % each:
            raise UserError(
                f"The network gives {self.outputs} outputs, which are no means and log standard deviations of a "
                f"{output.replace('_', ' ')} action; give another --output."
            )
        return self.outputs // each

    def actor_critic(self, actions: int, output: str, recipe: InputRecipe) -> ActorCritic | None:
        """The network as an `ActorCritic`, weight by weight, None where it is another one."""
        if self.description["kind"] != "layers" or self.description["value"] is None:
            return None
        shared, heads = self.description["shared"], [self.description["outputs"], self.description["value"]]
        kinds = [layer["layer"] for layer in shared]
        count = kinds.count("conv")
        if not count or kinds != ["conv", "relu"] * count + ["flatten", "linear", "relu"]:
            return None
        if any([layer["layer"] for layer in head] != ["linear"] for head in heads):
            return None
        convolutions = [layer for layer in shared if layer["layer"] == "conv"]
        plain = {"padding": [0, 0], "groups": 1, "dilation": [1, 1], "bias": True}
        square = all(len(set(layer[key])) == 1 for layer in convolutions for key in ("kernel_size", "stride"))
        if not square or any(layer[key] != value for layer in convolutions for key, value in plain.items()):
            return None
        if not all(layer["bias"] for layer in (shared[-2], *heads[0], *heads[1])):
            return None
        config = PolicyConfig(
            convolutions=tuple((c["out_channels"], c["kernel_size"][0], c["stride"][0]) for c in convolutions),
            features=shared[-2]["out_features"],
            activation="relu",
        )
        ours = ActorCritic(config, *self.input_shape, actions=actions, output=output, recipe=recipe)
        weights = self.weights
        names = {f"convolutions.{index}": f"shared.{2 * index}" for index in range(count)}
        names |= {"trunk": f"shared.{2 * count + 1}", "policy_head": "outputs.0", "value_head": "value.0"}
        try:
            ours.load_state_dict(
                {f"{a}.{kind}": weights[f"{b}.{kind}"].float() for a, b in names.items() for kind in ("weight", "bias")}
            )
        except RuntimeError:  # a critic of several values
            return None
        return ours


def sized(file: Path, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape of a state.

    Raises:
        UserError: no picture has so many numbers.
    """
    if math.prod(shape) > STATE_NUMBERS:
        raise UserError(
            f"{file} is for states of {' x '.join(map(str, shape))}, which are no pictures; check its sizes."
        )
    return shape


def tried(network: nn.Module, shape: tuple[int, int, int], layout: str, states: int = 3) -> tuple[Tensor, ...] | None:
    """What a network gives for a few random states of this shape, None where it fails."""
    x = torch.rand(states, *shape, generator=torch.Generator().manual_seed(1))
    x = x.permute(0, 2, 3, 1) if layout == "hwc" else x
    try:
        with torch.no_grad():
            result = network(x)
    except Exception:  # whatever a stranger's network raises
        return None
    results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    return results if results and all(isinstance(item, Tensor) for item in results) else None


def input_size(file: Path, network: nn.Module, channels: int, layout: str) -> tuple[int, int]:
    """H and W of the states a network takes, by trying the common ones.

    Raises:
        UserError: none of them fits, or several do.
    """
    fits = [n for n in COMMON_SIZES if any(tried(network, (channels, n, n), layout, states) for states in (2, 1))]
    if len(fits) == 1:
        return fits[0], fits[0]
    problem = "takes pictures of several sizes" if fits else "takes pictures of none of the common sizes"
    raise UserError(f"{file} does not say the size of its input, and {problem}; give --input HxW.")
