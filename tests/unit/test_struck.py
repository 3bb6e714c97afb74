"""Who drove into whom, and what becomes of an episode whose ego was driven into."""

from __future__ import annotations

import math

import carla
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.driving.contacts import Body, struck
from carla_digr.driving.control import TICK
from carla_digr.driving.episode import RunningEpisode

HALF = 2.4, 1.0  # m


def body(ahead: float, right: float, speed: float, aside: float = 0.0, turned: float = 0.0) -> Body:
    """A car on a road along x; ``turned`` against it, rad."""
    return Body(
        carla.Location(ahead, right, 0.0),
        carla.Vector3D(speed, aside, 0.0),
        carla.Vector3D(math.cos(turned), math.sin(turned), 0.0),
        carla.Vector3D(*HALF, 0.8),
    )


CASES = {
    "it runs into a slower one ahead": (body(0, 0, 22), body(5.1, 0, 11), False),
    "it runs into one that stands": (body(0, 0, 10), body(5.0, 0.6, 0), False),
    "a faster one runs into it from behind": (body(0, 0, 8), body(-5.3, 0.3, 16), True),
    "one runs into it where it stands": (body(0, 0, 0), body(-4.9, 0, 9), True),
    "one comes towards it where it stands": (body(0, 0, 0), body(5.0, 0, -9, turned=math.pi), True),
    "it changes lanes into one beside it": (body(0, 0, 22, aside=1.2), body(1.0, 2.1, 15), False),
    "one beside it changes lanes into it": (body(0, 0, 22), body(2.0, 2.1, 15, aside=-1.2), True),
    "one cuts in before it": (body(0, 0, 22), body(4.0, 2.2, 12, aside=-1.5), True),
    "nobody moves": (body(0, 0, 0), body(5.0, 0, 0), False),
}


@pytest.mark.parametrize("case", CASES)
@given(course=st.floats(-math.pi, math.pi))
def test_who_drives_into_whom(case, course):
    """Whatever the road's direction."""
    ego, other, expected = CASES[case]

    def turned(car: Body) -> Body:
        c, s = math.cos(course), math.sin(course)
        parts = [(v.x * c - v.y * s, v.x * s + v.y * c) for v in car[:3]]
        kinds = (carla.Location, carla.Vector3D, carla.Vector3D)
        return Body(*(kind(x, y, 0.0) for kind, (x, y) in zip(kinds, parts, strict=True)), car.half)

    assert struck(turned(ego), turned(other)) is expected
    if ego.velocity.length() != other.velocity.length():
        assert struck(turned(other), turned(ego)) is not expected, "never both, and never neither"


def test_an_episode_whose_ego_was_driven_into_is_cut_and_clean():
    episode = RunningEpisode(100 * TICK)
    episode.count(0.0, "vehicle.audi.a2", False, struck=True)
    assert episode.truncated and not episode.terminated
    figures = episode.figures()
    assert figures["clean"] and figures["struck"] and figures["collision"] == "vehicle.audi.a2"
    episode.count(0.0, "vehicle.audi.a2", True, struck=True)
    assert episode.terminated, "who is off the road when it happens is off the road"
