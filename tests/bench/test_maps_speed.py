"""How long maps take: a decision with eq. 2's in the time of a forward pass, `linear` and eight vehicles' effects in
that of eq. 2's map, and perturbation maps by windows in that of whole passes, as each perturbed picture went through
the network before. A yardstick that stays is eq. 2's map as PyTorch computes it, which the graphs of
`saliency/compiled.py` halve. One after the other; `pytest -s` shows the figures."""

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
from carla_digr.saliency.gradient import normalise, saliency_from_trace
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.simulator.sensors import instance_picture
from carla_digr.tasks.driving.batch import DrivingVecEnv
from carla_digr.tasks.driving.settings import DrivingConfig
from carla_digr.training import prepare_process

FRAMES = 200
EXPLAINED = 2.5  # forward passes
OF_LINEAR = 2.0  # times eq. 2's map by PyTorch
OF_EIGHT = 1.5  # times eq. 2's map by PyTorch
FASTER = 5.0  # times, than whole passes in batches of 256


class Whole:
    """An actor-critic of which nothing is known but its outputs."""

    def __init__(self, policy):
        self._policy, self.output = policy, policy.output

    def __call__(self, states):
        return self._policy(states)


def by_pytorch(explainer, state):
    """Eq. 2's map as it is without the graphs; the seconds it takes."""
    policy, state = explainer._policy, state.clone()
    with torch.inference_mode():
        logits, _, hidden = policy.trace(state)
        begun = time.process_time()
        normalise(saliency_from_trace(policy, logits, hidden))
        return time.process_time() - begun


def test_a_decision_with_its_map_takes_two_and_a_half_forward_passes_and_linear_two_maps():
    prepare_process()  # as the explainer's
    loaded = carla_digr.load_policy("driving_calm_student")
    explainers = {method: Explainer(loaded.network, loaded.card, method) for method in ("digr", "linear")}
    actions = "lane" if len(loaded.action_names) == 6 else "wheels"
    env = DrivingVecEnv(1, 11, DrivingConfig(actions=actions), evaluation=True)
    picture = env.reset()[0].transpose(1, 2, 0)
    took: dict[str, list[float]] = {name: [] for name in ("forward", "decision", "digr", "linear", "digr by PyTorch")}

    def decide_and_explain(method):
        begun = time.process_time()
        decision = explainers[method].decide(picture)
        decided = time.process_time()
        explainers[method].explain(decision)
        took["decision"].append(decided - begun)
        took[method].append(time.process_time() - decided)

    def forward():
        """From the picture to the logits, as of who wants no map."""
        begun = time.process_time()
        explainers["digr"]._compiled.outputs(explainers["digr"]._state(picture).numpy())
        took["forward"].append(time.process_time() - begun)

    ways = [
        lambda: decide_and_explain("digr"),
        lambda: decide_and_explain("linear"),
        forward,
        lambda: took["digr by PyTorch"].append(by_pytorch(explainers["digr"], decision.state)),
    ]
    for frame in range(FRAMES):
        decision = explainers["digr"].decide(picture)
        for turn in range(len(ways)):  # each as often as another the first after all that the environment does
            ways[(frame + turn) % len(ways)]()
        picture = env.step([decision.action])[0][0].transpose(1, 2, 0)
    medians = {name: 1000.0 * float(np.median(times)) for name, times in took.items()}
    explained = (medians["decision"] + medians["digr"]) / medians["forward"]
    linear = medians["linear"] / medians["digr by PyTorch"]
    print(
        f"\nCPU-ms, medians of {FRAMES} frames: {medians}; a decision with eq. 2's map in forward passes: "
        f"{explained:.2f}; linear in eq. 2's time by PyTorch: {linear:.2f}"
    )
    assert explained <= EXPLAINED and linear <= OF_LINEAR


def test_the_effects_of_eight_vehicles_take_at_most_one_and_a_half_of_eq_2s():
    prepare_process()
    loaded = carla_digr.load_policy("driving_calm_student")
    explainer = Explainer(loaded.network, loaded.card, "digr")
    actions = "lane" if len(loaded.action_names) == 6 else "wheels"
    env = DrivingVecEnv(1, 11, DrivingConfig(actions=actions), evaluation=True)
    picture, drive = env.reset()[0].transpose(1, 2, 0), env.episodes[0].drive
    took: dict[str, list[float]] = {"map": [], "by PyTorch": [], "vehicles": []}
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
            took["by PyTorch"].append(by_pytorch(explainer, decision.state))
        picture = env.step([decision.action])[0][0].transpose(1, 2, 0)
    medians = {name: 1000.0 * float(np.median(times)) for name, times in took.items()}
    ratio = medians["vehicles"] / medians["by PyTorch"]
    print(
        f"\nCPU-ms, medians of {len(took['map'])} frames: {medians}; "
        f"eight vehicles in eq. 2's time by PyTorch: {ratio:.2f}"
    )
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
