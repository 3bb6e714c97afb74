"""The paper's figures from measured results, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from carla_digr.evaluation.robustness import NOISE, Curves
from carla_digr.saliency.overlay import rgb_of

COLOURS = {
    "teacher": "#555555",
    "distillation only": "#0072b2",
    "distillation + L1, no maps": "#e69f00",
    "DIGR": "#d55e00",
}
# Figure 1(b) and the text beside it
PAPER_MILLISECONDS = {"Vanilla Gradient": 2.1, "Gaussian-Blur Perturbation": 970.0}


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


def success_against_epsilon(curves: Curves, band: str, success: str = "success") -> bytes:
    """Figure 8: a panel an attack, uniform noise dotted in each where it was measured.

    Args:
        curves: of ``robustness_curves``; the band is their standard deviation, cut at 0 and 1.
        band: what the points are the mean of, and over what the deviation is.
        success: what the metric is called.
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
                low, high = (mean - deviation).clip(0, 1), (mean + deviation).clip(0, 1)
                axes.fill_between(x, low, high, color=COLOURS[policy], alpha=0.13, linewidth=0)
        axes.set(title=attack, xlabel="ε (pictures in [0, 1])", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(success)
    figure.suptitle(
        f"{success.capitalize()} under attack; {band}\n"
        "Paper (Figure 8): DIGR far above distillation only, which is slightly above the teacher",
        fontsize=10,
    )
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


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
