"""How long maps take: `linear` in the time of eq. 2's, perturbation maps by windows in that of whole passes, as each
perturbed picture went through the network before, and eight vehicles' effects in that of eq. 2's map. One after the
other; `pytest -s` shows the figures."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import carla_digr
from carla_digr.driving.control import Neighbour
from carla_digr.explainer import Explainer
from carla_digr.objects import explain_objects, viewed_objects
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.simulator.sensors import instance_picture
from carla_digr.tasks.driving.batch import DrivingVecEnv
from carla_digr.tasks.driving.settings import DrivingConfig
from carla_digr.training import prepare_process

FRAMES = 200
GOAL = 3.0  # times eq. 2's map
OF_EIGHT = 1.5  # times eq. 2's map
FASTER = 5.0  # times, than whole passes in batches of 256


class Whole:
    """An actor-critic of which nothing is known but its outputs."""

    def __init__(self, policy):
        self._policy, self.output = policy, policy.output

    def __call__(self, states):
        return self._policy(states)


def test_the_linear_map_takes_at_most_three_of_eq_2s():
    prepare_process()  # as the explainer's
    loaded = carla_digr.load_policy("driving_calm_student")
    explainers = {method: Explainer(loaded.network, loaded.card, method) for method in ("digr", "linear")}
    actions = "lane" if len(loaded.action_names) == 6 else "wheels"
    env = DrivingVecEnv(1, 11, DrivingConfig(actions=actions), evaluation=True)
    picture = env.reset()[0].transpose(1, 2, 0)
    took: dict[str, list[float]] = {"decision": [], **{method: [] for method in explainers}}
    for _ in range(FRAMES):
        for method, explainer in explainers.items():
            begun = time.process_time()
            decision = explainer.decide(picture)
            decided = time.process_time()
            explainer.explain(decision)
            took["decision"].append(decided - begun)
            took[method].append(time.process_time() - decided)
        picture = env.step([decision.action])[0][0].transpose(1, 2, 0)
    medians = {name: 1000.0 * float(np.median(times)) for name, times in took.items()}
    ratio = medians["linear"] / medians["digr"]
    print(f"\nCPU-ms, medians of {FRAMES} frames: {medians}; linear in eq. 2's time: {ratio:.2f}")
    assert ratio <= GOAL


def test_the_effects_of_eight_vehicles_take_at_most_one_and_a_half_of_eq_2s():
    prepare_process()
    loaded = carla_digr.load_policy("driving_calm_student")
    explainer = Explainer(loaded.network, loaded.card, "digr")
    actions = "lane" if len(loaded.action_names) == 6 else "wheels"
    env = DrivingVecEnv(1, 11, DrivingConfig(actions=actions), evaluation=True)
    picture, drive = env.reset()[0].transpose(1, 2, 0), env.episodes[0].drive
    took: dict[str, list[float]] = {"map": [], "vehicles": []}
    while len(took["map"]) < FRAMES // 2:
        labels = instance_picture(drive.world, replace(drive.camera, width=256, height=256))[:, :, 2::-1]
        around = {int(actor): Neighbour(30.0, 0.0, 0) for actor in drive.world.vehicles["id"] if actor != drive.ego}
        vehicles = [thing for thing in viewed_objects(labels, around, (128, 128)) if thing.id][:8]
        decision = explainer.decide(picture)
        if len(vehicles) == 8:
            begun = time.process_time()
            explainer.explain(decision)
            explained = time.process_time()
            explain_objects(explainer, decision, None, vehicles)
            took["map"].append(explained - begun)
            took["vehicles"].append(time.process_time() - explained)
        picture = env.step([decision.action])[0][0].transpose(1, 2, 0)
    medians = {name: 1000.0 * float(np.median(times)) for name, times in took.items()}
    ratio = medians["vehicles"] / medians["map"]
    print(f"\nCPU-ms, medians of {len(took['map'])} frames: {medians}; eight vehicles in eq. 2's time: {ratio:.2f}")
    assert ratio <= OF_EIGHT


@pytest.mark.parametrize(("stride", "states", "turns"), [(1, 1, 1), (2, 4, 2)])
def test_a_perturbation_map_by_windows_takes_a_fifth_of_whole_passes(stride, states, turns):
    """Of every pixel; and as the dataset of configs/driving_calm.yaml has them, four states at a time."""
    prepare_process()
    policy = carla_digr.load_policy("driving_calm_teacher").network
    pictures = torch.rand(states, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    ways = {"windows": (policy, 64), "whole, 64": (Whole(policy), 64), "whole, 256": (Whole(policy), 256)}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, (way, batch) in ways.items():
            begun = time.process_time()
            perturbation_maps(way, pictures, Perturbation(4.0, 3.0, stride, batch=batch))
            took[name].append(time.process_time() - begun)
    medians = {name: float(np.median(times)) / states for name, times in took.items()}
    print(f"\nCPU-s a map of every {stride}. pixel: {medians}; {medians['whole, 256'] / medians['windows']:.1f} times")
    assert medians["whole, 256"] >= FASTER * medians["windows"]
