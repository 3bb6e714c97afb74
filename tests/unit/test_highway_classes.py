"""The truth about the driving task's pictures: classes that agree with the instance picture and with the colours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from carla_digr.driving.control import ACTIONS
from carla_digr.simulator import shading
from carla_digr.simulator.traffic import ONCOMING
from carla_digr.tasks.driving import DrivingConfig
from carla_digr.tasks.driving.batch import DrivingVecEnv
from carla_digr.tasks.driving.classes import CLASSES, EGO, RELEVANT, SAMPLES, importance_of
from carla_digr.tasks.driving.drive import InProcessDrive

IDS = {  # the renderer's ids of each class but the vehicles
    "lane line": {shading.ID_LINE},
    "barrier": {shading.ID_BARRIER},
    "guard rail": {shading.ID_RAIL},
    "empty road": {shading.ID_ROAD},
    "sky": {shading.ID_SKY},
    "vegetation": {shading.ID_VEGETATION, shading.ID_TERRAIN},
    "building": {shading.ID_BUILDING, shading.ID_SIGN},
}


@pytest.fixture(scope="module", params=[3, 11])
def drive(request) -> InProcessDrive:
    drive = InProcessDrive()
    drive.reset(request.param)
    for _ in range(40):
        drive.step(ACTIONS["wheels"]["keep"])
    return drive


def test_a_pixel_shows_what_the_instance_picture_has_at_its_centre_or_a_relevant_piece_of_an_object(drive):
    classes = drive.classes()
    ids = drive.world.instances(drive.camera)
    centre = np.full(ids.shape, CLASSES.index("vehicle"))
    for name, numbers in IDS.items():
        centre[np.isin(ids, list(numbers))] = CLASSES.index(name)
    centre[ids == drive.ego] = EGO
    assert (classes[classes > EGO] == centre[classes > EGO]).all()
    assert (classes[centre <= EGO] <= centre[centre <= EGO]).all()  # a class before it may show a piece beside it
    size = {"width": SAMPLES * ids.shape[1], "height": SAMPLES * ids.shape[0]}
    fine = drive.world.instances(replace(drive.camera, **size))
    for y, x in np.argwhere(classes < RELEVANT):
        block = fine[y * SAMPLES : (y + 1) * SAMPLES, x * SAMPLES : (x + 1) * SAMPLES]
        name = CLASSES[classes[y, x]]
        wanted = (block > 0) & (block != drive.ego) if name == "vehicle" else np.isin(block, list(IDS[name]))
        assert wanted.any(), (y, x, name)


def test_only_pixels_of_vehicles_change_with_the_vehicles_colours(drive):
    """What the picture shows in colour, the classes must know: the two use different samples of a pixel."""
    before = drive.frame().image.astype(int)
    vehicles = drive.world.vehicles
    kept = vehicles["color"].copy()
    vehicles["color"] = 255 - kept
    after = drive.frame().image.astype(int)
    vehicles["color"] = kept
    changed, classes = (before != after).any(axis=2), drive.classes()
    not_of_vehicles = changed & (classes != CLASSES.index("vehicle")) & (classes != EGO)
    assert changed.sum() > 100
    # On the ego's outline a piece of the line or rail behind it may come first.
    assert (not_of_vehicles & (classes > EGO)).sum() == 0
    assert not_of_vehicles.sum() < 0.05 * changed.sum()


@pytest.mark.slow
def test_the_ego_and_every_relevant_class_are_seen_and_labelled():
    env = DrivingVecEnv(4, 5, DrivingConfig(), evaluation=True)
    env.reset()
    seen = set()
    for _ in range(40):
        env.step(np.ones(4, int))
        seen |= set(np.unique(env.classes()))
    assert seen == set(range(len(CLASSES)))
    classes, importance = env.classes(), env.importance()
    assert importance.shape == (4, 128, 128) and importance.dtype == np.int8
    assert np.array_equal(importance == 1, classes < RELEVANT)
    assert np.array_equal(importance == -1, classes == EGO)
    assert np.array_equal(importance, importance_of(classes))
    assert 0.03 < (importance == 1).mean() < 0.2
    own = env.episodes[0].drive.world.vehicles
    assert (own["driver"] == ONCOMING).any()  # oncoming traffic counts as vehicles too
