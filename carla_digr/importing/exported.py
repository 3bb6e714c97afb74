"""Programs of torch.export, read as the data that they are.

`torch.export.load` runs what a file says: pickles, expressions, guards as Python code, and any function below `torch`.
Here a program is JSON and raw tensors, and its operations are looked up in a table of known ones. It becomes nodes in
the card, and a graph with a gradient.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing.found import Found
from carla_digr.importing.graphs import MALFORMED, divides, finite, tried_graph
from carla_digr.importing.options import ImportOptions
from carla_digr.importing.reading import FILE_BYTES, Archive, load

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


def find(file: Path, archive: Archive, options: ImportOptions) -> Found:
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
        whole = meta["dtype"] == 1 or divides(nodes, weights, reader.input)
    except MALFORMED as error:
        raise UserError(
            f"{file} is no sound exported program ({type(error).__name__}: {error}); export it again."
        ) from error
    return tried_graph(file, "torch.export", network, description, sizes, whole, options)


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
            return finite(float(value))
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
