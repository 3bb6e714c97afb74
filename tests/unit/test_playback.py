"""When the messages of a recording are due, by a clock that the test moves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.recordings.playback import Playback

SECOND = 10**9


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_messages_are_due_at_their_time_by_the_rate(clock):
    playback = Playback(clock, 2.0, paused=False)
    playback.begin(7 * SECOND)
    assert playback.delay(7 * SECOND, True) == 0.0
    assert playback.delay(8 * SECOND, True) == pytest.approx(0.5)
    clock.now += 2.0
    assert playback.position == 11 * SECOND
    assert playback.delay(8 * SECOND, True) == pytest.approx(-1.5)


def test_a_pause_holds_and_the_rest_follows_as_if_it_had_not_been(clock):
    playback = Playback(clock, 1.0, paused=False)
    playback.begin(0)
    clock.now += 3.0
    playback.pause(True)
    assert playback.delay(4 * SECOND, True) == math.inf
    assert playback.delay(3 * SECOND, True) <= 0.0
    clock.now += 50.0
    assert playback.position == 3 * SECOND
    playback.pause(False)
    assert playback.delay(4 * SECOND, True) == pytest.approx(1.0)


def test_a_step_lets_one_frame_pass_with_all_of_its_time(clock):
    playback = Playback(clock, 1.0, paused=True)
    playback.begin(SECOND)
    messages = [(t * SECOND, kind == "picture") for t in (1, 2, 3) for kind in ("clock", "picture", "map")]

    def out() -> int:
        count = 0
        while count < len(messages) and playback.delay(*messages[count]) <= 0.0:
            count += 1
        del messages[:count]
        return count

    assert out() == 0
    playback.step()
    assert (out(), out()) == (3, 0)
    playback.step()
    playback.step()
    assert out() == 6


@given(rates=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5), wait=st.floats(0.0, 100.0))
def test_a_change_of_the_rate_never_moves_the_position(rates, wait):
    clock = Clock()
    playback = Playback(clock, 1.0, paused=False)
    playback.begin(0)
    for rate in rates:
        clock.now += wait
        before = playback.position
        playback.rate = rate
        assert abs(playback.position - before) <= 1
