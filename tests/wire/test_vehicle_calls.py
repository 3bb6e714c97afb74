"""Ways to move a vehicle besides its pedals, and pictures larger than a socket holds, as the CARLA client sees them."""

from __future__ import annotations

import math

import carla
import msgpack
import numpy as np
import pytest
from simulator_process import Simulator
from test_robustness import assert_serves, call, connect

from carla_digr.driving.session import SensorStream, Session
from carla_digr.simulator.vehicle import MAX_STEER


def spawn(session: Session, point: int = 0, kind: str = "vehicle.tesla.model3") -> carla.Vehicle:
    return session.spawn(session.blueprint(kind), session.map.get_spawn_points()[point])


def forward_speed(vehicle: carla.Vehicle) -> float:
    return vehicle.get_velocity().dot(vehicle.get_transform().get_forward_vector())


def test_ackermann_control_reaches_speed_and_angle_within_its_limits(session):
    ego = spawn(session)
    ego.apply_ackermann_control(carla.VehicleAckermannControl(steer=0.02, steer_speed=0.1, speed=8.0, acceleration=2.0))
    speeds, angles = [0.0], [0.0]
    for _ in range(100):
        session.tick()
        speeds.append(forward_speed(ego))
        angles.append(ego.get_control().steer * MAX_STEER)
    assert np.diff(speeds).max() == pytest.approx(2.0 * 0.05, abs=0.01)
    assert speeds[-1] == pytest.approx(8.0, abs=0.05)
    assert np.diff(angles).max() <= 0.1 * 0.05 + 1e-6
    assert angles[-1] == pytest.approx(0.02, abs=1e-4)
    ego.apply_ackermann_control(carla.VehicleAckermannControl(speed=0.0))
    for _ in range(40):
        session.tick()
    assert forward_speed(ego) == 0.0
    ego.apply_ackermann_control(carla.VehicleAckermannControl(speed=-2.0))
    for _ in range(40):
        session.tick()
    assert forward_speed(ego) == pytest.approx(-2.0, abs=0.05)
    ego.apply_control(carla.VehicleControl(throttle=1.0))
    for _ in range(40):
        session.tick()
    assert forward_speed(ego) > 2.0, "pedals end Ackermann control"


def test_ackermann_settings_are_kept(session):
    ego = spawn(session)
    assert ego.get_ackermann_controller_settings().speed_kp == pytest.approx(0.15)
    ego.apply_ackermann_controller_settings(carla.AckermannControllerSettings(speed_kp=0.5, accel_kd=0.25))
    session.tick()
    kept = ego.get_ackermann_controller_settings()
    assert (kept.speed_kp, kept.speed_ki, kept.accel_kd) == (0.5, 0.0, 0.25)


def test_angular_velocity_impulse_and_torque_turn_a_vehicle_for_a_frame(session):
    ego = spawn(session)
    box = ego.bounding_box.extent
    inertia = ego.get_physics_control().mass * (4.0 * box.x**2 + 4.0 * box.y**2) / 12.0

    def turned() -> float:
        before = ego.get_transform().rotation.yaw
        session.tick()
        change = (ego.get_transform().rotation.yaw - before + 180.0) % 360.0 - 180.0
        assert ego.get_angular_velocity().z * 0.05 == pytest.approx(change, abs=1e-3)
        return change

    session.tick()
    ego.set_target_angular_velocity(carla.Vector3D(0.0, 0.0, 60.0))
    assert turned() == pytest.approx(3.0, abs=1e-3)
    assert turned() == pytest.approx(0.0, abs=1e-4)
    ego.add_angular_impulse(carla.Vector3D(0.0, 0.0, 40.0 * inertia))
    assert turned() == pytest.approx(2.0, rel=0.01)
    ego.add_torque(carla.Vector3D(0.0, 0.0, 40.0 * inertia))  # which the client sends as an angular impulse
    assert turned() == pytest.approx(2.0, rel=0.01)
    command = carla.command
    for order, rate in (
        (command.ApplyTargetAngularVelocity(ego.id, carla.Vector3D(z=-60.0)), -60.0),
        (command.ApplyAngularImpulse(ego.id, carla.Vector3D(z=40.0 * inertia)), 40.0),
        (command.ApplyTorque(ego.id, carla.Vector3D(z=40.0 * inertia / 0.05)), 40.0),
    ):
        (done,) = session.client.apply_batch_sync([order], True)
        session.frame = session.world.get_snapshot().frame
        assert not done.error
        assert ego.get_angular_velocity().z == pytest.approx(rate, rel=0.01)


def test_a_vehicle_without_collisions_is_driven_through(session):
    ego = spawn(session)
    session.tick()
    place, ahead = ego.get_transform(), ego.get_transform()
    ahead.location += 12.0 * ahead.get_forward_vector()
    truck = session.spawn(session.blueprint("vehicle.carlamotors.european_hgv"), ahead)
    for collides in (False, True):
        truck.set_collisions(collides)
        ego.set_transform(place)
        session.tick()
        ego.set_target_velocity(20.0 * place.get_forward_vector())
        for _ in range(25):
            session.tick()
        assert (forward_speed(ego) > 15.0) is not collides
        truck.set_transform(ahead)


