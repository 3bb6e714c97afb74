"""RViz with the drive's displays, where it is installed."""

from carla_digr_ros.launching import RVIZ_ARGUMENTS, declare, rviz
from launch import LaunchDescription
from launch.actions import OpaqueFunction


def generate_launch_description():
    return LaunchDescription([*(declare(argument) for argument in RVIZ_ARGUMENTS), OpaqueFunction(function=rviz)])
