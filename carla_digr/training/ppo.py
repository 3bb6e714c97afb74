"""PPO as the teacher is trained by: stable-baselines3's, with our network, and an update that keeps two cores busy."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from carla_digr.config import Config, PolicyConfig
from carla_digr.policy import ActorCritic, InputRecipe, device_of, to_input
from carla_digr.training.patches import Patches, find_patches, outputs_of


class SB3Policy(ActorCriticPolicy):
    """stable-baselines3's actor-critic interface around our network."""

    network: ActorCritic

    def __init__(self, *args: Any, network_config: PolicyConfig, recipe: InputRecipe | None = None, **kwargs: Any):
        self._network_config, self._recipe = network_config, recipe
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        channels, height, width = self.observation_space.shape  # type: ignore[misc]
        actions = int(self.action_space.n)  # type: ignore[attr-defined]
        self.network = ActorCritic(self._network_config, channels, height, width, actions, recipe=self._recipe)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr_schedule(1), eps=1e-5, fused=True)

    def _distribution_and_value(self, obs: Any) -> tuple[CategoricalDistribution, Tensor]:
        logits, value = self.network(to_input(obs))
        return CategoricalDistribution(logits.shape[1]).proba_distribution(logits), value

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions int64 (B,), values (B, 1), log-probabilities (B,) of uint8 (B, C, H, W)."""
        logits, value = self.network(to_input(obs))
        each = logits.log_softmax(dim=1)  # without a distribution's objects, which take as long as a small network
        actions = each.argmax(dim=1, keepdim=True) if deterministic else each.exp().multinomial(1, replacement=True)
        return actions[:, 0], value[:, None], each.gather(1, actions)[:, 0]

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, 1), log-probabilities (B,) and entropies (B,) of given actions."""
        distribution, value = self._distribution_and_value(obs)
        return value[:, None], distribution.log_prob(actions), distribution.entropy()

    def predict_values(self, obs: Any) -> Tensor:
        """Values (B, 1)."""
        return self.network(to_input(obs))[1][:, None]

    def get_distribution(self, obs: Any) -> CategoricalDistribution:
        """The action distribution."""
        return self._distribution_and_value(obs)[0]


FEW = 512  # different patches: a thirtieth of what 256 pictures have in the smallest of our networks
_BESIDE = ThreadPoolExecutor(1, "half")  # whatever cores there are, so that a training is the same on any number

Result = TypeVar("Result")


