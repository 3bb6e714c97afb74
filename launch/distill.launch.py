"""The student, by DIGR. One stage of pipeline.launch.py."""

from carla_digr_ros.launching import included
from launch import LaunchDescription


def generate_launch_description():
    return LaunchDescription([included("pipeline", stages="distill")])
