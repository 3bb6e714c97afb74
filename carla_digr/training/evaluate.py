"""Stage 4: how well teacher and student act, and how good their saliency is.

Performance: the task's metrics over the same fresh episodes for every policy, beside a random one and, where the task
has an action that does nothing, one that always takes it. Saliency: on fresh states of the teacher's episodes, against
the teacher's perturbation maps, and against the truth where the task knows which pixels matter.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from carla_digr import checkpoint
from carla_digr.config import Config, EvaluationConfig
from carla_digr.files import atomic_write
from carla_digr.policy import ActorCritic, to_input
from carla_digr.saliency import metrics
from carla_digr.saliency.gradient import normalise, vanilla_gradient
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.tasks import Task, make_task
from carla_digr.training import paper
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import Act, collect_states, greedy, load_policy, run_episodes, sampled

QUICK = EvaluationConfig(
    episodes=16,
    saliency_states=8,
    examples=3,
    table_states=200,
    slow_states=8,
    attack_episodes=4,
    attack_epsilons=(0.04,),
)


def evaluate(
    config: Config,
    out: Path,
    teacher_path: Path | None = None,
    student_path: Path | None = None,
    quick: bool = False,
) -> None:
    """Measure, and write ``results.json``, ``report.md`` and pictures to ``OUT/evaluation``.

    On Red-Fetch-Green with the paper's tables and figures. ``quick`` measures a little of everything, to
    ``OUT/evaluation-quick``.

    A killed evaluation keeps the parts that it had finished. Without paths the weights of ``OUT`` are taken, or those
    that ship with the package.

    Raises:
        UserError: weights are missing, damaged or of another task.
    """
    if quick:
        config = replace(config, evaluation=QUICK)
    task = make_task(config)
    student_path = student_path or _default_weights(config, out, "student")
    teacher, teacher_card = load_policy(teacher_path or _default_weights(config, out, "teacher"), task)
    student, student_card = load_policy(student_path, task)
    directory = out / ("evaluation-quick" if quick else "evaluation")
    parts = _Parts(directory / "parts.json", config, teacher_card, student_card)
    performance = {
        name: parts.get(f"performance of {name}", partial(_performance, config, task, act, name))
        for name, act in _contestants(config, task, teacher, student).items()
    }
    states, importance, reference = _reference(config, task, teacher)
    saliency = parts.get("saliency", partial(_saliency, config, teacher, student, states, importance, reference))
    results = {
        "task": config.task,
        "seed": config.seed,
        "config": config.to_dict(),
        "teacher": _identity(teacher_card),
        "student": _identity(student_card),
        "performance": performance,
        "saliency": saliency,
    }
    pictures = {"examples.png": _examples(config, teacher, student, states, reference)}
    report = _report(results)
    if config.task == "red_fetch_green":
        seed = _evaluation_seed(config) + 2
        results |= paper.measure(config, task, directory, teacher, student, student_path, seed, parts.get)
        curve = student_path.parent / "distill" / "curve.csv"
        drawn = paper.draw(config, directory, teacher, student, results, curve, seed)
        report = "\n".join([report, "", *paper.report(config, results, drawn)])
        pictures |= drawn
    for name, picture in pictures.items():
        with atomic_write(directory / name) as file:
            file.write(picture)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("report.md", report)):
        with atomic_write(directory / name) as file:
            file.write((text + "\n").encode())
    print(report)
    print(f"{directory}: results.json, report.md, {', '.join(pictures)}")


def _default_weights(config: Config, out: Path, role: str) -> Path:
    own = out / f"{role}.safetensors"
    shipped = checkpoint.WEIGHTS_DIRECTORY / f"{config.task}_{role}.safetensors"
    return shipped if shipped.exists() and not own.exists() else own


def _evaluation_seed(config: Config) -> int:
    return config.seed + 3_000_003  # no stage before has seen these episodes


def _contestants(
    config: Config, task: Task, teacher: ActorCritic, student: ActorCritic
) -> dict[str, Callable[[VecEnv], Act]]:
    """Every policy to measure, made for the environments that it is to act in; each draws from its own generator."""

    def rng(k: int) -> np.random.Generator:
        return np.random.default_rng((_evaluation_seed(config), k))

    actions = len(task.action_names)
    random = rng(0)
    contestants: dict[str, Callable[[VecEnv], Act]] = {
        "teacher, sampled": lambda env: sampled(teacher, rng(1)),
        "student, sampled": lambda env: sampled(student, rng(1)),
        "teacher, greedy": lambda env: greedy(teacher),
        "student, greedy": lambda env: greedy(student),
        "random": lambda env: lambda observations: random.integers(actions, size=len(observations)),
    }
    idle = task.idle_action
    if idle is not None:
        name = f"always {task.action_names[idle]}"
        contestants[name] = lambda env: lambda observations: np.full(len(observations), idle)
    if task.expert is not None:
        contestants["expert with full state"] = task.expert
    return contestants


def _performance(
    config: Config, task: Task, contestant: Callable[[VecEnv], Act], name: str
) -> dict[str, dict[str, float]]:
    """Mean and standard error of each of the task's metrics."""
    settings = config.evaluation
    env = task.make_vec_env(min(settings.environments, settings.episodes), _evaluation_seed(config))
    try:
        episodes = run_episodes(env, contestant(env), settings.episodes, name)
    finally:
        env.close()
    result = {}
    for metric in episodes[0]:
        values = np.array([episode[metric] for episode in episodes])
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
        result[metric] = {"mean": float(values.mean()), "standard_error": error}
    return result


