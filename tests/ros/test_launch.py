"""The launch files without a ROS installation: recording stand-ins for `launch` and `launch_ros`.

What is started must exist: executables, parameter files and their parameters, arguments, included files; and it must
be what `carla-digr` starts. Where the real `launch` can be imported, it starts them too.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import live_support
import pytest
import yaml

live_support.workspace()

from carla_digr.config import shipped_configs  # noqa: E402
from carla_digr.errors import UserError  # noqa: E402
from carla_digr.live import composition  # noqa: E402
from carla_digr.live.supervisor import command_line  # noqa: E402
from carla_digr.recordings.bag import open_bag  # noqa: E402
from carla_digr.recordings.drive import read_drive  # noqa: E402
from carla_digr.tasks import load_config  # noqa: E402
from carla_digr.training import STAGES  # noqa: E402

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = sorted(path.name.removesuffix(".launch.py") for path in (ROOT / "launch").glob("*.launch.py"))
REQUIRED = {"replay": {"bag": "there"}}  # arguments without which a launch file starts nothing


# Of the displays in live.rviz, as rviz_default_plugins reads them (its sources, branch kilted).
PROPERTIES = {
    "rviz_default_plugins/Grid": ("Cell Size", "Plane Cell Count", "Reference Frame"),
    "rviz_default_plugins/Image": ("Topic", "Normalize Range", "Min Value", "Max Value"),
    "rviz_default_plugins/Odometry": ("Topic", "Keep", "Shape", "Covariance"),
    "rviz_default_plugins/TF": ("Frames", "Marker Scale", "Show Arrows", "Show Axes", "Show Names"),
    "rviz_default_plugins/MarkerArray": ("Topic", "Namespaces"),
    "rviz_default_plugins/Camera": ("Topic", "Image Rendering", "Overlay Alpha", "Zoom Factor"),
}


class Recorded:
    """An action: what it was made with."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


class LaunchDescription(Recorded):
    def add_action(self, entity):
        self.args[0].append(entity)


class LaunchConfiguration(Recorded):
    def perform(self, context):
        return context.values[self.args[0]]  # KeyError: not declared


def stand_ins(*names: str) -> dict[str, type]:
    return {name: type(name, (Recorded,), {}) for name in names}


MODULES = {
    "launch": {"LaunchDescription": LaunchDescription, **stand_ins("LaunchContext")},
    "launch.action": stand_ins("Action"),
    "launch.actions": stand_ins(
        "DeclareLaunchArgument", "ExecuteProcess", "IncludeLaunchDescription", "LogInfo", "OpaqueFunction", "Shutdown"
    ),
    "launch.event": stand_ins("Event"),
    "launch.launch_description_sources": stand_ins("PythonLaunchDescriptionSource"),
    "launch.substitutions": {"LaunchConfiguration": LaunchConfiguration},
    "launch_ros": {},
    "launch_ros.actions": stand_ins("Node"),
}


class Launched:
    """What a launch file declares and starts, with those it includes, for values of its arguments."""

    def __init__(self, name: str, **values: str):
        self.values, self.arguments, self.actions, self.is_shutdown = dict(values), {}, [], False
        self._include(live_support.installed(f"launch/{name}.launch.py"))
        assert set(values) <= set(self.arguments)

    def _include(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._visit(module.generate_launch_description().args[0])

    def _visit(self, entities: list) -> None:
        for entity in entities:
            kind = type(entity).__name__
            if kind == "DeclareLaunchArgument":
                (name,) = entity.args
                assert self.arguments.get(name, entity.kwargs) == entity.kwargs, f"{name} is declared as two things"
                self.arguments[name] = entity.kwargs
                self.values.setdefault(name, entity.kwargs["default_value"])
                assert entity.kwargs["choices"] is None or self.values[name] in entity.kwargs["choices"]
            elif kind == "IncludeLaunchDescription":
                given = dict(entity.kwargs["launch_arguments"])
                self.values |= given
                self._include(Path(entity.args[0].args[0]))
                assert set(given) <= set(self.arguments)
            elif kind == "OpaqueFunction":
                self._visit(entity.kwargs["function"](self) or [])
            else:
                self.actions.append(entity)

    def of(self, kind: str) -> list[dict]:
        """The arguments of each action of a kind."""
        return [action.kwargs for action in self.actions if type(action).__name__ == kind]

    def end(self, name: str, status: int) -> list:
        """The actions that follow when a process ends."""
        (action,) = (a for a in self.actions if a.kwargs.get("name") == name)
        return action.kwargs["on_exit"](SimpleNamespace(returncode=status), self)


def parameters(node: dict) -> dict:
    """The parameters on a node's command line."""
    arguments = node["ros_arguments"]
    given = [value for flag, value in pairwise(arguments) if flag == "-p"]
    return {name: yaml.safe_load(value) for name, _, value in (item.partition(":=") for item in given)}


@pytest.fixture
def launched(monkeypatch):
    for name, content in MODULES.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "carla_digr_ros.launching", raising=False)
    yield Launched
    sys.modules.pop("carla_digr_ros.launching", None)


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_every_argument_has_description_and_default_and_the_default_is_a_choice(launched, name):
    arguments = launched(name, **REQUIRED.get(name, {})).arguments
    assert arguments
    for argument, settings in arguments.items():
        assert settings["description"], argument
        assert settings["choices"] is None or settings["default_value"] in settings["choices"], argument


