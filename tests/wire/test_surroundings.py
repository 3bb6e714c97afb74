"""The second camera of a drive: of the same frame, place and pixels as the first, and the vehicles that it shows."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from carla_digr.driving.control import ACTIONS, IMAGE_SIZE, UNKNOWN_LANE
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.surroundings import SIZE, VEHICLE_LABELS, Surroundings
from carla_digr.objects import KINDS, viewed_objects
from carla_digr.simulator.road import LANE_WIDTH, MEDIAN_HALF_WIDTH
from carla_digr.simulator.sensors import semantic_picture
from carla_digr.simulator.traffic import ONCOMING
from carla_digr.tasks.driving.drive import InProcessDrive


def come(drive: Scenario) -> Surroundings:
    """Those of the present frame, when they have come."""
    end = time.monotonic() + 20.0
    while (found := drive.surroundings()) is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    return found


def test_the_segmentation_is_of_the_frame_that_was_decided_on(shared_simulator):
    """The same drive in process says what each pixel shows and where every vehicle is."""
    here = InProcessDrive(vehicles=64)
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, surroundings=True) as drive:
        assert drive.segments
        there, frame = drive.reset(11), here.reset(11)
        lanes = set()
        for number in range(40):
            np.testing.assert_array_equal(there.image, frame.image)
            found = come(drive)
            assert drive.surroundings() is None  # once a frame
            camera = replace(here.camera, width=SIZE, height=SIZE)
            np.testing.assert_array_equal(found.labels[..., 0], semantic_picture(here.world, camera)[..., 2])
            lanes |= check_vehicles(here, found)
            if number % 20 == 0:
                check_masks(here, found)
            wanted = ACTIONS["wheels"][("left", "keep", "right")[number % 3]]
            there, frame = drive.step(wanted), here.step(wanted)
        assert {-1, 0, 1, UNKNOWN_LANE} & lanes and len(lanes) >= 3


def check_vehicles(here: InProcessDrive, found: Surroundings) -> set[int]:
    """Each of the vehicles in the picture is the one at the same place in the world; their lanes."""
    ids = here.world.instances(replace(here.camera, width=SIZE, height=SIZE))
    ego = here.world.vehicle(here.ego)
    seen = {int(i) for i in np.unique(ids) if i > 0} - {here.ego}
    assert len(found.vehicles) == len(seen)
    numbers = found.labels[..., 1].astype(int) | found.labels[..., 2].astype(int) << 8
    for actor, neighbour in found.vehicles.items():
        (own,) = set(np.unique(ids[(numbers == actor & 0xFFFF) & np.isin(found.labels[..., 0], VEHICLE_LABELS)]))
        row = here.world.vehicle(own)
        place = np.array([row["x"] - ego["x"], row["y"] - ego["y"]])
        forward = np.array([np.cos(ego["yaw"]), np.sin(ego["yaw"])])
        assert neighbour.ahead == pytest.approx(place @ forward, abs=1e-2)
        assert neighbour.right == pytest.approx(place @ (-forward[1], forward[0]), abs=1e-2)
        if row["driver"] == ONCOMING:
            assert neighbour.lane == UNKNOWN_LANE
        elif neighbour.lane != UNKNOWN_LANE:
            lane_of = [int((vehicle["d"] - MEDIAN_HALF_WIDTH) // LANE_WIDTH) for vehicle in (row, ego)]
            apart = [abs((v["d"] - MEDIAN_HALF_WIDTH) % LANE_WIDTH - LANE_WIDTH / 2) for v in (row, ego)]
            if max(apart) < 1.4:  # not on a line
                assert neighbour.lane == lane_of[0] - lane_of[1]
        else:
            assert np.hypot(*place) > 50.0
    return {neighbour.lane for neighbour in found.vehicles.values()}


def check_masks(here: InProcessDrive, found: Surroundings) -> None:
    """Who may decide covers the pixels that it covers in process, at the second camera's two samples a pixel."""
    ids = here.world.instances(replace(here.camera, width=SIZE, height=SIZE))
    numbers = found.labels[..., 1].astype(int) | found.labels[..., 2].astype(int) << 8
    vehicles = [o for o in viewed_objects(found.labels, found.vehicles, (IMAGE_SIZE, IMAGE_SIZE)) if o.id]
    assert vehicles
    for seen in vehicles:
        (own,) = set(np.unique(ids[(numbers == seen.id & 0xFFFF) & np.isin(found.labels[..., 0], VEHICLE_LABELS)]))
        samples = (ids == own).reshape(IMAGE_SIZE, SIZE // IMAGE_SIZE, IMAGE_SIZE, SIZE // IMAGE_SIZE)
        np.testing.assert_array_equal(seen.mask, samples.any(axis=(1, 3)))


def test_without_being_asked_for_there_is_no_second_camera(shared_simulator):
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, vehicles=3) as drive:
        drive.reset(1)
        assert not drive.segments
        assert drive.surroundings() is None


def test_a_server_without_such_a_camera_drives_without(shared_simulator, monkeypatch):
    monkeypatch.setattr("carla_digr.driving.surroundings.CAMERA_BLUEPRINT", "sensor.camera.of_another_server")
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, vehicles=3, surroundings=True) as drive:
        assert drive.reset(1).image.shape == (128, 128, 3)
        assert not drive.segments
        assert drive.surroundings() is None


def test_labels_of_vehicles_are_the_kinds_of_objects():
    assert set(VEHICLE_LABELS) == set(KINDS)
