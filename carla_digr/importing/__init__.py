"""Policies of other libraries: from a file of theirs to weights and a card of ours.

What a file says in data is read, what it says in code or in a pickle never is. What it does not say is taken from
options or a small YAML, or assumed, and then told. docs/policies.md has the formats, the options and the card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from carla_digr import checkpoint
from carla_digr.errors import UserError
from carla_digr.files import atomic_write
from carla_digr.importing.found import Found
from carla_digr.importing.options import ImportOptions, InputOptions, read_controls
from carla_digr.policy import ActorCritic, InputRecipe, TorchPolicy

__all__ = ["ImportOptions", "InputOptions", "import_policy", "read_controls"]


def import_policy(file: Path, out: Path, options: ImportOptions | None = None) -> list[str]:
    """Make a checkpoint of another library's policy.

    Args:
        file: what that library has written.
        out: stem of the checkpoint: ``<stem>.safetensors``, ``<stem>.json``, and ``<stem>.pt`` of a TorchScript.
        options: what the file does not say.

    Returns:
        What was found and what was assumed, lines to print.

    Raises:
        UserError: the file is damaged, of no known format, or not to be had without more options; nothing is written.
    """
    from carla_digr.importing import formats, reading

    options = options or ImportOptions()
    stem = out.with_suffix("") if out.suffix in (".safetensors", ".json", ".pt") else out
    targets = [stem.with_name(stem.name + suffix) for suffix in (".safetensors", ".json", ".pt")]
    data = reading.read(file)
    if any(target.exists() and target.samefile(file) for target in targets):
        raise UserError(f"The checkpoint {stem} would overwrite {file}; choose another --out.")
    found = formats.find(file, data, options)
    policy, card = _policy(file, found, options)
    card["source"] = {"file": file.name, "format": found.format, "sha256": reading.sha256(data)}
    if len(json.dumps(card, indent=2)) > checkpoint.CARD_BYTES - 4096:  # which the weights' entries come to
        raise UserError(f"{file} has too many operations for a card; export it as TorchScript (torch.jit.trace).")
    new = not targets[2].exists()
    try:
        if found.archive is not None:
            with atomic_write(targets[2]) as copy:
                copy.write(found.archive)
        checkpoint.save(targets[0], policy, card)
    except OSError as error:
        if new:
            targets[2].unlink(missing_ok=True)
        raise UserError(f"Cannot write {targets[0]}: {error.strerror}.") from error
    return _report(targets[0], found, policy, card)


def _policy(file: Path, found: Found, options: ImportOptions) -> tuple[ActorCritic | TorchPolicy, dict[str, Any]]:
    """The policy, tried out, and its card but for what the weights add."""
    for name, tensor in found.weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file} holds weights that are not finite numbers ({name}); export a sound policy.")
    output = options.output or found.output
    actions = found.actions(output)
    shape = found.input_shape
    recipe = _recipe(found, options.input, shape)
    names = options.actions or tuple(f"action {index}" for index in range(actions))
    if len(names) != actions:
        raise UserError(
            f"{file} has {actions} {'actions' if output in ('logits', 'q_values') else 'dimensions of an action'}, "
            f"but {len(names)} names are given with --actions."
        )
    if len(set(names)) != len(names) or not all(names):
        raise UserError("Each action needs a name of its own; give other --actions.")
    if options.controls is not None and len(options.controls) != actions:
        raise UserError(f"{file} has {actions} actions, but the controls are for {len(options.controls)}.")
    card: dict[str, Any] = {"task": options.task, "role": "imported", "action_names": list(names)}
    if options.controls is not None:
        card["controls"] = [
            {key: value for key, value in asdict(control).items() if value is not None} for control in options.controls
        ]
    plain = recipe.plain and output in ("logits", "q_values")
    policy: ActorCritic | TorchPolicy | None = found.actor_critic(actions, output, recipe) if plain else None
    if policy is None:
        policy = TorchPolicy(found.network, shape, actions, output, recipe)
        card["network"] = found.description
    _check_outputs(file, policy)
    return policy.eval(), card


def _check_outputs(file: Path, policy: ActorCritic | TorchPolicy) -> None:
    with torch.no_grad():
        outputs, _ = policy(torch.rand(2, *policy.input_shape, generator=torch.Generator().manual_seed(0)))
    if not torch.isfinite(outputs).all():
        raise UserError(f"The policy of {file} decides by numbers that are not finite; say how it takes its input.")


def _recipe(found: Found, options: InputOptions, shape: tuple[int, int, int]) -> InputRecipe:
    """The input recipe by options, else by the file, else assumed, which is noted."""
    channels = shape[0]
    colour, stack = options.colour, options.stack
    if colour is None:
        colour = "rgb" if (channels == 3 if stack is None else channels != stack) else "grey"
        found.assume(f"{'RGB' if colour == 'rgb' else 'grey'} pictures", "--colour")
    if stack is None:
        stack = max(channels // (1 if colour == "grey" else 3), 1)
        if stack > 1:
            found.assume(f"{stack} of them in a state, the oldest first", "--stack")
    scale = options.scale
    if scale is None:
        scale, reason = found.scale
        if reason:
            found.assume(reason, "--scale")
    if not math.isfinite(scale) or scale == 0:
        raise UserError("--scale must be a number other than 0.")
    return InputRecipe(
        colour, stack, scale, options.mean or (0.0,), options.deviation or (1.0,), options.layout or found.layout
    )


def _report(path: Path, found: Found, policy: ActorCritic | TorchPolicy, card: dict[str, Any]) -> list[str]:
    size = " x ".join(map(str, policy.input_shape))
    what = {"logits": "actions by logits", "q_values": "actions by Q values"}.get(
        policy.output, f"dimensions of a {policy.output.replace('_', ' ')} action"
    )
    kind = (
        "an actor-critic with gradients in closed form" if isinstance(policy, ActorCritic) else "gradients by autograd"
    )
    lines = [f"{path}: {found.format}, states of {size}, {policy.actions} {what}; {kind}."]
    if found.structure:
        lines.append(f"Network: {found.structure}.")
    if found.assumed:
        lines.append(f"Assumed, because the file does not say it: {_listed(found.assumed)}.")
    lines += found.notes
    if policy.output not in ("logits", "q_values"):
        lines.append("It is continuous: it can be explained, but does not drive live.")
    elif card.get("controls") is None and card["task"] is None:
        lines.append("To drive live, the card must say what each action does to the car: give --controls.")
    return lines


def _listed(assumed: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{what} ({option})" for what, option in assumed)