@pytest.mark.parametrize(
    ("name", "arguments", "processes", "values"),
    [
        ("live", composition.ARGUMENTS, composition.live, {}),
        (
            "live",
            composition.ARGUMENTS,
            composition.live,
            {"simulator": "carla", "host": "example", "viewer": "false", "lockstep": "true", "record": "there"},
        ),
        ("replay", composition.REPLAY_ARGUMENTS, composition.replay, {"bag": "there"}),
        (
            "replay",
            composition.REPLAY_ARGUMENTS,
            composition.replay,
            {"bag": "there", "method": "gb", "rate": "0.5", "loop": "True", "remap": "/a:=/b", "viewer": "False"},
        ),
        (
            "live",
            composition.ARGUMENTS,
            composition.live,
            {"namespace": "car2", "params_file": __file__, "log_level": "debug", "lockstep": "True"},
        ),
    ],
)
def test_a_launch_starts_what_the_command_line_starts(launched, name, arguments, processes, values):
    launch = launched(name, rviz="false", **values)
    assert set(launch.arguments) == {argument.name for argument in arguments} | {"rviz"}  # its namespace is the drive's
    expected = processes({a.name: a.default for a in arguments} | values)
    assert [action.kwargs["name"] for action in launch.actions] == [process.name for process in expected]
    for started, process in zip(launch.actions, expected, strict=True):
        command = command_line(process, live_support.workspace())
        if process.module:
            assert started.kwargs["cmd"] == command
        else:
            assert started.kwargs["ros_arguments"] == command[command.index("--params-file") :]
            assert parameters(started.kwargs) == dict(process.parameters)


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_every_executable_exists_and_declares_the_parameters_it_is_given(launched, name):
    for node in launched(name, **REQUIRED.get(name, {})).of("Node"):
        if node["package"] != composition.PACKAGE:
            continue
        executable = node["executable"]
        flag, file, *_ = node["ros_arguments"]
        assert flag == "--params-file"
        given = set(parameters(node))
        given |= set(yaml.safe_load(Path(file).read_text()).get(f"/**/{executable}", {}).get("ros__parameters", {}))
        code = Path(importlib.util.find_spec(f"carla_digr_ros.{executable}").origin).read_text()
        for parameter in given:
            assert f'"{parameter}"' in code, f"{executable} does not declare {parameter}"
        command, *_ = command_line(composition.Process(executable), live_support.workspace())
        assert os.access(command, os.X_OK)


def test_the_end_of_a_process_ends_the_launch_with_its_reason(launched):
    drive = launched("live", rviz="false")
    for status, reason in ((2, "explainer ended with status 2"), (-9, "explainer was killed by SIGKILL")):
        with pytest.raises(UserError, match=reason):
            drive.end("explainer", status)
    with pytest.raises(UserError, match="simulator ended with status 0"):
        drive.end("simulator", 0)
    (end,) = drive.end("explainer", 0)  # by the shutdown transition
    assert (type(end).__name__, end.kwargs["reason"]) == (
        "Shutdown",
        "explainer has been shut down, so everything ends",
    )
    drive.is_shutdown = True
    assert drive.end("explainer", -2) == []


