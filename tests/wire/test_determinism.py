"""Two runs of the same calls give the same world: states, pictures and collisions, in any process."""

from __future__ import annotations

import hashlib
import math

import carla
import numpy as np
from simulator_process import Simulator

from carla_digr.driving.session import SensorStream, Session

FRAMES = 400
VEHICLES = 20


def run(seed: int, frames: int) -> tuple[list[str], list[str]]:
    """Digests of the states and of the pictures of every frame, from a simulator process of its own."""
    simulator = Simulator()
    try:
        return drive(simulator.port, seed, frames)
    finally:
        simulator.stop()


def drive(port: int, seed: int, frames: int) -> tuple[list[str], list[str]]:
    with Session.connect("127.0.0.1", port) as session:
        ego = session.spawn(session.blueprint("vehicle.tesla.model3"), session.map.get_spawn_points()[7])
        traffic = session.blueprint("controller.traffic.highway", seed=seed, vehicles=VEHICLES, hero=ego.id)
        session.spawn(traffic, carla.Transform())
        place = carla.Transform(carla.Location(-9.5, 0.0, 4.2), carla.Rotation(pitch=-9.0))
        size = {"image_size_x": 96, "image_size_y": 96}
        kinds = [session.blueprint(f"sensor.camera.{kind}", **size) for kind in ("rgb", "depth")]
        cameras = [SensorStream(session, session.spawn(kind, place, ego)) for kind in kinds]
        yaw = math.radians(ego.get_transform().rotation.yaw)
        ego.set_target_velocity(carla.Vector3D(20.0 * math.cos(yaw), 20.0 * math.sin(yaw), 0.0))
        draw = np.random.default_rng(seed)
        states, pictures = [], []
        for _ in range(frames):
            ego.apply_control(
                carla.VehicleControl(
                    throttle=float(draw.uniform(0.0, 0.3)),
                    steer=float(draw.normal(0.0, 0.004)),
                    brake=float(draw.random() < 0.02),
                )
            )
            snapshot = session.tick()
            state = []
            for actor in sorted(snapshot, key=lambda a: a.id):
                place, velocity, spin = actor.get_transform(), actor.get_velocity(), actor.get_angular_velocity()
                pose = place.location, place.rotation, velocity, actor.get_acceleration(), spin
                state.append((actor.id, *map(str, pose), velocity.x.hex(), velocity.y.hex()))
            states.append(hashlib.sha256(repr(state).encode()).hexdigest())
            images = [camera.take(snapshot.frame) for camera in cameras]
            pictures.append(hashlib.sha256(b"".join(bytes(i.raw_data) for i in images)).hexdigest())
        return states, pictures


def test_two_runs_of_400_ticks_with_20_vehicles_are_equal_and_another_seed_is_not():
    first, second, other = run(3, FRAMES), run(3, FRAMES), run(4, 20)
    assert first == second
    assert len(set(first[1])) == FRAMES
    assert not set(first[1]) & set(other[1])
