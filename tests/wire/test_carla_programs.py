"""What programs written for CARLA do, by the unmodified client: sensors of every mounting, controls, steps, queries."""

from __future__ import annotations

import math
import queue

import carla
import numpy as np
import pytest

from carla_digr.driving.control import VehicleCommand
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import SensorStream, Session
from carla_digr.errors import SimulatorGone
from carla_digr.simulator.lidar import Beams
from carla_digr.simulator.road import Road
from carla_digr.simulator.world import World

EGO = "vehicle.tesla.model3"
SMALL = {"image_size_x": 48, "image_size_y": 32}


def listen(session: Session, kind: str, transform: carla.Transform, parent=None, **attributes) -> SensorStream:
    sensor = session.spawn(session.blueprint(f"sensor.{kind}", **attributes), transform, parent)
    return SensorStream(session, sensor)


def same_pose(a: carla.Transform, b: carla.Transform) -> None:
    assert a.location.distance(b.location) < 1e-3
    for name in ("get_forward_vector", "get_right_vector", "get_up_vector"):
        assert getattr(a, name)().distance(getattr(b, name)()) < 1e-4


# ------------------------------------------------------------------------------------------------------ sensors


def test_sensors_stand_alone(session):
    place = carla.Transform(carla.Location(3.0, 5.0, 2.0), carla.Rotation(pitch=90.0))
    gnss, imu = listen(session, "other.gnss", place), listen(session, "other.imu", place)
    session.spawn(session.blueprint("sensor.other.collision"), place)
    frame = session.tick().frame
    reading = imu.take(frame)
    force = reading.accelerometer
    assert (force.x, force.y, force.z) == pytest.approx((9.81, 0, 0), abs=1e-5)
    assert reading.gyroscope.length() == 0.0
    fix = gnss.take(frame)
    expected = session.map.transform_to_geolocation(place.location)
    assert (fix.latitude, fix.longitude) == pytest.approx((expected.latitude, expected.longitude), abs=1e-9)
    assert fix.altitude == pytest.approx(2.0)


def test_lidars_hit_what_stands_there(session):
    # Compiled here first, for this server was started by a program of its own: it would be silent for ten seconds.
    World(Road.ring()).scan((0.0, 0.0, 2.0, 0.0, 0.0, 0.0), Beams(), 0.0, 0.05)
    points = session.map.get_spawn_points()
    ego = session.spawn(session.blueprint(EGO), points[0])
    ahead = points[0].transform(carla.Location(14.0, 0.0, 0.0))
    other = session.spawn(session.blueprint(EGO), carla.Transform(ahead, points[0].rotation))
    roof = carla.Transform(carla.Location(0.0, 0.0, 2.4), carla.Rotation(pitch=-5.0))
    wanted = {"channels": 16, "range": 50.0, "points_per_second": 32_000, "rotation_frequency": 20.0}
    labelled = listen(session, "lidar.ray_cast_semantic", roof, ego, **wanted)
    lossless = {"dropoff_general_rate": 0.0, "dropoff_zero_intensity": 0.0, "noise_seed": 3}
    plain = listen(session, "lidar.ray_cast", roof, ego, **wanted, **lossless)
    lossy = listen(session, "lidar.ray_cast", roof, ego, **wanted)
    frame = session.tick().frame
    seen, echoes, fewer = labelled.take(frame), plain.take(frame), lossy.take(frame)
    assert seen.channels == echoes.channels == 16 and 0.0 <= seen.horizontal_angle < 2 * math.pi
    assert sum(seen.get_point_count(c) for c in range(16)) == len(seen) == len(echoes) > 500
    assert 0.45 < len(fewer) / len(echoes) < 0.65
    table = np.frombuffer(
        seen.raw_data, np.dtype([("point", "<f4", 3), ("cos", "<f4"), ("actor", "<u4"), ("tag", "<u4")])
    )
    cloud = np.frombuffer(echoes.raw_data, "<f4").reshape(-1, 4)
    np.testing.assert_array_equal(cloud[:, :3], table["point"])
    np.testing.assert_allclose(cloud[:, 3], np.exp(-0.004 * np.linalg.norm(table["point"], axis=1)), rtol=1e-5)
    to_world = np.array(seen.transform.get_matrix())
    world = table["point"] @ to_world[:3, :3].T + to_world[:3, 3]
    road = np.isin(table["tag"], (1, 24))
    assert road.sum() > 200 and np.abs(world[road, 2]).max() < 1e-3
    on_it = world[table["actor"] == other.id]
    assert len(on_it) > 5
    box, inverse = other.bounding_box, np.array(other.get_transform().get_inverse_matrix())
    local = on_it @ inverse[:3, :3].T + inverse[:3, 3] - (box.location.x, box.location.y, box.location.z)
    assert (np.abs(local) < np.array([box.extent.x, box.extent.y, box.extent.z]) + 0.1).all()
    assert set(table["actor"][table["tag"] == 14]) >= {other.id}


