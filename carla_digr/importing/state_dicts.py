"""State dicts: tensors by name. Shapes and names say much of the network, and what they do not is assumed and told."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from carla_digr import networks
from carla_digr.errors import UserError
from carla_digr.importing import layers
from carla_digr.importing.found import Found, input_size, sized, tried
from carla_digr.importing.layers import OTHERWISE, Geometry, Layer, Weighted
from carla_digr.importing.options import ImportOptions

VALUE_NAMES = {"critic", "value", "values", "vf", "v", "baseline"}
POLICY_NAMES = {"actor", "policy", "pi", "logits", "mu", "mean", "action", "q", "qf"}
Q_NAMES = {"q", "qf"}
# Names of networks whose layers do not simply follow each other
BRANCHED = {
    *("lstm", "gru", "rnn", "attn", "attention", "transformer", "res", "resnet", "resblock", "residual", "block"),
    *("blocks", "skip", "shortcut", "downsample", "adv", "advantage"),
}
STAGES = re.compile(r"layer\d+\.\d+\.")  # of torchvision's ResNets
LOG_STD = re.compile(r"(^|[._])log_?(std|sigma)$")
RESIDUAL = re.compile(r"^(?:(.+)\.)?(\d+)\.(conv|res_block[01]\.conv[01])$")


def find(file: Path, tensors: dict[str, Tensor], options: ImportOptions) -> Found:
    """The network of a state dict.

    Raises:
        UserError: what its network is cannot be said from the tensors and the options.
    """
    if options.module is not None:
        return _of_module(file, tensors, options)
    q_values = all(_parts(name) & Q_NAMES for name in tensors)
    tensors = _without_prefix(tensors)
    log_std = {name: tensor for name, tensor in tensors.items() if LOG_STD.search(name)}
    modules = layers.modules({name: tensor for name, tensor in tensors.items() if name not in log_std})
    if not any(module.kind in ("conv", "linear") for module in modules):
        raise UserError(f"{file} holds no convolution and no linear layer; give a policy's state dict.")
    if len(log_std) > 1:
        raise UserError(f"{file} has several log standard deviations ({', '.join(log_std)}); {OTHERWISE}.")
    sequences = [module for module in modules if RESIDUAL.match(module.name)]
    if any(".res_block" in f".{module.name}" for module in sequences):
        return _impala(file, modules, sequences, options)
    for module in modules:
        if not module.kind or _parts(module.name) & BRANCHED or STAGES.search(module.name):
            raise UserError(
                f"{file} has the module {module.name or 'without a name'}, whose place in the network its tensors do "
                f"not say; {OTHERWISE}."
            )
    return _followed(file, modules, next(iter(log_std.values()), None), q_values, options)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what they all begin with, such as "module." or "agent."."""
    while len(tensors) > 2:
        prefix = next(iter(tensors)).partition(".")[0]
        if prefix.isdigit() or not all(name.startswith(f"{prefix}.") for name in tensors):
            break
        shorter = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
        if not all("." in name for name in shorter):
            break
        tensors = shorter
    return tensors


def _parts(name: str) -> set[str]:
    """The words of a module's name, without their numbers: "features.0.conv_1" has features, conv and ""."""
    return set(re.split(r"[._]", re.sub(r"\d+", "", name.lower())))


def _role(name: str) -> str:
    """``value``, ``outputs`` or ``shared``, by the parts of a module's name."""
    parts = _parts(name)
    if parts & VALUE_NAMES:
        return "value"
    return "outputs" if parts & POLICY_NAMES else "shared"


