"""Breakout: preprocessing, episodes of training and evaluation, the emulator's truth about ball and paddle."""

from __future__ import annotations

from dataclasses import replace

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest

from carla_digr import checkpoint
from carla_digr.tasks.breakout import (
    FIRE,
    LEFT,
    NOOP,
    OBSERVATION_SHAPE,
    RIGHT,
    Breakout,
    BreakoutConfig,
    BreakoutVecEnv,
)
from carla_digr.training.rollout import load_policy, run_episodes, sampled

CONFIG = BreakoutConfig()


def follow(env: BreakoutVecEnv, offset: int = 0) -> np.ndarray:
    """Actions that keep the paddle under the ball: fast points, and few lives lost."""
    ball, paddle, half = np.array([game.ale.getRAM()[[99, 72, 108]] for game in env.games]).astype(int).T
    ahead = (ball - 49) - (paddle - 47 + half) + offset
    return np.where(ahead > 4, RIGHT, np.where(ahead < -4, LEFT, NOOP))


def points_in_ram(game) -> int:
    """The score that the game itself shows, two bytes of decimal digits."""
    return int("".join(f"{digits:02x}" for digits in game.ale.getRAM()[[76, 77]]))


def test_pictures_and_rewards_are_those_of_gymnasiums_preprocessing():
    env = BreakoutVecEnv(1, 5, CONFIG)
    observation = env.reset()
    game = env.games[0]
    gymnasium.register_envs(ale_py)
    reference = gymnasium.wrappers.AtariPreprocessing(
        gymnasium.make("BreakoutNoFrameskip-v4"), noop_max=0, frame_skip=4, grayscale_obs=True, grayscale_newaxis=False
    )
    reference.reset()
    for _ in range(game.frames - 4):
        reference.unwrapped.ale.act(ale_py.Action.NOOP)
    picture = reference.step(FIRE)[0]
    np.testing.assert_array_equal(observation[0], [picture, picture])
    rng = np.random.default_rng(0)
    steps = lost = 0
    while True:
        lives = game.lives
        action = follow(env, offset=int(rng.integers(-5, 6)))[0] if rng.random() < 0.7 else rng.integers(4)
        observation, rewards, dones, infos = env.step([action])
        before, (picture, reward, over, _, info) = picture, reference.step(action)
        steps += 1
        assert rewards[0] == reward and dones[0] == over
        if over:  # the reference's last picture is half of an earlier step: the game ended before its last two frames
            np.testing.assert_array_equal(infos[0]["terminal_observation"][0], before)
            break
        if info["lives"] < lives:
            lost += 1
            before = picture = reference.step(FIRE)[0]
        np.testing.assert_array_equal(observation[0], [before, picture])
    assert lost == 4 and steps > 100


def test_training_episodes_are_lives_and_rewards_signs_while_evaluation_plays_whole_games_for_points():
    training, evaluation = BreakoutVecEnv(1, 3, CONFIG, evaluation=False), BreakoutVecEnv(1, 3, CONFIG)
    np.testing.assert_array_equal(training.reset(), evaluation.reset())
    rng = np.random.default_rng(1)
    lives, signs, points, score = 0, 0.0, 0.0, 0
    over = False
    for game in (training.games[0], evaluation.games[0]):
        game.ale.setRAM(101, 50)  # the ball among the upper bricks, which are worth more than a point
    while not over:
        action = follow(training, offset=int(rng.integers(-6, 7))) if rng.random() < 0.8 else rng.integers(4, size=1)
        score = points_in_ram(evaluation.games[0])
        first, reward, done, infos = training.step(action)
        second, unclipped, (over,), game_infos = evaluation.step(action)
        assert reward[0] == np.sign(unclipped[0])
        signs, points = signs + reward[0], points + unclipped[0]
        np.testing.assert_array_equal(first, second)  # the game goes on after a life, and the ball is served in both
        if done[0]:
            lives += 1
            assert infos[0]["TimeLimit.truncated"] is False
            assert not np.array_equal(infos[0]["terminal_observation"], first[0])
            np.testing.assert_array_equal(first[0, 0], first[0, 1])
            assert bool(infos[0]["metrics"]) == over and ("is_success" in infos[0]) == over
            assert training.games[0].ale.getRAM()[101] != 0  # the ball is in play
    assert lives == 5 and signs < points
    assert infos[0]["metrics"] == game_infos[0]["metrics"]
    assert infos[0]["metrics"]["score"] == points >= score > 0
    assert infos[0]["is_success"] is False


