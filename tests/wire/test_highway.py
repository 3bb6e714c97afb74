"""Which maps and spawn points a drive accepts, told by the client's own map of an OpenDRIVE text."""

from __future__ import annotations

import math

import carla
import numpy as np
import pytest

from carla_digr.driving.highway import LEAST_RADIUS, LEAST_WIDTH, REACH, far_reaching, highway_points, reach
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.start import LANE_ROOM, lane_around
from carla_digr.driving.traffic import AHEAD, ROW_LENGTH, places_ahead
from carla_digr.errors import UserError
from carla_digr.simulator.road import Road

XODR = """<?xml version="1.0"?>
<OpenDRIVE><header revMajor="1" revMinor="4" name="{name}" version="1"><geoReference>+lat_0=0 +lon_0=0</geoReference>
</header>
<road name="" length="{length}" id="4" junction="-1"><link/>
<planView><geometry s="0" x="0" y="0" hdg="0" length="{length}">{shape}</geometry></planView>
<lanes><laneSection s="0"><center><lane id="0" type="none" level="false"/></center><right>{lanes}</right></laneSection>
</lanes></road></OpenDRIVE>
"""
LANE = (
    """<lane id="{id}" type="driving" level="false"><width sOffset="0" a="{width}" b="{taper}" c="0" d="0"/></lane>"""
)


class Town:
    """A client's map without a server, with spawn points every 50 m of its rightmost lane."""

    def __init__(
        self,
        name: str,
        lanes: int = 4,
        width: float = 3.5,
        radius: float = math.inf,
        length: float = 600.0,
        taper: float = 0.0,
    ):
        shape = "<line/>" if math.isinf(radius) else f'<arc curvature="{1 / radius}"/>'
        text = "".join(LANE.format(id=-i, width=width, taper=taper * (i == lanes)) for i in range(1, lanes + 1))
        self._map = carla.Map(name, XODR.format(name=name, length=length, shape=shape, lanes=text))
        self.name = self._map.name
        self.get_waypoint = self._map.get_waypoint
        self._points = [self._map.get_waypoint_xodr(4, -lanes, s) for s in range(5, int(length), 50)]

    def get_spawn_points(self) -> list[carla.Transform]:
        return [point.transform for point in self._points]


def test_a_wide_straight_road_is_a_highway_until_it_ends():
    town = Town("Wide")
    points = town.get_spawn_points()
    assert highway_points(town) == points[: len(highway_points(town))]
    assert 0 < len(highway_points(town)) < len(points)  # those with less than 200 m ahead are not


@pytest.mark.parametrize(
    "town",
    [
        Town("Narrow", lanes=2),
        Town("Paths", width=2.0),
        Town("Bends", radius=0.9 * LEAST_RADIUS),
        Town("Short", length=150.0),
    ],
    ids=lambda town: town.name,
)
def test_other_roads_are_refused_by_name_with_what_to_do(town):
    with pytest.raises(UserError, match=rf"The map {town.name} has no highway: .*load Town04 or Town05"):
        highway_points(town)


def test_a_wide_bend_is_a_highway():
    assert highway_points(Town("Bend", radius=1.5 * LEAST_RADIUS))


def test_roads_and_spawn_points_can_be_chosen():
    town = Town("Chosen")
    assert highway_points(town, roads=[4]) == highway_points(town)
    with pytest.raises(UserError, match="no spawn point on the road 5"):
        highway_points(town, roads=[4, 5, 6])
    with pytest.raises(UserError, match="no highway on the roads 4: none of its 12 spawn points"):
        highway_points(Town("Two", lanes=2), roads=[4])
    last = len(town.get_spawn_points()) - 1
    assert highway_points(town, spawn_points=[last, 0]) == [town.get_spawn_points()[last], town.get_spawn_points()[0]]
    with pytest.raises(UserError, match=f"has the spawn points 0 to {last}, not {last + 1}"):
        highway_points(town, spawn_points=[0, last + 1])


