"""Stage 1: PPO around our network; a killed run resumes as if it had not been killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from carla_digr import checkpoint
from carla_digr.config import PolicyConfig
from carla_digr.driving.control import ACTIONS
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, to_input
from carla_digr.tasks import load_config, make_task
from carla_digr.tasks.red_fetch_green import RedFetchGreen, RedFetchGreenEnv
from carla_digr.training import ppo
from carla_digr.training.patches import find_patches, outputs_of
from carla_digr.training.ppo import PresentRollouts, SB3Policy, make_ppo
from carla_digr.training.teacher import train_teacher
from carla_digr.training.vec_env import as_vec_env


def wait_for(condition, process, seconds=60):
    """Until the condition holds; fails when the process ends before or time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start(job, config, out, stderr=subprocess.DEVNULL):
    command = [sys.executable, "-m", "carla_digr.cli", job, str(config), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)


def test_the_exported_network_is_the_one_inside_stable_baselines3(tiny_config):
    env = make_task(tiny_config).make_vec_env(6, 0)
    policy = SB3Policy(env.observation_space, env.action_space, lambda _: 1e-3, network_config=tiny_config.policy)
    observations = env.reset()
    distribution = policy.get_distribution(policy.obs_to_tensor(observations)[0])
    logits, value = policy.network(to_input(torch.from_numpy(observations)))
    assert torch.allclose(distribution.distribution.logits, logits.log_softmax(dim=1), rtol=0, atol=1e-6)
    found = policy.predict_values(policy.obs_to_tensor(observations)[0])[:, 0]
    assert torch.allclose(found, value, rtol=0, atol=1e-6)
    greedy = policy.predict(observations, deterministic=True)[0]
    assert np.array_equal(greedy, logits.argmax(dim=1).numpy())


def test_steps_of_absent_environments_are_not_learnt_from():
    """And where none was absent, the minibatches are stable-baselines3's own."""

    def filled(kind, seed):
        rollouts = kind(8, spaces.Box(0, 255, (1,)), spaces.Discrete(3), n_envs=2)
        for step in range(8):
            value = torch.tensor([2.0 * step, 2.0 * step + 1.0])
            rollouts.add(value[:, None].numpy(), np.zeros(2), np.zeros(2), np.zeros(2), value, torch.zeros(2))
        np.random.seed(seed)
        return rollouts

    def values(rollouts):
        return [samples.old_values.tolist() for samples in rollouts.get(4)]

    assert values(filled(PresentRollouts, 3)) == values(filled(RolloutBuffer, 3))
    rollouts = filled(PresentRollouts, 3)
    rollouts.present[2:7, 1] = False
    kept = values(rollouts)
    assert sorted(value for batch in kept for value in batch) == [
        value for value in range(16) if value not in (5, 7, 9, 11, 13)
    ]
    rollouts = filled(PresentRollouts, 3)
    rollouts.present[:] = False
    rollouts.present[0, 0] = True
    assert values(rollouts) == [[0.0]]


def test_minibatches_are_the_pictures_with_channels_last_in_memory():
    shape, rng = (3, 9, 7), np.random.default_rng(0)
    rollouts = PresentRollouts(4, spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(3), n_envs=2)
    shown = rng.integers(0, 256, (4, 2, *shape), np.uint8)
    for step, pictures in enumerate(shown):
        value = torch.tensor([2.0 * step, 2.0 * step + 1.0])
        rollouts.add(pictures, np.zeros(2), np.zeros(2), np.zeros(2), value, torch.zeros(2))
    for samples in rollouts.get(3):
        assert samples.observations.is_contiguous(memory_format=torch.channels_last)
        expected = shown.reshape(8, *shape)[samples.old_values.long().numpy()]
        np.testing.assert_array_equal(samples.observations.numpy(), expected)


