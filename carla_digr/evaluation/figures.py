"""The paper's figures from measured results, as PNG bytes."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from carla_digr.evaluation.decision import OTHER, RANDOM, REMOVED
from carla_digr.evaluation.report import Curves
from carla_digr.evaluation.robustness import NOISE
from carla_digr.evaluation.saliency_methods import GAUSSIAN_BLUR
from carla_digr.saliency.overlay import overlay, rgb_of

COLOURS = {
    "teacher": "#555555",
    "distillation only": "#0072b2",
    "distillation + L1, no maps": "#e69f00",
    "DIGR": "#d55e00",
}
METHOD_COLOURS = {"DIGR": COLOURS["DIGR"], GAUSSIAN_BLUR: "#009e73", "Vanilla Gradient": COLOURS["teacher"]}
OBJECT_COLOURS = ("#ff5a36", "#ffb000", "#35c2ff", "#b98bff", "#4fd07a", "#9aa5b1")  # by effect, the largest first
# Figure 1(b) and the text beside it
PAPER_MILLISECONDS = {"Vanilla Gradient": 2.1, GAUSSIAN_BLUR: 970.0}


def time_per_map(rows: dict[str, dict[str, Any]], size: tuple[int, ...]) -> bytes:
    """Figure 1(b): time per map by method, logarithmic, beside the paper's two.

    Args:
        rows: method -> "milliseconds" and "milliseconds_deviation".
        size: height and width of the states, pixels.
    """
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    names = sorted(rows, key=lambda name: rows[name]["milliseconds"])
    values = [rows[name]["milliseconds"] for name in names]
    colours = [COLOURS["DIGR"] if name == "DIGR" else "#9aa5b1" for name in names]
    axes.barh(names, values, color=colours)
    for y, name in enumerate(names):
        text = f"{rows[name]['milliseconds']:.3g} ± {rows[name]['milliseconds_deviation']:.2g} ms"
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        if name in PAPER_MILLISECONDS:
            axes.plot(PAPER_MILLISECONDS[name], y, "D", color="black", markersize=5)
            text = f"paper: {PAPER_MILLISECONDS[name]:g} ms"
            axes.annotate(
                text, (PAPER_MILLISECONDS[name], y), (7, 0), textcoords="offset points", va="center", fontsize=9
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min(values) / 2, max(*values, *PAPER_MILLISECONDS.values()) * 30)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time per map, ms (logarithmic)")
    axes.set_title(
        f"Time per map, {size[0]}x{size[1]} pixels, one thread of this machine\n(paper: 128x128 pixels, RTX 2080 Ti)",
        fontsize=10,
    )
    return png(figure)


def success_against_epsilon(curves: Curves, band: str, success: str = "success", share: bool = True) -> bytes:
    """Figure 8: a panel an attack, uniform noise dotted in each where it was measured.

    Args:
        curves: of ``robustness_curves``; the band is their standard deviation.
        band: what the points are the mean of, and over what the deviation is.
        success: what the metric is called.
        share: it lies in [0, 1], as the paper's does.
    """
    attacks = [name for name in next(iter(curves.values())) if name != NOISE]
    figure = Figure(figsize=(3.3 * len(attacks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
    for axes, attack in zip(panels, attacks, strict=True):
        for policy, by_attack in curves.items():
            for name in (NOISE, attack):
                if name not in by_attack:
                    continue
                x = np.array([float(epsilon) for epsilon in by_attack[name]])
                points = by_attack[name].values()
                mean, deviation = (np.array([p[key] for p in points]) for key in ("mean", "standard_deviation"))
                if name == NOISE:
                    axes.plot(x, mean, ":", color=COLOURS[policy], linewidth=1)
                    continue
                axes.plot(x, mean, marker="o", markersize=4, color=COLOURS[policy], label=policy)
                low, high = mean - deviation, mean + deviation
                if share:
                    low, high = low.clip(0, 1), high.clip(0, 1)
                axes.fill_between(x, low, high, color=COLOURS[policy], alpha=0.13, linewidth=0)
        axes.set(title=attack, xlabel="ε (pictures in [0, 1])")
        if share:
            axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(success)
    paper = "\nPaper (Figure 8): DIGR far above distillation only, which is slightly above the teacher" if share else ""
    figure.suptitle(f"{success.capitalize()} under attack; {band}{paper}", fontsize=10)
    handles, _ = panels[0].get_legend_handles_labels()
    noise = Line2D([], [], color="black", linestyle=":", linewidth=1, label=f"{NOISE} of that size")
    figure.legend(handles=[*handles, noise], loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return png(figure)


def student_during_training(curve: dict[str, NDArray[np.float64]], teacher: float) -> bytes:
    """Figure 9: the student's success against iterations, beside the teacher's.

    Args:
        curve: columns "iteration" and "success" of distillation's curve.csv; NaN before the first episode ended.
        teacher: its success.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    measured = np.isfinite(curve["success"])
    axes.plot(curve["iteration"][measured], curve["success"][measured], color=COLOURS["DIGR"], label="student (DIGR)")
    axes.axhline(teacher, color=COLOURS["teacher"], linestyle="--", label="teacher")
    axes.set(xlabel="distillation iteration", ylabel="success, last 100 episodes", ylim=(0, 1.03))
    axes.set_title("The student's performance during training (paper: it reaches the teacher's)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return png(figure)


def decision_curves(decision: dict[str, dict[str, dict[str, list[float]]]]) -> bytes:
    """Deletion and insertion curves of teacher and student; see ``decision.measure_decision``."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    palette = ["#cc79a7", "#56b4e9", "#e69f00", "#0072b2", "#f0e442", "#8c564b"]
    for row, (whose, by_order) in zip(panels, decision.items(), strict=True):
        others = itertools.cycle(palette)
        for order, curves in by_order.items():
            baseline = order in (OTHER, RANDOM)
            colour = "black" if baseline else METHOD_COLOURS.get(order) or next(others)
            style = {OTHER: "--", RANDOM: ":"}.get(order, "-")
            for axes, kind in zip(row, ("deletion", "insertion"), strict=True):
                axes.plot(REMOVED, curves[kind], style, color=colour, marker=".", markersize=4, label=order)
                axes.set_title(f"{kind}, the {whose}'s decision", fontsize=10)
                axes.set_xscale("symlog", linthresh=0.01)
                axes.set_xticks(REMOVED, [f"{share:g}" for share in REMOVED], fontsize=8)
                axes.minorticks_off()
                axes.grid(alpha=0.3)
        row[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        row[0].set_ylabel("probability of the preferred action")
    for axes in panels[1]:
        axes.set_xlabel("share of the pixels, the most salient first")
    return png(figure)


def randomised_curves(randomised: dict[str, dict[str, Any]]) -> bytes:
    """How alike the maps stay while layers are drawn anew; see ``decision.measure_randomised``."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, row in randomised.items():
        mean = [1.0, *(math.nan if m is None else m for m in row["mean"])]
        deviation = np.array([0.0, *(s or 0 for s in row["standard_deviation"])])
        colour = METHOD_COLOURS.get(name, "#0072b2")
        axes.plot(mean, marker="o", color=colour, label=name)
        axes.fill_between(range(len(mean)), mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
        if row["other_frame"] is not None:
            axes.axhline(row["other_frame"], color=colour, linestyle=":", linewidth=1)
    layers = next(iter(randomised.values()))["layers"]
    axes.set_xticks(range(len(layers) + 1), ["trained", *(f"+ {layer}" for layer in layers)], fontsize=8)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(ylabel="rank correlation with the original map", xlabel="layers drawn anew, from the last to the first")
    axes.set_title("Layers drawn anew (dotted: maps of different frames with each other)", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def map_grid(pictures: NDArray[np.uint8], maps: dict[str, NDArray[np.float32]]) -> bytes:
    """Figures 3 to 5 and 10 to 12: a row a state, a column a method.

    Args:
        pictures: uint8 (N, C, H, W).
        maps: method -> float (N, H, W) in [0, 1].
    """
    columns: dict[str, NDArray[Any]] = {"State": rgb_of(pictures), **maps}
    figure = Figure(figsize=(1.6 * len(columns) + 0.6, 1.6 * len(pictures) + 0.6), layout="constrained")
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for j, (title, column) in enumerate(columns.items()):
        title = {"DIGR": "DIGR\n(the student)"}.get(title, title.replace(" ", "\n", 1))
        axes[0, j].set_title(title, fontsize=10, fontweight="bold" if title.startswith("DIGR") else "normal")
        for i, picture in enumerate(column):
            shown = axes[i, j].imshow(picture, cmap="inferno", vmin=0, vmax=1)
            axes[i, j].set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.6, aspect=40, pad=0.01, label="saliency, of each map's maximum")
    return png(figure)


@dataclass(frozen=True)
class ObjectsOfState:
    """A row of ``causal_grid``.

    Attributes:
        state: uint8 (C, H, W).
        names, masks, effects: of its K objects: text, bool (K, H, W), float (K,).
        maps: method -> float (H, W), not negative, and its mass on each object, float (K,).
    """

    state: NDArray[np.uint8]
    names: list[str]
    masks: NDArray[np.bool_]
    effects: NDArray[np.float64]
    maps: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def causal_grid(rows: list[ObjectsOfState]) -> bytes:
    """A row a state: the frame, what taking out each object does, and the maps over it with what they say of the first.

    The objects of the largest effects are outlined, the thicker the larger, and have the colour of their bar; those
    that hardly have one are not.
    """
    titles = list(rows[0].maps)
    figure = Figure(figsize=(2.1 * (len(titles) + 1) + 3.6, 2.35 * len(rows) + 0.7), layout="constrained")
    panels = figure.subplots(len(rows), len(titles) + 2, squeeze=False)
    for row, axes in zip(rows, panels, strict=True):
        picture = rgb_of(row.state[None])[0]
        order = np.argsort(-row.effects)[: len(OBJECT_COLOURS)]
        shown = {int(k): colour for k, colour in zip(order, OBJECT_COLOURS, strict=False)}
        axes[0].imshow(picture)
        for k, colour in reversed(shown.items()):
            share = row.effects[k] / max(row.effects.max(), 1e-30)
            if share > 0.02:
                _outline(axes[0], row.masks[k], colour, 0.8 + 2 * share)
        axes[1].barh(range(len(shown)), row.effects[list(shown)], color=list(shown.values()))
        axes[1].set_yticks(range(len(shown)), [row.names[k] for k in shown], fontsize=8)
        axes[1].tick_params(axis="x", labelsize=8)
        axes[1].invert_yaxis()
        axes[1].spines[["top", "right"]].set_visible(False)
        first = int(order[0])
        for panel, title in zip(axes[2:], titles, strict=True):
            if title not in row.maps:
                panel.set_axis_off()
                continue
            found, masses = row.maps[title]
            total = max(float(found.sum()), 1e-30)
            panel.imshow(lit(picture, (found / max(found.max(), 1e-30)).astype(np.float32)))
            _outline(panel, row.masks[first], OBJECT_COLOURS[0], 0.8)
            said = row.names[int(masses.argmax())] if masses.any() else "nothing"
            panel.set_xlabel(f"{100 * masses[first] / total:.0f} % on it; most: {said}", fontsize=8)
        for panel in (axes[0], *axes[2:]):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
    for panel, title in zip(panels[0], ["frame", "KL without each object", *titles], strict=True):
        panel.set_title(f"{title} (eq. 2)" if title == "Vanilla Gradient" else title, fontsize=10)
    figure.suptitle(
        'Which object decides, and what the maps say; "it": the object of the largest effect, outlined in the maps',
        fontsize=10,
    )
    return png(figure)


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str, width: float) -> None:
    """The edge of a mask, drawn between the pixels."""
    scale = 4  # so that an edge of one pixel has an inside
    enlarged = np.pad(mask, 1).astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    for edge in cv2.findContours(enlarged, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
        points = np.concatenate([edge[:, 0], edge[:1, 0]]) / scale - 1.5 + 0.5 / scale
        axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=width)


def lit(picture: NDArray[np.uint8], found: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A map in colours over the darkened grey picture."""
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    return overlay(np.repeat((grey * 0.45).astype(np.uint8)[:, :, None], 3, axis=2), np.sqrt(found), opacity=1.0)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