def test_a_camera_on_a_sensor_on_a_vehicle_goes_with_both(session):
    ego = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[10])
    first = carla.Transform(carla.Location(-4.0, 1.0, 3.0), carla.Rotation(pitch=-20.0, yaw=30.0, roll=15.0))
    base = session.spawn(session.blueprint("sensor.camera.rgb", **SMALL), first, ego)
    second = carla.Transform(carla.Location(0.5, -0.2, 0.3), carla.Rotation(pitch=10.0, yaw=-50.0, roll=-5.0))
    chained = session.spawn(session.blueprint("sensor.camera.rgb", **SMALL), second, base)
    pictures = SensorStream(session, chained)
    ego.set_target_velocity(carla.Vector3D(15.0, 0.0, 0.0))
    ego.apply_control(carla.VehicleControl(steer=0.05, throttle=0.5))
    for _ in range(3):
        frame = session.tick().frame
    assert chained.parent.id == base.id
    image = pictures.take(frame)
    corner = second.transform(carla.Location())
    expected = base.get_transform().transform(corner)
    assert chained.get_location().distance(expected) < 1e-3
    same_pose(image.transform, chained.get_transform())
    # The same picture as that of a camera that stands where the chained one is, but for rounding at edges.
    ego.enable_constant_velocity(carla.Vector3D())
    session.tick()
    free = listen(session, "camera.rgb", chained.get_transform(), **SMALL)
    frame = session.tick().frame
    a, b = (np.frombuffer(stream.take(frame).raw_data, np.uint8).astype(int) for stream in (pictures, free))
    assert (np.abs(a - b) > 2).mean() < 0.02
    # Turning the one below turns the one above.
    before = chained.get_location()
    base.set_transform(carla.Transform(carla.Location(6.0, 0.0, 3.0)))
    session.tick()
    assert chained.get_location().distance(before) > 5.0


def test_a_destroyed_vehicle_leaves_its_sensors_where_they_are(session):
    """As with CARLA, whose server destroys the one actor it is told: clients then destroy the sensors themselves."""
    ego = session.world.spawn_actor(session.blueprint(EGO), session.map.get_spawn_points()[0])
    mount = carla.Transform(carla.Location(1.0, 0.5, 2.0), carla.Rotation(pitch=-10.0, yaw=40.0))
    camera = session.spawn(session.blueprint("sensor.camera.rgb", **SMALL), mount, ego)
    collision = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), ego)
    on_camera = session.spawn(session.blueprint("sensor.camera.depth", **SMALL), mount, camera)
    pictures, depths = SensorStream(session, camera), SensorStream(session, on_camera)
    frame = session.tick().frame
    assert camera.parent.id == ego.id
    before = pictures.take(frame).transform, depths.take(frame).transform
    assert ego.destroy()
    frame = session.tick().frame
    left = {actor.id for actor in session.world.get_actors()}
    assert ego.id not in left
    assert {camera.id, collision.id, on_camera.id} <= left
    same_pose(before[0], pictures.take(frame).transform)
    same_pose(before[1], depths.take(frame).transform)
    same_pose(before[0], camera.get_transform())