def test_a_vehicle_without_physics_stays_where_it_was_put(session):
    ego = spawn(session)
    ego.set_simulate_physics(False)
    ego.apply_control(carla.VehicleControl(throttle=1.0))
    session.tick()
    there = ego.get_location()
    for _ in range(10):
        session.tick()
    assert ego.get_location() == there
    ego.set_simulate_physics(True)
    for _ in range(10):
        session.tick()
    assert ego.get_location().distance(there) > 0.1


def test_pictures_larger_than_the_sockets_arrive_for_every_frame(session):
    """The client ticks on without looking at its pictures; all of them come, and they are the small ones' bytes."""
    pictures = []
    mount = carla.Transform(carla.Location(x=0.0, y=5.0, z=4.0))
    for _ in range(2):
        blueprint = session.blueprint("sensor.camera.rgb", image_size_x=2048, image_size_y=2048)
        pictures.append(SensorStream(session, session.spawn(blueprint, mount)))
    frames = [session.tick().frame for _ in range(6)]
    for frame in frames:
        one, other = (stream.take(frame) for stream in pictures)
        assert (one.frame, one.width, one.height) == (frame, 2048, 2048)
        assert bytes(one.raw_data) == bytes(other.raw_data)


EXTREME = (1e308, -1e308, 1e39, float("nan"), float("inf"), 2**63)


def test_numbers_out_of_this_world_harm_nobody(simulator: Simulator):
    """Raw requests, for the client itself cuts many of them; another client's pictures go on meanwhile."""
    with Session.connect("127.0.0.1", simulator.port) as session:
        ego = spawn(session)
        blueprint = session.blueprint("sensor.camera.rgb", image_size_x=32, image_size_y=32)
        camera = session.spawn(blueprint, carla.Transform(carla.Location(z=3.0)), ego)
        free = session.spawn(blueprint, carla.Transform(carla.Location(z=3.0)))
        stream = SensorStream(session, camera)
        connection, unpacker = connect(simulator.port), msgpack.Unpacker(strict_map_key=False)
        for bad in EXTREME:
            vector, flat = [bad, bad, bad], [0.0, 0.0, 0.0]
            for actor in (ego.id, camera.id, free.id):
                for transform in ([vector, flat], [flat, vector]):
                    call(connection, unpacker, "set_actor_transform", actor, transform)
            for name in (
                "set_actor_target_velocity",
                "set_actor_target_angular_velocity",
                "add_actor_impulse",
                "add_actor_force",
                "add_actor_angular_impulse",
                "add_actor_torque",
                "enable_actor_constant_velocity",
            ):
                call(connection, unpacker, name, ego.id, vector)
            control = [bad, bad, bad, False, False, False, 0]
            ackermann = [bad] * 5
            call(connection, unpacker, "apply_control_to_vehicle", ego.id, control)
            call(connection, unpacker, "apply_ackermann_control_to_vehicle", ego.id, ackermann)
            stream.take(session.tick().frame)
            call(connection, unpacker, "apply_batch", [[[2, [ego.id, control]]], [[3, [ego.id, ackermann]]]], False)
            call(connection, unpacker, "set_vehicle_light_state", ego.id, [bad])
            call(connection, unpacker, "set_vehicle_light_state", ego.id, [2**40])
            stream.take(session.tick().frame)
        assert all(map(math.isfinite, (ego.get_location().x, forward_speed(ego))))
        assert set(session.world.get_vehicles_light_states()) == {ego.id}
        connection.close()
    assert_serves(simulator)
    assert "Traceback" not in simulator.stop()


@pytest.mark.parametrize("bad", [*EXTREME, -(2**31) - 1])
def test_what_fits_no_clients_numbers_is_refused_and_not_kept_for_others(session, shared_simulator, bad):
    ego = spawn(session)
    connection, unpacker = connect(shared_simulator.port), msgpack.Unpacker(strict_map_key=False)
    before = session.world.get_settings(), session.world.get_weather(), ego.get_physics_control()
    *_, result = call(connection, unpacker, "get_episode_settings")
    settings = result[0][1]
    settings[5] = bad
    *_, refused = call(connection, unpacker, "set_episode_settings", settings)
    assert refused[0][0] == 0
    description = [bad, "vehicle.audi.a2", []]
    *_, refused = call(connection, unpacker, "spawn_actor", description, [[0.0, 6.0, 0.5], [0.0, 0.0, 0.0]])
    assert refused[0][0] == 0
    if not abs(bad) <= 3.5e38:
        *_, refused = call(connection, unpacker, "set_weather_parameters", [bad] * 14)
        assert refused[0][0] is True
        *_, result = call(connection, unpacker, "get_physics_control", ego.id)
        physics = result[0][1]
        physics[11] = bad
        *_, refused = call(connection, unpacker, "apply_physics_control", ego.id, physics)
        assert refused[0][0] is True
    session.tick()
    assert (session.world.get_settings(), session.world.get_weather(), ego.get_physics_control()) == before
    connection.close()
