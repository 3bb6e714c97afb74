"""Policies: what saliency, attacks and stages ask of one, the actor-critic that is trained here, and any torch module.

A state is what a policy decides on: float (C, H, W) in [0, 1], made of one or several pictures by the policy's
`InputRecipe`. Whatever the network does to it besides (another scale, normalisation) belongs to the policy, so that a
map is always one of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from carla_digr.config import PolicyConfig
from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError

SOFTPLUS_BETA = 10.0


class Policy(Protocol):
    """What is explained: a network that turns states into a decision. `ActorCritic` and `TorchPolicy` are it.

    Attributes:
        input_shape: C, H, W of a state.
        actions: A discrete actions, or D dimensions of a continuous one.
        output: what the outputs mean, a key of `carla_digr.distributions.DISTRIBUTIONS`.
        recipe: how pictures become states.
        offers: what a saliency method can use of it: its outputs alone, their gradient too, or its layers too.
    """

    input_shape: tuple[int, int, int]
    actions: int
    output: str
    recipe: InputRecipe
    offers: Literal["logits", "gradient", "layers"]

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decide.

        Args:
            states: float (B, C, H, W) in [0, 1].

        Returns:
            Outputs float (B, K), and the critic's values float (B,), None where there is no critic.
        """

    def eval(self) -> Any:
        """Evaluation mode, as torch modules have it."""

    def state_dict(self) -> dict[str, Any]:
        """The weights by name, as torch modules have it."""

    def to(self, device: torch.device) -> Any:
        """Move the weights, as torch modules have it; states and outputs stay on the device of whoever calls."""


@dataclass(frozen=True)
class InputRecipe:
    """How pictures become a policy's state, and the state what its network takes.

    Attributes:
        colour: channels of one picture in the state: RGB, BGR or grey (OpenCV's luma).
        stack: pictures in a state, the oldest first, along the channels.
        scale, mean, deviation: the network takes (pixel * scale - mean) / deviation of pixels in 0..255; mean and
            deviation are one number or one a channel of the state.
        layout: order of the axes of the network's input.
    """

    colour: Literal["rgb", "bgr", "grey"] = "rgb"
    stack: int = 1
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    layout: Literal["chw", "hwc"] = "chw"

    @property
    def channels(self) -> int:
        """C of a state."""
        return self.stack * (1 if self.colour == "grey" else 3)

    @property
    def plain(self) -> bool:
        """Whether the network takes states as they are."""
        factor = 255 * self.scale
        return factor == 1 and not any(self.mean) and set(self.deviation) == {1.0} and self.layout == "chw"

    def picture(self, frame: NDArray[np.uint8], size: tuple[int, int], resize: bool = False) -> NDArray[np.uint8]:
        """One picture of a state, uint8 (channels, H, W).

        Args:
            frame: uint8 (H, W, 3) RGB; for grey states also (H, W) or (H, W, 1).
            size: H, W of the state.
            resize: scale a frame of another size, by area.

        Raises:
            UserError: the frame has another type or size.
        """
        grey = frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 1)
        colours = frame.ndim == 3 and frame.shape[2] == 3
        if frame.dtype != np.uint8 or not (colours or (grey and self.colour == "grey")):
            raise UserError(self._refusal(frame, size))
        if frame.shape[:2] != tuple(size):
            if not resize or not frame.size:
                raise UserError(self._refusal(frame, size))
            frame = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        if self.colour == "grey":
            luma = frame.reshape(size) if grey else cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
            return luma.astype(np.uint8, copy=False)[None]
        return frame.transpose(2, 0, 1)[:: 1 if self.colour == "rgb" else -1]

    def _refusal(self, frame: NDArray, size: tuple[int, int]) -> str:
        expected = " x ".join(map(str, (*size, 1 if self.colour == "grey" else 3)))
        got = " x ".join(map(str, frame.shape))
        return (
            f"The policy needs a uint8 picture of {expected} (height x width x channels) but got {frame.dtype} "
            f"{got}: set the camera to the policy's size, or ask for resizing."
        )