def test_the_bridge_is_started_again_a_few_times_when_a_signal_kills_it(launched):
    drive = launched("live", rviz="false")
    for left in reversed(range(composition.BRIDGE_RESPAWNS)):
        notice, again = drive.end("carla_bridge", -6)
        assert f"killed by SIGABRT; starting it again ({left} more" in notice.kwargs["msg"]
        (bridge,) = (node for node in drive.of("Node") if node["name"] == "carla_bridge")
        assert again.kwargs["ros_arguments"] == bridge["ros_arguments"]
        with pytest.raises(UserError, match="carla_bridge ended with status 2"):
            drive.end("carla_bridge", 2)
        drive.actions = [again]
    with pytest.raises(UserError, match="carla_bridge was killed by SIGABRT"):
        drive.end("carla_bridge", -6)


def test_onlookers_are_started_again_a_few_times_and_then_left_out(launched):
    drive = launched("live", rviz="false", record="there")
    for name in ("viewer", "recorder"):
        with pytest.raises(UserError, match=f"{name} ended with status 2"):  # bad input
            drive.end(name, 2)
        for status in (-9, 1, 2):
            notice, again = drive.end(name, status)
            assert f"{name} " in notice.kwargs["msg"] and "starting it again" in notice.kwargs["msg"]
            drive.actions = [action for action in drive.actions if action.kwargs["name"] != name] + [again]
        (notice,) = drive.end(name, -9)
        assert notice.kwargs["msg"] == f"{name} was killed by SIGKILL once more; the drive goes on without it"


