"""Policies on disk: weights as safetensors, and beside them a JSON card that says what they are.

Nothing here unpickles. ``driving_student.safetensors`` has its card in ``driving_student.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from carla_digr import __version__
from carla_digr.config import PolicyConfig, parse_section
from carla_digr.errors import UserError
from carla_digr.files import atomic_write
from carla_digr.policy import ActorCritic

REPLACING_SECONDS = 1.0  # longest that a training which goes on takes between replacing weights and card
WEIGHTS_DIRECTORY = Path(__file__).parent / "weights"  # of the checkpoints that ship


def save(path: str | os.PathLike[str], model: ActorCritic, card: dict[str, Any]) -> dict[str, Any]:
    """Write weights and card.

    Args:
        path: ``<stem>.safetensors``; the card goes to ``<stem>.json``.
        model: the policy.
        card: JSON-ready values: task, role ("teacher" or "student"), action_names, seed, steps, config (the whole
            configuration), metrics. What follows from the weights is added here.

    Returns:
        The card as written.
    """
    path = Path(path)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(weights)
    card = {
        **card,
        "policy": asdict(model.config),
        "input_shape": list(model.input_shape),
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "version": __version__,
        "commit": _commit(),
    }
    text = json.dumps(card, indent=2) + "\n"
    with atomic_write(path.with_suffix(".json")) as card_file, atomic_write(path) as weights_file:
        card_file.write(text.encode())
        weights_file.write(data)
    return json.loads(text)


def load(path: str | os.PathLike[str], task: str | None = None) -> tuple[ActorCritic, dict[str, Any]]:
    """Read a policy, checked against its card.

    Args:
        path: ``<stem>.safetensors``.
        task: the task it must be for, None for any.

    Returns:
        The policy, in evaluation mode, and its card.

    Raises:
        UserError: weights or card are missing, damaged, do not belong together, or are of another task.
    """
    path = Path(path)
    give_up = time.monotonic() + REPLACING_SECONDS
    while True:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read the policy weights {path}: {error.strerror}.") from error
        card = _read_card(path.with_suffix(".json"))
        belong = hashlib.sha256(data).hexdigest() == card["weights_sha256"]
        if belong or time.monotonic() > give_up:
            break
        time.sleep(0.01)
    if task is not None and card["task"] != task:
        raise UserError(f"{path} is a policy for the task {card['task']}; this needs one for {task}.")
    if not belong:
        raise UserError(
            f"{path} is damaged or does not belong to its card {path.with_suffix('.json').name} "
            f"(its SHA-256 differs); copy or train it again."
        )
    source = str(path.with_suffix(".json"))
    policy_config = parse_section(PolicyConfig, card["policy"], source, "policy")
    channels, height, width = card["input_shape"]
    model = ActorCritic(policy_config, channels, height, width, len(card["action_names"]))
    try:
        weights = safetensors.torch.load(data)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the network that its card describes.") from error
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise UserError(f"{path} holds weights that are not finite numbers; train it again.")
    return model.eval(), card


def policy_hash(card: dict[str, Any]) -> str:
    """The short name of a checkpoint's weights: 12 hexadecimal digits."""
    return card["weights_sha256"][:12]


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read the card {path} that belongs to the weights: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The card {path} is not valid JSON; copy or train the policy again.") from error
    expected = {"task": str, "role": str, "action_names": list, "policy": dict, "weights_sha256": str}
    if not isinstance(card, dict):
        raise UserError(f"The card {path} is not a JSON object; copy or train the policy again.")
    for key, kind in expected.items():
        if not isinstance(card.get(key), kind):
            raise UserError(f"The card {path} lacks a valid '{key}'; copy or train the policy again.")
    shape = card.get("input_shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise UserError(f"The card {path} lacks a valid 'input_shape'; copy or train the policy again.")
    return card


def _commit() -> str | None:
    """The source revision of this package when it runs from a git work tree, with "+" when it is modified."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
