"""The saliency dataset: the teacher's perturbation maps. One stage of pipeline.launch.py."""

from carla_digr_ros.launching import stage


def generate_launch_description():
    return stage("make_dataset")
