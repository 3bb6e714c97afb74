"""What must stand in one place only: topic names, the length of a tick, and which attributes an object has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from carla_digr.driving.control import TICK
from carla_digr.live import measurement, pacing
from carla_digr.recordings import topics
from carla_digr.tasks.driving.environment import DrivingEnv

ROOT = Path(__file__).parents[2]
NAMES = {value for name, value in vars(topics).items() if name.isupper() and isinstance(value, str) and value[0] == "/"}
SOURCES = [
    path
    for folder in ("carla_digr", "ros2_ws/src", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(topics.__file__)
]


def test_no_other_file_spells_a_topic_name():
    found = {
        (path.name, node.value)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    }
    assert not found


def test_every_topic_has_a_type_and_rviz_shows_only_topics_of_the_drive():
    assert set(topics.TYPES) == NAMES
    shown = re.findall(r"Value: (/\S+)", (ROOT / "ros2_ws/src/carla_digr_ros/rviz/live.rviz").read_text())
    assert shown and set(shown) <= NAMES


def test_every_rate_follows_from_the_tick():
    assert pacing.PERIOD == TICK
    assert TICK * measurement.RATE == TICK * DrivingEnv.metadata["render_fps"] == 1.0
    assert pytest.approx(1000.0 * TICK) == measurement.OVERLAY_P99_MS
    page = (ROOT / "carla_digr/live/viewer/static/plots.js").read_text()
    assert f"LATENCY_BUDGET_MS = {1000.0 * TICK:.0f};" in page


def test_no_attribute_is_set_by_a_name_that_is_made_up_at_run_time():
    found = [
        (path.name, node.lineno)
        for path in SOURCES
        if not {"tasks", "training"} & set(path.parts)  # the vectorised environment's interface; saved states
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
    ]
    assert not found
