"""What the evaluation, the reports of the tasks and the figures share: the words of a report, and its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carla_digr.config import Config
from carla_digr.evaluation.saliency_methods import MapOf
from carla_digr.policy import Policy
from carla_digr.tasks import Task
from carla_digr.training.rollout import states_of

Part = Callable[[str, Callable[[], Any]], Any]
"""(name, measurement) -> its result, kept from an earlier run or measured; JSON-ready."""
Parts = Callable[[dict[str, Callable[[], Any]]], dict[str, Any]]
"""The same of several of which none needs another, on a cluster at the same time."""

# policy -> attack -> epsilon as text -> what ``spread`` gives
Curves = dict[str, dict[str, dict[str, dict[str, float]]]]


@dataclass(frozen=True)
class Evaluation:
    """What a task's report module works with.

    Attributes:
        student_path: where the student's weights lie; policies to compare it with lie beside it.
        directory: where results go, and what is kept for the next run.
        methods: the saliency methods by name.
        seed: of episodes and states that no stage has seen, nor the parts that every task has; so are the next ten.
        part, parts: keep what was measured.
    """

    config: Config
    task: Task
    teacher: Policy
    student: Policy
    student_path: Path
    directory: Path
    methods: dict[str, MapOf]
    seed: int
    part: Part
    parts: Parts


class TaskReport(Protocol):
    """A task's own part of the evaluation: a module with these functions.

    It may have ``quick(config) -> Config`` besides: the configuration of ``evaluate --quick`` where it differs from
    ``evaluate.QUICK``, which is applied before. And ``independent(evaluation)``: parts that ``measure`` asks for, name
    to measurement, of which none needs another and that other processes may measure at the same time.
    """

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Results, JSON-ready, that are added to those of every task."""

    def draw(self, evaluation: Evaluation, results: dict[str, Any]) -> dict[str, bytes]:
        """Pictures by file name, such as figure_attacks.png; ``results`` are every task's and ``measure``'s."""

    def report(self, evaluation: Evaluation, results: dict[str, Any]) -> list[str]:
        """Lines of Markdown; the pictures are added to them."""


def fresh_states(
    evaluation: Evaluation, count: int, label: str = "importance"
) -> tuple[NDArray[np.uint8], NDArray[np.int8] | None]:
    """States of the teacher's episodes that no stage has seen, and what the task knows of them.

    Args:
        label: the method of the task's batch that tells it, "importance" or "classes".

    Returns:
        uint8 (count, C, H, W), and int8 (count, H, W) or None.
    """
    dataset = evaluation.config.saliency_dataset
    environments = min(count, dataset.environments)
    interval = dataset.state_interval
    return states_of(evaluation.task, evaluation.teacher, environments, count, interval, evaluation.seed, label=label)


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def attack_table(curves: Curves, digits: int = 2) -> list[str]:
    """Lines of a Markdown table of curves under attack, mean ± standard deviation."""
    epsilons = list(next(iter(next(iter(curves.values())).values())))
    rows = [
        [
            policy,
            attack,
            *(f"{p['mean']:.{digits}f} ± {p['standard_deviation']:.{digits}f}" for p in points.values()),
        ]
        for policy, by_attack in curves.items()
        for attack, points in by_attack.items()
    ]
    return markdown_table(["policy", "attack", *(f"ε {epsilon}" for epsilon in epsilons)], rows)


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, standard_deviation over the values (n - 1 in the denominator), and standard_error of the mean."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": float(np.mean(values)),
        "standard_deviation": deviation,
        "standard_error": deviation / math.sqrt(len(values)),
    }


def known_mean(values: Any) -> Any:
    """Mean over the first axis without NaN, as plain floats; None where nothing is left."""
    with np.errstate(invalid="ignore"):
        values = np.asarray(values, float)
        valid = ~np.isnan(values)
        mean = np.where(valid, values, 0).sum(axis=0) / valid.sum(axis=0)
    return [None if np.isnan(m) else float(m) for m in mean] if mean.ndim else None if np.isnan(mean) else float(mean)


def number(value: float | None) -> str:
    """A figure of a table; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"
