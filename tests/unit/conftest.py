"""A tiny Red-Fetch-Green run that tests of the offline stages share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from carla_digr.tasks import parse_config

TINY = {
    "task": "red_fetch_green",
    "seed": 3,
    "policy": {"convolutions": [[8, 8, 4], [8, 4, 2], [8, 3, 1]], "features": 16},
    "environment": {"max_steps": 40},
    "teacher": {
        "total_steps": 3840,
        "environments": 8,
        "rollout_steps": 16,
        "epochs": 2,
        "minibatch_size": 64,
        "learning_rate_end": 1e-4,
        "checkpoint_interval": 640,
    },
    "saliency_dataset": {"maps": 44, "shard_size": 4, "stride": 4, "state_interval": 3, "environments": 4},
    "distill": {
        "iterations": 60,
        "environments": 4,
        "environment_steps": 2,
        "buffer_states": 400,
        "saliency_batch": 8,
        "buffer_batch": 8,
        "hard_states": 0.5,
        "validation_interval": 20,
        "checkpoint_interval": 10,
    },
    "evaluation": {
        "episodes": 6,
        "environments": 4,
        "saliency_states": 12,
        "examples": 2,
        "table_states": 20,
        "slow_states": 5,
        "attack_episodes": 4,
        "attack_epsilons": [0.05],
    },
}


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
