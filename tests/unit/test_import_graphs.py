"""Exporters' graphs: each operation is the library's, whatever the operator set, the batch and the layout."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from foreign_policies import Exact, NatureAgent, asked, to_onnx, trained
from torch import nn
from torch.nn import functional as F

from carla_digr import checkpoint
from carla_digr.errors import UserError
from carla_digr.importing import import_policy
from carla_digr.onnx_operators import OPERATORS


@pytest.fixture(scope="module")
def exact():
    return trained(Exact())


def imported(file, folder, options=None):
    lines = import_policy(file, folder / "p", options)
    return checkpoint.load(folder / "p.safetensors")[0], " ".join(lines)


def equal(policy, module, x, scale=1.0):
    """Outputs and gradients, in float64."""
    policy, module = policy.double(), module.double()
    ours, theirs = x.double().requires_grad_(True), x.double().requires_grad_(True)
    a, b = policy(ours)[0], module(theirs * scale)
    assert torch.allclose(a, b, rtol=1e-7, atol=1e-8), float((a - b).abs().max())
    (g,), (h,) = (torch.autograd.grad(out.square().sum(), leaf) for out, leaf in ((a, ours), (b, theirs)))
    assert torch.allclose(g, h, rtol=1e-6, atol=1e-8 * float(h.abs().max()))
    module.float()


def pictures(count, channels=3, size=42):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("opset", [13, 17, 18, 20, 21])
def test_onnx_of_every_set_by_the_old_exporter(exact, opset, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"opset_version": opset, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        try:
            torch.onnx.export(exact, (pictures(2),), tmp_path / "x.onnx", dynamo=False, **options)
        except Exception as error:  # what the old exporter knows ends before the newest sets
            pytest.skip(f"torch's old exporter: {type(error).__name__}")
    policy, _ = imported(tmp_path / "x.onnx", tmp_path)
    equal(policy, exact, pictures(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_by_the_new_exporter(exact, dynamic, tmp_path):
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=4096)},)} if dynamic else {}
    to_onnx(exact, pictures(2 if dynamic else 1), tmp_path / "x.onnx", **shapes)
    policy, said = imported(tmp_path / "x.onnx", tmp_path)
    assert "batches of" not in said
    equal(policy, exact, pictures(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_programs(exact, dynamic, tmp_path):
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=4096)},)} if dynamic else {}
    torch.export.save(torch.export.export(exact, (pictures(2 if dynamic else 1),), **shapes), tmp_path / "x.pt2")
    policy, _ = imported(tmp_path / "x.pt2", tmp_path)
    equal(policy, exact, pictures(3))


def test_decomposed_programs(exact, tmp_path):
    program = torch.export.export(exact, (pictures(1),)).run_decompositions()
    torch.export.save(program, tmp_path / "x.pt2")
    policy, _ = imported(tmp_path / "x.pt2", tmp_path)
    equal(policy, exact, pictures(3))


@pytest.mark.parametrize("way", ["script", "trace"])
def test_torchscript(exact, way, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(exact) if way == "script" else torch.jit.trace(exact, pictures(1))
        made.save(str(tmp_path / "x.pt"))
    policy, _ = imported(tmp_path / "x.pt", tmp_path, asked(size=(42, 42)))
    equal(policy, exact, pictures(3))
    (tmp_path / "p.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="SHA-256"):
        checkpoint.load(tmp_path / "p.safetensors")


class ForOne(nn.Module):
    """A graph that holds its example's batch in a place where no reshape tells it."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch
        self.layer = nn.Linear(3 * 16, 4)

    def forward(self, x):
        return self.layer(x.reshape(self.batch, 3, 16, 16).mean(dim=3).reshape(self.batch, 48) * 3 - 1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["script.pt", "x.pt2"])
