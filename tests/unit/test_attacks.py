"""Attacks: the ball they stay in, and that they beat noise of the same size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.attacks import ATTACKS, noise
from carla_digr.config import PolicyConfig
from carla_digr.distributions import kl_divergence
from carla_digr.policy import ActorCritic

EVERY = {**ATTACKS, "noise": noise}


def make_policy(sharpness: float = 30.0) -> ActorCritic:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        policy = ActorCritic(PolicyConfig(((4, 4, 4), (8, 2, 1), (8, 2, 1)), 16), 3, 24, 24, 4)
        policy.policy_head.weight.data *= sharpness
    return policy.requires_grad_(False)


def make_states(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def attacked(name, states, epsilon, seed=0, policy=None):
    return EVERY[name](policy or make_policy(), states, epsilon, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=12, deadline=None)
@given(epsilon=st.floats(0, 1), seed=st.integers(0, 1000))
def test_stays_in_the_ball_and_in_the_range_of_pictures(name, epsilon, seed):
    states = make_states(seed).round(decimals=1)  # with pixels at 0 and 1
    result = attacked(name, states, epsilon, seed)
    assert result.shape == states.shape and result.dtype == torch.float32
    assert (result - states).abs().max() <= epsilon + 1e-6
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("name", EVERY)
def test_no_size_is_no_change_and_a_seed_repeats(name):
    states = make_states(5)
    assert torch.equal(attacked(name, states, 0.0), states)
    first = attacked(name, states, 0.1, seed=3)
    assert torch.equal(first, attacked(name, states, 0.1, seed=3))
    assert not torch.equal(first, states)


def strength(name, policy, states, result):
    """What the attack of this name raises, mean over the states: KL(pi(s) || pi(s')) or -log pi(a*|s')."""
    clean, logits = policy(states)[0], policy(result)[0]
    if name == "MAD":
        return kl_divergence(clean, logits).mean()
    return -logits.log_softmax(dim=1).gather(1, clean.argmax(dim=1, keepdim=True)).mean()


@pytest.mark.parametrize("epsilon", [0.01, 0.04, 0.1])
@pytest.mark.parametrize("name", ATTACKS)
def test_is_stronger_than_noise_of_its_size(name, epsilon):
    policy, states = make_policy(), make_states(7, 64)
    reached, of_noise = (
        strength(name, policy, states, attacked(attack, states, epsilon, policy=policy)) for attack in (name, "noise")
    )
    assert reached > of_noise


@pytest.mark.parametrize("name", ATTACKS)
def test_a_saturated_policy_is_attacked_all_the_same(name):
    policy, states = make_policy(20_000.0), make_states(9, 64)
    confident = policy(states)[0].softmax(dim=1).amax(dim=1) == 1
    assert confident.sum() > 10  # the cross-entropy's own gradient is 0 at the preferred action
    states = states[confident]
    reached, of_noise = (
        strength(name, policy, states, attacked(attack, states, 0.2, policy=policy)) for attack in (name, "noise")
    )
    assert reached > 2 * of_noise
