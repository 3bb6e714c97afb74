"""What the evaluation of driving has besides: whether the maps tell the truth, Figure 8, and a long drive.

The truth is the simulator's own instance picture (tasks.driving.classes): the paper shows pictures for driving, here
the maps are held against what each pixel shows, against the teacher's perturbation maps, against the decision (what
happens to it without the pixels that a map marks) and against the weights (what is left of a map when they are drawn
anew).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carla_digr.config import Config
from carla_digr.driving.control import TICK
from carla_digr.evaluation import driving_figures, figures
from carla_digr.evaluation.causal import asked_of, draw_causal, measure_causal, report_causal
from carla_digr.evaluation.decision import (
    maps_of,
    measure_decision,
    measure_randomised,
    report_decision,
    report_randomised,
)
from carla_digr.evaluation.report import Evaluation, attack_table, fresh_states, known_mean, markdown_table, number
from carla_digr.evaluation.robustness import independent_parts, measure_robustness
from carla_digr.evaluation.saliency_methods import GAUSSIAN_BLUR
from carla_digr.policy import to_input
from carla_digr.saliency import metrics
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.tasks.driving import Driving, DrivingEvaluation
from carla_digr.tasks.driving.classes import CLASSES, importance_of
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import greedy

# Pixels around a relevant one that count as relevant too: none; half the first convolution's stride; the standard
# deviation of the bump that perturbation maps (eq. 3) are made with, which they cannot resolve.
MARGINS = (0, 2, 5)

Frames = tuple[NDArray[np.uint8], NDArray[np.int8]]  # states (N, 3, 128, 128), classes (N, 128, 128)


def quick(config: Config) -> Config:
    """A drive takes longer than a room."""
    evaluation = replace(
        _settings(config),
        episodes=1,
        saliency_states=4,
        table_states=24,
        slow_states=4,
        attack_episodes=2,
        attack_epsilons=(0.02,),
        causal_scenes=4,
        causal_environments=2,
        attack_seconds=1.0,
        drive_seconds=20.0,
    )
    return replace(config, evaluation=evaluation)


def _settings(config: Config) -> DrivingEvaluation:
    assert isinstance(config.evaluation, DrivingEvaluation)
    return config.evaluation


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Everything of this module.

    Returns:
        "causal": ``measure_causal``, where vehicles can be taken out; "truth": method -> ``_truth_row``; "decision":
        ``measure_decision``; "randomised": ``measure_randomised``; "robustness": ``measure_robustness``; "drive":
        ``long_drive``; "perturbation_delay": seconds of one map at every pixel and at the dataset's stride.
    """
    settings, part = _settings(evaluation.config), evaluation.part
    frames = functools.cache(lambda: held_out_frames(evaluation, settings.table_states))
    maps = functools.cache(lambda name: maps_of(name, evaluation.methods[name], frames()[0], settings.slow_states))
    causal = {"causal": measure_causal(evaluation)} if asked_of(evaluation) else {}
    truth = {
        name: part(f"truth, {name}", partial(_truth_row, evaluation, frames, maps, name)) for name in evaluation.methods
    }
    decision = measure_decision(evaluation, lambda: frames()[0], maps)
    weights = measure_randomised(evaluation, lambda: frames()[0])
    robustness = measure_robustness(evaluation, *_attacked(evaluation))
    drive = part("long drive", partial(long_drive, evaluation, settings.drive_seconds))
    delay = part("perturbation delay", partial(_perturbation_delay, evaluation, frames))
    return {
        **causal,
        "truth": truth,
        "decision": decision,
        "randomised": weights,
        "robustness": robustness,
        "drive": drive,
        "perturbation_delay": delay,
    }


def independent(evaluation: Evaluation) -> dict[str, Callable[[], Any]]:
    """See ``report.TaskReport``."""
    drive = partial(long_drive, evaluation, _settings(evaluation.config).drive_seconds)
    return {"long drive": drive, **independent_parts(evaluation, *_attacked(evaluation))}


