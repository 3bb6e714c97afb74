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
        for convolution in self.convolutions:
            x = self._activation(convolution(x))
        features = self._activation(self.trunk(x.flatten(1)))
        return self.policy_head(features), self.value_head(features).squeeze(-1)

    def _activation(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.config.activation == "relu" else F.softplus(x, beta=SOFTPLUS_BETA)


def to_input(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as the float32 states in [0, 1] that a policy takes."""
    return images.to(torch.float32, copy=True).div_(255.0)
