"""Layers out of named tensors: what a state dict's shapes say of a network, and what only its author knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing.found import COMMON_SIZES, Found, sized, tried
from carla_digr.importing.options import ImportOptions

NATURE_STRIDES = {8: 4, 4: 2, 3: 1}
"""Kernel -> stride of Mnih et al. 2015, which stable-baselines3 and CleanRL build, without padding."""

OTHERWISE = (
    "export the network with torch.export.save, torch.jit.trace or torch.onnx.export, or name the code that builds it "
    "with --module package.module:factory"
)

Layer = tuple[dict[str, Any], dict[str, Tensor]]
"""What a card says of a layer, and its tensors."""


@dataclass
class Weighted:
    """A module of a state dict that has weights."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``conv``, ``linear``, ``batch_norm`` or ``layer_norm``; "" where the tensors are of no known layer."""
        names, weight = set(self.tensors), self.tensors.get("weight")
        if (
            {"running_mean", "running_var"}
            <= names
            <= {
                "weight",
                "bias",
                "running_mean",
                "running_var",
                "num_batches_tracked",
            }
        ):
            return "batch_norm"
        if weight is None or not names <= {"weight", "bias"} or not weight.numel():
            return ""
        if weight.dim() == 4:
            return "conv"
        if weight.dim() == 2:
            return "linear"
        return "layer_norm" if names == {"weight", "bias"} and weight.dim() in (1, 3) else ""

    @property
    def index(self) -> tuple[str, int] | None:
        """The nn.Sequential that it stands in, and where; None where it has a name of its own."""
        parent, _, last = self.name.rpartition(".")
        return (parent, int(last)) if last.isdigit() else None


def modules(tensors: dict[str, Tensor]) -> list[Weighted]:
    """The tensors by module, in the order of the file, which is that of their definition."""
    found: dict[str, Weighted] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        found.setdefault(name, Weighted(name)).tensors[kind] = tensor
    return list(found.values())


def conv(tensors: dict[str, Tensor], stride: int, padding: int) -> Layer:
    """A convolution of square stride."""
    weight = tensors["weight"]
    out_channels, in_channels, *kernel = weight.shape
    arguments = {
        "layer": "conv",
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": list(kernel),
        "stride": [stride, stride],
        "padding": [padding, padding],
        "dilation": [1, 1],
        "groups": 1,
        "bias": "bias" in tensors,
    }
    return arguments, tensors


def linear(tensors: dict[str, Tensor]) -> Layer:
    """A linear layer."""
    out_features, in_features = tensors["weight"].shape
    return {
        "layer": "linear",
        "in_features": in_features,
        "out_features": out_features,
        "bias": "bias" in tensors,
    }, tensors


def norm(module: Weighted, flat: bool) -> Layer:
    """A normalisation, with torch's default epsilon."""
    if module.kind == "layer_norm":
        shape = list(module.tensors["weight"].shape)
        return {"layer": "layer_norm", "normalized_shape": shape, "eps": 1e-5, "bias": True}, module.tensors
    return {
        "layer": "batch_norm_1d" if flat else "batch_norm_2d",
        "num_features": len(module.tensors["running_mean"]),
        "eps": 1e-5,
        "affine": "weight" in module.tensors,
    }, module.tensors


def plain(name: str, **arguments: Any) -> Layer:
    """A layer without weights."""
    return {"layer": name, **arguments}, {}


def residual(items: Sequence[Layer]) -> Layer:
    """x + layers(x)."""
    description, weights = _joined(items, "layers")
    return {"layer": "residual", "layers": description}, weights


def beside(*branches: Sequence[Layer]) -> Layer:
    """Branches whose outputs follow each other."""
    joined = [_joined(items, f"branches.{index}") for index, items in enumerate(branches)]
    weights = {name: tensor for _, tensors in joined for name, tensor in tensors.items()}
    return {"layer": "beside", "branches": [description for description, _ in joined]}, weights


