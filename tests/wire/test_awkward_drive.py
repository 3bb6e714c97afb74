"""The drive over the protocol holds on a server that is as awkward as a real one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
from simulator_process import Simulator, run_client

from carla_digr.driving.checks import LAST_ID
from carla_digr.driving.control import CRUISE_SPEED
from carla_digr.driving.rollouts import RolloutConfig, drive_episodes
from carla_digr.driving.traffic import BEHIND

pytestmark = pytest.mark.timeout(3600)  # with --long, 200 starts are one fixture

STARTS = """
    import json
    from carla_digr.driving.control import CRUISE_SPEED, VehicleCommand
    from carla_digr.driving.keeper import lane_offset, lane_steer
    from carla_digr.driving.scenario import Scenario
    from carla_digr.driving.scripted import ScriptedDriver

    def vehicles(scenario):
        return list(scenario.session.world.get_actors().filter("vehicle.*"))

    def resident(process):
        return int(open(f"/proc/{process}/statm").read().split()[1]) * 4096

    def drive(scenario, seed):
        frame = scenario.reset(seed)
        seen = {"first": frame.speed, "collision": frame.collision, "speeds": [], "offsets": []}
        seen["others"] = scenario.others()
        for _ in range(40):
            place = scenario.ego.get_transform()
            steer = lane_steer(scenario.session.map, place, frame.speed)
            frame = scenario.step(VehicleCommand(steer=steer, target_speed=CRUISE_SPEED))
            seen["collision"] = seen["collision"] or frame.collision
            seen["speeds"].append(frame.speed)
            seen["offsets"].append(lane_offset(scenario.session.map, scenario.ego.get_transform()))
        seen["weather"] = scenario.session.world.get_weather().sun_altitude_angle
        actors = [actor.id for actor in scenario.session.world.get_actors()]
        seen["actors"], seen["newest"] = len(actors), max(actors)
        seen["memory"] = [resident("self"), resident(SERVER)]
        print(json.dumps(seen), flush=True)

    with Scenario.connect("carla", "127.0.0.1", PORT, 20.0, vehicles=20, surroundings=True) as scenario:
        for seed in range(RESETS):
            drive(scenario, seed)
        shown = []
        driver, first = ScriptedDriver(), {v.id for v in vehicles(scenario)}
        for _ in range(300):
            frame = scenario.step(driver.command(scenario))
            if (around := scenario.surroundings()) and around.vehicles:
                actors = {actor.id for actor in vehicles(scenario)}
                shown.append([vehicle in actors for vehicle in around.vehicles])
        here, now = scenario.ego.get_transform(), [v for v in vehicles(scenario) if v.id != scenario.ego.id]
        forward = here.get_forward_vector()
        print(json.dumps({
            "shown": shown,
            "new": len({v.id for v in now} - first),
            "ahead": [(v.get_location() - here.location).dot(forward) for v in now],
        }))
"""
AFTERWARDS = """
    import carla, json
    client = carla.Client("127.0.0.1", PORT)
    client.set_timeout(20.0)
    world = client.get_world()
    world.wait_for_tick(20.0)
    actors = [actor.type_id for actor in world.get_actors()]
    print(json.dumps([actors, world.get_weather().sun_altitude_angle]))
