"""Walkers that walk, walkers and props in pictures and in the way, and the whole sensor list of manual_control.py."""

from __future__ import annotations

import math
import queue

import carla
import numpy as np
import pytest
from simulator_process import eventually, run_client

from carla_digr.driving.session import SensorStream, Session
from carla_digr.simulator.navigation import STRIP
from carla_digr.simulator.road import Road

ROAD = Road.ring()
EGO = "vehicle.tesla.model3"


@pytest.fixture
def client(shared_simulator, tmp_path):
    """One that keeps what it downloads for itself."""
    made = carla.Client("127.0.0.1", shared_simulator.port)
    made.set_timeout(20.0)
    made.set_files_base_folder(str(tmp_path))
    return made


def offsets(locations: list[carla.Location]) -> np.ndarray:
    return np.abs(ROAD.project(*np.array([(p.x, p.y) for p in locations]).T)[1])


def beside(session: Session, index: int, d: float) -> carla.Transform:
    """A place beside the road, looking along it."""
    point = session.map.get_spawn_points()[index]
    s, _, heading = (float(v) for v in ROAD.project(point.location.x, point.location.y))
    x, y, _ = (float(v) for v in ROAD.pose(s, d))
    return carla.Transform(carla.Location(x, y, 1.0), carla.Rotation(yaw=math.degrees(heading)))


def test_walkers_are_spawned_and_led_as_generate_traffic_does_it(session, client):
    """Random places in the strips beside the road, a batch of walkers and controllers, ways to walk, and an end."""
    world, command = client.get_world(), carla.command
    world.set_pedestrians_seed(7)
    places = [world.get_random_location_from_navigation() for _ in range(24)]
    assert offsets(places).min() > STRIP[0] - 0.3 and offsets(places).max() < STRIP[1] + 0.3
    assert len({(round(p.x / 100), round(p.y / 100)) for p in places}) > 8  # all around
    library = world.get_blueprint_library()
    blueprints = library.filter("walker.pedestrian.*")
    batch = [command.SpawnActor(blueprints[i], carla.Transform(p)) for i, p in enumerate(places)]
    answers = client.apply_batch_sync(batch, True)
    assert not [a.error for a in answers if a.error]
    walkers = [a.actor_id for a in answers]
    leader = library.find("controller.ai.walker")
    answers = client.apply_batch_sync([command.SpawnActor(leader, carla.Transform(), i) for i in walkers], True)
    assert not [a.error for a in answers if a.error]
    leaders = [a.actor_id for a in answers]
    try:
        world.tick()
        world.set_pedestrians_cross_factor(0.0)
        for number, actor in enumerate(world.get_actors(leaders)):
            actor.start()
            actor.go_to_location(world.get_random_location_from_navigation())
            actor.set_max_speed(1.4 if number % 2 else 2.5)
        before = {actor.id: actor.get_location() for actor in world.get_actors(walkers)}
        for _ in range(100):
            world.tick()
        there = world.get_actors(walkers)
        went = np.array([actor.get_location().distance(before[actor.id]) for actor in there])
        assert np.median(went) > 5.0 and went.max() < 5.0 * 2.7
        assert offsets([actor.get_location() for actor in there]).min() > STRIP[0] - 0.3
        assert offsets([actor.get_location() for actor in there]).max() < STRIP[1] + 0.3
        speeds = [actor.get_velocity().length() for actor in there]
        assert 1.0 < np.median(speeds) < 2.7
        assert all(
            actor.get_control().speed == pytest.approx(v, abs=0.3) for actor, v in zip(there, speeds, strict=True)
        )
        assert there[0].get_location().z == pytest.approx(there[0].bounding_box.extent.z, abs=0.05)
        for actor in world.get_actors(leaders):
            actor.stop()
        world.tick()
        where = [actor.get_location() for actor in there]
        for _ in range(5):
            world.tick()
    finally:
        client.apply_batch_sync([command.DestroyActor(i) for i in leaders + walkers], True)
        session.frame = session.world.get_snapshot().frame
    assert len(where) == 24
    with pytest.raises(RuntimeError, match="needs a walker to be attached to"):
        session.world.spawn_actor(session.blueprints.find("controller.ai.walker"), carla.Transform())


WITHOUT_A_HOME = """
    import os
    os.environ["HOME"] = "/proc"  # where nobody can write
    from carla_digr.driving.session import Session
    with Session.connect("127.0.0.1", PORT, 20.0) as session:
        session.tick()
        print(session.world.get_random_location_from_navigation().z)
"""


def test_a_session_needs_no_home_for_what_the_client_downloads(shared_simulator):
    said, errors = run_client(WITHOUT_A_HOME, shared_simulator).communicate(timeout=120)
    assert said == "0.0\n", errors


