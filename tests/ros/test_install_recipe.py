"""docs/ros.md's recipe, command by command, in a fresh home.

The wheels stand in for /opt/ros, as its setup file does: by variables. sudo and rosdep do nothing, and `ros2 launch` is
`carla-digr live`, the same composition.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import live_support
import pytest

from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.drive import read_drive

ROOT = Path(__file__).parents[2]
RECIPE = re.search(
    r"^## Installing on a ROS 2 machine\n.*?\n((?:    [^\n]*\n)+)", (ROOT / "docs/ros.md").read_text(), re.M | re.S
)[1]
LAUNCH = "ros2 launch carla_digr_ros live.launch.py\n"
LISTS = ("AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


@pytest.fixture
def machine(tmp_path) -> dict[str, str]:
    """The variables of a terminal on a machine with ROS 2 and nothing of ours."""
    underlay = live_support.workspace()
    exports = {
        name: os.pathsep.join(p for p in underlay.get(name, "").split(os.pathsep) if p and "carla_digr" not in p)
        for name in LISTS
    }
    exports["PYTHONPATH"] += os.pathsep + sysconfig.get_path("purelib")  # what pip is asked for lies there as well
    defaults = tmp_path / "colcon.yaml"  # what the wheels need to be built against
    defaults.write_text(f"build: {{cmake-args: [-DCMAKE_PROJECT_INCLUDE={ROOT}/ros2_ws/cmake/wheel_targets.cmake]}}\n")
    exports["COLCON_DEFAULTS_FILE"] = str(defaults)
    setup = tmp_path / "opt/ros/kilted/setup.bash"
    setup.parent.mkdir(parents=True)
    setup.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()))
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python3").symlink_to(Path(sys.executable).resolve())
    for name in ("sudo", "rosdep"):
        (binaries / name).write_text("#!/bin/sh\n")
    (binaries / "cmake").symlink_to(Path(sys.executable).with_name("cmake"))
    for path in binaries.iterdir():
        path.chmod(0o755)
    (tmp_path / "home").mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin",
        "ROS_DISTRO": "kilted",
    }


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_recipe_installs_tests_and_drives(machine, tmp_path, domain, monkeypatch):
    assert RECIPE.endswith(LAUNCH)
    commands = RECIPE.replace("REPOSITORY", str(ROOT)).replace("/opt/ros", f"{tmp_path}/opt/ros")
    port, page, bags = live_support.free_port(), live_support.free_port(), tmp_path / "bags"
    live = f"exec carla-digr live --port {port} --viewer-port {page} --lockstep true --record {bags}\n"
    script = "set -e\n" + commands.replace(LAUNCH, live)
    log = tmp_path / "log"
    with log.open("wb") as file:
        drive = subprocess.Popen(
            ["bash", "-c", script], env={**machine, "ROS_DOMAIN_ID": str(domain)}, stdout=file, stderr=file
        )
    try:
        monkeypatch.setattr(live_support, "LIMIT", 2400.0)  # messages are compiled
        live_support.until(
            lambda: drive.poll() is not None or any(f.stat().st_size > 2e6 for f in bags.glob("*/*.mcap"))
        )
        assert drive.poll() is None, log.read_text()
        drive.send_signal(signal.SIGINT)
        assert drive.wait(live_support.LIMIT) == 0, log.read_text()
    finally:
        drive.kill()
    (bag,) = bags.iterdir()
    with open_bag(bag) as opened:
        assert len(read_drive(opened).frames) > 20
    assert "0 errors, 0 failures" in log.read_text()
    home = tmp_path / "home"
    for node in ("explainer", "carla_bridge"):
        first = (home / "ros2_ws/install/carla_digr_ros/lib/carla_digr_ros" / node).read_text().splitlines()[0]
        assert first == f"#!{home}/carla_digr_venv/bin/python3"
