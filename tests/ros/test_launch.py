"""launch/live.launch.py without a ROS installation: recording stand-ins for `launch` and `launch_ros`.

What is started must exist: executables, parameter files and their parameters, arguments; and it must be what
`carla-digr live` starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import live_support
import pytest
import yaml

live_support.workspace()

from carla_digr.live import composition  # noqa: E402
from carla_digr.live.supervisor import command_line  # noqa: E402

INSTALLED = live_support.installed("launch/live.launch.py")


class Recorded:
    """An action: its class's name and what it was made with."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def action(name: str) -> type:
    return type(name, (Recorded,), {})


class LaunchConfiguration(Recorded):
    def perform(self, context: dict[str, str]) -> str:
        return context[self.args[0]]  # KeyError: not declared


STAND_INS = {
    "launch": {"LaunchDescription": action("LaunchDescription")},
    "launch.actions": {
        name: action(name)
        for name in ("DeclareLaunchArgument", "EmitEvent", "ExecuteProcess", "LogInfo", "OpaqueFunction")
    },
    "launch.events": {"Shutdown": action("Shutdown")},
    "launch.substitutions": {"LaunchConfiguration": LaunchConfiguration},
    "launch_ros": {},
    "launch_ros.actions": {"Node": action("Node")},
}


@pytest.fixture
def description(monkeypatch):
    """The declared arguments by name, and a function that gives the started actions for values of them."""
    for name, content in STAND_INS.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("live_launch", INSTALLED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entities = module.generate_launch_description().args[0]
    arguments = {e.args[0]: e.kwargs for e in entities if type(e).__name__ == "DeclareLaunchArgument"}
    (opaque,) = (e for e in entities if type(e).__name__ == "OpaqueFunction")

    def start(**values):
        assert set(values) <= set(arguments)
        return opaque.kwargs["function"]({n: a["default_value"] for n, a in arguments.items()} | values)

    return arguments, start


def nodes(actions):
    return {a.kwargs["executable"]: a.kwargs for a in actions if type(a).__name__ == "Node"}


def test_every_argument_has_description_and_default_and_the_default_is_a_choice(description):
    arguments, _ = description
    assert set(arguments) == {argument.name for argument in composition.ARGUMENTS} | {"rviz"}
    for name, argument in arguments.items():
        assert argument["description"], name
        assert argument["choices"] is None or argument["default_value"] in argument["choices"], name


def test_it_starts_what_the_command_line_starts(description):
    _, start = description
    for values in ({}, {"simulator": "carla", "host": "example", "viewer": "false", "lockstep": "true"}):
        actions = start(rviz="false", **values)
        expected = composition.live({a.name: a.default for a in composition.ARGUMENTS} | values)
        assert [a.kwargs["name"] for a in actions] == [process.name for process in expected]
        for started, process in zip(actions, expected, strict=True):
            (over,) = started.kwargs["on_exit"]
            assert type(over.kwargs["event"]).__name__ == "Shutdown"
            if process.module:
                assert started.kwargs["cmd"] == [sys.executable, "-m", process.module, *process.arguments]
            else:
                file, parameters = started.kwargs["parameters"]
                assert parameters == dict(process.parameters)
                assert set(yaml.safe_load(Path(file).read_text())) == {"carla_bridge", "explainer", "viewer"}


def test_every_executable_exists_and_declares_the_parameters_it_is_given(description):
    _, start = description
    file = yaml.safe_load(live_support.installed(composition.PARAMETERS_FILE).read_text())
    for name, node in nodes(start(rviz="false")).items():
        given = set(node["parameters"][1]) | set(file[name]["ros__parameters"])
        source = Path(importlib.util.find_spec(f"carla_digr_ros.{name}").origin).read_text()
        for parameter in given:
            assert f'"{parameter}"' in source, f"{name} does not declare {parameter}"
        executable, *_ = command_line(composition.Process(name), live_support.workspace())
        assert os.access(executable, os.X_OK)


def test_rviz_is_started_only_where_it_is_installed(description, monkeypatch, tmp_path):
    _, start = description
    monkeypatch.setenv("PATH", str(tmp_path))
    (notice,) = (a for a in start() if type(a).__name__ == "LogInfo")
    assert "RViz is not installed" in notice.kwargs["msg"]
    rviz = tmp_path / "rviz2"
    rviz.touch(mode=0o755)
    node = nodes(start())["rviz2"]
    assert (node["package"], node["arguments"][0]) == ("rviz2", "-d")
    displays = yaml.safe_load(Path(node["arguments"][1]).read_text())["Visualization Manager"]["Displays"]
    from carla_digr_ros import topics

    names = {topic.name for topic in topics.TOPICS}
    shown = [display["Topic"] for display in displays if "Topic" in display]
    assert {topic["Value"] for topic in shown} <= names and len(shown) >= 4
    for topic in shown:  # as in the table, else RViz shows nothing
        assert (topic["Reliability Policy"], topic["Durability Policy"]) == ("Reliable", "Volatile")
        assert (topic["History Policy"], topic["Depth"]) == ("Keep Last", topics.QOS.depth)


def test_the_package_builds_copied_as_well_as_linked(tmp_path):
    """The workspace of the tests is linked; a copied build has the launch files, configs and executables too."""
    root = Path(__file__).parents[2]
    command = [str(Path(sys.executable).parent / "colcon"), "--log-base", str(tmp_path / "log"), "build"]
    command += ["--paths", str(root / "ros2_ws/src/carla_digr_ros"), "--packages-ignore", "carla_digr_msgs"]
    command += ["--build-base", str(tmp_path / "build"), "--install-base", str(tmp_path / "install")]
    subprocess.run(command, check=True, capture_output=True, env=live_support.workspace(), cwd=tmp_path)
    prefix = tmp_path / "install/carla_digr_ros"
    share = prefix / "share/carla_digr_ros"
    assert (share / "launch/live.launch.py").read_text() == (root / "launch/live.launch.py").read_text()
    assert not (share / "launch/live.launch.py").is_symlink()
    assert (share / "configs/live.yaml").is_file() and (share / "rviz/live.rviz").is_file()
    assert {path.name for path in (prefix / "lib/carla_digr_ros").iterdir()} >= {"carla_bridge", "explainer", "viewer"}
