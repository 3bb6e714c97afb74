"""What `colcon test` runs: the installed package is whole."""

import importlib.util
from importlib.metadata import entry_points
from pathlib import Path

import yaml
from ament_index_python.packages import get_package_share_directory


def test_every_executable_has_a_node():
    """By its name."""
    names = {e.name for e in entry_points(group="console_scripts") if e.value.startswith("carla_digr_ros.")}
    assert len(names) >= 8
    executables = importlib.import_module("carla_digr_ros.executables")
    for name in names:
        assert callable(getattr(executables, name))
        assert importlib.util.find_spec(f"carla_digr_ros.{name}") is not None


def test_launch_files_parameters_and_displays_are_installed():
    """Where launch looks for them."""
    share = Path(get_package_share_directory("carla_digr_ros"))
    assert (share / "launch" / "live.launch.py").is_file()
    assert yaml.safe_load((share / "configs" / "live.yaml").read_text())["/**/explainer"]["ros__parameters"]
    assert yaml.safe_load((share / "rviz" / "live.rviz").read_text())["Visualization Manager"]["Displays"]


def test_every_topic_has_its_type():
    """That of recordings."""
    topics = importlib.import_module("carla_digr_ros.topics")
    for topic in topics.TOPICS:
        package, _, name = topic.type_name.split("/")
        assert topic.type is getattr(importlib.import_module(f"{package}.msg"), name), topic.name
