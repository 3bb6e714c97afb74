"""Whether the stages can train on a server, and how long that would take; a line of `check-simulator`."""

from __future__ import annotations

import time
from typing import Any

from carla_digr.driving import probes
from carla_digr.driving.highway import LEAST_WIDTH
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.surroundings import SIZE

LABELLED = 10  # frames of which labels are asked for
TIMED = 40  # decisions that are timed
TICKS = 2  # of a decision
EPISODE = 500  # decisions, 50 s
MANY = 1_000_000  # decisions, about what a teacher takes


def training(drive: Scenario) -> dict[str, Any]:
    """Drive as the stages do, with what they look at.

    Returns:
        labelled: of LABELLED frames, those whose labels came; sized: of ``others``, the other vehicles in sight, those
        with a box; to_edges: m between the edges of the driving lanes; decision, reset: seconds; hours: of MANY
        decisions in episodes of EPISODE on this one server.
    """
    camera = drive.add_label_camera(SIZE)
    start = time.perf_counter()
    drive.reset(5)
    reset = time.perf_counter() - start
    labelled = 0
    for _ in range(LABELLED):
        labelled += camera.poll(probes.steer_on(drive).frame, drive.session.timeout) is not None
    camera.switch(False)
    start = time.perf_counter()
    for _ in range(TIMED):
        for _ in range(TICKS):
            probes.steer_on(drive)
        seen = drive.situation()
    decision = (time.perf_counter() - start) / TIMED
    return {
        "labelled": labelled,
        "others": len(seen.others),
        "sized": sum(other.length > 0.5 and other.width > 0.5 for other in seen.others.values()),
        "to_edges": seen.to_left + seen.to_right,
        "decision": decision,
        "reset": reset,
        "hours": MANY * (decision + reset / EPISODE) / 3600.0,
    }


def judged(seen: dict[str, Any]) -> tuple[bool, str]:
    """Whether that is enough, and what was seen."""
    good = seen["labelled"] == LABELLED and seen["sized"] == seen["others"] and seen["to_edges"] >= LEAST_WIDTH
    return good, (
        f"labels of {seen['labelled']} of {LABELLED} frames, boxes of {seen['sized']} of {seen['others']} vehicles in "
        f"sight, lanes of {seen['to_edges']:.1f} m in all; {1000.0 * seen['decision']:.0f} ms a decision and a start "
        f"of {seen['reset']:.1f} s make {MANY:,} decisions {seen['hours']:.1f} h on this server alone"
    )