def _reference(
    config: Config, task: Task, teacher: ActorCritic
) -> tuple[NDArray[np.uint8], NDArray[np.int8] | None, Tensor]:
    """Fresh states of the teacher's episodes, their importance, and the teacher's normalised perturbation maps."""
    settings, dataset = config.evaluation, config.saliency_dataset
    env = task.make_vec_env(dataset.environments, _evaluation_seed(config) + 1)
    try:
        act = sampled(teacher, np.random.default_rng((_evaluation_seed(config), 2)))
        states, importance = collect_states(env, act, settings.saliency_states, dataset.state_interval)
    finally:
        env.close()
    perturbation = Perturbation(dataset.radius, dataset.blur_sigma, dataset.stride)
    maps = [
        perturbation_maps(teacher, to_input(torch.from_numpy(state[None])), perturbation)
        for state in Progress(states, unit="map", desc="reference maps")
    ]
    return states, importance, normalise(torch.cat(maps))[0]


def _saliency(
    config: Config,
    teacher: ActorCritic,
    student: ActorCritic,
    states: NDArray[np.uint8],
    importance: NDArray[np.int8] | None,
    reference: Tensor,
) -> dict[str, dict[str, float | None]]:
    """Scores of each method's maps, means over the states.

    share: of a map's mass where the teacher's perturbation map is at or below the threshold. agreement: AUC against the
    pixels above it. important, unimportant, auc: Table 1, None without truth. flat: share of maps without a gradient.
    milliseconds: median time of one map.
    """
    inputs = to_input(torch.from_numpy(states))
    dataset = config.saliency_dataset
    perturbation = Perturbation(dataset.radius, dataset.blur_sigma, dataset.stride)
    methods: dict[str, partial[Tensor]] = {
        "DIGR: student, vanilla gradient": partial(vanilla_gradient, student),
        "teacher, vanilla gradient": partial(vanilla_gradient, teacher),
        "teacher, Gaussian-blur perturbation": partial(perturbation_maps, teacher, settings=perturbation),
    }
    kept = (reference > dataset.threshold).numpy()
    results = {}
    for name, method in methods.items():
        known = method.func is perturbation_maps
        raw = reference if known else torch.cat([method(batch) for batch in inputs.split(64)])
        normalised, flags = normalise(raw)
        maps, flat = normalised.numpy(), flags.numpy()
        scored = kept.any(axis=(1, 2)) & ~flat
        mass = maps.sum(axis=(1, 2))[scored]
        row: dict[str, float | None] = {
            "share": float(((maps * ~kept).sum(axis=(1, 2))[scored] / mass).mean()),
            "agreement": float(
                np.mean([metrics.auc(maps[i][kept[i]], maps[i][~kept[i]]) for i in np.flatnonzero(scored)])
            ),
            "flat": float(flat.mean()),
            "milliseconds": _median_milliseconds(partial(method, inputs[:1])),
        }
        truth = metrics.score(maps, importance) if importance is not None else None
        for column in ("important", "unimportant", "auc"):
            row[column] = getattr(truth, column) if truth else None
        results[name] = row
    return results