def command_of(action) -> list[str]:
    """The command line that `launch` and `launch_ros` make of an action."""
    given = action.kwargs
    prefix = shlex.split(given["prefix"])
    if "cmd" in given:
        return [*prefix, *given["cmd"]]
    executable, *_ = command_line(composition.Process(given["executable"]), live_support.workspace())
    return [*prefix, executable, *given["arguments"], "--ros-args", *given["ros_arguments"]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_everything_ends_tidily_by_itself_when_the_launch_is_killed(launched, domain, tmp_path, number):
    bags, port, page = tmp_path / "bags", live_support.free_port(), live_support.free_port()
    values = {"record": str(bags), "port": str(port), "viewer_port": str(page), "rviz": "false"}
    commands = [command_of(action) for action in launched("live", **values).actions]
    for command in commands:  # the simulator ends with the process that composes the drive, which starts it too
        if "--parent" in command:
            command[command.index("--parent") + 1] = "OWN"
    parent = (
        "import json, os, subprocess, sys, time\n"
        "own = {'OWN': str(os.getpid())}\n"
        "commands = [[own.get(word, word) for word in command] for command in json.loads(sys.argv[1])]\n"
        "children = [subprocess.Popen(command) for command in commands]\n"
        "time.sleep(3600)\n"
    )
    mark = f"CARLA_DIGR_TEST={tmp_path}"
    environment = {**live_support.workspace(), "ROS_DOMAIN_ID": str(domain), "CARLA_DIGR_TEST": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        launch = subprocess.Popen(
            [sys.executable, "-c", parent, json.dumps(commands)], env=environment, stdout=log, stderr=log
        )

    def alive() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    try:
        live_support.until(lambda: any(file.stat().st_size > 1_000_000 for file in bags.glob("*/*.mcap")))
        assert len(alive()) == len(commands) + 1
        launch.send_signal(number)
        launch.wait(live_support.LIMIT)
        killed = time.monotonic()
        last = {}

        def gone() -> bool:
            for pid in alive():
                with contextlib.suppress(OSError):
                    last[Path(f"/proc/{pid}/comm").read_text().strip(), pid] = time.monotonic() - killed
            return not alive()

        live_support.until(gone)
        # 15 s; a machine on which two cores do the work of five others gets more.
        assert max(last.values()) < 15.0 * max(1.0, os.getloadavg()[0] / 5.0), last
    finally:
        for pid in alive():
            os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and "[ERROR]" not in said, said
    with open_bag(next(bags.iterdir())) as opened:
        assert len(read_drive(opened).frames) >= 5


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_while_a_node_starts_ends_it_without_a_word(launched, domain, moment):
    environment = {**live_support.workspace(), "ROS_DOMAIN_ID": str(domain)}
    (viewer,) = (a for a in launched("live", rviz="false").actions if a.kwargs["name"] == "viewer")
    process = subprocess.Popen(
        command_of(viewer), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # What is tested is the moment; the first ones are before the node's own first line.
    live_support.until(lambda: Path(f"/proc/{process.pid}/comm").read_text().strip() == "viewer")
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=live_support.LIMIT)
    assert process.returncode == 0
    assert not said.strip() or composition.PAGE_IS_AT in said  # where it had begun


def test_a_pipeline_runs_one_stage_after_the_other(launched):
    pipeline = launched("pipeline", task="driving", out="there", seed="7")
    ran = []
    while True:
        (service, stage) = pipeline.actions
        assert service.kwargs["executable"] == "stages" and stage.kwargs["executable"] == "run_stage"
        ran.append(parameters(stage.kwargs)["stage"])
        assert parameters(stage.kwargs) == {"config": "driving", "out": "there", "seed": 7, "stage": ran[-1]}
        with pytest.raises(UserError, match="run_stage ended with status 2"):
            pipeline.end("run_stage", 2)
        (then,) = pipeline.end("run_stage", 0)
        if type(then).__name__ == "Shutdown":
            break
        pipeline.actions = [service, then]
    assert ran == [stage.name.replace("-", "_") for stage in STAGES]
    with pytest.raises(UserError, match="stages ended with status 0"):
        pipeline.end("stages", 0)


@pytest.mark.parametrize("name", ["train_teacher", "make_dataset", "distill"])
def test_a_stage_is_a_pipeline_of_one(launched, name):
    launch = launched(name, config="mine.yaml")
    assert set(launch.arguments) == set(launched("pipeline").arguments) - {"stages"}  # which would change nothing
    (stage,) = (node for node in launch.of("Node") if node["executable"] == "run_stage")
    assert parameters(stage) == {"config": "mine.yaml", "out": "", "stage": name}
    assert type(launch.end("run_stage", 0)[0]).__name__ == "Shutdown"


def test_every_task_has_an_installed_configuration_of_its_name(launched):
    assert launched("pipeline").arguments["task"]["choices"] == list(shipped_configs())
    for name in shipped_configs():
        assert load_config(live_support.installed(f"configs/{name}.yaml")) == load_config(name)


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        (
            "pipeline",
            {"stages": "train_teacher,distil"},
            "stages must be some of train_teacher,make_dataset,",
        ),
        ("pipeline", {"seed": "-1"}, "seed must be a whole number"),
        ("live", {"port": "x"}, "port must be a whole number"),
        ("replay", {}, "Name the recording to replay"),
        ("live", {"namespace": "2 cars"}, "namespace must be a name such as car2"),
        ("live", {"params_file": "/none.yaml"}, "There is no parameter file /none.yaml."),
    ],
)
def test_a_wrong_value_is_one_sentence(launched, name, values, sentence):
    with pytest.raises(UserError, match=sentence):
        launched(name, **values)


def test_the_end_of_a_recording_is_the_good_end_of_a_replay(launched):
    replay = launched("replay", bag="there", rviz="false")
    assert type(replay.end("player", 0)[0]).__name__ == "Shutdown"
    with pytest.raises(UserError, match="viewer ended with status 0"):
        replay.end("viewer", 0)