def test_a_walker_goes_where_its_control_says_and_carries_a_camera(session):
    start = beside(session, 40, STRIP[0] + 1.0)
    walker = session.spawn(session.blueprint("walker.pedestrian.0003"), start)
    eye = session.spawn(
        session.blueprint("sensor.camera.depth", image_size_x=8, image_size_y=8),
        carla.Transform(carla.Location(0.3, 0.0, 0.6)),
        walker,
    )
    pictures = SensorStream(session, eye)
    session.tick()
    walker.apply_control(carla.WalkerControl(carla.Vector3D(1.0, 1.0, 0.0), 2.0))
    for _ in range(20):
        frame = session.tick().frame
    went = walker.get_location() - start.location
    assert (went.x, went.y) == pytest.approx((math.sqrt(2.0),) * 2, abs=0.15)
    assert walker.get_velocity().length() == pytest.approx(2.0, abs=1e-3)
    assert walker.get_transform().rotation.yaw == pytest.approx(45.0, abs=1e-3)
    control = walker.get_control()
    assert control.speed == pytest.approx(2.0) and not control.jump
    place = walker.get_transform().transform(carla.Location(0.3, 0.0, 0.6))
    assert pictures.take(frame).transform.location.distance(place) < 0.01
    walker.apply_control(carla.WalkerControl())
    session.tick()
    where = walker.get_location()
    session.tick()
    assert walker.get_location() == where
    with pytest.raises(RuntimeError, match="is no walker"):
        answer = session.client.apply_batch_sync(
            [carla.command.ApplyWalkerControl(eye.id, carla.WalkerControl())], False
        )
        raise RuntimeError(answer[0].error)


def test_walkers_and_props_are_seen_by_cameras_and_lidars(session):
    place = beside(session, 60, 8.0)
    ahead = place.get_forward_vector()
    things = {"walker.pedestrian.0001": 12, "static.prop.trafficcone01": 21, "static.prop.busstop": 20}
    actors = {}
    for number, name in enumerate(things):
        side = place.get_right_vector() * (3.0 * number - 3.0)
        spot = place.location + carla.Location(ahead * 12.0 + side)
        actors[name] = session.spawn(session.blueprint(name), carla.Transform(spot, place.rotation))
    eye = carla.Transform(place.location + carla.Location(z=0.8), place.rotation)
    size = {"image_size_x": 160, "image_size_y": 120, "fov": 60}
    streams = {
        kind: SensorStream(session, session.spawn(session.blueprint(f"sensor.camera.{kind}", **size), eye))
        for kind in ("rgb", "semantic_segmentation", "instance_segmentation", "depth")
    }
    lidar = session.spawn(
        session.blueprint(
            "sensor.lidar.ray_cast_semantic", range=40, points_per_second=400_000, channels=64, rotation_frequency=20
        ),
        eye,
    )
    echoes = SensorStream(session, lidar)
    frame = session.tick().frame
    pictures = {
        kind: np.frombuffer(stream.take(frame).raw_data, np.uint8).reshape(120, 160, 4).astype(int)
        for kind, stream in streams.items()
    }
    seen = echoes.take(frame)
    labels, numbers = pictures["semantic_segmentation"][..., 2], pictures["instance_segmentation"]
    depth = (pictures["depth"] @ (65536, 256, 1, 0)) / (2**24 - 1) * 1000.0
    for name, label in things.items():
        shown = numbers[..., 1] + 256 * numbers[..., 0] == actors[name].id % 65536
        assert shown.sum() > 20, name
        assert (labels[shown] == label).all() and (numbers[..., 2][shown] == label).all()
        assert np.median(depth[shown]) == pytest.approx(12.0, abs=2.1)  # faces of a box
        assert actors[name].semantic_tags == [label]
        assert [int(point.object_tag) for point in seen if point.object_idx == actors[name].id].count(label) > 3
    assert len(np.unique(pictures["rgb"][labels == 12], axis=0)) > 3
    for actor in actors.values():
        actor.destroy()
    frame = session.tick().frame
    left = np.frombuffer(streams["semantic_segmentation"].take(frame).raw_data, np.uint8).reshape(120, 160, 4)[..., 2]
    assert not {12, 20, 21} & set(np.unique(left))