def _attacked(evaluation: Evaluation) -> tuple[str, Driving]:
    """Metric and task of what is under attack."""
    seconds = _settings(evaluation.config).attack_seconds
    return "driven", Driving(replace(evaluation.config.environment, episode_seconds=seconds))


def held_out_frames(evaluation: Evaluation, count: int) -> Frames:
    """Frames of the teacher's fresh episodes with their classes."""
    states, classes = fresh_states(evaluation, count, "classes")
    assert classes is not None
    return states, classes


def _truth_row(
    evaluation: Evaluation, frames: Callable[[], Frames], maps: Callable[[str], NDArray[np.float32]], name: str
) -> dict[str, Any]:
    """One method's maps against what the pixels show and against the teacher's perturbation maps.

    Returns:
        states: how many frames; by_class: class -> share of the mass; relevant, pointing, chance: one value for each of
        MARGINS, the share of the counted mass on relevant pixels, of maps whose maximum is on one, and of the counted
        pixels that are relevant; auc: of relevant pixels against the others; correlation, overlap: with the
        perturbation maps (rank correlation; intersection over union above the threshold); flat: maps of zeros.
    """
    found = maps(name)
    classes = frames()[1][: len(found)]
    importance = importance_of(classes)
    wide = [metrics.widened(importance, margin) for margin in MARGINS]
    reference = maps(GAUSSIAN_BLUR)
    flat = found.max(axis=(1, 2)) == 0
    shown = np.flatnonzero(~flat)
    return {
        "states": len(found),
        "by_class": dict(zip(CLASSES, known_mean(metrics.class_shares(found, classes, len(CLASSES))), strict=True)),
        "relevant": [known_mean(metrics.important_share(found, w)) for w in wide],
        "pointing": [float(metrics.pointing_game(found, w)[shown].mean()) if len(shown) else None for w in wide],
        "chance": [float((w == 1).sum() / (w >= 0).sum()) for w in wide],
        "auc": known_mean([metrics.auc(found[i][importance[i] == 1], found[i][importance[i] == 0]) for i in shown]),
        "correlation": known_mean(metrics.rank_correlation(found[: len(reference)], reference)),
        "overlap": known_mean(
            metrics.overlap(found[: len(reference)], reference, evaluation.config.saliency_dataset.threshold)
        ),
        "flat": float(flat.mean()),
    }


def long_drive(evaluation: Evaluation, seconds: float) -> dict[str, float]:
    """The student drives, by its most probable action; after an incident it goes on at another place.

    Returns:
        seconds, distance (m), overtakes, collisions, off_road, and longest, the distance (m) between two incidents.
    """
    config = replace(evaluation.config.environment, episode_seconds=seconds)
    env = Driving(config).make_vec_env(1, evaluation.seed + 2)
    act = greedy(evaluation.student)
    decisions = round(seconds / (config.decision_ticks * TICK))
    stretches: list[dict[str, float]] = []
    try:
        observations = np.asarray(env.reset())
        dones = np.zeros(1, bool)
        for _ in Progress(range(decisions), desc="long drive", unit="decision"):
            observations, _, dones, infos = env.step(act(observations))
            if "metrics" in infos[0]:
                stretches.append(infos[0]["metrics"])
        if not dones[0]:
            stretches.append(env.metrics(0))
    finally:
        env.close()
    total = {key: float(sum(s[key] for s in stretches)) for key in ("seconds", "distance", "overtakes")}
    return {
        **total,
        "collisions": float(sum(s["collision"] for s in stretches)),
        "off_road": float(sum(s["off_road"] for s in stretches)),
        "longest": float(max(s["distance"] for s in stretches)),
    }


