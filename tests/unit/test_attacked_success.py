"""Curves of success against epsilon: what they are the mean of, and that together is as alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from carla_digr.attacks import ATTACKS, fgsm, noise
from carla_digr.config import PolicyConfig
from carla_digr.evaluation.report import spread
from carla_digr.evaluation.robustness import attacked_episodes, robustness_curves
from carla_digr.policy import ActorCritic, to_input
from carla_digr.tasks.red_fetch_green import RedFetchGreen, RedFetchGreenConfig
from carla_digr.training.rollout import run_episodes, sampled


@pytest.fixture(scope="module")
def policy():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        policy = ActorCritic(PolicyConfig(((8, 8, 8), (8, 3, 1), (8, 3, 1)), 16), 3, 64, 64, 4)
        policy.policy_head.weight.data *= 100
    return policy.requires_grad_(False)


TASK = RedFetchGreen(RedFetchGreenConfig(max_steps=30))


def in_order(episodes):
    return sorted(tuple(episode.values()) for episode in episodes)


def test_all_epsilons_together_are_each_alone(policy):
    epsilons = (0.0, 0.03, 0.2)
    together = attacked_episodes(TASK, policy, fgsm, epsilons, 6, seed=4)
    assert list(together) == list(epsilons)
    for epsilon in epsilons:
        assert together[epsilon] == attacked_episodes(TASK, policy, fgsm, [epsilon], 6, seed=4)[epsilon]
    assert together[0.0] != together[0.2]


def test_without_an_attack_they_are_the_episodes_of_the_sampled_policy(policy):
    expected = run_episodes(TASK.make_vec_env(6, 4), sampled(policy, np.random.default_rng((4, 1))), 6)
    assert in_order(attacked_episodes(TASK, policy, noise, [0.0], 6, seed=4)[0.0]) == in_order(expected)


def test_only_running_episodes_are_attacked(policy):
    attacked = 0

    def counting(policy, states, epsilon, generator):
        nonlocal attacked
        attacked += len(states)
        assert epsilon.shape == (len(states), 1, 1, 1)
        return states

    episodes = attacked_episodes(TASK, policy, counting, [0.0, 0.1], 6, seed=4)
    assert attacked == sum(episode["steps"] for of_epsilon in episodes.values() for episode in of_epsilon)
    assert len({episode["steps"] for episode in episodes[0.0]}) > 1


def test_curves_begin_with_the_same_clean_point_and_are_measured_once(policy):
    kept = {}

    def parts(measures):
        kept.update({name: measure() for name, measure in measures.items() if name not in kept})
        return {name: kept[name] for name in measures}

    arguments = (TASK, {"teacher": policy}, 4, (0.05, 0.1), 7, parts)
    curves = robustness_curves(*arguments, attacks=("FGSM", "uniform noise"))["teacher"]
    assert list(curves) == ["FGSM", "uniform noise"]
    assert all(list(curve) == ["0", "0.05", "0.1"] for curve in curves.values())
    assert curves["FGSM"]["0"] == curves["uniform noise"]["0"]
    measured = dict(kept)
    assert robustness_curves(*arguments, attacks=("FGSM",))["teacher"]["FGSM"] == curves["FGSM"]
    assert kept == measured  # nothing new
    changed = ActorCritic(policy.config, 3, 64, 64, 4)
    robustness_curves(TASK, {"teacher": changed}, 4, (0.05,), 7, parts, attacks=("FGSM",))
    assert len(kept) > len(measured)  # other weights of the same name


@pytest.mark.parametrize("name", [*ATTACKS, "uniform noise"])
def test_each_state_has_a_size_of_its_own(policy, name):
    states = to_input(torch.from_numpy(TASK.make_vec_env(3, 1).reset()))
    sizes = torch.tensor([0.0, 0.02, 0.1])
    attack = {**ATTACKS, "uniform noise": noise}[name]
    attacked = attack(policy, states, sizes.view(-1, 1, 1, 1), torch.Generator().manual_seed(2))
    assert torch.allclose((attacked - states).abs().amax(dim=(1, 2, 3)), sizes, rtol=1e-2)


def test_spread_is_the_sample_deviation():
    assert spread([0.0, 1.0, 1.0, 1.0]) == pytest.approx(
        {"mean": 0.75, "standard_deviation": 0.5, "standard_error": 0.25}
    )
