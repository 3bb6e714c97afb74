"""The networks of imported policies: each kind builds a torch module from what a card says of it and from its weights.

A card describes a graph as data: known layers, or the operations of an exported program, each of which stands in a
table here or in `carla_digr.onnx_operators`. Nothing of it is evaluated as code. TorchScript alone brings its own
interpreter, torch's, which runs the archive's graph; a ``module`` runs code that the user has named.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import operator
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carla_digr.errors import UserError
from carla_digr.files import WEIGHTS_BYTES, read_regular

# --- layers ---

ACTIVATIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "elu": (nn.ELU, ("alpha",)),
    "celu": (nn.CELU, ("alpha",)),
    "selu": (nn.SELU, ()),
    "gelu": (nn.GELU, ("approximate",)),
    "silu": (nn.SiLU, ()),
    "mish": (nn.Mish, ()),
    "softplus": (nn.Softplus, ("beta",)),
    "softsign": (nn.Softsign, ()),
    "tanh": (nn.Tanh, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "identity": (nn.Identity, ()),
}
"""Name -> torch's class, and the arguments that a card may give it."""

LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    **ACTIVATIONS,
    "conv": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
    "linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "batch_norm_1d": (nn.BatchNorm1d, ("num_features", "eps", "affine")),
    "batch_norm_2d": (nn.BatchNorm2d, ("num_features", "eps", "affine")),
    "layer_norm": (nn.LayerNorm, ("normalized_shape", "eps", "bias")),
    "max_pool": (nn.MaxPool2d, ("kernel_size", "stride", "padding")),
    "avg_pool": (nn.AvgPool2d, ("kernel_size", "stride", "padding")),
    "flatten": (nn.Flatten, ()),
}


class Residual(nn.Module):
    """x + layers(x)."""

    def __init__(self, layers: list[dict[str, Any]]):
        super().__init__()
        self.layers = _sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.layers(x)


class Beside(nn.Module):
    """The outputs of several branches of the same input, one after the other along the features."""

    def __init__(self, branches: list[list[dict[str, Any]]]):
        super().__init__()
        self.branches = nn.ModuleList(_sequential(layers) for layers in branches)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' outputs."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class LogDeviation(nn.Module):
    """Log standard deviations that do not depend on the state, after the means."""

    def __init__(self, size: int):
        super().__init__()
        self.log_std = nn.Parameter(torch.empty(size))

    def forward(self, means: Tensor) -> Tensor:
        """Means (B, D) to (B, 2 D)."""
        return torch.cat([means, self.log_std.expand(len(means), -1)], dim=1)


class Clamp(nn.Module):
    """Values kept in [minimum, maximum]."""

    def __init__(self, minimum: float, maximum: float):
        super().__init__()
        self.minimum, self.maximum = float(minimum), float(maximum)

    def forward(self, x: Tensor) -> Tensor:
        """The clamped values."""
        return x.clamp(self.minimum, self.maximum)


LAYERS |= {
    "residual": (Residual, ("layers",)),
    "beside": (Beside, ("branches",)),
    "log_deviation": (LogDeviation, ("size",)),
    "clamp": (Clamp, ("minimum", "maximum")),
}


class LayerNetwork(nn.Module):
    """Layers that outputs and value share, then those of each.

    Args:
        shared, outputs: layers as a card has them, ``{"layer": "conv", "in_channels": 4, ...}``.
        value: those of the critic, None where there is none.
    """

    def __init__(
        self, shared: list[dict[str, Any]], outputs: list[dict[str, Any]], value: list[dict[str, Any]] | None = None
    ):
        super().__init__()
        self.shared, self.outputs = _sequential(shared), _sequential(outputs)
        self.value = None if value is None else _sequential(value)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Outputs (B, K), and the critic's values (B, 1) where there is a critic."""
        x = self.shared(x)
        return self.outputs(x) if self.value is None else (self.outputs(x), self.value(x))


def _sequential(layers: list[dict[str, Any]]) -> nn.Sequential:
    return nn.Sequential(*(_layer(**layer) for layer in layers))


def _layer(layer: str, **arguments: Any) -> nn.Module:
    module, known = LAYERS[layer]
    unknown = arguments.keys() - set(known)
    if unknown:
        raise ValueError(f"a layer {layer} has no '{min(unknown)}'")
    return module(**{key: tuple(value) if key in SIZES else value for key, value in arguments.items()})


SIZES = ("kernel_size", "stride", "padding", "dilation", "normalized_shape")  # arguments that are lists of numbers

# --- operations of an exported program ---

