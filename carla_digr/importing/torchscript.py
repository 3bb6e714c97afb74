"""TorchScript archives, which torch's own interpreter runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing.found import Found
from carla_digr.importing.graphs import is_255, tried_graph
from carla_digr.importing.options import ImportOptions
from carla_digr.importing.reading import Archive, sha256


def find(file: Path, data: bytes, options: ImportOptions) -> Found:
    """A TorchScript archive, run by torch's own interpreter.

    Raises:
        UserError: torch cannot load it, or more options are needed.
    """
    Archive(file, data).check()
    try:
        network = networks.Scripted(networks.load_script(data))
        script = network.script
        channels = next((t.shape[1] for t in script.state_dict().values() if t.dim() == 4), None)
    except Exception as error:  # torch raises many kinds on damaged archives
        raise UserError(
            f"{file} is no TorchScript that torch {torch.__version__} can load; export it again."
        ) from error
    description = {"kind": "torchscript", "sha256": sha256(data)}
    layout = options.input.layout or "chw"
    sizes: list[int | None] = [None, channels, None, None]
    if layout == "hwc":
        sizes = [None, None, None, channels]
    found = tried_graph(file, "TorchScript", network, description, sizes, _divides(script), options)
    found.archive = data
    return found


def _divides(script: Any) -> bool:
    """Whether the first thing that a script does to its input is to divide it by 255; see ``graphs.divides``."""
    try:
        graph = script.inlined_graph
        same = {list(graph.inputs())[1].debugName()}
        for node in graph.nodes():
            inputs = list(node.inputs())
            if not inputs or inputs[0].debugName() not in same:
                continue
            name = node.kind().removeprefix("aten::").rstrip("_")
            if name in ("to", "permute", "contiguous", "clone", "float"):
                same |= {output.debugName() for output in node.outputs()}
            elif name in ("div", "mul", "true_divide"):
                return is_255(inputs[1].toIValue(), name != "mul")
    except (RuntimeError, AttributeError, IndexError):  # a module without a graph of its own
        pass
    return False
