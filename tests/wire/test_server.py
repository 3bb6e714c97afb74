"""The simulator's server as the unmodified CARLA 0.9.16 client sees it."""

from __future__ import annotations

import math
import queue
from concurrent.futures import ThreadPoolExecutor

import carla
import numpy as np
import pytest
from simulator_process import eventually

from carla_digr.driving.session import SensorStream, Session, listen
from carla_digr.simulator.road import LANE_WIDTH, LANES, MAP_NAME, Road, lane_center
from carla_digr.simulator.vehicle import KINDS, TRUCK

ROAD = Road.ring()
EGO = "vehicle.tesla.model3"


def spawn_ego(session: Session, point: int = 0) -> carla.Vehicle:
    return session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[point])


def spawn_camera(session: Session, parent: carla.Actor | None, transform: carla.Transform, **attributes):
    camera = session.spawn(session.blueprint("sensor.camera.rgb", **attributes), transform, parent)
    return camera, SensorStream(session, camera)


def pixels(image: carla.Image) -> np.ndarray:
    return np.frombuffer(image.raw_data, np.uint8).reshape(image.height, image.width, 4)


# ------------------------------------------------------------------------------------------------------- world


def test_the_client_finds_its_version_and_the_map(session):
    assert session.client.get_server_version() == session.client.get_client_version() == "0.9.16"
    assert session.client.get_available_maps() == [f"/Game/Carla/Maps/{MAP_NAME}"]
    assert session.map.name == f"Carla/Maps/{MAP_NAME}"


def test_a_tick_is_one_frame_of_005_s(session):
    before = session.world.get_snapshot()
    for i in range(1, 6):
        snapshot = session.tick()
        assert snapshot.frame == before.frame + i
        assert snapshot.timestamp.delta_seconds == pytest.approx(0.05, abs=1e-7)
        elapsed = snapshot.timestamp.elapsed_seconds - before.timestamp.elapsed_seconds
        assert elapsed == pytest.approx(0.05 * i, abs=1e-6)


def test_settings_are_kept(session):
    settings = session.world.get_settings()
    settings.max_substeps = 7
    settings.fixed_delta_seconds = 0.025
    settings.no_rendering_mode = True
    session.world.apply_settings(settings)
    kept = session.world.get_settings()
    assert (kept.max_substeps, kept.fixed_delta_seconds, kept.no_rendering_mode) == (7, 0.025, True)
    assert session.world.get_snapshot().timestamp.delta_seconds == pytest.approx(0.025)


@pytest.mark.parametrize("step", [100.0, 1e-300])
def test_an_impossible_step_is_refused(session, step):
    settings = session.world.get_settings()
    settings.fixed_delta_seconds = step
    with pytest.raises(RuntimeError, match="fixed_delta_seconds"):
        session.world.apply_settings(settings)


def test_an_asynchronous_world_runs_by_itself(session):
    settings = session.world.get_settings()
    settings.synchronous_mode = False
    session.world.apply_settings(settings)
    seen: queue.SimpleQueue = queue.SimpleQueue()
    callback = session.world.on_tick(lambda snapshot: seen.put(snapshot.frame))
    frames = [seen.get(timeout=10) for _ in range(5)]
    session.world.remove_on_tick(callback)
    assert frames == list(range(frames[0], frames[0] + 5))
    assert session.world.wait_for_tick(10.0).frame > frames[0]
    assert session.world.tick(10.0) > frames[0]


def test_weather_is_kept_and_changes_the_picture(session):
    _, pictures = spawn_camera(
        session, None, carla.Transform(carla.Location(0, 5, 4)), image_size_x=64, image_size_y=64
    )
    seen = []
    for preset in (
        carla.WeatherParameters.ClearNoon,
        carla.WeatherParameters.ClearSunset,
        carla.WeatherParameters.Default,
    ):
        session.world.set_weather(preset)
        assert session.world.get_weather() == preset
        seen.append(pixels(pictures.take(session.tick().frame)).copy())
    assert (seen[0] != seen[1]).any()
    assert (seen[0] == seen[2]).all()