class TorchPolicy(nn.Module):
    """Any torch module as a policy; its gradients are autograd's.

    Args:
        network: takes what the recipe says, float, and gives outputs (B, K), or a tuple of outputs and values (B,) or
            (B, 1). An attribute ``offers`` of it says less than that its layers can be used; see `Policy`.
        input_shape: C, H, W of a state.
        actions: how many actions there are, or dimensions of a continuous action.
        output: a key of `carla_digr.distributions.DISTRIBUTIONS`.
        recipe: how pictures become the network's input; None: `default_recipe`.

    Raises:
        UserError: recipe and shape do not belong together, or the network does not take such states or gives something
            else than it should.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: tuple[int, int, int],
        actions: int,
        output: str = "logits",
        recipe: InputRecipe | None = None,
    ):
        super().__init__()
        self.network = network
        self.input_shape = input_shape
        self.actions = actions
        self.output = output
        scripted = isinstance(network, torch.jit.ScriptModule)  # takes no hooks
        self.offers: Literal["logits", "gradient", "layers"] = getattr(
            network, "offers", "gradient" if scripted else "layers"
        )
        self.recipe = recipe or default_recipe(input_shape[0])
        check_recipe(self.recipe, input_shape)
        self._mean, self._deviation = (
            torch.tensor(values).view(-1, 1, 1) for values in (self.recipe.mean, self.recipe.deviation)
        )
        self._try()

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Policy`."""
        placed = states.to(next(self.parameters(), states).device)
        result = self.network(placed if self.recipe.plain else self._scaled(placed))
        outputs, value = (*result, None)[:2] if isinstance(result, (tuple, list)) else (result, None)
        if isinstance(outputs, Tensor):
            outputs = outputs.to(states.device)
        return outputs, None if value is None else value.reshape(-1).to(states.device)

    def _scaled(self, states: Tensor) -> Tensor:
        x = states * (255 * self.recipe.scale)
        x = (x - self._mean.to(x)) / self._deviation.to(x)
        return x.permute(0, 2, 3, 1) if self.recipe.layout == "hwc" else x

    def _try(self) -> None:
        """Refuse a network that does not do what is said of it."""
        shape, expected = self.input_shape, DISTRIBUTIONS[self.output].outputs(self.actions)
        try:
            with torch.no_grad():
                first = next(self.parameters(), torch.zeros(()))
                outputs, value = self.eval()(torch.full((2, *shape), 0.5).to(first))
        except Exception as error:  # whatever a stranger's module raises
            reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
            raise UserError(
                f"The network does not take states of {' x '.join(map(str, shape))} (channels x height x width): "
                f"{reason}."
            ) from error
        if not isinstance(outputs, Tensor) or outputs.shape != (2, expected) or not outputs.is_floating_point():
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UserError(
                f"The network gives {got} for two states where {self.actions} {self.output.replace('_', ' ')} mean "
                f"(2, {expected}); say what its outputs are."
            )
        if value is not None and value.shape != (2,):
            raise UserError(
                f"The network gives values of shape {tuple(value.shape)} for two states; one each is needed."
            )


def default_recipe(channels: int) -> InputRecipe:
    """Three channels are one RGB picture, any other number as many grey ones."""
    return InputRecipe() if channels == 3 else InputRecipe("grey", stack=channels)


def check_recipe(recipe: InputRecipe, input_shape: tuple[int, int, int]) -> None:
    """Refuse a recipe that does not give states of this shape.

    Raises:
        UserError: it does not.
    """
    if recipe.channels != input_shape[0]:
        raise UserError(
            f"A state of {recipe.stack} {recipe.colour} pictures has {recipe.channels} channels, but the policy takes "
            f"{input_shape[0]}: say how its pictures are stacked and coloured."
        )
    for name in ("mean", "deviation"):
        if len(getattr(recipe, name)) not in (1, recipe.channels):
            raise UserError(
                f"The input's {name} has {len(getattr(recipe, name))} numbers for {recipe.channels} channels."
            )
    if not all(recipe.deviation) or not recipe.scale:
        raise UserError("The input's scale and deviation must not be 0.")


