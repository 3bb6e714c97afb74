"""The saliency dataset: the teacher's perturbation maps. One stage of pipeline.launch.py."""

from carla_digr_ros.launching import included
from launch import LaunchDescription


def generate_launch_description():
    return LaunchDescription([included("pipeline", stages="make_dataset")])
