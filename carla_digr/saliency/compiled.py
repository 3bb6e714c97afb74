"""An actor-critic for one picture at a time: its decision and its maps as graphs that ONNX Runtime runs on the CPU.

The same formulas as policy.py, gradient.py and linear.py, of which PyTorch's way to each operation takes most of the
time where the batch is one picture. The derivative is written as forward operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnx.onnx_pb import TensorProto
from torch import nn

from carla_digr.policy import SOFTPLUS_BETA, ActorCritic
from carla_digr.saliency.gradient import of_blocks
from carla_digr.saliency.linear import BLUR, TOWARDS_BLUR
from carla_digr.saliency.perturbation import blur_matrix

_OPERATORS, _FORMAT = 18, 9  # versions of the operator set and of the file format, which every runtime since 2023 reads


Layers = list[NDArray[np.float32]]


class CompiledNetwork:
    """The graphs of one network, whose weights are copied: what is changed in the network later is not seen here.

    Results differ from PyTorch's by rounding only, and may be computed in several threads.

    Args:
        policy: the network.
    """

    def __init__(self, policy: ActorCritic):
        channels, height, width = policy.input_shape
        self._hidden = [f"hidden{i}" for i in range(len(policy.convolutions))] + ["hidden"]
        activated = [f"activated{i}" for i in range(len(policy.convolutions))]
        forward = _Graph(policy)
        forward.forward("state")
        states = {"state": ("batch", channels, height, width)}
        self._forward = forward.session(states, ["logits", "value", *self._hidden, *activated])
        ends = _Graph(policy)
        ends.ends("features")
        self._ends = ends.session({"features": ("batch", policy.trunk.in_features)}, ["logits"])
        hidden = forward.hidden_shapes()
        eq2 = _Graph(policy)
        eq2.gradient_map()
        self._eq2 = eq2.session({"weights": (1, policy.actions), **hidden}, ["map"], blocked=False)
        change = {"change": (1, channels, height, width)}
        towards = _Graph(policy)
        towards.towards_blur()
        self._towards = towards.session({"state": (1, channels, height, width)}, [*change, *self._hidden])
        contrast = _Graph(policy)
        contrast.contrast()
        self._contrast = contrast.session(
            {"weights": ("rows", policy.actions), **change, **hidden}, ["contrast"], blocked=False
        )

    def decide(self, state: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], Layers, Layers]:
        """As ``ActorCritic.trace``.

        Args:
            state: float32 (B, C, H, W) in [0, 1].

        Returns:
            logits float32 (B, A), value float32 (B,), the hidden layers' outputs before the activation, and the
            convolutions' after it.
        """
        logits, value, *layers = self._forward.run(None, {"state": state})
        hidden = len(self._hidden)
        return logits, value[:, 0], layers[:hidden], layers[hidden:]

    def outputs(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits float32 (B, A) of states float32 (B, C, H, W)."""
        return self._forward.run(["logits"], {"state": states})[0]

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits float32 (B, A) of what the trunk takes, float32 (B, F)."""
        return self._ends.run(None, {"features": features})[0]

    def gradient_map(self, weights: NDArray[np.float32], hidden: Layers) -> NDArray[np.float32]:
        """max over the channels of abs(sum_k weights_k d logit_k / d s).

        Args:
            weights: float32 (1, A).
            hidden: of the state, from ``decide``.

        Returns:
            float32 (1, H, W).
        """
        return self._eq2.run(None, {"weights": weights, **dict(zip(self._hidden, hidden, strict=True))})[0]

    def contrast(self, state: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """``gradient.input_contrast`` on the way to the blurred picture, as ``linear.linear_maps`` takes it.

        Args:
            state: float32 (1, C, H, W) in [0, 1].
            weights: float32 (R, A).

        Returns:
            float32 (R, H, W).
        """
        change, *hidden = self._towards.run(None, {"state": state})
        there = dict(zip(self._hidden, hidden, strict=True))
        return self._contrast.run(None, {"weights": weights, "change": change, **there})[0]


class _Graph:
    """A graph in the making: operations are added one after the other, each by the names of what it takes."""

    def __init__(self, policy: ActorCritic):
        self._policy = policy
        self._convolutions = [cast(nn.Conv2d, layer) for layer in policy.convolutions]
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}

    def operation(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add one; the name of its result."""
        output = output or f"{kind}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: Any, name: str = "") -> str:
        """Add an array; its name."""
        name = name or f"constant{len(self._constants)}"
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def axis(self, *axes: int) -> str:
        """Add a list of axes or a shape; its name."""
        return self.constant(np.array(axes, np.int64))

    def number(self, value: float) -> str:
        """Add a float32; its name."""
        return self.constant(np.float32(value))

    def session(
        self, inputs: Mapping[str, tuple[int | str, ...]], outputs: Sequence[str], blocked: bool = True
    ) -> onnxruntime.InferenceSession:
        """What runs the graph, in the thread that calls it.

        Args:
            inputs: shapes by name.
            outputs: names.
            blocked: let convolutions have their channels in blocks: they are faster, but where a large output is no
                other convolution's input, to put that in order takes longer than it saves.
        """
        taken = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self._nodes, "network", taken, given, list(self._constants.values()))
        model: ModelProto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPERATORS)], ir_version=_FORMAT
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if not blocked:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def hidden_shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Of one state, by name."""
        shapes: dict[str, tuple[int | str, ...]] = {}
        for i, layer in enumerate(self._convolutions):
            shapes[f"hidden{i}"] = (1, layer.out_channels, *self._sizes()[i + 1])
        return {**shapes, "hidden": (1, self._policy.trunk.out_features)}

    def _sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of the picture and of what each convolution gives."""
        sizes = [self._policy.input_shape[1:]]
        for layer in self._convolutions:
            rows, columns = sizes[-1]
            kernel, stride = layer.kernel_size[0], layer.stride[0]
            sizes.append(((rows - kernel) // stride + 1, (columns - kernel) // stride + 1))
        return sizes

    def _affine(self, x: str, layer: nn.Linear, output: str) -> str:
        weight, bias = (self.constant(p.detach().numpy()) for p in (layer.weight, layer.bias))
        return self.operation("Gemm", x, weight, bias, output=output, transB=1)

    def forward(self, x: str, ends_hidden: bool = False) -> None:
        """The network's outputs and hidden layers from the state ``x``; with ``ends_hidden`` these alone."""
        for i, layer in enumerate(self._convolutions):
            weight, bias = (self.constant(p.detach().numpy()) for p in (layer.weight, cast(nn.Parameter, layer.bias)))
            stride = list(layer.stride)
            x = self.operation("Conv", x, weight, bias, output=f"hidden{i}", strides=stride)
            x = self._activation(x, f"activated{i}")
        features = self.operation("Flatten", x)
        if ends_hidden:
            self._affine(features, self._policy.trunk, "hidden")
        else:
            self.ends(features)

    def ends(self, features: str) -> None:
        """``logits``, ``value`` and ``hidden`` of what the trunk takes."""
        latent = self._activation(self._affine(features, self._policy.trunk, "hidden"))
        self._affine(latent, self._policy.policy_head, "logits")
        self._affine(latent, self._policy.value_head, "value")

    def _activation(self, x: str, output: str = "") -> str:
        if self._policy.config.activation == "relu":
            return self.operation("Relu", x, output=output)
        # max(x, 0) + log(1 + exp(-beta abs(x))) / beta, which no x makes overflow.
        falling = self.operation("Exp", self.operation("Mul", self.operation("Abs", x), self.number(-SOFTPLUS_BETA)))
        smooth = self.operation("Log", self.operation("Add", falling, self.number(1.0)))
        rest = self.operation("Mul", smooth, self.number(1.0 / SOFTPLUS_BETA))
        return self.operation("Add", self.operation("Relu", x), rest, output=output)

    def _activation_derivative(self, x: str) -> str:
        if self._policy.config.activation == "relu":
            positive = self.operation("Greater", x, self.number(0.0))
            return self.operation("Cast", positive, to=TensorProto.FLOAT)
        return self.operation("Sigmoid", self.operation("Mul", x, self.number(SOFTPLUS_BETA)))

    def _first_gradient(self) -> str:
        """As ``gradient._first_gradient`` of one state: (R, channels, rows, columns)."""
        g = self.operation("MatMul", "weights", self.constant(self._policy.policy_head.weight.detach().numpy()))
        g = self.operation("Mul", g, self._activation_derivative("hidden"))
        g = self.operation("MatMul", g, self.constant(self._policy.trunk.weight.detach().numpy()))
        sizes = self._sizes()
        g = self.operation("Reshape", g, self.axis(-1, self._convolutions[-1].out_channels, *sizes[-1]))
        for i in reversed(range(len(self._convolutions))):
            g = self.operation("Mul", g, self._activation_derivative(f"hidden{i}"))
            if i:
                g = self._transposed(g, i)
        return g

    def _transposed(self, g: str, i: int) -> str:
        """The transpose of a convolution, applied to the gradient of its output."""
        layer, size = self._convolutions[i], self._sizes()[i]
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        rest = [(size[0] - kernel) % stride, (size[1] - kernel) % stride]
        if kernel == 2 * stride and not any(rest):
            return self.operation("DepthToSpace", self._blocks(g, layer), blocksize=stride, mode="CRD")
        weight = self.constant(layer.weight.detach().numpy())
        return self.operation("ConvTranspose", g, weight, strides=[stride, stride], output_padding=rest)

    def _blocks(self, g: str, layer: nn.Conv2d) -> str:
        """The transpose of a convolution whose kernel is twice its stride, as blocks of stride x stride pixels."""
        return self.operation("Conv", g, self.constant(of_blocks(layer).detach().numpy()), pads=[1, 1, 1, 1])

    def gradient_map(self) -> None:
        """``map`` (R, H, W), from ``weights`` and the hidden layers."""
        _, height, width = self._policy.input_shape
        g = self._first_gradient()
        if self._first_as_blocks():
            # The largest of the channels before the blocks become pixels.
            by_channel = self._by_channel(self._blocks(g, self._convolutions[0]))
            found = self._pixels(self.operation("Max", *(self.operation("Abs", values) for values in by_channel)))
        else:
            size = self.operation("Abs", self._transposed(g, 0))
            found = self.operation("ReduceMax", size, self.axis(1), keepdims=0)
        self.operation("Reshape", found, self.axis(-1, height, width), output="map")

    def towards_blur(self) -> None:
        """``change`` (1, C, H, W), of the ``state`` to the blurred one, and the hidden layers on the way there."""
        _, height, width = self._policy.input_shape
        sigma = BLUR * height
        columns = self.constant(blur_matrix(width, sigma).T.astype(np.float32))
        rows = self.constant(blur_matrix(height, sigma).astype(np.float32))
        blurred = self.operation("MatMul", rows, self.operation("MatMul", "state", columns))
        change = self.operation("Sub", blurred, "state", output="change")
        towards = self.operation("Mul", change, self.number(TOWARDS_BLUR))
        self.forward(self.operation("Add", "state", towards), ends_hidden=True)

    def contrast(self) -> None:
        """``contrast`` (R, H, W), from ``weights``, ``change`` and the hidden layers."""
        channels, height, width = self._policy.input_shape
        g, layer = self._first_gradient(), self._convolutions[0]
        if self._first_as_blocks():
            # Summed over the channels before the blocks become pixels.
            stride = layer.stride[0]
            # A convolution that only sorts: the runtime's own way to move that many pixels takes ten times as long.
            size = channels * stride**2
            sorting = self.constant(np.eye(size, dtype=np.float32).reshape(size, channels, stride, stride))
            own = self.operation("Conv", "change", sorting, strides=[stride, stride])
            product = self.operation("Mul", self._blocks(g, layer), own)
            parts = self.axis(-1, channels, stride**2, height // stride, width // stride)
            by_channel = self.operation("Reshape", product, parts)
            found = self._pixels(self.operation("ReduceSum", by_channel, self.axis(1), keepdims=0))
        else:
            product = self.operation("Mul", self._transposed(g, 0), "change")
            found = self.operation("ReduceSum", product, self.axis(1), keepdims=0)
        self.operation("Reshape", found, self.axis(-1, height, width), output="contrast")

    def _first_as_blocks(self) -> bool:
        """Whether the first convolution's transpose gives blocks of pixels that fill the picture."""
        kernel, stride = self._convolutions[0].kernel_size[0], self._convolutions[0].stride[0]
        return kernel == 2 * stride and not any(length % stride for length in self._policy.input_shape[1:])

    def _by_channel(self, blocks: str) -> list[str]:
        """Blocks of stride x stride pixels, (R, C stride^2, rows, columns), of each channel alone."""
        size = self._convolutions[0].stride[0] ** 2
        return [
            self.operation("Slice", blocks, self.axis(first), self.axis(first + size), self.axis(1))
            for first in range(0, size * self._policy.input_shape[0], size)
        ]

    def _pixels(self, blocks: str) -> str:
        """(R, 1, H, W) of blocks (R, stride^2, rows, columns)."""
        return self.operation("DepthToSpace", blocks, blocksize=self._convolutions[0].stride[0], mode="CRD")
