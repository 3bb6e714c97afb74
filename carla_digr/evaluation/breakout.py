"""What the evaluation of Breakout has besides: the full-game score, whether maps show ball and paddle, and play to see.

Where ball and paddle are is read from the emulator's RAM (tasks.breakout). The paper shows pictures of maps only
(Figures 4 and 11), so these figures have nothing of the paper's to stand beside.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from carla_digr.config import Config
from carla_digr.evaluation.causal import draw_causal, measure_causal, report_causal
from carla_digr.evaluation.report import Evaluation, fresh_states, markdown_table, number
from carla_digr.evaluation.saliency_methods import DIGR_LINEAR, MapOf
from carla_digr.policy import to_input
from carla_digr.saliency import metrics
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.overlay import overlay
from carla_digr.tasks.breakout import BALL, CLASSES, FRAME_SKIP, PADDLE, SCREEN, BreakoutVecEnv, importance_of
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import sampled

PAPER_SCORE = 320  # of the teacher
MARGINS = (0, 2, 4)  # pixels around ball and paddle that count too: none, half of the first stride, and all of it
UNIFORM = "every pixel alike"
PLAY_STEPS = 150  # of the GIF: 10 s

Truth = tuple[NDArray[np.uint8], NDArray[np.int8]]  # states (N, 2, 84, 84), classes (N, 84, 84)


def quick(config: Config) -> Config:
    """A good game takes half a minute to compute."""
    environment = replace(config.environment, max_frames=min(config.environment.max_frames, 3000))
    return replace(config, environment=environment, evaluation=replace(config.evaluation, episodes=8))


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """Maps against what decides, and against ball and paddle.

    Returns:
        "causal": ``measure_causal``; "truth": method -> ``truth_row``, and one of a map that marks every pixel alike.
    """
    settings = evaluation.config.evaluation
    causal = measure_causal(evaluation)
    truth = functools.cache(lambda: _held_out_states(evaluation))
    rows = {}
    methods: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {**evaluation.methods, UNIFORM: _uniform}
    for name, method in methods.items():
        slow = isinstance(method, MapOf) and method.slow
        count = min(settings.saliency_states, settings.slow_states if slow else settings.saliency_states)
        rows[name] = evaluation.part(f"ball and paddle, {name}", partial(_row, name, method, truth, count))
    return {"causal": causal, "truth": rows}


def draw(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, bytes]:
    """What decides, and the student's play, and the same with its linearised map over the game's colours."""
    return {**draw_causal(evaluation), "play.gif": _play(evaluation)}


def report(evaluation: Evaluation, results: dict[str, Any]) -> list[str]:
    """Lines of Markdown for the scores and the maps."""
    settings = evaluation.config.evaluation
    scores = {name: row["score"] for name, row in results["performance"].items()}
    lines = [f"## Score of whole games, {settings.episodes} each (paper's teacher: {PAPER_SCORE})", ""]
    lines += markdown_table(
        ["policy", "mean", "standard deviation"],
        [[name, f"{row['mean']:.1f}", f"{row['standard_deviation']:.1f}"] for name, row in scores.items()],
    )
    lines += [
        "",
        *report_causal(results["causal"]),
        f"## Maps against ball and paddle, {settings.saliency_states} fresh states (the paper has pictures only)",
        "",
        "Shares of a map's mass on ball and paddle in either picture of the state, and within some pixels of them; "
        "pointing: states whose largest value is within that distance; AUC: ball and paddle against all else. "
        f"Slow methods on {min(settings.slow_states, settings.saliency_states)} states.",
        "",
    ]
    distances = [f"within {margin}" if margin else "on them" for margin in MARGINS]
    columns = ["method", "ball", "paddle"]
    columns += [f"share {d}" for d in distances] + [f"pointing {d}" for d in distances] + ["AUC"]
    lines += markdown_table(
        columns,
        [[name, *map(number, _numbers(row))] for name, row in results["truth"].items()],
    )
    return [*lines, ""]


def _numbers(row: dict[str, Any]) -> list[float | None]:
    """What the report's table shows of a ``truth_row``."""
    by_distance = [row[column][str(margin)] for column in ("share", "pointing") for margin in MARGINS]
    return [row["ball"], row["paddle"], *by_distance, row["auc"]]


def truth_row(maps: NDArray[np.float32], classes: NDArray[np.int8]) -> dict[str, Any]:
    """Scores of maps float (N, 84, 84) against classes int8 (N, 84, 84), means over the states that have a map.

    Returns:
        ball, paddle: share of the mass on them; share, pointing: by margin in pixels as text; auc; states, how many
        had a map. None where none had.
    """
    known = maps.any(axis=(1, 2)) & (classes > 0).any(axis=(1, 2))
    maps, classes = maps[known], classes[known]
    if not known.any():
        nothing = {str(margin): None for margin in MARGINS}
        return {"ball": None, "paddle": None, "share": nothing, "pointing": nothing, "auc": None, "states": 0}
    importance = importance_of(classes)
    shares = metrics.class_shares(maps, classes, len(CLASSES)).mean(axis=0)
    wide = {str(margin): metrics.widened(importance, margin) for margin in MARGINS}
    return {
        "ball": float(shares[BALL]),
        "paddle": float(shares[PADDLE]),
        "share": {name: float(metrics.important_share(maps, i).mean()) for name, i in wide.items()},
        "pointing": {name: float(metrics.pointing_game(maps, i).mean()) for name, i in wide.items()},
        "auc": metrics.score(maps, importance).auc,
        "states": len(maps),
    }


def _row(name: str, method: Callable[[torch.Tensor], torch.Tensor], truth: Any, count: int) -> dict[str, Any]:
    states, classes = truth()
    batches = Progress(to_input(torch.from_numpy(states[:count])).split(32), desc=f"truth, {name}", unit="batch")
    maps = torch.cat([normalise(method(batch))[0] for batch in batches]).numpy()
    return truth_row(maps, classes[:count])


def _uniform(states: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(states), *states.shape[2:])


def _held_out_states(evaluation: Evaluation) -> Truth:
    """States of the teacher's games, and what their pixels show."""
    states, classes = fresh_states(evaluation, evaluation.config.evaluation.saliency_states, "classes")
    assert classes is not None
    return states, classes


def _play(evaluation: Evaluation) -> bytes:
    """An animated GIF, 15 pictures a second, 320x210: the game, and the same under the student's map."""
    env = evaluation.task.make_vec_env(1, evaluation.seed + 1)
    assert isinstance(env, BreakoutVecEnv)
    act = sampled(evaluation.student, np.random.default_rng((evaluation.seed + 1, 1)))
    method = evaluation.methods[DIGR_LINEAR]
    observations = np.asarray(env.reset())
    pictures = []
    for _ in Progress(range(PLAY_STEPS), desc="play", unit="step"):
        screen = env.games[0].ale.getScreenRGB()
        saliency = normalise(method(to_input(torch.from_numpy(observations))))[0][0].numpy()
        enlarged = cv2.resize(saliency, SCREEN[::-1], interpolation=cv2.INTER_LINEAR)
        laid_over = overlay(screen, enlarged.astype(np.float32, copy=False))
        pictures.append(Image.fromarray(np.concatenate([screen, laid_over], axis=1)))
        observations = np.asarray(env.step(act(observations))[0])
    file = io.BytesIO()
    milliseconds = round(1000 * FRAME_SKIP / 60)
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    return file.getvalue()