def _median_milliseconds(function: Callable[[], Any], repeats: int = 11) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


def _examples(
    config: Config, teacher: ActorCritic, student: ActorCritic, states: NDArray[np.uint8], reference: Tensor
) -> bytes:
    """Picture grid as PNG: state, DIGR map, perturbation map and vanilla gradient of the teacher (cf. figure 3)."""
    import io

    from matplotlib.figure import Figure

    rows = np.linspace(0, len(states) - 1, min(config.evaluation.examples, len(states))).astype(int)
    inputs = to_input(torch.from_numpy(states[rows]))
    columns = {
        "State": states[rows].transpose(0, 2, 3, 1),
        "DIGR": normalise(vanilla_gradient(student, inputs))[0].numpy(),
        "Gaussian-blur perturbation\nof the teacher": reference[rows].numpy(),
        "Vanilla gradient\nof the teacher": normalise(vanilla_gradient(teacher, inputs))[0].numpy(),
    }
    figure = Figure(figsize=(2.2 * len(columns), 2.2 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=10)
        for i, picture in enumerate(pictures):
            axes[i, j].imshow(picture, cmap="inferno", vmin=0, vmax=1 if picture.ndim == 2 else None)
            axes[i, j].set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _report(results: dict[str, Any]) -> str:
    names = {name: f"{card['weights_sha256'][:12]}, {card['steps']} steps" for name, card in
             (("teacher", results["teacher"]), ("student", results["student"]))}  # fmt: skip
    settings = results["config"]["evaluation"]
    lines = [
        f"# Evaluation: {results['task']}",
        "",
        f"Teacher {names['teacher']}; student {names['student']}; seed {results['seed']}.",
        "",
        f"## Performance, {settings['episodes']} episodes each, mean ± standard error",
        "",
    ]
    metric_names = list(next(iter(results["performance"].values())))
    lines += _table(
        ["policy", *metric_names],
        [
            [policy, *(f"{row[m]['mean']:.4g} ± {row[m]['standard_error']:.2g}" for m in metric_names)]
            for policy, row in results["performance"].items()
        ],
    )
    lines += [
        "",
        f"## Saliency, {settings['saliency_states']} fresh states",
        "",
        "share: of a map's mass outside the teacher's perturbation map (lower is better). agreement: AUC against that "
        "map (higher is better). important, unimportant, auc: against the truth, where the task knows it.",
        "",
    ]
    columns = ("share", "agreement", "important", "unimportant", "auc", "flat", "milliseconds")
    lines += _table(
        ["map", *columns],
        [
            [name, *("-" if row[c] is None else f"{row[c]:.4g}" for c in columns)]
            for name, row in results["saliency"].items()
        ],
    )
    return "\n".join([*lines, "", "![Examples](examples.png)"])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _identity(card: dict[str, Any]) -> dict[str, Any]:
    return {key: card.get(key) for key in ("weights_sha256", "steps", "seed", "commit", "metrics")}


class _Parts:
    """Finished parts of an evaluation, on disk; of other weights or settings they are measured again."""

    def __init__(self, path: Path, config: Config, *cards: dict[str, Any]):
        self.path = path
        values = config.to_dict()
        sections = {key: values[key] for key in ("seed", "environment", "saliency_dataset", "evaluation")}
        self.key = {"weights": [card["weights_sha256"] for card in cards], **sections}
        self.finished: dict[str, Any] = {}
        try:
            stored = json.loads(path.read_bytes())
            if stored["key"] == self.key:
                self.finished = stored["finished"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a cache: without it everything is measured

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of this name, measured unless it is there."""
        if name not in self.finished:
            self.finished[name] = measure()
            with atomic_write(self.path) as file:
                file.write(json.dumps({"key": self.key, "finished": self.finished}).encode())
        return self.finished[name]