@pytest.mark.parametrize("name", ["walker.pedestrian.0009", "static.prop.container"])
def test_who_is_hit_is_told_to_both(session, name):
    car = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[80])
    session.tick()
    pose = car.get_transform()
    ahead = pose.get_forward_vector()
    spot = carla.Transform(pose.location + carla.Location(ahead * 8.0) + carla.Location(z=0.9), pose.rotation)
    struck = session.spawn(session.blueprint(name), spot)
    heard: queue.SimpleQueue = queue.SimpleQueue()
    for bearer in (car, struck):
        sensor = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), bearer)
        session.listen(sensor, heard.put)
    session.tick()
    car.set_target_velocity(ahead * 15.0)
    for _ in range(12):
        session.tick()
    told = [heard.get(timeout=20.0) for _ in range(2)]
    assert {(event.actor.id, event.other_actor.id) for event in told} == {(car.id, struck.id), (struck.id, car.id)}
    speed = car.get_velocity().length()
    if name.startswith("static"):
        assert told[0].normal_impulse.length() == pytest.approx(1845.0 * 15.0, rel=0.1)
        assert speed < 0.5
    else:
        assert 500.0 < told[0].normal_impulse.length() < 75.0 * 15.5
        assert 10.0 < speed < 14.9


# The sensors that CARLA's manual_control.py looks up when it starts, and sensor.other.* of its player.
SUITE = {
    "sensor.camera.rgb": carla.Image,
    "sensor.camera.depth": carla.Image,
    "sensor.camera.semantic_segmentation": carla.Image,
    "sensor.camera.instance_segmentation": carla.Image,
    "sensor.camera.cosmos_visualization": carla.Image,
    "sensor.camera.normals": carla.Image,
    "sensor.camera.dvs": carla.DVSEventArray,
    "sensor.camera.optical_flow": carla.OpticalFlowImage,
    "sensor.lidar.ray_cast": carla.LidarMeasurement,
    "sensor.other.radar": carla.RadarMeasurement,
    "sensor.other.gnss": carla.GnssMeasurement,
    "sensor.other.imu": carla.IMUMeasurement,
}


def test_the_whole_sensor_suite_of_manual_control_measures(session, tmp_path):
    car = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[100])
    mount = carla.Transform(carla.Location(1.6, 0.0, 1.7))
    streams: dict[str, list] = {}
    for name in SUITE:
        blueprint = session.blueprint(name)
        if blueprint.has_attribute("image_size_x"):
            blueprint.set_attribute("image_size_x", "96")
            blueprint.set_attribute("image_size_y", "64")
        if blueprint.has_attribute("gamma"):
            blueprint.set_attribute("gamma", "2.2")
        sensor = session.spawn(blueprint, mount, car)
        session.listen(sensor, streams.setdefault(name, []).append)
    every = SensorStream(session, session.spawn(session.blueprint("sensor.other.gnss"), carla.Transform(), car))
    session.tick()
    car.set_target_velocity(car.get_transform().get_forward_vector() * 20.0)
    for _ in range(4):
        every.take(session.tick().frame)
    eventually(
        lambda: all(got and (name.endswith("dvs") or got[-1].frame == session.frame) for name, got in streams.items())
    )
    latest = {name: got[-1] for name, got in streams.items()}
    for name, kind in SUITE.items():
        assert isinstance(latest[name], kind), name
    flow, events = latest["sensor.camera.optical_flow"], latest["sensor.camera.dvs"]
    moved = np.frombuffer(flow.raw_data, np.float32).reshape(64, 96, 2)
    assert (flow.width, flow.height, flow.fov) == (96, 64, 90.0)
    assert 0.05 < np.abs(moved).max() <= 2.0
    assert moved[-1, 48, 1] < 0.0  # the road comes towards the car, downwards
    colours = flow.get_color_coded_flow()
    assert np.frombuffer(colours.raw_data, np.uint8).reshape(64, 96, 4)[..., :3].max() > 0
    raw = np.frombuffer(events.raw_data, [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("pol", "?")])
    assert len(events) == len(raw) and raw["x"].max() < 96 and raw["y"].max() < 64
    assert [(e.x, e.y, e.t, e.pol) for e in events] == raw.tolist()
    assert set(np.unique(raw["pol"])) == {False, True} and (np.diff(raw["t"]) >= 0).all()
    assert np.array(events.to_image()).size % (96 * 64) == 0
    radar = latest["sensor.other.radar"]
    points = np.frombuffer(radar.raw_data, np.float32).reshape(-1, 4)
    assert len(radar) == len(points) > 10
    assert points[:, 0] == pytest.approx([d.velocity for d in radar])
    assert points[:, 0].min() < -15.0  # the road comes nearer at 20 m/s
    for name in ("sensor.camera.normals", "sensor.camera.rgb", "sensor.lidar.ray_cast"):
        latest[name].save_to_disk(str(tmp_path / name.replace(".", "_")))
    assert len(list(tmp_path.iterdir())) == 3
    normals = np.frombuffer(latest["sensor.camera.normals"].raw_data, np.uint8).reshape(64, 96, 4)
    assert (normals[-1, 48, :3] == (255, 128, 128)).all()  # up
