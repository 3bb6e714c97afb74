"""Policies of other libraries: after the import they decide as before, and their maps are those of the original."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from captum.attr import IntegratedGradients
from foreign_policies import FOREIGN, NatureAgent, Pictures, QNetwork, asked, stable_baselines3, to_onnx, trained
from tiny_run import TINY
from torch import nn

import carla_digr
from carla_digr import checkpoint
from carla_digr.attacks import fgsm, pgd
from carla_digr.cli import main
from carla_digr.errors import UserError
from carla_digr.importing import import_policy
from carla_digr.policy import ActorCritic, TorchPolicy
from carla_digr.saliency import METHODS
from carla_digr.saliency.perturbation import Perturbation
from carla_digr.tasks import parse_config
from carla_digr.training.saliency_dataset import load_dataset, make_dataset

# Of a map, relative to its largest value
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


@pytest.fixture(scope="module", params=FOREIGN)
def pair(request, tmp_path_factory):
    """A foreign file's original and what the import makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    foreign = FOREIGN[request.param](folder)
    import_policy(foreign.file, folder / "imported", foreign.options)
    policy, card = checkpoint.load(folder / "imported.safetensors")
    if foreign.module is not None:
        foreign.module.double()
        policy.double()
    return foreign, policy, card


def dtype_of(foreign):
    return torch.float32 if foreign.module is None else torch.float64


def states(foreign, count=2):
    """Blurred noise: pictures with edges of some size, so that a blur does not take all of them."""
    shape = foreign.shape
    noise = np.random.default_rng(4).random((count * shape[0], *shape[1:]), np.float32)
    smooth = np.stack([cv2.GaussianBlur(plane, (0, 0), 2.0) for plane in noise])
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return torch.from_numpy(np.rint(smooth * 255).astype(np.float32).reshape(count, *shape)).to(dtype_of(foreign)) / 255


def close(ours, theirs):
    scale = theirs.abs().amax(dim=(1, 2), keepdim=True)
    assert (scale > 1e-12).all()
    assert ((ours - theirs).abs() <= TOLERANCE[ours.dtype] * scale).all(), float(((ours - theirs).abs() / scale).max())


def explained(foreign, outputs):
    """The functions that a gradient method explains, (B, F), and what their squares count."""
    if foreign.output == "gaussian":
        deviation = outputs.chunk(2, dim=1)[1].exp()
        return outputs, torch.cat([1 / deviation**2, torch.full_like(deviation, 2.0)], dim=1).detach()
    f = outputs.softmax(dim=1).square().sum(dim=1, keepdim=True) / 2
    return f, torch.ones_like(f).detach()


def divergence(foreign, p, q):
    if foreign.output == "gaussian":
        (mp, lp), (mq, lq) = p.chunk(2, dim=1), q.chunk(2, dim=1)
        normal = torch.distributions.Normal
        return torch.distributions.kl_divergence(normal(mp, lp.exp()), normal(mq, lq.exp())).sum(dim=1)
    categorical = torch.distributions.Categorical
    return torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))


def blurred(x, sigma):
    reach = int(4 * sigma + 0.5)
    planes = x.flatten(0, -3).double().numpy()
    size = (2 * reach + 1,) * 2
    return torch.from_numpy(
        np.stack([cv2.GaussianBlur(p, size, sigma, borderType=cv2.BORDER_REFLECT) for p in planes])
    ).view(x.shape)


def test_it_decides_as_the_original(pair):
    foreign, policy, card = pair
    assert policy.input_shape == foreign.shape and policy.output == foreign.output
    x = (
        torch.randint(0, 256, (5, *foreign.shape), generator=torch.Generator().manual_seed(1)).to(dtype_of(foreign))
        / 255
    )
    with torch.no_grad():
        ours, theirs = policy(x)[0], foreign.outputs(x)
    if foreign.output == "logits":
        ours, theirs = ours.log_softmax(dim=1), theirs.log_softmax(dim=1)
    assert theirs.std(dim=0).max() > 1e-3  # it decides by what it sees
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=2e-6, atol=2e-6), float((ours - theirs).abs().max())
    assert card["action_names"] == [f"action {k}" for k in range(policy.actions)]
    assert card["role"] == "imported" and card["task"] is None


def test_vanilla_gradient_is_autograds(pair):
    foreign, policy, _ = pair
    x = states(foreign).requires_grad_(True)
    functions, importance = explained(foreign, foreign.outputs(x))
    total = sum(
        importance[:, k, None, None, None]
        * torch.autograd.grad(functions[:, k].sum(), x, retain_graph=True, materialize_grads=True)[0].square()
        for k in range(functions.shape[1])
        if functions[:, k].requires_grad
    )
    close(METHODS["vg"](policy, x.detach()), total.sqrt().amax(dim=1))


