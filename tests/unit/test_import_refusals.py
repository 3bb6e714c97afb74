"""What the import refuses, each in one sentence, and that it runs nothing that a file brings along."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_policies import FOREIGN, ConvSequence, NatureAgent, Pictures, asked, stable_baselines3, to_onnx, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from carla_digr import checkpoint
from carla_digr.cli import main
from carla_digr.driving.control import commands_of
from carla_digr.errors import UserError
from carla_digr.importing import import_policy, reading


class Small(nn.Module):
    """A network of a few weights, for 2 x 16 x 16."""

    def __init__(self, actions=3):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(2, 4, 8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU())
        self.actor = nn.Linear(8, actions)
        self.critic = nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.network(x)
        return self.actor(hidden), self.critic(hidden)


SIZED = asked(shape=(2, 16, 16))


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def small_file(kind: str, folder: Path) -> Path:
    module = trained(Small())
    file = folder / f"small_{kind}"
    if kind == "state_dict":
        torch.save(module.state_dict(), file)
    elif kind == "legacy":
        torch.save(module.state_dict(), file, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        safetensors.torch.save_file(module.state_dict(), file)
    elif kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(module, torch.rand(1, 2, 16, 16)).save(str(file))
    elif kind == "exported":
        torch.export.save(torch.export.export(module, (torch.rand(1, 2, 16, 16),)), file.with_suffix(".pt2"))
        file = file.with_suffix(".pt2")
    elif kind == "onnx":
        file = file.with_suffix(".onnx")
        to_onnx(module, torch.rand(1, 2, 16, 16), file, external_data=False)
    else:
        _, file = stable_baselines3("PPO", folder, Pictures((36, 36, 1), 3), n_steps=4, policy_kwargs=SLIM)
    return file


SLIM = {"features_extractor_kwargs": {"features_dim": 4}}
KINDS = ("state_dict", "legacy", "safetensors", "torchscript", "exported", "onnx", "stable_baselines3")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("small")
    return {kind: small_file(kind, folder) for kind in KINDS}


def refused(file: Path, out: Path, options=None) -> str:
    """The sentence; nothing was written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        import_policy(file, out, options)
    sentence = str(caught.value)
    assert re.fullmatch(r"[A-Z/-].*[^.]\.", sentence, re.S) and "\n" not in sentence, sentence
    assert sorted(out.parent.iterdir()) == before
    return sentence


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def zipped(folder: Path, name: str, entries: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    return folder / name


def changed(file: Path, folder: Path, change) -> Path:
    """The archive with each entry as ``change(name, data)`` gives it."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(folder / f"changed_{file.name}", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return folder / f"changed_{file.name}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_files_are_sound(small, kind, tmp_path):
    options = None if kind == "stable_baselines3" else SIZED
    import_policy(small[kind], tmp_path / "p", options)
    policy, _ = checkpoint.load(tmp_path / "p.safetensors")
    assert policy.actions == 3


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("empty", b"", "is empty"),
        ("random", bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8)), "no known format"),
        ("page.html", b"<!DOCTYPE html><html><body>404</body></html>", "no known format"),
        ("plain.pkl", pickle.dumps({"weights": [1, 2, 3]}), "no file of torch.save"),
        ("objects.pkl", pickle.dumps(Path("x")), "no file of torch.save"),
        ("zip", b"PK\x03\x04" + b"\0" * 200, "damaged archive"),
        ("tensors.safetensors", b'\x10\0\0\0\0\0\0\0{"a": 1}       ', "damaged safetensors"),
        ("graph.onnx", b"\x08\x0a\x12\xff\xff\xff", "no sound ONNX"),
    ],
)
def test_files_of_other_kinds(name, data, sentence, tmp_path):
    assert sentence in refused(written(tmp_path, name, data), tmp_path / "out")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refused(tmp_path / "pipe", tmp_path / "out")
    assert "Is a directory" in refused(tmp_path, tmp_path / "out")
    assert "No such file" in refused(tmp_path / "none.zip", tmp_path / "out")


def test_archives_of_other_kinds(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    assert "no known format" in refused(tmp_path / "arrays.npz", tmp_path / "out")
    lacking = zipped(tmp_path, "lacking.zip", {"data": "{}", "policy.pth": b""})
    assert "torch.save" in refused(lacking, tmp_path / "out")
    deep = zipped(tmp_path, "deep.zip", {"data": "[" * 100_000, "policy.pth": b""})
    assert "not valid JSON" in refused(deep, tmp_path / "out")


def test_archives_that_unpack_to_too_much(small, tmp_path, monkeypatch):
    bomb = zipped(tmp_path, "bomb.zip", {"data": b" " * 1_000_000, "policy.pth": b"0" * 1_000_000})
    monkeypatch.setattr(reading, "FILE_BYTES", 100_000)
    assert bomb.stat().st_size < 10_000
    assert "unpacks to more" in refused(bomb, tmp_path / "out")
    monkeypatch.setattr(reading, "FILE_BYTES", 100)
    assert "larger than" in refused(small["state_dict"], tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated_files(small, kind, share, tmp_path):
    data = small[kind].read_bytes()
    file = written(tmp_path, f"cut{small[kind].suffix}", data[: int(share * len(data))])
    refused(file, tmp_path / "out", SIZED)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
def test_damaged_files_are_refused_or_sound(small, kind, tmp_path_factory, changes, head):
    folder = tmp_path_factory.mktemp("damaged")
    data = bytearray(small[kind].read_bytes())
    for place, value in changes:
        data[int(place * (min(300, len(data)) if head else len(data)))] = value
    file = written(folder, f"damaged{small[kind].suffix}", bytes(data))
    try:
        import_policy(file, folder / "p", SIZED)
    except UserError as error:
        assert str(error).endswith(".")
        assert sorted(folder.iterdir()) == [file]
    else:
        checkpoint.load(folder / "p.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x08\x08", b"\x20" + b"\0" * 7 + b"{"])
)
def test_random_bytes_are_refused(tmp_path_factory, data, head):
    folder = tmp_path_factory.mktemp("random")
    file = written(folder, "random.onnx", head + data)
    with pytest.raises(UserError):
        import_policy(file, folder / "p")
    assert sorted(folder.iterdir()) == [file]


# --- nothing is run ---


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_not_run(tmp_path, legacy):
    state = {"actor.weight": torch.zeros(2, 2), "evil": Evil(tmp_path / "mark")}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    sentence = refused(tmp_path / "evil.pt", tmp_path / "out")
    assert "never unpickled" in sentence and "state_dict" in sentence and "torch.export.save" in sentence
    assert not (tmp_path / "mark").exists()


def test_whole_modules_are_not_unpickled(tmp_path):
    torch.save(Small(), tmp_path / "module.pt")
    assert "never unpickled" in refused(tmp_path / "module.pt", tmp_path / "out")


def test_the_pickles_of_stable_baselines3_are_not_run(small, tmp_path):
    import base64

    evil = base64.b64encode(pickle.dumps(Evil(tmp_path / "mark"))).decode()

    def poison(name, data):
        if name != "data":
            return data
        values = json.loads(data)
        for value in values.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = evil
        return json.dumps(values)

    import_policy(changed(small["stable_baselines3"], tmp_path, poison), tmp_path / "p")
    assert not (tmp_path / "mark").exists()


def test_an_exported_program_runs_nothing(small, tmp_path):
    buffer = io.BytesIO()
    torch.save({"x": Evil(tmp_path / "mark")}, buffer)

    def inputs(name, data):
        return buffer.getvalue() if "sample_inputs" in name else data

    import_policy(changed(small["exported"], tmp_path, inputs), tmp_path / "p", SIZED)  # they are not read

    def guard(name, data):
        if not name.endswith("models/model.json"):
            return data
        program = json.loads(data)
        program["guards_code"] = [f"__import__('os').mkdir({str(tmp_path / 'mark')!r})"]
        return json.dumps(program)

    import_policy(changed(small["exported"], tmp_path, guard), tmp_path / "p", SIZED)

    def target(name, data):
        return data.replace(b"torch.ops.aten.relu.default", b"torch.os.mkdir")

    assert "torch.os.mkdir" in refused(changed(small["exported"], tmp_path, target), tmp_path / "out", SIZED)

    def weights(name, data):
        if name.endswith("weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true')
        return buffer.getvalue() if "data/weights/weight_" in name else data

    sentence = refused(changed(small["exported"], tmp_path, weights), tmp_path / "out", SIZED)
    assert "never unpickled" in sentence and not (tmp_path / "mark").exists()


def test_an_onnx_model_reads_no_other_file(tmp_path):
    import onnx

    to_onnx(trained(Small()), torch.rand(1, 2, 16, 16), tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx.data").exists()
    import_policy(tmp_path / "x.onnx", tmp_path / "p", SIZED)
    model = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (tmp_path / "y.onnx").write_bytes(model.SerializeToString())
    assert "outside its folder" in refused(tmp_path / "y.onnx", tmp_path / "out", SIZED)
    (tmp_path / "x.onnx.data").write_bytes(b"short")
    assert "shorter than" in refused(tmp_path / "x.onnx", tmp_path / "out", SIZED)


def test_a_card_runs_nothing_either(small, tmp_path):
    import_policy(small["exported"], tmp_path / "p", SIZED)
    card = json.loads((tmp_path / "p.json").read_text())
    card["network"]["nodes"][1]["op"] = "torch.os.mkdir"
    (tmp_path / "p.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"torch\.os\.mkdir"):
        checkpoint.load(tmp_path / "p.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state_dict", "exported", "onnx", "torchscript"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_cards_are_refused_or_sound(small, kind, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("card")
    import_policy(small[kind], folder / "p", asked(shape=(2, 16, 16), layout="chw", activation="elu"))
    card = json.loads((folder / "p.json").read_text())
    place = card
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from([key for key in keys if key != "weights_sha256"]))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    numbers = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**6), st.text(max_size=5))
    place[key] = data.draw(
        st.one_of(numbers, st.lists(numbers, max_size=3), st.dictionaries(st.text(max_size=5), numbers))
    )
    (folder / "p.json").write_text(json.dumps(card))
    try:
        checkpoint.load(folder / "p.safetensors")
    except UserError as error:
        assert str(error).endswith(".")


# --- policies that a file does not describe ---


def test_state_dicts_whose_network_is_not_known(tmp_path):
    def saved(module, **more):
        torch.save({**module.state_dict(), **more}, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    assert "no convolution and no linear layer" in refused(saved(nn.LSTM(4, 4)), tmp_path / "o")
    assert "no convolution" in refused(saved(nn.BatchNorm1d(3)), tmp_path / "o")
    branched = nn.ModuleDict({"res": nn.Conv2d(2, 2, 3), "head": nn.Linear(3, 3)})
    assert "do not say" in refused(saved(branched), tmp_path / "o")
    unknown = nn.Sequential(nn.Conv2d(4, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    sentence = refused(saved(unknown), tmp_path / "o")
    assert "--strides" in sentence and "--module" in sentence and "kernels 5" in sentence
    pooled = nn.Sequential(
        nn.Conv2d(4, 8, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    assert "between" in refused(saved(pooled), tmp_path / "o")
    assert "activation 'swish'" in refused(saved(NatureAgent()), tmp_path / "o", asked(activation="swish"))
    assert "3 convolutions" in refused(saved(NatureAgent()), tmp_path / "o", asked(strides=(4, 2)))
    assert "do not fit" in refused(saved(NatureAgent()), tmp_path / "o", asked(size=(96, 96)))
    half = nn.ModuleDict({"actor": nn.Linear(192, 3), "critic": nn.Conv2d(3, 8, 8, 4)})
    assert "different convolutions" in refused(saved(half), tmp_path / "o", asked(shape=(3, 8, 8)))
    assert "None" not in refused(saved(nn.Sequential(ConvSequence(3, 4))), tmp_path / "o")


def test_tensors_that_unpack_to_too_much(small, tmp_path):
    torch.save({"actor.weight": torch.zeros(1).expand(100_000, 100_000)}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    assert "unpacks to more" in refused(tmp_path / "x.pt", tmp_path / "o")

    def stretch(name, data):
        if not name.endswith("weights_config.json"):
            return data
        values = json.loads(data)
        meta = next(iter(values["config"].values()))["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 10**6}] * 2, [{"as_int": 0}] * 2
        return json.dumps(values)

    assert "larger than" in refused(changed(small["exported"], tmp_path, stretch), tmp_path / "o", SIZED)


def test_several_state_dicts(tmp_path):
    both = {"actor": Small().state_dict(), "critic": Small().state_dict()}
    torch.save(both, tmp_path / "x.pt")
    assert "several state dicts (actor, critic)" in refused(tmp_path / "x.pt", tmp_path / "o")
    torch.save({"model_state_dict": Small().state_dict(), "optimizer": {"state": {}}}, tmp_path / "x.pt")
    import_policy(tmp_path / "x.pt", tmp_path / "p", SIZED)


def test_weights_that_are_no_numbers(tmp_path):
    module = Small()
    with torch.no_grad():
        module.actor.weight[0, 0] = float("nan")
    torch.save(module.state_dict(), tmp_path / "x.pt")
    assert "not finite" in refused(tmp_path / "x.pt", tmp_path / "o", SIZED)


class OwnExtractor:
    """Built lazily, for stable_baselines3 is imported by the tests alone."""

    @staticmethod
    def make():
        from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

        class Own(BaseFeaturesExtractor):
            def __init__(self, space, kernel=8):
                super().__init__(space, 12)
                self.cnn = nn.Sequential(nn.Conv2d(space.shape[0], 6, kernel, 4), nn.ReLU(), nn.Flatten())
                with torch.no_grad():
                    flat = self.cnn(torch.zeros(1, *space.shape)).shape[1]
                self.linear = nn.Sequential(nn.Linear(flat, 12), nn.ReLU())

            def forward(self, x):
                return self.linear(self.cnn(x))

        return Own


def test_own_extractors_of_stable_baselines3(tmp_path):
    own = {"features_extractor_class": OwnExtractor.make()}
    model, file = stable_baselines3("PPO", tmp_path, Pictures((40, 40, 3), 3), "own", n_steps=4, policy_kwargs=own)
    lines = import_policy(file, tmp_path / "p")
    assert "--activation" in " ".join(lines) and "--strides" in " ".join(lines)
    policy, _ = checkpoint.load(tmp_path / "p.safetensors")
    x = torch.randint(0, 256, (4, 3, 40, 40))
    with torch.no_grad():
        theirs = model.policy.get_distribution(x).distribution.logits
        assert torch.allclose(policy(x / 255)[0].log_softmax(dim=1), theirs, rtol=1e-5, atol=1e-5)
    own["features_extractor_kwargs"] = {"kernel": 7}
    _, file = stable_baselines3("PPO", tmp_path, Pictures((40, 40, 3), 3), "seven", n_steps=4, policy_kwargs=own)
    assert "--strides" in refused(file, tmp_path / "o")
    import_policy(file, tmp_path / "p", asked(strides=(4,)))
    assert "do not fit" in refused(file, tmp_path / "o", asked(strides=(3,)))


def test_policies_of_stable_baselines3_that_are_refused(small, tmp_path):
    file = small["stable_baselines3"]

    def with_data(**values):
        def change(name, data):
            return json.dumps({**json.loads(data), **values}) if name == "data" else data

        return changed(file, tmp_path, change)

    own = with_data(policy_class={"__module__": "my_project.policies"})
    assert "policy class of its own" in refused(own, tmp_path / "o")
    vector = with_data(observation_space={":type:": "<class 'gymnasium.spaces.box.Box'>", "_shape": [4]})
    assert "no single picture" in refused(vector, tmp_path / "o")
    assert "gSDE" in refused(with_data(use_sde=True), tmp_path / "o")
    several = with_data(action_space={":type:": "<class 'gymnasium.spaces.multi_discrete.MultiDiscrete'>"})
    assert "MultiDiscrete" in refused(several, tmp_path / "o")
    huge = with_data(observation_space={"_shape": [1, 60000, 60000]})
    refused(huge, tmp_path / "o")
    odd = with_data(policy_kwargs={"activation_fn": "<class 'my_project.Swish'>"})
    assert "--activation" in refused(odd, tmp_path / "o")


def test_graphs_that_are_no_policies(tmp_path):
    class Argmax(Small):
        def forward(self, x):
            return super().forward(x)[0].argmax(dim=1)

    class Three(Small):
        def forward(self, x):
            logits, value = super().forward(x)
            return logits, value, logits.softmax(dim=1)

    class Sorting(Small):
        def forward(self, x):
            return super().forward(x)[0].sort(dim=1).values

    def scripted(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(module.eval(), torch.rand(1, 2, 16, 16)).save(str(tmp_path / "x.pt"))
        return tmp_path / "x.pt"

    assert "int64 (3,)" in refused(scripted(Argmax()), tmp_path / "o", SIZED)
    assert "export a network that gives logits" in refused(scripted(Three()), tmp_path / "o", SIZED)
    assert "--input HxW" in refused(scripted(Small()), tmp_path / "o")
    torch.export.save(torch.export.export(Sorting(), (torch.rand(1, 2, 16, 16),)), tmp_path / "x.pt2")
    assert "torch.ops.aten.sort" in refused(tmp_path / "x.pt2", tmp_path / "o")
    training = nn.Sequential(nn.Conv2d(2, 3, 8), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(243, 2))
    torch.export.save(torch.export.export(training.train(), (torch.rand(2, 2, 16, 16),)), tmp_path / "x.pt2")
    assert ".eval()" in refused(tmp_path / "x.pt2", tmp_path / "o")


# --- options, card and command ---


def test_options_that_do_not_fit(small, tmp_path):
    file = small["state_dict"]

    def options(**more):
        return asked(shape=(2, 16, 16), **more)

    assert "3 actions, but 2 names" in refused(file, tmp_path / "o", options(actions=("a", "b")))
    assert "name of its own" in refused(file, tmp_path / "o", options(actions=("a", "a", "b")))
    assert "3 outputs" in refused(file, tmp_path / "o", options(output="gaussian"))
    assert "--scale" in refused(file, tmp_path / "o", options(scale=0.0))
    assert "channels" in refused(file, tmp_path / "o", options(colour="rgb"))
    assert "overwrite" in refused(small["safetensors"].rename(tmp_path / "p.safetensors"), tmp_path / "p", SIZED)
    (tmp_path / "p.safetensors").rename(small["safetensors"])


def test_the_command(small, tmp_path, capsys):
    (tmp_path / "card.yaml").write_text(
        "actions: [left, keep, right]\ntask: null\ninput: {shape: [2, 16, 16], colour: grey, stack: 2}\n"
        "controls:\n- {steer: -0.1, target_speed: 20}\n- {target_speed: 20}\n"
        "- {steer: 0.1, throttle: 0.4, along_lane: true}\n"
    )
    out = tmp_path / "sub" / "policy"
    arguments = ["import", str(small["state_dict"]), "--out", str(out), "--card", str(tmp_path / "card.yaml")]
    assert main([*arguments, "--scale", "0.01", "--mean", "0.5,0.4", "--deviation", "2"]) == 0
    printed = capsys.readouterr().out
    assert "--activation" in printed and "--colour" not in printed and "--scale" not in printed
    policy, card = checkpoint.load(out.with_suffix(".safetensors"))
    assert card["action_names"] == ["left", "keep", "right"]
    assert card["controls"][0] == {"steer": -0.1, "throttle": 0.0, "brake": 0.0, "target_speed": 20.0}
    assert [command.along_lane for command in commands_of(card)] == [False, False, True]
    assert policy.recipe.mean == (0.5, 0.4) and policy.recipe.scale == 0.01
    x = torch.randint(0, 256, (3, 2, 16, 16), generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.5, 0.4]).view(2, 1, 1)
    with torch.no_grad():
        theirs = trained(Small())((x * 0.01 - mean) / 2)[0]
        assert torch.allclose(policy(x / 255)[0], theirs, rtol=1e-4, atol=1e-4)
    (tmp_path / "card.yaml").write_text("inputs: {}\n")
    assert main(arguments) == 2
    assert "unknown key 'inputs'" in capsys.readouterr().err
    (tmp_path / "controls.yaml").write_text("- {steer: 3}\n")
    assert main(["import", str(small["onnx"]), "--out", "x", "--controls", str(tmp_path / "controls.yaml")]) == 2
    assert "[0].steer" in capsys.readouterr().err


def test_code_is_run_only_when_it_is_named(small, tmp_path, monkeypatch):
    (tmp_path / "their_code.py").write_text(
        "import torch\nfrom test_import_refusals import Small\n\ndef make():\n    return Small()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import_policy(small["state_dict"], tmp_path / "p", asked(shape=(2, 16, 16), module="their_code:make"))
    with pytest.raises(UserError, match="their_code:make"):
        checkpoint.load(tmp_path / "p.safetensors")
    policy, card = checkpoint.load(tmp_path / "p.safetensors", module="their_code:make")
    assert card["network"] == {"kind": "module", "factory": "their_code:make"}
    x = torch.rand(3, 2, 16, 16)
    with torch.no_grad():
        assert torch.allclose(policy(x)[0], trained(Small())(x)[0], atol=1e-5)
    for factory in ("their_code:none", "no_such_module:make", "their_code"):
        refused(small["state_dict"], tmp_path / "o", asked(shape=(2, 16, 16), module=factory))
    assert "do not fit" in refused(small["state_dict"], tmp_path / "o", asked(module="torch.nn:Identity"))


def test_every_foreign_file_needs_no_option():
    """The ten files are imported in test_import_policies.py with these."""
    assert len(FOREIGN) == 10
