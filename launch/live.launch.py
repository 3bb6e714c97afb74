"""The live drive: simulator (unless a CARLA server is used), bridge, explainer, web page, RViz.

The same composition as `carla-digr live`; see carla_digr/live/composition.py. The death of one process ends the
launch.
"""

import shutil
import sys
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, LogInfo, OpaqueFunction
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from carla_digr.live.composition import ARGUMENTS, PACKAGE, PARAMETERS_FILE, live


def generate_launch_description():
    arguments = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            choices=list(argument.choices) or None,
        )
        for argument in ARGUMENTS
    ]
    rviz = DeclareLaunchArgument(
        "rviz", default_value="true", description="open RViz, if it is installed", choices=["true", "false"]
    )
    return LaunchDescription([*arguments, rviz, OpaqueFunction(function=processes)])


def processes(context):
    def value(name):
        return LaunchConfiguration(name).perform(context)

    share = Path(get_package_share_directory(PACKAGE))
    actions = [
        start(process, share / PARAMETERS_FILE)
        for process in live({argument.name: value(argument.name) for argument in ARGUMENTS})
    ]
    if value("rviz") == "true":
        if shutil.which("rviz2"):
            actions.append(Node(package="rviz2", executable="rviz2", arguments=["-d", str(share / "rviz/live.rviz")]))
        else:
            actions.append(LogInfo(msg="RViz is not installed (package ros-$ROS_DISTRO-rviz2): going on without it."))
    return actions


def start(process, parameters):
    over = EmitEvent(event=Shutdown(reason=f"{process.name} has ended, so the drive is over"))
    if process.module:
        command = [sys.executable, "-m", process.module, *process.arguments]
        return ExecuteProcess(cmd=command, name=process.name, output="screen", on_exit=[over])
    return Node(
        package=PACKAGE,
        executable=process.name,
        name=process.name,
        parameters=[str(parameters), dict(process.parameters)],
        output="screen",
        on_exit=[over],
    )
