"""The watchdog's transition table, as properties over any course of events."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.driving.control import VehicleCommand, turning
from carla_digr.live.watchdog import (
    BRAKE_PERIODS,
    FIRST_DECISION,
    FULL_BRAKE,
    MANUAL_SECONDS,
    WARN_PERIODS,
    Camera,
    ManualControl,
    Order,
    Stamps,
    State,
    Watchdog,
)

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


# One frame: the decision (or none), seconds until it arrives, how far its frame number is off, and what is wrong with
# the frame itself.
events = st.tuples(
    st.none() | commands,
    st.floats(0.0, 0.1),
    st.sampled_from([0, 0, 0, -1, 1]),
    st.sampled_from(["", "", "", "frozen"]),
)


@given(st.lists(events, max_size=60), st.integers(1, 6))
def test_follows_the_table_and_stays_in_range(course, recovery):
    clock = Clock()
    watchdog = Watchdog(clock, deadline=0.040, recovery=recovery)
    row, stopped = 0, False  # the table, written as counting
    for frame, (command, delay, offset, fault) in enumerate(course, start=1):
        watchdog.sent(frame, fault)
        clock.now += delay
        in_time = not fault and (delay < 0.040 or frame == 1)
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


def test_only_the_first_decision_may_take_longer():
    clock = Clock()
    watchdog = Watchdog(clock, deadline=0.040, recovery=2)
    watchdog.sent(1)
    clock.now += FIRST_DECISION - 0.001
    assert watchdog.receive(1, VehicleCommand(0.1))
    assert not watchdog.rule().fallback
    watchdog.sent(2)
    clock.now += 0.041
    assert not watchdog.receive(2, VehicleCommand(0.1))

    silent = Watchdog(clock, deadline=0.040)
    silent.sent(1)
    clock.now += FIRST_DECISION
    assert silent.remaining() == 0.0
    assert silent.rule().command == FULL_BRAKE
    silent.sent(2)
    assert silent.remaining() == pytest.approx(0.040)


def test_after_a_failure_between_frames_a_row_of_good_decisions_must_come():
    watchdog = Watchdog(Clock(), recovery=2)
    fallbacks = []
    for frame in range(1, 6):
        watchdog.sent(frame)
        watchdog.receive(frame, VehicleCommand(0.1))
        fallbacks.append(watchdog.rule().fallback)
        if frame == 2:
            assert watchdog.fail("no frame").command == FULL_BRAKE
            assert watchdog.state is State.STOPPING
    assert fallbacks == [False, False, True, False, False]


def test_the_deadline_is_exclusive_and_runs_from_the_frame():
    clock = Clock()
    watchdog = Watchdog(clock, deadline=0.040)
    watchdog.sent(6)
    assert watchdog.receive(6, VehicleCommand(0.1))
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


# --- frames ---


def picture(number: int) -> np.ndarray:
    return np.full((4, 4, 3), number, np.uint8)


def test_a_picture_that_stays_the_same_in_motion_warns_then_brakes_until_it_changes():
    camera = Camera()
    for number in range(3):
        assert not camera.check(number * 0.05, picture(number), 20.0)
        assert not camera.warning
    verdicts, warnings = [], []
    for number in range(3, 12):  # the ego comes to a stand while the picture is frozen
        verdicts.append(bool(camera.check(number * 0.05, picture(2), 20.0 if number < 9 else 0.0)))
        warnings.append(bool(camera.warning))
    assert verdicts == [False] * (BRAKE_PERIODS - 1) + [True] * (10 - BRAKE_PERIODS)
    assert warnings == [False] * (WARN_PERIODS - 1) + [True] * (10 - WARN_PERIODS)
    assert not camera.check(1.0, picture(9), 0.0)


def test_a_standing_ego_may_see_the_same_picture_for_ever():
    camera = Camera()
    assert not any(camera.check(number * 0.05, picture(0), 0.0) for number in range(100))


@given(st.lists(st.sampled_from([0.05, 0.0, -0.05, -0.2, -30.0]), max_size=30))
def test_stamps_are_sorted_into_next_repeated_late_and_jump(steps):
    stamps, newest = Stamps(), 100.0
    assert stamps.check(newest) is Order.NEXT
    for step in steps:
        order = stamps.check(newest + step)
        expected = {0.05: Order.NEXT, 0.0: Order.REPEATED, -30.0: Order.JUMP}.get(step, Order.LATE)
        assert order is expected
        if order in (Order.NEXT, Order.JUMP):
            newest += step


def test_a_frame_with_a_wrong_stamp_is_named_and_time_goes_on_after_a_jump():
    camera = Camera()
    said = [camera.check(stamp, picture(i), 20.0) for i, stamp in enumerate([5.0, 5.05, 5.05, 5.0, 5.1, 1.0, 1.05])]
    assert [bool(text) for text in said] == [False, False, True, True, False, True, False]
    assert "once more" in said[2] and "older" in said[3] and "jumped back" in said[5]


# --- manual control ---


@given(st.floats(), st.floats())
def test_a_turn_is_a_wheel_angle_or_no_number(speed, yaw_rate):
    command = turning(speed, yaw_rate)
    if math.isfinite(speed) and math.isfinite(yaw_rate):
        assert -1.0 <= command.steer <= 1.0 and command.steer * yaw_rate * speed <= 0.0
    else:
        assert ManualControl(Clock()).receive(command)


@given(commands)
def test_manual_control_is_exact_in_range_or_the_full_brake_and_ends_by_itself(command):
    clock = Clock()
    manual = ManualControl(clock)
    assert manual.command() is None
    fault = manual.receive(command)
    applied = manual.command()
    in_range = usable(command) and abs(command.steer) <= 1 and 0 <= command.throttle <= 1 and 0 <= command.brake <= 1
    in_range = in_range and not command.target_speed < 0
    assert bool(fault) != in_range
    assert applied == (command if in_range else FULL_BRAKE)
    clock.now += MANUAL_SECONDS
    assert manual.command() is None


def test_the_page_gives_way_to_everybody_else_and_drives_again_when_they_have_let_go():
    clock = Clock()
    manual = ManualControl(clock)
    page, human = VehicleCommand(0.1, throttle=1.0), VehicleCommand(-0.1, brake=0.5)
    manual.receive(page, by_page=True)
    assert (manual.command(), manual.driver) == (page, "page")
    manual.receive(human)
    clock.now += MANUAL_SECONDS / 2
    assert manual.receive(VehicleCommand(math.nan), by_page=True) == ""  # nor does its nonsense brake
    assert (manual.command(), manual.driver) == (human, "manual")
    clock.now += MANUAL_SECONDS / 2
    assert (manual.command(), manual.driver) == (None, "")
    manual.receive(page, by_page=True)
    assert (manual.command(), manual.driver) == (page, "page")
