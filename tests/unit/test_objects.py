"""What decides, from a segmentation: properties of masks, of painting over, of shares and of the sentence."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.driving.control import Neighbour
from carla_digr.explainer import Explainer
from carla_digr.objects import (
    BARRIER,
    LINE,
    MAJORITY,
    MOST_OBJECTS,
    OUTLINE_CORNERS,
    OUTLINE_PARTS,
    VOTES,
    ExplainedObject,
    Narrator,
    ViewedObject,
    explain_objects,
    map_shares,
    outlines,
    painted_over,
    viewed_objects,
)
from carla_digr.simulator.road import LANE_WIDTH, LANES, MEDIAN_HALF_WIDTH
from carla_digr.simulator.sensors import instance_picture
from carla_digr.tasks.driving.drive import InProcessDrive

GROWN = np.ones((3, 3), np.uint8)  # a vehicle's edges and shadow


@pytest.fixture(scope="module")
def explainer(weights):
    return Explainer.from_checkpoint(weights)


@pytest.fixture(scope="module")
def drive():
    drive = InProcessDrive()
    drive.reset(4)
    return drive


def segmentation(drive, fineness=2):
    size = drive.camera.width * fineness
    return instance_picture(drive.world, replace(drive.camera, width=size, height=size))[:, :, 2::-1]


def others(drive) -> dict[int, Neighbour]:
    return {int(id_): Neighbour(30.0, 0.0, 0) for id_ in drive.world.vehicles["id"] if id_ != drive.ego}


def random_masks(rng, count=6, size=32):
    masks = rng.random((count, size, size)) < rng.uniform(0.05, 0.95, (count, 1, 1))
    masks[0, 3] = True  # a row with nothing beside it
    return masks


@pytest.mark.parametrize("seed", range(3))
def test_painting_over_leaves_all_other_pixels_alone_and_forgets_what_was_under_the_mask(seed):
    rng = np.random.default_rng(seed)
    state, masks = rng.random((3, 32, 32), np.float32), random_masks(rng)
    pictures = painted_over(state, masks)
    other = np.where(masks[:, None], rng.random(pictures.shape, np.float32), state)
    for mask, picture, changed in zip(masks, pictures, other, strict=True):
        np.testing.assert_array_equal(picture[:, ~mask], state[:, ~mask])
        rows = ~mask.all(axis=1)
        np.testing.assert_array_equal(painted_over(changed, mask[None])[0][:, rows], picture[:, rows])
        np.testing.assert_array_equal(picture[:, ~rows], state[:, ~rows])


def test_painting_over_is_a_straight_line_between_the_neighbours_of_a_row():
    state = np.zeros((1, 1, 8), np.float32)
    state[0, 0] = (5, 1, 9, 9, 9, 3, 9, 9)
    mask = np.array([[[True, False, True, True, True, False, True, True]]])
    np.testing.assert_allclose(painted_over(state, mask)[0, 0, 0], (1, 1, 1.5, 2, 2.5, 3, 3, 3))


@pytest.mark.parametrize("seed", range(3))
def test_an_outline_surrounds_the_pixels_closely_and_has_few_corners(drive, seed):
    rng = np.random.default_rng(seed)
    for masks in (random_masks(rng), [thing.mask for thing in viewed_objects(segmentation(drive, 1), others(drive))]):
        for mask in masks:
            parts = outlines(mask)
            assert 1 <= len(parts) <= OUTLINE_PARTS and sum(map(len, parts)) <= OUTLINE_CORNERS
            filled = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [part.astype(np.int32) for part in parts], 1)
            reach = cv2.dilate(cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5))), np.ones((5, 5)))
            if mask.shape == (128, 128):
                assert (filled.view(bool) & mask).sum() >= 0.8 * mask.sum()
                assert (filled.view(bool) & ~reach.view(bool)).sum() <= 0.05 * filled.sum()
    square = np.zeros((32, 32), np.bool_)
    square[10:20, 0:5] = True  # at the picture's edge
    (corners,) = outlines(square)
    assert sorted(map(tuple, corners.tolist())) == [(0, 9), (0, 20), (5, 9), (5, 20)]
    assert outlines(np.zeros((32, 32), np.bool_)) == []


def test_a_batch_of_things_has_the_effects_of_each_alone(explainer, drive):
    decision = explainer.decide(drive.frame().image)
    saliency = explainer.explain(decision).map
    things = viewed_objects(segmentation(drive), others(drive), saliency.shape)
    together = explain_objects(explainer, decision, saliency, things)
    assert [thing.effect for thing in together] == sorted((thing.effect for thing in together), reverse=True)
    for thing in together:
        (alone,) = explain_objects(explainer, decision, None, [thing.seen])
        assert alone.effect == pytest.approx(thing.effect, abs=1e-5)
        assert (alone.action, alone.flips) == (thing.action, thing.action != decision.action)
        assert np.isnan(alone.share)


@pytest.mark.parametrize("name", ["driving_calm_student", "driving_student"])
def test_effects_and_flips_are_those_of_whole_pictures(drive, name):
    """Of the shipped students along a drive, though only what a thing's pixels change is computed."""
    explainer = Explainer.from_checkpoint(WEIGHTS_DIRECTORY / f"{name}.safetensors")
    seen = 0
    for seed in range(8):
        decision = explainer.decide(drive.reset(seed).image)
        things = viewed_objects(segmentation(drive), others(drive), (128, 128))
        masks = np.stack([cv2.dilate(t.mask.view(np.uint8), GROWN, anchor=(1, 2)) if t.id else t.mask for t in things])
        states = painted_over(decision.state[0].numpy(), masks.view(np.bool_))
        effects, actions = explainer.instead(decision, torch.from_numpy(states))
        whole = {
            thing.identity: (effect, action) for thing, effect, action in zip(things, effects, actions, strict=True)
        }
        for thing in explain_objects(explainer, decision, None, things):
            effect, action = whole[thing.seen.identity]
            assert thing.effect == pytest.approx(effect, abs=1e-5)
            assert (thing.action, thing.flips) == (action, action != decision.action)
            seen += 1
    assert seen > 50