def test_rviz_is_started_only_where_it_is_installed(launched, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (notice,) = launched("live").of("LogInfo")
    assert "RViz is not installed" in notice["msg"]
    rviz = tmp_path / "rviz2"
    rviz.touch(mode=0o755)
    (node,) = (node for node in launched("live").of("Node") if node["package"] == "rviz2")
    assert (node["executable"], node["arguments"][0]) == ("rviz2", "-d")
    displays = yaml.safe_load(Path(node["arguments"][1]).read_text())["Visualization Manager"]["Displays"]
    from carla_digr_ros import topics

    for display in displays:
        assert set(display) <= {"Class", "Name", "Enabled", *PROPERTIES[display["Class"]]}, display["Name"]
    assert set(PROPERTIES) == {display["Class"] for display in displays}
    names = {topic.name for topic in topics.TOPICS}
    shown = [display["Topic"] for display in displays if "Topic" in display]
    assert {topic["Value"] for topic in shown} <= names and len(shown) >= 4
    for topic in shown:  # as in the table, else RViz shows nothing
        assert (topic["Reliability Policy"], topic["Durability Policy"]) == ("Reliable", "Volatile")
        assert (topic["History Policy"], topic["Depth"]) == ("Keep Last", topics.QOS.depth)


def test_rviz_looks_into_the_namespace_of_its_drive(launched, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "rviz2").touch(mode=0o755)
    (node,) = (node for node in launched("live", namespace="/a/car2").of("Node") if node["package"] == "rviz2")
    assert node["parameters"] == [{"use_sim_time": True}]
    assert dict(node["remappings"]) == {name: f"/a/car2{name}" for name in ("/clock", "/tf", "/tf_static")}
    here, there = (
        yaml.safe_load(Path(path).read_text())["Visualization Manager"]["Displays"]
        for path in (live_support.installed("rviz/live.rviz"), node["arguments"][1])
    )
    for display, moved in zip(here, there, strict=True):
        if "Topic" in display:
            display["Topic"]["Value"] = f"/a/car2{display['Topic']['Value']}"
        assert moved == display


def test_what_the_package_imports_of_ros_it_depends_on():
    package = ROOT / "ros2_ws/src/carla_digr_ros"
    imported = set()
    for path in [*package.glob("carla_digr_ros/*.py"), *(ROOT / "launch").glob("*.launch.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
    depends = {element.text for element in ElementTree.parse(package / "package.xml").iter("exec_depend")}
    depends -= {
        "rviz2",
        "python3-numpy",
        "python3-opencv",
        "python3-yaml",
    }
    ros = {name for name in imported if name.endswith("_msgs") or name in depends or name in ("rclpy", "std_srvs")}
    assert ros == depends and {"rclpy", "launch", "launch_ros", "carla_digr_msgs"} <= depends


def test_the_package_builds_and_is_tested_copied_into_a_fresh_workspace(tmp_path):
    """The workspace of the tests is linked; a copied build has the launch files, configs and executables too."""
    shutil.copytree(ROOT / "ros2_ws/src/carla_digr_ros", tmp_path / "src/carla_digr_ros", symlinks=False)
    colcon = [str(Path(sys.executable).parent / "colcon"), "--log-base", str(tmp_path / "log")]
    bases = ["--build-base", str(tmp_path / "build"), "--install-base", str(tmp_path / "install")]

    def run(*command: str) -> str:
        done = subprocess.run(
            [*colcon, *command], capture_output=True, text=True, env=live_support.workspace(), cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("build", "--base-paths", str(tmp_path / "src"), "--allow-overriding", "carla_digr_ros", *bases)
    run("test", "--base-paths", str(tmp_path / "src"), *bases)
    assert "3 tests, 0 errors, 0 failures" in run("test-result", "--test-result-base", str(tmp_path / "build"))
    prefix = tmp_path / "install/carla_digr_ros"
    sources = {"launch": "launch", "configs": "configs", "rviz": "ros2_ws/src/carla_digr_ros/rviz"}
    for part, source in sources.items():
        copied = {path.name: path.read_bytes() for path in (prefix / "share/carla_digr_ros" / part).iterdir()}
        assert copied == {path.name: path.read_bytes() for path in (ROOT / source).iterdir() if path.is_file()}
        assert not any(path.is_symlink() for path in (prefix / "share/carla_digr_ros" / part).iterdir())
    executables = {path.name for path in (prefix / "lib/carla_digr_ros").iterdir()}
    assert executables >= {"carla_bridge", "explainer", "viewer", "measure"}


@pytest.mark.skipif(shutil.which("ros2") is None, reason="needs a ROS 2 installation")
@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_ros2_launch_lists_the_arguments(launched, name):
    command = ["ros2", "launch", composition.PACKAGE, f"{name}.launch.py", "--show-args"]
    listed = subprocess.run(command, env=live_support.workspace(), capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^    '(\w+)':$", listed, re.MULTILINE) == list(
        launched(name, **REQUIRED.get(name, {})).arguments
    )
