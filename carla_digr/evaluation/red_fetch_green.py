"""What the evaluation of Red-Fetch-Green has besides: the paper's Table 1, Figure 8 and Figure 9, measured here."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carla_digr.evaluation import figures
from carla_digr.evaluation.causal import draw_causal, measure_causal, report_causal
from carla_digr.evaluation.report import Evaluation, attack_table, markdown_table
from carla_digr.evaluation.robustness import independent_parts, measure_robustness
from carla_digr.evaluation.rooms import evaluation_rooms
from carla_digr.evaluation.saliency_methods import MapOf
from carla_digr.policy import to_input
from carla_digr.saliency import metrics
from carla_digr.saliency.gradient import normalise
from carla_digr.tasks.red_fetch_green import importance_of, pictures_of
from carla_digr.training.progress import Progress

# Table 1 of the paper: important, unimportant, AUC.
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


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """What decides, Table 1 and Figure 8.

    Returns:
        "causal": ``measure_causal``; "table_1": method -> ``table_row``; "robustness": ``measure_robustness``.

    Raises:
        UserError: the saliency evaluation dataset or a policy beside the student is damaged.
    """
    settings = evaluation.config.evaluation
    causal = measure_causal(evaluation)
    cells = evaluation_rooms(evaluation.directory, settings.table_states, evaluation.seed)
    table = {}
    for name, method in evaluation.methods.items():
        scored = cells[: settings.slow_states] if method.slow else cells
        table[name] = evaluation.part(f"Table 1, {name}", partial(table_row, name, method, scored))
    return {"causal": causal, "table_1": table, "robustness": measure_robustness(evaluation)}


independent = independent_parts


def draw(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, bytes]:
    """What decides, Figure 8, and Figure 9 where distillation's curve lies beside the student's weights."""
    episodes = evaluation.config.evaluation.attack_episodes
    band = f"{episodes} episodes a point; band: one standard deviation over the episodes"
    drawn = draw_causal(evaluation)
    drawn["figure_attacks.png"] = figures.success_against_epsilon(results["robustness"], band)
    student_path = evaluation.student_path
    curve_path = student_path.with_name(f"{student_path.stem}_curve.csv")  # as it ships
    if not curve_path.exists():
        curve_path = student_path.parent / "distill" / "curve.csv"
    if curve_path.exists():
        table = np.genfromtxt(curve_path, delimiter=",", names=True)
        curve = {name: np.atleast_1d(table[name]) for name in ("iteration", "success")}
        success = results["performance"]["teacher, sampled"]["success"]["mean"]
        drawn["figure_training.png"] = figures.student_during_training(curve, success)
    return drawn


def report(evaluation: Evaluation, results: dict[str, Any]) -> list[str]:
    """Lines of Markdown for what decides, Table 1 and the attacks."""
    rows = []
    for name, row in results["table_1"].items():
        ours = [f"{row['important']:.2f}", f"{row['unimportant']:.2f}", f"{row['auc']:.4f}"]
        if name in TABLE_1:
            important, unimportant, auc = TABLE_1[name]
            paper = [f"{important:.2f}", f"{unimportant:.2f}", f"{auc:.3f}"]
            ours = [f"{own} ({theirs})" for own, theirs in zip(ours, paper, strict=True)]
        rows.append([name, *ours, f"{row['states']:,}"])
    columns = ["method", "important, of 128", "unimportant, of 2,048", "AUC", "states"]
    lines = [*report_causal(results["causal"]), "## Table 1, ours (paper)", "", *markdown_table(columns, rows), ""]
    lines += [
        "Important: sum of the normalised map over the tiles of agent and target; unimportant: over empty floor. "
        "AUCs are comparable with the paper's, sums are not: it does not give the size of its pictures.",
        "",
        f"## Success under attack, {evaluation.config.evaluation.attack_episodes} episodes, "
        "mean ± one standard deviation over the episodes",
        "",
    ]
    lines += attack_table(results["robustness"])
    return [*lines, "", "Paper (Figure 8): DIGR far above distillation only, which is slightly above the teacher.", ""]


def table_row(name: str, method: MapOf, cells: NDArray[np.uint8]) -> dict[str, Any]:
    """One row of Table 1, means over rooms of tile numbers (N, 8, 8): important, unimportant, auc; states is N."""
    maps = []
    for chunk in Progress(
        np.array_split(cells, -(-len(cells) // 32)), desc=f"Table 1, {name}", unit="batch", mininterval=1
    ):
        maps.append(normalise(method(to_input(torch.from_numpy(pictures_of(chunk)))))[0].numpy())
    scores = metrics.score(np.concatenate(maps), importance_of(cells))
    return {
        "important": scores.important,
        "unimportant": scores.unimportant,
        "auc": scores.auc,
        "states": len(cells),
    }
