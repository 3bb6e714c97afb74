"""RViz with the drive's displays, where it is installed."""

import shutil

from carla_digr_ros.launching import SHARE, declare
from launch import LaunchDescription
from launch.actions import LogInfo, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from carla_digr.live.composition import Argument

RVIZ = Argument("rviz", "true", "open RViz, if it is installed", ("true", "false"))


def generate_launch_description():
    return LaunchDescription([declare(RVIZ), OpaqueFunction(function=rviz)])


def rviz(context):
    if LaunchConfiguration(RVIZ.name).perform(context) == "false":
        return []
    if shutil.which("rviz2") is None:
        return [LogInfo(msg="RViz is not installed (package ros-$ROS_DISTRO-rviz2): going on without it.")]
    return [Node(package="rviz2", executable="rviz2", arguments=["-d", str(SHARE / "rviz/live.rviz")])]
