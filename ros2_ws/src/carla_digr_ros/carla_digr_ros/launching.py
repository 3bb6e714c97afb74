"""What the launch files share: arguments and processes of a composition as actions of `launch`.

Imported by launch files only: the wheels of ROS 2 have no `launch`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml
from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.action import Action
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    LogInfo,
    OpaqueFunction,
    Shutdown,
)
from launch.event import Event
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from carla_digr.config import shipped_configs
from carla_digr.errors import UserError, ending
from carla_digr.live.composition import (
    NODES,
    PACKAGE,
    YES_NO,
    Argument,
    Process,
    in_place,
    restart_notice,
    shutdown_notice,
    whole_number,
)
from carla_digr.recordings import topics as names
from carla_digr.training import STAGES

SHARE = Path(get_package_share_directory(PACKAGE))
# A process is asked to end when the launch is gone, whatever killed it; and a Ctrl-C that comes while its Python starts
# waits until it can be answered without a traceback.
PREFIX = "setpriv --pdeathsig TERM -- env --block-signal=INT" if shutil.which("setpriv") else None
STAGE_NAMES = [stage.name.replace("-", "_") for stage in STAGES]
STAGE_ARGUMENTS = (
    Argument("task", "red_fetch_green", "the configuration that ships which is used", tuple(shipped_configs())),
    Argument("config", "", "a YAML file to use instead of one that ships"),
    Argument("out", "", "directory of results and saved states (empty: runs/<task>)"),
    Argument("seed", "", "replaces the configuration's seed (empty: does not)"),
    *NODES,
)
RVIZ_ARGUMENTS = (Argument("rviz", "true", "open RViz, if it is installed", YES_NO), NODES[0])


def composed(
    arguments: Iterable[Argument], processes: Callable[[Mapping[str, str]], list[Process]]
) -> LaunchDescription:
    """A launch description with the arguments of a composition, which starts its processes.

    Its finite processes run one after the other, the others all the time.

    Args:
        arguments: what can be set.
        processes: from a text for each argument, what runs.
    """
    arguments = list(arguments)

    def begin(context: LaunchContext) -> list[Action]:
        values = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in arguments}
        started = processes(values)
        finite = [process for process in started if process.finite]
        rest = [start(process, endless=not finite) for process in started if not process.finite]
        return [*rest, *(start(process, finite[1:]) for process in finite[:1])]

    return LaunchDescription([*(declare(argument) for argument in arguments), OpaqueFunction(function=begin)])


def declare(argument: Argument) -> DeclareLaunchArgument:
    """One argument, as `--show-args` lists it."""
    return DeclareLaunchArgument(
        argument.name,
        default_value=argument.default,
        description=argument.description,
        choices=list(argument.choices) or None,
    )


def included(name: str, **values: str) -> IncludeLaunchDescription:
    """Another launch file of this package, with values for its arguments."""
    source = PythonLaunchDescriptionSource(str(SHARE / "launch" / f"{name}.launch.py"))
    return IncludeLaunchDescription(source, launch_arguments=list(values.items()))


def stage(name: str) -> LaunchDescription:
    """A launch description that runs one of STAGE_NAMES."""
    return composed(STAGE_ARGUMENTS, partial(run_stages, [name]))


def run_stages(names: Sequence[str], values: Mapping[str, str]) -> list[Process]:
    """The processes that run offline stages one after the other: the node `stages` runs them, `run_stage` asks for one.

    Args:
        names: of the stages, in their order.
        values: one text for each of STAGE_ARGUMENTS.

    Raises:
        UserError: a value is not of its argument's kind.
    """
    parameters: dict[str, bool | int | float | str | list[str]] = {"config": values["config"] or values["task"]}
    parameters["out"] = values["out"]
    if values["seed"]:
        parameters["seed"] = whole_number("seed", values["seed"], 0, 2**31 - 1)
    asking = [Process("run_stage", parameters={**parameters, "stage": name}, finite=True) for name in names]
    return in_place([Process("stages"), *asking], values)


def rviz(context: LaunchContext) -> list[Action]:
    """RViz with the drive's displays, where it is installed and wanted."""
    wanted, namespace = (LaunchConfiguration(argument.name).perform(context) for argument in RVIZ_ARGUMENTS)
    if wanted.lower() == "false":
        return []
    if shutil.which("rviz2") is None:
        return [LogInfo(msg="RViz is not installed (package ros-$ROS_DISTRO-rviz2): going on without it.")]
    (process,) = in_place([Process("rviz2")], {"namespace": namespace, "params_file": "", "log_level": ""})
    moved = [(name, f"{process.namespace}{name}") for name in (names.CLOCK, names.TF, names.TF_STATIC)]
    return [
        Node(
            package="rviz2",
            executable="rviz2",
            arguments=["-d", str(rviz_file(process.namespace))],
            parameters=[{"use_sim_time": True}],
            remappings=moved if process.namespace else [],
            prefix=PREFIX,
        )
    ]


def rviz_file(namespace: str) -> Path:
    """live.rviz, or a temporary copy of it with the topics in a namespace."""
    shipped = SHARE / "rviz/live.rviz"
    if not namespace:
        return shipped
    config = yaml.safe_load(shipped.read_text())
    for display in config["Visualization Manager"]["Displays"]:
        if "Topic" in display:
            display["Topic"]["Value"] = f"{namespace}{display['Topic']['Value']}"
    with tempfile.NamedTemporaryFile("w", prefix="live-", suffix=".rviz", delete=False) as file:
        yaml.safe_dump(config, file, sort_keys=False)
    return Path(file.name)


def start(process: Process, then: Sequence[Process] = (), endless: bool = False) -> Action:
    """The action that starts a process.

    When a finite process has ended well, the first of ``then`` follows, or all is done. In an ``endless`` launch all is
    done too when a node was shut down. Any other end is an error that ends the launch, unless the drive goes on after
    it (`Process.ends_everything`).
    """

    def ended(event: Event, context: LaunchContext) -> list[Action]:
        if context.is_shutdown:
            return []
        if event.returncode == 0 and process.finite:
            if then:
                return [start(then[0], then[1:])]
            return [Shutdown(reason=f"{process.name} is done")]
        if event.returncode == 0 and endless and not process.module:
            return [Shutdown(reason=shutdown_notice(process))]
        if process.ends_everything(event.returncode):
            # An exception, not a Shutdown: both end the launch, but only this makes its exit status 1.
            raise UserError(f"{process.name} {ending(event.returncode)}, so everything ends; its last words are above.")
        again = process.again()
        restarts = [start(again, then, endless)] if again else []
        return [LogInfo(msg=restart_notice(process, event.returncode)), *restarts]

    if process.module:
        command = [sys.executable, "-m", process.module, *process.arguments]
        return ExecuteProcess(cmd=command, name=process.name, prefix=PREFIX, output="screen", on_exit=ended)
    return Node(
        package=PACKAGE,
        executable=process.name,
        name=process.name,
        arguments=list(process.arguments),
        ros_arguments=process.ros_arguments(SHARE),
        prefix=PREFIX,
        output="screen",
        on_exit=ended,
    )
