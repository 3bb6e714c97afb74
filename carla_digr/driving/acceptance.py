"""Whether the drive can run on a simulator: what it relies on, tried one by one, with a line for each.

Needs the simulator for itself for about a minute and leaves it as it was found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import carla
import numpy as np

from carla_digr.driving.control import (
    CAMERA,
    CRUISE_SPEED,
    EGO_BLUEPRINT,
    IMAGE_SIZE,
    TICK,
    WHEEL_ANGLE,
    VehicleCommand,
    command,
)
from carla_digr.driving.highway import highway_points
from carla_digr.driving.scenario import HIGHWAY_TRAFFIC, WARM_UP_TICKS, Scenario
from carla_digr.driving.session import VERSION, SensorStream, Session
from carla_digr.errors import UserError

BLUEPRINTS = (EGO_BLUEPRINT, "sensor.camera.rgb", "sensor.other.collision")
LEFT, KEEP, RIGHT, BRAKE = range(4)  # control.ACTION_NAMES
TRAFFIC = 20  # vehicles of the trial drive
DRIVE_TICKS = 100


def check_simulator(host: str, port: int, timeout: float = 20.0, simulator: str = "") -> bool:
    """Try everything the drive relies on; print a line a check, and say what to do where one fails.

    Args:
        timeout: seconds for each call.
        simulator: "embedded" or "carla", which have different traffic; empty: the server's blueprints decide.

    Returns:
        Whether all checks passed. After a check that broke off, the remaining ones are not tried.
    """
    visit = _Visit(host, port, timeout, simulator)
    passed = True
    try:
        for number, check in enumerate(CHECKS):
            broke_off = False
            try:
                good, seen = check.attempt(visit)
            except (UserError, RuntimeError) as error:
                good, seen, broke_off = False, str(error).strip().removesuffix("."), True
            line = f"{'pass' if good else 'FAIL'}  {check.what}: expected {check.expected}; saw {seen}"
            print(line if good else f"{line}; what to do: {check.remedy}", flush=True)
            passed = passed and good
            if broke_off:
                for untried in CHECKS[number + 1 :]:
                    print(f"  --  {untried.what}: not tried")
                break
    finally:
        visit.leave()
    return passed


class _Visit:
    """What the checks share: the session, then the drive, of which there is only one at a time."""

    def __init__(self, host: str, port: int, timeout: float, simulator: str):
        self.host, self.port, self.timeout, self.simulator = host, port, timeout, simulator
        self.found: tuple[bool, list[str]] = False, []
        """The world before: whether it was synchronous, and its actors."""
        self.session: Session | None = None
        self.ego: carla.Vehicle | None = None
        self.drive: Scenario | None = None

    def own(self) -> Session:
        """The session, which the first check has opened."""
        assert self.session is not None
        return self.session

    def leave(self) -> None:
        for owner in (self.drive, self.session):
            if owner is not None:
                owner.close()


def _connect(visit: _Visit) -> tuple[bool, str]:
    visit.session = session = Session.connect(visit.host, visit.port, visit.timeout)
    visit.found = session.found_synchronous, _actors(session.world)
    embedded = bool(session.blueprints.filter(HIGHWAY_TRAFFIC))
    visit.simulator = visit.simulator or ("embedded" if embedded else "carla")
    kind = "carla_digr's embedded highway, not CARLA" if embedded else "a CARLA server"
    return True, f"{session.client.get_server_version()}, {kind}, map {session.map.name}"


def _blueprints(visit: _Visit) -> tuple[bool, str]:
    missing = [name for name in BLUEPRINTS if not visit.own().blueprints.filter(name)]
    return not missing, f"no {', '.join(missing)}" if missing else "all of them"


def _highway(visit: _Visit) -> tuple[bool, str]:
    road_map = visit.own().map
    points = highway_points(road_map)
    return True, f"{len(points)} of {len(road_map.get_spawn_points())} spawn points"


def _ticks(visit: _Visit) -> tuple[bool, str]:
    session = visit.own()
    before = session.tick()
    start = time.perf_counter()
    for _ in range(20):
        after = session.tick()  # raises when a frame is missing
    rate = 20 / (time.perf_counter() - start)
    step = (after.timestamp.elapsed_seconds - before.timestamp.elapsed_seconds) / 20
    return abs(step - TICK) < 1e-4 and rate >= 1.0 / TICK, f"{step:.4f} s a frame, {rate:.0f} frames a second"


def _camera(visit: _Visit) -> tuple[bool, str]:
    session = visit.own()
    visit.ego = session.spawn(session.blueprint(EGO_BLUEPRINT), highway_points(session.map)[0])
    size = {"image_size_x": IMAGE_SIZE, "image_size_y": IMAGE_SIZE, "fov": CAMERA["fov"]}
    place = carla.Transform(
        carla.Location(CAMERA["x"], CAMERA["y"], CAMERA["z"]), carla.Rotation(pitch=CAMERA["pitch"])
    )
    stream = SensorStream(session, session.spawn(session.blueprint("sensor.camera.rgb", **size), place, visit.ego))
    for _ in range(WARM_UP_TICKS):
        if stream.poll(session.tick().frame, visit.timeout / WARM_UP_TICKS) is not None:
            break
    away = 0.0
    for _ in range(20):
        snapshot = session.tick()
        picture = stream.take(snapshot.frame)
        ego = snapshot.find(visit.ego.id)
        if ego is None:
            raise UserError("Somebody destroyed the ego.")
        mount = carla.Location(CAMERA["x"], CAMERA["y"], CAMERA["z"])  # made anew: transform() changes what it is given
        spot = ego.get_transform().transform(mount)
        away = max(away, picture.transform.location.distance(spot))
    pixels = np.frombuffer(picture.raw_data, np.uint8).reshape(picture.height, picture.width, 4)[..., :3]
    contrast = float(pixels.std())
    size_seen = f"{picture.width}x{picture.height}"
    seen = f"20 pictures of {size_seen}, {away:.2f} m from their place, contrast {contrast:.0f} of 255"
    return pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and away < 0.1 and contrast > 5.0, seen


def _pedals_and_wheels(visit: _Visit) -> tuple[bool, str]:
    session, ego = visit.own(), visit.ego
    assert ego is not None
    yaw = math.radians(ego.get_transform().rotation.yaw)
    ego.set_target_velocity(carla.Vector3D(CRUISE_SPEED * math.cos(yaw), CRUISE_SPEED * math.sin(yaw)))
    session.tick()
    session.tick()
    start, heading = ego.get_velocity().length(), ego.get_transform().rotation.yaw
    _apply(session, ego, command(RIGHT))
    turned = (ego.get_transform().rotation.yaw - heading + 180.0) % 360.0 - 180.0
    speed = ego.get_velocity().length()
    _apply(session, ego, command(BRAKE))
    slowed = speed - ego.get_velocity().length()
    seen = f"{start:.1f} m/s after setting {CRUISE_SPEED:g}, {turned:+.1f} degrees, {slowed:.1f} m/s slower"
    return abs(start - CRUISE_SPEED) < 2.0 and 1.5 < turned < 10.0 and slowed > 0.5, seen


def _apply(session: Session, ego: carla.Vehicle, wanted: VehicleCommand) -> None:
    """Half a second of a command."""
    ego.apply_control(carla.VehicleControl(throttle=0.1 * (not wanted.brake), steer=wanted.steer, brake=wanted.brake))
    for _ in range(10):
        session.tick()


def _drive(visit: _Visit) -> tuple[bool, str]:
    visit.own().close()
    visit.drive = drive = Scenario.connect(visit.simulator, visit.host, visit.port, visit.timeout, vehicles=TRAFFIC)
    drive.reset(1)
    start = time.perf_counter()
    distance = 0.0
    for _ in range(DRIVE_TICKS):
        distance += TICK * drive.step(command(KEEP)).speed
    rate = DRIVE_TICKS / (time.perf_counter() - start)
    others = drive.others()
    moving = sum(speed > 3.0 for speed in others)
    seen = f"{distance:.0f} m with {len(others)} others, {moving} of them moving, {rate:.0f} frames a second"
    return distance > 10.0 and moving >= TRAFFIC // 2 and rate >= 1.0 / TICK, seen


def _repeats(visit: _Visit) -> tuple[bool, str]:
    drive = visit.drive
    assert drive is not None
    a, b = (drive.reset(2) for _ in range(2))
    apart = math.hypot(a.x - b.x, a.y - b.y)
    return apart < 0.5, f"{apart:.2f} m between the two"


def _left_behind(visit: _Visit) -> tuple[bool, str]:
    assert visit.drive is not None
    visit.drive.close()
    client = carla.Client(visit.host, visit.port)
    client.set_timeout(visit.timeout)
    world = client.get_world()
    if not world.get_settings().synchronous_mode:
        world.wait_for_tick(visit.timeout)
    synchronous, actors = visit.found
    more = [actor for actor in _actors(world) if actor not in actors]
    same = world.get_settings().synchronous_mode == synchronous
    return same and not more, f"{', '.join(more) or 'no actors of ours'}, settings {'as before' if same else 'changed'}"


def _actors(world: carla.World) -> list[str]:
    return [f"{actor.type_id} {actor.id}" for actor in world.get_actors()]


class Check(NamedTuple):
    """One line of the report."""

    what: str
    expected: str
    remedy: str
    attempt: Callable[[_Visit], tuple[bool, str]]
    """Returns whether what was seen is good, and what was seen; raises UserError or RuntimeError to break off."""


CHECKS = (
    Check(
        "server",
        f"CARLA {VERSION} whose tick nobody owns",
        f"start CarlaUE4.sh of CARLA {VERSION} or 'carla-digr simulator', and stop other clients that tick it",
        _connect,
    ),
    Check("blueprints", ", ".join(BLUEPRINTS), f"use the unmodified packages of CARLA {VERSION}", _blueprints),
    Check("map", "spawn points with a highway ahead", "load Town04 or Town05 before you start the drive", _highway),
    Check(
        "ticks",
        f"{TICK:g} s of simulation a frame, at least {1 / TICK:.0f} frames a second",
        "lower the graphics (-quality-level=Low, -RenderOffScreen) or use a faster machine; where the step differs, "
        "stop other clients that change the world's settings",
        _ticks,
    ),
    Check(
        "camera",
        f"a {IMAGE_SIZE}x{IMAGE_SIZE} picture of every frame from its place behind the ego",
        "turn rendering on (no -nullrhi, no_rendering_mode off), check that the port after --port is reachable too, "
        "and stop other clients that destroy actors",
        _camera,
    ),
    Check(
        "control",
        f"{CRUISE_SPEED:g} m/s as set, then in half a second each: right turn with {WHEEL_ANGLE:g} rad by about 4 "
        "degrees, braking by about 2 m/s",
        f"use CARLA {VERSION}'s own {EGO_BLUEPRINT} and physics",
        _pedals_and_wheels,
    ),
    Check(
        "drive",
        f"{DRIVE_TICKS} frames among {TRAFFIC} vehicles that move",
        "choose other spawn points in configs/live.yaml, or a faster machine",
        _drive,
    ),
    Check("repetition", "the same start again from the same seed", "stop other clients that move actors", _repeats),
    Check(
        "leaving",
        "the world as it was found",
        "stop other clients that make actors; without any, report this as a defect",
        _left_behind,
    ),
)
