"""What `check-simulator` asks a server, a function a line, and the table of the lines.

What is measured is the server as it is, before anything the drive does about it; probes.py measures, here is judged.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import carla
import numpy as np

from carla_digr.driving import probes
from carla_digr.driving.car_probe import CAR, judged_car, tamed_car
from carla_digr.driving.control import CAMERA, CRUISE_SPEED, EGO_BLUEPRINT, IMAGE_SIZE, TICK, WHEEL_ANGLE
from carla_digr.driving.highway import REACH, highway_points, identity
from carla_digr.driving.scenario import WARM_UP_TICKS, Scenario
from carla_digr.driving.session import VERSION, SensorStream, Session
from carla_digr.driving.traffic import HIGHWAY_TRAFFIC
from carla_digr.driving.training_probe import judged, training
from carla_digr.errors import UserError

BLUEPRINTS = (EGO_BLUEPRINT, "sensor.camera.rgb", "sensor.other.collision")
TRAFFIC = 20  # vehicles of the trial drive
DRIVE_TICKS = 100
SLOWEST_TRAFFIC, LEAST_LIMIT = 10.0, 40.0  # m/s and km/h
PEDALS = {
    "throttle_0.2": 0.6,
    "throttle_0.5": 1.8,
    "throttle_1": 3.8,
    "coast": -0.3,
    "brake_0.25": -2.3,
    "brake_0.5": -4.3,
    "brake_1": -8.3,
}
"""m/s2 that the driving task's numbers mean."""
FULL_SECONDS = 420.0  # after which what is left is measured as quickly as without `--full`
MOST_GREY = 20.0  # of 255, mean over the picture: other vehicles may be elsewhere
MOST_GROWTH = 100.0  # MiB of this client over the resets
LAST_ID = 2**16  # from which on ids do not fit an instance picture


class Visit:
    """What the checks share: the session, then the drive, of which there is only one at a time."""

    def __init__(self, host: str, port: int, timeout: float, simulator: str, full: bool):
        self.host, self.port, self.timeout, self.simulator = host, port, timeout, simulator
        self.until = time.monotonic() + FULL_SECONDS if full else 0.0
        self.figures: dict[str, Any] = {}
        """What was measured, for the report."""
        self.found: tuple[bool, list[str]] = False, []
        """The world before: whether it was synchronous, and its actors."""
        self.before = 0, 0.0
        """Actors, and MiB of this client, after the first start."""
        self.session: Session | None = None
        self.bench: probes.Bench | None = None
        self.drive: Scenario | None = None

    @property
    def full(self) -> bool:
        """Whether to measure long: it is asked for, and there is time left for it."""
        return time.monotonic() < self.until

    def own(self) -> Session:
        """The session, which the first check has opened."""
        assert self.session is not None
        return self.session

    def car(self) -> probes.Bench:
        """The bench, made for the first check that needs it."""
        if self.bench is None:
            session = self.own()
            self.bench = probes.Bench(session, highway_points(session.map))
            self.figures["physics"] = probes.physics_dump(self.bench.physics)
        return self.bench

    def note(self, name: str, figures: probes.Figures) -> probes.Figures:
        """Keep figures for the report."""
        self.figures[name] = figures
        return figures

    def leave(self) -> None:
        """Let the simulator go."""
        for owner in (self.drive, self.session):
            if owner is not None:
                owner.close()


def _connect(visit: Visit) -> tuple[bool, str]:
    visit.session = session = Session.connect(visit.host, visit.port, visit.timeout)
    visit.found = session.found_synchronous, _actors(session.world)
    embedded = bool(session.blueprints.filter(HIGHWAY_TRAFFIC))
    visit.simulator = visit.simulator or ("embedded" if embedded else "carla")
    kind = "carla_digr's embedded highway, not CARLA" if embedded else "a CARLA server"
    visit.figures |= {"kind": visit.simulator, "map": "{} ({})".format(*identity(session.map))}
    return True, f"{session.client.get_server_version()}, {kind}, map {session.map.name}"


