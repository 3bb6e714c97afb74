"""What the evaluation of driving has besides: whether the maps tell the truth, Figure 8, and a long drive.

The truth is the simulator's own instance picture (tasks.highway_classes): the paper shows pictures for driving, here
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
from torch import Tensor

from carla_digr.driving.control import TICK
from carla_digr.evaluation.evaluate import Evaluation, markdown_table
from carla_digr.evaluation.robustness import compared_policies, robustness_curves
from carla_digr.evaluation.saliency_methods import SLOW, Method, saliency_methods
from carla_digr.policy import Policy, to_input
from carla_digr.saliency import metrics
from carla_digr.saliency.faithfulness import exchanged_logits, randomised
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.perturbation import Perturbation, gaussian_blur, perturbation_maps
from carla_digr.tasks.driving import Driving
from carla_digr.tasks.driving.classes import CLASSES, importance_of
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import collect_states, greedy, sampled

# Pixels around a relevant one that count as relevant too: none; half the first convolution's stride; the standard
# deviation of the bump that perturbation maps (eq. 3) are made with, which they cannot resolve.
MARGINS = (0, 2, 5)
GAUSSIAN_BLUR = "Gaussian-Blur Perturbation"
REMOVED = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of the pixels
REMOVED_BLUR = 10.0  # pixels, standard deviation of what removed pixels show: no car is left of it
RANDOM, OTHER = "random pixels", "the map of another frame"  # orders of removal that know nothing of the frame
RANDOMISED = ("Vanilla Gradient", "Guided Backpropagation", GAUSSIAN_BLUR, "DIGR")
RANDOMISED_FRAMES, RANDOMISED_DRAWS = 16, 3  # of slow methods one draw

Frames = tuple[NDArray[np.uint8], NDArray[np.int8]]  # states (N, 3, 128, 128), classes (N, 128, 128)


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Everything of this module.

    Returns:
        "truth": method -> ``truth_row``; "decision": whose -> order -> ``decision_row``; "randomised": method ->
        layers, mean and standard_deviation; "robustness": ``robustness_curves``; "drive": ``long_drive``;
        "perturbation_delay": seconds of one map at every pixel and at the dataset's stride.
    """
    settings, part = evaluation.config.evaluation, evaluation.part
    frames = functools.cache(lambda: held_out_frames(evaluation, settings.table_states))
    maps = functools.cache(
        lambda name: _maps(name, evaluation.methods[name], _of(frames(), name, settings.slow_states))
    )
    truth = {
        name: part(f"truth, {name}", partial(_truth_row, evaluation, frames, maps, name)) for name in evaluation.methods
    }
    decision: dict[str, Any] = {}
    for whose, policy, names in (
        ("teacher", evaluation.teacher, [name for name in evaluation.methods if name != "DIGR"]),
        ("student", evaluation.student, ["DIGR"]),
    ):
        decision[whose] = {
            order: part(
                f"decision of the {whose}, {order}",
                partial(_decision_row, policy, frames, maps, names[-1], order, settings.slow_states, evaluation.seed),
            )
            for order in (*names, OTHER, RANDOM)
        }
    weights = {
        name: part(f"randomised, {name}", partial(_randomised_row, evaluation, frames, name)) for name in RANDOMISED
    }
    environment = replace(evaluation.config.environment, episode_seconds=settings.attack_seconds)
    policies = compared_policies(evaluation.task, evaluation.teacher, evaluation.student, evaluation.student_path)
    robustness = robustness_curves(
        Driving(environment),
        policies,
        settings.attack_episodes,
        settings.attack_epsilons,
        evaluation.seed + 1,
        part,
        metric="driven",
    )
    drive = part("long drive", partial(long_drive, evaluation, settings.drive_seconds))
    delay = part("perturbation delay", partial(_perturbation_delay, evaluation, frames))
    return {
        "truth": truth,
        "decision": decision,
        "randomised": weights,
        "robustness": robustness,
        "drive": drive,
        "perturbation_delay": delay,
    }


def held_out_frames(evaluation: Evaluation, count: int) -> Frames:
    """Frames of the teacher's fresh episodes with their classes."""
    dataset = evaluation.config.saliency_dataset
    env = evaluation.task.make_vec_env(min(count, dataset.environments), evaluation.seed)
    try:
        act = sampled(evaluation.teacher, np.random.default_rng((evaluation.seed, 1)))
        states, classes = collect_states(env, act, count, dataset.state_interval, "classes")
    finally:
        env.close()
    assert classes is not None
    return states, classes


def _of(frames: Frames, name: str, slow_states: int) -> NDArray[np.uint8]:
    """The states that a method is scored on."""
    return frames[0][:slow_states] if name in SLOW else frames[0]