def test_the_mean_rate_of_sensor_tick_is_kept_where_frames_do_not_divide_it(session):
    settings = session.world.get_settings()
    settings.fixed_delta_seconds = 0.02
    session.world.apply_settings(settings)
    session.frame = session.world.get_snapshot().frame
    sensor = session.spawn(
        session.blueprint("sensor.camera.rgb", sensor_tick=0.03, **SMALL), carla.Transform(carla.Location(0, 5, 4))
    )
    every = listen(session, "other.gnss", carla.Transform())
    seen: queue.SimpleQueue = queue.SimpleQueue()
    session.listen(sensor, lambda image: seen.put(image.frame))
    frames = [session.tick().frame for _ in range(60)]
    for frame in frames:
        every.take(frame)
    got = [seen.get(timeout=20) for _ in range(39)]
    assert got[0] == frames[0]
    steps = np.diff(got)
    assert set(steps) == {1, 2}
    assert got[-1] - got[0] == pytest.approx(38 * 1.5, abs=1)


# ----------------------------------------------------------------------------------------------------- controls


def test_control_that_does_not_stick_lasts_a_frame(session):
    points = session.map.get_spawn_points()
    cars = [
        session.spawn(session.blueprint(EGO, sticky_control=how), points[20 + 8 * i])
        for i, how in enumerate((True, False))
    ]
    session.tick()
    for car in cars:
        car.apply_control(carla.VehicleControl(throttle=1.0))
    told = []
    for _ in range(4):
        session.tick()
        told.append([car.get_control().throttle for car in cars])
    assert told == [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    stuck, free = (car.get_velocity().length() for car in cars)
    assert stuck > 3.5 * free > 0.0
    for _ in range(3):  # a client that steers every frame notices nothing
        cars[1].apply_control(carla.VehicleControl(throttle=1.0))
        session.tick()
        assert cars[1].get_control().throttle == 1.0


def test_a_frame_may_last_seconds(session):
    car = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[0])
    settings = session.world.get_settings()
    settings.fixed_delta_seconds = 2.0
    session.world.apply_settings(settings)
    session.frame = session.world.get_snapshot().frame
    car.set_target_velocity(carla.Vector3D(10.0, 0.0, 0.0))
    before = car.get_location()
    assert session.tick().timestamp.delta_seconds == pytest.approx(2.0)
    assert 18.0 < math.dist((before.x, before.y), (car.get_location().x, car.get_location().y)) < 20.0


# ------------------------------------------------------------------------------------------------------ queries


def test_rays_meet_what_the_cameras_show(session):
    """Against the depth and label pictures of a camera that looks along the road, over a car."""
    point = session.map.get_spawn_points()[40]
    car = session.spawn(session.blueprint("vehicle.carlamotors.european_hgv"), point)
    back = point.get_forward_vector()
    eye = carla.Transform(
        carla.Location(point.location.x - 25.0 * back.x, point.location.y - 25.0 * back.y, 6.0),
        carla.Rotation(pitch=-12.0, yaw=point.rotation.yaw + 4.0, roll=3.0),
    )
    depth = listen(session, "camera.depth", eye, **SMALL)
    labels = listen(session, "camera.semantic_segmentation", eye, **SMALL)
    frame = session.tick().frame
    width, height = SMALL["image_size_x"], SMALL["image_size_y"]
    shape = (height, width, 4)
    bgra = np.frombuffer(depth.take(frame).raw_data, np.uint8).reshape(shape).astype(float)
    metres = (bgra[..., 2] + 256 * bgra[..., 1] + 65536 * bgra[..., 0]) / (2**24 - 1) * 1000.0
    seen = np.frombuffer(labels.take(frame).raw_data, np.uint8).reshape(shape)[..., 2]
    forward, right, up = eye.get_forward_vector(), eye.get_right_vector(), eye.get_up_vector()
    met = set()
    for j in range(1, height, 5):
        for i in range(1, width, 7):
            a, b = (i + 0.5 - width / 2) / (width / 2), (height / 2 - j - 0.5) / (width / 2)
            way = forward + right * a + up * b
            hit = session.world.project_point(eye.location, way, 900.0)
            if seen[j, i] == 9 or (hit is not None and int(hit.label) == 9):
                continue  # leaves are drawn coarser where they are small
            if metres[j, i] * way.length() > 900.0:
                assert hit is None
                continue
            expected = eye.location + carla.Location(way * float(metres[j, i]))
            assert hit.location.distance(expected) < 0.02 + 1e-3 * metres[j, i]
            assert int(hit.label) == seen[j, i]
            met.add(int(hit.label))
    assert {1, 15} <= met  # road and truck
    # Straight down: the ground, and the roof of the truck before it.
    above = carla.Location(point.location.x, point.location.y, 30.0)
    roof = 2.0 * car.bounding_box.extent.z
    assert session.world.ground_projection(above, 100.0).location.z == pytest.approx(roof, abs=0.05)
    assert session.world.ground_projection(above, 5.0) is None
    through = session.world.cast_ray(above, carla.Location(above.x, above.y, -1.0))
    assert [through[0].label, through[-1].label] == [carla.CityObjectLabel.Truck, carla.CityObjectLabel.Roads]
    heights = [hit.location.z for hit in through]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] == pytest.approx(0.0, abs=1e-3)