def test_nothing_in_view_has_no_effect_and_an_empty_mask_none_either(explainer, drive):
    decision = explainer.decide(drive.frame().image)
    assert explain_objects(explainer, decision, None, []) == []
    (nothing,) = explain_objects(
        explainer, decision, None, [ViewedObject(1, "car", 0, 9.0, np.zeros((128, 128), np.bool_))]
    )
    assert nothing.effect == pytest.approx(0.0, abs=1e-6)
    assert not nothing.flips


@pytest.mark.parametrize("seed", range(3))
def test_shares_have_a_sum_of_one_at_most_and_are_one_where_masks_cover_all(seed):
    rng = np.random.default_rng(seed)
    saliency, masks = rng.random((32, 32), np.float32), random_masks(rng)
    assert map_shares(saliency, masks).sum() <= 1.0 + 1e-9
    halves = np.zeros((2, 32, 32), np.bool_)
    halves[0, :16] = halves[1, 16:] = True
    shares = map_shares(saliency, halves)
    np.testing.assert_allclose(
        shares, [saliency[:16].sum() / saliency.sum(), saliency[16:].sum() / saliency.sum()], 1e-5
    )
    assert np.isnan(map_shares(np.zeros_like(saliency), masks)).all()


def test_a_share_is_the_mass_within_two_pixels():
    saliency, mask = np.zeros((32, 32), np.float32), np.zeros((1, 32, 32), np.bool_)
    mask[0, 10, 10] = True
    saliency[10, 12] = saliency[10, 13] = 1.0
    assert map_shares(saliency, mask)[0] == pytest.approx(0.5)


def test_vehicles_in_view_are_the_neighbours_that_the_segmentation_shows(drive):
    labels = segmentation(drive, 1)
    shown = set(np.unique(drive.world.instances(drive.camera)).tolist())
    things = viewed_objects(labels, others(drive))
    ids = drive.world.instances(drive.camera)
    vehicles = [thing for thing in things if thing.id]
    assert vehicles
    assert {thing.id for thing in vehicles} <= shown - {drive.ego}
    for thing in vehicles:
        np.testing.assert_array_equal(thing.mask, ids == thing.id)
    unknown = viewed_objects(labels, {})
    assert not any(thing.id for thing in unknown)


def test_ids_are_matched_by_their_two_low_bytes(drive):
    labels = segmentation(drive, 1)
    far = {id_ + (7 << 16): neighbour for id_, neighbour in others(drive).items()}
    near = [thing.id for thing in viewed_objects(labels, others(drive)) if thing.id]
    assert [thing.id - (7 << 16) for thing in viewed_objects(labels, far) if thing.id] == near


@pytest.mark.parametrize("fineness", [2, 3])
def test_a_finer_segmentation_gives_every_pixel_to_all_that_shows_in_it(drive, fineness):
    labels = segmentation(drive, fineness)
    fine = {thing.identity: thing.mask for thing in viewed_objects(labels, others(drive))}
    for thing in viewed_objects(labels, others(drive), (128, 128)):
        blocks = fine[thing.identity].reshape(128, fineness, 128, fineness)
        np.testing.assert_array_equal(thing.mask, blocks.any(axis=(1, 3)))


def test_lane_lines_are_told_apart_in_bends_too():
    """The ego's lane is between the lines -1 and 1, and the next ones are lanes apart."""
    drive = InProcessDrive()
    for seed in range(12):
        drive.reset(seed)
        lines = {t.lane: t.distance for t in viewed_objects(segmentation(drive), others(drive)) if t.kind == LINE}
        from_the_middle = float(drive.world.vehicle(drive.ego)["d"]) - MEDIAN_HALF_WIDTH
        for lane, distance in lines.items():
            number = math.floor(from_the_middle / LANE_WIDTH) + lane + (lane < 0)
            if 0 <= number <= LANES and distance < 8.0:  # those far aside are a few pixels
                assert distance == pytest.approx(abs(number * LANE_WIDTH - from_the_middle), abs=0.8), (seed, lane)
        assert {-1, 1} <= lines.keys()