def test_the_same_seed_gives_the_same_games_whatever_was_played_before():
    first, second = (BreakoutVecEnv(2, 7, CONFIG) for _ in range(2))
    np.testing.assert_array_equal(first.reset(), second.reset())
    first.step([LEFT, RIGHT])
    for env in (first, second):
        env.reset()
    assert first.games[0].frames != first.games[1].frames  # of idle frames before the serve
    rng = np.random.default_rng(0)
    for actions in rng.integers(4, size=(60, 2)):
        for one, other in zip(first.step(actions), second.step(actions), strict=True):
            np.testing.assert_array_equal(one, other) if isinstance(one, np.ndarray) else None
    other_seed = BreakoutVecEnv(2, 8, CONFIG)
    other_seed.reset()
    assert [g.frames for g in other_seed.games] != [g.frames for g in BreakoutVecEnv(2, 7, CONFIG).games]


def test_a_restored_state_goes_on_as_the_original():
    rng = np.random.default_rng(0)
    env, copy = (BreakoutVecEnv(3, 1, CONFIG, evaluation=False) for _ in range(2))
    env.reset()
    copy.reset()
    for actions in rng.integers(4, size=(50, 3)):
        env.step(actions)
    copy.set_state({name: value.copy() for name, value in env.get_state().items()})
    np.testing.assert_array_equal(copy.observe(), env.observe())
    np.testing.assert_array_equal(copy.importance(), env.importance())
    ends = 0
    for actions in rng.integers(4, size=(120, 3)):
        (a, rewards, dones, infos), (b, *others) = env.step(actions), copy.step(actions)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(rewards, others[0])
        np.testing.assert_array_equal(dones, others[1])
        assert [i.get("metrics") for i in infos] == [i.get("metrics") for i in others[2]]
        ends += dones.sum()
    assert ends > 3


def test_sticky_actions_follow_the_seed_and_change_the_game():
    def play(seed: int, sticky: float) -> np.ndarray:
        env = BreakoutVecEnv(1, seed, BreakoutConfig(repeat_action_probability=sticky))
        env.reset()
        return np.stack([env.step([action])[0] for action in np.random.default_rng(0).integers(4, size=40)])

    np.testing.assert_array_equal(play(2, 0.25), play(2, 0.25))
    assert not np.array_equal(play(2, 0.25), play(2, 0.0))


def test_a_game_is_cut_at_its_frame_limit():
    env = BreakoutVecEnv(1, 0, BreakoutConfig(max_frames=200))
    env.reset()
    steps, cut = 0, False
    while not cut:
        _, _, (cut,), infos = env.step(follow(env))
        steps += 1
    assert infos[0]["TimeLimit.truncated"] and infos[0]["metrics"]["steps"] == steps
    assert 0 <= 4 * (steps + 1) + 30 - 200 <= 30 + 4


def test_the_first_wall_gone_is_a_success():
    env = BreakoutVecEnv(1, 0, CONFIG)
    env.reset()
    env.games[0].score = 431
    game_over = False
    while not game_over:
        _, _, (game_over,), infos = env.step(follow(env) if env.games[0].score < 432 else [NOOP])
    assert infos[0]["is_success"] and infos[0]["metrics"]["score"] >= 432


@pytest.mark.slow
def test_ball_and_paddle_in_ram_are_where_the_pictures_show_them():
    env = BreakoutVecEnv(8, 4, CONFIG)
    env.reset()
    rng = np.random.default_rng(0)
    field = np.s_[:, 38:, 5:79]  # between the side walls below the bricks, where all else is black
    checked = seen = narrow = 0
    for step in range(300):
        if step == 150:  # a ball behind the bricks touches the ceiling, which makes the paddle narrower
            for game in env.games:
                game.ale.setRAM(101, 40)
                game.ale.setRAM(99, 100)
        actions = follow(env, offset=int(rng.integers(-6, 7)))
        observations = env.step(np.where(rng.random(8) < 0.1, rng.integers(4, size=8), actions))[0]
        marked = env.importance()[field] == 1
        shown = (observations > 0).any(axis=1)[field]
        assert not (shown & ~marked).any()
        checked, seen = checked + marked.sum(), seen + (shown & marked).sum()
        narrow += sum(game.objects[1, 1, 3] == 6 for game in env.games)
    assert narrow > 100
    assert seen > 0.97 * checked


def pictured(screens):
    """The state's picture of two screens, as the preprocessing makes it."""
    return cv2.resize(np.maximum(*screens), (84, 84), interpolation=cv2.INTER_AREA)


