"""This project beside others on the same work, in one run, and how its times grow: ``docs/performance.md``'s figures.

    pip install -r requirements/bench.txt
    python tests/bench/side_by_side.py OUT

Each pair runs by turns in this process on one thread; medians of processor time. Others' methods run as their authors
publish them: Greydanus et al. 2018 and Puri et al. 2020 with a forward pass a place, their formulas written out here.
Writes ``results.json``, ``pairs.png`` and ``growth.png`` and prints a table. What is not installed is left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from captum.attr import Saliency
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from torch import Tensor

import carla_digr
from carla_digr.config import PolicyConfig
from carla_digr.driving.benchmark import column, measure_steps
from carla_digr.explainer import Explainer
from carla_digr.policy import ActorCritic
from carla_digr.saliency.baselines import grad_cam
from carla_digr.saliency.compiled import CompiledNetwork
from carla_digr.saliency.gradient import map_weights, vanilla_gradient
from carla_digr.saliency.linear import linear_maps
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps, sarfa_maps
from carla_digr.simulator.road import Road
from carla_digr.simulator.world import Camera, World
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.training import prepare_process

PACKAGES = ("torch", "captum", "grad-cam", "stable-baselines3", "minigrid", "highway-env", "numba", "numpy")
PLACES = 5  # pixels between the centres of Greydanus' maps, as published
VEHICLES = 28

Work = Callable[[], object]


def pairs() -> Iterator[tuple[str, str, Work, Work]]:
    """Name of the work, of the other, ours, theirs."""
    loaded = carla_digr.load_policy("driving_teacher")
    policy = loaded.network
    assert isinstance(policy, ActorCritic)
    state = torch.from_numpy(InProcessDrive(64).reset(5).image.transpose(2, 0, 1).copy()).float()[None] / 255.0

    saliency = Saliency(lambda states: policy(states)[0].softmax(dim=1).square().sum(dim=1) / 2)
    yield (
        "eq. 2's map, 128x128",
        "captum Saliency",
        partial(live_map, CompiledNetwork(policy), state),
        lambda: saliency.attribute(state.clone().requires_grad_(True)).amax(dim=1),
    )
    if importlib.util.find_spec("pytorch_grad_cam"):
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        class Logits(torch.nn.Module):
            """The policy as a classifier."""

            def __init__(self) -> None:
                super().__init__()
                self.policy = policy

            def forward(self, states: Tensor) -> Tensor:
                return self.policy(states)[0]

        cam = GradCAM(Logits(), [policy.convolutions[-1]])
        yield (
            "Grad-CAM, 128x128",
            "pytorch-grad-cam",
            lambda: grad_cam(policy, state, 1),
            lambda: cam(state, [ClassifierOutputTarget(1)]),
        )
    settings = Perturbation(5.0, 3.0, PLACES, "logits")
    yield (
        "perturbation map, every 5th pixel",
        "Greydanus' method",
        lambda: perturbation_maps(policy, state, settings),
        lambda: one_by_one(policy, state, lambda z, other: 0.5 * float((z - other).square().sum())),
    )
    yield (
        "SARFA, every 5th pixel",
        "SARFA's method",
        lambda: sarfa_maps(policy, state, settings),
        lambda: one_by_one(policy, state, sarfa_of_authors),
    )
    yield f"ten highway steps with 128x128 pictures, {VEHICLES} vehicles", "highway-env", *highways()
    yield "PPO, 64x64 rooms, rollouts and update", "stable-baselines3, MiniGrid's wrapper", *learners()


def live_map(network: CompiledNetwork, state: Tensor) -> np.ndarray:
    """Eq. 2's map of a state, forward pass included, as a live drive has it."""
    logits, _, hidden, _ = network.decide(state.numpy())
    return network.gradient_map(map_weights(torch.from_numpy(logits)).numpy(), hidden)


def one_by_one(policy: ActorCritic, state: Tensor, score: Callable[[Tensor, Tensor], float]) -> np.ndarray:
    """Greydanus et al. 2018, eq. 1: each place's mask is made, blurred, blended in, and decided on by itself."""
    picture = state[0].permute(1, 2, 0).numpy()
    blurred = gaussian_filter(picture, (3.0, 3.0, 0.0))
    with torch.no_grad():
        before = policy(state)[0][0]
        found = np.zeros([len(range(0, size, PLACES)) for size in picture.shape[:2]])
        for row, y in enumerate(range(0, picture.shape[0], PLACES)):
            for column_, x in enumerate(range(0, picture.shape[1], PLACES)):
                mask = np.zeros(picture.shape[:2])
                mask[y, x] = 1.0
                mask = gaussian_filter(mask, 5.0)
                mask = (mask / mask.max())[..., None]
                mixed = picture * (1.0 - mask) + blurred * mask
                after = policy(torch.from_numpy(mixed.transpose(2, 0, 1)[None].astype(np.float32)))[0][0]
                found[row, column_] = score(before, after)
    return found


