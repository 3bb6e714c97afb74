"""Figures of driving's evaluation, as PNG bytes, and a drive as an animated picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from carla_digr.driving.control import TICK
from carla_digr.evaluation.figures import lit, png
from carla_digr.evaluation.report import Evaluation
from carla_digr.evaluation.saliency_methods import DIGR, DIGR_LINEAR, GAUSSIAN_BLUR
from carla_digr.policy import Policy, device_under, to_input
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.linear import linear_maps
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.tasks.driving import Driving
from carla_digr.tasks.driving.classes import CLASSES, RELEVANT
from carla_digr.training.rollout import greedy

CLASS_COLOURS = {
    "vehicle": "#d62728",
    "lane line": "#ffbf00",
    "barrier": "#ff7f0e",
    "guard rail": "#8c564b",
    "ego": "#111111",
    "empty road": "#9aa5b1",
    "sky": "#aed6f1",
    "vegetation": "#a9d18e",
    "building": "#c39bd3",
}
SHOWN = (DIGR_LINEAR, DIGR, GAUSSIAN_BLUR, "Vanilla Gradient")  # of the grid beside the truth
SEARCHED_SECONDS = 40.0  # in which the sequence is looked for
SEQUENCE_STEP = 0.3  # s between its frames
ANIMATION_SECONDS = 8.0


def mass_by_class(truth: dict[str, dict[str, Any]]) -> bytes:
    """A bar a method: where its mass lies, relevant classes first; see ``driving.measure``."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(truth))
    for name in CLASSES:
        shares = np.array([row["by_class"][name] or 0 for row in truth.values()])
        hatch = "" if CLASSES.index(name) < RELEVANT else "//"
        axes.barh(list(truth), shares, left=left, color=CLASS_COLOURS[name], edgecolor="white", hatch=hatch, label=name)
        left += shares
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the map's mass, by what the pixel shows (hatched: not relevant, or the ego)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.2), ncols=5, fontsize=8, frameon=False)
    return png(figure)


