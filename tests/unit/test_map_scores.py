"""Scores of maps against classes, against each other, and against what the policy does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.config import PolicyConfig
from carla_digr.policy import ActorCritic
from carla_digr.saliency import metrics
from carla_digr.saliency.faithfulness import exchanged_logits, randomised

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Maps with many ties."""
    return np.random.default_rng(seed).integers(0, 6, shape).astype(np.float32) / 5


@given(seeds)
def test_class_shares_are_the_mass_and_sum_to_one(seed):
    maps, classes = drawn(seed, 3, 6, 7), np.random.default_rng(seed).integers(0, 4, (3, 6, 7)).astype(np.int8)
    maps[0] = 0
    shares = metrics.class_shares(maps, classes, 4)
    assert np.isnan(shares[0]).all()
    np.testing.assert_allclose(shares[1:].sum(axis=1), 1)
    assert shares[2, 1] == pytest.approx(maps[2][classes[2] == 1].sum() / maps[2].sum())


def test_only_counted_pixels_count():
    maps = np.array([[[0.5, 0.2, 1.0, 0.3]], [[0.1, 0.0, 0.9, 0.0]], [[0.0, 0.0, 1.0, 0.0]]], np.float32)
    importance = np.array([[[1, 0, -1, 0]]] * 3, np.int8)
    np.testing.assert_allclose(metrics.important_share(maps, importance), [0.5, 1.0, np.nan])
    assert metrics.pointing_game(maps, importance).tolist() == [True, True, False]
    assert metrics.pointing_game(maps[:1, :, ::-1], importance[:1]).tolist() == [False]


def test_widening_reaches_as_far_as_it_says_and_takes_uncounted_pixels_too():
    importance = np.zeros((2, 9, 9), np.int8)
    importance[0, 4, 4], importance[0, 4, 5] = 1, -1
    wide = metrics.widened(importance, 2)
    y, x = np.indices((9, 9))
    distance = np.hypot(y - 4, x - 4)
    assert (wide[0][distance <= 2] == 1).all() and (wide[0][distance > 2.9] == 0).all()
    assert np.array_equal(wide[1], importance[1]) and metrics.widened(importance, 0) is importance


@given(seeds, st.sampled_from([np.sqrt, np.square, lambda x: 3 * x + 1]))
def test_rank_correlation_knows_only_the_order(seed, rising):
    a, b = drawn(seed, 2, 8, 8), drawn(seed + 1, 2, 8, 8)
    np.testing.assert_allclose(metrics.rank_correlation(a, rising(a)), 1)
    np.testing.assert_allclose(metrics.rank_correlation(a, -a), -1)
    np.testing.assert_allclose(metrics.rank_correlation(a, b), metrics.rank_correlation(rising(b), a))
    assert np.isnan(metrics.rank_correlation(a, np.ones_like(a))).all()


def test_rank_correlation_of_a_known_case_with_ties():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: their correlation is 4.5 / sqrt(4.5 * 5).
    a, b = np.array([[[1, 2, 2, 3]]], np.float32), np.array([[[10, 30, 20, 40]]], np.float32)
    assert metrics.rank_correlation(a, b)[0] == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_overlap_is_intersection_over_union_above_the_threshold():
    a, b = np.array([[[0.9, 0.2, 0.1, 0.0]]]), np.array([[[0.1, 0.2, 0.3, 0.0]]])
    assert metrics.overlap(a, b, 0.1)[0] == pytest.approx(1 / 3)
    assert np.isnan(metrics.overlap(a, b, 0.95)[0])


@pytest.fixture(scope="module")
def policy() -> ActorCritic:
    torch.manual_seed(4)
    policy = ActorCritic(PolicyConfig(((4, 4, 2), (4, 3, 1)), features=8), 3, 16, 16, actions=3)
    torch.nn.init.orthogonal_(policy.policy_head.weight)
    return policy


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_pixels_leave_in_the_order_of_the_map(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    states, others = torch.rand(2, 2, 3, 16, 16, generator=generator)
    maps = torch.rand(2, 16, 16, generator=generator)
    shares = [0.0, 0.25, 1.0]
    logits = exchanged_logits(policy, states, others, maps, shares, batch=1)
    assert logits.shape == (2, 3, 3)
    quarter = maps.flatten(1).topk(64, dim=1).values.amin(dim=1)[:, None, None, None]
    half_way = torch.where(maps[:, None] >= quarter, others, states)
    for k, expected in enumerate((states, half_way, others)):
        torch.testing.assert_close(logits[:, k], policy(expected)[0])
    # What is inserted last was deleted first.
    back = exchanged_logits(policy, others, states, -maps, [0.75])
    torch.testing.assert_close(back[:, 0], logits[:, 1])


def test_randomising_goes_layer_by_layer_from_the_last_and_leaves_the_policy_alone(policy):
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    stages = list(randomised(policy, 1))
    assert [name for name, _ in stages] == ["policy head", "trunk", "convolution 2", "convolution 1"]
    parts = ["policy_head", "trunk", "convolutions.1", "convolutions.0"]
    for count, (_, broken) in enumerate(stages, 1):
        for name, value in broken.state_dict().items():
            redrawn = any(name == f"{part}.weight" for part in parts[:count])
            assert torch.equal(value, before[name]) == (not redrawn) or name.endswith("bias")
            if redrawn:
                assert float(value.norm()) == pytest.approx(float(before[name].norm()), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    again = list(randomised(policy, 1))[-1][1]
    assert torch.equal(again.trunk.weight, stages[-1][1].trunk.weight)