def test_a_stretch_reaches_to_the_end_of_the_road_or_to_a_bend_that_is_too_tight():
    town = Town("Long", length=900.0)
    points = town.get_spawn_points()
    found = [reach(town, point) for point in points]
    assert [r.metres for r in found] == sorted((r.metres for r in found), reverse=True)
    assert found[0].metres == pytest.approx(880.0, abs=20.0)
    assert found[0].until == "end of the road"
    assert far_reaching(town, points) == [p for p, r in zip(points, found, strict=True) if r.metres >= 440.0]
    assert (
        reach(Town("Tight", radius=100.0), Town("Tight", radius=100.0).get_spawn_points()[0]).until == "bend of 100 m"
    )
    wide = reach(Town("Wide bend", radius=400.0), Town("Wide bend", radius=400.0).get_spawn_points()[0])
    assert wide.tightest == pytest.approx(400.0, rel=0.01) and wide.metres < REACH


def test_a_lane_that_narrows_is_followed_to_where_a_car_does_not_fit():
    town = Town("Merge", taper=-0.002)  # from 3.5 to 2.3 m
    first, *_, last = town.get_spawn_points()
    found = reach(town, first)
    assert found.metres == pytest.approx((3.5 - LEAST_WIDTH) / 0.002, abs=20.0)
    assert found.until.startswith("lane of ")
    assert reach(town, last).metres == 0.0
    inner = town.get_waypoint(first.location).get_left_lane().transform
    assert reach(town, inner).until == "end of the road"


def test_who_drives_in_a_bend_ahead_takes_the_gap_of_a_start_and_who_drives_beside_it_does_not():
    town = Town("Gap", radius=150.0)
    here = town.get_waypoint(town.get_spawn_points()[3].location)
    lane = lane_around(here)
    ahead, beside = here.next(55.0)[0], here.next(30.0)[0].get_left_lane()
    for place, inside in ((ahead, True), (here.previous(20.0)[0], True), (beside, False), (here.next(70.0)[0], False)):
        assert (min(place.transform.location.distance(spot) for spot in lane) < LANE_ROOM) is inside
    forward = here.transform.get_forward_vector()
    away = ahead.transform.location - here.transform.location
    assert abs(forward.x * away.y - forward.y * away.x) > LANE_ROOM, "straight on it would not be seen"


@pytest.mark.parametrize("seed", range(5))
def test_vehicles_come_onto_the_road_ahead_with_room_to_pass(seed):
    town = Town("Ahead", lanes=4, radius=400.0, length=900.0)
    ego = town.get_spawn_points()[2]
    others = [town.get_waypoint(ego.location).next(200.0)[0].transform]
    places = places_ahead(town, ego, others, 12, np.random.default_rng(seed))
    assert 6 <= len(places) <= 12
    assert len({town.get_waypoint(place.location).lane_id for place in places}) >= 3
    everybody = [*others, *places]
    for place in places:
        assert AHEAD[0] * 0.8 < place.location.distance(ego.location) < AHEAD[1]
        forward, right = place.get_forward_vector(), place.get_right_vector()
        abreast = [
            away.x * right.x + away.y * right.y
            for other in everybody
            if other is not place
            and (away := other.location - place.location).length() < ROW_LENGTH
            and abs(away.x * forward.x + away.y * forward.y) < 0.9 * ROW_LENGTH
        ]
        assert len(abreast) < 4 and all(abs(across) > 2.5 for across in abreast)


def test_nobody_comes_onto_a_road_that_ends():
    town = Town("End", length=150.0)
    ego = town.get_spawn_points()[1]
    assert places_ahead(town, ego, [], 5, np.random.default_rng(0)) == []


def test_every_spawn_point_of_the_embedded_highway_is_one(session):
    assert len(highway_points(session.map)) == len(Road.ring().spawn_points)


def test_nothing_is_spawned_on_a_map_without_the_chosen_roads(shared_simulator):
    with pytest.raises(UserError, match="no spawn point on the road 777"):
        Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, roads=[777])
    client = carla.Client("127.0.0.1", shared_simulator.port)
    client.set_timeout(20.0)
    world = client.get_world()
    world.wait_for_tick(20.0)
    assert [actor.type_id for actor in world.get_actors()] == ["spectator"]


def test_drives_start_at_the_chosen_points(shared_simulator):
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, vehicles=0, spawn_points=[5, 9]) as drive:
        places = {(drive.reset(seed).x, drive.reset(seed).y) for seed in range(6)}
    points = Road.ring().spawn_points
    assert len(places) == 2
    for x, y in places:  # one tick at 22 m/s from where it started
        assert min(math.hypot(x - points[i, 0], y - points[i, 1]) for i in (5, 9)) < 1.2
