"""Policies of other libraries, made with those libraries, and what each decides by its library's own forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from carla_digr.importing import ImportOptions, InputOptions


@dataclass
class Foreign:
    """A file, and the network in it.

    ``outputs`` is the library's own way from states float (B, C, H, W) in [0, 1] to outputs (B, K); ``module`` the
    network where that can be made float64.
    """

    file: Path
    shape: tuple[int, int, int]
    outputs: Callable[[Tensor], Tensor]
    output: str = "logits"
    options: ImportOptions = field(default_factory=ImportOptions)
    module: nn.Module | None = None


class Pictures(gymnasium.Env):
    """An environment of random pictures."""

    def __init__(self, shape=(84, 84, 4), actions=6, continuous=False):
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Box(-1, 1, (actions,), np.float32) if continuous else spaces.Discrete(actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def stable_baselines3(name: str, folder: Path, environment: gymnasium.Env, file: str = "", gain=200.0, **kwargs):
    """A model of an algorithm's name, less even in its decisions than a new one, saved; and its file."""
    import stable_baselines3 as sb3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(sb3, name)("CnnPolicy", environment, device="cpu", seed=3, **kwargs)
    with torch.no_grad():
        for key, parameter in model.policy.named_parameters():
            if any(head in key for head in ("action_net.weight", "q_net.q_net", "mu.weight", "log_std.weight")):
                parameter.mul_(gain if "actor" not in key else 5.0)
    path = folder / f"{file or name.lower()}.zip"
    model.save(path)
    return model, path


def logits_of(model) -> Callable[[Tensor], Tensor]:
    """PPO's or A2C's: sb3 takes pixels of 0 to 255 and divides them itself."""
    return lambda states: model.policy.get_distribution(states * 255).distribution.logits


def gaussian_of(model) -> Callable[[Tensor], Tensor]:
    """Means and log standard deviations."""

    def outputs(states: Tensor) -> Tensor:
        normal = model.policy.get_distribution(states * 255).distribution
        return torch.cat([normal.mean, normal.stddev.log()], dim=1)

    return outputs


class NatureAgent(nn.Module):
    """CleanRL's Agent of ppo_atari.py, with batch normalisation if asked for."""

    def __init__(self, actions=6, batch_norm=False, channels=(32, 64, 64)):
        super().__init__()
        layers: list[nn.Module] = []
        before = 4
        for out, kernel, stride in zip(channels, (8, 4, 3), (4, 2, 1), strict=True):
            layers += [nn.Conv2d(before, out, kernel, stride=stride)]
            layers += [nn.BatchNorm2d(out)] if batch_norm else []
            layers += [nn.ReLU()]
            before = out
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 7 * 7, 512), nn.ReLU())
        self.actor = nn.Linear(512, actions)
        self.critic = nn.Linear(512, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network(x / 255.0)
        return self.actor(hidden), self.critic(hidden)


class QNetwork(nn.Module):
    """CleanRL's of dqn_atari.py."""

    def __init__(self, actions=6):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, actions),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x / 255.0)


class ResidualBlock(nn.Module):
    """CleanRL's of ppo_procgen.py."""

    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x):
        inputs = x
        x = nn.functional.relu(x)
        x = self.conv0(x)
        x = nn.functional.relu(x)
        x = self.conv1(x)
        return x + inputs


