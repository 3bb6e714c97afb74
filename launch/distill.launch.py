"""The student, by DIGR. One stage of pipeline.launch.py."""

from carla_digr_ros.launching import stage


def generate_launch_description():
    return stage("distill")