class ActorCritic(nn.Module):
    """Convolutions, one shared linear layer (the trunk), and a linear head each for the logits and the value.

    The paper (appendix A) names "3 convolutional layers and 2 linear layers" without sizes; those are the
    configuration's. ``softplus`` (beta 10) in place of ReLU makes the input gradient continuous, which DIGR's
    regularisation needs on strided networks; at a beta of 10 both nearly agree away from zero.

    Args:
        config: layers and activation.
        in_channels, height, width: of the state image, pixels.
        actions: number of discrete actions.
        output: "logits", or "q_values" where the heads of an imported network are those.
        recipe: how pictures become states; it must be plain. None: `default_recipe`.

    Raises:
        UserError: the convolutions do not fit the image, or the recipe does not.
    """

    def __init__(
        self,
        config: PolicyConfig,
        in_channels: int,
        height: int,
        width: int,
        actions: int,
        output: str = "logits",
        recipe: InputRecipe | None = None,
    ):
        super().__init__()
        self.config = config
        self.output = output
        self.offers: Literal["logits", "gradient", "layers"] = "layers"
        self.recipe = recipe or default_recipe(in_channels)
        check_recipe(self.recipe, (in_channels, height, width))
        if not self.recipe.plain:
            raise UserError("An actor-critic takes pictures scaled to [0, 1]; another scale needs another network.")
        self.input_shape = (in_channels, height, width)
        self.actions = actions
        self.convolutions = nn.ModuleList()
        channels, rows, columns = in_channels, height, width
        for out_channels, kernel, stride in config.convolutions:
            if kernel > min(rows, columns):
                raise UserError(
                    f"The policy's convolution [{out_channels}, {kernel}, {stride}] does not fit its "
                    f"{rows}x{columns} input; use a smaller kernel or stride in policy.convolutions."
                )
            self.convolutions.append(nn.Conv2d(channels, out_channels, kernel, stride))
            channels, rows, columns = out_channels, (rows - kernel) // stride + 1, (columns - kernel) // stride + 1
        self.trunk = nn.Linear(channels * rows * columns, config.features)
        self.policy_head = nn.Linear(config.features, actions)
        self.value_head = nn.Linear(config.features, 1)
        self._initialise()

    def _initialise(self) -> None:
        """Orthogonal weights and zero biases, the usual start of PPO (Engstrom et al. 2020)."""
        gains = {self.policy_head: 0.01, self.value_head: 1.0}
        for layer in [*self.convolutions, self.trunk, self.policy_head, self.value_head]:
            nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and value of a batch of states.

        Args:
            x: float (B, C, H, W) in [0, 1].

        Returns:
            logits float (B, A), value float (B,), where the states are, whatever device the weights are on.
        """
        logits, value, _ = self.trace(x)
        return logits.to(x.device), value.to(x.device)

    def trace(self, x: Tensor, activated: list[Tensor] | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``forward``, and what its derivative needs.

        Args:
            x: as there.
            activated: a list that what the convolutions give after the activation is added to.

        Returns:
            logits float (B, A), value float (B,), and the hidden layers' outputs before the activation: those of the
            convolutions, each (B, channels, rows, columns), then the trunk's, (B, features); all where the weights are.
        """
        x = x.to(self.trunk.weight.device)
        hidden = []
        for convolution in self.convolutions:
            hidden.append(convolution(x))
            x = self.activation(hidden[-1])
            if activated is not None:
                activated.append(x)
        hidden.append(self.trunk(x.flatten(1)))
        features = self.activation(hidden[-1])
        return self.policy_head(features), self.value_head(features).squeeze(-1), hidden

    def after_first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` from the first convolution's output after the activation, float (B, channels, rows, columns)."""
        for convolution in self.convolutions[1:]:
            x = self.activation(convolution(x))
        features = self.activation(self.trunk(x.flatten(1)))
        return self.policy_head(features), self.value_head(features).squeeze(-1)

    def activation(self, x: Tensor) -> Tensor:
        """The hidden layers' activation."""
        if self.config.activation == "relu":
            return F.relu(x)
        if torch.is_grad_enabled():
            return F.softplus(x, beta=SOFTPLUS_BETA)
        # The same by vector instructions, in a fifth of the time; from 60 / beta on it is x itself to the last digit.
        smooth = x.mul(-SOFTPLUS_BETA).clamp_(min=-60.0).sigmoid_().log_().div_(-SOFTPLUS_BETA)
        return torch.maximum(smooth, x)

    def activation_derivative(self, x: Tensor) -> Tensor:
        """Its derivative at the values before it; ReLU's at 0 is 0."""
        return (x > 0).to(x.dtype) if self.config.activation == "relu" else torch.sigmoid(SOFTPLUS_BETA * x)


def device_of(setting: str) -> torch.device:
    """Where the networks of a stage are to be, by the configuration's ``device``.

    Raises:
        UserError: it is "cuda", and there is no GPU.
    """
    found = torch.cuda.is_available()
    if setting == "cuda" and not found:
        raise UserError("The setting device is cuda, but PyTorch finds no GPU here; set it to auto or cpu.")
    return torch.device("cuda" if found and setting != "cpu" else "cpu")


def device_under(policy: Policy) -> torch.device:
    """Where a policy's weights are."""
    return next((weight.device for weight in policy.state_dict().values()), torch.device("cpu"))


def to_input(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as the float32 states in [0, 1] that a policy takes."""
    return images.to(torch.float32, copy=True).div_(255.0)