_ATEN = """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_view abs
adaptive_avg_pool2d adaptive_max_pool2d add addmm alias amax amin arange argmax argmin atan avg_pool2d baddbmm
batch_norm bmm cat ceil celu chunk clamp clamp_max clamp_min clone concat constant_pad_nd contiguous conv1d conv2d
convolution copy cos detach detach_ div dropout einsum elu embedding eq erf exp expand expand_as flatten floor
floor_divide full full_like gather ge gelu group_norm gt hardsigmoid hardswish hardtanh index index_select
instance_norm layer_norm le leaky_relu lift_fresh_copy linalg_vector_norm linear log log1p log_sigmoid log_softmax
logical_and logical_not logical_or logsumexp lt masked_fill matmul max max_pool2d max_pool2d_with_indices maximum
mean min minimum mish mm movedim mul narrow native_group_norm native_layer_norm ne neg new_ones new_zeros ones
ones_like pad permute pixel_shuffle pow prelu reciprocal relu relu6 remainder repeat reshape rsqrt rsub
scalar_tensor scaled_dot_product_attention select selu sigmoid sign silu sin slice softmax softplus split
split_with_sizes sqrt square squeeze stack std sub sum sym_numel sym_size t tanh tile to transpose true_divide
type_as unbind unflatten unfold unsqueeze upsample_bilinear2d upsample_nearest2d var view view_as where zeros
zeros_like
"""
_IN_PLACE = """
add_ celu_ clamp_ div_ dropout_ elu_ hardsigmoid_ hardswish_ hardtanh_ leaky_relu_ mish_ mul_ relu6_ relu_ selu_
sigmoid_ silu_ sub_ tanh_
"""
ATEN = frozenset(_ATEN.split())  # functions of tensors alone: none reads or writes a file or starts anything
IN_PLACE = frozenset(_IN_PLACE.split())
_SIZES = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
PYTHON = {f"_operator.{name}": getattr(operator, name) for name in _SIZES}  # of numbers, such as sizes


def operation(target: str) -> Callable | None:
    """The function that an exported program means by ``aten.conv2d.default`` or ``_operator.add``; None: not known."""
    if target in PYTHON:
        return PYTHON[target]
    library, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if library != "aten" or name not in ATEN | IN_PLACE or overload not in getattr(torch.ops.aten, name).overloads():
        return None
    return getattr(getattr(torch.ops.aten, name), overload)


class Graph(nn.Module):
    """A list of operations on named values, as exporters write it.

    Args:
        nodes: each ``{"op": ..., "outputs": [names], ...}``, in the order of execution.
        weights: tensors that nodes use by name.
        inputs, outputs: names of the network's input, and of its output or outputs.
    """

    offers = "gradient"  # its activations are no modules

    def __init__(self, nodes: list[dict[str, Any]], weights: Mapping[str, Tensor], input: str, outputs: list[str]):
        super().__init__()
        self.nodes, self.input, self.outputs = nodes, input, outputs
        self.names = tuple(weights)
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.names}
        values[self.input] = x.clone()  # an operation in place must not change the caller's
        for node in self.nodes:
            result = self.run(node, values)
            names = node["outputs"]
            values.update(zip(names, result if len(names) > 1 else [result], strict=False))
        outputs = tuple(values[name] for name in self.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, node: dict[str, Any], values: dict[str, Any]) -> Any:
        """One operation."""
        raise NotImplementedError


class ExportedGraph(Graph):
    """A graph of torch.export: nodes have ``arguments``, by the names of the operation's schema."""

    def run(self, node: dict[str, Any], values: dict[str, Any]) -> Any:
        """One operation."""
        function = operation(node["op"])
        if function is None:
            raise ValueError(f"the operation {node['op']} is not known")
        arguments = {key: _argument(value, values) for key, value in node["arguments"].items()}
        return function(*arguments.values()) if node["op"] in PYTHON else function(**arguments)


def _argument(value: Any, values: dict[str, Any]) -> Any:
    """A node's argument: {"value": name} is one computed before, {"dtype": name} a type, lists hold arguments."""
    if isinstance(value, list):
        return [_argument(item, values) for item in value]
    if isinstance(value, dict):
        if "value" in value:
            return values[value["value"]]
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no type {value['dtype']}")
        return dtype
    return value


class OnnxGraph(Graph):
    """A graph of ONNX: nodes have ``inputs``, names where "" is an input left out, and ``attributes``."""

    def run(self, node: dict[str, Any], values: dict[str, Any]) -> Any:
        """One operation."""
        from carla_digr.onnx_operators import OPERATORS

        inputs = [values[name] if name else None for name in node["inputs"]]
        return OPERATORS[node["op"]](*inputs, **node["attributes"])


class FixedBatch(nn.Module):
    """A network for batches of one size, made to take any: in turns, the last one filled up with its first state."""

    offers = "gradient"

    def __init__(self, network: nn.Module, batch: int):
        super().__init__()
        self.network, self.batch = network, batch

    def forward(self, x: Tensor) -> Any:
        """What the network gives for the whole batch."""
        turns = []
        for part in x.split(self.batch):
            filled = torch.cat([part, part[:1].expand(self.batch - len(part), *part.shape[1:])])
            result = self.network(filled)
            results = result if isinstance(result, (tuple, list)) else (result,)
            turns.append([item.reshape(self.batch, -1)[: len(part)] for item in results])
        joined = tuple(torch.cat(items) for items in zip(*turns, strict=True))
        return joined[0] if len(joined) == 1 else joined