"""


def said(program: str, simulator: Simulator, resets: int = 1, told: list[str] | None = None) -> list:
    """What a client prints; ``told`` gets what it warns of."""
    program = program.replace("RESETS", str(resets)).replace("SERVER", str(simulator.process.pid))
    client = run_client(program, simulator)
    out, errors = client.communicate(timeout=300 + 30 * resets)
    assert client.returncode == 0, errors
    if told is not None:
        told.append(errors)
    return [json.loads(line) for line in out.splitlines() if line[:1] in "[{"]


@pytest.fixture(scope="module")
def resets(long: bool) -> int:
    return 200 if long else 4


@pytest.fixture(scope="module")
def awkward(resets: int) -> Iterator[Simulator]:
    """All traits but those of time, which no start can help; ids wrap half way."""
    first_id = LAST_ID - 15 * resets  # a start takes 20 to 45
    simulator = Simulator(options=["--like", "carla", f"--traits=-slow,-deadlock,ids={first_id}", "--seed", "2"])
    yield simulator
    simulator.stop()


@pytest.fixture(scope="module")
def drives(awkward: Simulator, resets: int) -> list[dict]:
    return said(STARTS, awkward, resets)


@pytest.fixture(scope="module")
def starts(drives: list[dict]) -> list[dict]:
    """All but what was seen after the last one."""
    return drives[:-1]


def test_every_start_rolls_at_the_cruise_speed_and_goes_on(starts, resets):
    assert len(starts) == resets
    for start in starts:
        assert abs(start["first"] - CRUISE_SPEED) < 0.5
        assert max(abs(speed - CRUISE_SPEED) for speed in start["speeds"]) < 0.5


def test_it_keeps_its_lane_and_touches_nothing(starts):
    for start in starts:
        assert start["collision"] is None
        assert max(start["offsets"]) < 0.5


def test_where_no_gap_comes_one_is_made(awkward):
    """Where more room is asked for than there is: none is struck; all that is not good enough at the start is told."""
    more = "\n    from carla_digr.driving import start\n    start.GAP = 400.0, 200.0\n"
    more += "    start.ROLLING, start.ON_LANE, start.STILL = 100.0, -1.0, (0.005, -1.0)\n"
    program = more + STARTS.replace("vehicles=20", "vehicles=100").replace("range(300)", "range(0)")
    start, _ = said(program, awkward, told=(told := []))
    assert len(start["others"]) > 20
    assert start["collision"] is None and abs(start["first"] - CRUISE_SPEED) < 0.5
    assert "no gap of 400 m at the start in 12 s" in told[0]
    assert "The start of seed 0: the ego still rocks" in told[0]
    assert re.search(r"The start of seed 0: (\d+) of \1 other vehicles stand still", told[0])
    beside, above = re.search(r"the ego is (.*) m beside its lane and (.*) m above it", told[0]).groups()
    assert float(beside) < 0.3 and abs(float(above)) < 0.3


def test_traffic_rolls_when_the_ego_comes(starts):
    for start in starts:
        assert len(start["others"]) >= 15
        rolling = sorted(start["others"])[len(start["others"]) // 4 :]
        assert min(rolling) > 5.0


def test_traffic_stays_around_the_ego_while_it_drives_on(drives):
    """Who is passed is removed, and others come onto the road ahead."""
    ahead = np.array(drives[-1]["ahead"])
    assert len(ahead) >= 15
    assert drives[-1]["new"] >= 3
    assert ahead.min() > -BEHIND - 30.0 and np.count_nonzero(ahead > 0.0) >= 8


def test_ids_wrap_and_what_the_camera_shows_is_still_known(starts, drives):
    """An instance picture has 16 bits of an id."""
    assert starts[0]["newest"] < LAST_ID < starts[-1]["newest"]
    assert drives[-1]["shown"], "no picture after the wrap shows a vehicle"
    assert all(all(shown) for shown in drives[-1]["shown"])


def test_resets_leave_nothing_behind_and_memory_flat(starts):
    """The second half of the starts takes no more memory than the first, in client and server."""
    memory = np.array([start["memory"] for start in starts]) / 2**20
    growth = memory[-1] - memory[len(memory) // 2]
    print(
        len(starts),
        "starts, MiB of client and server at first, half way, at last:",
        memory[[0, len(memory) // 2, -1]].tolist(),
    )
    assert (growth < 0.1 * len(starts) + 8.0).all(), memory[:: max(len(starts) // 10, 1)].tolist()
    assert max(start["actors"] for start in starts) <= 20 + len(("spectator", "ego", "contacts", "camera", "labels"))


def test_it_drives_by_day_and_leaves_weather_and_world_as_they_were(starts, awkward):
    assert {start["weather"] for start in starts} == {45.0}
    [[actors, sun]] = said(AFTERWARDS, awkward)
    assert actors == ["spectator"]
    assert sun == -10.0


def test_the_scripted_driver_keeps_clean_to_the_end_of_its_stretch(awkward):
    """Over the protocol, in a process of its own; it goes round slower vehicles."""
    where = (f"127.0.0.1:{awkward.port}",)
    config = RolloutConfig(where, kind="carla", vehicles=20, episodes=3, episode_seconds=60.0, seed=1, timeout=20.0)
    episodes = drive_episodes(config, None)
    for episode in episodes:
        assert episode["clean"], episode
        assert episode["mean_speed"] > 15.0
        assert episode["distance"] > 400.0
    assert min(episode["seconds"] for episode in episodes) < 59.0, "none met the end of its stretch"


BLAME_AND_FILM = """
    import carla, json
    from carla_digr.driving.control import VehicleCommand
    from carla_digr.driving.scenario import Scenario

    def crash(drive, ego_speed, other_speed, metres):
        drive.reset(0)
        there = drive.session.map.get_waypoint(drive.ego.get_location())
        there = (there.next(metres) if metres > 0.0 else there.previous(-metres))[0].transform
        there.location.z += 0.1
        other = drive.session.spawn(drive.session.blueprint("vehicle.audi.a2"), there)
        forward = there.get_forward_vector()
        for _ in range(80):
            for car, speed in ((drive.ego, ego_speed), (other, other_speed)):
                car.set_target_velocity(carla.Vector3D(speed * forward.x, speed * forward.y, 0.0))
            frame = drive.step(VehicleCommand(0.0, target_speed=ego_speed))
            if frame.collision:
                break
        drive.session.destroy(other)
        drive.session.tick()
        return [frame.collision, frame.struck]

    with Scenario.connect("carla", "127.0.0.1", PORT, 20.0, vehicles=0) as drive:
        first = drive.reset(3)
        crashes = [crash(drive, 12.0, 0.0, 25.0), crash(drive, 0.0, 12.0, -25.0)]
        drive.reset(5)
        drive.change_weather("ClearNight")
        for _ in range(20):
            drive.step(VehicleCommand(0.0, target_speed=22.0))
        drive.change_weather("ClearNoon")
        again = drive.reset(3)
        apart = abs(first.image.astype(int) - again.image).mean()
        print(json.dumps([*crashes, [again.x - first.x, again.y - first.y], float(apart)]))
