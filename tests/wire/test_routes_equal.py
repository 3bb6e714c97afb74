"""The same seed and commands give the same frames in process and over CARLA's protocol."""

from __future__ import annotations

import carla
import numpy as np
import pytest

from carla_digr.driving.control import ACTIONS, CAMERA, IMAGE_SIZE
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import SensorStream
from carla_digr.tasks.driving.classes import SAMPLES, class_picture
from carla_digr.tasks.driving.drive import InProcessDrive
from carla_digr.tasks.driving.environment import DrivingEnv

DECISION_TICKS = 5  # a held wheel angle makes the drives leave their lane, meet traffic and crash


WHEELS = tuple(ACTIONS["wheels"].values())


def actions(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.repeat(rng.choice([0, 1, 1, 1, 2, 3], count // DECISION_TICKS + 1), DECISION_TICKS)[:count]


@pytest.fixture(scope="module")
def drive(shared_simulator):
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port) as connected:
        yield connected


@pytest.mark.parametrize("seed, kind", [(1, "wheels"), (2, "lane"), (77, "wheels"), (1, "wheels"), (3, "lane")])
def test_pictures_are_equal_to_the_byte(drive, seed, kind):
    commands = tuple(ACTIONS[kind].values())
    here = InProcessDrive()
    a, b = here.reset(seed), drive.reset(seed)
    start = a.frame - b.frame, a.stamp - b.stamp
    for i, action in enumerate(actions(seed, 150)):
        assert a.image.tobytes() == b.image.tobytes(), i
        assert (a.x, a.y, a.speed, a.off_road, a.collision) == (b.x, b.y, b.speed, b.off_road, b.collision)
        assert b.yaw == pytest.approx(a.yaw, abs=1e-6)
        assert a.frame - b.frame == start[0]
        assert a.stamp - b.stamp == pytest.approx(start[1], abs=1e-6)
        a, b = here.step(commands[action]), drive.step(commands[action])


def test_the_environment_is_the_same_over_both_routes(drive):
    here, there = DrivingEnv(), DrivingEnv(drive=drive)
    for seed in (5, 6):
        a, b = here.reset(seed=seed)[0], there.reset(seed=seed)[0]
        for i, action in enumerate(actions(seed, 100)):
            assert (a == b).all(), i
            a, _, *over_here, facts = here.step(int(action))
            b, _, *over_there, facts_there = there.step(int(action))
            assert over_here == over_there, i
            assert facts["collision"] == facts_there["collision"]
            if any(over_here):
                break


def test_the_classes_of_the_picture_are_the_same_over_carlas_instance_camera(drive):
    """What a pixel shows (tasks.highway_classes), from an instance camera on the ego's own camera's place."""
    here = InProcessDrive()
    session, ego = drive._session, drive._ego
    size = SAMPLES * IMAGE_SIZE
    place = carla.Transform(
        carla.Location(CAMERA["x"], CAMERA["y"], CAMERA["z"]), carla.Rotation(CAMERA["pitch"], CAMERA["yaw"])
    )
    blueprint = session.blueprint(
        "sensor.camera.instance_segmentation", image_size_x=size, image_size_y=size, fov=CAMERA["fov"]
    )
    camera = session.spawn(blueprint, place, ego)
    stream = SensorStream(session, camera)
    while stream.poll(drive.step(WHEELS[1]).frame, 1.0) is None:
        pass  # the subscription has not taken effect yet
    here.reset(31)
    there = drive.reset(31)
    for action in actions(31, 30):
        here.step(WHEELS[int(action)])
        there = drive.step(WHEELS[int(action)])
        picture = np.frombuffer(stream.take(there.frame).raw_data, np.uint8).reshape(size, size, 4).astype(np.int32)
        number = picture[..., 1] + 256 * picture[..., 0]
        vehicle = np.isin(picture[..., 2], [14, 15, 16])  # CARLA's labels of car, truck and bus
        classes = class_picture(np.where(vehicle, number, -number), ego.id % 65536)
        np.testing.assert_array_equal(classes, here.classes())
    session.destroy(camera)
