"""Nodes without a package that an extra installs: one sentence and status 2."""

from __future__ import annotations

import subprocess
import sys

import live_support
import pytest

from carla_digr.errors import EXTRAS


def told(package):
    return f"carla-digr: This needs the package {package}: pip install 'carla_digr[{EXTRAS[package]}]'.\n"


@pytest.mark.parametrize(
    ("node", "package", "parameters"),
    [
        ("recorder", "rosbags", []),
        ("player", "backports", []),
        ("carla_bridge", "carla", []),
        ("explainer", "torch", []),
        ("viewer", "aiohttp", []),
        ("stages", "tf2_msgs", []),
        ("explainer", "captum", ["--ros-args", "-p", "method:=ig"]),  # not with the first map, but before the drive
    ],
)
def test_a_node_says_which_extra_it_needs(node, package, parameters, tmp_path):
    environment = live_support.without(package, tmp_path, live_support.workspace())
    script = f"from carla_digr_ros.executables import {node}; {node}()"
    done = subprocess.run(
        [sys.executable, "-c", script, *parameters], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert package not in EXTRAS or done.stderr.replace("backports.zstd", "backports") == told(package)
    (line,) = done.stderr.splitlines()
    assert line.startswith("carla-digr: This needs the ") and package in line


def test_a_node_without_the_library_says_so(tmp_path):
    environment = live_support.without("carla_digr", tmp_path, live_support.workspace())
    script = "from carla_digr_ros.executables import viewer; viewer()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "This needs the Python package carla_digr" in done.stderr