@pytest.mark.parametrize("few", [0, 512])
@pytest.mark.parametrize("absent", [0, 29])
def test_an_update_is_that_of_stable_baselines3_and_the_same_bytes_each_time(tiny_config, absent, few, monkeypatch):
    """Also of minibatches of an odd size, or of one state; with patches and without; figures of the curve too."""
    monkeypatch.setattr(ppo, "FEW", few)
    settings = replace(tiny_config.teacher, environments=2, rollout_steps=16, minibatch_size=16, epochs=3)
    config = replace(tiny_config, teacher=replace(settings, entropy_coefficient=0.05, clip_range=0.01))

    def updated(update):
        algorithm = make_ppo(config, VecMonitor(as_vec_env(make_task(config).make_vec_env(2, 0, evaluation=False))))
        algorithm.set_logger(Logger(None, []))
        algorithm.learn(1, callback=OneRollout())
        algorithm.rollout_buffer.present.ravel()[:absent] = False
        np.random.seed(1)
        update(algorithm)
        assert (algorithm.rollout_buffer.patches is None) == (few == 0)
        return list(algorithm.policy.network.parameters()), algorithm.logger.name_to_value

    class OneRollout(BaseCallback):
        def _on_rollout_end(self):
            self.model.train = lambda: None  # another one is what is tested

        def _on_step(self):
            return True

    theirs, told = updated(PPO.train)
    ours = [updated(lambda algorithm: type(algorithm).train(algorithm)) for _ in range(2)]
    for expected, found, again in zip(theirs, ours[0][0], ours[1][0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(found, again)
    names = {name for name in told if name.startswith("train/")} & {*ours[0][1]}
    assert len(names) == 7
    for name in names:
        assert ours[0][1][name] == pytest.approx(told[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(("kernel", "stride"), [(8, 8), (8, 4), (4, 4)])
def test_pictures_are_made_of_their_patches(kernel, stride):
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (5, 3, 4, 4), np.uint8)
    tiles[1] = tiles[0]
    tiles[1, 2, 3, 3] ^= 1
    chosen = rng.integers(0, 5, (4, 2, 5, 6))  # 8 pictures of 5 x 6 tiles
    chosen[2, :, 1:] = chosen[1, :, 1:]
    pictures = tiles[chosen].transpose(0, 1, 4, 2, 5, 3, 6).reshape(4, 2, 3, 20, 24)
    found = find_patches(pictures, kernel, stride, 2000)
    windows = np.lib.stride_tricks.sliding_window_view(pictures, (kernel, kernel), (3, 4))[
        ..., ::stride, ::stride, :, :
    ]
    windows = windows.reshape(8, 3, *windows.shape[3:]).transpose(0, 2, 3, 1, 4, 5)
    numbers = found.numbers.reshape(8, *found.numbers.shape[2:])
    np.testing.assert_array_equal(found.each[numbers], windows)
    assert len(found.each) == len(np.unique(found.each, axis=0)) == found.numbers.max() + 1
    assert find_patches(pictures, kernel, stride, len(found.each) - 1) is None
    network = ActorCritic(PolicyConfig(((4, kernel, stride), (5, 2, 1)), 6), 3, 20, 24, 3)
    rows = np.array([7, 0, 3])
    whole = network(to_input(torch.from_numpy(pictures.reshape(8, 3, 20, 24)[rows])))
    for output, expected in zip(outputs_of(network, found._replace(numbers=numbers), rows), whole, strict=True):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("window", [(7, 4), (8, 3)])
def test_patches_of_odd_windows_are_not_looked_for(window):
    assert find_patches(np.zeros((1, 1, 3, 24, 24), np.uint8), *window, 100) is None


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_weights_bit_for_bit(tmp_path, tiny_yaml, tiny_run):
    process = start("train-teacher", tiny_yaml, tmp_path)
    try:
        wait_for((tmp_path / "teacher" / "state.safetensors").exists, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("train-teacher", tiny_yaml, tmp_path).wait(timeout=120) == 0
    assert (tmp_path / "teacher.safetensors").read_bytes() == (tiny_run / "teacher.safetensors").read_bytes()
    curves = [
        [row.rpartition(",")[0] for row in (out / "teacher" / "curve.csv").read_text().splitlines()]  # without rates
        for out in (tmp_path, tiny_run)
    ]
    assert curves[0] == curves[1]
    leftovers = [path.name for path in tmp_path.rglob("*.tmp")]
    assert len(leftovers) <= 1  # of a write that the kill hit


def test_tensorboard_shows_the_rows_of_the_curve_across_a_resume(copied_run, tiny_config):
    """Also the checkpoint's own, with which the resumed part begins, and no row of a killed part twice."""
    out = copied_run("teacher")
    settings = replace(tiny_config.teacher, total_steps=tiny_config.teacher.total_steps + 512)
    train_teacher(replace(tiny_config, teacher=settings), out)
    rows = (out / "teacher" / "curve.csv").read_text().splitlines()[1:]
    events = EventAccumulator(str(out / "teacher" / "tensorboard"), {"scalars": 0}).Reload().Scalars("teacher/entropy")
    assert [event.step for event in events] == [int(row.split(",")[0]) for row in rows]


def test_a_task_may_return_a_vec_env_of_stable_baselines3(tmp_path, tiny_config, monkeypatch):
    """Without a saved state of its own: a resumed training begins new episodes."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    def make_vec_env(self, environments, seed, evaluation=True):
        return DummyVecEnv([RedFetchGreenEnv] * environments)

    monkeypatch.setattr(RedFetchGreen, "make_vec_env", make_vec_env)
    settings = replace(tiny_config.teacher, total_steps=256)
    train_teacher(replace(tiny_config, teacher=settings), tmp_path)
    train_teacher(replace(tiny_config, teacher=replace(settings, total_steps=512)), tmp_path)
    assert checkpoint.load(tmp_path / "teacher.safetensors")[1]["steps"] == 512


def test_a_training_begins_from_the_weights_that_it_is_given(tmp_path, tiny_run, tiny_config):
    first = str(tiny_run / "teacher.safetensors")
    still = {"start": first, "learning_rate": 0.0, "learning_rate_end": 0.0, "total_steps": 128}
    train_teacher(replace(tiny_config, teacher=replace(tiny_config.teacher, **still)), tmp_path)
    assert (tmp_path / "teacher.safetensors").read_bytes() == (tiny_run / "teacher.safetensors").read_bytes()
    other = replace(tiny_config, policy=replace(tiny_config.policy, activation="softplus"))
    with pytest.raises(UserError, match="another network"):
        train_teacher(replace(other, teacher=replace(other.teacher, start=first)), tmp_path / "other")


def test_a_training_takes_the_actions_that_its_start_knows_and_begins_the_others_between_them(tmp_path, capsys):
    torch.manual_seed(0)
    first = ActorCritic(PolicyConfig(), 3, 128, 128, 4)
    with torch.no_grad():
        first.policy_head.bias.copy_(torch.tensor([0.0, 1.0, -2.0, 3.0]))
    path = tmp_path / "wheels.safetensors"
    checkpoint.save(path, first, {"task": "driving", "role": "teacher", "action_names": list(ACTIONS["wheels"])})
    text = (
        f"task: driving\nenvironment: {{actions: lane, vehicles: 4}}\nteacher: {{start: {path}, learning_rate: 0, "
        "learning_rate_end: 0, total_steps: 8, environments: 2, rollout_steps: 4, minibatch_size: 8, epochs: 1}\n"
    )
    (tmp_path / "lane.yaml").write_text(text)
    train_teacher(load_config(tmp_path / "lane.yaml"), tmp_path / "out")
    assert "other actions begin between these" in capsys.readouterr().err
    begun, card = checkpoint.load(tmp_path / "out" / "teacher.safetensors")
    assert card["action_names"] == list(ACTIONS["lane"])
    state = torch.rand(2, 3, 128, 128)
    left, keep, right, brake = first(state)[0].T
    expected = [left, (left + keep) / 2, keep, (keep + right) / 2, right, brake]
    assert torch.allclose(begun(state)[0], torch.stack(expected, dim=1), atol=1e-5)
    assert torch.equal(begun(state)[1], first(state)[1])


def test_the_card_tells_what_was_trained(tiny_run, tiny_config):
    card = json.loads((tiny_run / "teacher.json").read_text())
    assert card["role"] == "teacher" and card["steps"] >= tiny_config.teacher.total_steps
    assert card["config"] == tiny_config.to_dict()
    assert set(card["metrics"]) == {"return", "length", "success"}


def test_a_finished_training_is_not_repeated(copied_run, tiny_config):
    out = copied_run("teacher", "teacher.safetensors", "teacher.json")
    before = (out / "teacher.safetensors").stat().st_mtime_ns
    train_teacher(tiny_config, out)
    assert (out / "teacher.safetensors").stat().st_mtime_ns == before


def test_another_configuration_does_not_continue_the_run(copied_run, tiny_config):
    out = copied_run("teacher")
    other = replace(tiny_config, teacher=replace(tiny_config.teacher, gamma=0.9))
    with pytest.raises(UserError, match=r"made with teacher\.gamma = 0\.99, now it is 0\.9; use another --out"):
        train_teacher(other, out)


def test_a_longer_training_continues_the_run(copied_run, tiny_config):
    out = copied_run("teacher")
    total = tiny_config.teacher.total_steps + 256
    train_teacher(replace(tiny_config, teacher=replace(tiny_config.teacher, total_steps=total)), out)
    assert checkpoint.load(out / "teacher.safetensors")[1]["steps"] == total


@pytest.mark.parametrize("keep", [0, 5, 3000])
def test_a_damaged_state_is_named(copied_run, tiny_config, keep):
    state = copied_run("teacher") / "teacher" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"state\.safetensors is damaged; delete it"):
        train_teacher(tiny_config, state.parent.parent)


def test_a_minibatch_that_does_not_divide_the_rollout_is_refused(tmp_path, tiny_config):
    other = replace(tiny_config, teacher=replace(tiny_config.teacher, minibatch_size=50))
    with pytest.raises(UserError, match="minibatch_size, 50, must divide"):
        train_teacher(other, tmp_path)
    assert not list(tmp_path.iterdir())