def test_environment_objects_stand_where_cameras_show_them(session):
    world, label = session.world, carla.CityObjectLabel
    everything = world.get_environment_objects(label.Any)
    assert len({thing.id for thing in everything}) == len({thing.name for thing in everything}) == len(everything)
    assert world.get_names_of_all_objects() == [thing.name for thing in everything]
    for kind in (label.Buildings, label.TrafficSigns, label.Vegetation, label.GuardRail):
        some = world.get_environment_objects(kind)
        assert len(some) > 4
        assert {thing.id for thing in some} == {thing.id for thing in everything if thing.type == kind}
        boxes = world.get_level_bbs(kind)
        assert [box.location.x for box in boxes] == [thing.bounding_box.location.x for thing in some]
        for thing in some[::9]:  # a ray along the box's axis meets the thing within its box
            box = thing.bounding_box
            if kind == label.Vegetation:  # trees are flat and turned to the camera
                assert box.location.z == box.extent.z > 2.0
                continue
            top = carla.Location(box.location.x, box.location.y, 40.0)
            if kind == label.TrafficSigns:  # the gantry stands over the own carriageway only
                right = thing.transform.get_right_vector()
                top += carla.Location(5.0 * right.x, 5.0 * right.y, 0.0)
            hit = world.ground_projection(top, 100.0)
            if thing.name.startswith("Rail"):  # sheet metal, met from the side
                right = thing.transform.get_right_vector()
                beside = carla.Location(box.location.x - 2.0 * right.x, box.location.y - 2.0 * right.y, 0.6)
                hit = world.project_point(beside, right, 10.0)
            assert hit.label == kind, thing.name
            assert box.contains(hit.location - carla.Location(z=0.01), carla.Transform()), thing.name
    assert not world.get_environment_objects(label.Train)
    car = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[7])
    session.tick()
    (box,) = world.get_level_bbs(label.Car)
    assert box.location.distance(car.get_transform().transform(car.bounding_box.location)) < 1e-3
    assert box.extent == car.bounding_box.extent


def test_telemetry_and_wheels_follow_the_drive(session):
    car = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[2])
    session.tick()
    car.set_target_velocity(carla.Vector3D(20.0, 0.0, 0.0))
    car.apply_control(carla.VehicleControl(throttle=0.5, steer=0.1))
    session.tick()
    session.tick()
    told, physics, speed = car.get_telemetry_data(), car.get_physics_control(), car.get_velocity().length()
    assert told.speed == pytest.approx(speed, rel=1e-4)
    assert (told.throttle, told.steer, told.brake) == pytest.approx((0.5, 0.1, 0.0))
    assert [wheel.omega for wheel in told.wheels] == pytest.approx(
        [speed / (physics.wheels[0].radius / 100)] * 4, rel=1e-3
    )
    assert sum(wheel.tire_load for wheel in told.wheels) == pytest.approx(physics.mass * 9.81, rel=1e-3)
    acceleration = car.get_acceleration()
    force = math.hypot(*(sum(getattr(w, name) for w in told.wheels) for name in ("long_force", "lat_force")))
    assert force == pytest.approx(physics.mass * math.hypot(acceleration.x, acceleration.y), rel=1e-2)
    assert 0.0 < told.engine_rpm <= physics.max_rpm
    where = carla.VehicleWheelLocation
    for wheel, angle in ((where.FL_Wheel, 7.0), (where.FR_Wheel, 7.0), (where.BL_Wheel, 0.0), (where.BR_Wheel, 0.0)):
        assert car.get_wheel_steer_angle(wheel) == pytest.approx(angle, abs=1e-3)


# --------------------------------------------------------------------------------------------------- blueprints


