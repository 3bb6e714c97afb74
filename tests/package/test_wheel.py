"""What somebody has who installed the wheel, without extras, ROS or CARLA."""

from __future__ import annotations

import re
import zipfile
from importlib import metadata
from pathlib import Path

import drive_bags
import pytest

import carla_digr
from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.files import sha256_of

ROOT = Path(__file__).parents[2]
STUDENT = WEIGHTS_DIRECTORY / "driving_student.safetensors"


def sentence(result) -> str:
    """Standard error of a command that was refused: one sentence, no traceback."""
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"carla-digr: [A-Z][^\n]*\.\n", result.stderr), result.stderr
    return result.stderr


def test_the_wheel_has_all_that_the_source_tree_has(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "carla_digr").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [ROOT / "carla_digr" / "configs" / path.name for path in (ROOT / "configs").glob("*.yaml")]
    missing = {str(path.relative_to(ROOT)) for path in files} - inside
    assert not missing
    assert "carla_digr/py.typed" in inside


def test_metadata_is_complete(wheel):
    package = next(iter(metadata.Distribution.discover(path=[str(wheel)]))).metadata
    assert package["Version"] == carla_digr.__version__
    for key in ("Author", "License", "Summary", "Keywords", "Requires-Python", "Description-Content-Type"):
        assert package[key], key
    assert package.get_payload().startswith("!["), "the README is the long description"
    extras = {"train", "minigrid", "atari", "recording", "carla", "all"}
    assert extras <= set(package.get_all("Provides-Extra"))


def test_the_version_is_the_same_everywhere():
    found = {
        path.relative_to(ROOT): re.search(pattern, path.read_text(), re.MULTILINE)[1]
        for pattern, paths in (
            (r"<version>(.*)</version>", sorted(ROOT.glob("ros2_ws/src/*/package.xml"))),
            (r'^version: "?([^"\n]*)', [ROOT / "CITATION.cff"]),
            (r'^    version="(.*)",', [ROOT / "ros2_ws/src/carla_digr_ros/setup.py"]),
            (r"^## (\S+)", [ROOT / "CHANGELOG.md"]),
        )
        for path in paths
    }
    assert set(found.values()) == {carla_digr.__version__}, found


def test_a_missing_extra_is_one_sentence_and_configs_are_found_by_name(run):
    for job in (["train-teacher", "red_fetch_green"], ["evaluate", "red_fetch_green", "--quick"]):
        assert "pip install 'carla_digr[train]'" in sentence(run("carla-digr", *job))
    assert "did you mean 'driving'?" in sentence(run("carla-digr", "evaluate", "drivin"))
    assert "pip install 'carla_digr[recording]'" in sentence(run("carla-digr", "view", "bag"))


def test_configs_are_package_resources(run):
    result = run(
        "python", "-c", "import importlib.resources as r; print((r.files('carla_digr.configs') / 'live.yaml'))"
    )
    assert Path(result.stdout.strip()).is_file(), result.stderr


def test_live_says_what_is_missing_and_how_to_get_it(run):
    said = sentence(run("carla-digr", "live"))
    assert "carla_digr_ros" in said and "make live" in said


@pytest.mark.parametrize("job", ["live", "explain", "evaluate", "view", "simulator"])
def test_help_needs_no_extra(run, job):
    assert run("carla-digr", job, "--help").returncode == 0


def test_the_public_functions_work(run, tmp_path):
    script = """
import sys, numpy as np, carla_digr
assert "torch" not in sys.modules
policy = carla_digr.load_policy("driving_student")
frames = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
decisions = carla_digr.decide(policy, frames)
for method in ("digr", "linear"):
    maps = carla_digr.explain(policy, frames, method, target="brake")
    assert maps.shape == (2, 128, 128) and maps.max() == 1
assert carla_digr.overlay(frames[0], maps[0]).shape == (128, 128, 3)
assert "captum" not in sys.modules and len(carla_digr.METHODS) >= 9
np.savez("frames.npz", frames=frames)
try:
    carla_digr.explain(policy, frames, "ig")
except carla_digr.errors.UserError as error:
    assert "pip install 'carla_digr[train]'" in str(error)
else:
    raise AssertionError("captum is here")
"""
    result = run("python", "-c", script)
    assert result.returncode == 0, result.stderr
    result = run("carla-digr", "explain", "frames.npz", "--weights", "driving_student", "--out", "maps")
    assert result.returncode == 0 and (tmp_path / "maps" / "maps.npz").is_file(), result.stderr
    said = sentence(
        run("carla-digr", "explain", "frames.npz", "--weights", "driving_student", "--method", "ig", "--out", "b")
    )
    assert "pip install 'carla_digr[train]'" in said


@pytest.mark.parametrize("order", ["carla_digr, gymnasium", "gymnasium, carla_digr"])
def test_gymnasium_makes_the_driving_environment(run, order):
    script = (
        f"import {order}; environment = gymnasium.make('carla_digr/Driving-v0'); "
        "print(environment.observation_space.shape, environment.action_space.n)"
    )
    result = run("python", "-c", script)
    assert result.stdout.strip() == "(128, 128, 3) 4", result.stderr


def test_importing_the_package_imports_next_to_nothing(run):
    script = (
        "import sys; before = set(sys.modules); import carla_digr; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert run("python", "-c", script).stdout.split() == ["carla_digr"]


def test_a_recording_is_explained(run, tmp_path):
    drive = drive_bags.DriveRecorder(tmp_path / "drive", policy_hash=sha256_of(STUDENT)[:12])
    drive.frame(1)
    drive.close()
    result = run("carla-digr", "explain", drive.recorder.path, "--out", tmp_path / "anew", extra="recording")
    assert result.returncode == 0, result.stderr
    assert "1 frames explained by linear" in result.stdout
