"""Networks that bring their graph: torch.export, ONNX and TorchScript.

`torch.export.load` runs what a file says: pickles, expressions, guards as Python code, and any function below `torch`.
So an exported program is read here as the data that it is, JSON and raw tensors, and its operations are looked up in a
table of known ones. The same holds for ONNX. Either becomes nodes in the card, and a graph with a gradient.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing.found import Found, input_size, sized, tried
from carla_digr.importing.options import ImportOptions
from carla_digr.importing.reading import FILE_BYTES, Archive, load, read, sha256

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""torch._export.serde.schema.ScalarType."""
SCHEMA = 8  # its major version, since torch 2.5
CHECKS = ("_assert", "sym_constrain", "_functional_assert", "_functional_sym")  # operations that compute nothing
# What data of another form than the schema's makes raise
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, StopIteration)
TOLERANCE = 1e-4  # between a batch and its states one by one, relative


def find_exported(file: Path, archive: Archive, options: ImportOptions) -> Found:
    """The program of torch.export.save.

    Raises:
        UserError: it is damaged, or does what no network of layers does.
    """
    models = [name for name in archive.names if PurePosixPath(name).match("*/models/*.json")]
    if len(models) != 1:
        raise UserError(f"{file} holds {len(models)} exported programs; export one network with torch.export.save.")
    root, name = models[0].partition("/")[0], PurePosixPath(models[0]).stem
    program = archive.json(models[0])
    try:
        if program["schema_version"]["major"] != SCHEMA:
            raise UserError(
                f"{file} has another schema of torch.export than {SCHEMA}; export it again with torch 2.13."
            )
        reader = _ExportedProgram(file, archive, root, name, program["graph_module"])
        nodes, weights = reader.nodes(), reader.weights()
        meta = program["graph_module"]["graph"]["tensor_values"][reader.input]
        sizes = [size.get("as_int") for size in meta["sizes"]]
        description = {"kind": "exported", "nodes": nodes, "input": reader.input, "outputs": reader.outputs}
        network = networks.ExportedGraph(nodes, weights, reader.input, reader.outputs)
        whole = meta["dtype"] == 1 or _divides(nodes, weights, reader.input)
    except MALFORMED as error:
        raise UserError(
            f"{file} is no sound exported program ({type(error).__name__}: {error}); export it again."
        ) from error
    return _of_graph(file, "torch.export", network, description, sizes, whole, options)


