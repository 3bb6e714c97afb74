"""What a file of another library is: by its content, whatever its name."""

from __future__ import annotations

import re
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from carla_digr.errors import UserError
from carla_digr.importing import exported, onnx_graph, stable_baselines, state_dicts, torchscript
from carla_digr.importing.found import Found
from carla_digr.importing.options import ImportOptions
from carla_digr.importing.reading import Archive, load, tensors_of

FORMATS = "stable-baselines3 .zip, state dict (.pt, .pth, .safetensors), TorchScript, torch.export (.pt2) and ONNX"


def find(file: Path, data: bytes, options: ImportOptions) -> Found:
    """What a file holds, by its content, whatever its name.

    Raises:
        UserError: it is damaged, of no known format, or more options are needed.
    """
    if data[:4] == b"PK\x03\x04":
        archive = Archive(file, data)
        names = [name.partition("/")[2] for name in archive.names]
        if {"data", "policy.pth"} <= set(archive.names):
            return stable_baselines.find(file, archive, options)
        if "constants.pkl" in names and any(name.startswith("code/") for name in names):
            return torchscript.find(file, data, options)
        if "archive_format" in names or any(name.startswith("models/") for name in names):
            return exported.find(file, archive, options)
        if "serialized_exported_program.json" in archive.names:
            raise UserError(f"{file} is a torch.export of an old format; export it again with torch 2.8 or newer.")
        if "data.pkl" not in names:
            raise UserError(f"{file} is an archive of no known format; known are {FORMATS}.")
        return state_dicts.find(file, tensors_of(load(file, data), file), options)
    if data[:1] == b"\x80":
        return state_dicts.find(file, tensors_of(load(file, data), file), options)
    if data[8:9] == b"{":
        try:
            tensors = tensors_of(safetensors.torch.load(data), file)
            # The format sorts its names by size and letters; layers count upwards
            return state_dicts.find(file, {name: tensors[name] for name in sorted(tensors, key=_natural)}, options)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is a damaged safetensors file; copy or save it again.") from error
    if data[:1] == b"\x08" and (file.suffix == ".onnx" or b"onnx" in data or b"pytorch" in data[:64]):
        return onnx_graph.find(file, data, options)
    if not data:
        raise UserError(f"{file} is empty; copy or save it again.")
    raise UserError(f"{file} is of no known format; known are {FORMATS}.")


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which conv10 comes after conv2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
