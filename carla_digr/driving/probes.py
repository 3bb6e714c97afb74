"""Measurements of a simulator over CARLA's protocol, one a function: what its cars, cameras and contacts do.

Each returns figures by name, in the units of their names or m, s, m/s and m/s2. They disturb each other as little as
can be: a car is held in the right gear at a speed before pedals or wheels are tried, pictures that are compared are
taken by a camera that stands in the world.
"""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import pairwise
from typing import Any

import carla
import numpy as np

from carla_digr.driving import start
from carla_digr.driving.control import (
    BRAKE,
    CAMERA,
    CRUISE_SPEED,
    EGO_BLUEPRINT,
    EGO_WHEELBASE,
    IMAGE_SIZE,
    MAX_WHEEL_ANGLE,
    TICK,
    WHEEL_ANGLE,
    DriveFrame,
    VehicleCommand,
    pedals,
)
from carla_digr.driving.highway import reach
from carla_digr.driving.keeper import lane_offset, lane_steer
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import SensorStream, Session
from carla_digr.errors import UserError

Figures = dict[str, Any]
SPAWN_REST = 50  # ticks after a spawn in which some cars do not move
AGAIN_TICKS = 10  # for which a speed is held that a car hardly left
OTHER = "vehicle.audi.a2"
VEHICLE_TAGS = (14, 15, 16)
PICTURES = (1, 5, 20)  # frames after a change that are compared with the last
DRIVE_SPEED = 15.0  # m/s of the trial drive: whoever stands ahead can get out of the way
HELD_COMMAND = VehicleCommand(0.0, target_speed=CRUISE_SPEED)


class Bench:
    """A car with a contact sensor, and the stretch of road it is tried on: the start with the longest reach.

    Args:
        session: owns the tick.
        points: where drives start.
    """

    def __init__(self, session: Session, points: list[carla.Transform]):
        self.session = session
        self.reaches = [reach(session.map, point) for point in points]
        best = max(range(len(points)), key=lambda i: (self.reaches[i].metres, -self.reaches[i].slope))
        self.points, self.reach = points, self.reaches[best]
        self.place = start.on_road(session.map, points[best])
        self.car = session.spawn(session.blueprint(EGO_BLUEPRINT), points[best])
        self.contacts: deque[tuple[int, str, float]] = deque(maxlen=1000)
        """Frame, what was touched, N s."""
        contacts = self.contacts  # alone: the library's thread must not keep the bench
        sensor = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), self.car)
        session.listen(
            sensor,
            lambda event: contacts.append((event.frame, event.other_actor.type_id, event.normal_impulse.length())),
        )
        for _ in range(SPAWN_REST):
            session.tick()
        self.physics = self.car.get_physics_control()

    def roll(self, speed: float, place: carla.Transform | None = None) -> None:
        """Put the car on the stretch, rolling in the right gear."""
        start.stop(self.car)
        self.car.set_transform(place or self.place)
        start.stop(self.car)
        start.roll(self.session, self.car, self.physics, speed)

    def drive(self, ticks: int, throttle: float = 0.0, brake: float = 0.0, cruise: bool = False) -> list[float]:
        """Hold pedals, or the cruise control, and the lane; the speed after each tick."""
        speeds = []
        for _ in range(ticks):
            speed = self.car.get_velocity().length()
            steer = lane_steer(self.session.map, self.car.get_transform(), speed)
            if cruise:
                throttle, brake = pedals(HELD_COMMAND, speed)
            self.car.apply_control(carla.VehicleControl(throttle=throttle, steer=steer, brake=brake))
            self.session.tick()
            speeds.append(self.car.get_velocity().length())
        return speeds


def settling(bench: Bench, starts: int) -> Figures:
    """Ticks until a car that is put on drawn starts of the map stands still there."""
    picks = np.linspace(0, len(bench.points) - 1, starts).astype(int)
    stands = [start.stand(bench.session, bench.car, bench.points[i]) for i in picks]
    return {
        "ticks": max(stand.ticks for stand in stands),
        "fall": max(stand.fall for stand in stands),
        "settled": sum(stand.settled for stand in stands),
        "starts": starts,
    }


