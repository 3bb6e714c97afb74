"""Any gymnasium environment as a task: its pictures, episodes and actions; what does not fit; the four stages."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace

import cv2
import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from test_teacher import start, wait_for

from carla_digr import checkpoint
from carla_digr.cli import main
from carla_digr.errors import UserError
from carla_digr.evaluation.any_task import QUICK_STEPS, quick
from carla_digr.tasks import load_config, make_task, parse_config
from carla_digr.tasks.gymnasium_task import GymnasiumConfig, GymnasiumTask
from carla_digr.training.teacher import train_teacher

PONG = {"id": "ALE/Pong-v5", "grey": True, "size": (84, 84), "stack": 4}
DOOR = {"id": "MiniGrid-DoorKey-5x5-v0", "wrappers": ({"minigrid.wrappers:RGBImgObsWrapper": {"tile_size": 8}},)}
FAITHLESS = False  # Counter's episodes depend on nothing but their seed


class Counter(gymnasium.Env):
    """Shows the seed of its episode and how often which action was taken; loses a life with action 1."""

    def __init__(self, shape=(6, 7, 3), space="dict", success=True, start=0):
        self.shape, self.kind, self.success = shape, space, success
        picture = spaces.Box(0, 255, shape, np.uint8)
        parts = {"view": picture, "speed": spaces.Box(0, 1, (1,), np.float32)}
        self.observation_space = spaces.Dict(parts) if space == "dict" else picture
        self.action_space = spaces.Discrete(3, start=start)

    def get_action_meanings(self):
        return ["NOOP", "FIRE_LEFT", "RIGHT"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.counts = np.zeros(3, int)
        self.drawn = int(np.random.default_rng().integers(256) if FAITHLESS else self.np_random.integers(256))
        return self._observation(), {"lives": 3}

    def step(self, action):
        self.counts[action - self.action_space.start] += 1
        lives = 3 - int(self.counts[1])
        info = {"lives": lives, **({"is_success": lives == 0} if self.success else {})}
        return self._observation(), -2.5 * float(action), lives == 0, self.counts.sum() >= 30, info

    def _observation(self):
        picture = np.full(self.shape, self.drawn, np.uint8)
        picture.reshape(-1)[:3] = self.counts
        return {"view": picture, "speed": np.zeros(1, np.float32)} if self.kind == "dict" else picture


@pytest.fixture(autouse=True, scope="module")
def registered():
    gymnasium.register("carla_digr_tests/Counter-v0", Counter, max_episode_steps=25)
    yield
    del gymnasium.registry["carla_digr_tests/Counter-v0"]


def task(**settings):
    return GymnasiumTask(GymnasiumConfig(**{"id": "carla_digr_tests/Counter-v0", **settings}))


def test_pong_is_what_gymnasiums_own_wrappers_make_of_it():
    pong = GymnasiumTask(GymnasiumConfig(**PONG))
    assert pong.observation_shape == (4, 84, 84)
    assert pong.action_names == ("noop", "fire", "right", "left", "rightfire", "leftfire") and pong.idle_action == 0
    assert (pong.recipe.colour, pong.recipe.stack) == ("grey", 4)
    batch = pong.make_vec_env(2, 5)
    observations = batch.reset()
    reference = gymnasium.make("ALE/Pong-v5")
    seed = int(np.random.SeedSequence((5, 1, 0)).generate_state(1)[0] >> 1)

    def picture(rgb):
        return cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)

    pictures = [picture(reference.reset(seed=seed)[0])] * 4
    np.testing.assert_array_equal(observations[1], pictures)
    for action in np.random.default_rng(0).integers(6, size=40):
        rgb, reward, *_ = reference.step(action)
        pictures = [*pictures[1:], picture(rgb)]
        observations, rewards, _, _ = batch.step([0, action])
        np.testing.assert_array_equal(observations[1], pictures)
        assert rewards[1] == reward


def test_minigrid_tells_its_actions_and_shows_its_room():
    door = GymnasiumTask(GymnasiumConfig(**DOOR))
    assert door.observation_shape == (3, 40, 40)
    assert door.action_names == ("left", "right", "forward", "pickup", "drop", "toggle", "done")
    assert door.idle_action is None
    env = gymnasium.make("MiniGrid-DoorKey-5x5-v0")
    env.reset(seed=int(np.random.SeedSequence((3, 0, 0)).generate_state(1)[0] >> 1))
    whole = env.unwrapped.get_frame(highlight=True, tile_size=8)
    np.testing.assert_array_equal(door.make_vec_env(1, 3).reset()[0], whole.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (3, 6, 7)),
        ({"observation_key": "view", "stack": 2}, (6, 6, 7)),
        ({"grey": True, "stack": 3, "size": (4, 5)}, (3, 4, 5)),
        ({"size": (4, 5)}, (3, 4, 5)),
        ({"kwargs": {"shape": (6, 7), "space": "box"}}, (1, 6, 7)),
        ({"kwargs": {"shape": (3, 6, 7), "space": "box"}, "size": (8, 9)}, (3, 8, 9)),
        ({"kwargs": {"shape": (2, 6, 7), "space": "box"}, "size": (8, 9)}, (2, 8, 9)),
        ({"wrappers": ({"FilterObservation": {"filter_keys": ["view"]}},)}, (3, 6, 7)),
    ],
)
def test_pictures_of_every_layout_become_states(settings, shape):
    counter = task(**settings)
    assert counter.observation_shape == shape
    batch = counter.make_vec_env(2, 0)
    for observations in (batch.reset(), batch.step([0, 2])[0]):
        assert observations.shape == (2, *shape) and observations.dtype == np.uint8
    assert counter.recipe.channels == shape[0]


def test_an_action_is_held_and_its_rewards_add_up():
    batch = task(frame_skip=3, kwargs={"start": 4}, max_steps=6).make_vec_env(1, 0)
    batch.reset()
    for step in range(6):
        observations, rewards, dones, infos = batch.step([2])
        assert rewards[0] == 3 * -2.5 * 6
        assert dones[0] == (step == 5)
        if not dones[0]:
            assert observations[0, :, 0, 0].tolist() == [0, 0, 3 * (step + 1)]
    assert infos[0]["TimeLimit.truncated"] and infos[0]["terminal_observation"][2, 0, 0] == 18
    assert infos[0]["metrics"] == {"return": -15.0 * 18, "length": 6.0, "success": 0.0}


def test_training_clips_rewards_and_ends_with_a_life_and_evaluation_does_not():
    counter = task(clip_rewards=True, episodic_life=True)
    training, evaluation = counter.make_vec_env(1, 1, evaluation=False), counter.make_vec_env(1, 1)
    np.testing.assert_array_equal(training.reset(), evaluation.reset())
    ends = []
    for action in (2, 1, 0, 1, 2, 1):
        (a, clipped, (done,), (info,)), (b, rewards, (over,), (whole,)) = (
            e.step([action]) for e in (training, evaluation)
        )
        np.testing.assert_array_equal(a, b)  # the game goes on
        assert clipped[0] == np.sign(rewards[0]) and rewards[0] == -2.5 * action
        ends.append((bool(done), bool(over)))
    assert ends == [(False, False), (True, False), (False, False), (True, False), (False, False), (True, True)]
    assert info["metrics"] == whole["metrics"] == {"return": -2.5 * 7, "length": 6.0, "success": 1.0}
    assert info["is_success"] is True and not info["TimeLimit.truncated"]


def test_an_environment_that_knows_no_success_has_none():
    batch = task(kwargs={"success": False}).make_vec_env(1, 0)
    batch.reset()
    for _ in range(3):
        infos = batch.step([1])[3]
    assert "is_success" not in infos[0] and set(infos[0]["metrics"]) == {"return", "length"}


def test_an_episode_depends_on_seed_environment_and_number_alone():
    def starts(environments, played):
        batch = task().make_vec_env(environments, 9)
        found = {(i, 0): picture.tobytes() for i, picture in enumerate(batch.reset())}
        rng, numbers = np.random.default_rng(played), [0] * environments
        for _ in range(100):
            observations, _, dones, _ = batch.step(rng.integers(3, size=environments))
            for i in np.flatnonzero(dones):
                numbers[i] += 1
                found[int(i), numbers[i]] = observations[i].tobytes()
        return found

    first, second = starts(2, 0), starts(4, 1)
    common = first.keys() & second.keys()
    assert len(common) > 10 and all(first[key] == second[key] for key in common)
    assert len({first[key] for key in common}) > len(common) / 2


@pytest.mark.parametrize("settings", [{"stack": 2, "episodic_life": True}, PONG, {**DOOR, "max_steps": 30}])
def test_a_restored_batch_goes_on_as_the_original(settings):
    made = task(**settings)
    actions = len(made.action_names)
    batch, other = (made.make_vec_env(2, 4, evaluation=False) for _ in range(2))
    batch.reset()
    other.reset()
    rng = np.random.default_rng(0)
    for _ in range(40):
        batch.step(rng.integers(actions, size=2))
    other.set_state({name: value.copy() for name, value in batch.get_state().items()})
    np.testing.assert_array_equal(other.observe(), batch.observe())
    for _ in range(40):
        taken = rng.integers(actions, size=2)
        one, two = batch.step(taken), other.step(taken)
        for a, b in zip(one[:3], two[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        assert [i.get("metrics") for i in one[3]] == [i.get("metrics") for i in two[3]]


def test_an_episode_that_does_not_come_out_the_same_is_left_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FAITHLESS", True)
    batch, other = (task().make_vec_env(2, 4) for _ in range(2))
    batch.reset()
    batch.step([0, 0])
    other.set_state(batch.get_state())
    assert [game.episode for game in other.games] == [1, 1]
    values = {**CHAIN, "environment": {"id": "carla_digr_tests/Counter-v0", "size": [32, 32]}}
    config = parse_config(values, "faithless")
    train_teacher(replace(config, teacher=replace(config.teacher, total_steps=64)), tmp_path)
    train_teacher(config, tmp_path)
    assert checkpoint.load(tmp_path / "teacher.safetensors")[1]["steps"] == config.teacher.total_steps


def test_pictures_with_more_channels_than_rows_are_trained_on_as_they_are(tmp_path):
    environment = {"id": "carla_digr_tests/Counter-v0", "stack": 3}
    layers = {"convolutions": [[4, 3, 1], [4, 2, 1], [4, 2, 1]], "features": 16}
    config = parse_config({**CHAIN, "environment": environment, "policy": layers}, "small")
    train_teacher(replace(config, teacher=replace(config.teacher, total_steps=64)), tmp_path)
    policy, _ = checkpoint.load(tmp_path / "teacher.safetensors")
    assert policy.input_shape == (9, 6, 7) and policy.recipe.stack == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"id": "ALE/Pongo-v5"}, r"no gymnasium environment 'ALE/Pongo-v5' \(did you mean 'ALE/Pong-v5'\?\); name the"),
        ({"id": "nowhere/Nothing-v0"}, "no gymnasium environment 'nowhere/Nothing-v0'"),
        ({"id": "CartPole-v1"}, r"CartPole-v1 does not show pictures .* but Box.*AddRenderObservation"),
        ({"id": "CarRacing-v3"}, r"has the actions Box.*but discrete ones are needed.*continuous: false"),
        (
            {"id": "MiniGrid-Empty-5x5-v0", "observation_key": "picture"},
            "must name a picture .* direction, image, mission",
        ),
        ({"observation_key": "speed"}, "does not show pictures"),
        ({"module": "nowhere.at_all"}, "environment.module: cannot import nowhere.at_all .*; install it, or correct"),
        ({"kwargs": {"size": 3}}, "Counter-v0 cannot be made with these environment.kwargs: .*size"),
        ({"wrappers": ("ResizeObservatio",)}, r"wrappers\[0\]: there is no wrapper .*mean 'ResizeObservation'"),
        ({"wrappers": ("minigrid.wrappers:Nothing",)}, r"there is no wrapper 'minigrid.wrappers:Nothing'; give"),
        ({"wrappers": ("nowhere.at_all:It",)}, r"wrappers\[0\]: cannot import nowhere.at_all"),
        ({"wrappers": ({"ResizeObservation": {"shap": [1, 2]}},)}, r"ResizeObservation cannot be applied with .*shap"),
        ({"wrappers": (3,)}, r"wrappers\[0\] must be a wrapper's name"),
        ({"actions": ("a", "b")}, "environment.actions has 2 names, but .* has 3 actions"),
        ({"kwargs": {"shape": (2, 6, 7), "space": "box"}, "grey": True}, "have 2 channels; only those of RGB"),
        ({"kwargs": {"space": "box"}, "observation_key": "view"}, "are no dict; leave it out"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        task(**settings)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_package_that_is_missing_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(UserError, match=r"cannot import ale_py.*; pip install 'carla_digr\[atari\]'\.$"):
        GymnasiumTask(GymnasiumConfig(**PONG))


CHAIN = {
    "task": "gymnasium",
    "seed": 1,
    "policy": {"convolutions": [[4, 8, 4], [4, 3, 1], [4, 2, 1]], "features": 16},
    "teacher": {
        "total_steps": 256,
        "environments": 2,
        "rollout_steps": 32,
        "epochs": 1,
        "minibatch_size": 64,
        "checkpoint_interval": 64,
    },
    "saliency_dataset": {"maps": 12, "radius": 4, "stride": 10, "state_interval": 2, "environments": 2},
    "distill": {
        "iterations": 6,
        "environments": 2,
        "environment_steps": 1,
        "buffer_states": 200,
        "saliency_batch": 4,
        "buffer_batch": 4,
        "held_out": 0.3,
    },
    "evaluation": {
        "episodes": 2,
        "environments": 1,
        "saliency_states": 6,
        "slow_states": 3,
        "examples": 2,
        "attack_episodes": 1,
        "attack_epsilons": [0.02],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(
            {**PONG, "max_steps": 20, "clip_rewards": True, "episodic_life": True}, id="pong", marks=pytest.mark.long
        ),
        pytest.param({**DOOR, "max_steps": 20}, id="door"),
    ],
)
def test_the_four_stages_end_in_a_report_and_a_killed_teacher_resumes_bit_for_bit(tmp_path, environment):
    environment = json.loads(json.dumps(environment))
    values = {**CHAIN, "environment": environment}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(values))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start("train-teacher", path, killed)
    try:
        wait_for((killed / "teacher" / "state.safetensors").exists, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("train-teacher", path, killed).wait(timeout=120) == 0
    for stage in ("train-teacher", "make-dataset", "distill", "evaluate"):
        assert main([stage, str(path), "--out", str(whole)]) == 0
    assert (killed / "teacher.safetensors").read_bytes() == (whole / "teacher.safetensors").read_bytes()
    made = make_task(parse_config(values, "chain"))
    student, card = checkpoint.load(whole / "student.safetensors", "gymnasium")
    assert student.recipe == made.recipe and card["action_names"] == list(made.action_names)
    results = json.loads((whole / "evaluation" / "results.json").read_text())
    assert {"return", "length"} <= set(results["performance"]["teacher, greedy"])
    assert ("always noop" in results["performance"]) == (made.idle_action is not None)
    assert results["saliency"]["Gaussian-Blur Perturbation"]["auc"] is None  # nobody knows what matters here
    assert set(results["decision"]) == {"teacher", "student"} and "DIGR" in results["randomised"]
    assert set(results["robustness"]["DIGR"]) == {"FGSM", "PGD", "MI-FGSM", "MAD", "uniform noise"}
    report = (whole / "evaluation" / "report.md").read_text()
    for said in ("deletion", "drawn anew", "Return under attack", "(figure_decision.png)", "(figure_attacks.png)"):
        assert said in report


def test_evaluate_quick_cuts_long_episodes():
    config = parse_config({**CHAIN, "environment": json.loads(json.dumps(PONG))}, "pong")
    short = quick(config)
    assert short.environment.max_steps == QUICK_STEPS and short.evaluation.attack_episodes == 1
    shorter = replace(config, environment=replace(config.environment, max_steps=5))
    assert quick(shorter).environment.max_steps == 5


def test_car_racing_trains_a_little_and_says_its_actions(tmp_path):
    config = load_config("car_racing")
    teacher = replace(config.teacher, total_steps=32, environments=1, rollout_steps=32, epochs=1, minibatch_size=32)
    train_teacher(replace(config, teacher=teacher), tmp_path)
    policy, card = checkpoint.load(tmp_path / "teacher.safetensors", "gymnasium")
    assert policy.input_shape == (3, 84, 84) and card["steps"] == 32
    assert card["action_names"] == ["do nothing", "steer right", "steer left", "gas", "brake"]
    assert make_task(config).idle_action == 0
