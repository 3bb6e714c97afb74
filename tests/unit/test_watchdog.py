"""The watchdog's transition table, as properties over any course of events."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.driving.control import VehicleCommand
from carla_digr.live.watchdog import FULL_BRAKE, State, Watchdog

anything = st.floats(allow_nan=True, allow_infinity=True)
commands = st.builds(VehicleCommand, steer=anything, throttle=anything, brake=anything, target_speed=anything)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def usable(command: VehicleCommand) -> bool:
    return all(map(math.isfinite, (command.steer, command.throttle, command.brake))) and not math.isinf(
        command.target_speed
    )


# One frame: the decision (or none), seconds until it arrives, and how far its frame number is off.
events = st.tuples(
    st.none() | commands,
    st.floats(0.0, 0.1),
    st.sampled_from([0, 0, 0, -1, 1]),
)


@given(st.lists(events, max_size=60), st.integers(1, 6))
def test_follows_the_table_and_stays_in_range(course, recovery):
    clock = Clock()
    watchdog = Watchdog(clock, deadline=0.040, recovery=recovery)
    row, stopped = 0, False  # the table, written as counting
    for frame, (command, delay, offset) in enumerate(course, start=1):
        watchdog.sent(frame)
        clock.now += delay
        in_time = watchdog.remaining() > 0.0
        if command is not None:
            taken = watchdog.receive(frame + offset, command)
            assert taken == (offset == 0 and in_time)
        good = command is not None and offset == 0 and in_time and usable(command)
        row = row + 1 if good else 0
        stopped = not good or (stopped and row < recovery)

        ruling = watchdog.rule()

        applied = ruling.command
        assert -1.0 <= applied.steer <= 1.0
        assert 0.0 <= applied.throttle <= 1.0
        assert 0.0 <= applied.brake <= 1.0
        assert math.isnan(applied.target_speed) or 0.0 <= applied.target_speed < math.inf
        assert ruling.fallback == stopped
        assert bool(ruling.reason) == stopped
        if not good:
            assert applied == FULL_BRAKE
            assert watchdog.state is State.STOPPING
        elif stopped:
            assert (applied.throttle, applied.brake) == (0.0, 1.0)
            assert math.isnan(applied.target_speed)
            assert watchdog.state is State.RECOVERING
        else:
            assert applied.steer == min(max(command.steer, -1.0), 1.0)
            assert watchdog.state is State.DRIVING


def test_the_deadline_is_exclusive_and_runs_from_the_frame():
    clock = Clock()
    watchdog = Watchdog(clock, deadline=0.040)
    watchdog.sent(7)
    clock.now += 0.039
    assert watchdog.remaining() == pytest.approx(0.001)
    assert watchdog.receive(7, VehicleCommand(0.1))
    watchdog.sent(8)
    clock.now += 0.040001
    assert not watchdog.receive(8, VehicleCommand(0.1))
    assert "frame 8 within 40 ms" in watchdog.rule().reason


def test_of_two_decisions_for_a_frame_the_first_counts():
    watchdog = Watchdog(Clock())
    watchdog.sent(1)
    assert watchdog.receive(1, VehicleCommand(0.5, throttle=0.2))
    assert not watchdog.receive(1, VehicleCommand(-0.5))
    assert watchdog.rule().command.steer == 0.5
    assert watchdog.ignored == 1


def test_a_broken_decision_is_not_repaired_by_a_second_one():
    watchdog = Watchdog(Clock())
    watchdog.sent(1)
    assert watchdog.receive(1, VehicleCommand(math.nan))
    assert not watchdog.receive(1, VehicleCommand(0.0))
    ruling = watchdog.rule()
    assert ruling.command == FULL_BRAKE
    assert "steer is nan" in ruling.reason


@pytest.mark.parametrize("arguments", [{"deadline": 0.0}, {"deadline": math.nan}, {"recovery": 0}])
def test_refuses_settings_without_sense(arguments):
    with pytest.raises(ValueError, match="deadline must be positive"):
        Watchdog(Clock(), **arguments)
