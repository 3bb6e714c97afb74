"""Programs that find their way by the map alone, as clients of CARLA do: a bird's-eye drawer and a lane follower."""

from __future__ import annotations

import math

import carla
import numpy as np
import pytest

from carla_digr.driving.session import SensorStream
from carla_digr.simulator.road import LANES, Road

ROAD = Road.ring()
HEIGHT, SIZE, FOV = 60.0, 300, 60.0


def every_lane(waypoint: carla.Waypoint) -> list[carla.Waypoint]:
    """All lanes that can be walked to from one to its neighbours, as bird's-eye views do."""
    found, ends = {waypoint.lane_id: waypoint}, [waypoint]
    while ends:
        lane = ends.pop()
        for neighbour in (lane.get_left_lane(), lane.get_right_lane()):
            if neighbour is not None and neighbour.lane_id not in found:
                found[neighbour.lane_id] = neighbour
                ends.append(neighbour)
    return list(found.values())


def test_a_birds_eye_drawer_draws_the_road_that_a_camera_sees_from_above(session):
    """Every lane walked by next() all around, drawn as quadrangles, against the labels of a camera straight down."""
    lanes = every_lane(session.map.get_waypoint(session.map.get_spawn_points()[0].location))
    assert {w.lane_id for w in lanes} == {*range(-6, 0), *range(1, 6)}
    walls = []
    for start in lanes:
        walked, here = [start], start
        while True:
            (here,) = here.next(4.0)
            walked.append(here)
            if len(walked) > 20 and here.transform.location.distance(start.transform.location) < 5.0:
                break
            assert len(walked) < 1000
        assert 4.0 * len(walked) == pytest.approx(ROAD.length, rel=0.08)
        if start.lane_type in (carla.LaneType.Driving, carla.LaneType.Shoulder):
            for w in walked:
                right, place = w.transform.get_right_vector(), w.transform.location
                half = w.lane_width / 2
                walls.append([(place.x + side * half * right.x, place.y + side * half * right.y) for side in (-1, 1)])
    edges = np.array(walls)  # (N, 2 sides, 2)
    for index in (5, 90, 170):
        over = session.map.get_spawn_points()[index].location
        eye = carla.Transform(carla.Location(over.x, over.y, HEIGHT), carla.Rotation(pitch=-90.0))
        blueprint = session.blueprint(
            "sensor.camera.semantic_segmentation", image_size_x=SIZE, image_size_y=SIZE, fov=FOV
        )
        camera = session.spawn(blueprint, eye)
        stream = SensorStream(session, camera)
        image = stream.take(session.tick().frame)
        seen = np.frombuffer(image.raw_data, np.uint8).reshape(SIZE, SIZE, 4)[..., 2]
        scale = SIZE / 2 / math.tan(math.radians(FOV / 2)) / HEIGHT  # px a metre; up in the picture is +x
        for share in np.linspace(0.1, 0.9, 5):
            points = edges[:, 0] + share * (edges[:, 1] - edges[:, 0])
            rows = SIZE / 2 - (points[:, 0] - over.x) * scale
            columns = SIZE / 2 + (points[:, 1] - over.y) * scale
            inside = (rows > 1) & (rows < SIZE - 1) & (columns > 1) & (columns < SIZE - 1)
            assert inside.sum() > 50
            labels = seen[rows[inside].astype(int), columns[inside].astype(int)]
            assert np.isin(labels, (1, 24, 8)).mean() > 0.97  # road, its lines, a gantry above it
        camera.destroy()


def test_an_agent_follows_its_lane_and_changes_it(session):
    """Pure pursuit of waypoint.next(), as agents.navigation does; then into the left lane as its marking allows."""
    start = session.map.get_spawn_points()[4 * 20 + 2]
    car = session.spawn(session.blueprint("vehicle.lincoln.mkz_2017"), start)
    session.tick()
    target = session.map.get_waypoint(car.get_location())
    speed, offsets = 20.0, []
    lane = target.lane_id

    def drive(frames: int) -> None:
        for _ in range(frames):
            here = session.map.get_waypoint(car.get_location())
            aim = here
            if here.lane_id != lane:
                aim = here.get_left_lane()
                assert aim.lane_type == carla.LaneType.Driving
            (ahead,) = aim.next(14.0)
            pose = car.get_transform()
            way = ahead.transform.location - pose.location
            angle = math.atan2(way.y, way.x) - math.radians(pose.rotation.yaw)
            angle = (angle + math.pi) % (2 * math.pi) - math.pi
            wheel = math.atan(2.0 * 2.85 * math.sin(angle) / max(math.hypot(way.x, way.y), 1.0))
            throttle = min(max(0.5 * (speed - car.get_velocity().length()), 0.0), 1.0)
            car.apply_control(carla.VehicleControl(throttle, wheel / math.radians(70.0), 0.0))
            session.tick()
            offsets.append(float(ROAD.project(car.get_location().x, car.get_location().y)[1]))

    drive(250)
    d = float(ROAD.project(start.location.x, start.location.y)[1])
    assert np.abs(np.array(offsets[60:]) - d).max() < 0.6
    here = session.map.get_waypoint(car.get_location())
    assert here.lane_id == lane and here.left_lane_marking.lane_change == carla.LaneChange.Both
    lane = here.get_left_lane().lane_id
    drive(120)
    assert session.map.get_waypoint(car.get_location()).lane_id == lane
    assert offsets[-1] == pytest.approx(d - 3.6, abs=0.5)
    assert car.get_velocity().length() > 15.0 and LANES == 4
