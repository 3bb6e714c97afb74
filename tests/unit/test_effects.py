"""DIGR on the linearised map, and objects' effects as its targets."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from carla_digr import checkpoint
from carla_digr.config import DistillConfig, PolicyConfig
from carla_digr.distributions import kl_divergence
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, to_input
from carla_digr.saliency.linear import differentiable_maps, fisher_rows, linear_maps
from carla_digr.tasks import make_task
from carla_digr.training import distill as stage
from carla_digr.training.distill import distill
from carla_digr.training.effects import EffectsOfStates, ObjectEffects, effects_loss, shares_on, target_shares
from carla_digr.training.rollout import sampled
from carla_digr.training.saliency_dataset import load_dataset, make_dataset
from carla_digr.training.state import load_state, save_state
from carla_digr.training.supervision import with_effects

SHORT = DistillConfig(iterations=6, environments=2, buffer_states=50, saliency_batch=4, buffer_batch=4)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    net = ActorCritic(PolicyConfig(((8, 8, 4), (8, 4, 2), (8, 3, 1)), 16, "softplus"), 3, 48, 48, 6).double()
    with torch.no_grad():
        net.policy_head.weight *= 100.0
    return net


def random_states(count):
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- the differentiable map ---


def test_the_rows_are_the_variance_under_pi_also_of_a_decision_that_is_nearly_sure():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.3, -4.0], [0.0, 40.0, 1.0, -3.0, -50.0]], dtype=torch.float64)
    change = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, importance = fisher_rows(logits)
    found = (importance * torch.einsum("bka,ba->bk", rows, change).square()).sum(dim=1)
    pi = logits.softmax(dim=1)
    expected = (pi[:, :, None] * pi[:, None, :] * (change[:, :, None] - change[:, None, :]).square()).sum(
        dim=(1, 2)
    ) / 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    single = fisher_rows(logits.float())
    torch.testing.assert_close(single[1].double(), importance, rtol=1e-5, atol=0.0)
    assert torch.isfinite(single[0]).all()


def test_the_differentiable_map_is_the_linear_map_to_second_order(policy):
    states, small = random_states(3), 1e-5
    expected = linear_maps(policy, states, mass=small) / small**2
    found = differentiable_maps(policy, states, policy(states)[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8 * float(expected.max()))


def test_fewer_rows_give_the_map_on_average_over_all_signs(policy):
    states = random_states(2)
    logits = policy(states)[0].detach()
    exact = differentiable_maps(policy, states, logits).detach()
    every = [
        differentiable_maps(policy, states, logits, torch.tensor([signs, signs], dtype=torch.float64)).detach()
        for signs in itertools.product((-1.0, 1.0), repeat=4)  # one row exact, the four others in one
    ]
    torch.testing.assert_close(torch.stack(every).mean(dim=0), exact, rtol=1e-10, atol=1e-12 * float(exact.max()))
    assert not torch.allclose(every[0], exact, rtol=1e-3)


@pytest.mark.parametrize("signs", [None, torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2, dtype=torch.float64)])
def test_its_gradient_by_the_weights_equals_finite_differences(policy, signs):
    states = random_states(2)
    wanted = torch.rand(2, 48, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss():
        maps = differentiable_maps(policy, states, policy(states)[0], signs)
        return (maps * wanted).sum() / maps.sum()

    parameters = [p for name, p in policy.named_parameters() if not name.startswith("value_head")]
    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        before, step = parameter.detach().clone(), 1e-6
        values = []
        for side in (step, -step):
            with torch.no_grad():
                parameter.copy_(before + side * direction)
            values.append(float(loss().detach()))
        with torch.no_grad():
            parameter.copy_(before)
        slope = float((gradient * direction).sum())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-9)


# --- targets ---


def effects_of(masks, effects, states):
    packed = torch.from_numpy(np.packbits(np.array(masks, bool), axis=2))
    return ObjectEffects(torch.tensor(states), packed, torch.tensor(effects, dtype=torch.float32))


def three_objects():
    """One state with two objects that share a pixel, one with a third; 2 x 3 pixels."""
    masks = np.zeros((3, 2, 3), bool)
    masks[0, 0, :2], masks[1, 0, 1:], masks[2, 1, 0] = True, True, True
    return effects_of(masks, [0.3, 0.1, 0.5], [0, 0, 2])


def test_shares_of_targets_and_maps_sum_to_one():
    objects = three_objects()
    shares, pixels = target_shares(objects, 3, 3, power=1.0)
    torch.testing.assert_close(shares, torch.tensor([[0.75, 0.25, 0], [0, 0, 1], [1, 0, 0]]))
    torch.testing.assert_close(pixels.sum(dim=1), torch.ones(3, 2, 3))
    torch.testing.assert_close(pixels[0, :, 0, 1], torch.tensor([0.75, 0.25, 0.0]), rtol=1e-4, atol=1e-4)
    maps = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    found = shares_on(maps, pixels)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))
    assert float(found[0, 2]) == pytest.approx(float(maps[0, 1].sum() / maps[0].sum()))
    squared, _ = target_shares(objects, 3, 3, power=2.0)
    torch.testing.assert_close(squared[0], torch.tensor([0.9, 0.1, 0.0]))


def test_the_loss_is_least_where_the_map_is_shared_as_the_effects_are():
    shares, pixels = target_shares(three_objects(), 3, 3, power=1.0)
    best, nothing, turned = torch.zeros(3, 2, 3), torch.zeros(3, 2, 3), torch.zeros(3, 2, 3)
    best[:, 0, 0], best[:, 0, 2] = 0.75, 0.25
    turned[:, 0, 0], turned[:, 0, 2] = 0.25, 0.75
    nothing[:, 1, 2] = 1.0
    losses = [float(effects_loss(maps, shares, pixels, 0.01)[0]) for maps in (best, 5 * best, turned, nothing)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0]) < 0.03
    assert losses[0] < losses[2] < losses[3]


def test_the_objects_of_chosen_states_are_numbered_anew():
    objects = three_objects()
    part = objects.of(torch.tensor([2, 0, 1, 2]))
    assert part.states.tolist() == [0, 1, 1, 3]
    torch.testing.assert_close(part.effects, torch.tensor([0.5, 0.3, 0.1, 0.5]))
    assert torch.equal(part.masks[1], objects.masks[0])
    torch.testing.assert_close(objects.totals(4), torch.tensor([0.4, 0.0, 0.5, 0.0]))
    wide = objects.widened(1, 3)
    assert np.unpackbits(wide.masks[2].numpy(), axis=1, count=3).tolist() == [[1, 0, 0], [1, 1, 0]]


# --- in the stages ---


@pytest.fixture(scope="module")
def effects_config(tiny_config):
    return replace(tiny_config, saliency_dataset=replace(tiny_config.saliency_dataset, maps=24, effects=True))


@pytest.fixture(scope="module")
def effects_run(tmp_path_factory, tiny_run, effects_config):
    """A directory with the tiny teacher, made surer, and a dataset that knows effects; not to be changed."""
    out = tmp_path_factory.mktemp("effects")
    teacher, card = checkpoint.load(tiny_run / "teacher.safetensors")
    with torch.no_grad():
        teacher.policy_head.weight *= 300.0
    checkpoint.save(out / "teacher.safetensors", teacher, card)
    make_dataset(effects_config, out, out / "teacher.safetensors")
    return out


def test_the_dataset_keeps_each_objects_effect_on_the_teacher(effects_run, effects_config, tiny_run):
    dataset, without = load_dataset(effects_run / "dataset"), load_dataset(tiny_run / "dataset")
    assert without.objects is None
    teacher, _ = checkpoint.load(effects_run / "teacher.safetensors")
    settings = effects_config.saliency_dataset
    seed = effects_config.seed + 1_000_003
    env = make_task(effects_config).make_vec_env(settings.environments, seed)
    act = sampled(teacher, np.random.default_rng((seed, 1)))
    observations = np.asarray(env.reset())
    for _ in range(settings.state_interval):
        observations = np.asarray(env.step(act(observations))[0])
    for number, objects in enumerate(env.objects()):
        assert np.array_equal(observations[number], dataset.states[number].numpy())
        part = dataset.objects.of(torch.tensor([number]))
        assert len(part.states) == len(objects)
        for k, item in enumerate(objects):
            pictures = np.stack([observations[number], item.without])
            logits = teacher(to_input(torch.from_numpy(pictures)))[0].detach().double()
            assert float(part.effects[k]) == pytest.approx(float(kl_divergence(*logits)), rel=1e-4, abs=1e-7)
            assert np.array_equal(np.unpackbits(part.masks[k].numpy(), axis=1), item.mask.astype(np.uint8))


def test_a_lost_file_of_effects_is_made_again_equal_to_the_last_bit(tmp_path, effects_run, effects_config):
    out = tmp_path / "out"
    shutil.copytree(effects_run, out)
    (out / "dataset" / "states.safetensors").unlink()
    make_dataset(effects_config, out, out / "teacher.safetensors")
    for path in (effects_run / "dataset").iterdir():
        assert path.read_bytes() == (out / "dataset" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "settings",
    [
        replace(SHORT, map="linear", loss="log_ratio"),
        replace(SHORT, map="linear", supervision="annotation", loss="coverage", map_rows=1),
        replace(SHORT, map="linear", supervision="both", loss="share", pcgrad=True),
        replace(SHORT, map="linear", supervision="effects", loss="effects", annotation_margin=2, map_rows=1),
        replace(SHORT, supervision="effects", loss="effects", effect_power=2.0),
    ],
    ids=["perturbation", "annotation", "both", "effects", "effects-of-the-gradient"],
)
def test_each_supervision_resumes_to_the_same_student_bit_for_bit(tmp_path, effects_run, effects_config, settings):
    settings = replace(settings, checkpoint_interval=2, validation_interval=2)
    students = []
    for name, parts in (("whole", (6,)), ("parts", (5, 6))):
        out = tmp_path / name
        shutil.copytree(effects_run, out)
        for iterations in parts:
            run_until(iterations, replace(effects_config, distill=settings), out)
        students.append((out / "student.safetensors").read_bytes())
    assert students[0] == students[1]
    _, card = checkpoint.load(tmp_path / "whole" / "student.safetensors")
    names = {"share", "penalised"} if settings.loss != "effects" else {"effects"}
    assert card["metrics"].keys() == {f"held_out_{name}" for name in names | {"kl"}}


class Stopped(Exception):
    """The job ends here."""


def run_until(iteration, config, out):
    """Distil, stopping without a word where this iteration would begin; the saved state is of an earlier one."""

    class Stopping(stage._Distillation):
        def _iterate(self):
            if self.iteration == iteration:
                raise Stopped
            return super()._iterate()

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(stage, "_Distillation", Stopping)
        distill(config, out, out / "teacher.safetensors")


def test_what_does_not_fit_is_refused_with_its_remedy(tmp_path, copied_run, tiny_config, effects_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    wanting = replace(tiny_config, distill=replace(SHORT, supervision="effects", loss="effects"))
    with pytest.raises(UserError, match=r"does not know what objects do; set saliency_dataset\.effects: true"):
        distill(wanting, out, out / "teacher.safetensors")
    for other in (replace(SHORT, supervision="effects"), replace(SHORT, loss="effects")):
        with pytest.raises(UserError, match="set both to effects or neither"):
            distill(replace(tiny_config, distill=other), out, out / "teacher.safetensors")
    with pytest.raises(UserError, match=r"saliency_dataset\.effects = False, now it is True"):
        make_dataset(
            replace(tiny_config, saliency_dataset=replace(tiny_config.saliency_dataset, effects=True)),
            out,
            out / "teacher.safetensors",
        )
    with pytest.raises(UserError, match="cannot take objects out of its world"):
        EffectsOfStates(None).look(SimpleNamespace(), np.zeros((1, 3, 4, 4), np.uint8))


def test_states_in_which_nothing_decides_are_not_used(effects_run):
    dataset = load_dataset(effects_run / "dataset")
    objects = replace(dataset.objects, effects=torch.where(dataset.objects.states == 3, 0.0, 1.0))
    used = with_effects(replace(dataset, objects=objects))
    assert torch.nonzero(used.largest == 0).flatten().tolist() == [3]


def test_jobs_of_before_there_were_these_settings_go_on(copied_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset", "distill")
    path = out / "dataset" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["saliency_dataset"]["effects"]
    path.write_text(json.dumps(manifest))
    make_dataset(tiny_config, out, out / "teacher.safetensors")
    assert load_dataset(out / "dataset").objects is None

    path = out / "distill" / "state.safetensors"
    tensors, values = load_state(path)
    for name in ("map", "map_rows", "effect_power", "scenery_interval"):
        del values["config"]["distill"][name]
    del tensors["answers"]
    save_state(path, tensors, values)
    distill(tiny_config, out, out / "teacher.safetensors")
    other = replace(tiny_config, distill=replace(tiny_config.distill, map="linear"))
    with pytest.raises(UserError, match=r"distill\.map = gradient, now it is linear"):
        distill(other, out, out / "teacher.safetensors")
