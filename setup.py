from itertools import chain
from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path("carla_digr/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "train": ["stable-baselines3>=2.4", "tensorboard>=2.15", "captum>=0.7", "matplotlib>=3.8"],
    "minigrid": ["minigrid>=3"],
    "atari": ["ale-py>=0.12"],
    "recording": ["rosbags>=0.11", "mcap>=1.2"],
    "carla": ["carla==0.9.16"],
    "ray": ["ray>=2.50"],
}

setup(
    name="carla_digr",
    version=version,
    description="Live driving explainer: policy distillation with selective input-gradient regularisation (DIGR)",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    author="carla_digr contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "explainable reinforcement learning",
        "saliency maps",
        "policy distillation",
        "autonomous driving",
        "CARLA",
        "ROS 2",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["carla_digr", "carla_digr.*"]),
    # configs and recordings/msg are links to configs/ and to the messages of ros2_ws/
    package_data={
        "carla_digr": [
            "configs/*.yaml",
            "recordings/msg/*.msg",
            "weights/*",
            "live/viewer/static/*",
            "live/viewer/static/*/*",
            "py.typed",
        ]
    },
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "numba>=0.60",
        "opencv-python-headless>=4.9",
        "PyYAML>=6",
        "safetensors>=0.4",
        "tqdm>=4.66",
        "msgpack>=1",
        "gymnasium>=1.0",
        "defusedxml>=0.7",
        "aiohttp>=3.9",
        "simplejpeg>=1.7",
        "onnx>=1.16",
        "onnxruntime>=1.20,<1.24",  # see requirements/base.txt
    ],
    extras_require={**EXTRAS, "all": sorted(chain(*EXTRAS.values())), "fuzz": ["atheris>=3"]},
    entry_points={"console_scripts": ["carla-digr = carla_digr.cli:main"]},
)
