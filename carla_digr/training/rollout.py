"""Driving environments with a policy: whole episodes to measure it, states to learn from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carla_digr import checkpoint
from carla_digr.config import Config
from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.policy import Policy, default_recipe, device_of, to_input
from carla_digr.tasks import Batch, Task, make_task
from carla_digr.training.progress import Progress

Act = Callable[[NDArray[np.uint8]], NDArray[np.int64]]  # observations (N, C, H, W) -> actions (N,)
Look = Callable[[Batch, NDArray[np.uint8]], None]  # is shown the environments and the observations that are kept


def load_policy(
    path: Path, task: Task, module: str | None = None, device: str = "cpu"
) -> tuple[Policy, dict[str, Any]]:
    """A checkpoint for this task, with its card.

    A policy whose card names no task, as of another library, must take this one's pictures and have as many actions;
    where the actions have other names, a note on standard error says so.

    Args:
        module: see ``checkpoint.load``.
        device: see ``policy.device_of``.

    Raises:
        UserError: it is missing, damaged, of another task or of an earlier form of this one, or continuous.
    """
    policy, card = checkpoint.load(path, task.name, module)
    policy.to(device_of(device))
    if not DISTRIBUTIONS[policy.output].discrete:
        raise UserError(
            f"{path} is a policy of continuous actions: it can be explained, but no task has such actions, and "
            f"distilling it is not supported."
        )
    shape, names = tuple(card["input_shape"]), tuple(card["action_names"])
    recipe = getattr(task, "recipe", None) or default_recipe(task.observation_shape[0])
    if card["task"] is None:
        if (shape, len(names)) != (task.observation_shape, len(task.action_names)):
            raise UserError(
                f"{path} takes pictures {shape} and has {len(names)} actions, but the task {task.name} has "
                f"{task.observation_shape} and {len(task.action_names)}; they do not fit each other."
            )
        if (policy.recipe.colour, policy.recipe.stack) != (recipe.colour, recipe.stack):
            raise UserError(
                f"{path} takes {policy.recipe.stack} {policy.recipe.colour} pictures, but the task {task.name} shows "
                f"{recipe.stack} {recipe.colour}; they do not fit each other."
            )
        if names != task.action_names:
            print(
                f"Note: {path} calls its actions {', '.join(names)}, which are taken for {', '.join(task.action_names)}"
                f" of the task {task.name}, in this order.",
                file=sys.stderr,
            )
    elif (shape, names) != (task.observation_shape, task.action_names):
        raise UserError(
            f"{path} takes pictures {shape} and knows the actions {', '.join(names)}, but the task {task.name} "
            f"now has {task.observation_shape} and {', '.join(task.action_names)}; train it again."
        )
    return policy, card


def greedy(policy: Policy) -> Act:
    """The most probable action."""

    def act(observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        return policy_logits(policy, observations).argmax(dim=1).numpy()

    return act


def sampled(policy: Policy, rng: np.random.Generator) -> Act:
    """An action drawn from the policy's distribution."""

    def act(observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        return sample_actions(policy_logits(policy, observations), rng)

    return act


def sample_actions(logits: torch.Tensor, rng: np.random.Generator) -> NDArray[np.int64]:
    """Actions (N,) drawn from the distributions of logits (N, A)."""
    return draw_actions(logits.double().softmax(dim=1).numpy(), rng.random(len(logits)))


def draw_actions(probabilities: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Actions (N,) drawn from probabilities (N, A) by inversion with uniform numbers (N,) in [0, 1)."""
    below = probabilities.cumsum(axis=1) < uniform[:, None]
    return np.minimum(below.sum(axis=1), probabilities.shape[1] - 1)


def policy_logits(policy: Policy, observations: NDArray[np.uint8]) -> torch.Tensor:
    """Logits float (N, A) of uint8 observations (N, C, H, W), without gradients."""
    with torch.no_grad():
        return policy(to_input(torch.from_numpy(observations)))[0]


def present(env: Batch) -> NDArray[np.bool_]:
    """Which environments (N,) took the last step; those of a simulator that is lost for a while did not."""
    return getattr(env, "present", np.ones(env.num_envs, bool))


def run_episodes(env: Batch, act: Act, episodes: int, label: str = "") -> list[dict[str, float]]:
    """Run fresh environments for ``episodes`` whole episodes.

    The episodes are the first ones of each environment, so that every policy meets the same, and none is favoured for
    being short. Environments that have driven theirs rest, where they can.

    Returns:
        Per episode the task's metrics and its "return".
    """
    quota = np.full(env.num_envs, episodes // env.num_envs)
    quota[: episodes % env.num_envs] += 1
    finished: list[dict[str, float]] = []
    returns = np.zeros(env.num_envs)
    resting = getattr(env, "resting", np.zeros(env.num_envs, bool))
    observations = np.asarray(env.reset())
    with Progress(total=episodes, unit="episode", desc=label) as progress:
        while quota.any():
            observations, rewards, dones, infos = env.step(act(observations))
            returns += rewards
            for i in np.flatnonzero(dones):
                if (
                    quota[i] and "metrics" in infos[i]
                ):  # an episode that was cut because its simulator was lost has none
                    quota[i] -= 1
                    finished.append({**infos[i]["metrics"], "return": float(returns[i])})
                    progress.update()
                returns[i] = 0
                resting[i] = not quota[i]
    return finished


def collect_states(
    env: Batch, act: Act, count: int, interval: int, label: str = "importance", look: Look | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int8] | None]:
    """States of running episodes, every ``interval`` steps of each environment.

    Args:
        label: the environment's method that gives what is kept beside each state, if it has it.

    Returns:
        uint8 (count, C, H, W), and where the environment has it, the label, int8 (count, H, W).
    """
    importance = getattr(env, label, None)
    if importance is not None and hasattr(env, "watch_labels"):
        env.watch_labels(interval)
    states: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int8]] = []
    observations = np.asarray(env.reset())
    steps = 0
    with Progress(total=count, unit="state", desc="states") as progress:
        while sum(map(len, states)) < count:
            observations = np.asarray(env.step(act(observations))[0])
            steps += 1
            if steps % interval == 0:
                found = None if importance is None else importance()
                there = getattr(env, "shown", np.ones(env.num_envs, bool))
                states.append(observations[there])
                if found is not None:
                    labels.append(found[there])
                if look is not None:
                    look(env, states[-1])
                progress.update(min(len(states[-1]), count - progress.n))
    return np.concatenate(states)[:count], np.concatenate(labels)[:count] if labels else None


def varied_task(config: Config) -> Task:
    """The configuration's task, with the variety of the teacher's training if it has one; see tasks.Varies."""
    task = make_task(config)
    return task.varied() if hasattr(task, "varied") else task


def states_of(
    task: Task,
    policy: Policy,
    environments: int,
    count: int,
    interval: int,
    seed: int,
    draws: tuple[int, int] | None = None,
    label: str = "importance",
    look: Look | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int8] | None]:
    """``collect_states`` of fresh episodes of a policy that samples its actions.

    Args:
        seed: of the episodes.
        draws: seed of the actions, by default (seed, 1).
    """
    env = task.make_vec_env(environments, seed)
    try:
        act = sampled(policy, np.random.default_rng(draws or (seed, 1)))
        return collect_states(env, act, count, interval, label, look)
    finally:
        env.close()


def restore_batch(
    batch: Any, state: dict[str, NDArray[Any]], observations: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Put a saved state back into a batch that has ``set_state``.

    Args:
        observations: that were saved with it, uint8 (N, C, H, W).

    Returns:
        The observations from which it goes on, and in which environments (N,) they are those of a new episode, because
        the saved one could not be continued.
    """
    batch.set_state(state)
    if not hasattr(batch, "observe"):
        return observations, np.zeros(len(observations), bool)
    present = batch.observe()
    return present, (present != observations).reshape(len(present), -1).any(axis=1)