def _perturbation_delay(evaluation: Evaluation, frames: Callable[[], Frames]) -> dict[str, float]:
    """Seconds that one of the teacher's perturbation maps takes here: at every pixel, as eq. 3 says, and as stored.

    CPU time of the one thread, which is the time by the clock on a machine with nothing else to do.
    """
    state = to_input(torch.from_numpy(frames()[0][:1]))
    dataset = evaluation.config.saliency_dataset
    seconds = {}
    for name, stride in (("every_pixel", 1), ("stride", dataset.stride)):
        start = time.process_time()
        perturbation_maps(evaluation.teacher, state, replace(Perturbation.from_settings(dataset), stride=stride))
        seconds[name] = time.process_time() - start
    return seconds


def draw(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, bytes]:
    """The figures of ``measure``'s results and of a stretch of driving."""
    episodes = evaluation.config.evaluation.attack_episodes
    band = f"{episodes} episodes a point; band: one standard deviation over the episodes"
    states, classes = held_out_frames(evaluation, 8 * evaluation.config.evaluation.examples)
    seconds = _settings(evaluation.config).drive_seconds
    return {
        **(draw_causal(evaluation) if "causal" in results else {}),
        "figure_attacks.png": figures.success_against_epsilon(results["robustness"], band, "share driven"),
        "figure_mass.png": driving_figures.mass_by_class(results["truth"]),
        "figure_truth.png": driving_figures.truth_grid(evaluation, states, classes),
        "figure_decision.png": figures.decision_curves(results["decision"]),
        "figure_randomised.png": figures.randomised_curves(results["randomised"]),
        **driving_figures.pictures_of_a_drive(evaluation, seconds, results["perturbation_delay"]),
    }


def report(evaluation: Evaluation, results: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    drive = results["drive"]
    lines = [
        *(report_causal(results["causal"]) if "causal" in results else ()),
        "## A long drive",
        "",
        f"The student, greedy, {drive['seconds']:.0f} s, going on elsewhere after an incident: "
        f"{drive['collisions']:.0f} collisions and {drive['off_road']:.0f} times off the lanes in "
        f"{drive['distance'] / 1e3:.2f} km, {drive['overtakes']:.0f} overtakes, "
        f"{drive['longest'] / 1e3:.2f} km at most without either.",
        "",
        "## Do the maps tell the truth?",
        "",
        "Relevant are vehicles, lane lines, barrier and guard rail: every pixel that shows a piece of one, exactly and "
        f"with {MARGINS[1]} and {MARGINS[2]} pixels around. The ego is not counted. mass: share of the map on them; "
        "pointing: the map's maximum is on one; AUC: of the exact pixels against all others; correlation, overlap: "
        "with the teacher's perturbation maps. Slow methods have fewer frames, as the column says.",
        "",
    ]
    columns = [*(f"mass, {m} px" for m in MARGINS), *(f"pointing, {m} px" for m in MARGINS)]
    rows = []
    for name, row in results["truth"].items():
        own = [row["auc"], row["correlation"], row["overlap"]]
        if name == GAUSSIAN_BLUR:
            own[1:] = [None, None]
        rows.append([name, *map(number, [*row["relevant"], *row["pointing"], *own]), f"{row['states']:,}"])
    chance = results["truth"]["DIGR"]["chance"]
    rows.append(["a map that is the same everywhere", *map(number, [*chance, *chance, 0.5, None, None]), ""])
    lines += markdown_table(["method", *columns, "AUC", "correlation", "overlap", "frames"], rows)
    lines += ["", "Share of the mass by what the pixel shows:", ""]
    rows = [[name, *(number(row["by_class"][c]) for c in CLASSES)] for name, row in results["truth"].items()]
    lines += markdown_table(["method", *CLASSES], rows)
    lines += ["", *report_decision(results["decision"]), *report_randomised(results["randomised"])]
    settings = _settings(evaluation.config)
    lines += [
        f"## Under attack, {settings.attack_episodes} episodes of {settings.attack_seconds:g} s",
        "",
        "Share driven before an incident, mean ± one standard deviation over the episodes.",
        "",
    ]
    return [*lines, *attack_table(results["robustness"]), ""]