def _followed(
    file: Path, modules: list[Weighted], log_std: Tensor | None, q_values: bool, options: ImportOptions
) -> Found:
    """Layers that follow each other in the order of the file: those shared, then a head each."""
    sides: dict[str, list[Weighted]] = {"shared": [], "outputs": [], "value": []}
    for module in modules:
        sides[_role(module.name)].append(module)
    if not sides["outputs"]:
        if sides["value"]:
            raise UserError(
                f"{file} does not say which of its layers gives the actions ({', '.join(m.name for m in modules)}); "
                f"{OTHERWISE}."
            )
        sides["outputs"], sides["shared"] = sides["shared"], []
    trunk = sides["shared"] or sides["outputs"]
    convolutions = [
        module for name in ("shared", "outputs", "value") for module in sides[name] if module.kind == "conv"
    ]
    kernels = [tuple(module.tensors["weight"].shape[2:]) for module in convolutions]
    count = sum(module.kind == "conv" for module in trunk)
    each = [sum(module.kind == "conv" for module in sides[name]) for name in ("shared", "outputs", "value")]
    if each[0] and (each[1] or each[2]):
        raise UserError(f"{file} has convolutions in its heads and before them; {OTHERWISE}.")
    geometry = Geometry.of(file, [kernel[0] for kernel in kernels[:count]], "relu", options)
    if each[2] and kernels[: each[1]] != kernels[each[1] :]:
        raise UserError(f"{file} has an actor and a critic of different convolutions; {OTHERWISE}.")
    channels, size, assumed = _state(file, trunk, geometry, kernels[:count], options)

    def head(name: str) -> list[Layer]:
        return layers.chain(sides[name], geometry, spatial=not sides["shared"], head=True)

    shared = layers.chain(sides["shared"], geometry, spatial=True, head=False)
    outputs = head("outputs")
    if log_std is not None:
        outputs.append(({"layer": "log_deviation", "size": log_std.numel()}, {"log_std": log_std.flatten()}))
    network, description = layers.network(shared, outputs, head("value") if sides["value"] else None)
    output = "gaussian" if log_std is not None else "logits"
    if q_values or (log_std is None and all(_parts(module.name) & Q_NAMES for module in sides["outputs"])):
        output = "q_values"
    found = layers.found(file, "state dict", network, description, (channels, *size), output)
    if geometry.assumed:
        found.assume(f"strides {', '.join(map(str, geometry.strides))} without padding", "--strides, --paddings")
    if options.activation is None:
        found.assume("ReLU after each hidden layer", "--activation")
    if assumed:
        found.assume(f"pictures of {size[0]}x{size[1]}", "--input")
    if options.output is None and output == "logits":
        found.assume("outputs that are logits", "--output")
    return found


def _state(
    file: Path,
    trunk: list[Weighted],
    geometry: Geometry,
    kernels: list[tuple[int, ...]],
    options: ImportOptions,
) -> tuple[int, tuple[int, int], bool]:
    """C, (H, W) of the state, and whether the size is assumed."""
    convolutions = [module for module in trunk if module.kind == "conv"]
    first = next((module for module in trunk if module.kind == "linear"), None)
    if not convolutions:
        if options.input.shape is None:
            raise UserError(
                f"{file} has no convolution, so its tensors do not say the shape of a state; give --input-shape C,H,W."
            )
        return options.input.shape[0], options.input.shape[1:], False
    channels = convolutions[0].tensors["weight"].shape[1]
    given = options.input.shape[1:] if options.input.shape else options.input.size
    if given is not None:
        return channels, given, False
    if first is None:
        raise UserError(f"{file} does not say the size of its input; give --input HxW.")
    positions = first.tensors["weight"].shape[1] / len(convolutions[-1].tensors["weight"])
    size = layers.square_input(positions, lambda n: geometry.size_after(n, n, kernels), file)  # type: ignore[arg-type]
    return channels, (size, size), True


