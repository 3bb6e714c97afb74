"""The traits of the awkward server, each by itself: it changes what it names and nothing else."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import numpy as np
import pytest

from carla_digr.errors import UserError
from carla_digr.simulator import blueprints, wire
from carla_digr.simulator.awkward import GROUPS, TRAITS, chosen_traits, episodes
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.frames import advance
from carla_digr.simulator.wire import Rotation, Transform, Vector3D

ORIGIN = Transform()
SETTINGS = wire.EpisodeSettings(synchronous=True, fixed_delta=0.05)
MODEL3, AUDI = "vehicle.tesla.model3", "vehicle.audi.a2"


def make(**sizes: float) -> Episode:
    return episodes(sizes, 0)(1, 0, SETTINGS, 2001)


def spawn(episode: Episode, name: str, place: Transform = ORIGIN, parent: int = 0, **attributes: str) -> Entry:
    types = {a.id: a.type for a in blueprints.BY_ID[name].attributes}
    values = [wire.AttributeValue(key, types[key], value) for key, value in attributes.items()]
    return episode.spawn(wire.ActorDescription(0, name, values), place, parent)


def drive(episode: Episode) -> dict[str, object]:
    """What a client sees of a drive: it spawns, spins, is put elsewhere, rolls, coasts, steers and brakes."""
    points = episode.spawn_points()
    ego = spawn(episode, MODEL3, points[1])
    spawn(episode, AUDI, points[7])  # 50 m ahead, two lanes to the right
    size = {"image_size_x": "64", "image_size_y": "64", "fov": "48.0"}
    mount = Transform(Vector3D(-9.5, 0.0, 4.2), Rotation(-9.0))
    cameras = [spawn(episode, name, mount, ego.id, **size) for name in (blueprints.RGB, blueprints.INSTANCE)]
    seen: dict[str, list] = {
        key: [] for key in ("motion", "stance", "spin", "gear", "limit", "contacts", "film", "ids")
    }

    def frames(count: int, **control: float) -> None:
        episode.control(ego, wire.VehicleControl(**control))
        for _ in range(count):
            list(advance(episode, ()))
            row = episode.world.vehicle(ego.id)
            record = next(r for r in episode.records() if r["id"] == ego.id)
            seen["motion"].append((float(row["x"]), float(row["y"]), float(row["speed"])))
            seen["stance"].append([*record["location"][2:].tolist(), *record["rotation"][[0, 2]].tolist()])
            seen["spin"].append(float(record["angular_velocity"][2]))
            seen["gear"].append(int(record["gear"]))
            seen["limit"].append(float(record["speed_limit"]))
            seen["contacts"] += [(c.other_name, c.impulse) for c in episode.world.collisions]

    frames(45)
    episode.spin(ego, 1.0)
    frames(1)
    episode.put(ego, points[1])
    episode.world.set_target_velocity(ego.id, 0.0, 0.0)
    frames(40)
    seen["film"] += [episode.picture(camera, camera.camera).tobytes() for camera in cameras for _ in range(2)]
    episode.put(ego, points[1])
    episode.world.set_target_velocity(ego.id, 22.0, 0.0)
    frames(80, throttle=0.0855)
    frames(3, throttle=0.0855, steer=0.0164)
    frames(30, brake=0.5)
    seen["ids"].append(ego.id)
    told = {
        "weather": episode.weather,
        "map": (episode.opendrive(), points),
        "physics": tuple(value for value in episode.physics(ego)[:-2]),
        "wheels": [wheel[:-1] for wheel in episode.physics(ego).wheels],
        "blueprints": episode.definitions,
    }
    return {**seen, **told}


CHANGES = {
    "gears": {"motion", "spin", "gear", "physics"},
    "damping": {"motion", "spin"},
    "brakes": {"motion", "wheels"},
    "steering": {"motion", "physics", "wheels", "spin"},
    "settling": {"motion", "stance", "spin", "film"},
    "momentum": {"motion", "spin", "film"},
    "contacts": {"contacts"},
    "limits": {"limit", "blueprints"},
    "town": {"map", "film"},
    "exposure": {"film"},
    "blur": set(),  # of a standing car
    "sight": {"film"},
    "edges": {"film"},
    "weather": {"weather", "film"},
    "ids": {"ids", "film"},
    "slow": set(),
    "deadlock": set(),
}


@pytest.fixture(scope="module")
def ordinary() -> dict[str, object]:
    return drive(Episode(1, 0, SETTINGS, 2001))


@pytest.mark.parametrize("name", [kind.name for kind in TRAITS])
def test_a_trait_changes_what_it_names_and_nothing_else(name, ordinary):
    size = {"slow": 0.0001}.get(name, next(kind.size for kind in TRAITS if kind.name == name))
    awkward = drive(make(**{name: size}))
    assert {key for key in ordinary if awkward[key] != ordinary[key]} == CHANGES[name]


def test_without_traits_it_is_the_ordinary_highway_byte_for_byte():
    def run(episode: Episode) -> list[bytes]:
        spawn(episode, MODEL3, episode.spawn_points()[1])
        spawn(episode, blueprints.HIGHWAY_TRAFFIC, vehicles="20", seed="3")
        camera = spawn(episode, blueprints.RGB, Transform(Vector3D(-9.5, 0.0, 4.2)), 2, image_size_x="64")
        for _ in range(40):
            list(advance(episode, ()))
        return [episode.records().tobytes(), episode.picture(camera, camera.camera).tobytes()]

    assert run(make()) == run(Episode(1, 0, SETTINGS, 2001))


def test_the_same_seed_gives_the_same_drive_with_all_traits_and_another_one_another():
    sizes = {**chosen_traits("carla", ""), "slow": 0.0001, "deadlock": 1e5}
    first, again = (drive(episodes(sizes, 5)(1, 0, SETTINGS, 2001)) for _ in range(2))
    assert first == again
    assert drive(episodes(sizes, 6)(1, 0, SETTINGS, 2001))["contacts"] != first["contacts"]


def test_a_velocity_set_from_outside_dips_unless_it_is_held_with_the_right_gear():
    def lowest(held: int, **control: float) -> float:
        episode = make(gears=16.0)
        ego = spawn(episode, MODEL3, episode.spawn_points()[1])
        speeds = []
        for frame in range(held + 40):
            if frame < held:
                episode.world.set_target_velocity(ego.id, 22.0, 0.0)
            episode.control(ego, wire.VehicleControl(throttle=0.0855, **control))
            list(advance(episode, ()))
            speeds.append(float(episode.world.vehicle(ego.id)["speed"]))
        return min(speeds[held:])

    assert 15.0 < lowest(1) < 19.0
    assert lowest(20, manual_gear_shift=True, gear=3) > 21.7


def test_one_gear_low_damping_and_a_flat_curve_make_the_ordinary_car():
    """What a client that sets the physics of its car gets."""

    def distance(episode: Episode, tamed: bool) -> tuple[float, float]:
        ego = spawn(episode, MODEL3, episode.spawn_points()[1])
        if tamed:
            physics = episode.physics(ego)
            ego.physics = physics._replace(
                forward_gears=[(1.0, 0.0, 1.0)],
                gear_switch_time=0.0,
                moi=0.01,
                damping_full_throttle=0.0,
                damping_clutch_engaged=0.0,
                steering_curve=[(0.0, 1.0)],
                wheels=[w._replace(max_steer_angle=70.0) for w in physics.wheels],
            )
        episode.world.set_target_velocity(ego.id, 22.0, 0.0)
        episode.control(ego, wire.VehicleControl(throttle=0.0855, steer=0.01))
        for _ in range(60):
            list(advance(episode, ()))
        row = episode.world.vehicle(ego.id)
        return float(row["x"]), float(row["y"])

    wanted = distance(Episode(1, 0, SETTINGS, 2001), False)
    car = {"gears": 16.0, "damping": 1.0, "steering": 60.0}
    assert math.dist(distance(make(**car), True), wanted) < 0.3
    assert math.dist(distance(make(**car), False), wanted) > 5.0


def test_slow_frames_and_a_tick_that_does_not_return():
    episode = make(slow=0.02)
    start = time.perf_counter()
    for _ in range(10):
        list(advance(episode, ()))
    assert time.perf_counter() - start > 0.1
    stuck = make(deadlock=100.0)
    taken = [stuck.takes_tick(7) for _ in range(300)]
    first = taken.index(False)
    assert 50 < first < 150
    assert not any(taken[first:]), "that client's ticks are lost for good"
    assert stuck.takes_tick(8), "another client's are not"


def test_the_town_has_slopes_of_six_per_cent_bends_and_a_way_back():
    episode = make(town=6.0)
    road = episode.world.road
    s = np.arange(0.0, road.length, 5.0)
    heights, slopes = np.array([episode.ground(float(x), 0.0) for x in s]).T
    assert np.max(np.abs(slopes)) == pytest.approx(0.06, abs=0.003)
    assert np.allclose(np.diff(heights), 5.0 * 0.5 * (slopes[1:] + slopes[:-1]), atol=0.02)
    assert heights[-1] == pytest.approx(0.0, abs=0.2)
    radii = 1.0 / np.abs(road.pieces[road.pieces[:, 5] != 0.0, 5])
    assert radii.min() == pytest.approx(54.0) and radii.max() == pytest.approx(860.0)


def test_traits_are_chosen_by_name_group_and_size():
    assert chosen_traits("carla", "") == {kind.name: kind.size for kind in TRAITS}
    assert chosen_traits(None, "slow=0.2, start") == {"slow": 0.2, "settling": 1.0, "momentum": 0.5, "contacts": 10.0}
    assert not chosen_traits("carla", "-car,-start,-traffic,-road,-camera,-server")
    assert set(GROUPS) == {"car", "start", "traffic", "road", "camera", "server"}


@pytest.mark.parametrize("text", ["wings", "car=2", "-slow=1"])
def test_unknown_traits_are_named_with_those_there_are(text):
    with pytest.raises(UserError, match=rf"There is no trait '{text}'; choose from .*gears.*groups car"):
        chosen_traits(None, text)


@pytest.mark.parametrize("text", ["slow=0", "slow=nan", "slow=quick", "slow=1e9"])
def test_sizes_that_are_no_positive_number_are_refused(text):
    with pytest.raises(UserError, match="size of the trait slow must be a positive number"):
        chosen_traits(None, text)


def test_the_page_has_every_trait_with_its_size_and_source():
    page = (Path(__file__).parents[2] / "docs" / "carla_server.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .*? \| ([\d.]+) .*\| (.*?) \|$", page, re.M)
    assert [(name, group, float(size), source) for name, group, size, source in rows] == [
        (kind.name, kind.group, kind.size, kind.source) for kind in TRAITS
    ]