def _blueprints(visit: Visit) -> tuple[bool, str]:
    missing = [name for name in BLUEPRINTS if not visit.own().blueprints.filter(name)]
    return not missing, f"no {', '.join(missing)}" if missing else "all of them"


def _highway(visit: Visit) -> tuple[bool, str]:
    road_map = visit.own().map
    points = highway_points(road_map)
    return True, f"{len(points)} of {len(road_map.get_spawn_points())} spawn points"


def _reach(visit: Visit) -> tuple[bool, str]:
    reaches = visit.car().reaches
    visit.note("reach", {"starts": [reach._asdict() for reach in reaches]})
    short = [reach for reach in reaches if reach.metres < REACH]
    metres = sorted(reach.metres for reach in reaches)
    seen = f"{len(reaches) - len(short)} of {len(reaches)} starts, the others from {metres[0]:.0f} m on"
    if short:
        seen += f" (first {min(short).until})"
    steepest = max(reach.slope for reach in reaches)
    return not short, f"{seen}, longest {metres[-1]:.0f} m, slopes up to {100 * steepest:.0f} %"


def _weather(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("weather", probes.weather(visit.own()))
    good = seen["sun"] >= 20.0 and seen["cloudiness"] <= 60.0
    good = good and max(seen["precipitation"], seen["fog"], seen["wetness"]) <= 20.0
    return good, ", ".join(f"{name} {value:.0f}" for name, value in seen.items())


def _ticks(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("ticks", probes.ticks(visit.own(), 1000 if visit.full else 60))
    good = seen["step_error"] < 1e-4 and seen["rate"] >= 1.0 / TICK
    return good, (
        f"{seen['step']:.4f} s a frame, {seen['rate']:.0f} frames a second, half within {seen['p50_ms']:.0f} ms "
        f"and 99 % within {seen['p99_ms']:.0f} ms"
    )


def _ids(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("ids", {"newest": visit.car().car.id})
    left = LAST_ID - seen["newest"]
    return left > LAST_ID // 8, f"id {seen['newest']}, {max(left, 0)} left"


def _camera(visit: Visit) -> tuple[bool, str]:
    session = visit.own()
    if not session.found_rendered:
        return False, "a world that was not rendered (no_rendering_mode); it is for the lines below"
    car = visit.car().car
    size = {"image_size_x": IMAGE_SIZE, "image_size_y": IMAGE_SIZE, "fov": CAMERA["fov"]}
    place = carla.Transform(
        carla.Location(CAMERA["x"], CAMERA["y"], CAMERA["z"]), carla.Rotation(pitch=CAMERA["pitch"])
    )
    stream = SensorStream(session, session.spawn(session.blueprint("sensor.camera.rgb", **size), place, car))
    for _ in range(WARM_UP_TICKS):
        if stream.poll(session.tick().frame, visit.timeout / WARM_UP_TICKS) is not None:
            break
    away = 0.0
    for _ in range(20):
        snapshot = session.tick()
        picture = stream.take(snapshot.frame)
        ego = snapshot.find(car.id)
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


def _pictures(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("pictures", probes.memory_of_pictures(visit.car(), 60 if visit.full else 40))
    off = seen["off"]
    told = ", ".join(f"{off[k]:.1f}" for k in off)
    return off[probes.PICTURES[0]] < 3.0 and off[probes.PICTURES[1]] < 3.0, f"{told} of 255 grey levels"


def _sight(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("sight", probes.sight(visit.car()))
    pixels = seen["pixels"]
    return min(pixels.values()) >= 3, ", ".join(f"{n} pixels at {metres:.0f} m" for metres, n in pixels.items())


def _instances(visit: Visit) -> tuple[bool, str]:
    strange = visit.figures["sight"]["strange"]
    return strange < 0.1, f"{100 * strange:.0f} %"


def _settling(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("settling", probes.settling(visit.car(), 10 if visit.full else 4))
    good = seen["ticks"] <= 2 and seen["settled"] == seen["starts"]
    told = f"still after {seen['ticks']} frames" if seen["settled"] == seen["starts"] else "never still"
    return good, f"{told} at the worst of {seen['starts']} starts, {seen['fall']:.2f} m below where it was put"


def _spin(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("spin", probes.spin(visit.car()))
    return seen["yaw_rate"] < 5.0 and seen["speed"] < 1.0, f"{seen['yaw_rate']:.0f} degrees/s, {seen['speed']:.1f} m/s"


def _rolling_start(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("rolling start", probes.rolling_start(visit.car()))
    first, last = seen["speeds"][0], seen["speeds"][-1]
    good = seen["dip"] < 1.0 and abs(first - CRUISE_SPEED) < 2.0
    return good, f"{first:.1f} m/s at first, {min(seen['speeds']):.1f} at the least, {last:.1f} after 3 s"


def _cruise(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("cruise", probes.cruise(visit.car(), 20.0 if visit.full else 4.0))
    good = abs(seen["error"]) < 0.3 and seen["spread"] < 0.5
    return good, f"{seen['error']:+.2f} m/s, spread {seen['spread']:.2f}, held by throttle {seen['throttle']:.2f}"


def _pedals(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("pedals", probes.accelerations(visit.car()))
    good = all(abs(seen[name] - wanted) < max(1.5, 0.25 * abs(wanted)) for name, wanted in PEDALS.items())
    return good, ", ".join(f"{name.replace('_', ' ')} {seen[name]:+.1f}" for name in PEDALS)


def _steering(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("steering", probes.steering(visit.car()))
    good = all(abs(part - 1.0) < 0.1 for part in seen["parts"].values())
    parts = ", ".join(f"{100 * part:.0f} % at {speed:.0f} m/s" for speed, part in seen["parts"].items())
    return good, f"{parts}; it tells a lock of {seen['lock']:.0f} degrees"


def _keeping(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("keeping", probes.keeping(visit.car(), 60.0 if visit.full else 4.0))
    return seen["offset"] < 0.5, f"{seen['offset']:.2f} m off it at the most in {seen['driven']:.0f} m"


def _contacts(visit: Visit) -> tuple[bool, str]:
    seen = visit.note("contacts", probes.contacts(visit.car(), 20.0 if visit.full else 2.0))
    told = ", ".join(f"{count} of {name}" for name, count in seen["kinds"].items())
    return not told, f"{told}, up to {seen['largest']:.0f} N s" if told else "none"


def _car(visit: Visit) -> tuple[bool, str]:
    return judged_car(visit.note("car", tamed_car(visit.car())))


def _drive(visit: Visit) -> tuple[bool, str]:
    visit.own().close()
    visit.drive = drive = Scenario.connect(visit.simulator, visit.host, visit.port, visit.timeout, vehicles=TRAFFIC)
    drive.reset(1)
    visit.before = _actors_and_memory(drive)
    distance, wall = 0.0, []
    for _ in range(DRIVE_TICKS):
        start = time.perf_counter()
        distance += TICK * probes.steer_on(drive).speed
        wall.append(1000.0 * (time.perf_counter() - start))
    rate = 1000.0 / float(np.mean(wall))
    slowest = {"p50_ms": float(np.median(wall)), "p99_ms": float(np.quantile(wall, 0.99))}
    visit.note("drive", {"distance": distance, "rate": rate, **slowest})
    return distance > 40.0, f"{distance:.0f} m, {rate:.0f} frames a second with pictures"


def _traffic(visit: Visit) -> tuple[bool, str]:
    drive = visit.drive
    assert drive is not None
    times = (5.0, 10.0, 20.0, 60.0) if visit.full else (5.0, 10.0)  # s from the start of the trial drive
    seen = visit.note("traffic", {"wanted": TRAFFIC, **probes.traffic(drive, times)})
    others, limits, gap = list(seen["speeds"].values())[-1], seen["limits"], seen["smallest_gap"]
    slow = float(np.quantile(others, 0.25)) if others else 0.0
    good = len(others) >= 0.9 * TRAFFIC and slow >= SLOWEST_TRAFFIC and max(others) <= CRUISE_SPEED + 3.0
    good = good and limits[0] >= LEAST_LIMIT and gap > 0.0 and not seen["touching"]
    return good, (
        f"{len(others)} vehicles, a quarter of them below {slow:.1f} m/s, none above {max(others, default=0.0):.1f}, "
        f"limits {', '.join(map(str, limits))} km/h, the smallest gap in a lane {gap:.0f} m, {seen['lane_changes']} "
        f"lane changes, {seen['touching']} pairs that touched"
    )


def _repeats(visit: Visit) -> tuple[bool, str]:
    assert visit.drive is not None
    seen = visit.note("repetition", probes.repetition(visit.drive, 2, 100 if visit.full else 20))
    apart, grey = seen["apart"], seen["grey"]
    return apart[0] < 0.5 and grey[0] < MOST_GREY, (
        f"{apart[0]:.2f} m between the two, pictures {grey[0]:.1f} of 255 grey levels apart; after {len(apart)} frames "
        f"{apart[-1]:.2f} m and {grey[-1]:.1f}"
    )


def _resets(visit: Visit) -> tuple[bool, str]:
    drive = visit.drive
    assert drive is not None
    again, start = 18 if visit.full else 1, time.perf_counter()
    for seed in range(again):
        drive.reset(seed)
    seconds, count = (time.perf_counter() - start) / again, again + 2  # those of the line before
    now = _actors_and_memory(drive)
    more, memory = now[0] - visit.before[0], now[1] - visit.before[1]
    visit.note("resets", {"count": count, "more_actors": more, "seconds": seconds, "more_mib": memory})
    seen = f"{more:+d} actors and {memory:+.0f} MiB in this client after {count} resets of {seconds:.1f} s each"
    return more <= TRAFFIC // 10 and memory < MOST_GROWTH, seen


def _actors_and_memory(drive: Scenario) -> tuple[int, float]:
    return len(drive.session.world.get_actors()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _training(visit: Visit) -> tuple[bool, str]:
    assert visit.drive is not None
    return judged(visit.note("training", training(visit.drive)))


def _left_behind(visit: Visit) -> tuple[bool, str]:
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
    attempt: Callable[[Visit], tuple[bool, str]]
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
        "reach",
        f"{REACH:.0f} m of highway ahead of every start, without junctions and bends too tight",
        "nothing where the longest reach is far enough: the drive starts where it is at least half as long and ends an "
        "episode where the stretch does; else load Town04, or give roads or spawn_points (--out lists the reaches)",
        _reach,
    ),
    Check(
        "weather",
        "a dry day",
        "set the weather that the policy knows before the drive (PythonAPI/util/environment.py --weather ClearNoon); "
        "another client has left this one",
        _weather,
    ),
    Check(
        "ticks",
        f"{TICK:g} s of simulation a frame, at least {1 / TICK:.0f} frames a second",
        "start the server with -RenderOffScreen, give it a GPU of its own, or lower the number of vehicles; keep the "
        "quality Epic, as Low draws 50 m only; where the step differs, stop other clients that change the world's "
        "settings; where no answer comes, start the server again",
        _ticks,
    ),
    Check(
        "ids",
        "ids of actors that fit the two bytes of an instance picture for thousands more",
        "start the server again before ids pass 65535, or match them modulo 65536",
        _ids,
    ),
    Check(
        "camera",
        f"a {IMAGE_SIZE}x{IMAGE_SIZE} picture of every frame from its place behind the ego",
        "turn rendering on (no -nullrhi, no_rendering_mode off), check that the port after --port is reachable too, "
        "and stop other clients that destroy actors",
        _camera,
    ),
    Check(
        "pictures",
        "the first picture after a change of place like the later ones: within 3 grey levels in frames "
        f"{', '.join(map(str, probes.PICTURES))}",
        "set the camera's exposure_mode to manual and its motion_blur_intensity to 0, or let 40 frames pass after a "
        "reset",
        _pictures,
    ),
    Check(
        "sight",
        "a car at 15, 30, 60 and 100 m to be drawn",
        "start the server with -quality-level=Epic: Low draws 50 m only",
        _sight,
    ),
    Check(
        "instances",
        "at most 10 % of the pixels around a car with a label of nothing that is there",
        "take no label from the edges of an instance picture: drop those that hardly occur",
        _instances,
    ),
    Check(
        "settling",
        "a car that stands where it is put within 2 frames",
        "let a car that was put somewhere settle before the first frame counts, and put it just above the road",
        _settling,
    ),
    Check(
        "teleport",
        "a car at rest after a teleport out of a spin at 10 m/s",
        "set both velocities to zero before and after a teleport",
        _spin,
    ),
    Check(
        "rolling start",
        f"{CRUISE_SPEED:g} m/s kept within 1 m/s when it is set once",
        "hold the velocity and the right gear by hand for a second, or give the car one gear (apply_physics_control)",
        _rolling_start,
    ),
    Check(
        "cruise",
        f"{CRUISE_SPEED:g} m/s held within 0.3 m/s",
        "lower the damping rates (apply_physics_control), or add an integral term to the cruise control",
        _cruise,
    ),
    Check(
        "pedals",
        ", ".join(f"{name.replace('_', ' ')} {wanted:+.1f}" for name, wanted in PEDALS.items())
        + " m/s2 within 1.5 m/s2 or a quarter",
        f"use CARLA {VERSION}'s own {EGO_BLUEPRINT}; raise max_brake_torque and the torque curve where they are weaker "
        "(apply_physics_control)",
        _pedals,
    ),
    Check(
        "steering",
        f"the yaw rate of wheels at {WHEEL_ANGLE:g} rad within 10 %",
        "divide the steer by the steering curve and by the wheels' lock over 70 degrees, or set a flat curve "
        "(apply_physics_control)",
        _steering,
    ),
    Check(
        "keeping",
        f"a lane kept within 0.5 m with wheels at {WHEEL_ANGLE:g} rad to either side and straight",
        "see steering and reach; else choose a road with wider bends, or a policy with finer wheel angles",
        _keeping,
    ),
    Check(
        "contacts",
        "no contact of a car that keeps its lane on a free road",
        "ignore contacts with road and pavement, and those of a car that settles",
        _contacts,
    ),
    Check(
        "car",
        CAR,
        "see rolling start, cruise, pedals and steering: a policy from elsewhere drives another car here than its own",
        _car,
    ),
    Check(
        "drive",
        f"{DRIVE_TICKS} frames with a picture each, and 40 m driven",
        "choose other spawn points in configs/live.yaml, or use a faster machine",
        _drive,
    ),
    Check(
        "traffic",
        f"{TRAFFIC} vehicles, three quarters of them faster than {SLOWEST_TRAFFIC:g} m/s after 10 s, none much faster "
        f"than {CRUISE_SPEED:g}, none touching another, and a limit of {LEAST_LIMIT:g} km/h or more for each",
        "where only the limits are low, nothing: vehicles have 30 km/h until their first sign, the drive gives each a "
        "speed of its own; else ask for fewer vehicles or choose other spawn points",
        _traffic,
    ),
    Check(
        "repetition",
        f"the same start again from the same seed, its picture within {MOST_GREY:g} grey levels",
        "stop other clients that move actors or change the weather",
        _repeats,
    ),
    Check(
        "resets",
        "as many actors after several resets as after the first, but for a tenth of the traffic, and as much memory",
        "stop other clients that make actors; without any, report this as a defect",
        _resets,
    ),
    Check(
        "training",
        "labels of every frame, a box of every vehicle, and the edges of the lanes",
        f"use the unmodified packages of CARLA {VERSION}; without labels train with supervision: perturbation",
        _training,
    ),
    Check(
        "leaving",
        "the world as it was found",
        "stop other clients that make actors; without any, report this as a defect",
        _left_behind,
    ),
)
