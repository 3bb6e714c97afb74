"""ONNX operators as torch functions, so that a graph has a gradient.

Those that picture policies are exported to, by their names, in the meaning of operator sets 9 to 24
(https://onnx.ai/onnx/operators). Each takes the node's inputs, None for one that is left out, then its attributes.
onnx2torch is not used: it needs torchvision, whose binaries fit one build of torch only, and stops at operator set 17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX's TensorProto.DataType."""


def _ints(value: Tensor | Sequence[int] | None) -> list[int] | None:
    """A list of numbers, be it an attribute or a tensor."""
    if value is None:
        return None
    return [int(v) for v in (value.flatten().tolist() if isinstance(value, Tensor) else value)]


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def folded(first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    return folded


def _divide(a: Tensor, b: Tensor) -> Tensor:
    both_whole = not a.is_floating_point() and not b.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc") if both_whole else a / b


def _mod(a: Tensor, b: Tensor, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None, min=None, max=None) -> Tensor:
    low, high = (given if given is not None else attribute for given, attribute in ((low, min), (high, max)))
    return x if low is None and high is None else torch.clamp(x, low, high)


def _cast(x: Tensor, to: int, saturate: int = 1) -> Tensor:
    return x.to(DTYPES[to])


# --- layers ---


def _padding(x: Tensor, kernel: Sequence[int], strides, dilations, pads, auto_pad: str) -> list[int]:
    """Pads as torch's ``pad`` takes them: last axis first, before and after."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            begins.append(small if auto_pad == "SAME_UPPER" else large)
            ends.append(large if auto_pad == "SAME_UPPER" else small)
    elif pads is None or auto_pad == "VALID":
        begins, ends = [0] * rank, [0] * rank
    else:
        begins, ends = list(pads[:rank]), list(pads[rank:])
    return [n for axis in reversed(range(rank)) for n in (begins[axis], ends[axis])]


def _conv(
    x, weight, bias=None, *, kernel_shape=None, strides=None, dilations=None, pads=None, group=1, auto_pad="NOTSET"
) -> Tensor:
    rank = weight.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _padding(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    if any(padding):
        x = F.pad(x, padding)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    return convolve(x, weight, bias, strides, 0, dilations, group)


def _max_pool(
    x, *, kernel_shape, strides=None, dilations=None, pads=None, ceil_mode=0, auto_pad="NOTSET", storage_order=0
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _padding(x, kernel_shape, strides, dilations, pads, auto_pad)
    if any(padding):
        x = F.pad(x, padding, value=float("-inf"))
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    return pool(x, kernel_shape, strides, 0, dilations, bool(ceil_mode))


def _average_pool(
    x, *, kernel_shape, strides=None, dilations=None, pads=None, ceil_mode=0, auto_pad="NOTSET", count_include_pad=0
) -> Tensor:
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    if any(d != 1 for d in dilations):
        raise ValueError("an AveragePool with dilations is not known")
    padding = _padding(x, kernel_shape, strides, dilations, pads, auto_pad)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    if not any(padding):
        return pool(x, kernel_shape, strides, 0, bool(ceil_mode))
    sums = pool(F.pad(x, padding), kernel_shape, strides, 0, bool(ceil_mode))
    if count_include_pad:
        return sums
    return sums / pool(F.pad(torch.ones_like(x[:1, :1]), padding), kernel_shape, strides, 0, bool(ceil_mode))


def _gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0) -> Tensor:
    product = (a.t() if transA else a) @ (b.t() if transB else b)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


def _batch_norm(x, scale, bias, mean, variance, *, epsilon=1e-5, momentum=0.9, training_mode=0, spatial=1) -> Tensor:
    if training_mode:
        raise ValueError("a BatchNormalization in training mode is not known")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


def _layer_norm(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1) -> Tensor:
    shape = x.shape[axis % x.dim() :]
    normal = F.layer_norm(x, shape, None, None, epsilon) * scale
    return normal if bias is None else normal + bias


def _instance_norm(x, scale, bias, *, epsilon=1e-5) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def _group_norm(x, scale, bias, *, num_groups, epsilon=1e-5, stash_type=1) -> Tensor:
    repeat = x.shape[1] // len(scale)  # operator set 18 has one number a group, 21 one a channel
    return F.group_norm(x, num_groups, scale.repeat_interleave(repeat), bias.repeat_interleave(repeat), epsilon)


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *, axis=-1: function(x, dim=axis)


# --- shapes ---


def _reshape(x, shape, *, allowzero=0) -> Tensor:
    sizes = _ints(shape) or []
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def _flatten(x, *, axis=1) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    rows = 1
    for n in x.shape[:axis]:
        rows *= n
    return x.reshape(rows, -1)


def _squeeze(x, axes=None, **attributes) -> Tensor:
    chosen = _ints(axes if axes is not None else attributes.get("axes"))
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(x, axes=None, **attributes) -> Tensor:
    chosen = _ints(axes if axes is not None else attributes.get("axes")) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(a % rank for a in chosen):
        x = x.unsqueeze(axis)
    return x


def _split(x, split=None, *, axis=0, num_outputs=None, **attributes) -> tuple[Tensor, ...]:
    sizes = _ints(split if split is not None else attributes.get("split"))
    if sizes is None:
        return x.split(-(-x.shape[axis] // (num_outputs or 1)), dim=axis)
    return x.split(sizes, dim=axis)


def _slice(x, starts=None, ends=None, axes=None, steps=None, **attributes) -> Tensor:
    starts = _ints(starts if starts is not None else attributes["starts"])
    ends = _ints(ends if ends is not None else attributes["ends"])
    axes = _ints(axes if axes is not None else attributes.get("axes")) or list(range(len(starts or [])))
    steps = _ints(steps) or [1] * len(axes)
    for start, end, axis, step in zip(starts or [], ends or [], axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            index = torch.tensor(list(range(size))[slice(start, None if end < -size else end, step)], dtype=torch.int64)
            x = x.index_select(axis, index)
        else:
            first, last, _ = slice(start, end).indices(size)
            x = x[(slice(None),) * (axis % x.dim()) + (slice(first, last, step),)]
    return x


def _gather(x, indices, *, axis=0) -> Tensor:
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    flat = x.index_select(axis, indices.flatten())
    axis = axis % x.dim()
    return flat.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _expand(x, shape) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape) or ())))


def _pad(x, pads=None, value=None, axes=None, *, mode="constant", **attributes) -> Tensor:
    amounts = _ints(pads if pads is not None else attributes["pads"]) or []
    chosen = [a % x.dim() for a in _ints(axes) or range(len(amounts) // 2)]
    before, after = amounts[: len(chosen)], amounts[len(chosen) :]
    by_axis = dict(zip(chosen, zip(before, after, strict=True), strict=True))
    padding = [n for axis in reversed(range(x.dim())) for n in by_axis.get(axis, (0, 0))]
    if mode == "constant":
        return F.pad(x, padding, value=float(value) if value is not None else attributes.get("value", 0.0))
    while padding and not any(padding[-2:]):
        padding = padding[:-2]
    return F.pad(x, padding, mode={"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


def _shape(x, *, start=0, end=None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _constant_of_shape(shape, *, value=None) -> Tensor:
    filling = torch.zeros(1) if value is None else torch.as_tensor(value)
    return filling.flatten()[0].expand(_ints(shape) or ()).clone()


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(x, axes=None, *, keepdims=1, noop_with_empty_axes=0, **attributes) -> Tensor:
        chosen = _ints(axes if axes is not None else attributes.get("axes"))
        if not chosen:
            if noop_with_empty_axes:
                return x
            chosen = list(range(x.dim()))
        return function(x, dim=tuple(a % x.dim() for a in chosen), keepdim=bool(keepdims))

    return reduced


def _product(x, dim, keepdim) -> Tensor:
    for axis in sorted(dim, reverse=True):
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


def _arg(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *, axis=0, keepdims=1, select_last_index=0: function(x, dim=axis, keepdim=bool(keepdims))


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": lambda x, like, saturate=1: x.to(like.dtype),
    "Ceil": torch.ceil,
    "Celu": lambda x, *, alpha=1.0: F.celu(x, alpha),
    "Clip": _clip,
    "Concat": lambda *x, axis: torch.cat(x, dim=axis),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Cos": torch.cos,
    "Div": _divide,
    "Dropout": lambda x, *_, **__: x,
    "Einsum": lambda *x, equation: torch.einsum(equation, *x),
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": torch.floor,
    "Gather": _gather,
    "Gelu": lambda x, *, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": torch.matmul,
    "Max": _fold(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": lambda *x: _fold(torch.add)(*x) / len(x),
    "Min": _fold(torch.minimum),
    "Mish": F.mish,
    "Mod": _mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Pad": _pad,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "ReduceL1": _reduce(lambda x, dim, keepdim: x.abs().sum(dim=dim, keepdim=keepdim)),
    "ReduceL2": _reduce(lambda x, dim, keepdim: x.square().sum(dim=dim, keepdim=keepdim).sqrt()),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, dim, keepdim: x.square().sum(dim=dim, keepdim=keepdim)),
    "Relu": F.relu,
    "Reshape": _reshape,
    "Round": torch.round,
    "Selu": F.selu,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Sum": _fold(torch.add),
    "Swish": lambda x, *, alpha=1.0: x * torch.sigmoid(alpha * x),
    "Tanh": torch.tanh,
    "Tile": lambda x, repeats: x.repeat(_ints(repeats) or []),
    "Transpose": lambda x, *, perm=None: x.permute(perm or list(reversed(range(x.dim())))),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