def test_a_ball_that_is_taken_out_leaves_what_the_emulator_draws_without_it():
    """The ball is set to none a frame before the screen; what it does to bricks and paddle is left out."""
    env = BreakoutVecEnv(1, 5, CONFIG)
    env.reset()
    game = env.games[0]
    rng = np.random.default_rng(2)
    compared = high = 0
    for step in range(160):
        env.step(follow(env, offset=int(rng.integers(-6, 7))))
        if step % 20 == 10:  # to and fro among and behind the bricks
            game.ale.setRAM(101, 40 + step % 40)
        state = game.ale.cloneState(include_rng=True)
        screens = []
        for hidden in (False, True):
            game.ale.restoreState(state)
            if hidden:
                game.ale.setRAM(101, 0)
            game.ale.act(ale_py.Action.NOOP)
            screens.append((game.ale.getScreenGrayscale(), game.ale.getRAM()))
        game.ale.restoreState(state)
        (screen, ram), (expected, other) = screens
        if not ram[101] or (ram[np.r_[:36, 108]] != other[np.r_[:36, 108]]).any():
            continue
        kept = game.screens, game.objects, game.pictures
        game.screens = np.broadcast_to(screen, kept[0].shape).copy()
        game.objects = np.broadcast_to(ram[[99, 101, 72, 108]], kept[1].shape).copy()
        game.pictures = np.stack([pictured((screen, screen))] * 2)
        (ball,) = [item for item in game.scene() if item.name == "ball"] or [None]
        game.screens, game.objects, game.pictures = kept
        shown = pictured((expected, expected))
        if ball is None:
            np.testing.assert_array_equal(pictured((screen, screen)), shown)
            continue
        np.testing.assert_array_equal(ball.without, [shown, shown])
        compared += 1
        high += int(ram[101]) + 9 < 93
    assert compared > 100 and high > 30


def test_what_is_taken_out_of_a_game_leaves_no_trace_in_either_picture_and_nothing_lit_is_left_over():
    env = BreakoutVecEnv(4, 3, CONFIG)
    observations = env.reset()
    for _ in range(40):
        observations = env.step(follow(env))[0]
    for state, classes, objects in zip(observations, env.classes(), env.objects(), strict=True):
        found = {item.name: item for item in objects}
        rows = [item for item in objects if item.kind == "bricks"]
        assert {"ball", "paddle", "walls", "score and lives"} < found.keys() and 4 <= len(rows) <= 6
        assert [item.name for item in objects if item.named] == ["ball", "paddle"]
        for item in objects:
            changed = (item.without != state).any(axis=0)
            assert changed.any() and not changed[~item.mask].any(), item.name
            assert (item.without <= state).all()  # all that is drawn is brighter than what is behind it
        np.testing.assert_array_equal(found["ball"].mask & (classes != 2), False)
        np.testing.assert_array_equal(found["paddle"].mask & (classes == 0), False)
        below = np.s_[:, 38:74, 5:79]  # between the bricks and the paddle nothing but the ball is drawn
        assert not found["ball"].without[below].any()
        lit = (state > 0).any(axis=0)
        assert not (lit & ~np.any([item.mask for item in objects], axis=0)).any()
        tops = [np.flatnonzero(item.mask.any(axis=1))[0] for item in rows]
        assert tops == sorted(tops) and tops[0] == 22  # of 84 rows, as row 57 of 210


def test_a_restored_game_does_not_say_what_is_in_it_before_it_has_seen_it():
    env, copy = (BreakoutVecEnv(1, 1, CONFIG) for _ in range(2))
    env.reset()
    copy.reset()
    for _ in range(9):
        env.step([RIGHT])
    copy.set_state(env.get_state())
    with pytest.raises(AssertionError, match="too early"):
        copy.objects()
    for _ in range(2):
        env.step([LEFT])
        copy.step([LEFT])
    for one, other in zip(env.objects()[0], copy.objects()[0], strict=True):
        np.testing.assert_array_equal(one.without, other.without)


def test_observations_are_of_the_declared_form():
    env = BreakoutVecEnv(2, 0, CONFIG)
    observations = env.reset()
    assert observations.shape == (2, *OBSERVATION_SHAPE) and observations.dtype == np.uint8
    assert env.importance().shape == (2, 84, 84) and set(np.unique(env.importance())) == {0, 1}


@pytest.mark.slow
def test_the_weights_that_ship_belong_together_and_play(long):
    task, cards = Breakout(CONFIG if long else replace(CONFIG, max_frames=2400)), {}
    for role in ("teacher", "student"):
        policy, cards[role] = load_policy(checkpoint.WEIGHTS_DIRECTORY / f"breakout_{role}.safetensors", task)
        act = sampled(policy, np.random.default_rng(0))
        count = 8 if long else 4
        games = run_episodes(task.make_vec_env(count, seed=4_000_003), act, count)
        assert np.mean([game["score"] for game in games]) > 10  # random actions: 1.4
    assert cards["student"]["teacher_sha256"] == cards["teacher"]["weights_sha256"]
