"""Putting a car on a road of any CARLA server so that it really stands there, or really rolls.

On the embedded highway one call does it. On a real server velocities outlive a teleport, a car falls and rocks where it
is put, and engine and gearbox do not know of a velocity that is set (docs/carla_server.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import carla

from carla_digr.driving.keeper import lane_steer
from carla_digr.driving.session import Session

LIFT = 0.1  # m above the road's surface, for wheels that would stand in it
CALM = 5  # ticks in a row without motion that make a car settled
SETTLE_TICKS = 80  # most
ROLL_TICKS = 25  # for which a velocity is held, so that engine and gearbox come along
STILL = 0.005, 0.1  # m and degrees that a settled car's height, pitch and roll change a tick at most
ZERO = carla.Vector3D(0.0, 0.0, 0.0)


class Standing(NamedTuple):
    """How a car came to rest."""

    settled: bool
    ticks: int
    """Until height, pitch and roll stood still."""
    fall: float
    """m between where it was put and where it stands."""


def on_road(road_map: carla.Map, place: carla.Transform) -> carla.Transform:
    """The place just above the road's surface, turned along its slope."""
    waypoint = road_map.get_waypoint(place.location)
    height = waypoint.transform.location.z + LIFT
    location = carla.Location(place.location.x, place.location.y, height)
    return carla.Transform(location, carla.Rotation(pitch=waypoint.transform.rotation.pitch, yaw=place.rotation.yaw))


def stop(car: carla.Vehicle) -> None:
    """Take every motion from a car, that of its pedals included."""
    car.set_target_velocity(ZERO)
    car.set_target_angular_velocity(ZERO)
    car.apply_control(carla.VehicleControl(brake=1.0))


def stand(session: Session, car: carla.Vehicle, place: carla.Transform, limit: int = SETTLE_TICKS) -> Standing:
    """Put a car somewhere and tick until it stands there.

    Args:
        limit: ticks after which it is left as it is.

    Raises:
        SimulatorGone: the server does not answer.
    """
    stop(car)
    car.set_transform(place)
    stop(car)
    last, calm = None, 0
    for tick in range(1, limit + 1):
        session.tick()
        pose = car.get_transform()
        now = pose.location.z, pose.rotation.pitch, pose.rotation.roll
        moved = [abs(a - b) for a, b in zip(now, last or now, strict=True)]
        calm = calm + 1 if moved[0] < STILL[0] and max(moved[1:]) < STILL[1] else 0
        last = now
        if calm == CALM:
            return Standing(True, tick - CALM, place.location.z - now[0])
    return Standing(False, limit, place.location.z - car.get_transform().location.z)


def gear_at(physics: carla.VehiclePhysicsControl, speed: float) -> int:
    """The lowest gear that an automatic gearbox would not leave upwards at a speed in m/s; 1 where nothing is told."""
    radius = physics.wheels[0].radius / 100.0 if physics.wheels else 0.0
    if radius <= 0.0 or physics.max_rpm <= 0.0:
        return 1
    turns = speed / radius * 60.0 / (2.0 * math.pi) * physics.final_ratio / physics.max_rpm
    gears = list(physics.forward_gears)
    return next((i for i, gear in enumerate(gears, 1) if gear.ratio * turns <= gear.up_ratio), max(len(gears), 1))


def roll(
    session: Session,
    car: carla.Vehicle,
    physics: carla.VehiclePhysicsControl,
    speed: float,
    ticks: int = ROLL_TICKS,
    watch: Callable[[], object] = lambda: None,
) -> None:
    """Hold a speed (m/s) along the lane for some ticks, in the right gear; then the car is left to its pedals.

    Args:
        physics: of the car.
        watch: called after each tick.

    Raises:
        SimulatorGone: the server does not answer.
    """
    gear = gear_at(physics, speed)
    for _ in range(ticks):
        place = car.get_transform()
        steer = lane_steer(session.map, place, speed)
        car.apply_control(carla.VehicleControl(throttle=0.1, steer=steer, manual_gear_shift=True, gear=gear))
        car.set_target_velocity(along(place, speed))
        session.tick()
        watch()


def along(place: carla.Transform, speed: float) -> carla.Vector3D:
    """A velocity in the direction a place looks in, slope included."""
    forward = place.get_forward_vector()
    return carla.Vector3D(speed * forward.x, speed * forward.y, speed * forward.z)