class _ExportedProgram:
    """The JSON of an exported program as the nodes of a card."""

    def __init__(self, file: Path, archive: Archive, root: str, name: str, module: dict[str, Any]):
        self.file, self.archive, self.root, self.name = file, archive, root, name
        self.graph = module["graph"]
        self.tensors: dict[str, tuple[str, str]] = {}  # name in the graph -> folder and name in the archive
        inputs = []
        for spec in module["signature"]["input_specs"]:
            kind, value = next(iter(spec.items()))
            if kind == "user_input":
                inputs.append(value["arg"]["as_tensor"]["name"] if "as_tensor" in value["arg"] else None)
            elif kind in ("parameter", "buffer"):
                folder = "weights" if value.get("persistent", True) else "constants"
                self.tensors[value["arg"]["name"]] = (folder, value[f"{kind}_name"])
            elif kind == "tensor_constant":
                self.tensors[value["arg"]["name"]] = ("constants", value["tensor_constant_name"])
            elif kind != "constant_input":
                raise UserError(
                    f"{file} holds objects of a class of its own ({kind}), which are never loaded; export it without."
                )
        if len(inputs) != 1 or inputs[0] is None:
            raise UserError(f"{file} takes {len(inputs)} inputs; export a network that takes the states alone.")
        self.input: str = inputs[0]
        outputs = [next(iter(spec.items())) for spec in module["signature"]["output_specs"]]
        if any(kind != "user_output" for kind, _ in outputs):
            raise UserError(f"{file} changes its own weights as it runs; call .eval() before the export.")
        self.outputs: list[str] = [value["arg"]["as_tensor"]["name"] for _, value in outputs]

    def nodes(self) -> list[dict[str, Any]]:
        """The graph's operations."""
        nodes = []
        for node in self.graph["nodes"]:
            target = node["target"].removeprefix("torch.ops.")
            if target.startswith(tuple(f"aten.{check}" for check in CHECKS)):
                continue
            function = networks.operation(target)
            if function is None:
                raise UserError(
                    f"{self.file} has the operation {node['target']}, which is not known here; export it as "
                    f"TorchScript (torch.jit.trace) or ONNX."
                )
            arguments = {
                item["name"]: self._argument(item["arg"])
                for item in node["inputs"]
                if next(iter(item["arg"])) not in ("as_device", "as_layout", "as_memory_format")
                and item["name"] not in ("device", "layout", "memory_format", "pin_memory")
            }
            if arguments.get("training") is True or arguments.get("train") is True:
                raise UserError(f"{self.file} was exported in training mode; call .eval() before the export.")
            first = next(iter(arguments.values()), None)
            in_place = target.split(".")[1] in networks.IN_PLACE
            if in_place and isinstance(first, dict) and first.get("value") in self.tensors:
                raise UserError(f"{self.file} changes its own weights as it runs; call .eval() before the export.")
            nodes.append({"op": target, "arguments": arguments, "outputs": self._outputs(node["outputs"])})
        return nodes

    def _outputs(self, outputs: list[dict[str, Any]]) -> list[str]:
        names: list[str] = []
        for output in outputs:
            kind, value = next(iter(output.items()))
            if kind == "as_tensor":
                names.append(value["name"])
            elif kind == "as_tensors":
                names += [item["name"] for item in value]
            elif kind.startswith("as_sym"):
                names.append(value["as_name"])
            elif kind != "as_none":
                raise ValueError(f"an output {kind} is not known")
        return names

    def _argument(self, argument: dict[str, Any]) -> Any:
        kind, value = next(iter(argument.items()))
        if kind == "as_none":
            return None
        if kind in ("as_tensor", "as_custom"):
            return {"value": str(value["name"])}
        if kind == "as_tensors":
            return [{"value": str(item["name"])} for item in value]
        if kind == "as_optional_tensor":
            return self._argument(value)
        if kind == "as_optional_tensors":
            return [self._argument(item) for item in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            inner, number = next(iter(value.items()))
            return {"value": str(number)} if inner == "as_name" else number
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._argument({kind[:-1]: item}) for item in value]
        if kind == "as_scalar_type":
            return {"dtype": str(DTYPES[value]).removeprefix("torch.")}
        if kind in ("as_int", "as_bool", "as_string"):
            return {"as_int": int, "as_bool": bool, "as_string": str}[kind](value)
        if kind == "as_float":
            return _finite(float(value))
        if kind in ("as_ints", "as_bools", "as_floats"):
            return [self._argument({kind[:-1]: item}) for item in value]
        raise ValueError(f"an argument {kind} is not known")

    def weights(self) -> dict[str, Tensor]:
        """The tensors that the graph uses, by their names in it."""
        configs = {
            folder: self.archive.json(f"{self.root}/data/{folder}/{self.name}_{folder}_config.json")["config"]
            for folder in ("weights", "constants")
        }
        found = {}
        for name, (folder, key) in self.tensors.items():
            config = configs[folder].get(key) or configs["constants" if folder == "weights" else "weights"][key]
            if config not in configs[folder].values():
                folder = "constants" if folder == "weights" else "weights"
            found[name] = self._tensor(folder, config)
        return found

    def _tensor(self, folder: str, config: dict[str, Any]) -> Tensor:
        data = self.archive.read(f"{self.root}/data/{folder}/{config['path_name']}")
        if config["use_pickle"]:
            tensor = load(self.file, data)
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{config['path_name']} is no tensor")
            return tensor.detach().clone()
        meta = config["tensor_meta"]
        size, stride = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
        if math.prod(size) * 8 > FILE_BYTES:  # as by strides of 0
            raise ValueError(f"{config['path_name']} is larger than a network's weights")
        flat = torch.frombuffer(bytearray(data), dtype=DTYPES[meta["dtype"]]) if data else torch.empty(0)
        return flat.as_strided(size, stride, int(meta["storage_offset"]["as_int"])).clone().contiguous()


def _finite(value: float) -> float:
    """A number that JSON has; an infinity as the largest one."""
    if math.isnan(value):
        raise ValueError("an argument is not a number")
    return min(max(value, -1e300), 1e300)


# --- ONNX ---


def find_onnx(file: Path, data: bytes, options: ImportOptions) -> Found:
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
        description, weights, sizes, whole = _onnx_graph(file, model)
        network = networks.OnnxGraph(**{k: v for k, v in description.items() if k != "kind"}, weights=weights)
    except (DecodeError, *MALFORMED) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{file} is no sound ONNX model ({reason or type(error).__name__}); export it again."
        ) from error
    whole = whole or _divides(description["nodes"], weights, description["input"])
    return _of_graph(file, "ONNX", network, description, sizes, whole, options)


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


