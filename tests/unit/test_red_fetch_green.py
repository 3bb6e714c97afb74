"""Red-Fetch-Green: equal to MiniGrid in pictures and rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Ball
from minigrid.minigrid_env import MiniGridEnv

from carla_digr import checkpoint
from carla_digr.tasks import load_config, make_task, register_environments
from carla_digr.tasks.red_fetch_green import BALLS, PICKUP, SIZE, TILE, RedFetchGreenVecEnv
from carla_digr.training.rollout import load_policy, run_episodes, sampled

MAX_STEPS = 60


class Reference(MiniGridEnv):
    """MiniGrid's own environment with the placement of one of ours."""

    def __init__(self, agent, direction, balls):
        self.placement = agent, direction, balls
        space = MissionSpace(mission_func=lambda: "fetch the green ball")
        super().__init__(space, grid_size=SIZE, max_steps=MAX_STEPS, highlight=False, tile_size=TILE)

    def _gen_grid(self, width, height):
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        agent, direction, balls = self.placement
        for color, (x, y) in zip(BALLS, balls, strict=True):
            self.grid.set(int(x), int(y), Ball(color))
        self.agent_pos, self.agent_dir = (int(agent[0]), int(agent[1])), int(direction)
        self.mission = "fetch the green ball"

    def picture(self):
        return self.get_frame(highlight=False, tile_size=TILE).transpose(2, 0, 1)


def reference_of(batch, i):
    reference = Reference(batch.agent[i].copy(), batch.direction[i].copy(), batch.balls[i].copy())
    reference.reset()
    return reference


@pytest.mark.slow
def test_pictures_rewards_and_ends_equal_minigrid_over_thousands_of_steps():
    batch = RedFetchGreenVecEnv(4, seed=5, max_steps=MAX_STEPS)
    observations = batch.reset()
    references = [reference_of(batch, i) for i in range(4)]
    rng = np.random.default_rng(0)
    compared = ends = 0
    for _ in range(750):
        actions = rng.choice(4, size=4, p=[0.2, 0.2, 0.45, 0.15])
        observations, rewards, dones, infos = batch.step(actions)
        for i, reference in enumerate(references):
            _, _, _, truncated, _ = reference.step(int(actions[i]))
            taken = reference.carrying
            expected = reference._reward() if taken and taken.color == "green" else 0
            assert rewards[i] == pytest.approx(expected, abs=1e-6)
            assert dones[i] == (taken is not None or truncated)
            seen = observations[i]
            if dones[i]:
                ends += 1
                seen = infos[i]["terminal_observation"]
                assert infos[i]["TimeLimit.truncated"] == (taken is None)
                assert infos[i]["is_success"] == (expected > 0)
            assert np.array_equal(seen, reference.picture())
            compared += 1
            if dones[i]:
                references[i] = reference_of(batch, i)
                assert np.array_equal(observations[i], references[i].picture())
    assert compared == 3000 and ends > 50


def test_importance_marks_the_tiles_of_agent_and_target_and_the_empty_floor():
    batch = RedFetchGreenVecEnv(16, seed=1)
    batch.reset()
    importance = batch.importance()
    assert ((importance == 1).sum(axis=(1, 2)) == 2 * TILE**2).all()
    assert ((importance == 0).sum(axis=(1, 2)) == 32 * TILE**2).all()
    for i in range(16):
        for x, y in (batch.agent[i], batch.balls[i, 0]):
            assert (importance[i, y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE] == 1).all()


def test_an_episode_depends_on_seed_environment_and_number_alone():
    def starts(environments, actions_seed):
        batch = RedFetchGreenVecEnv(environments, seed=9, max_steps=20)
        batch.reset()
        rng = np.random.default_rng(actions_seed)
        found = {}
        for _ in range(200):
            for i in np.flatnonzero(batch.steps == 0):
                found[int(i), int(batch.episode[i])] = batch.observe(np.array([i]))[0].tobytes()
            batch.step(rng.integers(4, size=environments))
        return found

    first, second = starts(3, 0), starts(5, 1)
    common = first.keys() & second.keys()
    assert len(common) > 20
    assert all(first[key] == second[key] for key in common)
    assert len(set(first.values())) == len(first)


