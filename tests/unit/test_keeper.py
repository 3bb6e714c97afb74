"""The scripted steers keep a car in its lane through an S-bend; how far off it is is told right."""

from __future__ import annotations

import math
from types import SimpleNamespace

import carla
import numpy as np
import pytest

from carla_digr.driving import keeper, scripted
from carla_digr.driving.control import CRUISE_SPEED, EGO_WHEELBASE, MAX_WHEEL_ANGLE, TICK
from carla_digr.driving.highway import reach
from carla_digr.driving.scenario import RUN_OUT
from carla_digr.simulator import wire
from carla_digr.simulator.awkward import episodes

SETTINGS = wire.EpisodeSettings(synchronous=True, fixed_delta=0.05)
BEFORE_THE_BENDS = 2, -5, 50.0  # road, its outermost lane, m: 350 m on, radii of 180 m right and 147 m left


@pytest.fixture(scope="module")
def town() -> carla.Map:
    episode = episodes({"town": 6.0}, 0)(1, 0, SETTINGS, 2001)
    return carla.Map("town", episode.opendrive())


class Bicycle:
    """A car without slip or delay."""

    def __init__(self, place: carla.Transform):
        self.x, self.y, self.yaw = place.location.x, place.location.y, math.radians(place.rotation.yaw)

    @property
    def place(self) -> carla.Transform:
        return carla.Transform(carla.Location(self.x, self.y, 0.0), carla.Rotation(yaw=math.degrees(self.yaw)))

    def drive(self, steer: float, speed: float = CRUISE_SPEED) -> None:
        wheels = steer * MAX_WHEEL_ANGLE
        slip = math.atan(0.5 * math.tan(wheels))
        self.x += speed * TICK * math.cos(self.yaw + slip)
        self.y += speed * TICK * math.sin(self.yaw + slip)
        self.yaw += speed * TICK * math.cos(slip) * math.tan(wheels) / EGO_WHEELBASE


def vehicle(number: int, place: carla.Transform, speed: float) -> SimpleNamespace:
    """What a client sees of one."""
    forward = place.get_forward_vector()
    return SimpleNamespace(
        id=number,
        get_transform=lambda: place,
        get_location=lambda: place.location,
        get_velocity=lambda: carla.Vector3D(speed * forward.x, speed * forward.y, 0.0),
    )


@pytest.mark.parametrize("driver", ["keeper", "scripted"])
def test_it_keeps_to_its_lane_in_bends_of_either_side(town, driver):
    lane = town.get_waypoint_xodr(*BEFORE_THE_BENDS)
    car, offsets = Bicycle(lane.transform), []
    for _ in range(440):
        lane = scripted._along(lane, car.place.location)
        car.drive(
            keeper.lane_steer(town, car.place, CRUISE_SPEED)
            if driver == "keeper"
            else scripted._steer(lane, car.place, CRUISE_SPEED)
        )
        offsets.append(keeper.lane_offset(town, car.place))
    assert town.get_waypoint(car.place.location).road_id == 4, "it is in the last of them"
    assert max(offsets) < 0.35


def test_an_offset_is_that_across_the_lane_wherever_along_it(town):
    lane = town.get_waypoint_xodr(*BEFORE_THE_BENDS)
    for along in np.linspace(0.0, 400.0, 333):
        place = lane.next(float(along) + 0.01)[0].transform
        right = place.get_right_vector()
        beside = place.location + carla.Location(0.3 * right.x, 0.3 * right.y)
        assert keeper.lane_offset(town, carla.Transform(beside, place.rotation)) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("start", "seconds", "changes"), [((2, -4, 50.0), 2.0, 0), ((2, -4, 50.0), 9.0, 1), ((3, -4, 110.0), 9.0, 0)]
)
def test_it_changes_lanes_neither_at_a_start_nor_where_its_stretch_would_end_before_it_is_over(
    town, start, seconds, changes
):
    """Behind a slow vehicle; one that began a change there was cut in the middle of it, 0.7 m off its lane."""
    lane = town.get_waypoint_xodr(*start)
    slow = lane.next(60.0)[0]
    car, driver, speed, offsets, lanes = Bicycle(lane.transform), scripted.ScriptedDriver(), CRUISE_SPEED, [], set()
    for _ in range(round(seconds / TICK)):
        vehicles = [vehicle(1, car.place, speed), vehicle(2, slow.transform, 12.0)]
        actors = SimpleNamespace(filter=lambda _, seen=vehicles: seen)
        world = SimpleNamespace(get_actors=lambda seen=actors: seen)
        command = driver.command(SimpleNamespace(ego=vehicles[0], session=SimpleNamespace(map=town, world=world)))
        speed += max(-8.0 * TICK, min(command.target_speed - speed, 4.0 * TICK))
        car.drive(command.steer, speed)
        slow = slow.next(12.0 * TICK)[0]
        lanes.add(town.get_waypoint(car.place.location).lane_id)
        offsets.append(keeper.lane_offset(town, car.place))
        if reach(town, car.place).metres <= RUN_OUT:
            break
    assert len(lanes) == 1 + changes
    assert (max(offsets) > 0.5) is bool(changes)


@pytest.mark.parametrize("lane", [-2, -3, -4, -5])
def test_a_stretch_ends_before_an_exit_and_none_begins_between_exit_and_merge_or_on_the_ramp(town, lane):
    """Whichever lane of the four it is, also the one that the exit leaves and the one that the ramp comes to."""
    before = town.get_waypoint_xodr(2, lane, 50.0)
    found = reach(town, before.transform)
    assert found.until == "junction"
    end = before.next(found.metres)[0]
    assert not end.is_junction and any(w.is_junction for w in end.next(20.0))
    for road, its_lane in ((5, lane), (6, lane), (7, lane), (200, -1), (300, -1), (201, -1)):
        assert reach(town, town.get_waypoint_xodr(road, its_lane, 5.0).transform).metres < 60.0
