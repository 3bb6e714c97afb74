"""The scripted steers keep a car in its lane through an S-bend; how far off it is is told right."""

from __future__ import annotations

import math

import carla
import numpy as np
import pytest

from carla_digr.driving import keeper, scripted
from carla_digr.driving.control import CRUISE_SPEED, EGO_WHEELBASE, MAX_WHEEL_ANGLE, TICK
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

    def drive(self, steer: float) -> None:
        wheels = steer * MAX_WHEEL_ANGLE
        slip = math.atan(0.5 * math.tan(wheels))
        self.x += CRUISE_SPEED * TICK * math.cos(self.yaw + slip)
        self.y += CRUISE_SPEED * TICK * math.sin(self.yaw + slip)
        self.yaw += CRUISE_SPEED * TICK * math.cos(slip) * math.tan(wheels) / EGO_WHEELBASE


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
