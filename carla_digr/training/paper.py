"""The paper's tables and figures on Red-Fetch-Green: Table 1 (with figure 1b's times) and Figure 8, measured here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr.attacks import ATTACKS, Attack, noise
from carla_digr.config import Config
from carla_digr.policy import ActorCritic, to_input
from carla_digr.saliency import baselines, metrics
from carla_digr.saliency.gradient import normalise, vanilla_gradient
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps, sarfa_maps
from carla_digr.tasks import Task
from carla_digr.tasks.red_fetch_green import importance_of, pictures_of
from carla_digr.training import figures
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import load_policy, run_episodes
from carla_digr.training.rooms import evaluation_rooms

Method = Callable[[Tensor], Tensor]  # states (B, C, H, W) -> raw maps (B, H, W)

# Table 1: important, unimportant, AUC.
TABLE_1 = {
    "Vanilla Gradient": (56.04, 278.10, 0.840),
    "Guided Backpropagation": (82.84, 35.67, 0.993),
    "Grad-CAM": (43.12, 364.97, 0.686),
    "SmoothGrad": (83.05, 84.76, 0.991),
    "Integrated Gradients": (67.79, 232.09, 0.900),
    "Gaussian-Blur Perturbation": (86.11, 77.81, 0.989),
    "SARFA": (58.40, 42.17, 0.895),
    "DIGR": (72.52, 0.00, 0.997),
}
SLOW = ("SmoothGrad", "Integrated Gradients", "Gaussian-Blur Perturbation", "SARFA")

# Figure 8's other policies, taken where they lie beside the student's weights.
BESIDE = {
    "distillation only": "student_distillation.safetensors",
    "distillation + L1, no maps": "student_l1.safetensors",
}


def measure(
    config: Config,
    task: Task,
    directory: Path,
    teacher: ActorCritic,
    student: ActorCritic,
    student_path: Path,
    seed: int,
    part: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, Any]:
    """Table 1 and Figure 8.

    Args:
        directory: of the evaluation; the saliency evaluation dataset is kept there.
        part: (name, measurement) -> its result, kept from an earlier run or measured.

    Returns:
        "table_1": method -> ``table_row``; "robustness": policy -> attack -> epsilon -> ``attacked_success``.

    Raises:
        UserError: the dataset or a policy beside the student is damaged.
    """
    cells = evaluation_rooms(directory, config.evaluation.table_states, seed)
    table = {
        name: part(f"Table 1, {name}", partial(table_row, config, name, method, cells))
        for name, method in table_methods(config, teacher, student).items()
    }
    policies = {"teacher": (teacher, ""), "DIGR": (student, "")}
    for name, file in BESIDE.items():
        if (student_path.parent / file).exists():
            policy, card = load_policy(student_path.parent / file, task)
            policies[name] = policy, card["weights_sha256"]
    attacks: dict[str, Attack] = {**ATTACKS, figures.NOISE: noise}
    robustness: dict[str, Any] = {}
    for policy_name, (policy, digest) in policies.items():
        for attack_name, attack in attacks.items():
            curve = robustness.setdefault(policy_name, {})[attack_name] = {}
            for epsilon in sorted({0.0, *config.evaluation.attack_epsilons}):
                of = "no attack" if epsilon == 0 else f"{attack_name} {epsilon}"  # every curve starts at the same point
                measurement = partial(
                    attacked_success, config, task, policy, attack, epsilon, seed + 1, f"{policy_name}, {of}"
                )
                curve[f"{epsilon:g}"] = part(f"{policy_name} {digest} under {of}", measurement)
    return {"table_1": table, "robustness": robustness}


def draw(
    config: Config,
    directory: Path,
    teacher: ActorCritic,
    student: ActorCritic,
    results: dict[str, Any],
    curve_path: Path,
    seed: int,
) -> dict[str, bytes]:
    """The figures as PNG bytes by file name; Figure 9 where distillation's curve is at ``curve_path``."""
    cells = evaluation_rooms(directory, config.evaluation.table_states, seed)[: config.evaluation.examples]
    pictures = pictures_of(cells)
    maps = {
        name: normalise(method(to_input(torch.from_numpy(pictures))))[0].numpy()
        for name, method in table_methods(config, teacher, student).items()
    }
    drawn = {
        "figure_1b_time.png": figures.time_per_map(results["table_1"]),
        "figure_3_maps.png": figures.map_grid(pictures, maps),
        "figure_8_attacks.png": figures.success_against_epsilon(
            results["robustness"], config.evaluation.attack_episodes
        ),
    }
    if curve_path.exists():
        table = np.genfromtxt(curve_path, delimiter=",", names=True)
        curve = {name: np.atleast_1d(table[name]) for name in ("iteration", "success")}
        success = results["performance"]["teacher, sampled"]["success"]["mean"]
        drawn["figure_9_training.png"] = figures.student_during_training(curve, success)
    return drawn