class ConvSequence(nn.Module):
    """CleanRL's of ppo_procgen.py."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.res_block0 = ResidualBlock(out_channels)
        self.res_block1 = ResidualBlock(out_channels)

    def forward(self, x):
        x = self.conv(x)
        x = nn.functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = self.res_block0(x)
        return self.res_block1(x)


class ImpalaAgent(nn.Module):
    """CleanRL's Agent of ppo_procgen.py, with layer normalisation behind its linear layer."""

    def __init__(self, actions=5, size=84):
        super().__init__()
        left = -(-size // 8)
        self.network = nn.Sequential(
            ConvSequence(3, 16),
            ConvSequence(16, 32),
            ConvSequence(32, 32),
            nn.Flatten(),
            nn.ReLU(),
            nn.Linear(32 * left * left, 64),
            nn.LayerNorm(64),
            nn.ReLU(),
        )
        self.actor = nn.Linear(64, actions)
        self.critic = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network(x / 255.0)
        return self.actor(hidden), self.critic(hidden)


def trained(module: nn.Module, seed: int = 5) -> nn.Module:
    """Weights that decide, and running statistics that normalise, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                gain = 8.0 if "actor" in name else 1.4
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan**0.5)
            else:
                norm = float(name.endswith("weight"))  # of a normalisation
                parameter.copy_(norm + 0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                noise = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(0.5 + noise if name.endswith("var") else 0.2 * (noise - 0.5))
    return module.eval()


def first_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The logits of a module that divides by 255 itself."""

    def outputs(states: Tensor) -> Tensor:
        result = module(states * 255)
        return result[0] if isinstance(result, tuple) else result

    return outputs


def ppo(folder: Path) -> Foreign:
    model, file = stable_baselines3("PPO", folder, Pictures(), n_steps=16)
    return Foreign(file, (4, 84, 84), logits_of(model))


def a2c(folder: Path) -> Foreign:
    model, file = stable_baselines3("A2C", folder, Pictures())
    return Foreign(file, (4, 84, 84), logits_of(model))


def dqn(folder: Path) -> Foreign:
    model, file = stable_baselines3("DQN", folder, Pictures((4, 84, 84)), gain=100.0, buffer_size=4)
    return Foreign(file, (4, 84, 84), lambda states: model.policy.q_net(states * 255), "q_values")


def grey_96(folder: Path) -> Foreign:
    kwargs = {"net_arch": {"pi": [48], "vf": [32]}, "activation_fn": nn.ELU, "share_features_extractor": False}
    model, file = stable_baselines3(
        "PPO", folder, Pictures((4, 96, 96), 4), "grey_96", 4000.0, n_steps=16, policy_kwargs=kwargs
    )
    return Foreign(file, (4, 96, 96), logits_of(model))


def gaussian(folder: Path) -> Foreign:
    model, file = stable_baselines3("PPO", folder, Pictures((96, 96, 3), 2, True), "gaussian", 4000.0, n_steps=16)
    with torch.no_grad():
        model.policy.log_std.copy_(torch.tensor([-0.7, 0.3]))
    model.save(file)
    return Foreign(file, (3, 96, 96), gaussian_of(model), "gaussian")


def batch_norm(folder: Path) -> Foreign:
    agent = trained(NatureAgent(batch_norm=True))
    torch.save(agent.state_dict(), folder / "batch_norm.cleanrl_model")
    return Foreign(folder / "batch_norm.cleanrl_model", (4, 84, 84), first_of(agent), module=agent)


def impala(folder: Path) -> Foreign:
    agent = trained(ImpalaAgent())
    torch.save(agent.state_dict(), folder / "impala.pt")
    return Foreign(folder / "impala.pt", (3, 84, 84), first_of(agent), module=agent)


def torchscript(folder: Path) -> Foreign:
    agent = trained(NatureAgent(channels=(8, 8, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(agent, torch.rand(1, 4, 84, 84)).save(folder / "script.pt")
    return Foreign(folder / "script.pt", (4, 84, 84), first_of(agent), module=agent)


def exported(folder: Path) -> Foreign:
    agent = trained(NatureAgent(channels=(8, 8, 8), batch_norm=True))
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=4096)}}
    torch.export.save(torch.export.export(agent, (torch.rand(2, 4, 84, 84),), dynamic_shapes=batch), folder / "x.pt2")
    return Foreign(folder / "x.pt2", (4, 84, 84), first_of(agent), module=agent)


def onnx(folder: Path) -> Foreign:
    agent = trained(NatureAgent(channels=(8, 8, 8)))
    to_onnx(agent, torch.rand(1, 4, 84, 84), folder / "x.onnx")
    return Foreign(folder / "x.onnx", (4, 84, 84), first_of(agent), module=agent)


def to_onnx(module: nn.Module, example: Tensor, file: Path, **options) -> None:
    """By torch's own exporter, whose weights lie in a file beside the graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), file, dynamo=True, verbose=False, **options)


FOREIGN = {f.__name__: f for f in (ppo, a2c, dqn, grey_96, gaussian, batch_norm, impala, torchscript, exported, onnx)}
"""The ten files."""


class Exact(nn.Module):
    """A network of most of what there is, for the exporters: paddings, pools, norms, activations, a residual sum."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.second = nn.Conv2d(6, 6, 3, padding="same")
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.mean = nn.AvgPool2d(2)
        self.dense = nn.Linear(6 * 5 * 5, 24)
        self.layer_norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x)))
        x = F.elu(self.second(x)) + x
        x = self.mean(F.leaky_relu(self.pool(x), 0.2))
        x = F.gelu(self.layer_norm(self.dense(x.flatten(1))))
        return self.head(torch.tanh(x) * F.softplus(x)).clamp(-50, 50)


def asked(**options) -> ImportOptions:
    """Options, those of the input by their own names."""
    names = InputOptions.__dataclass_fields__
    shown = {key: value for key, value in options.items() if key in names}
    return ImportOptions(input=InputOptions(**shown), **{k: v for k, v in options.items() if k not in names})