class Scripted(nn.Module):
    """A TorchScript module."""

    offers = "gradient"  # it takes no hooks

    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script

    def forward(self, x: Tensor) -> Any:
        """The module's outputs."""
        return self.script(x)


# --- the kinds of a card's "network" ---


def layers(description: dict[str, Any], weights: dict[str, Tensor], files: Path | None = None) -> nn.Module:
    """Kind ``layers``: ``shared``, ``outputs`` and ``value``, lists of known layers."""
    with _described(description), torch.device("meta"):
        network = LayerNetwork(**_without(description, "kind"))
    return _filled(network, weights)


def exported(description: dict[str, Any], weights: dict[str, Tensor], files: Path | None = None) -> nn.Module:
    """Kind ``exported``: the nodes of a torch.export program."""
    with _described(description):
        batch = description.get("batch")
        graph = ExportedGraph(**_without(description, "kind", "batch"), weights=_graph_weights(weights, batch))
        return _any_batch(graph, batch)


def onnx(description: dict[str, Any], weights: dict[str, Tensor], files: Path | None = None) -> nn.Module:
    """Kind ``onnx``: the nodes of an ONNX graph."""
    from carla_digr.onnx_operators import OPERATORS

    with _described(description):
        batch = description.get("batch")
        unknown = {node["op"] for node in description["nodes"]} - OPERATORS.keys()
        if unknown:
            raise ValueError(f"the operation {min(unknown)} is not known")
        graph = OnnxGraph(**_without(description, "kind", "batch"), weights=_graph_weights(weights, batch))
        return _any_batch(graph, batch)


def torchscript(description: dict[str, Any], weights: dict[str, Tensor], files: Path) -> nn.Module:
    """Kind ``torchscript``: the archive beside the card, ``<stem>.pt``, whose SHA-256 the card has.

    The archive's graph is run by torch's interpreter: load only files from people you trust.
    """
    path = Path(files).with_suffix(".pt")
    try:
        data = read_regular(path, WEIGHTS_BYTES)
    except OSError as error:
        raise UserError(f"Cannot read the TorchScript {path} that belongs to the card: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != description.get("sha256"):
        raise UserError(f"{path} is damaged or does not belong to its card (its SHA-256 differs); import it again.")
    try:
        network = Scripted(load_script(data))
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript that this torch {torch.__version__} can load.") from error
    return _any_batch(network, description.get("batch"))


def load_script(data: bytes) -> torch.jit.ScriptModule:
    """A TorchScript archive's module, in evaluation mode.

    Raises:
        RuntimeError: torch cannot load it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch asks for torch.export, which is read here too
        return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()


def module(description: dict[str, Any], weights: dict[str, Tensor], files: Path | None = None) -> nn.Module:
    """Kind ``module``: the network that the user's own code builds, ``factory`` being "package.module:function".

    Only for a user who has named the same factory: see `carla_digr.checkpoint.load`.
    """
    return _filled(build_module(str(description.get("factory"))), weights)


def build_module(factory: str) -> nn.Module:
    """Call the user's "package.module:function".

    Raises:
        UserError: there is none, it fails, or it gives no torch module.
    """
    name, _, attribute = factory.partition(":")
    if not name or not attribute:
        raise UserError(f"--module must be package.module:factory, not {factory!r}.")
    try:
        function = operator.attrgetter(attribute)(importlib.import_module(name))
        network = function() if inspect.isroutine(function) or isinstance(function, type) else function
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"The module {factory} cannot be built ({type(error).__name__}: {error}).") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{factory} gives {type(network).__name__}; it must give a torch.nn.Module.")
    return network


def _without(description: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in description.items() if key not in keys}


def _any_batch(network: nn.Module, batch: Any) -> nn.Module:
    if batch is None:
        return network
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"the batch {batch!r} is no number of states")
    return FixedBatch(network, batch)


def _graph_weights(weights: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """The graph's own names of its weights, as its module's state dict has them or without a fixed batch's prefix."""
    prefix = "network." if batch is not None else ""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _filled(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"The weights do not fit the network: {first_fault(error)}.") from error
    return network


def first_fault(error: RuntimeError) -> str:
    """The first of the differences that load_state_dict lists."""
    lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    return lines[0][:300].rstrip(". ")


@contextmanager
def _described(description: dict[str, Any]):
    """What a description of the wrong form raises, as one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"The card's network of kind {description.get('kind')!r} cannot be built ({type(error).__name__}: "
            f"{reason}); import the policy again."
        ) from error