def test_what_is_not_offered_raises_and_the_client_lives(session):
    with pytest.raises(RuntimeError, match="no map 'Town04'"):
        session.client.load_world("Town04")
    with pytest.raises(RuntimeError, match="builds no road from OpenDRIVE but its own"):
        session.client.generate_opendrive_world(ROAD.opendrive().replace("RingHighway", "Elsewhere", 1) + " ")
    session.tick()


def test_the_roads_own_opendrive_is_a_world(simulator):
    client = carla.Client("127.0.0.1", simulator.port)
    client.set_timeout(10.0)
    before = client.get_world()
    text = before.get_map().to_opendrive()
    world = client.generate_opendrive_world(text, carla.OpendriveGenerationParameters(vertex_distance=2.0))
    assert world.id != before.id
    assert world.get_map().to_opendrive() == text
    assert len(world.get_map().get_spawn_points()) == len(ROAD.spawn_points)
    assert world.wait_for_tick(10.0).frame > 0


def test_the_blueprint_library_answers_as_carlas(session):
    library = session.blueprints
    typed = {b.id for b in library.filter("vehicle.*.*") if b.get_attribute("base_type").as_str()}
    assert typed == {kind.blueprint for kind in KINDS}
    assert [b.id for b in library.filter("*model3*")] == [EGO]
    assert {b.id for b in library.filter_by_attribute("base_type", "truck")} == {
        kind.blueprint for kind in KINDS if kind.body == TRUCK
    }
    with pytest.raises(IndexError):
        library.find("vehicle.no.such")
    blueprint = library.find(EGO)
    assert {"vehicle", "tesla", "model3"} <= set(blueprint.tags)
    assert blueprint.match_tags("*tesla*")
    color = blueprint.get_attribute("color")
    assert color.is_modifiable and color.type == carla.ActorAttributeType.RGBColor
    assert len(color.recommended_values) == len(KINDS[0].colors)
    blueprint.set_attribute("color", "1,2,3")
    assert blueprint.get_attribute("color").as_color() == carla.Color(1, 2, 3)
    assert int(blueprint.get_attribute("number_of_wheels")) == 4
    with pytest.raises(ValueError, match="read-only"):
        blueprint.set_attribute("number_of_wheels", "3")
    with pytest.raises(IndexError):
        blueprint.set_attribute("no_such", "3")
    camera = library.find("sensor.camera.rgb")
    assert (camera.get_attribute("image_size_x").as_int(), float(camera.get_attribute("fov"))) == (800, 90.0)
    camera.set_attribute("image_size_x", "wide")  # the client leaves the value to the server
    with pytest.raises(RuntimeError, match="image_size_x must be a whole number"):
        session.world.spawn_actor(camera, carla.Transform())


def test_snapshots_reach_callbacks_and_waiters_of_a_synchronous_world(session):
    seen: queue.SimpleQueue = queue.SimpleQueue()
    callback = session.world.on_tick(lambda snapshot: seen.put(snapshot.frame))
    frames = [session.tick().frame for _ in range(5)]
    assert [seen.get(timeout=10) for _ in frames] == frames
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(session.world.wait_for_tick, 20.0)
        while not waiting.done():
            session.tick()
        assert waiting.result().frame <= session.frame
    session.world.remove_on_tick(callback)


