"""Whether maps are about the decision, and about the weights: what needs no knowledge of the task.

The decision: what happens to it without the pixels that a map marks. The weights: what is left of a map when they are
drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr.evaluation.report import Evaluation, known_mean, markdown_table, number
from carla_digr.evaluation.saliency_methods import DIGR, GAUSSIAN_BLUR, SARFA, MapOf
from carla_digr.policy import Policy, to_input
from carla_digr.saliency import METHODS, metrics
from carla_digr.saliency.faithfulness import exchanged_logits, randomised
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.perturbation import gaussian_blur
from carla_digr.training.progress import Progress

REMOVED = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of the pixels
REMOVED_BLUR = 10.0  # pixels, standard deviation of what removed pixels show: no car is left of it
RANDOM, OTHER = "random pixels", "the map of another frame"  # orders of removal that know nothing of the frame
RANDOMISED = (METHODS["vg"].title, METHODS["gbp"].title, GAUSSIAN_BLUR, DIGR)
RANDOMISED_FRAMES, RANDOMISED_DRAWS = 16, 3  # of slow methods one draw

States = Callable[[], NDArray[np.uint8]]  # (N, C, H, W), collected when they are first asked for
Maps = Callable[[str], NDArray[np.float32]]  # by method's name, normalised (N, H, W); of slow methods fewer


def maps_of(name: str, method: MapOf, states: NDArray[np.uint8], slow_states: int) -> NDArray[np.float32]:
    """Normalised maps, float (N, H, W), of states uint8 (N, C, H, W); of a slow method of the first ``slow_states``."""
    scored = torch.from_numpy(states[:slow_states] if method.slow else states)
    batches = Progress(scored.split(16), desc=f"maps, {name}", unit="batch")
    return torch.cat([normalise(method(to_input(batch)))[0] for batch in batches]).numpy()


def measure_decision(evaluation: Evaluation, states: States, maps: Maps) -> dict[str, Any]:
    """Deletion and insertion: whose decision -> order of the pixels -> ``decision_row``."""
    count = evaluation.config.evaluation.slow_states
    result: dict[str, Any] = {}
    for whose, policy, own in (("teacher", evaluation.teacher, SARFA), ("student", evaluation.student, DIGR)):
        names = [name for name, method in evaluation.methods.items() if method.policy is policy]
        result[whose] = {
            order: evaluation.part(
                f"decision of the {whose}, {order}",
                partial(decision_row, policy, states, maps, own, order, count, evaluation.seed),
            )
            for order in (*names, OTHER, RANDOM)
        }
    return result


def measure_randomised(evaluation: Evaluation, states: States) -> dict[str, Any]:
    """Layers drawn anew: method -> ``randomised_row``."""
    return {
        name: evaluation.part(f"randomised, {name}", partial(randomised_row, evaluation, states, name))
        for name in RANDOMISED
        if name in evaluation.methods and evaluation.methods[name].policy.offers == "layers"
    }


def decision_row(
    policy: Policy, states: States, maps: Maps, own: str, order: str, count: int, seed: int
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
    frames = to_input(torch.from_numpy(states()[:count]))
    blurred = gaussian_blur(frames, REMOVED_BLUR)
    if order == RANDOM:
        ranked = torch.rand(len(frames), *frames.shape[2:], generator=torch.Generator().manual_seed(seed))
    else:
        ranked = torch.from_numpy(maps(own if order == OTHER else order)[:count])
        ranked = ranked.roll(1, dims=0) if order == OTHER else ranked
    with torch.no_grad():
        preferred = policy(frames)[0].argmax(dim=1)
    deletion = exchanged_logits(policy, frames, blurred, ranked, REMOVED)
    insertion = exchanged_logits(policy, blurred, frames, ranked, REMOVED)

    def probability(logits: Tensor) -> list[float]:
        chosen = preferred[:, None, None].expand(-1, len(REMOVED), 1)
        return logits.double().softmax(dim=2).gather(2, chosen).squeeze(2).mean(dim=0).tolist()

    kept = (deletion.argmax(dim=2) == preferred[:, None]).double().mean(dim=0)
    return {"deletion": probability(deletion), "kept": kept.tolist(), "insertion": probability(insertion)}


def area(curve: list[float]) -> float:
    """Mean of a curve over REMOVED."""
    return float(np.trapezoid(curve, REMOVED))


def randomised_row(evaluation: Evaluation, states: States, name: str) -> dict[str, Any]:
    """How alike a method's maps stay to the original ones while layers are drawn anew from the last to the first.

    Returns:
        layers: the layer that was drawn last. mean, standard_deviation: of the rank correlation with the original maps,
        over frames and draws; overlap: of the pixels above the threshold, mean. other_frame: mean rank correlation of
        original maps of different frames, what is alike without looking at the frame.
    """
    every = states()
    count = min(RANDOMISED_FRAMES, evaluation.config.evaluation.slow_states, len(every))
    frames = to_input(torch.from_numpy(every[:: len(every) // count][:count]))
    dataset = evaluation.config.saliency_dataset
    method = evaluation.methods[name]
    original = normalise(method(frames))[0].numpy()
    alike: dict[str, list[NDArray[np.float64]]] = {}
    shared: dict[str, list[NDArray[np.float64]]] = {}
    for seed in Progress(range(1 if method.slow else RANDOMISED_DRAWS), desc=f"randomised, {name}", unit="draw"):
        for layer, broken in randomised(method.policy, evaluation.seed + seed):
            maps = normalise(replace(method, policy=broken)(frames))[0].numpy()
            alike.setdefault(layer, []).append(metrics.rank_correlation(maps, original))
            shared.setdefault(layer, []).append(metrics.overlap(maps, original, dataset.threshold))
    values = [np.concatenate(v) for v in alike.values()]
    return {
        "layers": list(alike),
        "mean": [known_mean(v) for v in values],
        "standard_deviation": [float(np.nanstd(v)) if np.isfinite(v).any() else None for v in values],
        "overlap": [known_mean(np.concatenate(v)) for v in shared.values()],
        "other_frame": known_mean(metrics.rank_correlation(original, np.roll(original, 1, axis=0))),
    }


def report_decision(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown for ``measure_decision``."""
    at = REMOVED.index(0.1)
    rows = [
        [whose, order, f"{area(row['deletion']):.3f}", f"{area(row['insertion']):.3f}", f"{1 - row['kept'][at]:.3f}"]
        for whose, by_order in results.items()
        for order, row in by_order.items()
    ]
    return [
        "Does the decision depend on what a map marks? Probability of the preferred action, mean over the share of "
        "pixels that are blurred away, the most salient first (deletion, lower is better) or come back into a blurred "
        "picture (insertion, higher is better); and how often the action is another one when 10 % are blurred.",
        "",
        *markdown_table(["policy", "order", "deletion", "insertion", "changed at 10 %"], rows),
        "",
    ]


def report_randomised(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown for ``measure_randomised``."""
    if not results:
        return ["The policies show no layers that could be drawn anew.", ""]
    lines = [
        "What is left of a map when the network's layers are drawn anew, from the last to the first (Adebayo et al. "
        "2018): rank correlation with the original map, and overlap above the threshold. In the last column the "
        "correlation of original maps of different frames.",
        "",
    ]
    rows = [
        [
            name,
            *(f"{number(mean)}, {number(shared)}" for mean, shared in zip(row["mean"], row["overlap"], strict=True)),
            number(row["other_frame"]),
        ]
        for name, row in results.items()
    ]
    layers = next(iter(results.values()))["layers"]
    return [*lines, *markdown_table(["method", *layers, "another frame"], rows), ""]
