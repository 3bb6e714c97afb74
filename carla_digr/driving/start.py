"""Putting a car on a road of any CARLA server so that it really stands there, or really rolls.

On the embedded highway one call does it. On a real server velocities outlive a teleport, a car falls and rocks where it
is put, and engine and gearbox do not know of a velocity that is set (docs/carla_server.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import carla

from carla_digr.driving.control import TICK
from carla_digr.driving.highway import lanes_beside
from carla_digr.driving.keeper import lane_offset, lane_steer
from carla_digr.driving.session import Session

LIFT = 0.1  # m above the road's surface, for wheels that would stand in it
CALM = 5  # ticks in a row without motion that make a car settled
SETTLE_TICKS = 80  # most
ROLL_TICKS = 25  # for which a velocity is held, so that engine and gearbox come along
STILL = 0.005, 0.1  # m and degrees that a settled car's height, pitch and roll change a tick at most
WARM_UP = 120, 240  # ticks in which traffic gets to roll, at least and at most until there is a gap
GAP, GAP_STEP = (60.0, 25.0), 3  # m before and behind the start that are free then, and between looks
LANE_ROOM = 2.5  # m around the middle of the lane
ROLLING = 2.0  # m/s, of traffic that has warmed up
ON_LANE = 0.5  # m beside the middle of its lane, and above or below the road, that a started ego is at most
PARK, PARK_HEIGHT = 80.0, 5.0  # m to the right of the start, and above it
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


class Others(Protocol):
    """The traffic of an episode, as a start needs it."""

    def fill(self, seed: int, ego: carla.Vehicle, place: carla.Location) -> None:
        """Put it on the road around a place that stays free."""

    def remove(self, ids: Sequence[int]) -> None:
        """Take vehicles from the road."""


def start_in_traffic(
    session: Session,
    car: carla.Vehicle,
    physics: carla.VehiclePhysicsControl,
    others: Others,
    point: carla.Transform,
    seed: int,
    speed: float,
) -> list[str]:
    """Start an episode: traffic first, until it rolls; then the ego into a gap, rolling along the lane.

    The gap may be in a lane beside the point's own; where none comes in time, one is made.

    Ends when the ego drives at ``speed`` (m/s) among traffic, with its springs at rest and its gear engaged; the road
    that was empty when the call began should be.

    Returns:
        What did not go as it should, a sentence each.

    Raises:
        SimulatorGone: the server does not answer.
    """
    complaints = []
    _park(car, point)
    others.fill(seed, car, point.location)
    own = session.map.get_waypoint(point.location)
    beside = [lane for lane in lanes_beside(own) if lane.lane_id != own.lane_id]
    lanes = [(lane.transform, lane_around(lane)) for lane in (own, *beside)]
    blocked: list[int] = []
    for tick in range(WARM_UP[1]):
        session.tick()
        if tick >= WARM_UP[0]:
            found = [(_inside(session, car, around), place) for place, around in lanes]
            blocked, point = min(found, key=lambda lane: len(lane[0]))
            if not blocked:
                break
    there = [v.get_velocity().length() for v in session.world.get_actors().filter("vehicle.*") if v.id != car.id]
    standing = sum(speed < ROLLING for speed in there)
    if 2 * standing > len(there):
        complaints.append(f"{standing} of {len(there)} other vehicles stand still")
    if blocked:
        complaints.append(f"no gap of {GAP[0]:.0f} m at the start in {WARM_UP[1] * TICK:.0f} s")
        others.remove(blocked)
        session.tick()
    car.set_simulate_physics(True)
    car.set_collisions(True)
    stop(car)
    car.set_transform(on_road(session.map, point))
    stop(car)
    poses: list[tuple[float, float]] = []
    roll(session, car, physics, speed, watch=lambda: poses.append(_lean(car)))
    if max(abs(a - b) for a, b in zip(poses[-1], poses[-2], strict=True)) > STILL[1]:
        complaints.append("the ego still rocks")
    reached = car.get_velocity().length()
    if abs(reached - speed) > 1.0:
        complaints.append(f"the ego drives {reached:.1f} m/s, not {speed:g}")
    place = car.get_transform()
    off = lane_offset(session.map, place)
    above = place.location.z - session.map.get_waypoint(place.location).transform.location.z
    if max(off, abs(above)) > ON_LANE:
        complaints.append(f"the ego is {off:.1f} m beside its lane and {above:.1f} m above it")
    return complaints


def _lean(car: carla.Vehicle) -> tuple[float, float]:
    rotation = car.get_transform().rotation
    return rotation.pitch, rotation.roll


def _park(car: carla.Vehicle, point: carla.Transform) -> None:
    """Take a car off the road, out of the way of everything, standing."""
    stop(car)
    car.set_collisions(False)
    car.set_simulate_physics(False)
    aside = point.get_right_vector()
    place = point.location + carla.Location(PARK * aside.x, PARK * aside.y, PARK_HEIGHT)
    car.set_transform(carla.Transform(place, point.rotation))


def _inside(session: Session, car: carla.Vehicle, around: Sequence[carla.Location]) -> list[int]:
    """Ids of the other vehicles at some places of a lane."""
    near = []
    for vehicle in session.world.get_actors().filter("vehicle.*"):
        at = vehicle.get_location()
        if vehicle.id != car.id and any(math.hypot(at.x - p.x, at.y - p.y) < LANE_ROOM for p in around):
            near.append(vehicle.id)
    return near


def lane_around(here: carla.Waypoint) -> list[carla.Location]:
    """Places of a lane, GAP_STEP apart, over the gap that a start there needs."""
    places = [here.transform.location]
    for gap, way in zip(GAP, ("next", "previous"), strict=True):
        for metres in range(GAP_STEP, round(gap) + 1, GAP_STEP):
            places += [waypoint.transform.location for waypoint in getattr(here, way)(metres)]
    return places
