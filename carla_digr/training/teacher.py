"""Stage 1: the teacher, by PPO.

The algorithm is stable-baselines3's PPO (Schulman et al. 2017); the network inside its policy is exactly our
ActorCritic, so a checkpoint is a copy of weights. Only saving differs: stable-baselines3 pickles, this does not.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from carla_digr import checkpoint
from carla_digr.config import Config
from carla_digr.errors import UserError
from carla_digr.files import NOTES_BYTES, atomic_write, read_regular
from carla_digr.policy import ActorCritic
from carla_digr.tasks import Batch, Task, make_task
from carla_digr.training.ppo import make_ppo
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import load_policy, present, restore_batch
from carla_digr.training.state import (
    check_same_job,
    load_state,
    only_job_in,
    pack_optimiser,
    pack_random,
    save_state,
    unpack_optimiser,
    unpack_random,
)
from carla_digr.training.vec_env import as_vec_env


def train_teacher(config: Config, out: Path) -> None:
    """Train, or go on training, until ``teacher.total_steps``.

    Writes ``teacher.safetensors`` and ``.json`` (also at each checkpoint), ``teacher/state.safetensors`` (from which a
    killed run resumes, on a CPU bit for bit if the task's batch can save its state), ``teacher/curve.csv`` and
    ``teacher/tensorboard``.

    Raises:
        UserError: the saved state or ``teacher.start`` is damaged or of another configuration, or the settings do not
            fit each other.
    """
    settings = config.teacher
    rollout = settings.environments * settings.rollout_steps
    if rollout % settings.minibatch_size:
        raise UserError(
            f"The setting teacher.minibatch_size, {settings.minibatch_size}, must divide environments * rollout_steps, "
            f"{rollout}."
        )
    task = make_task(config)
    state_path = out / "teacher" / "state.safetensors"
    with only_job_in(out / "teacher"):
        saved = load_state(state_path) if state_path.exists() else None
        if saved:
            check_same_job(state_path, saved[1]["config"], _sections(config))
        batch = task.make_vec_env(settings.environments, config.seed, evaluation=False)
        env = VecMonitor(as_vec_env(batch))
        try:
            algorithm = make_ppo(config, env, getattr(task, "recipe", None))
            if saved:
                _restore(algorithm, env, batch, *saved)
            elif settings.start is not None:
                _begin_from(Path(settings.start), task, config, algorithm)
            steps = algorithm.num_timesteps
            logger = Logger(str(out), [_CurveWriter(out / "teacher", steps)])
            algorithm.set_logger(logger)
            job = _Job(config, task, env, batch, out, state_path)
            job.scores.extend(saved[1].get("scores", []) if saved else [])
            with contextlib.closing(logger), job.progress:
                remaining = settings.total_steps - steps
                if remaining > 0:
                    algorithm.learn(
                        remaining, callback=job, log_interval=sys.maxsize, reset_num_timesteps=saved is None
                    )
        finally:
            env.close()
    print(f"{out / 'teacher.safetensors'}: {algorithm.num_timesteps} steps")


class _Job(BaseCallback):
    """What happens around PPO's loop: progress, the entropy schedule, saved states."""

    def __init__(self, config: Config, task: Task, env: VecMonitor, batch: Batch, out: Path, state_path: Path):
        super().__init__()
        self.config, self.task, self.env, self.batch = config, task, env, batch
        self.out, self.state_path = out, state_path
        self.progress = Progress(
            total=config.teacher.total_steps,
            unit="step",
            unit_scale=True,
            desc="teacher",
            smoothing=0.02,
        )
        self.started_at = self.saved_at = 0  # steps
        self.scores: deque[float] = deque(maxlen=100)  # of whole games, where an episode of training is less

    def _on_training_start(self) -> None:
        self.started_at = self.saved_at = self.model.num_timesteps
        bar = self.progress
        bar.initial = bar.n = bar.last_print_n = self.model.num_timesteps  # the rate is of the steps still to come
        bar.unpause()
        bar.refresh()

    def _on_rollout_start(self) -> None:
        """After an update and before the next rollout: the only moment at which the state is whole."""
        settings = self.config.teacher
        if self.model.num_timesteps > self.started_at:
            self.write_curve()
        if self.model.num_timesteps - self.saved_at >= settings.checkpoint_interval:
            self.save()
        done = min(1.0, self.model.num_timesteps / settings.total_steps)
        start, end = settings.entropy_coefficient, settings.entropy_coefficient_end
        self.model.ent_coef = start + (end - start) * done  # type: ignore[attr-defined]
        figures = _recent(self.model)
        if hasattr(self.batch, "driving"):
            figures["servers"] = self.batch.driving
        if figures:
            self.progress.set_postfix(figures, refresh=False)

    def _on_training_end(self) -> None:
        self.write_curve()
        self.save()

    def _on_step(self) -> bool:
        self.progress.update(self.training_env.num_envs)
        rollouts = self.model.rollout_buffer  # type: ignore[attr-defined]
        there = rollouts.present[rollouts.pos] = present(self.batch)
        self.env.episode_lengths[~there & ~self.locals["dones"]] -= 1
        metrics = [info["metrics"] for info in self.locals["infos"] if "metrics" in info]
        self.scores.extend(item["score"] for item in metrics if "score" in item)
        return True

    def write_curve(self) -> None:
        """One row about the last rollout and update."""
        if self.scores:
            self.logger.record("rollout/score", float(np.mean(self.scores)))
        self.model.dump_logs()

    def save(self) -> None:
        """Write the state to resume from, then the policy."""
        algorithm = self.model
        optimiser, groups = pack_optimiser(algorithm.policy.optimizer)
        random, numpy_values = pack_random()
        tensors = {
            **{f"policy.{name}": tensor for name, tensor in algorithm.policy.state_dict().items()},
            **optimiser,
            **random,
            **{f"env.{name}": torch.from_numpy(value) for name, value in _env_state(self.env, self.batch).items()},
            "last_observation": torch.from_numpy(np.array(algorithm._last_obs)),
            "last_starts": torch.from_numpy(np.array(algorithm._last_episode_starts)),
        }
        values = {
            "config": _sections(self.config),
            "steps": algorithm.num_timesteps,
            "updates": algorithm._n_updates,
            "optimiser_groups": groups,
            "random_numpy": numpy_values,
            "episodes": [{k: float(v) for k, v in item.items()} for item in algorithm.ep_info_buffer or ()],
            "scores": list(self.scores),
            "successes": [bool(item) for item in algorithm.ep_success_buffer or ()],
        }
        save_state(self.state_path, tensors, values)
        card = {
            "task": self.config.task,
            "role": "teacher",
            "action_names": list(self.task.action_names),
            "seed": self.config.seed,
            "steps": algorithm.num_timesteps,
            "metrics": _recent(algorithm),
            "config": self.config.to_dict(),
        }
        checkpoint.save(self.out / "teacher.safetensors", algorithm.policy.network, card)  # type: ignore[arg-type]
        self.saved_at = algorithm.num_timesteps


def _begin_from(path: Path, task: Task, config: Config, algorithm: PPO) -> None:
    """Take the weights of ``teacher.start``; optimiser, schedules and episodes begin anew.

    A policy of the same task that decides between other actions lends the rows of those that it knows by name; a new
    one, listed between two of these, begins half way from the one to the other.
    """
    policy, card = checkpoint.load(path, task.name)
    known = tuple(card["action_names"])
    other_actions = card["task"] == task.name and known != task.action_names and {*known} & {*task.action_names}
    if not other_actions or policy.input_shape != task.observation_shape:
        policy, card = load_policy(path, task)
    if not isinstance(policy, ActorCritic) or policy.config != config.policy:
        raise UserError(
            f"The policy {path} in teacher.start has another network than the configuration's section policy; give the "
            "two the same."
        )
    weights = policy.state_dict()
    if other_actions:
        for name in ("policy_head.weight", "policy_head.bias"):
            weights[name] = _between(weights[name], known, task.action_names)
        print(f"Note: {path} decides between {', '.join(known)}; other actions begin between these.", file=sys.stderr)
    algorithm.policy.network.load_state_dict(weights)  # type: ignore[union-attr]


def _between(rows: Tensor, known: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """(B, ...) rows of the wanted actions from those (A, ...) of the known ones, by name and else by place."""
    shared = [index for index, name in enumerate(wanted) if name in known]
    columns = rows[[known.index(wanted[index]) for index in shared]].reshape(len(shared), -1).T.double().numpy()
    found = np.stack([np.interp(np.arange(len(wanted)), shared, column) for column in columns], axis=1)
    return torch.from_numpy(found).to(rows.dtype).view(len(wanted), *rows.shape[1:])


def _restore(algorithm: PPO, env: VecMonitor, batch: Batch, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    prefix = "policy."
    weights = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    algorithm.policy.load_state_dict(weights)
    unpack_optimiser(algorithm.policy.optimizer, tensors, values["optimiser_groups"])
    algorithm.num_timesteps = values["steps"]
    algorithm._n_updates = values["updates"]
    algorithm.ep_info_buffer = deque(values["episodes"], maxlen=algorithm._stats_window_size)
    algorithm.ep_success_buffer = deque(values["successes"], maxlen=algorithm._stats_window_size)
    prefix = "env."
    env_state = {name[len(prefix) :]: t.numpy() for name, t in tensors.items() if name.startswith(prefix)}
    if env_state:
        env.reset()
        env.episode_returns = env_state.pop("monitor_returns")
        env.episode_lengths = env_state.pop("monitor_lengths")
        algorithm._last_obs, anew = restore_batch(batch, env_state, tensors["last_observation"].numpy())
        algorithm._last_episode_starts = tensors["last_starts"].numpy() | anew
        env.episode_returns[anew], env.episode_lengths[anew] = 0, 0
    else:
        algorithm._last_obs = env.reset()  # type: ignore[assignment]
        algorithm._last_episode_starts = np.ones(env.num_envs, bool)
    unpack_random(tensors, values["random_numpy"])


def _env_state(env: VecMonitor, batch: Batch) -> dict[str, np.ndarray]:
    get_state = getattr(batch, "get_state", None)
    if get_state is None:
        return {}
    return {
        **get_state(),
        "monitor_returns": env.episode_returns.copy(),
        "monitor_lengths": env.episode_lengths.copy(),
    }


def _sections(config: Config) -> dict[str, Any]:
    """What the teacher depends on."""
    values = config.to_dict()
    return {key: values[key] for key in ("task", "seed", "environment", "policy", "teacher")}


def _recent(algorithm: Any) -> dict[str, float]:
    """Means over the last 100 episodes."""
    result = {}
    if algorithm.ep_info_buffer:
        result["return"] = float(np.mean([item["r"] for item in algorithm.ep_info_buffer]))
        result["length"] = float(np.mean([item["l"] for item in algorithm.ep_info_buffer]))
    if algorithm.ep_success_buffer:
        result["success"] = float(np.mean(algorithm.ep_success_buffer))
    return {name: round(value, 4) for name, value in result.items()}


class _CurveWriter(KVWriter):
    """stable-baselines3's figures of each update as ``curve.csv`` and TensorBoard events.

    Rows after ``steps``, left by a run that was killed after its last saved state, are cut off.
    """

    COLUMNS = (
        ("steps", "time/total_timesteps"),
        ("return", "rollout/ep_rew_mean"),
        ("score", "rollout/score"),
        ("length", "rollout/ep_len_mean"),
        ("success", "rollout/success_rate"),
        ("learning_rate", "train/learning_rate"),
        ("approximate_kl", "train/approx_kl"),
        ("clip_fraction", "train/clip_fraction"),
        ("entropy", "train/entropy_loss"),
        ("value_loss", "train/value_loss"),
        ("explained_variance", "train/explained_variance"),
        ("steps_per_second", "time/fps"),
    )

    def __init__(self, directory: Path, steps: int):
        path = directory / "curve.csv"
        kept = []
        if steps and path.exists():
            rows = csv.reader(read_regular(path, NOTES_BYTES).decode().splitlines())
            kept = [row for row in list(rows)[1:] if row and row[0].isdigit() and int(row[0]) <= steps]
        with atomic_write(path) as raw:
            lines = [[name for name, _ in self.COLUMNS], *kept]
            raw.write("".join(",".join(line) + "\n" for line in lines).encode())
        self._csv = path.open("a", newline="")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=steps + 1 if steps else None)

    def write(self, key_values: dict[str, Any], key_excluded: dict, step: int = 0) -> None:
        """Append one row."""
        row = {**key_values, "time/total_timesteps": step}
        line = ["" if row.get(key) is None else f"{row[key]:.6g}" if key != "time/total_timesteps" else str(step)
                for _, key in self.COLUMNS]  # fmt: skip
        self._csv.write(",".join(line) + "\n")
        self._csv.flush()
        for name, key in self.COLUMNS[1:]:
            if row.get(key) is not None:
                self._board.add_scalar(f"teacher/{name}", row[key], step, walltime=time.time())

    def close(self) -> None:
        """Close both files."""
        self._csv.close()
        self._board.close()
