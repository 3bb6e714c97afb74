"""A tiny Red-Fetch-Green run that tests of the offline stages share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import TINY

from carla_digr.tasks import parse_config


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests share the machine's cores with others."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory) -> Path:
    """The configuration as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def tiny_config():
    return parse_config(TINY, "tiny")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_config) -> Path:
    """Output directory with the uninterrupted run of the first three stages; not to be changed."""
    from carla_digr.training import prepare_process
    from carla_digr.training.distill import distill
    from carla_digr.training.saliency_dataset import make_dataset
    from carla_digr.training.teacher import train_teacher

    prepare_process()
    out = tmp_path_factory.mktemp("run")
    train_teacher(tiny_config, out)
    make_dataset(tiny_config, out, out / "teacher.safetensors")
    distill(tiny_config, out, out / "teacher.safetensors")
    return out


@pytest.fixture
def copied_run(tmp_path, tiny_run):
    """Copy the named files and directories of the tiny run to a directory of the test's own."""

    def copy(*names: str) -> Path:
        out = tmp_path / "out"
        out.mkdir()
        for name in names:
            source = tiny_run / name
            if source.is_dir():
                shutil.copytree(source, out / name)
            else:
                shutil.copy(source, out / name)
        return out

    return copy