def _onnx_graph(file: Path, model: Any) -> tuple[dict[str, Any], dict[str, Tensor], list[int | None], bool]:
    """Description, weights, the input's sizes, and whether it is of whole numbers 0 to 255."""
    import onnx

    from carla_digr.onnx_operators import OPERATORS

    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < 9:
        raise UserError(f"{file} has ONNX's operator set {opset}; export it with 13 or newer.")
    tensors = {item.name: _onnx_tensor(item) for item in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            tensors[node.output[0]] = _onnx_constant(node)
            continue
        known = node.domain in ("", "ai.onnx") and node.op_type in OPERATORS
        if not known or (node.op_type in ("Softmax", "LogSoftmax") and opset < 13):
            what = f"{node.domain}.{node.op_type}".lstrip(".")
            raise UserError(
                f"{file} has the operator {what} of set {opset}, which is not known here; export it with operator set "
                f"18, or as TorchScript (torch.jit.trace) or with torch.export.save."
            )
        attributes = {item.name: _onnx_attribute(onnx.helper.get_attribute_value(item)) for item in node.attribute}
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


def _onnx_tensor(item: Any) -> Tensor:
    import onnx

    return torch.from_numpy(onnx.numpy_helper.to_array(item).copy())


def _onnx_constant(node: Any) -> Tensor:
    import onnx

    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return _onnx_tensor(value)
    if attribute.name in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    if attribute.name in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    raise ValueError(f"a constant {attribute.name} is not known")


def _onnx_attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float):
        return _finite(value)
    if hasattr(value, "raw_data"):  # ConstantOfShape's
        return _onnx_tensor(value).flatten().tolist()[0]
    return [_onnx_attribute(item) for item in value]


# --- TorchScript ---


def find_torchscript(file: Path, data: bytes, options: ImportOptions) -> Found:
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
    found = _of_graph(file, "TorchScript", network, description, sizes, _script_divides(script), options)
    found.archive = data
    return found


def _of_graph(
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
    """
    if len(sizes) != 4:
        raise UserError(
            f"{file} takes inputs of {len(sizes)} axes; export a network that takes batches of pictures (B, C, H, W)."
        )
    network = network.eval()
    layout = options.input.layout
    assumed: list[tuple[str, str]] = []
    notes: list[str] = []
    if layout is None:
        last, second = sizes[3], sizes[1]
        layout = "hwc" if last is not None and last <= 4 and (second is None or second > 4) else "chw"
        if layout == "hwc":
            assumed.append(("axes in the order B, H, W, C", "--layout"))
    batch, channels = sizes[0], sizes[1 if layout == "chw" else 3]
    height, width = sizes[2:] if layout == "chw" else sizes[1:3]
    if options.input.shape is not None:
        channels, height, width = options.input.shape
    elif options.input.size is not None:
        height, width = options.input.size
    if channels is None:
        raise UserError(f"{file} does not say the shape of a state; give --input-shape C,H,W.")
    if height is None or width is None:
        height, width = input_size(network, channels, layout, str(file))
        assumed.append((f"pictures of {height}x{width}", "--input"))
    shape = sized(file, (channels, height, width))
    answer = _for_any_batch(network, shape, layout, batch)
    if answer is not None and answer[0] is not None and isinstance(network, networks.Graph):
        freed = _freed(network, answer[0])
        again = _for_any_batch(freed, shape, layout, batch) if freed is not None else None
        if freed is not None and again is not None and again[0] is None:
            network, answer = freed, again
            description["nodes"] = freed.nodes
    if answer is None:
        raise UserError(
            f"The network of {file} does not take states of {' x '.join(map(str, shape))} (channels x height x width); "
            f"give another --input-shape or --layout."
        )
    fixed, results = answer
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


def _for_any_batch(
    network: nn.Module, shape: tuple[int, int, int], layout: str, batch: int | None
) -> tuple[int | None, tuple[Tensor, ...]] | None:
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


# Operations before which a picture's pixels are what they are after
UNSCALED = ("Cast", "Transpose", "Identity", "aten.to.", "aten._to_copy.", "aten.permute.", "aten.clone.")


def _divides(nodes: list[dict[str, Any]], weights: dict[str, Tensor], name: str) -> bool:
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
            return _is_255(number, operation.startswith("div"))
    return False


def _is_255(number: Any, division: bool) -> bool:
    """Whether something is divided by 255 or multiplied with its inverse."""
    if isinstance(number, Tensor):
        number = number.item() if number.numel() == 1 else None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    return math.isclose(number, 255.0 if division else 1 / 255, rel_tol=1e-4)


def _script_divides(script: Any) -> bool:
    """``_divides`` of a TorchScript."""
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
                return _is_255(inputs[1].toIValue(), name != "mul")
    except (RuntimeError, AttributeError, IndexError):  # a module without a graph of its own
        pass
    return False
