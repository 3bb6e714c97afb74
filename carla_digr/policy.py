"""The actor-critic network of every task: three convolutions and two linear layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carla_digr.config import PolicyConfig
from carla_digr.errors import UserError

SOFTPLUS_BETA = 10.0


class ActorCritic(nn.Module):
    """Convolutions, one shared linear layer (the trunk), and a linear head each for the logits and the value.

    The paper (appendix A) names "3 convolutional layers and 2 linear layers" without sizes; those are the
    configuration's. ``softplus`` (beta 10) in place of ReLU makes the input gradient continuous, which DIGR's
    regularisation needs on strided networks; at a beta of 10 both nearly agree away from zero.

    Args:
        config: layers and activation.
        in_channels, height, width: of the state image, pixels.
        actions: number of discrete actions.

    Raises:
        UserError: the convolutions do not fit the image.
    """

    def __init__(self, config: PolicyConfig, in_channels: int, height: int, width: int, actions: int):
        super().__init__()
        self.config = config
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
            logits float (B, A), value float (B,).
        """
        logits, value, _ = self.trace(x)
        return logits, value

    def trace(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``forward``, and what its derivative needs.

        Returns:
            logits float (B, A), value float (B,), and the hidden layers' outputs before the activation: those of the
            convolutions, each (B, channels, rows, columns), then the trunk's, (B, features).
        """
        hidden = []
        for convolution in self.convolutions:
            hidden.append(convolution(x))
            x = self.activation(hidden[-1])
        hidden.append(self.trunk(x.flatten(1)))
        features = self.activation(hidden[-1])
        return self.policy_head(features), self.value_head(features).squeeze(-1), hidden

    def activation(self, x: Tensor) -> Tensor:
        """The hidden layers' activation."""
        return F.relu(x) if self.config.activation == "relu" else F.softplus(x, beta=SOFTPLUS_BETA)

    def activation_derivative(self, x: Tensor) -> Tensor:
        """Its derivative at the values before it; ReLU's at 0 is 0."""
        return (x > 0).to(x.dtype) if self.config.activation == "relu" else torch.sigmoid(SOFTPLUS_BETA * x)


def to_input(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as the float32 states in [0, 1] that a policy takes."""
    return images.to(torch.float32, copy=True).div_(255.0)