def _in_halves(work: Callable[..., Result], *batch: np.ndarray) -> list[Result]:
    """What some work gives for the first and for the second half of arrays (B, ...), by this thread and another."""
    middle = -(-len(batch[0]) // 2)
    beside = _BESIDE.submit(work, *(values[middle:] for values in batch)) if len(batch[0]) > 1 else None
    first = work(*(values[:middle] for values in batch))
    return [first] if beside is None else [first, beside.result()]


class PresentRollouts(RolloutBuffer):
    """Rollouts from which the steps of environments that were absent, see ``rollout.present``, are left out.

    Pictures have their channels last in memory, where convolutions and their gradients take a fifth less time.

    Args:
        window: kernel and stride of the network's first convolution, and how many different patches are few; None:
            they are not looked for.

    Attributes:
        present: bool (steps, environments).
        patches: of the pictures, once there are ``rows``, or None.
    """

    def __init__(self, *args: Any, window: tuple[int, int, int] | None = None, **kwargs: Any):
        self.window = window
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget the last rollout."""
        super().reset()
        self.present = np.ones((self.buffer_size, self.n_envs), bool)
        self.patches: Patches | None = None

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Minibatches, see ``rows``."""
        for rows in self.rows(batch_size or self.buffer_size * self.n_envs):
            self._flatten_pictures()
            samples = self._get_samples(rows)
            pictures = samples.observations
            yield samples._replace(observations=pictures.movedim(-1, 1) if pictures.ndim == 4 else pictures)

    def rows(self, batch_size: int) -> Generator[np.ndarray, None, None]:
        """Rows of each minibatch in the flattened arrays, int64 (up to batch_size,); without any it is left out."""
        order = np.random.permutation(self.buffer_size * self.n_envs)
        if not self.generator_ready:
            for name in ("actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            found = None if self.window is None else find_patches(self.observations, *self.window)
            if found is None:
                self._flatten_pictures()
            else:
                self.patches = found._replace(numbers=self.swap_and_flatten(found.numbers))
            self.generator_ready = True
        present = self.present.swapaxes(0, 1).ravel()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            rows = rows[present[rows]]
            if len(rows):
                yield rows

    def _flatten_pictures(self) -> None:
        if self.observations.ndim == 2 + len(self.obs_shape):
            self.observations = self.swap_and_flatten(self.observations)
            if self.observations.ndim == 4:
                last = torch.from_numpy(self.observations).contiguous(memory_format=torch.channels_last)
                self.observations = last.movedim(1, -1).numpy()


class _PPO(PPO):
    """stable-baselines3's PPO on environments whose pictures are (C, H, W), whatever is the smallest of the three.

    Its update is the same, by two threads, each of which takes half of a minibatch from the pictures to the gradients.
    """

    policy: SB3Policy
    rollout_buffer: PresentRollouts

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return env  # it would take the smallest axis for the channels

    def train(self) -> None:
        """Update the policy on the present rollouts; see PPO."""
        policy, rollouts = self.policy, self.rollout_buffer
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        clip = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        parameters = list(policy.network.parameters())
        figures: list[np.ndarray] = []
        stopped = False
        for _ in range(self.n_epochs):
            epoch = len(figures)
            for rows in rollouts.rows(self.batch_size):
                advantages = rollouts.advantages[rows, 0]
                if len(rows) > 1:
                    advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
                half = partial(self._half, len(rows), clip)
                (found, gradients), *others = _in_halves(half, rows, advantages)
                for other_found, other_gradients in others:
                    found, gradients = found + other_found, gradients.add_(other_gradients)
                figures.append(found)
                stopped = self.target_kl is not None and found[-1] > 1.5 * self.target_kl
                if stopped:
                    break
                gradients *= min(1.0, self.max_grad_norm / (gradients.norm().item() + 1e-6))
                for parameter, part in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
                    parameter.grad = part.view_as(parameter)
                policy.optimizer.step()
            self._n_updates += 1
            if stopped:
                break
        surrogate, value, entropy, clipped, _ = np.mean(figures, axis=0)
        told = {
            "policy_gradient_loss": surrogate,
            "value_loss": value,
            "entropy_loss": entropy,
            "clip_fraction": clipped,
            "approx_kl": np.mean(figures[epoch:], axis=0)[-1],
            "explained_variance": explained_variance(rollouts.values.flatten(), rollouts.returns.flatten()),
        }
        for name, figure in told.items():
            self.logger.record(f"train/{name}", figure)

    def _half(self, count: int, clip: float, rows: np.ndarray, advantages: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """What some states of a minibatch of ``count`` add to its figures and to the gradient of its loss.

        Returns:
            Means of the surrogate loss, the value's squared error, the negative entropy, what is clipped, and the
            divergence from the policy before, float (5,); gradients of all the network's parameters, float (P,).
        """
        rollouts, network = self.rollout_buffer, self.policy.network
        if rollouts.patches is None:
            pictures = torch.from_numpy(rollouts.observations).index_select(0, torch.from_numpy(rows))
            outputs = network(to_input(pictures.to(self.device).movedim(-1, 1)))
        else:
            outputs = outputs_of(network, rollouts.patches, rows)
        # The loss's gradient is written out, in numpy: of so few numbers torch's operations are all overhead
        logits, values = (output.detach().cpu().numpy() for output in outputs)
        actions, before, returns = (
            stored[rows] for stored in (rollouts.actions, rollouts.log_probs, rollouts.returns[:, 0])
        )
        each = logits - logits.max(axis=1, keepdims=True)
        each -= np.log(np.exp(each).sum(axis=1, keepdims=True))
        probabilities = np.exp(each)
        log_ratio = (np.take_along_axis(each, actions, axis=1) - before)[:, 0]
        ratio = np.exp(log_ratio)
        gain, clipped_gain = advantages * ratio, advantages * ratio.clip(1 - clip, 1 + clip)
        entropy = (probabilities * each).sum(axis=1)
        error = values - returns
        of_action = -gain * (gain <= clipped_gain)
        of_logits = (self.ent_coef * (each - entropy[:, None]) - of_action[:, None]) * probabilities
        of_logits[np.arange(len(rows)), actions[:, 0]] += of_action
        of_outputs = (torch.from_numpy(of / count).to(self.device) for of in (of_logits, 2 * self.vf_coef * error))
        clipped = np.abs(ratio - 1) > clip
        figures = (-np.minimum(gain, clipped_gain), error**2, entropy, clipped, ratio - 1 - log_ratio)
        gradients = torch.autograd.grad(outputs, list(network.parameters()), list(of_outputs))
        return np.array([figure.sum() / count for figure in figures]), torch.cat([g.flatten() for g in gradients])


def make_ppo(config: Config, env: VecEnv, recipe: InputRecipe | None = None) -> PPO:
    """stable-baselines3's PPO with a configuration's settings, Table 2 of the paper's, and our network.

    Args:
        recipe: of the environments' pictures, None for the usual one.
    """
    settings = config.teacher
    start, end = settings.learning_rate, settings.learning_rate_end
    return _PPO(
        SB3Policy,
        env,
        learning_rate=lambda remaining: end + (start - end) * max(0.0, remaining),  # the last rollout may overshoot
        n_steps=settings.rollout_steps,
        batch_size=settings.minibatch_size,
        n_epochs=settings.epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        ent_coef=settings.entropy_coefficient,
        vf_coef=settings.value_coefficient,
        max_grad_norm=settings.max_gradient_norm,
        target_kl=settings.target_kl,
        policy_kwargs={"network_config": config.policy, "recipe": recipe},
        seed=config.seed,
        rollout_buffer_class=PresentRollouts,
        rollout_buffer_kwargs={"window": (*config.policy.convolutions[0][1:], FEW)},
        device=device_of(config.device),
    )