@pytest.mark.slow
def test_integrated_gradients_are_captums(pair):
    foreign, policy, _ = pair
    x = states(foreign)
    with torch.no_grad():
        importance = explained(foreign, foreign.outputs(x))[1]
    total = torch.zeros_like(x)
    means = importance.shape[1] // 2 if foreign.output == "gaussian" else 1  # deviations do not depend on the state
    for k in range(means):
        method = IntegratedGradients(
            lambda s, k=k: explained(foreign, foreign.outputs(s))[0][:, k], multiply_by_inputs=False
        )
        total += importance[:, k, None, None, None] * method.attribute(x.clone(), n_steps=50).square()
    close(METHODS["ig"](policy, x), total.sqrt().amax(dim=1))


def test_perturbation_is_the_definition(pair):
    """At the perturbed centres, where nothing is interpolated: eq. 3 in float64, blurred by OpenCV."""
    foreign, policy, _ = pair
    x = states(foreign, 1)
    height, width = foreign.shape[1:]
    stride = 21 if height == 84 else 3  # odd divisors: each centre is a pixel
    maps = METHODS["gb"](policy, x, perturbation=Perturbation(5.0, 3.0, stride))
    blur = blurred(x, 3.0)
    y, z = np.mgrid[:height, :width]
    centres = np.arange(stride // 2, height, stride)
    best = int(maps[0][centres][:, centres].argmax())
    for row, column in [(centres[best // len(centres)], centres[best % len(centres)]), (centres[1], centres[2])]:
        bump = torch.from_numpy(np.exp(-((y - row) ** 2 + (z - column) ** 2) / 50.0))
        perturbed = (x * (1 - bump) + blur * bump).to(x.dtype)
        with torch.no_grad():
            theirs = float(divergence(foreign, foreign.outputs(x).double(), foreign.outputs(perturbed).double()))
        exact = x.dtype == torch.float64
        assert float(maps[0, row, column]) == pytest.approx(
            theirs, rel=1e-6 if exact else 1e-2, abs=0 if exact else 3e-7
        )
        assert theirs > 1e-9
    assert maps.max() > 1e-6


def test_the_linearised_map_is_the_definition(pair):
    foreign, policy, _ = pair
    x = states(foreign, 1)
    delta = (blurred(x, x.shape[2] * 10 / 128) - x).to(x.dtype)
    at = (x + 0.35 * delta).requires_grad_(True)
    outputs = foreign.outputs(at)
    rows = [
        torch.autograd.grad(outputs[:, k].sum(), at, retain_graph=True)[0]
        if outputs[:, k].requires_grad
        else torch.zeros_like(at)
        for k in range(outputs.shape[1])
    ]
    contrast = torch.stack([(row * delta).sum(dim=1) for row in rows], dim=1)
    with torch.no_grad():
        before = foreign.outputs(x).double()[:, :, None, None]
    after = before + 30 * blurred(contrast, 1.5)
    if foreign.output == "gaussian":
        (mean, log_sigma), (other, log_other) = before.chunk(2, dim=1), after.chunk(2, dim=1)
        ratio = ((2 * log_sigma).exp() + (other - mean).square()) / (2 * log_other).exp()
        theirs = (log_other - log_sigma + ratio / 2 - 1 / 2).sum(dim=1)
    else:
        log_p, log_q = before.log_softmax(dim=1), after.log_softmax(dim=1)
        theirs = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    ours = METHODS["linear"](policy, x).double()
    assert ((ours - theirs).abs() <= (1e-4 if x.dtype == torch.float32 else 1e-9) * theirs.max()).all()


@pytest.mark.slow
def test_every_method_explains_it_or_says_in_a_sentence_what_to_do(pair):
    foreign, policy, _ = pair
    x = states(foreign, 1)
    for name, method in METHODS.items():
        try:
            maps = method(policy, x, perturbation=Perturbation(5.0, 3.0, 28))
        except UserError as error:
            assert name in ("gbp", "smoothgrad", "gradcam", "sarfa"), (name, error)
            assert str(error).endswith(".") and " use " in str(error), error
        else:
            assert maps.shape == (1, *foreign.shape[1:]) and torch.isfinite(maps).all() and (maps >= 0).all(), name


def test_attacks_change_it(pair):
    foreign, policy, _ = pair
    if foreign.output == "gaussian":
        with pytest.raises(UserError, match="continuous"):
            fgsm(policy, states(foreign), 0.02, torch.Generator())
        return
    x = states(foreign)
    with torch.no_grad():
        before = foreign.outputs(x).log_softmax(dim=1)
        action = before.argmax(dim=1, keepdim=True)
        for attack in (fgsm, pgd):
            attacked = attack(policy, x, 0.02, torch.Generator().manual_seed(0))
            assert ((attacked - x).abs() <= 0.02 + 1e-6).all()
            after = foreign.outputs(attacked).log_softmax(dim=1)
            assert (after.gather(1, action) < before.gather(1, action)).all()


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_the_nature_cnn_of_stable_baselines3_is_an_actor_critic(name, tmp_path):
    foreign = FOREIGN[name](tmp_path)
    import_policy(foreign.file, tmp_path / "p")
    policy, card = checkpoint.load(tmp_path / "p.safetensors")
    assert isinstance(policy, ActorCritic) and "network" not in card
    x = torch.randint(0, 256, (16, *foreign.shape), generator=torch.Generator().manual_seed(7)) / 255
    with torch.no_grad():
        ours, theirs = policy(x)[0].log_softmax(dim=1), foreign.outputs(x)
    assert (ours - theirs).abs().max() <= 1e-6


def test_the_nature_cnn_of_cleanrl_is_an_actor_critic(tmp_path):
    agent = trained(NatureAgent())
    torch.save({"epoch": 3, "agent": agent.state_dict()}, tmp_path / "agent.pth")
    lines = import_policy(tmp_path / "agent.pth", tmp_path / "p", asked(actions=("a", "b", "c", "d", "e", "f")))
    policy, card = checkpoint.load(tmp_path / "p.safetensors")
    assert isinstance(policy, ActorCritic) and card["action_names"] == ["a", "b", "c", "d", "e", "f"]
    for option in ("--strides", "--activation", "--input", "--scale", "--stack", "--colour", "--output"):
        assert option in " ".join(lines)
    x = torch.randint(0, 256, (16, 4, 84, 84), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        (logits, value), (theirs, their_value) = policy(x / 255), agent(x)
    difference = logits.log_softmax(dim=1).double() - theirs.log_softmax(dim=1).double()
    assert difference.abs().max() <= 1e-5  # the softmax of a sharp policy in float32
    assert torch.allclose(value, their_value[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_q_networks_keep_their_greedy_action(named, tmp_path):
    network = trained(QNetwork())
    state = {f"q_network.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(state if named else network.state_dict(), tmp_path / "q.pt")
    import_policy(tmp_path / "q.pt", tmp_path / "p", asked() if named else asked(output="q_values"))
    policy, card = checkpoint.load(tmp_path / "p.safetensors")
    assert policy.output == card["output"] == "q_values"
    x = torch.randint(0, 256, (16, 4, 84, 84), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        values, theirs = policy(x / 255)[0], network(x)
    assert torch.equal(values.argmax(dim=1), theirs.argmax(dim=1))
    assert torch.allclose(values, theirs, rtol=1e-5, atol=1e-5)


def test_the_actor_of_sac_is_a_squashed_gaussian(tmp_path):
    environment = Pictures((64, 64, 3), 2, True)
    model, file = stable_baselines3("SAC", tmp_path, environment, buffer_size=4, policy_kwargs={"net_arch": [16, 8]})
    import_policy(file, tmp_path / "p")
    policy, _ = checkpoint.load(tmp_path / "p.safetensors")
    assert policy.output == "squashed_gaussian" and policy.actions == 2
    x = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        mean, log_std, _ = model.policy.actor.get_action_dist_params(x)
        assert torch.allclose(policy(x / 255)[0], torch.cat([mean, log_std], dim=1), rtol=1e-5, atol=1e-5)


def test_the_actor_of_td3_is_deterministic(tmp_path):
    model, file = stable_baselines3("TD3", tmp_path, Pictures((64, 64, 3), 2, True), buffer_size=4)
    import_policy(file, tmp_path / "p")
    policy, _ = checkpoint.load(tmp_path / "p.safetensors")
    assert policy.output == "deterministic" and policy.actions == 2
    x = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(policy(x / 255)[0], model.policy.actor(x), rtol=1e-5, atol=1e-5)


def test_the_card_says_where_it_comes_from(tmp_path):
    foreign = FOREIGN["batch_norm"](tmp_path)
    import_policy(foreign.file, tmp_path / "sub" / "p", asked(task="pong"))
    card = json.loads((tmp_path / "sub" / "p.json").read_text())
    assert card["source"]["file"] == "batch_norm.cleanrl_model" and len(card["source"]["sha256"]) == 64
    assert card["input_shape"] == [4, 84, 84] and card["network"]["kind"] == "layers" and card["task"] == "pong"


@pytest.mark.slow
def test_an_imported_policy_teaches(tmp_path):
    """The dataset of a foreign teacher, by processes that each load it: its maps are the method's own."""
    module = trained(nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)))
    to_onnx(module, torch.rand(1, 3, 64, 64), tmp_path / "t.onnx")
    import_policy(tmp_path / "t.onnx", tmp_path / "teacher")
    dataset = {"maps": 6, "shard_size": 2, "stride": 8, "state_interval": 2, "environments": 2, "workers": 2}
    config = parse_config({**TINY, "saliency_dataset": dataset}, "tiny")
    make_dataset(config, tmp_path / "run", tmp_path / "teacher.safetensors")
    made = load_dataset(tmp_path / "run" / "dataset")
    settings = Perturbation.from_settings(config.saliency_dataset)
    theirs = METHODS["gb"](TorchPolicy(module, (3, 64, 64), 4), made.states / 255, perturbation=settings)
    assert len(made.maps) == 6 and (made.largest > 0).all()
    assert torch.allclose(made.largest, theirs.amax(dim=(1, 2)), rtol=1e-3)
    assert torch.allclose(made.maps.float(), theirs / theirs.amax(dim=(1, 2), keepdim=True), atol=2e-3)


def test_an_imported_policy_explains_a_folder_of_pictures(tmp_path):
    foreign = FOREIGN["ppo"](tmp_path)
    assert main(["import", str(foreign.file), "--out", str(tmp_path / "p")]) == 0
    (tmp_path / "frames").mkdir()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 84, 84), np.uint8)
    for index, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / "frames" / f"{index:03}.png"), frame)
    weights = ["--weights", str(tmp_path / "p.safetensors")]
    assert main(["explain", str(tmp_path / "frames"), *weights, "--method", "vg", "--out", str(tmp_path / "maps")]) == 0
    policy = carla_digr.load_policy(tmp_path / "p.safetensors")
    decided = carla_digr.decide(policy, frames[..., None])
    stacks = np.stack([frames[[max(k - j, 0) for j in (3, 2, 1, 0)]] for k in range(6)])
    with torch.no_grad():
        theirs = foreign.outputs(torch.from_numpy(stacks).float() / 255)
    assert np.allclose(decided.probabilities, theirs.softmax(dim=1).numpy(), atol=1e-5)


class Tutorial(nn.Module):
    """Layers with names of their own, as tutorials write them."""

    def __init__(self, continuous=False):
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 8, 5, 2)
        self.bn_1 = nn.BatchNorm2d(8)
        self.conv_2 = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.features_fc = nn.Linear(8 * 15 * 15, 16)
        self.actor_mean = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 2))
        self.actor_logstd = nn.Parameter(torch.tensor([[-0.4, 0.2]])) if continuous else None
        self.critic = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))

    def forward(self, x):
        x = torch.tanh(self.bn_1(self.conv_1(x)))
        x = torch.tanh(self.features_fc(torch.tanh(self.conv_2(x)).flatten(1)))
        mean = self.actor_mean(x)
        if self.actor_logstd is None:
            return mean
        return torch.cat([mean, self.actor_logstd.expand_as(mean)], dim=1)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layers_that_follow_each_other(continuous, suffix, tmp_path):
    module = trained(Tutorial(continuous))
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    options = asked(strides=(2, 2), paddings=(0, 1), activation="tanh", size=(64, 64))
    if suffix == ".pt":
        torch.save(state, tmp_path / "x.pt")
    else:  # its names are sorted, which puts the normalisation before what it normalises
        safetensors.torch.save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match="--module"):
            import_policy(tmp_path / "x.safetensors", tmp_path / "p", options)
        return
    import_policy(tmp_path / "x.pt", tmp_path / "p", options)
    policy, _ = checkpoint.load(tmp_path / "p.safetensors")
    assert policy.output == ("gaussian" if continuous else "logits") and policy.actions == 2
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(policy(x)[0], module(x), rtol=1e-4, atol=1e-5)


def test_the_recipe_for_policies_that_are_refused(tmp_path, monkeypatch):
    """docs/policies.md: how a policy of stable-baselines3 that the import refuses is exported."""
    model, _ = stable_baselines3("PPO", tmp_path, Pictures((36, 36, 3), 4), n_steps=4)

    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    names = {"torch": torch, "model": model}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```py\n(.*?)```", page, re.DOTALL)[1], names)
    to_onnx(names["network"], names["example"], tmp_path / "my_policy.onnx", dynamic_shapes=({0: names["batch"]},))
    x = torch.randint(0, 256, (3, 3, 36, 36), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.policy.get_distribution(x).distribution.logits
    for name in ("my_policy.pt2", "my_policy.onnx"):
        import_policy(tmp_path / name, tmp_path / "p")
        policy, _ = checkpoint.load(tmp_path / "p.safetensors")
        assert policy.recipe.scale == 1.0
        with torch.no_grad():
            assert torch.allclose(policy(x / 255)[0].log_softmax(dim=1), theirs, rtol=1e-4, atol=1e-5)