def truth_grid(evaluation: Evaluation, states: NDArray[np.uint8], classes: NDArray[np.int8]) -> bytes:
    """Frames with most vehicles in view, what their pixels show, and maps over them (cf. Figures 5 and 12)."""
    rows = most_traffic(classes, evaluation.config.evaluation.examples)
    pictures = states[rows].transpose(0, 2, 3, 1)
    inputs = to_input(torch.from_numpy(states[rows]))
    colours = np.array([_rgb(CLASS_COLOURS[name]) for name in CLASSES], np.uint8)
    columns = {"Frame": list(pictures), "What it shows": list(colours[classes[rows]])}
    for name in (name for name in SHOWN if name in evaluation.methods):
        maps = normalise(evaluation.methods[name](inputs))[0].numpy()
        columns[name] = [lit(picture, found) for picture, found in zip(pictures, maps, strict=True)]
    figure = Figure(figsize=(2.1 * len(columns), 2.1 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (title, column) in enumerate(columns.items()):
        axes[0, j].set_title(title.replace(" ", "\n", 1) if len(title) > 14 else title, fontsize=10)
        for i, picture in enumerate(column):
            _show(axes[i, j], picture)
    shown = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in CLASS_COLOURS.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)
    return png(figure)


def most_traffic(classes: NDArray[np.int8], count: int) -> NDArray[np.int64]:
    """The ``count`` pictures with most pixels of vehicles, one of each of as many equal stretches, in order."""
    pixels = (classes == CLASSES.index("vehicle")).sum(axis=(1, 2))
    parts = np.array_split(np.arange(len(classes)), min(count, len(classes)))
    return np.array([part[pixels[part].argmax()] for part in parts])


@dataclass(frozen=True)
class RecordedDrive:
    """Consecutive frames of one episode: pictures uint8 (T, 3, H, W), probabilities float (T, A)."""

    pictures: NDArray[np.uint8]
    probabilities: NDArray[np.float64]
    action_names: tuple[str, ...]


def record_drive(evaluation: Evaluation, seconds: float, seed: int) -> RecordedDrive:
    """The student drives, greedily, until something happens or ``seconds`` are over."""
    task = Driving(evaluation.config.environment)
    env = task.make_vec_env(1, seed)
    act = greedy(evaluation.student)
    try:
        pictures = [np.asarray(env.reset())[0]]
        while len(pictures) * TICK * evaluation.config.environment.decision_ticks < seconds:
            observations, _, dones, _ = env.step(act(pictures[-1][None]))
            if dones[0]:
                break
            pictures.append(np.asarray(observations)[0])
    finally:
        env.close()
    drive = np.stack(pictures)
    logits = _in_batches(lambda states: evaluation.student(states)[0], drive, evaluation.student)
    return RecordedDrive(drive, logits.double().softmax(dim=1).numpy(), task.action_names)


def pictures_of_a_drive(evaluation: Evaluation, seconds: float, delay: dict[str, float]) -> dict[str, bytes]:
    """Figure 6 and the animation, of the liveliest stretch of a drive: where the student steers and brakes most.

    Args:
        seconds: in which it is looked for, at most SEARCHED_SECONDS.
        delay: see ``sequence``.
    """
    drive = record_drive(evaluation, min(SEARCHED_SECONDS, seconds), evaluation.seed + 3)
    student = evaluation.student
    maps = normalise(_in_batches(lambda states: linear_maps(student, states), drive.pictures, student))[0].numpy()
    steers = 1 - drive.probabilities[:, drive.action_names.index("keep")]
    span = min(round(ANIMATION_SECONDS / TICK), len(steers))
    before = min(math.ceil(2 * delay["every_pixel"] / TICK), len(steers) - span)  # frames of maps that arrive late
    start = before + int(np.convolve(steers[before:], np.ones(span), "valid").argmax())
    return {
        "figure_sequence.png": sequence(evaluation, drive, maps, start + span // 2, delay),
        "drive.webp": animation(drive, maps, range(start, start + span)),
    }


def sequence(
    evaluation: Evaluation, drive: RecordedDrive, maps: NDArray[np.float32], middle: int, delay: dict[str, float]
) -> bytes:
    """Figure 6: frames of a drive with the map that is there when the frame is.

    DIGR's is of the frame itself. A perturbation map is begun when the one before it is finished, so that it arrives
    one to two times its computing time late.

    Args:
        middle: the frame about which the sequence lies.
        delay: seconds of one perturbation map, "every_pixel" and at the dataset's "stride".
    """
    dataset = evaluation.config.saliency_dataset
    step = round(SEQUENCE_STEP / TICK)
    columns = min(6, 2 * evaluation.config.evaluation.examples)
    first = min(max(middle - step * columns // 2, 0), len(drive.pictures) - 1 - step * (columns - 1))
    shown = [max(first, 0) + k * step for k in range(columns)]
    rows: dict[str, list[tuple[NDArray[np.uint8], str]]] = {"camera": [], "DIGR": []}
    for k, frame in enumerate(shown):
        picture = drive.pictures[frame].transpose(1, 2, 0)
        rows["camera"].append((picture, f"{k * SEQUENCE_STEP:.1f} s"))
        rows["DIGR"].append((lit(picture, maps[frame]), "of this frame"))
    for name, stride, seconds in (
        (f"perturbation,\nevery {dataset.stride}th pixel", dataset.stride, delay["stride"]),
        ("perturbation,\nevery pixel", 1, delay["every_pixel"]),
    ):
        method = partial(
            perturbation_maps,
            evaluation.teacher,
            perturbation=replace(Perturbation.from_settings(dataset), stride=stride),
        )
        rows[f"{name}\n({seconds:.2g} s a map)"] = _as_they_arrive(method, drive, shown, seconds)
    figure = Figure(figsize=(1.75 * columns + 1.2, 1.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, (name, row) in enumerate(rows.items()):
        for j, (picture, title) in enumerate(row):
            _show(axes[i, j], picture)
            axes[i, j].set_title(title, fontsize=8)
        axes[i, 0].text(-0.06, 0.5, name, transform=axes[i, 0].transAxes, ha="right", va="center", fontsize=9)
    return png(figure)


def _as_they_arrive(
    method: Callable[[torch.Tensor], torch.Tensor], drive: RecordedDrive, shown: list[int], seconds: float
) -> list[tuple[NDArray[np.uint8], str]]:
    """The newest finished map over each shown frame, and how old it is.

    Maps are computed one after another since long before, the k-th from k * seconds on, of the frame that is there
    then, and the last begins with the first shown frame or a moment before.
    """
    maps: dict[int, NDArray[np.float32]] = {}
    result = []
    for frame in shown:
        begun = math.floor((frame - shown[0]) * TICK / seconds + 1e-9) - 1
        of = max(shown[0] + math.floor(begun * seconds / TICK), 0)
        if of not in maps:
            state = to_input(torch.from_numpy(drive.pictures[of : of + 1]))
            maps[of] = normalise(method(state))[0][0].numpy()
        picture = drive.pictures[frame].transpose(1, 2, 0)
        result.append((lit(picture, maps[of]), f"{(frame - of) * TICK:.2f} s old"))
    return result


def animation(drive: RecordedDrive, maps: NDArray[np.float32], frames: range) -> bytes:
    """Camera, map over it and the policy's probabilities, as an animated WebP picture.

    A GIF of the same, in 256 colours, is ten times as large.
    """
    scale = 2
    movie = cv2.Animation()
    pictures = []
    for frame in frames:
        rgb = drive.pictures[frame].transpose(1, 2, 0)
        pair = np.concatenate([rgb, np.full((len(rgb), 2, 3), 255, np.uint8), lit(rgb, maps[frame])], axis=1)
        pair = cv2.resize(pair, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        bar = np.full((24, pair.shape[1], 3), 255, np.uint8)
        names = drive.action_names
        for k, (name, probability) in enumerate(zip(names, drive.probabilities[frame], strict=True)):
            x, width = k * bar.shape[1] // len(names), bar.shape[1] // len(names) - 6
            cv2.rectangle(bar, (x + 3, 3), (x + 3 + int(width * probability), 20), (255, 160, 90), -1)
            cv2.rectangle(bar, (x + 3, 3), (x + 3 + width, 20), (160, 160, 160), 1)
            cv2.putText(bar, name, (x + 10, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)
        pictures.append(np.ascontiguousarray(np.concatenate([pair, bar])[:, :, ::-1]))
    movie.frames = pictures
    movie.durations = [round(1000 * TICK)] * len(pictures)
    ok, data = cv2.imencodeanimation(".webp", movie, [cv2.IMWRITE_WEBP_QUALITY, 75])
    assert ok
    return bytes(data)


def _in_batches(function: Any, pictures: NDArray[np.uint8], policy: Policy) -> torch.Tensor:
    place = device_under(policy)
    with torch.no_grad():
        return torch.cat([function(to_input(batch.to(place))).cpu() for batch in torch.from_numpy(pictures).split(64)])


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


def _show(axes: Axes, picture: NDArray[np.uint8]) -> None:
    axes.imshow(picture)
    axes.set_axis_off()