def _maps(name: str, method: Method, states: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Normalised maps, float (N, H, W), of states uint8 (N, C, H, W)."""
    batches = Progress(torch.from_numpy(states).split(16), desc=f"maps, {name}", unit="batch")
    return torch.cat([normalise(method(to_input(batch)))[0] for batch in batches]).numpy()


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
        "by_class": dict(zip(CLASSES, _mean(metrics.class_shares(found, classes, len(CLASSES))), strict=True)),
        "relevant": [_mean(metrics.important_share(found, w)) for w in wide],
        "pointing": [float(metrics.pointing_game(found, w)[shown].mean()) if len(shown) else None for w in wide],
        "chance": [float((w == 1).sum() / (w >= 0).sum()) for w in wide],
        "auc": _mean([metrics.auc(found[i][importance[i] == 1], found[i][importance[i] == 0]) for i in shown]),
        "correlation": _mean(metrics.rank_correlation(found[: len(reference)], reference)),
        "overlap": _mean(
            metrics.overlap(found[: len(reference)], reference, evaluation.config.saliency_dataset.threshold)
        ),
        "flat": float(flat.mean()),
    }


def _mean(values: Any) -> Any:
    """Mean over the first axis without NaN, as plain floats; None where nothing is left."""
    with np.errstate(invalid="ignore"):
        values = np.asarray(values, float)
        valid = ~np.isnan(values)
        mean = np.where(valid, values, 0).sum(axis=0) / valid.sum(axis=0)
    return [None if np.isnan(m) else float(m) for m in mean] if mean.ndim else None if np.isnan(mean) else float(mean)


def _decision_row(
    policy: Policy,
    frames: Callable[[], Frames],
    maps: Callable[[str], NDArray[np.float32]],
    own: str,
    order: str,
    count: int,
    seed: int,
) -> dict[str, list[float]]:
    """What removing pixels in an order does to the decision (Petsiuk et al. 2018), means over ``count`` frames.

    Args:
        own: the method whose maps the order OTHER takes.
        order: a method, OTHER or RANDOM.

    Returns:
        For each of REMOVED, deletion: probability of the action that the policy prefers on the frame while the first
        pixels of the order are those of a blurred copy; kept: share of frames that still have this action; insertion:
        its probability while the first pixels are the frame's own and the others blurred.
    """
    states = to_input(torch.from_numpy(frames()[0][:count]))
    blurred = gaussian_blur(states, REMOVED_BLUR)
    if order == RANDOM:
        ranked = torch.rand(len(states), *states.shape[2:], generator=torch.Generator().manual_seed(seed))
    else:
        ranked = torch.from_numpy(maps(own if order == OTHER else order)[:count])
        ranked = ranked.roll(1, dims=0) if order == OTHER else ranked
    with torch.no_grad():
        preferred = policy(states)[0].argmax(dim=1)
    deletion = exchanged_logits(policy, states, blurred, ranked, REMOVED)
    insertion = exchanged_logits(policy, blurred, states, ranked, REMOVED)

    def probability(logits: Tensor) -> list[float]:
        chosen = preferred[:, None, None].expand(-1, len(REMOVED), 1)
        return logits.double().softmax(dim=2).gather(2, chosen).squeeze(2).mean(dim=0).tolist()

    kept = (deletion.argmax(dim=2) == preferred[:, None]).double().mean(dim=0)
    return {"deletion": probability(deletion), "kept": kept.tolist(), "insertion": probability(insertion)}


def area(curve: list[float]) -> float:
    """Mean of a curve over REMOVED."""
    return float(np.trapezoid(curve, REMOVED))


def _randomised_row(evaluation: Evaluation, frames: Callable[[], Frames], name: str) -> dict[str, Any]:
    """How alike a method's maps stay to the original ones while layers are drawn anew from the last to the first.

    Returns:
        layers: the layer that was drawn last. mean, standard_deviation: of the rank correlation with the original maps,
        over frames and draws; overlap: of the pixels above the threshold, mean. other_frame: mean rank correlation of
        original maps of different frames, what is alike without looking at the frame.
    """
    every = frames()[0]
    count = min(RANDOMISED_FRAMES, evaluation.config.evaluation.slow_states)
    states = to_input(torch.from_numpy(every[:: len(every) // count][:count]))
    dataset = evaluation.config.saliency_dataset
    perturbation = Perturbation.from_settings(dataset)
    explained = evaluation.student if name == "DIGR" else evaluation.teacher
    original = normalise(evaluation.methods[name](states))[0].numpy()
    alike: dict[str, list[NDArray[np.float64]]] = {}
    shared: dict[str, list[NDArray[np.float64]]] = {}
    for seed in Progress(range(1 if name in SLOW else RANDOMISED_DRAWS), desc=f"randomised, {name}", unit="draw"):
        for layer, broken in randomised(explained, evaluation.seed + seed):
            maps = normalise(saliency_methods(broken, broken, perturbation)[name](states))[0].numpy()
            alike.setdefault(layer, []).append(metrics.rank_correlation(maps, original))
            shared.setdefault(layer, []).append(metrics.overlap(maps, original, dataset.threshold))
    values = [np.concatenate(v) for v in alike.values()]
    return {
        "layers": list(alike),
        "mean": [_mean(v) for v in values],
        "standard_deviation": [float(np.nanstd(v)) if np.isfinite(v).any() else None for v in values],
        "overlap": [_mean(np.concatenate(v)) for v in shared.values()],
        "other_frame": _mean(metrics.rank_correlation(original, np.roll(original, 1, axis=0))),
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
    observations = np.asarray(env.reset())
    dones = np.zeros(1, bool)
    for _ in Progress(range(decisions), desc="long drive", unit="decision"):
        observations, _, dones, infos = env.step(act(observations))  # type: ignore[assignment]
        if dones[0]:
            stretches.append(infos[0]["metrics"])
    if not dones[0]:
        stretches.append(env.episodes[0].metrics(env.episodes[0].drive.frame()))
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
    from carla_digr.evaluation import driving_figures, figures

    episodes = evaluation.config.evaluation.attack_episodes
    band = f"{episodes} episodes a point; band: one standard deviation over the episodes"
    states, classes = held_out_frames(evaluation, 8 * evaluation.config.evaluation.examples)
    return {
        "figure_attacks.png": figures.success_against_epsilon(results["robustness"], band, "share driven"),
        "figure_mass.png": driving_figures.mass_by_class(results["truth"]),
        "figure_truth.png": driving_figures.truth_grid(evaluation, states, classes),
        "figure_decision.png": driving_figures.decision_curves(results["decision"]),
        "figure_randomised.png": driving_figures.randomised_curves(results["randomised"]),
        **driving_figures.pictures_of_a_drive(evaluation, results["perturbation_delay"]),
    }


def report(evaluation: Evaluation, results: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    drive = results["drive"]
    lines = [
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
        rows.append([name, *map(_text, [*row["relevant"], *row["pointing"], *own]), f"{row['states']:,}"])
    chance = results["truth"]["DIGR"]["chance"]
    rows.append(["a map that is the same everywhere", *map(_text, [*chance, *chance, 0.5, None, None]), ""])
    lines += markdown_table(["method", *columns, "AUC", "correlation", "overlap", "frames"], rows)
    lines += ["", "Share of the mass by what the pixel shows:", ""]
    rows = [[name, *(_text(row["by_class"][c]) for c in CLASSES)] for name, row in results["truth"].items()]
    lines += markdown_table(["method", *CLASSES], rows)
    lines += [
        "",
        "Does the decision depend on what a map marks? Probability of the preferred action, mean over the share of "
        "pixels that are blurred away, the most salient first (deletion, lower is better) or come back into a blurred "
        "picture (insertion, higher is better); and how often the action is another one when 10 % are blurred.",
        "",
    ]
    at = REMOVED.index(0.1)
    rows = [
        [whose, order, f"{area(row['deletion']):.3f}", f"{area(row['insertion']):.3f}", f"{1 - row['kept'][at]:.3f}"]
        for whose, by_order in results["decision"].items()
        for order, row in by_order.items()
    ]
    lines += markdown_table(["policy", "order", "deletion", "insertion", "changed at 10 %"], rows)
    lines += [
        "",
        "What is left of a map when the network's layers are drawn anew, from the last to the first (Adebayo et al. "
        "2018): rank correlation with the original map, and overlap above the threshold. In the last column the "
        "correlation of original maps of different frames.",
        "",
    ]
    rows = [
        [
            name,
            *(f"{_text(mean)}, {_text(shared)}" for mean, shared in zip(row["mean"], row["overlap"], strict=True)),
            _text(row["other_frame"]),
        ]
        for name, row in results["randomised"].items()
    ]
    lines += markdown_table(["method", *results["randomised"]["DIGR"]["layers"], "another frame"], rows)
    settings = evaluation.config.evaluation
    lines += [
        "",
        f"## Under attack, {settings.attack_episodes} episodes of {settings.attack_seconds:g} s",
        "",
        "Share driven before an incident, mean ± one standard deviation over the episodes.",
        "",
    ]
    epsilons = list(results["robustness"]["teacher"]["FGSM"])
    rows = [
        [policy, attack, *(f"{point['mean']:.2f} ± {point['standard_deviation']:.2f}" for point in points.values())]
        for policy, by_attack in results["robustness"].items()
        for attack, points in by_attack.items()
    ]
    return [*lines, *markdown_table(["policy", "attack", *(f"ε {epsilon}" for epsilon in epsilons)], rows), ""]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
