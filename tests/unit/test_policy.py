"""The network and its checkpoints."""

from __future__ import annotations

import itertools
import json
import threading

import pytest
import torch

from carla_digr import checkpoint
from carla_digr.config import PolicyConfig
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, to_input

CARD = {"task": "red_fetch_green", "role": "teacher", "action_names": ["a", "b", "c"], "seed": 0, "steps": 1}


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return ActorCritic(PolicyConfig(((4, 8, 4), (4, 4, 2), (4, 3, 1)), 8), 3, 64, 48, 3)


@pytest.fixture
def saved(tmp_path, policy):
    path = tmp_path / "policy.safetensors"
    checkpoint.save(path, policy, CARD)
    return path


def test_the_value_and_the_logits_have_the_stated_shapes(policy):
    logits, value = policy(to_input(torch.randint(0, 256, (5, 3, 64, 48), dtype=torch.uint8)))
    assert logits.shape == (5, 3) and value.shape == (5,)


def test_to_input_leaves_the_picture_alone_and_scales_to_one():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_input(image).tolist() == pytest.approx([0, 0.2, 1])
    assert image.tolist() == [0, 51, 255]


def test_softplus_is_near_relu():
    relu = ActorCritic(PolicyConfig(activation="relu"), 3, 64, 64, 3)
    softplus = ActorCritic(PolicyConfig(activation="softplus"), 3, 64, 64, 3)
    x = torch.linspace(-3, 3, 101)
    assert (relu.activation(x) - softplus.activation(x)).abs().max() < 0.07


def test_softplus_without_gradients_is_torchs():
    policy = ActorCritic(PolicyConfig(activation="softplus"), 3, 64, 64, 3)
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])])
    with torch.no_grad():
        fast = policy.activation(x)
    torch.testing.assert_close(fast, policy.activation(x), rtol=1e-6, atol=1e-8)


def test_convolutions_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"\[4, 9, 1\] does not fit its 3x3 input"):
        ActorCritic(PolicyConfig(((4, 8, 8), (4, 6, 1), (4, 9, 1)), 8), 3, 64, 64, 3)


def test_a_loaded_policy_equals_the_saved_one_bit_for_bit(saved, policy):
    loaded, card = checkpoint.load(saved, "red_fetch_green")
    assert loaded.config == policy.config and not loaded.training
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert len(checkpoint.policy_hash(card)) == 12
    assert card["steps"] == 1 and card["input_shape"] == [3, 64, 48]


def test_a_checkpoint_of_another_task_is_refused(saved):
    with pytest.raises(UserError, match="is a policy for the task red_fetch_green; this needs one for driving"):
        checkpoint.load(saved, "driving")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_damaged(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"policy\.safetensors is damaged"):
        checkpoint.load(saved)


def test_one_flipped_bit_is_damage(saved):
    data = bytearray(saved.read_bytes())
    data[-3] ^= 1
    saved.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_file_is_named(saved, suffix):
    saved.with_suffix(suffix).unlink()
    with pytest.raises(UserError, match=rf"policy\{suffix}.*No such file"):
        checkpoint.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"task": 3}'])
def test_a_broken_card_is_named(saved, text):
    saved.with_suffix(".json").write_text(text)
    with pytest.raises(UserError, match=r"card .*policy\.json"):
        checkpoint.load(saved)


def test_a_card_of_another_network_is_told(saved):
    card = json.loads(saved.with_suffix(".json").read_text())
    card["policy"]["features"] = 9
    saved.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="does not hold the network that its card describes"):
        checkpoint.load(saved)


def test_weights_that_are_not_finite_are_refused(tmp_path, policy):
    with torch.no_grad():
        policy.trunk.bias[0] = torch.nan
    checkpoint.save(tmp_path / "nan.safetensors", policy, CARD)
    with pytest.raises(UserError, match="not finite"):
        checkpoint.load(tmp_path / "nan.safetensors")


def test_a_failed_save_keeps_the_old_checkpoint(saved, policy):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(saved, policy, {**CARD, "metrics": object()})
    assert saved.read_bytes() == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["policy.json", "policy.safetensors"]


def test_a_checkpoint_is_read_while_a_training_replaces_it(saved, policy):
    over = threading.Event()

    def replace():
        for steps in itertools.count(2):
            with torch.no_grad():
                policy.trunk.bias[0] = steps
            checkpoint.save(saved, policy, {**CARD, "steps": steps})
            if over.is_set():
                return

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(60):
            loaded, card = checkpoint.load(saved)
            assert card["steps"] == 1 or loaded.trunk.bias[0] == card["steps"]
    finally:
        over.set()
        writer.join()