def test_barriers_are_on_both_sides(drive):
    sides = {thing.lane for thing in viewed_objects(segmentation(drive), others(drive)) if thing.kind == BARRIER}
    assert sides == {-1, 1}


def test_there_are_never_more_than_the_most(drive):
    rng = np.random.default_rng(0)
    labels = np.zeros((128, 128, 3), np.uint8)
    labels[..., 0], labels[..., 1] = 14, rng.integers(0, 60, (128, 128))
    things = viewed_objects(labels, {number: Neighbour(1.0, 0.0) for number in range(60)})
    assert len(things) == MOST_OBJECTS
    noise = rng.integers(0, 256, (128, 128, 3), np.uint8)
    assert len(viewed_objects(noise, {number: Neighbour(1.0, 0.0) for number in range(60)})) <= MOST_OBJECTS


# --- the sentence ---

ACTIONS = ("left", "keep", "right", "brake", "go")


def thing(id_=7, effect=1.0, action=0, kind="truck", lane=0, distance=24.0, decided=1):
    return ExplainedObject(
        ViewedObject(id_, kind, lane, distance, np.zeros((1, 1), np.bool_)), 0.5, effect, action, action != decided
    )


@pytest.mark.parametrize(
    ("action", "objects", "sentence"),
    [
        (1, [thing()], "Keeps the lane because of the truck 24 m ahead: without it, it would steer left."),
        (
            1,
            [thing(action=1)],
            "Keeps the lane; the truck 24 m ahead weighs most, but it would do the same without it.",
        ),
        (1, [thing(effect=0.01)], "Keeps the lane; nothing in view decides that by itself."),
        (3, [], "Brakes; nothing in view decides that by itself."),
        (
            0,
            [thing(kind="car", lane=1, distance=-12.0, action=4)],
            "Steers left because of the car one lane to the right, 12 m behind: without it, it would choose go.",
        ),
        (
            2,
            [thing(0, kind=LINE, lane=-2, distance=5.4, action=3)],
            "Steers right because of the second lane line on the left: without it, it would brake.",
        ),
        (
            4,
            [thing(0, kind=BARRIER, lane=-1, distance=8.0, action=1)],
            "Chooses go because of the barrier on the left: without it, it would keep the lane.",
        ),
        (
            1,
            [thing(distance=float("nan"), lane=127)],
            "Keeps the lane because of the truck: without it, it would steer left.",
        ),
        (-1, [thing(action=-1)], "What weighs most is the truck 24 m ahead."),
        (-1, [], "Nothing in view decides by itself."),
    ],
)
def test_the_sentence_says_what_the_numbers_say(action, objects, sentence):
    assert Narrator(ACTIONS).say(action, objects) == sentence


def test_the_sentence_changes_only_when_another_thing_has_led_in_most_of_the_last_frames():
    narrator = Narrator(ACTIONS)
    first = {narrator.say(1, [thing(7), thing(8, 0.5, kind="car")]) for _ in range(VOTES)}
    assert len(first) == 1
    changed = [narrator.say(1, [thing(8, 2.0, kind="car"), thing(7)]) for _ in range(VOTES)]
    at = next(index for index, sentence in enumerate(changed) if sentence not in first)
    assert at == MAJORITY - 1
    assert len(set(changed[at:])) == 1
    assert "the car" in changed[at]


def test_the_sentence_is_still_while_leader_and_action_flicker():
    narrator = Narrator(ACTIONS)
    said = set()
    for number in range(60):
        odd = number % 3 == 1
        objects = [thing(7, 1.0), thing(8, 2.0 if odd else 0.2, kind="car")]
        said.add(narrator.say(2 if odd else 1, objects))
    assert said == {"Keeps the lane because of the truck 24 m ahead: without it, it would steer left."}


def test_the_distance_is_said_anew_when_it_has_changed():
    narrator = Narrator(ACTIONS)
    said = [narrator.say(1, [thing(distance=24.0 - 0.5 * number)]) for number in range(25)]
    assert 2 <= len(set(said)) <= 4
    for number, sentence in enumerate(said):
        metres = int(sentence.split(" m ahead")[0].rsplit(" ", 1)[1])
        assert abs(metres - (24.0 - 0.5 * number)) <= 0.2 * 24.0 + 0.5


def test_a_new_beginning_forgets_the_frames_before():
    narrator = Narrator(ACTIONS)
    for _ in range(VOTES):
        narrator.say(1, [thing(7)])
    narrator.restart()
    assert narrator.say(3, []) == "Brakes; nothing in view decides that by itself."


def test_effects_are_those_of_the_explained_action_where_one_is_asked_for(explainer, drive):
    decision = explainer.decide(drive.frame().image)
    things = viewed_objects(segmentation(drive), others(drive), (128, 128))
    explainer.target = "brake"
    try:
        of_one = explain_objects(explainer, decision, None, things)
    finally:
        explainer.target = None
    of_all = {t.seen.identity: t.effect for t in explain_objects(explainer, decision, None, things)}
    assert all(t.effect <= of_all[t.seen.identity] + 1e-5 for t in of_one)  # what one event tells, all tell
    assert torch.isfinite(torch.tensor([t.effect for t in of_one])).all()