def _impala(file: Path, modules: list[Weighted], sequences: list[Weighted], options: ImportOptions) -> Found:
    """The ResNet of IMPALA (Espeholt et al. 2018) as CleanRL builds it for Procgen.

    Each sequence is a convolution, a max pooling by 2 and two residual blocks; then flatten, ReLU, linear and ReLU,
    with normalisation where the file has it.
    """
    matches = [RESIDUAL.match(module.name) for module in sequences]
    parents = {match[1] for match in matches if match}
    numbers = sorted({int(match[2]) for match in matches if match})
    parent = f"{next(iter(parents))}." if next(iter(parents)) else ""
    by_name = {module.name: module for module in modules}
    blocks = ("conv", *(f"res_block{b}.conv{c}" for b in (0, 1) for c in (0, 1)))
    expected = [f"{parent}{number}.{block}" for number in numbers for block in blocks]
    if len(parents) != 1 or numbers != list(range(len(numbers))) or {m.name for m in sequences} != set(expected):
        raise UserError(f"{file} has residual blocks that are not those of CleanRL's IMPALA network; {OTHERWISE}.")
    if any(by_name[name].tensors["weight"].shape[2:] != (3, 3) for name in expected):
        raise UserError(f"{file} has residual blocks with other than 3x3 kernels; {OTHERWISE}.")
    relu = layers.plain(options.activation or "relu")
    shared: list[Layer] = []
    for number in numbers:
        c = {block: layers.conv(by_name[f"{parent}{number}.{block}"].tensors, 1, 1) for block in blocks}
        shared += [c["conv"], layers.plain("max_pool", kernel_size=[3, 3], stride=[2, 2], padding=[1, 1])]
        shared += [layers.residual([relu, c[f"res_block{b}.conv0"], relu, c[f"res_block{b}.conv1"]]) for b in (0, 1)]
    rest = [module for module in modules if module.name not in set(expected)]
    unknown = [module.name for module in rest if not module.kind or module.kind == "conv"]
    if unknown:
        raise UserError(f"{file} has the module {unknown[0]}, whose place in the network is not known; {OTHERWISE}.")
    sides: dict[str, list[Weighted]] = {"shared": [], "outputs": [], "value": []}
    for module in rest:
        sides[_role(module.name)].append(module)
    tail = sides["shared"]
    first = tail[0].index if tail else None
    between = first[1] - len(numbers) if first and f"{first[0]}." == parent else None
    if not tail or not sides["outputs"] or between not in (1, 2, None):
        raise UserError(f"{file} does not say what stands behind its residual blocks; {OTHERWISE}.")
    geometry = Geometry(file, relu, (), ())
    shared += [layers.plain("flatten")] + ([relu] if between != 1 else [])
    shared += layers.chain(tail, geometry, spatial=False, head=False)
    network, description = layers.network(
        shared,
        layers.chain(sides["outputs"], geometry, spatial=False, head=True),
        layers.chain(sides["value"], geometry, spatial=False, head=True) if sides["value"] else None,
    )

    def after(size: int) -> tuple[int, int]:
        for _ in numbers:
            size = (size + 1) // 2
        return size, size

    channels = by_name[expected[0]].tensors["weight"].shape[1]
    given = options.input.shape[1:] if options.input.shape else options.input.size
    width = next(m for m in tail if m.kind in ("linear", "layer_norm")).tensors["weight"].shape[-1]
    last = by_name[f"{parent}{numbers[-1]}.conv"].tensors["weight"].shape[0]
    size = given or (layers.square_input(width / last, after, file),) * 2
    found = layers.found(file, "state dict of an IMPALA ResNet", network, description, (channels, *size), "logits")
    if given is None:
        found.assume(f"pictures of {size[0]}x{size[1]}", "--input")
    if options.activation is None:
        found.assume("ReLU in its place", "--activation")
    if options.output is None:
        found.assume("outputs that are logits", "--output")
    return found


def _of_module(file: Path, tensors: dict[str, Tensor], options: ImportOptions) -> Found:
    """The network that the code named by the user builds, with these weights."""
    assert options.module is not None
    network = networks.build_module(options.module)
    try:
        try:
            network.load_state_dict(tensors)
        except RuntimeError:
            network.load_state_dict(_without_prefix(tensors))
    except RuntimeError as error:
        raise UserError(
            f"The weights of {file} do not fit the network of {options.module}: {networks.first_fault(error)}."
        ) from error
    network = network.float().eval()
    layout = options.input.layout or "chw"
    shape = options.input.shape
    assumed = shape is None
    if shape is None:
        channels = next((t.shape[1] for t in tensors.values() if t.dim() == 4), None)
        if channels is None:
            raise UserError(f"{file} does not say the shape of a state; give --input-shape C,H,W.")
        size = options.input.size or input_size(file, network, channels, layout)
        assumed = options.input.size is None
        shape = (channels, *size)
    result = tried(network, sized(file, shape), layout)
    if result is None or not 1 <= len(result) <= 2 or result[0].dim() != 2:
        raise UserError(
            f"The network of {options.module} does not turn states of {' x '.join(map(str, shape))} into outputs "
            f"(B, K), or a tuple of outputs and values; give another --input-shape, or wrap it so that it does."
        )
    description = {"kind": "module", "factory": options.module}
    outputs = result[0].shape[1]
    found = Found("state dict with its own code", network, description, shape, outputs, "logits", layout)
    if assumed:
        found.assume(f"pictures of {shape[1]}x{shape[2]}", "--input")
    if options.output is None:
        found.assume("outputs that are logits", "--output")
    return found