def spin(bench: Bench) -> Figures:
    """Speed and yaw rate (degrees/s) that are left a tick after a teleport out of a spin of 90 degrees/s at 10 m/s."""
    bench.roll(10.0)
    bench.car.set_target_angular_velocity(carla.Vector3D(0.0, 0.0, 90.0))
    bench.session.tick()
    bench.car.set_transform(bench.place)
    bench.car.apply_control(carla.VehicleControl())
    bench.session.tick()
    left = bench.car.get_angular_velocity().z
    return {"yaw_rate": abs(left), "speed": bench.car.get_velocity().length()}


def rolling_start(bench: Bench) -> Figures:
    """What becomes of a velocity of 22 m/s that is set once on a car at rest."""
    start.stand(bench.session, bench.car, bench.place)
    bench.car.apply_control(carla.VehicleControl())
    bench.session.tick()
    bench.car.set_target_velocity(start.along(bench.car.get_transform(), CRUISE_SPEED))
    speeds = bench.drive(60, cruise=True)
    settled = float(np.mean(speeds[-20:]))
    return {
        "dip": settled - min(speeds),
        "speeds": [round(speed, 2) for speed in speeds],
        "gears_told": len(list(bench.physics.forward_gears)),
        "gear": bench.car.get_control().gear,
    }


def cruise(bench: Bench, seconds: float) -> Figures:
    """What the cruise control makes of 22 m/s: mean and spread of the speed, and the throttle that holds it."""
    bench.roll(CRUISE_SPEED)
    speeds = bench.drive(round(seconds / TICK), cruise=True)[-round(0.5 * seconds / TICK) :]
    held = pedals(HELD_COMMAND, float(np.mean(speeds)))[0]
    return {"error": float(np.mean(speeds)) - CRUISE_SPEED, "spread": float(np.ptp(speeds)), "throttle": held}


def accelerations(bench: Bench, ticks: int = 8) -> Figures:
    """m/s2 of throttle, coasting and braking, and the tick of the first effect of the brake."""
    figures: Figures = {}
    last = 0.0
    for name, speed, throttle, brake in (
        ("throttle_0.2", 12.0, 0.2, 0.0),
        ("throttle_0.5", 12.0, 0.5, 0.0),
        ("throttle_1", 12.0, 1.0, 0.0),
        ("coast", CRUISE_SPEED, 0.0, 0.0),
        ("brake_0.25", CRUISE_SPEED, 0.0, 0.25),
        ("brake_0.5", CRUISE_SPEED, 0.0, BRAKE),
        ("brake_1", CRUISE_SPEED, 0.0, 1.0),
    ):
        if speed == last:
            start.roll(bench.session, bench.car, bench.physics, speed, AGAIN_TICKS)
        else:
            bench.roll(speed)
        last, before = speed, bench.car.get_velocity().length()
        speeds = bench.drive(ticks, throttle, brake)
        figures[name] = (speeds[-1] - before) / (ticks * TICK)
        if name == "brake_0.5":
            slower = [i for i, now in enumerate(speeds, 1) if before - now > 0.5 * 8.0 * BRAKE * TICK * i]
            figures["brake_ticks"] = slower[0] if slower else math.inf
    return figures


def steering(bench: Bench, ticks: int = 6) -> Figures:
    """Yaw rate over the one that wheels at the actions' angle give, at three speeds; the lock and curve it tells."""
    parts = {}
    for speed in (5.0, 15.0, CRUISE_SPEED):
        bench.roll(speed)
        bench.car.apply_control(carla.VehicleControl(throttle=0.1, steer=WHEEL_ANGLE / MAX_WHEEL_ANGLE))
        bench.session.tick()  # the wheels may take one to get there
        yaw, driven = bench.car.get_transform().rotation.yaw, 0.0
        for _ in range(ticks):
            bench.session.tick()
            driven += bench.car.get_velocity().length() * TICK
        turned = math.radians(_wrapped(bench.car.get_transform().rotation.yaw - yaw))
        parts[speed] = turned / turn(driven, WHEEL_ANGLE)
    return {
        "parts": parts,
        "lock": max((wheel.max_steer_angle for wheel in bench.physics.wheels), default=0.0),
        "curve": [(point.x, point.y) for point in bench.physics.steering_curve],
    }


def turn(metres: float, angle: float) -> float:
    """rad by which a bicycle of the ego's wheelbase turns over metres with its wheels at an angle (rad)."""
    return metres * math.cos(math.atan(0.5 * math.tan(angle))) * math.tan(angle) / EGO_WHEELBASE