def sarfa_of_authors(z: Tensor, other: Tensor) -> float:
    """Puri et al. 2020, eq. 1 to 5, of one place."""
    p, q = z.softmax(dim=0).numpy(), other.softmax(dim=0).numpy()
    action = int(p.argmax())
    dp = float(p[action] - q[action])
    if dp <= 0.0:
        return 0.0
    rest, other_rest = (np.delete(v.numpy(), action) for v in (z, other))
    rest, other_rest = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (rest, other_rest))
    k = 1.0 / (1.0 + float((other_rest * np.log(other_rest / rest)).sum()))
    return 2.0 * k * dp / (k + dp)


def highways() -> tuple[Work, Work]:
    """A step of 0.05 s with a picture, ours and highway-env's."""
    road = Road.ring()
    world = World(road)
    ids = world.spawn_traffic(0, VEHICLES, oncoming=0)
    for actor, place in zip(ids, column(road, VEHICLES), strict=True):
        world.place(actor, *place)
    camera = Camera(
        parent=ids[0], width=128, height=128, fov=48.0, x=-9.5, y=0.0, z=4.2, pitch=-0.16, yaw=0.0, roll=0.0
    )

    def ours() -> None:
        for _ in range(10):
            world.step(0.05)
            world.render(camera)

    if not importlib.util.find_spec("highway_env"):
        return ours, ours
    import gymnasium
    import highway_env  # noqa: F401

    settings = {
        "vehicles_count": VEHICLES - 1,
        "simulation_frequency": 20,
        "policy_frequency": 20,
        "duration": 1e9,
        "offscreen_rendering": True,
        "screen_width": 128,
        "screen_height": 128,
    }
    env = gymnasium.make("highway-v0", config=settings, render_mode="rgb_array")
    env.reset(seed=0)

    def theirs() -> None:
        for _ in range(10):
            _, _, terminated, truncated, _ = env.step(1)
            env.render()
            if terminated or truncated:
                env.reset()

    return ours, theirs


def learners() -> tuple[Work, Work]:
    """A rollout and its update with the same settings: our rooms and network, MiniGrid's Fetch and SB3's CnnPolicy."""
    import gymnasium
    from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

    from carla_digr.tasks import load_config, make_task
    from carla_digr.training.teacher import make_ppo
    from carla_digr.training.vec_env import as_vec_env

    config = load_config(Path(__file__).parents[2] / "configs/red_fetch_green.yaml")
    teacher = config.teacher
    batch = make_task(config).make_vec_env(teacher.environments, 0, evaluation=False)
    ours = make_ppo(config, VecMonitor(as_vec_env(batch)))

    def room() -> gymnasium.Env:
        env = gymnasium.make("MiniGrid-Fetch-8x8-N3-v0")
        return ImgObsWrapper(RGBImgPartialObsWrapper(env, tile_size=9))  # 63x63

    theirs = PPO(
        "CnnPolicy",
        DummyVecEnv([room] * teacher.environments),
        n_steps=teacher.rollout_steps,
        batch_size=teacher.minibatch_size,
        n_epochs=teacher.epochs,
        device="cpu",
    )
    steps = teacher.rollout_steps * teacher.environments

    def learn(algorithm: PPO) -> None:
        algorithm.learn(steps, reset_num_timesteps=False)

    return lambda: learn(ours), lambda: learn(theirs)


def by_turns(ours: Work, theirs: Work, seconds: float = 8.0) -> tuple[float, float]:
    """Median processor time of each, s."""
    took: tuple[list[float], list[float]] = [], []
    ours(), theirs()
    until = time.perf_counter() + seconds
    while len(took[0]) < 3 or (time.perf_counter() < until and len(took[0]) < 200):
        for work, times in zip((ours, theirs), took, strict=True):
            begun = time.process_time()
            work()
            times.append(time.process_time() - begun)
    return float(np.median(took[0])), float(np.median(took[1]))


def growth() -> dict[str, dict[int, float]]:
    """Milliseconds of processor time by size: of a picture, of a batch (a state), of the traffic (a step)."""
    found: dict[str, dict[int, float]] = {
        name: {} for name in ("picture, eq. 2", "picture, linear", "batch", "vehicles")
    }
    for side in (64, 128, 256, 512):
        policy = ActorCritic(PolicyConfig(((16, 8, 4), (32, 4, 2), (32, 3, 2)), 256), 3, side, side, 4).eval()
        maps = (partial(of, policy, torch.rand(1, 3, side, side)) for of in (vanilla_gradient, linear_maps))
        gradient, linear = by_turns(*maps, seconds=3.0)
        found["picture, eq. 2"][side], found["picture, linear"][side] = 1e3 * gradient, 1e3 * linear
    policy = carla_digr.load_policy("driving_student").network
    for batch in (1, 4, 16, 64):
        one, several = (partial(vanilla_gradient, policy, torch.rand(count, 3, 128, 128)) for count in (1, batch))
        found["batch"][batch] = 1e3 * by_turns(one, several, 3.0)[1] / batch
    for vehicles in (10, 20, 50, 100, 200):
        found["vehicles"][vehicles] = 1e3 / measure_steps(vehicles, 128, 1.0).per_cpu_second
    return found


