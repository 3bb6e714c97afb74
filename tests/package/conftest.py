"""The wheel in a virtual environment that has what the package itself needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = (
    "carla_digr",
    "configs",
    "ros2_ws/src/carla_digr_msgs/msg",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def applying(requirements: list[str], extra: str = "") -> list[Requirement]:
    """Those requirements that hold here and with an extra."""
    parsed = [Requirement(text) for text in requirements]
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": extra})]


def distributions(requirements: list[str], extra: str = "") -> dict[str, metadata.Distribution]:
    """Installed distributions that a package's requirements name, and those that these need, by name."""
    found: dict[str, metadata.Distribution] = {}
    todo = applying(requirements, extra)
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-")
        if name not in found:
            found[name] = metadata.distribution(name)
            todo += applying(found[name].requires or [])
    return found


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Make what a distribution has in this Python's site-packages visible in another one."""
    installed = Path(sysconfig.get_path("purelib"))
    for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        target = site / name
        if not target.exists():
            target.symlink_to(installed / name)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this source tree, built in a copy of it."""
    source, out = tmp_path_factory.mktemp("source") / "carla_digr", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def clean_venv(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; no extras, no ROS, no CARLA client."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    package = next(iter(metadata.Distribution.discover(path=[str(wheel)])))
    for distribution in distributions(package.requires or []).values():
        link(distribution, site)
    for name in ("stable_baselines3", "captum", "matplotlib", "carla", "rclpy", "minigrid", "rosbags"):
        assert not (site / name).exists()
    pip("--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return venv


@pytest.fixture
def run(clean_venv, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of the clean virtual environment, in an empty directory."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "AMENT_PREFIX_PATH", "PYTHONHOME")
    }

    def run(program: str, *arguments: object, extra: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(clean_venv / "bin" / program), *map(str, arguments)]
        with_extra = {"PYTHONPATH": str(_extra(extra, clean_venv, tmp_path))} if extra else {}
        return subprocess.run(
            command, env=environment | with_extra, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )

    return run


def _extra(name: str, venv: Path, tmp_path: Path) -> Path:
    """A directory with what an extra installs."""
    site = tmp_path / f"extra_{name}"
    site.mkdir()
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    package = next(iter(metadata.Distribution.discover(name="carla_digr", path=[str(installed)])))
    for distribution in distributions(package.requires or [], name).values():
        link(distribution, site)
    return site


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
