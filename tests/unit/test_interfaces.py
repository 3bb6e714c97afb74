"""The interfaces' own words: what a field means is what the code does, and no list in them goes stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from carla_digr.driving.control import DriveFrame
from carla_digr.training import STAGES

ROOT = Path(__file__).parents[2]
TASKS = {yaml.safe_load(path.read_text()).get("task") for path in (ROOT / "configs").glob("*.yaml")} - {None}
PACKAGE = ROOT / "ros2_ws" / "src" / "carla_digr_msgs"
FILES = sorted(path for kind in ("msg", "srv", "action") for path in PACKAGE.glob(f"{kind}/*"))


def comment_above(text: str, field: str) -> str:
    found = re.search(rf"((?:^#.*\n)+)(?=\S+ {field}\b)", text, re.MULTILINE)
    assert found, field
    return " ".join(line.lstrip("# ") for line in found[1].splitlines())


def test_off_road_means_in_the_message_what_it_means_in_the_drive():
    said = comment_above((PACKAGE / "msg" / "DriveFrame.msg").read_text(), "off_road")
    assert DriveFrame.__doc__ is not None
    assert said.removeprefix("The ego's ") in " ".join(DriveFrame.__doc__.split()).replace("its ", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_interface_names_all_tasks_or_none(path):
    assert {"driving", "breakout"} <= TASKS
    named = {task for task in TASKS if re.search(rf"\b{task}\b", path.read_text().replace("-", "_"))}
    assert named - {"driving"} in (set(), TASKS - {"driving"})  # "driving" is a word too


def test_the_action_names_all_stages():
    said = (PACKAGE / "action" / "RunStage.action").read_text().splitlines()[0]
    assert [stage.name.replace("-", "_") in said for stage in STAGES] == [True] * len(STAGES)