def live() -> dict[str, float]:
    """Milliseconds of processor time of a frame's parts, the driving student's; medians of 200 frames by turns."""
    loaded = carla_digr.load_policy("driving_student")
    explainers = {name: Explainer(loaded.network, loaded.card, name) for name in ("digr", "linear")}
    drive = InProcessDrive(64)
    picture = drive.reset(5).image
    parts: dict[str, list[float]] = {"forward alone": [], "decision": [], **{name: [] for name in explainers}}
    state = torch.from_numpy(picture.transpose(2, 0, 1).copy()).float()[None] / 255.0
    for _ in range(200):
        begun = time.process_time()
        with torch.inference_mode():
            loaded.network(state)
        parts["forward alone"].append(time.process_time() - begun)
        begun = time.process_time()
        decision = explainers["digr"].decide(picture)
        parts["decision"].append(time.process_time() - begun)
        for name, explainer in explainers.items():
            begun = time.process_time()
            explainer.explain(decision)
            parts[name].append(time.process_time() - begun)
    return {name: 1e3 * float(np.median(times)) for name, times in parts.items()}


def indicator(states: int = 3) -> dict[str, float]:
    """Of every pixel's map: its time, that of whole passes in batches, and the share of pixels on their side of 0.1."""
    policy = carla_digr.load_policy("driving_teacher").network

    class Whole:
        """The network, of which nothing is known."""

        output = "logits"

        def __call__(self, states: Tensor) -> tuple[Tensor, None]:
            return policy(states)[0], None

    drive = InProcessDrive(64)
    found: dict[str, list[float]] = {}
    for seed in range(states):
        state = torch.from_numpy(drive.reset(seed).image.transpose(2, 0, 1).copy()).float()[None] / 255.0
        ways = {
            "whole, batches of 256": (Whole(), 1, 256),
            "whole, batches of 64": (Whole(), 1, 64),
            "windows": (policy, 1, 64),
            "windows, every 2nd pixel": (policy, 2, 64),
        }
        maps = {}
        for name, (way, stride, batch) in ways.items():
            begun = time.process_time()
            maps[name] = perturbation_maps(way, state, Perturbation(5.0, 3.0, stride, batch=batch))[0]
            found.setdefault(name + ", s", []).append(time.process_time() - begun)
        kept = {name: each / each.max() > 0.1 for name, each in maps.items()}
        for name in ("windows", "windows, every 2nd pixel"):
            same = float((kept[name] == kept["whole, batches of 64"]).float().mean())
            found.setdefault(name + ", same side", []).append(same)
    return {name: float(np.mean(values)) for name, values in found.items()}


def plots(out: Path, table: dict[str, dict], grown: dict[str, dict[int, float]]) -> None:
    """``pairs.png`` and ``growth.png``."""
    figure = Figure(figsize=(7.0, 3.2))
    axes = figure.subplots()
    names = list(table)[::-1]
    axes.barh([f"{name}\nbeside {table[name]['other']}" for name in names], [table[name]["times"] for name in names])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast, one core")
    axes.tick_params(labelsize="small")
    figure.savefig(out / "pairs.png", dpi=110, bbox_inches="tight")
    figure = Figure(figsize=(9.0, 3.0))
    for axes, (title, shown) in zip(
        figure.subplots(1, 3),
        {
            "side of the picture": ("picture, eq. 2", "picture, linear"),
            "states in a batch": ("batch",),
            "vehicles": ("vehicles",),
        }.items(),
        strict=True,
    ):
        for name in shown:
            axes.semilogx(list(grown[name]), list(grown[name].values()), "o-", base=2, label=name)
            axes.set_xticks(list(grown[name]), [str(size) for size in grown[name]])
        axes.minorticks_off()
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel(title)
        axes.set_ylabel("ms")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "growth.png", dpi=110)


def main(out: Path) -> None:
    """Measure everything."""
    prepare_process()
    out.mkdir(parents=True, exist_ok=True)
    table = {}
    for name, other, ours, theirs in pairs():
        own, its = by_turns(ours, theirs)
        table[name] = {"other": other, "ours": own, "theirs": its, "times": its / own}
        print(f"| {name} | {other} | {1e3 * own:.2f} | {1e3 * its:.2f} | {its / own:.1f} |", flush=True)
    grown, parts, sides = growth(), live(), indicator()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    results = {"python": platform.python_version(), "versions": versions, "pairs": table}
    results |= {"growth": grown, "live": parts, "every pixel": sides}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plots(out, table, grown)
    print(json.dumps({key: results[key] for key in ("versions", "growth", "live", "every pixel")}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
