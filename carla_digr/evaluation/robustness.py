"""How policies fare under attack: a task's metric against epsilon, as in the paper's Figure 8."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from carla_digr.attacks import ATTACKS, Attack, noise
from carla_digr.evaluation.report import Curves, Evaluation, Parts, spread
from carla_digr.policy import Policy, device_under, to_input
from carla_digr.tasks import Task
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import draw_actions, load_policy, run_episodes, sample_actions

NOISE = "uniform noise"
CHUNK = 128  # states attacked together

# Policies to compare, taken where they lie beside the student's weights: STUDENT_distillation.safetensors and so on.
BESIDE = {"distillation only": "distillation", "distillation + L1, no maps": "l1"}


def compared_policies(task: Task, teacher: Policy, student: Policy, student_path: Path) -> dict[str, Policy]:
    """Figure 8's policies by name: teacher, those of BESIDE that are there, DIGR.

    Raises:
        UserError: one beside the student is damaged or of another task.
    """
    policies = {"teacher": teacher}
    for name, suffix in BESIDE.items():
        path = student_path.with_name(f"{student_path.stem}_{suffix}.safetensors")
        if path.exists():
            policies[name] = load_policy(path, task)[0].to(device_under(student))
    return {**policies, "DIGR": student}


def measure_robustness(evaluation: Evaluation, metric: str = "success", task: Task | None = None) -> Curves:
    """``robustness_curves`` of Figure 8's policies by the evaluation's settings.

    Args:
        metric: see there.
        task: whose episodes are attacked; None: the evaluation's own.

    Raises:
        UserError: a policy beside the student is damaged.
    """
    return _curves(_of_evaluation(evaluation, metric, task), evaluation.parts)


def independent_parts(
    evaluation: Evaluation, metric: str = "success", task: Task | None = None
) -> dict[str, Callable[[], Any]]:
    """The parts that ``measure_robustness`` asks for, by name, none of which needs another; arguments as there."""
    return dict(_of_evaluation(evaluation, metric, task).values())


def _of_evaluation(evaluation: Evaluation, metric: str, task: Task | None) -> _Measures:
    settings = evaluation.config.evaluation
    return _measures(
        task or evaluation.task,
        compared_policies(evaluation.task, evaluation.teacher, evaluation.student, evaluation.student_path),
        settings.attack_episodes,
        settings.attack_epsilons,
        evaluation.seed + 1,
        metric,
        (*ATTACKS, NOISE),
    )


def robustness_curves(
    task: Task,
    policies: dict[str, Policy],
    episodes: int,
    epsilons: Sequence[float],
    seed: int,
    parts: Parts,
    metric: str = "success",
    attacks: Sequence[str] = (*ATTACKS, NOISE),
) -> Curves:
    """Every policy under every attack, over the same episodes, from epsilon 0 on.

    Args:
        episodes: for each policy, attack and epsilon.
        epsilons: sizes of the attacks, pictures in [0, 1]; 0 is added.
        seed: of episodes, attacks and actions.
        parts: keeps what was measured.
        metric: which of the task's metrics is the success, or "return".
        attacks: names from ATTACKS, and NOISE.
    """
    return _curves(_measures(task, policies, episodes, epsilons, seed, metric, attacks), parts)


# (policy, attack, by its name or None) -> name of the part, and what measures it
_Measures = dict[tuple[str, str | None], tuple[str, Callable[[], Any]]]


def _measures(
    task: Task,
    policies: dict[str, Policy],
    episodes: int,
    epsilons: Sequence[float],
    seed: int,
    metric: str,
    attacks: Sequence[str],
) -> _Measures:
    known: dict[str, Attack] = {**ATTACKS, NOISE: noise}
    sizes = sorted({*epsilons} - {0.0})

    def measure(policy: Policy, attack: Attack, sizes: Sequence[float], label: str) -> dict[str, dict[str, float]]:
        runs = attacked_episodes(task, policy, attack, sizes, episodes, seed, label)
        return {f"{size:g}": spread([run[metric] for run in runs[size]]) for size in sizes}

    found: _Measures = {}
    for name, policy in policies.items():
        weights = hashlib.sha256(safetensors.torch.save(policy.state_dict())).hexdigest()[:12]
        for attack in (None, *attacks):
            label = f"{name}, {attack or 'no attack'}"
            how = (noise, [0.0]) if attack is None else (known[attack], sizes)
            found[name, attack] = f"{label} on {weights}", partial(measure, policy, *how, label)
    return found


def _curves(measures: _Measures, parts: Parts) -> Curves:
    found = parts(dict(measures.values()))
    curves: Curves = {}
    clean: dict[str, dict[str, float]] = {}
    for (policy, attack), (name, _) in measures.items():
        if attack is None:
            clean, curves[policy] = found[name], {}
        else:
            curves[policy][attack] = {**clean, **found[name]}
    return curves


def attacked_episodes(
    task: Task,
    policy: Policy,
    attack: Attack,
    epsilons: Sequence[float],
    episodes: int,
    seed: int,
    label: str = "",
) -> dict[float, list[dict[str, float]]]:
    """Whole episodes of a policy, sampled, that sees only attacked states; all epsilons advance together.

    The episodes and the draws of the actions are the same for every epsilon, policy and attack. Episodes that have
    ended are attacked no more, and their environments rest, where they can.

    Where the task has a limit of environments, see ``Task.most_environments``, they take their turns instead, one
    epsilon after the other, and an environment drives several episodes.

    Returns:
        Per epsilon the metrics and the "return" of each episode, in the order of the environments or as they ended.
    """
    most = getattr(task, "most_environments", None)
    if most is not None:
        return {size: _by_turns(task, policy, attack, size, episodes, seed, label, most) for size in epsilons}
    generator, place = torch.Generator().manual_seed(seed), device_under(policy)
    envs = [task.make_vec_env(episodes, seed) for _ in epsilons]
    draws = [np.random.default_rng((seed, 1)) for _ in epsilons]
    sizes = torch.tensor(epsilons, dtype=torch.float32).view(-1, 1, 1, 1)
    running = np.ones((len(epsilons), episodes), bool)
    returns = np.zeros((len(epsilons), episodes))
    finished: list[list[dict[str, float]]] = [[{}] * episodes for _ in epsilons]
    resting = [getattr(env, "resting", np.zeros(episodes, bool)) for env in envs]
    try:
        observations = [np.asarray(env.reset()) for env in envs]
        with Progress(total=running.size, unit="episode", desc=label) as progress:
            while running.any():
                seen = np.concatenate([o[r] for o, r in zip(observations, running, strict=True)])
                size = sizes[np.nonzero(running)[0]]
                probabilities = []
                for chunk, chunk_size in zip(torch.from_numpy(seen).split(CHUNK), size.split(CHUNK), strict=True):
                    states = attack(policy, to_input(chunk.to(place)), chunk_size.to(place), generator)
                    with torch.no_grad():
                        probabilities.append(policy(states)[0].cpu().double().softmax(dim=1).numpy())
                uniform = np.stack([rng.random(episodes) for rng in draws])
                actions = np.zeros(running.shape, np.int64)
                actions[running] = draw_actions(np.concatenate(probabilities), uniform[running])
                for k in np.flatnonzero(running.any(axis=1)):
                    observed, rewards, dones, infos = envs[k].step(actions[k])
                    observations[k] = np.asarray(observed)
                    returns[k] += rewards
                    for i in np.flatnonzero(dones & running[k]):
                        finished[k][i] = {**infos[i]["metrics"], "return": float(returns[k, i])}
                        running[k, i], resting[k][i] = False, True
                        progress.update()
    finally:
        for env in envs:
            env.close()
    return dict(zip(epsilons, finished, strict=True))


def _by_turns(
    task: Task, policy: Policy, attack: Attack, epsilon: float, episodes: int, seed: int, label: str, most: int
) -> list[dict[str, float]]:
    generator, rng, place = torch.Generator().manual_seed(seed), np.random.default_rng((seed, 1)), device_under(policy)

    def act(observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        size = torch.full((len(observations), 1, 1, 1), epsilon, device=place)
        states = attack(policy, to_input(torch.from_numpy(observations).to(place)), size, generator)
        with torch.no_grad():
            return sample_actions(policy(states)[0].cpu(), rng)

    env = task.make_vec_env(min(episodes, most), seed)
    try:
        return run_episodes(env, act, episodes, label)
    finally:
        env.close()
