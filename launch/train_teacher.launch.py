"""The teacher, by PPO. One stage of pipeline.launch.py."""

from carla_digr_ros.launching import stage


def generate_launch_description():
    return stage("train_teacher")
