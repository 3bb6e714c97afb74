"""Where the ego is on its road and who is around it, on either side of a road and across its joints."""

from __future__ import annotations

import math
from types import SimpleNamespace

import carla
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carla_digr.driving.lane import reference_lines
from carla_digr.driving.situation import Situations
from carla_digr.simulator.awkward import episodes
from carla_digr.simulator.road import LANE_WIDTH, MEDIAN_HALF_WIDTH, ROAD_EDGE, Road
from carla_digr.simulator.wire import EpisodeSettings
from carla_digr.tasks.driving.reward import hazards_seen, in_lanes

ROAD = Road.ring()
MAP = carla.Map("Ring", ROAD.opendrive())
LINES = reference_lines(ROAD.opendrive())


class Moment:
    """A snapshot of vehicles on the ring, (s, d, angle to their side's direction, m/s) each; the first is the ego."""

    def __init__(self, side: int, *places: tuple[float, float, float, float]):
        self.actors = {}
        for number, (s, d, angle, speed) in enumerate(places, 1):
            x, y, heading = (float(value) for value in ROAD.pose(s, side * d))
            yaw = heading + (math.pi if side < 0 else 0.0) + angle
            transform = carla.Transform(carla.Location(x, y, 0.0), carla.Rotation(yaw=math.degrees(yaw)))
            velocity = carla.Vector3D(speed * math.cos(yaw), speed * math.sin(yaw), 0.0)
            self.actors[number] = SimpleNamespace(
                id=number, get_transform=lambda t=transform: t, get_velocity=lambda v=velocity: v
            )

    def find(self, number: int) -> SimpleNamespace:
        return self.actors[number]

    def __iter__(self):
        return iter(self.actors.values())


def seen(moment: Moment):
    situations = Situations(SimpleNamespace(map=MAP), moment.find(1), LINES)
    situations._kinds = dict.fromkeys(moment.actors, (4.7, 2.0))
    return situations.of(moment)


@settings(max_examples=40)
@given(
    st.sampled_from([1, -1]),
    st.floats(0.0, ROAD.length - 1.0),
    st.floats(MEDIAN_HALF_WIDTH + 0.1, ROAD_EDGE - 0.1),
    st.floats(-0.1, 0.1),
    st.floats(-140.0, 140.0),
)
def test_both_carriageways_look_the_same_to_who_drives_on_them(side, s, d, angle, ahead):
    other_d = MEDIAN_HALF_WIDTH + 1.5 * LANE_WIDTH
    found = seen(Moment(side, (s, d, angle, 22.0), ((s + side * ahead) % ROAD.length, other_d, 0.0, 15.0)))
    offset, to_left, to_right = in_lanes(d)
    assert min(abs(found.offset - offset), abs(abs(found.offset - offset) - LANE_WIDTH)) < 2e-3  # either, on a border
    assert found.to_left == pytest.approx(to_left, abs=2e-3)
    assert found.to_right == pytest.approx(to_right, abs=2e-3)
    assert found.drift == pytest.approx(22.0 * math.sin(angle), abs=2e-3)
    assert found.speed == pytest.approx(22.0, abs=1e-4)
    (other,) = found.others.values()
    assert other.ahead == pytest.approx(ahead, abs=2e-3)
    assert other.across == pytest.approx(other_d - d, abs=2e-3)
    assert other.along and other.speed == pytest.approx(15.0, abs=1e-4)


def test_who_comes_the_other_way_is_no_hazard_and_not_overtaken():
    d = MEDIAN_HALF_WIDTH + 0.5 * LANE_WIDTH
    found = seen(Moment(1, (100.0, d, 0.0, 22.0), (130.0, d, math.pi, 22.0)))
    assert not found.others[2].along
    assert hazards_seen(found) == (0.0, 0.0)
    assert hazards_seen(seen(Moment(1, (100.0, d, 0.0, 22.0), (115.0, d, 0.0, 10.0))))[0] > 0.5


def test_the_road_that_is_looked_along_follows_the_ego_round_the_ring():
    d = MEDIAN_HALF_WIDTH + 2.5 * LANE_WIDTH
    situations = None
    for s in np.arange(0.0, ROAD.length, 37.0):
        moment = Moment(1, (s, d, 0.0, 22.0), ((s + 90.0) % ROAD.length, d, 0.0, 20.0))
        if situations is None:
            situations = Situations(SimpleNamespace(map=MAP), moment.find(1), LINES)
            situations._kinds = dict.fromkeys(moment.actors, (4.7, 2.0))
        assert situations.of(moment).others[2].ahead == pytest.approx(90.0, abs=1e-3)


def test_a_town_with_junctions_ramps_and_slopes_is_seen_along_its_lanes():
    text = episodes({"town": 6.0}, 0)(1, 0, EpisodeSettings(synchronous=True, fixed_delta=0.05), 2001).opendrive()
    town = carla.Map("Town", text)
    lanes = [lane for lane in town.generate_waypoints(40.0) if lane.lane_type == carla.LaneType.Driving]
    compared = 0
    for lane in lanes:
        ahead, behind = ((*way(metres), None)[0] for way, metres in ((lane.next, 60.0), (lane.previous, 30.0)))
        if ahead is None or behind is None:  # its lane begins or ends here
            continue
        moment = Moment(1, (0.0, 5.0, 0.0, 22.0))
        for number, place in enumerate((lane.transform, ahead.transform, behind.transform), 1):
            forward = place.get_forward_vector()
            velocity = carla.Vector3D(20.0 * forward.x, 20.0 * forward.y, 20.0 * forward.z)
            moment.actors[number] = SimpleNamespace(
                id=number, get_transform=lambda t=place: t, get_velocity=lambda v=velocity: v
            )
        situations = Situations(SimpleNamespace(map=town), moment.find(1), reference_lines(text))
        situations._kinds = dict.fromkeys(moment.actors, (4.7, 2.0))
        found = situations.of(moment)
        assert found.offset == pytest.approx(0.0, abs=0.02)
        assert found.to_left + found.to_right >= lane.lane_width - 1e-3
        assert abs(found.drift) < 1.5  # a ramp that narrows leads across its road
        if 2 in found.others and ahead.lane_id == lane.lane_id:
            compared += 1
            assert found.others[2].ahead == pytest.approx(60.0, rel=0.3)  # along the middle of the road, in bends
        if 3 in found.others and behind.lane_id == lane.lane_id:
            assert found.others[3].ahead == pytest.approx(-30.0, rel=0.3)
    assert compared > 0.8 * len(lanes)