"""


def test_who_struck_whom_is_told_and_no_picture_remembers_the_episode_before(awkward):
    [[into_it, from_behind, moved, apart]] = said(BLAME_AND_FILM, awkward)
    assert into_it == ["vehicle.audi.a2", False], "the ego drove into a car that stood"
    assert from_behind == ["vehicle.audi.a2", True], "a car drove into the ego, which stood"
    assert max(map(abs, moved)) < 0.05
    assert apart < 0.005, "of 255 grey levels, after a crash and a night; 0.009 with the film of a CARLA camera"


OVERTAKING = """
    import json
    from carla_digr.driving.scenario import Scenario
    from carla_digr.driving.scripted import ScriptedDriver

    class Follower(ScriptedDriver):
        def _better(self, *_):
            return None

    with Scenario.connect("carla", "127.0.0.1", PORT, 20.0, vehicles=20) as drive:
        for driver in (ScriptedDriver(), Follower()):
            speeds, incidents = [], 0
            for seed in range(RESETS):
                drive.reset(seed)
                driver.reset()
                for _ in range(1000):
                    frame = drive.step(driver.command(drive))
                    speeds.append(frame.speed)
                    incidents += frame.off_road or frame.collision is not None
                    if frame.road_ends or frame.collision is not None:
                        break
            print(json.dumps({"speed": sum(speeds) / len(speeds), "incidents": incidents}))
"""


@pytest.mark.long
def test_overtaking_is_worth_while(awkward):
    passing, following = said(OVERTAKING, awkward, 8)
    print(passing, following)
    assert passing["speed"] > following["speed"] + 1.0


CARELESS = """
    import carla

    class Careless(Scenario):
        def _start(self, car, point, seed):
            self._car = None
            self._ego.set_transform(point)
            self._ego.set_target_velocity(carla.Vector3D(CRUISE_SPEED, 0.0, 0.0))
            self._traffic.fill(seed, self._ego, point.location)
            self._first_frame = self._session.frame + 1

"""


def test_a_start_as_on_the_embedded_highway_would_dip(awkward):
    program = STARTS.replace("    with Scenario", f"{CARELESS}    with Careless")
    start, _ = said(program, awkward)
    assert min(start["speeds"]) < CRUISE_SPEED - 1.0
