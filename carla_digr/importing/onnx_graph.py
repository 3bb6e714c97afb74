"""ONNX graphs: known operators become nodes in the card, and a graph with a gradient."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing.found import Found
from carla_digr.importing.graphs import MALFORMED, divides, finite, tried_graph
from carla_digr.importing.options import ImportOptions
from carla_digr.importing.reading import read


def find(file: Path, data: bytes, options: ImportOptions) -> Found:
    """An ONNX graph.

    Raises:
        UserError: the file is damaged, or an operator is not known.
        ModuleNotFoundError: the package onnx is missing.
    """
    import onnx
    import onnx.inliner
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
        _inline_data(file, model)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        description, weights, sizes, whole = _graph(file, model)
        network = networks.OnnxGraph(**{k: v for k, v in description.items() if k != "kind"}, weights=weights)
    except (DecodeError, *MALFORMED) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{file} is no sound ONNX model ({reason or type(error).__name__}); export it again."
        ) from error
    whole = whole or divides(description["nodes"], weights, description["input"])
    return tried_graph(file, "ONNX", network, description, sizes, whole, options)


def _inline_data(file: Path, model: Any) -> None:
    """Weights that lie in a file beside the model, as large exports have them."""
    beside: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        if not name or PurePosixPath(name).name != name or name.startswith("."):
            raise UserError(f"{file} has weights at {name!r}, outside its folder, which are not read; export it again.")
        if name not in beside:
            beside[name] = read(file.with_name(name))
        first = int(entries.get("offset", 0))
        last = first + int(entries["length"]) if "length" in entries else len(beside[name])
        if not 0 <= first <= last <= len(beside[name]):
            raise UserError(f"{file.with_name(name)} is shorter than {file} says; copy both files again.")
        tensor.raw_data = beside[name][first:last]
        tensor.data_location = tensor.DEFAULT
        del tensor.external_data[:]


def _graph(file: Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor], list[int | None], bool]:
    """Description, weights, the input's sizes, and whether it is of whole numbers 0 to 255."""
    import onnx

    from carla_digr.onnx_operators import OPERATORS

    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < 9:
        raise UserError(f"{file} has ONNX's operator set {opset}; export it with 13 or newer.")
    tensors = {item.name: _tensor(item) for item in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            tensors[node.output[0]] = _constant(node)
            continue
        known = node.domain in ("", "ai.onnx") and node.op_type in OPERATORS
        if not known or (node.op_type in ("Softmax", "LogSoftmax") and opset < 13):
            what = f"{node.domain}.{node.op_type}".lstrip(".")
            raise UserError(
                f"{file} has the operator {what} of set {opset}, which is not known here; export it with operator set "
                f"18, or as TorchScript (torch.jit.trace) or with torch.export.save."
            )
        attributes = {item.name: _attribute(onnx.helper.get_attribute_value(item)) for item in node.attribute}
        if attributes.get("training_mode"):
            raise UserError(f"{file} was exported in training mode; call .eval() before the export.")
        outputs = list(node.output)[:1] if node.op_type in ("Dropout", "BatchNormalization", "MaxPool") else node.output
        nodes.append(
            {"op": node.op_type, "inputs": list(node.input), "attributes": attributes, "outputs": list(outputs)}
        )
    inputs = [item for item in model.graph.input if item.name not in tensors]
    if len(inputs) != 1:
        raise UserError(f"{file} takes {len(inputs)} inputs; export a network that takes the states alone.")
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value or None for dim in kind.shape.dim]
    names = {name: f"weight_{index}" for index, name in enumerate(tensors)}
    taken = {name for node in nodes for name in node["outputs"]} | {inputs[0].name}
    if taken & set(names.values()):
        raise ValueError("names of values that are those of weights")
    for node in nodes:
        node["inputs"] = [names.get(name, name) for name in node["inputs"]]
    used = {name for node in nodes for name in node["inputs"]}
    weights = {names[name]: tensor for name, tensor in tensors.items() if names[name] in used}
    outputs = [names.get(item.name, item.name) for item in model.graph.output]
    description = {"kind": "onnx", "nodes": nodes, "input": inputs[0].name, "outputs": outputs}
    return description, weights, sizes, kind.elem_type == 2


def _tensor(item: Any) -> Tensor:
    import onnx

    return torch.from_numpy(onnx.numpy_helper.to_array(item).copy())


def _constant(node: Any) -> Tensor:
    import onnx

    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return _tensor(value)
    if attribute.name in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    if attribute.name in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    raise ValueError(f"a constant {attribute.name} is not known")


def _attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float):
        return finite(value)
    if hasattr(value, "raw_data"):  # ConstantOfShape's
        return _tensor(value).flatten().tolist()[0]
    return [_attribute(item) for item in value]
