"""Networks that bring their graph, tried out: which states they take, how many at once, and on what scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing.found import Found, input_size, sized, tried
from carla_digr.importing.options import ImportOptions, InputOptions

# What data of another form than the schema's makes raise
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, StopIteration)
TOLERANCE = 1e-4  # between a batch and its states one by one, relative
# Operations before which a picture's pixels are what they are after
UNSCALED = ("Cast", "Transpose", "Identity", "aten.to.", "aten._to_copy.", "aten.permute.", "aten.clone.")


def tried_graph(
    file: Path,
    kind: str,
    network: nn.Module,
    description: dict[str, Any],
    sizes: list[int | None],
    whole: bool,
    options: ImportOptions,
) -> Found:
    """A network that takes (B, C, H, W) or (B, H, W, C), tried out.

    Args:
        file: its name in errors.
        kind: format in words.
        network: takes batches of the file's size.
        description: for the card; a fixed batch is added.
        sizes: of its input, None where the file leaves one open.
        whole: whether the file says that the input is 0 to 255.
        options: the user's.

    Raises:
        UserError: it takes no pictures or gives no outputs of actions, or more options are needed.
    """
    if len(sizes) != 4:
        raise UserError(
            f"{file} takes inputs of {len(sizes)} axes; export a network that takes batches of pictures (B, C, H, W)."
        )
    network = network.eval()
    layout, shape, assumed = _state(file, network, sizes, options.input)
    network, answer = _freed_of_its_batch(network, description, shape, layout, sizes[0])
    if answer is None:
        raise UserError(
            f"The network of {file} does not take states of {' x '.join(map(str, shape))} (channels x height x width); "
            f"give another --input-shape or --layout."
        )
    fixed, results = answer
    notes = []
    if fixed is not None:
        network = networks.FixedBatch(network, fixed)
        description["batch"] = fixed
        notes.append(
            f"The graph takes batches of {fixed} alone, so maps that need many states take long; export it with a "
            f"dynamic batch to change that."
        )
    if len(results) > 2 or not results[0].is_floating_point() or results[0].dim() != 2:
        shapes = ", ".join(f"{str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}" for item in results)
        raise UserError(
            f"{file} gives {shapes} for a batch of {len(results[0])}; export a network that gives logits or Q values "
            f"(B, A), or those and values (B,)."
        )
    scale = (1.0, "") if whole else (1 / 255, "pixels divided by 255")
    outputs = results[0].shape[1]
    found = Found(
        kind, network, description, shape, outputs, "logits", layout, scale=scale, assumed=assumed, notes=notes
    )
    if whole and options.input.scale is None:
        found.notes.append("The network takes pixels of 0 to 255 and scales them itself.")
    if options.output is None:
        found.assume("outputs that are logits", "--output")
    return found


def _state(
    file: Path, network: nn.Module, sizes: list[int | None], given: InputOptions
) -> tuple[str, tuple[int, int, int], list[tuple[str, str]]]:
    """Layout and C, H, W of the states that a network takes, and what of them is assumed."""
    layout: str | None = given.layout
    assumed: list[tuple[str, str]] = []
    if layout is None:
        last, second = sizes[3], sizes[1]
        layout = "hwc" if last is not None and last <= 4 and (second is None or second > 4) else "chw"
        if layout == "hwc":
            assumed.append(("axes in the order B, H, W, C", "--layout"))
    channels = sizes[1 if layout == "chw" else 3]
    height, width = sizes[2:] if layout == "chw" else sizes[1:3]
    if given.shape is not None:
        channels, height, width = given.shape
    elif given.size is not None:
        height, width = given.size
    if channels is None:
        raise UserError(f"{file} does not say the shape of a state; give --input-shape C,H,W.")
    if height is None or width is None:
        height, width = input_size(file, network, channels, layout)
        assumed.append((f"pictures of {height}x{width}", "--input"))
    return layout, sized(file, (channels, height, width)), assumed


Answer = tuple[int | None, tuple[Tensor, ...]] | None
"""The one size of batches that a network is for, None: any; and what it gives for a few states. None: it fails."""


def _freed_of_its_batch(
    network: nn.Module, description: dict[str, Any], shape: tuple[int, int, int], layout: str, batch: int | None
) -> tuple[nn.Module, Answer]:
    """The network, or where its graph is for one size of batches and need not be, the graph without that."""
    answer = _answer(network, shape, layout, batch)
    if answer is None or answer[0] is None or not isinstance(network, networks.Graph):
        return network, answer
    freed = _freed(network, answer[0])
    again = None if freed is None else _answer(freed, shape, layout, batch)
    if freed is None or again is None or again[0] is not None:
        return network, answer
    description["nodes"] = freed.nodes
    return freed, again


def _answer(network: nn.Module, shape: tuple[int, int, int], layout: str, batch: int | None) -> Answer:
    """Whether a network is for batches of one size alone, and what it gives for a few states; None where it fails.

    A traced or exported graph may hold the size of its example's batch. So a batch of three must be what the three give
    one by one; otherwise the states go through it in batches of that size.
    """
    three = tried(network, shape, layout)
    one_by_one = tried(networks.FixedBatch(network, batch or 1), shape, layout)
    if three is not None and one_by_one is not None:
        same = all(
            a.shape[:1] == (3,) and torch.allclose(a.reshape(3, -1), b.to(a.dtype), rtol=TOLERANCE, atol=TOLERANCE)
            for a, b in zip(three, one_by_one, strict=True)
        )
        if same:
            return None, three
    if one_by_one is not None:
        return batch or 1, one_by_one
    return (None, three) if three is not None else None


def _freed(graph: networks.Graph, batch: int) -> networks.Graph | None:
    """A graph whose reshapes no longer name its example's batch; it may be another graph, so it is tried out.

    torch.onnx.export writes flatten as a reshape to (1, features) where the batch is not said to be dynamic.
    """
    graph = copy.deepcopy(graph)
    changed = False
    for node in graph.nodes:
        if node["op"] == "Reshape" and node["inputs"][1] in graph.names:
            sizes = getattr(graph, node["inputs"][1])
            if sizes.dim() == 1 and len(sizes) > 1 and sizes[0] == batch:
                sizes[0] = 0 if -1 in sizes[1:] else -1  # 0: that of what is reshaped
                node["attributes"].pop("allowzero", None)
                changed = True
        elif node["op"] in ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"):
            key = "size" if "size" in node["arguments"] else "shape"
            sizes = node["arguments"][key]
            if isinstance(sizes, list) and sizes[:1] == [batch] and -1 not in sizes[1:]:
                sizes[0] = -1
                changed = True
    return graph if changed else None


def divides(nodes: list[dict[str, Any]], weights: dict[str, Tensor], name: str) -> bool:
    """Whether the first thing that a graph does to its input is to divide it by 255."""
    same = {name}
    for node in nodes:
        if "arguments" in node:
            values = [
                item.get("value", item) if isinstance(item, dict) else item for item in node["arguments"].values()
            ]
        else:
            values = list(node["inputs"])
        if not values or not isinstance(values[0], str) or values[0] not in same:
            continue
        operation = node["op"].partition(".")[2] or node["op"].lower()
        if node["op"].startswith(UNSCALED):
            same |= set(node["outputs"])
        elif operation.startswith(("div", "mul")):
            other = values[1] if len(values) > 1 else None
            number = weights[other] if isinstance(other, str) and other in weights else other
            return is_255(number, operation.startswith("div"))
    return False


def is_255(number: Any, division: bool) -> bool:
    """Whether something is divided by 255 or multiplied with its inverse."""
    if isinstance(number, Tensor):
        number = number.item() if number.numel() == 1 else None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    return math.isclose(number, 255.0 if division else 1 / 255, rel_tol=1e-4)


def finite(value: float) -> float:
    """A number that JSON has; an infinity as the largest one."""
    if math.isnan(value):
        raise ValueError("an argument is not a number")
    return min(max(value, -1e300), 1e300)