def keeping(bench: Bench, seconds: float) -> Figures:
    """How far off its lane a car comes that is steered by nothing but the policy's wheel angles, and how far, m.

    Over its stretch, or for as long as ``seconds``.
    """
    bench.roll(CRUISE_SPEED)
    place, offset, driven = bench.car.get_transform(), 0.0, 0.0
    for _ in range(round(seconds / TICK)):
        if driven > bench.reach.metres - 2.0 * CRUISE_SPEED:
            break
        speed = bench.car.get_velocity().length()
        wanted = MAX_WHEEL_ANGLE * lane_steer(bench.session.map, place, speed)
        angle = min((-WHEEL_ANGLE, 0.0, WHEEL_ANGLE), key=lambda angle: abs(angle - wanted))
        throttle, brake = pedals(HELD_COMMAND, speed)
        bench.car.apply_control(carla.VehicleControl(throttle, angle / MAX_WHEEL_ANGLE, brake))
        bench.session.tick()
        driven += speed * TICK
        place = bench.car.get_transform()
        offset = max(offset, lane_offset(bench.session.map, place))
    return {"offset": offset, "driven": driven}


def contacts(bench: Bench, seconds: float) -> Figures:
    """What a car touches that is put on a free road and keeps its lane: kinds, numbers, largest impulse in N s."""
    bench.session.tick()
    bench.contacts.clear()
    bench.roll(CRUISE_SPEED)
    bench.drive(round(seconds / TICK), cruise=True)
    touched = list(bench.contacts)
    kinds = {name: sum(1 for _, other, _ in touched if other == name) for name in sorted({t[1] for t in touched})}
    return {"kinds": kinds, "largest": max((impulse for _, _, impulse in touched), default=0.0)}


def weather(session: Session) -> Figures:
    """The sun's height in degrees, and per cent of clouds, rain, fog and wet roads."""
    now = session.world.get_weather()
    return {
        "sun": 45.0 if now.sun_altitude_angle == -1.0 else now.sun_altitude_angle,  # -1: as the map has it
        "cloudiness": now.cloudiness,
        "precipitation": now.precipitation,
        "fog": now.fog_density,
        "wetness": now.wetness,
    }


def ticks(session: Session, count: int) -> Figures:
    """How long frames take, ms, and how far each is from its step of simulated time, s."""
    before = session.tick()
    wall, stamps = [], [before.timestamp.elapsed_seconds]
    for _ in range(count):
        begin = time.perf_counter()
        stamps.append(session.tick().timestamp.elapsed_seconds)
        wall.append(1000.0 * (time.perf_counter() - begin))
    steps = np.diff(stamps)
    return {
        "rate": 1000.0 / float(np.mean(wall)),
        "p50_ms": float(np.median(wall)),
        "p99_ms": float(np.quantile(wall, 0.99)),
        "step": float(np.mean(steps)),
        "step_error": float(np.max(np.abs(steps - TICK))),
    }


def standing_camera(
    session: Session, kind: str, place: carla.Transform, fov: float
) -> tuple[carla.Actor, SensorStream]:
    """A camera in the world that looks along the road from where the drive's camera would be, and its pictures."""
    blueprint = session.blueprint(kind, image_size_x=IMAGE_SIZE, image_size_y=IMAGE_SIZE, fov=fov)
    camera = session.spawn(blueprint, above(place))
    return camera, SensorStream(session, camera)


def above(place: carla.Transform) -> carla.Transform:
    """Where the drive's camera stands above a place on the road."""
    location = carla.Location(place.location.x, place.location.y, place.location.z + CAMERA["z"])
    return carla.Transform(location, carla.Rotation(pitch=CAMERA["pitch"], yaw=place.rotation.yaw))


