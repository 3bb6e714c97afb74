"""A package that an extra installs is missing: one sentence that names the extra, wherever it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import live_support
import pytest

from carla_digr.errors import EXTRAS, SENTENCE, UserError, sentence
from carla_digr.registry import Registry


def run_without(package: str, directory: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = live_support.without(package, directory)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)


def told(package: str) -> str:
    return f"{SENTENCE}This needs the package {package}: pip install 'carla_digr[{EXTRAS[package]}]'.\n"


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("rosbags", ["view", "there"]),
        ("mcap", ["repair", "there"]),
        ("carla", ["check-simulator"]),
        ("matplotlib", ["benchmark", "simulator"]),
        ("ray", ["make-dataset", "red_fetch_green", "--ray", "auto"]),
    ],
)
def test_a_job_says_which_extra_it_needs(package, command, tmp_path):
    done = run_without(package, tmp_path, ["-m", "carla_digr.cli", *command])
    assert (done.returncode, done.stderr) == (2, told(package))


@pytest.mark.slow
def test_an_entry_of_a_table_says_which_extra_it_needs(tmp_path):
    script = (
        "from carla_digr.errors import UserError\n"
        "from carla_digr.registry import Registry\n"
        "table = Registry('thing', 'no.such.group', {'a': 'carla_digr.saliency.baselines:grad_cam'})\n"
        "try: table['a']\n"
        "except UserError as error: print(error)\n"
    )
    done = run_without("captum", tmp_path, ["-c", script])
    assert SENTENCE + done.stdout == told("captum"), done.stderr


@pytest.mark.slow
def test_a_saliency_method_says_which_extra_it_needs(tmp_path):
    """The one that needs a package; the others do their work without it."""
    script = (
        "from carla_digr.checkpoint import WEIGHTS_DIRECTORY\n"
        "from carla_digr.errors import UserError\n"
        "from carla_digr.explainer import Explainer\n"
        "Explainer.from_checkpoint(WEIGHTS_DIRECTORY / 'driving_student.safetensors', method='vg')\n"
        "try: Explainer.from_checkpoint(WEIGHTS_DIRECTORY / 'driving_student.safetensors', method='ig')\n"
        "except UserError as error: print(error)\n"
    )
    done = run_without("captum", tmp_path, ["-c", script])
    assert SENTENCE + done.stdout == told("captum"), done.stderr


def test_any_other_missing_module_is_a_fault_of_the_program():
    assert sentence(ModuleNotFoundError("No module named 'carla_digr.nothing'", name="carla_digr.nothing")) is None
    assert sentence(ValueError("x")) is None
    with pytest.raises(ModuleNotFoundError):
        Registry[object]("thing", "no.such.group", {"a": "carla_digr.nothing:b"})["a"]
    with pytest.raises(UserError, match="no thing 'b'"):
        Registry[object]("thing", "no.such.group", {"a": "carla_digr.nothing:b"}).find("b")