def test_graphs_for_one_batch(batch, kind, tmp_path):
    module, example = trained(ForOne(batch)), pictures(batch, size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "x.pt2":
            torch.export.save(torch.export.export(module, (example,)), tmp_path / kind)
        else:
            torch.jit.trace(module, example, check_trace=False).save(str(tmp_path / kind))
    options = asked(shape=(3, 16, 16))
    if batch == 4 and kind == "script.pt":  # a TorchScript does not say its batch, and four is not tried
        with pytest.raises(UserError, match="does not take states"):
            imported(tmp_path / kind, tmp_path, options)
        return
    policy, said = imported(tmp_path / kind, tmp_path, options)
    assert (f"batches of {batch} alone" in said) == (kind == "script.pt")
    seen = pictures(7, size=16)
    module.batch = 7
    equal(policy, module, seen)


def test_layout_and_bytes(tmp_path):
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, 4)
            self.head = nn.Linear(4 * 81, 3)

        def forward(self, x):
            x = x.permute(0, 3, 1, 2).to(torch.float32) / 255
            return self.head(F.relu(self.conv(x)).flatten(1))

    module = trained(Bytes())
    example = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    torch.export.save(torch.export.export(module, (example,)), tmp_path / "x.pt2")
    to_onnx(module, example, tmp_path / "x.onnx")
    x = torch.randint(0, 256, (3, 3, 40, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = module(x.permute(0, 2, 3, 1).to(torch.uint8))
    for name in ("x.pt2", "x.onnx"):
        policy, said = imported(tmp_path / name, tmp_path)
        assert policy.recipe.layout == "hwc" and policy.recipe.scale == 1.0 and "--layout" in said
        with torch.no_grad():
            assert torch.allclose(policy(x / 255)[0], theirs, rtol=1e-5, atol=1e-5)


def test_what_divides_by_255_itself_takes_pixels(tmp_path):
    agent = trained(NatureAgent(channels=(4, 4, 4)))
    x = torch.randint(0, 256, (3, 4, 84, 84), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(agent).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(agent, (x[:1].float(),)), tmp_path / "x.pt2")
    to_onnx(agent, x[:1].float(), tmp_path / "x.onnx")
    with torch.no_grad():
        theirs = agent(x.float())[0]
        for name in ("script.pt", "x.pt2", "x.onnx"):
            policy, said = imported(tmp_path / name, tmp_path)
            assert policy.recipe.scale == 1.0 and "scales them itself" in said
            assert torch.allclose(policy(x / 255)[0], theirs, rtol=1e-4, atol=1e-4)
            policy, said = imported(tmp_path / name, tmp_path, asked(scale=1 / 255))
            assert policy.recipe.scale == 1 / 255 and "scales" not in said


# --- each operator against the standard's own evaluator ---

ONE = {
    "Abs": {}, "Add": {}, "AveragePool": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "Ceil": {}, "Celu": {"alpha": 0.7}, "Clip": {}, "Cos": {}, "Div": {}, "Elu": {"alpha": 0.5}, "Erf": {}, "Exp": {},
    "Flatten": {"axis": 2}, "Floor": {}, "Gelu": {}, "GlobalAveragePool": {}, "GlobalMaxPool": {},
    "HardSigmoid": {"alpha": 0.3}, "HardSwish": {}, "Identity": {}, "LeakyRelu": {"alpha": 0.3},
    "LogSoftmax": {"axis": 1}, "Max": {},
    "MaxPool": {"kernel_shape": [3, 2], "strides": [2, 1], "auto_pad": "SAME_UPPER"}, "Mean": {}, "Min": {},
    "Mish": {}, "Mul": {}, "Neg": {}, "Reciprocal": {}, "ReduceL1": {}, "ReduceL2": {}, "ReduceLogSumExp": {},
    "ReduceMax": {"keepdims": 0}, "ReduceMean": {}, "ReduceMin": {}, "ReduceProd": {}, "ReduceSum": {"keepdims": 0},
    "ReduceSumSquare": {}, "Relu": {}, "Round": {}, "Selu": {}, "Shape": {"start": 1}, "Sigmoid": {}, "Sign": {},
    "Sin": {}, "Softmax": {"axis": 2}, "Softplus": {}, "Softsign": {}, "Sub": {}, "Sum": {}, "Tanh": {},
    "Transpose": {"perm": [0, 2, 3, 1]},
}  # fmt: skip
TWO = {"Add", "Div", "Max", "Mean", "Min", "Mul", "Sub", "Sum"}
CASES = [(op, attributes, ()) for op, attributes in ONE.items()] + [
    ("Clip", {}, (np.float32(-0.5), np.float32(0.4))),
    ("Gather", {"axis": 2}, (np.array([[0, -1], [2, 1]]),)),
    ("Slice", {}, (np.array([1, -1]), np.array([100, -100]), np.array([2, 3]), np.array([2, -2]))),
    ("Pad", {}, (np.array([0, 0, 1, 2, 0, 0, 3, 0]), np.float32(0.5))),
    ("Pad", {"mode": "reflect"}, (np.array([0, 0, 1, 2, 0, 0, 3, 0]),)),
    ("Reshape", {}, (np.array([0, -1, 2]),)),
    ("Unsqueeze", {}, (np.array([0, 3]),)),
    ("ReduceMean", {"keepdims": 0}, (np.array([-1, 1]),)),
    ("Tile", {}, (np.array([1, 2, 1, 3]),)),
    ("Expand", {}, (np.array([2, 1, 1, 1, 1]),)),
    ("ConstantOfShape", None, ()),
    ("PRelu", {}, (np.float32([[[0.2]], [[-0.3]], [[0.4]], [[2]]]),)),
    ("Pow", {}, (np.float32(2),)),
    ("Greater", {}, (np.float32(0.2),)),
    ("LessOrEqual", {}, (np.float32(0.2),)),
    ("Conv", {"strides": [2, 1], "pads": [1, 0, 2, 1], "group": 2}, (np.ones((6, 2, 3, 3), "f4"), np.ones(6, "f4"))),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (np.ones((2, 4, 2, 2), np.float32),)),
    ("BatchNormalization", {"epsilon": 1e-3}, tuple(np.float32([0.5, 1, 2, 3]) + k for k in range(4))),
    ("InstanceNormalization", {}, (np.float32([0.5, 1, 2, 3]), np.float32([1, 2, 3, 4]))),
    ("LayerNormalization", {"axis": 2}, (np.ones((8, 6), "f4") * 2, np.ones((8, 6), "f4"))),
    ("GroupNormalization", {"num_groups": 2}, (np.float32([0.5, 1, 2, 3]), np.float32([1, 2, 3, 4]))),
    ("Split", {"axis": 2, "num_outputs": 3}, ()),
    ("Cast", {"to": 7}, ()),
    ("ArgMax", {"axis": 1, "keepdims": 0}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "more"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_an_operator_is_the_standards(op, attributes, more):
    import onnx
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 4, 8, 6)).astype(np.float32)
    inputs = [x, *([rng.normal(size=(4, 1, 6)).astype(np.float32)] if op in TWO else []), *more]
    if op == "ConstantOfShape":
        inputs, attributes = [np.array([2, 3])], {"value": onnx.numpy_helper.from_array(np.float32([7]))}
    names = [f"i{k}" for k in range(len(inputs))]
    outputs = ["o0", "o1", "o2"] if op == "Split" else ["o0"]
    node = helper.make_node(op, names, outputs, **attributes)
    kinds = [helper.np_dtype_to_tensor_dtype(np.asarray(i).dtype) for i in inputs]
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, k, np.asarray(i).shape)
            for n, k, i in zip(names, kinds, inputs, strict=True)
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    theirs = ReferenceEvaluator(model).run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
    given = {"value": 7.0} if op == "ConstantOfShape" else attributes
    ours = OPERATORS[op](*(torch.from_numpy(np.asarray(i)) for i in inputs), **given)
    for a, b in zip(ours if isinstance(ours, tuple) else (ours,), theirs, strict=True):
        assert a.shape == b.shape
        assert np.allclose(a.numpy(), b, rtol=1e-5, atol=1e-6), (a, b)