def memory_of_pictures(bench: Bench, frames: int) -> Figures:
    """How much the first pictures after a change of place differ from the last, mean grey levels of 255.

    A camera that stands in the world is made, put elsewhere and put back: a fresh one, then one with a past.
    """
    session = bench.session
    bench.car.set_transform(bench.points[0])
    start.stop(bench.car)
    places = [above(start.on_road(session.map, bench.points[i])) for i in (len(bench.points) // 2, -1)]
    camera, stream = standing_camera(session, "sensor.camera.rgb", bench.points[len(bench.points) // 2], CAMERA["fov"])
    differences = dict.fromkeys(PICTURES, 0.0)
    brightness = []
    for move in (0, 1, 0):
        camera.set_transform(places[move])
        pictures: list[np.ndarray] = []
        while len(pictures) < frames:
            frame = session.tick().frame
            picture = stream.poll(frame, session.timeout / 20) if not pictures else stream.take(frame)
            if picture is not None:
                pictures.append(_pixels(picture))
        brightness.append([round(float(pictures[k - 1].mean()), 1) for k in (*PICTURES, frames)])
        for k in PICTURES:
            off = float(np.abs(pictures[k - 1] - pictures[-1]).mean())
            differences[k] = max(differences[k], off)
    session.destroy(camera)
    return {"off": differences, "brightness": brightness, "frames": (*PICTURES, frames)}


def sight(bench: Bench, distances: tuple[float, ...] = (15.0, 30.0, 60.0, 100.0)) -> Figures:
    """Pixels of a car at several distances in an instance picture, and how many beside it make no sense."""
    session = bench.session
    waypoint = session.map.get_waypoint(bench.place.location)
    bench.car.set_transform(bench.points[0] if bench.points[0] != bench.place else bench.points[-1])
    start.stop(bench.car)
    camera, stream = standing_camera(session, "sensor.camera.instance_segmentation", bench.place, 20.0)
    spot = start.on_road(session.map, waypoint.next(distances[0])[0].transform)
    other = session.spawn(session.blueprint(OTHER), spot)
    pixels, strange = {}, 0.0
    for distance in distances:
        start.stand(session, other, start.on_road(session.map, waypoint.next(distance)[0].transform))
        camera.set_transform(_looking_at(above(bench.place).location, other.get_transform().location))
        frame = session.tick().frame
        frame = session.tick().frame
        picture = stream.poll(frame, session.timeout)
        if picture is None:
            raise UserError("The instance segmentation camera sends no pictures.")
        bytes_ = _pixels(picture).astype(int)
        shown = bytes_[..., 0] * 256 + bytes_[..., 1] == other.id % 65536
        shown &= np.isin(bytes_[..., 2], VEHICLE_TAGS)
        pixels[distance] = int(shown.sum())
        if distance == distances[0]:
            strange = _strange(bytes_[..., 2], shown)
    session.destroy(camera)
    session.destroy(other)
    return {"pixels": pixels, "strange": strange, "id": other.id}


def _strange(tags: np.ndarray, shown: np.ndarray) -> float:
    """Part of the pixels around a car whose label hardly occurs in the picture."""
    if not shown.any():
        return 0.0
    around = np.zeros_like(shown)
    around[1:] |= shown[:-1]
    around[:-1] |= shown[1:]
    around[:, 1:] |= shown[:, :-1]
    around[:, :-1] |= shown[:, 1:]
    around &= ~shown
    common = np.flatnonzero(np.bincount(tags.ravel(), minlength=256) > 0.01 * tags.size)
    return float(np.mean(~np.isin(tags[around], [*common, *VEHICLE_TAGS])))


def _looking_at(eye: carla.Location, goal: carla.Location) -> carla.Transform:
    ahead = goal - eye
    yaw = math.degrees(math.atan2(ahead.y, ahead.x))
    pitch = math.degrees(math.atan2(ahead.z + 0.7, math.hypot(ahead.x, ahead.y)))
    return carla.Transform(eye, carla.Rotation(pitch=pitch, yaw=yaw))


def _pixels(picture: carla.Image) -> np.ndarray:
    """(H, W, 3) float64 BGR copy."""
    bgra = np.frombuffer(picture.raw_data, np.uint8).reshape(picture.height, picture.width, 4)
    return bgra[..., :3].astype(np.float64)


def _wrapped(degrees: float) -> float:
    return (degrees + 180.0) % 360.0 - 180.0


def lanes(session: Session, ego: int) -> dict[int, tuple[tuple[int, int, int], float, float]]:
    """Of every vehicle but the ego its road, section and lane, m along them, and half its length (m), by its id."""
    found = {}
    for vehicle in session.world.get_actors().filter("vehicle.*"):
        waypoint = session.map.get_waypoint(vehicle.get_location())
        if vehicle.id != ego and waypoint is not None:
            lane = waypoint.road_id, waypoint.section_id, waypoint.lane_id
            found[vehicle.id] = lane, waypoint.s, vehicle.bounding_box.extent.x
    return found


def smallest_gap(vehicles: dict[int, tuple[tuple[int, int, int], float, float]]) -> float:
    """m between the bumpers of two vehicles in one lane, as `lanes` has them; infinite where no two are in one."""
    rows = sorted(vehicles.values())
    pairs = ((a, b) for a, b in pairwise(rows) if a[0] == b[0])
    return min((b[1] - b[2] - a[1] - a[2] for a, b in pairs), default=math.inf)


def traffic(drive: Scenario, times: tuple[float, ...]) -> Figures:
    """Speeds of the others at times of the drive (s), limits (km/h), the smallest gap in a lane, changes of lane, and
    how many pairs of those that were there at first have touched."""
    speeds: dict[float, list[float]] = {}
    touching: set[frozenset[int]] = set()
    others = [vehicle for vehicle in drive.session.world.get_actors().filter("vehicle.*") if vehicle.id != drive.ego.id]
    feelers = [_Feeler(drive.session, vehicle, touching) for vehicle in others]
    now = lanes(drive.session, drive.ego.id)
    gap, changes = smallest_gap(now), 0
    for seconds in times:
        while drive.seconds < seconds - 1e-6:
            steer_on(drive)
            if round(drive.seconds / TICK) % 10 == 0:
                before, now = now, lanes(drive.session, drive.ego.id)
                gap = min(gap, smallest_gap(now))
                both = ((before[id_][0], now[id_][0]) for id_ in before.keys() & now.keys())
                changes += sum(a[:2] == b[:2] and a[2] != b[2] for a, b in both)
        speeds[seconds] = drive.others()
    for feeler in feelers:
        drive.session.destroy(feeler.sensor)
    vehicles = drive.session.world.get_actors().filter("vehicle.*")
    limits = sorted({round(vehicle.get_speed_limit()) for vehicle in vehicles})
    return {
        "speeds": speeds,
        "limits": limits,
        "smallest_gap": gap,
        "lane_changes": changes,
        "touching": len(touching),
    }


class _Feeler:
    """A collision sensor that adds the ids of a vehicle and whom it touches."""

    def __init__(self, session: Session, vehicle: carla.Actor, touching: set[frozenset[int]]):
        self._vehicle, self._touching = vehicle.id, touching
        self.sensor = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), vehicle)
        session.listen(self.sensor, self._hear)

    def _hear(self, event: carla.CollisionEvent) -> None:
        if event.other_actor is not None and event.other_actor.type_id.startswith("vehicle."):
            self._touching.add(frozenset((self._vehicle, event.other_actor.id)))


def repetition(drive: Scenario, seed: int, count: int) -> Figures:
    """m and mean grey levels of 255 between two drives from one seed, frame by frame."""
    drives = [[drive.reset(seed), *(steer_on(drive) for _ in range(count - 1))] for _ in range(2)]
    pairs = list(zip(*drives, strict=True))
    return {
        "apart": [math.hypot(a.x - b.x, a.y - b.y) for a, b in pairs],
        "grey": [float(np.abs(a.image.astype(np.int16) - b.image).mean()) for a, b in pairs],
    }


def steer_on(drive: Scenario) -> DriveFrame:
    """One tick of the trial drive."""
    ego = drive.ego
    steer = lane_steer(drive.session.map, ego.get_transform(), ego.get_velocity().length())
    return drive.step(VehicleCommand(steer=steer, target_speed=DRIVE_SPEED))


def physics_dump(physics: carla.VehiclePhysicsControl) -> Figures:
    """What a car tells of its mechanics, for the report."""
    return {
        "torque_curve": [(point.x, point.y) for point in physics.torque_curve],
        "max_rpm": physics.max_rpm,
        "moi": physics.moi,
        "damping_full_throttle": physics.damping_rate_full_throttle,
        "damping_clutch_engaged": physics.damping_rate_zero_throttle_clutch_engaged,
        "damping_clutch_disengaged": physics.damping_rate_zero_throttle_clutch_disengaged,
        "use_gear_autobox": physics.use_gear_autobox,
        "gear_switch_time": physics.gear_switch_time,
        "clutch_strength": physics.clutch_strength,
        "final_ratio": physics.final_ratio,
        "gears": [(gear.ratio, gear.down_ratio, gear.up_ratio) for gear in physics.forward_gears],
        "mass": physics.mass,
        "drag_coefficient": physics.drag_coefficient,
        "steering_curve": [(point.x, point.y) for point in physics.steering_curve],
        "wheels": [
            {
                "lock": wheel.max_steer_angle,
                "radius": wheel.radius,
                "brake_torque": wheel.max_brake_torque,
                "friction": wheel.tire_friction,
            }
            for wheel in physics.wheels
        ],
    }
