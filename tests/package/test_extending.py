"""docs/extending.md: its package is written down, installed and used, with nothing of this repository changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ROOT = PAGE.parents[1]


def blocks() -> list[tuple[str, str]]:
    """Language and text of the page's code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The files of the page, and the package installed beside this Python's own packages."""
    directory = tmp_path_factory.mktemp("outside")
    for language, text in blocks():
        if language != "bash":
            path = directory / text.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    (directory / "my_explanations" / "__init__.py").touch()
    np.savez(directory / "frames.npz", frames=np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    return directory


def run(command: str, outside: Path, status: int = 0) -> str:
    """Run a command line of the page; its standard error."""
    command = re.sub(r"^carla-digr", "python -m carla_digr.cli", command)
    command = re.sub(
        r"^pip install", "python -m pip install --no-deps --no-build-isolation --quiet --target site", command
    )
    environment = {**os.environ, "PYTHONPATH": f"{outside / 'site'}{os.pathsep}{ROOT}"}
    arguments = [sys.executable if word == "python" else word for word in command.split()]
    result = subprocess.run(arguments, cwd=outside, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == status, (command, result.stderr)
    return result.stderr


@pytest.mark.timeout(600)  # nine processes, each of which loads torch
def test_a_package_adds_a_task_a_policy_and_a_method(outside):
    [commands] = [text for language, text in blocks() if language == "bash"]
    for command in commands.splitlines():
        run(command, outside)
    for name in ("maps", "maps_attention"):
        with np.load(outside / name / "maps.npz") as arrays:
            assert arrays["maps"].shape == (3, 16, 16) and arrays["maps"].max() == 1
    assert (outside / "runs" / "find_the_dot" / "student.safetensors").is_file()


def test_a_package_that_cannot_be_loaded_is_named_in_a_sentence(outside):
    (outside / "my_explanations" / "occlusion.py").write_text("import missing_module\n")
    run("pip install --upgrade .", outside)
    run("python -m my_explanations.network", outside)
    run("carla-digr explain frames.npz --weights attention.safetensors --method vg --out others_work", outside)
    command = "carla-digr explain frames.npz --weights attention.safetensors --method occlusion --out maps2"
    said = run(command, outside, status=2).splitlines()[-1]
    assert said.startswith("carla-digr: The package my-explanations") and "missing_module" in said