def test_carlas_usual_ids_spawn_in_a_batch_and_walkers_and_props_stand(session):
    """As generate_traffic.py does, vehicles and walkers in batches; every blueprint of them once."""
    library, points = session.blueprints, session.map.get_spawn_points()
    vehicles = list(library.filter("vehicle.*"))
    assert {"vehicle.lincoln.mkz_2017", "vehicle.audi.etron", "vehicle.dodge.charger_2020"} <= {b.id for b in vehicles}
    standing = [*library.filter("walker.pedestrian.*"), *library.filter("static.prop.*")]
    beside = [carla.Transform(carla.Location(p.location.x, p.location.y, 1.0)) for p in points[: len(standing)]]
    command = carla.command
    batch = [
        command.SpawnActor(b, p)
        for b, p in zip([*vehicles, *standing], [*points[: len(vehicles)], *beside], strict=True)
    ]
    answers = session.client.apply_batch_sync(batch, True)
    session.frame = session.world.get_snapshot().frame
    try:
        assert not [answer.error for answer in answers if answer.error]
        actors = session.world.get_actors([answer.actor_id for answer in answers])
        assert sorted(actor.type_id for actor in actors) == sorted(b.id for b in [*vehicles, *standing])
        for actor in actors:
            extent = actor.bounding_box.extent
            assert min(extent.x, extent.y, extent.z) > 0.1
            if actor.type_id.startswith("vehicle."):
                assert actor.get_physics_control().mass > 1000.0
        walker = next(actor for actor in actors if actor.type_id == "walker.pedestrian.0007")
        assert isinstance(walker, carla.Walker)
        assert walker.semantic_tags == [12]
        walker.set_transform(carla.Transform(carla.Location(1.0, 2.0, 1.0)))
        session.tick()
        assert walker.get_location().distance(carla.Location(1.0, 2.0, 1.0)) < 1e-3
    finally:
        session.client.apply_batch_sync([command.DestroyActor(answer.actor_id) for answer in answers], True)
        session.frame = session.world.get_snapshot().frame


# ---------------------------------------------------------------------------------------------- what is refused


def test_refusals_reach_the_user_where_the_protocol_can_carry_them_and_the_log_always(simulator):
    client = carla.Client("127.0.0.1", simulator.port)
    client.set_timeout(20.0)
    world = client.get_world()
    car = world.spawn_actor(world.get_blueprint_library().find(EGO), world.get_map().get_spawn_points()[0])
    for refused, offered in (
        (car.get_socket_names, "get_actor_socket_names; v"),
        (car.get_bone_names, "get_actor_bone_names; vehicles are rigid"),
    ):
        with pytest.raises(RuntimeError, match=offered + r".*docs/embedded_server\.md"):
            refused()
    car.enable_chrono_physics(1, 0.1, "", "", "", "")  # asynchronous: the client looks at no answer
    world.freeze_all_traffic_lights(True)
    world.wait_for_tick(20.0)
    car_id = car.id
    assert car.destroy()
    client.apply_batch([carla.command.ApplyVehicleControl(car_id, carla.VehicleControl())])
    assert client.get_server_version() == "0.9.16"
    log = simulator.stop()
    for name in (
        "get_actor_socket_names",
        "get_actor_bone_names",
        "enable_chrono_physics",
        "freeze_all_traffic_lights",
    ):
        assert sum(f" {name}: " in line for line in log.splitlines()) == 1, log
    assert "Traceback" not in log


def test_a_drive_whose_world_another_client_loads_anew_says_so_and_goes_on(simulator):
    with Scenario.connect("embedded", "127.0.0.1", simulator.port, 20.0, vehicles=4) as drive:
        drive.reset(1)
        drive.step(VehicleCommand(0.5, 0.0, 0.0))
        client = carla.Client("127.0.0.1", simulator.port)
        client.set_timeout(20.0)
        client.reload_world(False)
        with pytest.raises(SimulatorGone, match=r"Another client has loaded the world of .* anew; connect anew"):
            drive.step(VehicleCommand(0.5, 0.0, 0.0))
        with drive.reconnect(patience=20.0) as again:
            again.reset(1)
            assert again.step(VehicleCommand(0.5, 0.0, 0.0)).speed > 10.0