def test_a_restored_state_continues_equally():
    def play(batch, steps, rng):
        return [
            tuple(np.asarray(part).tobytes() for part in batch.step(rng.integers(4, size=3))[:3]) for _ in range(steps)
        ]

    batch = RedFetchGreenVecEnv(3, seed=2, max_steps=30)
    batch.reset()
    play(batch, 50, np.random.default_rng(0))
    state = batch.get_state()
    expected = play(batch, 100, np.random.default_rng(1))
    other = RedFetchGreenVecEnv(3, seed=2, max_steps=30)
    other.reset()
    other.set_state(state)
    assert play(other, 100, np.random.default_rng(1)) == expected


def test_the_gymnasium_environment_keeps_the_interface():
    register_environments()
    env = gymnasium.make("carla_digr/RedFetchGreen-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    observation, _ = env.reset(seed=4)
    assert np.array_equal(env.reset(seed=4)[0], observation)
    assert np.array_equal(env.render(), observation.transpose(1, 2, 0))
    truncated = terminated = False
    while not (terminated or truncated):
        _, reward, terminated, truncated, _ = env.step(PICKUP)
    assert truncated or reward >= 0


@pytest.mark.parametrize("name", ["RedFetchGreen-v0", "Driving-v0"])
def test_our_environments_are_made_without_a_training_library(name):
    code = "import sys\n"
    code += "class Wall:\n    def find_spec(self, name, path=None, target=None):\n"
    code += "        if name.split('.')[0] in ('stable_baselines3', 'torch', 'captum'): raise ImportError(name)\n"
    code += "sys.meta_path.insert(0, Wall())\nimport gymnasium, carla_digr.tasks\n"
    code += "carla_digr.tasks.register_environments()\ncarla_digr.tasks.register_environments()\n"  # once is enough
    code += f"env = gymnasium.make('carla_digr/{name}')\nenv.reset(seed=1)\n"
    code += "assert env.observation_space.contains(env.step(0)[0])\n"
    subprocess.run([sys.executable, "-W", "error::UserWarning:gymnasium", "-c", code], check=True)


def test_the_weights_that_ship_belong_together_and_fetch_the_target():
    config = load_config(Path(__file__).parents[2] / "configs" / "red_fetch_green.yaml")
    task, cards = make_task(config), {}
    for role in ("teacher", "student"):
        path = checkpoint.WEIGHTS_DIRECTORY / f"red_fetch_green_{role}.safetensors"
        policy, cards[role] = load_policy(path, task)
        act = sampled(policy, np.random.default_rng(0))
        episodes = run_episodes(task.make_vec_env(32, seed=4_000_003), act, 64)
        assert np.mean([episode["success"] for episode in episodes]) > 0.9
    assert cards["student"]["teacher_sha256"] == cards["teacher"]["weights_sha256"]


def test_each_object_taken_out_leaves_the_room_that_minigrid_draws_without_it():
    batch = RedFetchGreenVecEnv(3, seed=8, max_steps=MAX_STEPS)
    pictures = batch.reset()
    border = [(x, y) for x in range(SIZE) for y in range(SIZE) if {x, y} & {0, SIZE - 1}]
    for i, objects in enumerate(batch.objects()):
        cells = {f"{colour} ball": [tuple(batch.balls[i, k])] for k, colour in enumerate(BALLS)} | {"walls": border}
        assert {item.name for item in objects} == {*cells, "agent"}
        for item in objects:
            reference = reference_of(batch, i)
            for x, y in cells.get(item.name, ()):
                reference.grid.set(int(x), int(y), None)
            agent = (-1, -1) if item.name == "agent" else reference.agent_pos
            picture = reference.grid.render(TILE, agent, reference.agent_dir).transpose(2, 0, 1)
            np.testing.assert_array_equal(item.without, picture)
            changed = (item.without != pictures[i]).any(axis=0)
            assert changed.any() and not changed[~item.mask].any()
            assert item.mask.sum() == TILE**2 * len(cells.get(item.name, [agent]))
        named = {item.name: item.kind for item in objects if item.named}
        assert named == {"green ball": "target", "blue ball": "distractor", "yellow ball": "distractor"}
        away = {item.name: abs(batch.agent[i] - cells[item.name][0]).sum() for item in objects if item.named}
        nearest = max((item for item in objects if item.named), key=lambda item: item.nearness)
        assert away[nearest.name] == min(away.values())
