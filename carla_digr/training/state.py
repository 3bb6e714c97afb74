"""The saved state of a running job: named tensors and JSON values in one safetensors file, nothing pickled."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from carla_digr.errors import UserError
from carla_digr.files import atomic_write, exclusive, open_regular

# What a resumed job may change without becoming another job.
STATE_BYTES = 16 << 30  # of the largest state that is read
ELSEWHERE = ("simulators", "timeout", "patience")
"""Settings of an environment that say where its simulators are."""
_FREE = {"total_steps", "checkpoint_interval", "iterations", *ELSEWHERE}
# Settings that jobs begun by an earlier version do not know, and what they did.
_NEWER = {
    "saliency_dataset.effects": False,
    "distill.effect_power": 1.0,
    "distill.map": "gradient",
    "distill.map_rows": None,
    "distill.scenery_interval": None,
    "environment.actions": "wheels",
    "environment.change_penalty": 0.0,
    "environment.kind": "embedded",
    "environment.patience": 60.0,
    "environment.random_scenery": 0.0,
    "environment.roads": None,
    "environment.simulators": None,
    "environment.spawn_points": None,
    "environment.steering_penalty": 0.0,
    "environment.timeout": 10.0,
}


def save_state(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write a state; a kill at any moment leaves the old one or the new one."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(contiguous, metadata={"values": json.dumps(values)})
    with atomic_write(path) as file:
        file.write(data)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_state`` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        open_regular(path, STATE_BYTES).close()
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"The saved state {path} is damaged; delete it to start this job from its beginning."
        ) from error


def only_job_in(directory: Path) -> AbstractContextManager[None]:
    """Hold a directory against a second job.

    Raises:
        UserError: another process works there.
    """
    return exclusive(directory, f"Another job is at work in {directory}; wait for it or use another --out.")


def check_same_job(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuse to continue a job under another configuration.

    A setting that the saved job does not know had its default: there was none when the job began.

    Args:
        path: the saved state, named in the error.
        saved: the configuration sections that the saved job depends on.
        present: the same sections now.

    Raises:
        UserError: a value differs that would make it another job.
    """
    before, now = _NEWER | _flatten(saved), _flatten(present)
    before = {key: value for key, value in before.items() if key not in _NEWER or key in now}
    for key in [*now, *before]:
        if before.get(key) != now.get(key) and key.rpartition(".")[2] not in _FREE:
            raise UserError(
                f"{path} was made with {key} = {before.get(key)}, now it is {now.get(key)}; "
                f"use another --out directory or restore the value."
            )


def pack_optimiser(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimiser's moments as named tensors and its parameter groups as JSON values."""
    state = optimiser.state_dict()
    tensors = {
        f"optimiser.{index}.{name}": value for index, item in state["state"].items() for name, value in item.items()
    }
    return tensors, state["param_groups"]


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list) -> None:
    """Put back what ``pack_optimiser`` took; other tensors are ignored."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimiser":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def pack_random() -> tuple[dict[str, Tensor], list[int | float]]:
    """The global generators of torch and numpy."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(np.array(keys))}
    return tensors, [int(position), int(has_gauss), float(gauss)]


def unpack_random(tensors: dict[str, Tensor], numpy_values: list) -> None:
    """Put back what ``pack_random`` took."""
    torch.set_rng_state(tensors["random.torch"])
    position, has_gauss, gauss = numpy_values
    np.random.set_state(("MT19937", tensors["random.numpy"].numpy(), position, has_gauss, gauss))


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return result