def network(
    shared: Sequence[Layer], outputs: Sequence[Layer], value: Sequence[Layer] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The module of kind ``layers``, filled, and its description.

    Raises:
        UserError: tensors and layers do not fit.
    """
    parts = {"shared": shared, "outputs": outputs, "value": value}
    description: dict[str, Any] = {"kind": "layers"}
    weights: dict[str, Tensor] = {}
    for name, items in parts.items():
        description[name] = None
        if items is not None:
            description[name], tensors = _joined(items, name)
            weights |= tensors
    return networks.layers(description, weights).eval(), description


def _joined(items: Iterable[Layer], prefix: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    items = list(items)
    weights = {
        f"{prefix}.{index}.{name}": tensor.contiguous().clone()
        for index, (_, tensors) in enumerate(items)
        for name, tensor in tensors.items()
    }
    return [description for description, _ in items], weights


def found(
    file: Path, kind: str, network: nn.Module, description: dict[str, Any], shape: tuple[int, int, int], output: str
) -> Found:
    """A network of layers, tried out.

    Raises:
        UserError: its layers do not fit each other or the state.
    """
    result = tried(network, sized(file, shape), "chw")
    if result is None or result[0].dim() != 2:
        raise UserError(
            f"The layers of {file} do not fit each other or a picture of {' x '.join(map(str, shape))}: give --input, "
            f"--strides and --paddings, or {OTHERWISE}."
        )
    outputs = result[0].shape[1]
    return Found(kind, network, description, shape, outputs, output, structure=in_words(description))


# --- what shapes do not say ---


@dataclass
class Geometry:
    """Strides and paddings of a state dict's convolutions, in their order, and the activation.

    Attributes:
        file: name in errors.
        activation: between layers.
        strides, paddings: one a convolution.
        assumed: whether the strides are assumed.
    """

    file: Path
    activation: Layer
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    assumed: bool = False

    @classmethod
    def of(cls, file: Path, kernels: Sequence[int], activation: str, options: ImportOptions) -> Geometry:
        """By options, else those of the Nature CNN.

        Args:
            file: name in errors.
            kernels: of the convolutions, pixels.
            activation: where the options have none.
            options: the user's.

        Raises:
            UserError: the strides are not known, their number is wrong, or there is no such activation.
        """
        name = options.activation or activation
        if name not in networks.ACTIVATIONS:
            raise UserError(f"There is no activation '{name}'; choose one of {', '.join(networks.ACTIVATIONS)}.")
        for option, values in (("--strides", options.strides), ("--paddings", options.paddings)):
            if values is not None and len(values) != len(kernels):
                raise UserError(f"{file} has {len(kernels)} convolutions, but {option} has {len(values)} numbers.")
        strides, assumed = options.strides, False
        if strides is None:
            if tuple(kernels) != tuple(NATURE_STRIDES)[: len(kernels)]:
                raise UserError(
                    f"{file} does not say the strides of its convolutions (kernels {', '.join(map(str, kernels))}); "
                    f"give --strides and, where they have any, --paddings, one number each; or {OTHERWISE}."
                )
            strides, assumed = tuple(NATURE_STRIDES[kernel] for kernel in kernels), bool(kernels)
        return cls(file, plain(name), strides, options.paddings or (0,) * len(kernels), assumed)

    def size_after(self, height: int, width: int, kernels: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Rows and columns after the convolutions; not positive where they do not fit."""
        for (rows, columns), stride, padding in zip(kernels, self.strides, self.paddings, strict=True):
            if height + 2 * padding < rows or width + 2 * padding < columns:
                return 0, 0
            height = (height + 2 * padding - rows) // stride + 1
            width = (width + 2 * padding - columns) // stride + 1
        return height, width


def square_input(positions: float, after: Any, file: Path) -> int:
    """Height and width of the square state that leaves this many positions: a common size, else the smallest.

    Args:
        positions: inputs of the first linear layer for each channel.
        after: size -> (rows, columns) that are left of it.
        file: name in errors.

    Raises:
        UserError: there is none.
    """
    for size in (*COMMON_SIZES, *range(8, 513)):
        rows, columns = after(size)
        if rows > 0 and rows * columns == positions:
            return size
    raise UserError(f"No square picture fits the network of {file}; give --input HxW (or --strides and --paddings).")


def chain(items: Sequence[Weighted], geometry: Geometry, spatial: bool, head: bool) -> list[Layer]:
    """Modules that follow each other, as layers with their activations.

    Args:
        items: in the order of the file.
        geometry: of their convolutions.
        spatial: whether the input has rows and columns.
        head: whether the last layer is left as it is.

    Raises:
        UserError: what stands between two modules is not known.
    """
    result: list[Layer] = []
    strides_and_paddings = iter(zip(geometry.strides, geometry.paddings, strict=True))
    pending = False  # an activation is due before the next layer
    for position, item in enumerate(items):
        before = items[position - 1] if position else None
        is_norm = item.kind in ("batch_norm", "layer_norm")
        if before is not None:
            between = _between(before, item)
            flattens = spatial and _is_flat(item)
            if is_norm and before.kind in ("batch_norm", "layer_norm"):
                raise UserError(
                    f"{geometry.file} does not say where {before.name} and {item.name} stand in its network; "
                    f"{OTHERWISE}."
                )
            if between is not None and between - flattens not in (0, 1):
                raise UserError(
                    f"{geometry.file} does not say what stands between {before.name} and {item.name}; {OTHERWISE}."
                )
            activated = pending and (not is_norm if between is None else between - flattens == 1)
            if activated:
                result.append(geometry.activation)
                pending = False
        if item.kind == "conv":
            if not spatial:
                raise UserError(f"{geometry.file} has the convolution {item.name} after a linear layer; {OTHERWISE}.")
            result.append(conv(item.tensors, *next(strides_and_paddings)))
        elif item.kind == "linear":
            if spatial:
                result.append(plain("flatten"))
                spatial = False
            result.append(linear(item.tensors))
        else:
            if spatial and _is_flat(item):
                result.append(plain("flatten"))
                spatial = False
            result.append(norm(item, flat=not spatial))
        pending = pending or not is_norm
    if pending and not head:
        result.append(geometry.activation)
    return result


def _is_flat(item: Weighted) -> bool:
    """Whether a module is one of features without rows and columns."""
    return item.kind == "linear" or (item.kind == "layer_norm" and item.tensors["weight"].dim() == 1)


def _between(before: Weighted, after: Weighted) -> int | None:
    """How many modules without weights stand between two of one nn.Sequential; None where they are not of one."""
    first, second = before.index, after.index
    if first is None or second is None or first[0] != second[0]:
        return None
    return second[1] - first[1] - 1


def in_words(description: dict[str, Any]) -> str:
    """A network of kind ``layers``, briefly."""

    def words(layers: list[dict[str, Any]]) -> str:
        return ", ".join(word(layer) for layer in layers)

    def word(layer: dict[str, Any]) -> str:
        if layer["layer"] == "conv":
            kernel = "x".join(map(str, layer["kernel_size"]))
            padding = f" padding {layer['padding'][0]}" if layer["padding"][0] else ""
            return f"conv {layer['out_channels']} of {kernel} by {layer['stride'][0]}{padding}"
        if layer["layer"] == "linear":
            return f"linear {layer['out_features']}"
        if layer["layer"] == "residual":
            return f"x + ({words(layer['layers'])})"
        if layer["layer"] == "beside":
            return " beside ".join(f"({words(branch)})" for branch in layer["branches"])
        return layer["layer"].replace("_", " ")

    parts = [words(description["shared"]), f"outputs: {words(description['outputs'])}"]
    if description["value"] is not None:
        parts.append(f"value: {words(description['value'])}")
    return "; ".join(part for part in parts if part)