def report(config: Config, results: dict[str, Any], drawn: dict[str, bytes]) -> list[str]:
    """Lines of Markdown for ``measure``'s results and the figures."""
    lines = ["## Table 1, ours (paper)", ""]
    lines += ["| method | important, of 128 | unimportant, of 2,048 | AUC | states | ms per map |", "|" + " --- |" * 6]
    for name, row in results["table_1"].items():
        important, unimportant, auc = TABLE_1[name]
        lines.append(
            f"| {name} | {row['important']:.2f} ({important:.2f}) | {row['unimportant']:.2f} ({unimportant:.2f}) "
            f"| {row['auc']:.4f} ({auc:.3f}) | {row['states']:,} | {row['milliseconds']:.3g} |"
        )
    lines += [
        "",
        "Important: sum of the normalised map over the tiles of agent and target; unimportant: over empty floor. "
        f"Slow methods ({', '.join(SLOW)}) are scored on fewer states, as the column says.",
        "",
        f"## Success under attack, {config.evaluation.attack_episodes} episodes, mean ± one standard error",
        "",
    ]
    epsilons = list(results["robustness"]["teacher"]["FGSM"])
    lines += [
        "| policy | attack | " + " | ".join(f"ε {e}" for e in epsilons) + " |",
        "|" + " --- |" * (2 + len(epsilons)),
    ]
    for policy, by_attack in results["robustness"].items():
        for attack, points in by_attack.items():
            values = [f"{point['mean']:.2f} ± {point['standard_error']:.2f}" for point in points.values()]
            lines.append(f"| {policy} | {attack} | " + " | ".join(values) + " |")
    lines += ["", "Paper (Figure 8): DIGR far above distillation only, which is slightly above the teacher.", ""]
    for name in drawn:
        figure, _, subject = name.removesuffix(".png").removeprefix("figure_").partition("_")
        lines += [f"![Figure {figure}, {subject}]({name})", ""]
    return lines


def table_methods(config: Config, teacher: ActorCritic, student: ActorCritic) -> dict[str, Method]:
    """Table 1's eight methods in its order: seven on the teacher, and eq. 2 on the student."""
    dataset = config.saliency_dataset
    perturbation = Perturbation(dataset.radius, dataset.blur_sigma, dataset.stride)
    return {
        "Vanilla Gradient": partial(vanilla_gradient, teacher),
        "Guided Backpropagation": partial(baselines.guided_backpropagation, teacher),
        "Grad-CAM": partial(baselines.grad_cam, teacher),
        "SmoothGrad": partial(baselines.smooth_grad, teacher),
        "Integrated Gradients": partial(baselines.integrated_gradients, teacher),
        "Gaussian-Blur Perturbation": partial(perturbation_maps, teacher, settings=perturbation),
        "SARFA": partial(sarfa_maps, teacher, settings=perturbation),
        "DIGR": partial(vanilla_gradient, student),
    }


def table_row(config: Config, name: str, method: Method, cells: NDArray[np.uint8]) -> dict[str, Any]:
    """One row of Table 1, means over the states; slow methods take the first ``slow_states`` of them.

    Args:
        cells: tile numbers (N, 8, 8).

    Returns:
        important, unimportant, auc; states, how many were scored; milliseconds, the median time of one map, and
        milliseconds_deviation.
    """
    if name in SLOW:
        cells = cells[: config.evaluation.slow_states]
    maps = []
    for chunk in Progress(np.array_split(cells, -(-len(cells) // 32)), desc=name, unit="batch"):
        maps.append(normalise(method(to_input(torch.from_numpy(pictures_of(chunk)))))[0].numpy())
    scores = metrics.score(np.concatenate(maps), importance_of(cells))
    one = to_input(torch.from_numpy(pictures_of(cells[:1])))
    times = []
    for _ in range(11):
        start = time.perf_counter()
        method(one)
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "important": scores.important,
        "unimportant": scores.unimportant,
        "auc": scores.auc,
        "states": len(cells),
        "milliseconds": float(np.median(times)),
        "milliseconds_deviation": float(np.std(times)),
    }


def attacked_success(
    config: Config, task: Task, policy: ActorCritic, attack: Attack, epsilon: float, seed: int, label: str = ""
) -> dict[str, float]:
    """Success over ``attack_episodes`` episodes in which the policy, sampled, sees only attacked states.

    Returns:
        mean; standard_deviation over the episodes; standard_error of the mean.
    """
    settings = config.evaluation
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng((seed, 1))

    def act(observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        states = attack(policy, to_input(torch.from_numpy(observations)), epsilon, generator)
        with torch.no_grad():
            cumulative = policy(states)[0].double().softmax(dim=1).cumsum(dim=1).numpy()
        draws = rng.random((len(observations), 1))
        return np.minimum((cumulative < draws).sum(axis=1), policy.actions - 1)

    env = task.make_vec_env(settings.attack_episodes, seed)
    try:
        episodes = run_episodes(env, act, settings.attack_episodes, label)
    finally:
        env.close()
    values = np.array([episode["success"] for episode in episodes])
    deviation = float(values.std())
    return {
        "mean": float(values.mean()),
        "standard_deviation": deviation,
        "standard_error": deviation / math.sqrt(len(values)),
    }
