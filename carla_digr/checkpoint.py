"""Policies on disk: weights as safetensors, and beside them a JSON card that says what they are.

Nothing here unpickles. ``driving_student.safetensors`` has its card in ``driving_student.json``. A card's ``policy`` is
the `ActorCritic` that was trained here; any other network has ``network`` in its place, whose ``kind`` names who builds
it (NETWORKS). The card's format is documented in docs/policies.md.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from carla_digr import __version__
from carla_digr.config import PolicyConfig, parse_section
from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.files import WEIGHTS_BYTES, atomic_write, read_json, read_regular, shipped
from carla_digr.policy import ActorCritic, InputRecipe, Policy, TorchPolicy, default_recipe
from carla_digr.registry import Registry

REPLACING_SECONDS = 1.0  # longest that a training which goes on takes between replacing weights and card
WEIGHTS_DIRECTORY = Path(__file__).parent / "weights"  # of the checkpoints that ship
CARD_BYTES = 1 << 20  # the largest card that is read; one of the project's has 4 kB
MOST_ACTIONS, MOST_INPUTS = 4096, 1 << 26  # of a policy, and numbers of its state

# Kind of a card's network -> (description, weights by name, path of the weights) -> the module, for a TorchPolicy.
Build = Callable[[dict[str, Any], dict[str, torch.Tensor], Path], nn.Module]
NETWORKS: Registry[Build] = Registry(
    "kind of network",
    "carla_digr.policies",
    {
        "layers": "carla_digr.networks:layers",
        "torchscript": "carla_digr.networks:torchscript",
        "exported": "carla_digr.networks:exported",
        "onnx": "carla_digr.networks:onnx",
        "module": "carla_digr.networks:module",
    },
)


def save(path: str | os.PathLike[str], model: ActorCritic | TorchPolicy, card: dict[str, Any]) -> dict[str, Any]:
    """Write weights and card.

    Args:
        path: ``<stem>.safetensors``; the card goes to ``<stem>.json``.
        model: the policy.
        card: JSON-ready values: task, role ("teacher", "student" or "imported"), action_names, seed, steps, config (the
            whole configuration), metrics; of a TorchPolicy also ``network``. What follows from the policy is added.

    Returns:
        The card as written.
    """
    path = Path(path)
    whose = model if isinstance(model, ActorCritic) else model.network
    weights = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in whose.state_dict().items()}
    data = safetensors.torch.save(weights)
    if isinstance(model, ActorCritic):
        card = {**card, "policy": asdict(model.config)}
    if model.recipe != default_recipe(model.input_shape[0]):
        card = {**card, "input": asdict(model.recipe)}
    if model.output != "logits":
        card = {**card, "output": model.output}
    card = {
        **card,
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


def load(
    path: str | os.PathLike[str], task: str | None = None, module: str | None = None
) -> tuple[Policy, dict[str, Any]]:
    """Read a policy, checked against its card.

    Args:
        path: ``<stem>.safetensors``, or the name of one that ships.
        task: the task it must be for, None for any; a card that names no task is for any.
        module: "package.module:factory", the code that the policy's card asks for, if it asks for any: nothing that a
            card names is imported unless it is named here too.

    Returns:
        The policy, an `ActorCritic` or a `TorchPolicy`, in evaluation mode, and its card.

    Raises:
        UserError: weights or card are missing, damaged, do not belong together, or are of another task, or the network
            cannot be built.
    """
    path = shipped(path, WEIGHTS_DIRECTORY, ".safetensors")
    give_up = time.monotonic() + REPLACING_SECONDS
    while True:
        try:
            data = read_regular(path, WEIGHTS_BYTES)
        except OSError as error:
            near = difflib.get_close_matches(
                str(path), [file.stem for file in WEIGHTS_DIRECTORY.glob("*.safetensors")], 1
            )
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise UserError(f"Cannot read the policy weights {path}: {error.strerror}{hint}.") from error
        card = read_card(path)
        belong = hashlib.sha256(data).hexdigest() == card["weights_sha256"]
        if belong or time.monotonic() > give_up:
            break
        time.sleep(0.01)
    if task is not None and card["task"] not in (task, None):
        raise UserError(f"{path} is a policy for the task {card['task']}; this needs one for {task}.")
    if not belong:
        raise UserError(
            f"{path} is damaged or does not belong to its card {path.with_suffix('.json').name} "
            f"(its SHA-256 differs); copy or train it again."
        )
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{path} does not hold the network that its card describes.") from error
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise UserError(f"{path} holds weights that are not finite numbers; train it again.")
    return _build(path, card, weights, module), card


def _build(path: Path, card: dict[str, Any], weights: dict[str, torch.Tensor], module: str | None) -> Policy:
    source = str(path.with_suffix(".json"))
    channels, height, width = card["input_shape"]
    actions, output = len(card["action_names"]), card.get("output", "logits")
    recipe = default_recipe(channels)
    if "input" in card:
        recipe = parse_section(InputRecipe, card["input"], source, "input")
    if output not in DISTRIBUTIONS:
        raise UserError(f"The card {source} has the output '{output}'; it must be one of {', '.join(DISTRIBUTIONS)}.")
    if "network" not in card:
        policy_config = parse_section(PolicyConfig, card["policy"], source, "policy")
        sizes = policy_config, channels, height, width, actions, output, recipe
        with torch.device("meta"):  # without memory: what a card names may fit into none
            described = {name: tensor.shape for name, tensor in ActorCritic(*sizes).state_dict().items()}
        if described != {name: tensor.shape for name, tensor in weights.items()}:
            raise UserError(f"{path} does not hold the network that its card describes.")
        model = ActorCritic(*sizes)
        model.load_state_dict(weights)
        return model.eval()
    description = card["network"]
    kind = str(description.get("kind"))
    if kind == "module" and description.get("factory") != module:
        raise UserError(
            f"{path} is built by code of its own, {description.get('factory')}: name it with --module if you trust it."
        )
    network = NETWORKS.find(kind)(description, weights, path)
    return TorchPolicy(network, (channels, height, width), actions, output, recipe).eval()


def policy_hash(card: dict[str, Any]) -> str:
    """The short name of a checkpoint's weights: 12 hexadecimal digits."""
    return card["weights_sha256"][:12]


def read_card(weights: Path) -> dict[str, Any]:
    """The card of some weights, with every key that is needed; its ``task`` may be None.

    Raises:
        UserError: it is missing or damaged.
    """
    path = weights.with_suffix(".json")
    try:
        card = read_json(path, CARD_BYTES)
    except OSError as error:
        raise UserError(f"Cannot read the card {path} that belongs to the weights: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The card {path} is not valid JSON; copy or train the policy again.") from error
    if not isinstance(card, dict):
        raise UserError(f"The card {path} is not a JSON object; copy or train the policy again.")
    network = "network" if "network" in card else "policy"
    expected = {"task": str, "role": str, "action_names": list, network: dict, "weights_sha256": str}
    card.setdefault("task", None)
    if card["task"] is None:  # of any
        del expected["task"]
    for key, kind in expected.items():
        if not isinstance(card.get(key), kind):
            raise UserError(f"The card {path} lacks a valid '{key}'; copy or train the policy again.")
    names = card["action_names"]
    if not 0 < len(names) <= MOST_ACTIONS or not all(isinstance(name, str) for name in names):
        raise UserError(f"The card {path} lacks a valid 'action_names'; copy or train the policy again.")
    shape = card.get("input_shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(isinstance(n, int) and n > 0 for n in shape)
        and math.prod(shape) <= MOST_INPUTS
    ):
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
