"""What decides: objects taken out of the world, and maps held against what that does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from carla_digr.evaluation import causal
from carla_digr.evaluation.causal import COLUMNS, Scene, causal_row, collect_scenes
from carla_digr.policy import ActorCritic
from carla_digr.simulator.shading import FIRST_LINE_BIT, WITHOUT_BARRIER, WITHOUT_RAILS, WITHOUT_TREES
from carla_digr.tasks import load_config, make_task
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.objects import scene_objects
from carla_digr.tasks.objects import SceneObject
from carla_digr.tasks.red_fetch_green import OBSERVATION_SHAPE


@pytest.fixture(scope="module")
def drive():
    drive = InProcessDrive(vehicles=64)
    drive.reset(11)
    return drive


def test_a_vehicle_that_is_left_out_is_drawn_as_if_it_had_been_destroyed(drive):
    objects = [item for item in scene_objects(drive) if item.kind == "vehicle"]
    assert len(objects) >= 2
    other = InProcessDrive(vehicles=64)
    for item in objects:
        other.restore(drive.world.get_state(), drive.ego)
        other.world.destroy(int(item.name.split()[1]))
        expected = other.world.render(other.camera)[:, :, 2::-1].transpose(2, 0, 1)
        np.testing.assert_array_equal(item.without, expected)
        changed = (item.without != drive.frame().image.transpose(2, 0, 1)).any(axis=0)
        assert changed[item.mask].mean() >= 0.25  # thin pieces fall between the picture's samples
        assert changed.sum() < 20 * item.mask.sum() + 200  # the rest is shadow


def test_each_object_is_at_another_place_and_the_picture_is_else_as_it_was(drive):
    picture = drive.frame().image.transpose(2, 0, 1).astype(int)
    objects = {item.name: item for item in scene_objects(drive)}
    assert {"barrier", "guard rail", "line 0 of 5", "line 4 of 5", "trees and buildings"} <= objects.keys()
    lines = [item for item in objects.values() if item.kind == "lane line"]
    assert len(lines) >= 4
    for k, first in enumerate(lines):
        assert (np.abs(first.without - picture)[:, ~first.mask] <= 8).all()
        for second in lines[k + 1 :]:
            assert (first.mask & second.mask).sum() <= 0.2 * min(first.mask.sum(), second.mask.sum())
    barrier = objects["barrier"]
    assert (barrier.without != picture).any(axis=0)[barrier.mask].mean() > 0.9


def test_a_picture_that_leaves_nothing_out_is_the_picture(drive):
    whole = drive.world.render(drive.camera)
    np.testing.assert_array_equal(drive.world.render(drive.camera, without=0, without_vehicle=0), whole)
    for bit in (WITHOUT_BARRIER, WITHOUT_RAILS, WITHOUT_TREES, 1 << FIRST_LINE_BIT):
        assert (drive.world.render(drive.camera, without=bit) != whole).any()


def scene(effects, episode=0, flips=None, size=12):
    """Objects in a row, one a column pair, of which the last is not a named one."""
    count = len(effects)
    masks = np.zeros((count, size, size), bool)
    for k in range(count):
        masks[k, 2 * k : 2 * k + 2, 3:9] = True
    objects = [
        SceneObject("vehicle", str(k), mask, np.zeros(0, np.uint8), named=k < count - 1) for k, mask in enumerate(masks)
    ]
    changes = np.zeros(count, bool) if flips is None else np.array(flips)
    state = np.zeros((3, size, size), np.uint8)
    return Scene(state, episode, objects, masks, {"student": np.array(effects)}, {"student": changes})


def painted(item, values):
    """A map with these shares on the objects, and the rest on nothing."""
    found = np.zeros(item.masks.shape[1:])
    for mask, value in zip(item.masks, values, strict=True):
        found[mask] = value / mask.sum()
    found[11, :] = (1 - sum(values)) / 12
    return found


def test_a_map_of_the_effects_is_right_and_one_of_something_else_is_not():
    scenes = [scene([0.1, 0.6, 0.3], 0, [False, True, False]), scene([0.5, 0.2, 0.05], 1, [True, True, False])]
    right = causal_row(scenes, [painted(scenes[0], [0.1, 0.6, 0.3]), painted(scenes[1], [0.5, 0.2, 0.05])], "student")
    assert right.keys() == COLUMNS.keys()
    assert {c: right[c]["mean"] for c in ("correlation", "first", "own_correlation", "brightest", "held")} == {
        "correlation": 1, "first": 1, "own_correlation": 1, "brightest": 1, "held": 1,
    }  # fmt: skip
    assert right["mass"]["mean"] == pytest.approx((0.6 + 0.5) / 2) and right["mass"]["count"] == 2
    assert right["nothing"]["mean"] == pytest.approx((0.0 + 0.25) / 2)
    wrong = causal_row(scenes, [painted(scenes[0], [0.5, 0.05, 0.1]), painted(scenes[1], [0.1, 0.3, 0.35])], "student")
    assert wrong["first"]["mean"] == 0 and wrong["mass"]["mean"] == pytest.approx((0.05 + 0.1) / 2)
    assert wrong["own_correlation"]["mean"] == -1 and wrong["held"]["mean"] == pytest.approx(2 / 3)


def test_only_a_named_object_of_a_large_effect_is_a_decider():
    scenes = [scene([0.1, 0.2, 0.9]), scene([0.29, 0.2, 0.1])]
    row = causal_row(scenes, [painted(s, [0.3, 0.3, 0.3]) for s in scenes], "student")
    assert row["mass"] is None and row["brightest"] is None and row["held"] is None
    assert row["first"]["count"] == 2


def test_mass_on_what_is_needed_counts_each_pixel_once():
    item = scene([0.1, 0.6, 0.3])
    assert causal_row([item], [painted(item, [0.2, 0.5, 0.1])], "student")["needed"] is None  # no task says so
    item.masks[1] |= item.masks[0]  # what is needed overlaps
    needed = replace(item, objects=[replace(o, needed=k < 2) for k, o in enumerate(item.objects)])
    row = causal_row([needed], [painted(scene([0.1, 0.6, 0.3]), [0.2, 0.5, 0.1])], "student")
    assert row["needed"]["mean"] == pytest.approx(0.7)


def test_a_map_of_zeros_says_nothing():
    scenes = [scene([0.1, 0.6, 0.3])]
    row = causal_row(scenes, [np.zeros((12, 12))], "student")
    assert (row["first"]["mean"], row["brightest"]["mean"], row["mass"]["mean"], row["nothing"]["mean"]) == (0, 0, 0, 1)
    assert row["correlation"]["mean"] == 0


def test_errors_come_from_the_episodes_not_the_scenes():
    same = [scene([0.6, 0.1, 0.0], episode=0) for _ in range(20)]
    halves = [*same[:10], *(scene([0.6, 0.1, 0.0], episode=1) for _ in range(10))]
    maps = [painted(same[0], [1, 0, 0])] * 10 + [painted(same[0], [0, 1, 0])] * 10
    assert causal_row(same, maps, "student")["first"]["standard_error"] == 0
    error = causal_row(halves, maps, "student")["first"]["standard_error"]
    assert error == pytest.approx(np.sqrt(1 / 8), rel=0.1)  # two episodes, one right and one wrong


def test_no_scene_is_there_twice(monkeypatch):
    """An agent that turns left for ever sees four states of its room."""
    config = load_config("red_fetch_green")
    settings = replace(config.evaluation, causal_scenes=40, causal_interval=1, causal_environments=2)
    config = replace(config, evaluation=settings)
    policy = ActorCritic(config.policy, *OBSERVATION_SHAPE, 4)
    evaluation = SimpleNamespace(config=config, task=make_task(config), teacher=policy, student=policy, seed=1)
    monkeypatch.setattr(causal, "greedy", lambda policy: lambda observations: np.zeros(len(observations), int))
    scenes, changes = collect_scenes(evaluation)
    assert changes == 0
    assert len({scene.state.tobytes() for scene in scenes}) == len(scenes) < 40
    assert len(scenes) == 4 * len({scene.episode for scene in scenes})
