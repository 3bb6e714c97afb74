"""Does Breakout teach as stable-baselines3's own Atari environments do? Learning curves of both under the same PPO.

    python tests/bench/breakout_parity.py DIR                       # three seeds of each: about an hour of one core
    python tests/bench/breakout_parity.py DIR --kinds own --seeds 3 # one more curve

Writes ``DIR/KIND_SEED.csv``: environment steps, and the mean score of the last 100 whole games as in the teacher's
``curve.csv``, which may be put beside them. A curve that is there is not computed again. Then prints the table of all
curves in DIR and draws ``DIR/parity.png``.
"""

from __future__ import annotations

import argparse
import csv
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from carla_digr.config import Config
from carla_digr.evaluation.figures import png
from carla_digr.files import atomic_write
from carla_digr.tasks import load_config, make_task
from carla_digr.tasks.breakout import STACK
from carla_digr.training import prepare_process
from carla_digr.training.progress import Progress
from carla_digr.training.teacher import make_ppo

KINDS = {"own": "carla_digr", "sb3": "stable-baselines3's make_atari_env"}
EVERY = 50_000  # steps between the table's columns


def make_env(kind: str, config: Config) -> VecEnv:
    """Environments of training: lives as episodes, signs as rewards, two pictures as the state."""
    count = config.teacher.environments
    if kind == "own":
        return make_task(config).make_vec_env(count, config.seed, evaluation=False)
    gymnasium.register_envs(ale_py)
    env = make_atari_env("BreakoutNoFrameskip-v4", n_envs=count, seed=config.seed)
    return VecTransposeImage(VecFrameStack(env, STACK))


class Curve(BaseCallback):
    """Scores of whole games; ends the training after ``steps``."""

    def __init__(self, kind: str, steps: int):
        super().__init__()
        self.kind, self.steps = kind, steps
        self.progress = Progress(total=steps, unit="step", unit_scale=True, desc=kind)
        self.scores: deque[float] = deque(maxlen=100)
        self.rows: list[tuple[int, float]] = []

    def score(self, info: dict[str, Any]) -> float | None:
        """Of the game that ended with this step, if one did."""
        if self.kind == "own":
            return info.get("metrics", {}).get("score")
        return info["episode"]["r"] if "episode" in info else None  # its Monitor lies under lives and signs

    def _on_step(self) -> bool:
        ended = (self.score(info) for info in self.locals["infos"])
        self.scores.extend(score for score in ended if score is not None)
        self.progress.update(self.training_env.num_envs)
        return not (self.rows and self.rows[-1][0] >= self.steps)

    def _on_rollout_end(self) -> None:
        if self.scores:
            self.rows.append((self.num_timesteps, float(np.mean(self.scores))))
            self.progress.set_postfix(score=self.rows[-1][1], refresh=False)


def run(kind: str, seed: int, steps: int, path: Path) -> None:
    """Train on one kind of environment and write its curve."""
    config = replace(load_config("configs/breakout.yaml"), seed=seed)
    curve = Curve(kind, steps)
    with curve.progress:  # the learning rate falls as in the whole training, of which this is the beginning
        make_ppo(config, make_env(kind, config)).learn(config.teacher.total_steps, callback=curve)
    with atomic_write(path) as file:
        file.write("".join(f"{a},{b}\n" for a, b in [("steps", "score"), *curve.rows]).encode())


def read(path: Path) -> np.ndarray:
    """Steps and score, float (N, 2)."""
    with path.open(newline="") as file:
        rows = [(float(row["steps"]), float(row["score"])) for row in csv.DictReader(file) if row["score"]]
    return np.array(rows)


def compare(directory: Path) -> None:
    """Print the table of all curves and draw them."""
    axes_figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = axes_figure.subplots()
    curves = {path.stem: read(path) for path in sorted(directory.glob("*_*.csv"))}
    last = min(curve[-1, 0] for curve in curves.values())
    columns = np.arange(EVERY, last + EVERY / 2, EVERY)
    print("| curve |", *(f"{int(step):,} |" for step in columns))
    print("|---|" + "---|" * len(columns))
    for name, curve in curves.items():
        kind, seed = name.split("_")
        values = np.interp(columns, *curve.T)
        print(f"| {KINDS[kind]}, seed {seed} |", *(f"{value:.2f} |" for value in values))
        axes.plot(*curve.T, color="C0" if kind == "own" else "C1", label=KINDS[kind], linewidth=1)
    axes.set(xlabel="environment steps", ylabel="score, last 100 games", xlim=(0, last))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.grid(alpha=0.3)
    with atomic_write(directory / "parity.png") as file:
        file.write(png(axes_figure))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200_000)
    arguments = parser.parse_args()
    prepare_process()
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            path = arguments.directory / f"{kind}_{seed}.csv"
            if not path.exists():
                run(kind, seed, arguments.steps, path)
    compare(arguments.directory)


if __name__ == "__main__":
    main()
