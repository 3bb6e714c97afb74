import os
import sys
from pathlib import Path

from setuptools import setup

NAME = "carla_digr_ros"
PACKAGE = Path(__file__).resolve().parent


def files(directory: Path, pattern: str) -> list[str]:
    # colcon builds from the source directory or, with --symlink-install, from a directory of links to it.
    found = [os.path.relpath(path) for path in sorted(directory.glob(pattern))]
    if not found:  # links that lead nowhere
        sys.exit(f"{directory} is empty: copy the package with what its links lead to (cp -rL), or link to it.")
    return found


setup(
    name=NAME,
    version="0.1.0",
    description="ROS 2 nodes of carla_digr",
    license="Apache-2.0",
    packages=[NAME],
    install_requires=["setuptools", "carla_digr"],
    extras_require={"test": ["pytest"]},  # by which colcon knows how to test
    zip_safe=True,
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", files(PACKAGE / "launch", "*.launch.py")),
        (f"share/{NAME}/configs", files(PACKAGE / "configs", "*.yaml")),
        (f"share/{NAME}/rviz", files(PACKAGE / "rviz", "*.rviz")),
    ],
    entry_points={
        "console_scripts": [
            "carla_bridge = carla_digr_ros.executables:carla_bridge",
            "explainer = carla_digr_ros.executables:explainer",
            "viewer = carla_digr_ros.executables:viewer",
            "recorder = carla_digr_ros.executables:recorder",
            "stages = carla_digr_ros.executables:stages",
            "run_stage = carla_digr_ros.executables:run_stage",
            "player = carla_digr_ros.executables:player",
            "measure = carla_digr_ros.executables:measure",
            "ctl = carla_digr_ros.executables:ctl",
        ]
    },
)
