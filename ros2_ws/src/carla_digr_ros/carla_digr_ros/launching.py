"""What the launch files share: arguments and processes of a composition as actions of `launch`.

Imported by launch files only: the wheels of ROS 2 have no `launch`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

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

from carla_digr.errors import UserError, ending
from carla_digr.live.composition import PACKAGE, Argument, Process, restart_notice

SHARE = Path(get_package_share_directory(PACKAGE))


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
        rest = [start(process) for process in started if not process.finite]
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


def start(process: Process, then: Sequence[Process] = ()) -> Action:
    """The action that starts a process.

    When a finite process has ended well, the first of ``then`` follows, or all is done. Any other end is an error that
    ends the launch, unless a signal killed a process that may respawn.
    """

    def ended(event: Event, context: LaunchContext) -> list[Action]:
        if context.is_shutdown:
            return []
        if event.returncode < 0 and process.respawns:
            again = process.again()
            return [LogInfo(msg=restart_notice(again, event.returncode)), start(again, then)]
        if event.returncode == 0 and process.finite:
            if then:
                return [start(then[0], then[1:])]
            return [Shutdown(reason=f"{process.name} is done")]
        # An exception, not a Shutdown: both end the launch, but only this makes its exit status 1.
        raise UserError(f"{process.name} {ending(event.returncode)}, so everything ends; its last words are above.")

    if process.module:
        command = [sys.executable, "-m", process.module, *process.arguments]
        return ExecuteProcess(cmd=command, name=process.name, output="screen", on_exit=ended)
    return Node(
        package=PACKAGE,
        executable=process.name,
        name=process.name,
        arguments=list(process.arguments),
        ros_arguments=process.ros_arguments(SHARE),
        output="screen",
        on_exit=ended,
    )
