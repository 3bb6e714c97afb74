"""The measurement of a drive: what is complete holds, and every kind of gap is seen and named."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.live.measurement import ANSWERS, ENDURANCE_FRAMES, OBJECTS, Measurement, Memory, ProcessorTime, criteria

FRAMES = 40
PERIOD = 50_000_000  # ns


def messages(frames: int = FRAMES + 10):
    """A faultless drive: (kind, frame number) in the order of arrival."""
    return [(kind, number) for number in range(frames) for kind in ("facts", "picture", "motion", *ANSWERS)]


def measure(course, late=()):
    measurement = Measurement(FRAMES)
    for kind, number in course:
        stamp, published = number * PERIOD, 10.0 + number * 0.05
        if kind == "facts":
            measurement.facts(stamp, 100 + number, 1, False, False)
        elif kind == "picture":
            measurement.picture(stamp, published)
        elif kind == "motion":
            measurement.motion(stamp, 20.0)
        else:
            latency = 0.2 if (kind, number) in late else 0.005 if kind == "decision" else 0.010
            measurement.answer(kind, stamp, published + latency)
    return measurement


def broken(figures) -> set[str]:
    return {row["figure"] for row in criteria(figures, FRAMES, {}) if not row["held"]}


def test_a_faultless_drive_holds():
    measurement = measure(messages())
    assert measurement.started and measurement.full
    figures = measurement.figures()
    assert not broken(figures)
    assert figures["frames"] == FRAMES
    assert figures["first_frame"] == 100
    assert figures["rate_hz"] == pytest.approx(20.0)
    assert figures["frame_to_decision_ms"]["p99"] == pytest.approx(5.0)
    assert figures["frame_to_overlay_ms"]["max"] == pytest.approx(10.0)
    assert figures["distance_m"] == pytest.approx(FRAMES * 1.0)


@given(st.integers(0, 2**32 - 1))
def test_the_order_in_which_a_frames_messages_arrive_does_not_matter(seed):
    random_order = random.Random(seed)
    course = sorted(messages(), key=lambda entry: (entry[1], random_order.random()))
    assert measure(course).figures() == measure(messages()).figures()


@given(st.sampled_from(ANSWERS), st.integers(1, FRAMES - 1))
def test_a_missing_answer_is_named(kind, number):
    figures = measure([m for m in messages() if m != (kind, number)]).figures()
    assert broken(figures) == {f"frames_without_{kind}"}
    assert figures[f"frames_without_{kind}"] == 1


def test_objects_are_counted_but_may_be_left_out():
    course = [m for entry in messages() for m in ([entry, (OBJECTS, entry[1])] if entry[0] == "overlay" else [entry])]
    figures = measure([m for m in course if m not in {(OBJECTS, 7), (OBJECTS, 9)}]).figures()
    assert figures["frames_without_objects"] == 2 and figures["frame_to_objects_ms"]["p50"] == pytest.approx(10.0)
    assert not broken(figures)


@given(st.integers(1, FRAMES - 1))
def test_a_lost_frame_and_a_stamp_without_picture_are_seen(number):
    gone = [m for m in messages() if m[1] != number]
    assert broken(measure(gone).figures()) >= {"frames_lost"}
    foreign = [m for m in messages() if m != ("picture", number)]
    assert broken(measure(foreign).figures()) >= {"frames_lost", "stamps_without_picture"}


def test_late_overlays_and_a_short_drive_do_not_hold():
    late = {("overlay", number) for number in (5, 6)}
    assert broken(measure(messages(), late).figures()) == {"frame_to_overlay_ms.p99"}
    short = measure(messages(FRAMES - 1))
    assert not short.full
    assert broken(short.figures()) == {"frames"}


def test_the_window_begins_with_the_first_complete_frame():
    course = [m for m in messages() if m[1] >= 3 or m[0] == "picture"]
    figures = measure(course).figures()
    assert figures["first_frame"] == 103
    assert not broken(figures)


def test_ends_of_episodes_are_counted_once_and_by_their_kind():
    measurement = Measurement(FRAMES)
    for number in range(FRAMES):
        stamp = number * PERIOD
        measurement.picture(stamp, number * 0.05)
        for kind in ANSWERS:
            measurement.answer(kind, stamp, number * 0.05)
        episode = 1 + number // 20
        hit = number in (10, 11, 12)
        measurement.facts(stamp, number, episode, hit, over=number % 20 >= 10)
    figures = measurement.figures()
    assert (figures["collisions"], figures["road_departures"]) == (1, 1)


def test_processor_time_sees_work_and_missing_processes():
    meter = ProcessorTime({"me": os.getpid(), "nobody": 2**22})
    start = time.process_time()
    while time.process_time() - start < 0.2:
        pass
    report = meter.report(1.0)
    assert report["processes"]["me"]["cpu_s"] >= 0.15
    assert report["processes"]["nobody"]["cpu_s"] is None
    assert report["machine"]["busy_percent"] > 0


GROWS = """
kept = []
while True:
    kept.append(bytearray(b"x") * (1 << 20))
    print(flush=True)
    input()
"""


def test_memory_sees_growth_after_the_warm_up_and_missing_processes():
    command = [sys.executable, "-c", GROWS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as growing:
        assert growing.stdin and growing.stdout
        meter = Memory({"growing": growing.pid, "nobody": 2**22})
        for _ in range(20):
            growing.stdout.readline()
            meter.sample()
            growing.stdin.write("\n")
            growing.stdin.flush()
        growing.kill()
    report = meter.report()
    assert report["growing"]["end_mb"] - report["growing"]["start_mb"] == pytest.approx(16 * 1.05, abs=1)
    assert report["growing"]["growth_percent"] > 0
    assert report["nobody"]["growth_percent"] is None


def test_in_a_long_drive_drift_and_growth_must_hold_too():
    figures = measure(messages()).figures()
    rows = criteria(figures, ENDURANCE_FRAMES, {"a": {"growth_percent": 4.9}, "b": {"growth_percent": 5.1}})
    held = {row["figure"]: row["held"] for row in rows}
    assert held["memory of a: growth_percent"] and not held["memory of b: growth_percent"]
    assert held["rate_drift_percent"]
    slow = criteria({**figures, "rate_drift_percent": -0.2}, ENDURANCE_FRAMES, {})
    assert not {row["figure"]: row["held"] for row in slow}["rate_drift_percent"]


def test_a_rate_that_drifts_is_seen():
    measurement = Measurement(FRAMES)
    moment = 0.0
    for number in range(FRAMES):
        measurement.picture(number * PERIOD, moment)
        for kind in ANSWERS:
            measurement.answer(kind, number * PERIOD, moment)
        moment += 0.050 if number < FRAMES // 2 else 0.051
    assert measurement.figures()["rate_drift_percent"] == pytest.approx(100.0 * (50 / 51 - 1), abs=0.01)