def test_physics_is_kept_and_pushes_move_a_vehicle(session):
    ego = spawn_ego(session)
    session.tick()
    physics = ego.get_physics_control()
    physics.mass = 1234.5
    physics.torque_curve = [carla.Vector2D(0, 100), carla.Vector2D(3000, 700)]
    wheels = physics.wheels
    wheels[0].tire_friction = 1.5
    physics.wheels = wheels
    ego.apply_physics_control(physics)
    kept = ego.get_physics_control()
    assert kept == physics
    assert (kept.mass, kept.torque_curve[1].y, kept.wheels[0].tire_friction) == (1234.5, 700.0, 1.5)
    mass = KINDS[0].mass
    ego.add_impulse(carla.Vector3D(10.0 * mass, 0.0, 0.0))
    session.tick()
    assert ego.get_velocity().length() == pytest.approx(10.0, abs=0.1)
    ego.add_force(carla.Vector3D(-100.0 * mass, 0.0, 0.0))  # 100 m/s2 for 0.05 s
    session.tick()
    assert ego.get_velocity().length() == pytest.approx(5.0, abs=0.1)


def test_debug_shapes_lights_and_traffic_light_resets_are_accepted(session):
    session.world.debug.draw_point(carla.Location(), 0.1, carla.Color(255, 0, 0), 1.0)
    session.world.debug.draw_line(carla.Location(), carla.Location(1, 1, 1))
    session.world.debug.draw_string(carla.Location(), "here")
    session.world.reset_all_traffic_lights()
    assert session.world.get_lightmanager().get_all_lights() == []
    session.tick()


def test_the_spectator_can_be_placed(session):
    spectator = session.world.get_spectator()
    spectator.set_transform(carla.Transform(carla.Location(1, 2, 30), carla.Rotation(-45, 90, 0)))
    snapshot = session.tick()
    place = snapshot.find(spectator.id).get_transform()
    assert (place.location.x, place.location.y, place.location.z) == (1, 2, 30)
    assert (place.rotation.pitch, place.rotation.yaw) == (-45, 90)
    assert not spectator.destroy()


def test_a_new_episode_is_empty_and_frames_go_on(simulator):
    client = carla.Client("127.0.0.1", simulator.port)
    client.set_timeout(10.0)
    with Session(client, "127.0.0.1", simulator.port, 10.0) as session:
        spawn_ego(session)
        before = session.tick()
        world = client.reload_world(False)
        assert world.id != before.id
        assert world.get_settings().synchronous_mode
        assert [a.type_id for a in world.get_actors()] == ["spectator"]
        assert world.get_snapshot().frame > before.frame
        assert world.get_map().name.endswith(MAP_NAME)
        assert world.tick(10.0) == world.get_snapshot().frame
        assert not client.load_world(MAP_NAME).get_settings().synchronous_mode


# --------------------------------------------------------------------------------------------------------- map


def test_waypoints_agree_with_the_road_to_a_centimetre(session):
    rng = np.random.default_rng(1)
    for s, lane in zip(rng.uniform(0, ROAD.length, 300), rng.integers(0, LANES, 300), strict=True):
        piece = int(np.searchsorted(ROAD.pieces[:, 0], s, side="right")) - 1
        x, y, heading = map(float, ROAD.pose(s, lane_center(lane)))
        # Lane id -1 is the median, road ids count from 1.
        waypoint = session.map.get_waypoint_xodr(piece + 1, -2 - int(lane), s - ROAD.pieces[piece, 0])
        assert waypoint.transform.location.distance(carla.Location(x, y, 0.0)) < 0.01
        turned = math.radians(waypoint.transform.rotation.yaw) - heading
        assert abs((turned + math.pi) % (2 * math.pi) - math.pi) < 1e-3
        assert waypoint.lane_width == pytest.approx(LANE_WIDTH)
        assert (waypoint.get_left_lane().lane_type == carla.LaneType.Driving) == (lane > 0)
        assert (waypoint.get_right_lane().lane_type == carla.LaneType.Driving) == (lane < LANES - 1)
        # From a place, the client finds a point of the same lane; along a curve it is some centimetres off.
        nearest = session.map.get_waypoint(carla.Location(x, y, 0.0))
        assert (nearest.lane_id, nearest.lane_type) == (waypoint.lane_id, carla.LaneType.Driving)
        _, d, _ = ROAD.project(nearest.transform.location.x, nearest.transform.location.y)
        assert float(d) == pytest.approx(lane_center(lane), abs=0.01)


def test_the_road_is_a_ring_for_the_client(session):
    waypoint = start = session.map.get_waypoint(session.map.get_spawn_points()[0].location)
    for _ in range(round(1.1 * ROAD.length / 20.0)):
        (waypoint,) = waypoint.next(20.0)
        if waypoint.road_id == start.road_id and abs(waypoint.s - start.s) < 20.0:
            break
    else:
        pytest.fail("never came round")
    assert waypoint.lane_id == start.lane_id
    assert len(session.map.get_topology()) > 0


def test_spawn_points_are_the_roads_own(session):
    points = session.map.get_spawn_points()
    assert len(points) == len(ROAD.spawn_points)
    for point, (x, y, yaw) in zip(points, ROAD.spawn_points, strict=True):
        assert (point.location.x, point.location.y) == (x, y)
        assert math.radians(point.rotation.yaw) == pytest.approx(yaw, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ actors


def test_every_vehicle_of_the_library_spawns_with_its_size(session):
    points = session.map.get_spawn_points()
    assert {kind.blueprint for kind in KINDS} < {b.id for b in session.blueprints.filter("vehicle.*")}
    for kind, point in zip(KINDS, points, strict=False):
        blueprint = session.blueprint(kind.blueprint, color="10,20,30")
        vehicle = session.spawn(blueprint, point)
        extent = vehicle.bounding_box.extent
        assert (2 * extent.x, 2 * extent.y, 2 * extent.z) == pytest.approx((kind.length, kind.width, kind.height))
        assert vehicle.attributes["color"] == "10,20,30"
        assert vehicle.attributes["number_of_wheels"] == "4"
        physics = vehicle.get_physics_control()
        assert physics.mass == kind.mass
        assert len(physics.wheels) == 4
        vehicle.apply_physics_control(physics)
    session.tick()
    assert len(session.world.get_actors().filter("vehicle.*")) == len(KINDS)


def test_an_occupied_place_and_bad_attributes_are_refused(session):
    ego = spawn_ego(session)
    point = session.map.get_spawn_points()[0]
    blueprint = session.blueprint(EGO)
    assert session.world.try_spawn_actor(blueprint, point) is None
    with pytest.raises(RuntimeError, match="Spawn failed because of collision at spawn position"):
        session.world.spawn_actor(blueprint, point)
    far = carla.Transform(carla.Location(1e30, 0, 0))
    with pytest.raises(RuntimeError, match="positions must be within"):
        session.world.spawn_actor(blueprint, far)
    for attribute, value in (("image_size_x", 100000), ("image_size_y", 0), ("fov", 180)):
        camera = session.blueprint("sensor.camera.rgb", **{attribute: value})
        with pytest.raises(RuntimeError, match=f"{attribute} must be between"):
            session.world.spawn_actor(camera, carla.Transform(), attach_to=ego)


def test_a_vehicle_drives_as_it_is_told(session):
    ego = spawn_ego(session)
    session.tick()
    start = ego.get_location()
    ego.set_target_velocity(carla.Vector3D(20.0, 0.0, 0.0))
    ego.apply_control(carla.VehicleControl(throttle=0.5, steer=0.01))
    session.tick()
    session.tick()
    assert 20.0 < ego.get_velocity().length() < 21.0
    assert ego.get_location().x - start.x == pytest.approx(2.0, abs=0.1)
    assert ego.get_angular_velocity().z > 0.0
    assert ego.get_acceleration().x > 0.0
    control = ego.get_control()
    assert (control.throttle, control.steer, control.brake) == (0.5, pytest.approx(0.01), 0.0)
    ego.apply_control(carla.VehicleControl(brake=1.0, hand_brake=True))
    for _ in range(60):
        session.tick()
    assert ego.get_velocity().length() == 0.0
    assert ego.get_light_state() & carla.VehicleLightState.Brake
    ego.apply_control(carla.VehicleControl(throttle=1.0, reverse=True))
    session.tick()
    session.tick()
    assert ego.get_velocity().x < 0.0
    assert ego.get_control().gear == -1


def test_a_vehicle_can_be_placed_and_held_at_a_speed(session):
    ego = spawn_ego(session)
    point = session.map.get_spawn_points()[30]
    ego.set_transform(point)
    session.tick()
    assert ego.get_location().distance(carla.Location(point.location.x, point.location.y, 0.0)) == 0.0
    assert ego.get_velocity().length() == 0.0
    ego.enable_constant_velocity(carla.Vector3D(10.0, 0.0, 0.0))
    for _ in range(5):
        session.tick()
    assert ego.get_velocity().length() == pytest.approx(10.0, abs=0.1)
    ego.disable_constant_velocity()
    ego.set_light_state(carla.VehicleLightState(carla.VehicleLightState.Fog))
    session.tick()
    assert ego.get_light_state() & carla.VehicleLightState.Fog


def test_batches_report_each_commands_error(session):
    points = session.map.get_spawn_points()
    command = carla.command
    blueprint = session.blueprint(EGO)
    there = command.SpawnActor(blueprint, points[0]).then(
        command.ApplyVehicleControl(command.FutureActor, carla.VehicleControl(throttle=1.0))
    )
    first, second, third, fourth = session.client.apply_batch_sync(
        [
            there,
            command.SpawnActor(blueprint, points[0]),
            command.SpawnActor(blueprint, points[1]),
            command.DestroyActor(9**9),
        ],
        True,
    )
    assert not first.error
    assert "collision at spawn position" in second.error
    assert not third.error
    assert "no actor" in fourth.error
    snapshot = session.world.get_snapshot()
    assert snapshot.find(first.actor_id).get_velocity().x > 0.0
    assert snapshot.find(third.actor_id).get_velocity().x == 0.0
    changes = [
        command.ApplyTransform(third.actor_id, points[5]),
        command.ApplyTargetVelocity(first.actor_id, carla.Vector3D(15.0, 0.0, 0.0)),
        command.SetVehicleLightState(first.actor_id, carla.VehicleLightState.Interior),
        command.SetSimulatePhysics(first.actor_id, True),
        command.ApplyWalkerState(first.actor_id, points[0], 1.0),
    ]
    *done, walker = session.client.apply_batch_sync(changes, True)
    assert not any(answer.error for answer in done)
    assert "is no walker" in walker.error
    session.frame = session.world.get_snapshot().frame
    assert session.world.get_actor(third.actor_id).get_location().x == pytest.approx(points[5].location.x)
    assert session.world.get_actor(first.actor_id).get_velocity().x == pytest.approx(15.0, abs=0.3)
    destroyed = session.client.apply_batch_sync(
        [command.DestroyActor(i) for i in (first.actor_id, third.actor_id)], True
    )
    assert not any(answer.error for answer in destroyed)
    assert not session.world.get_actors().filter("vehicle.*")


def test_the_worlds_traffic_comes_and_goes_as_one_actor(session):
    ego = spawn_ego(session)
    blueprint = session.blueprint("controller.traffic.highway", seed=4, vehicles=30, hero=ego.id)
    controller = session.world.spawn_actor(blueprint, carla.Transform())
    session.tick()
    others = [v for v in session.world.get_actors().filter("vehicle.*") if v.id != ego.id]
    own = [v for v in others if session.map.get_waypoint(v.get_location()).lane_id < 0]
    assert len(own) == 30
    assert len({v.type_id for v in own}) > 3
    assert all(v.get_location().distance(ego.get_location()) > 30.0 for v in own)
    start = {v.id: v.get_location() for v in own}
    with pytest.raises(RuntimeError, match="already fills the road"):
        session.world.spawn_actor(blueprint, carla.Transform())
    for _ in range(20):
        session.tick()
    assert all(v.get_location().distance(start[v.id]) > 8.0 for v in own)
    assert controller.destroy()
    session.tick()
    assert [v.id for v in session.world.get_actors().filter("vehicle.*")] == [ego.id]


# ----------------------------------------------------------------------------------------------------- sensors


def test_the_camera_sends_the_picture_of_every_frame(session):
    ego = spawn_ego(session)
    place = carla.Transform(carla.Location(-9.5, 0.0, 4.2), carla.Rotation(pitch=-9.0))
    camera, pictures = spawn_camera(session, ego, place, image_size_x=96, image_size_y=64, fov=48)
    ego.set_target_velocity(carla.Vector3D(22.0, 0.0, 0.0))
    last = None
    for _ in range(10):
        snapshot = session.tick()
        image = pictures.take(snapshot.frame)  # the very first one too: the server waits for the subscription
        assert (image.width, image.height, image.fov) == (96, 64, 48.0)
        assert image.timestamp == snapshot.timestamp.elapsed_seconds
        x = snapshot.find(ego.id).get_transform().location.x
        assert image.transform.location.x == pytest.approx(x - 9.5, abs=1e-4)
        assert image.transform.rotation.pitch == -9.0
        assert last is None or (pixels(image) != last).any()
        last = pixels(image).copy()
    assert snapshot.find(camera.id).get_transform().location == image.transform.location


def test_several_cameras_of_any_size_and_mounting_agree(session):
    ego = spawn_ego(session)
    place = carla.Transform(carla.Location(-9.5, 0.0, 4.2), carla.Rotation(pitch=-9.0))
    _, mounted = spawn_camera(session, ego, place, image_size_x=64, image_size_y=64)
    x, y = ego.get_transform().location.x, ego.get_transform().location.y
    session.tick()
    start = ego.get_transform()
    free_place = carla.Transform(start.location + carla.Location(-9.5, 0.0, 4.2), carla.Rotation(pitch=-9.0))
    free, standing = spawn_camera(session, None, free_place, image_size_x=64, image_size_y=64)
    _, large = spawn_camera(session, ego, place, image_size_x=320, image_size_y=200)
    frame = session.tick().frame
    assert (pixels(mounted.take(frame)) == pixels(standing.take(frame))).all(), (x, y)
    image = large.take(frame)
    assert pixels(image).shape == (200, 320, 4)
    before = pixels(mounted.take(session.tick().frame)).copy()
    free.set_transform(carla.Transform(carla.Location(100, 0, 30), carla.Rotation(pitch=-30)))
    frame = session.tick().frame
    assert (pixels(standing.take(frame)) != before).any()
    assert (pixels(mounted.take(frame)) == before).all()


# --------------------------------------------------------------------------------------------- several clients


def test_two_clients_see_the_same_world(session, shared_simulator):
    ego = spawn_ego(session)
    camera, pictures = spawn_camera(
        session, ego, carla.Transform(carla.Location(-9.5, 0, 4.2)), image_size_x=32, image_size_y=32
    )
    session.tick()
    other = carla.Client("127.0.0.1", shared_simulator.port)
    other.set_timeout(10.0)
    world = other.get_world()
    # The state of a halted world is sent to a new client at once.
    eventually(lambda: world.get_snapshot().frame == session.frame)
    theirs: queue.SimpleQueue = queue.SimpleQueue()
    sensor = world.get_actor(camera.id)
    held = listen(sensor, theirs.put)
    frame = session.tick().frame
    mine, image = pictures.take(frame), theirs.get(timeout=10)
    assert image.frame == frame
    assert (pixels(image) == pixels(mine)).all()
    sensor.stop()
    eventually(lambda: held() is None)
    assert world.get_actor(ego.id).type_id == EGO
