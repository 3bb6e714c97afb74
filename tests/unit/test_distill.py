"""Stage 3: DIGR's losses and the job around them."""

from __future__ import annotations

import copy
import math
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_effects import run_until
from test_teacher import start, wait_for

from carla_digr import checkpoint
from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.config import DistillConfig
from carla_digr.distributions import kl_divergence
from carla_digr.errors import UserError
from carla_digr.tasks import parse_config
from carla_digr.training import distill as stage
from carla_digr.training.distill import distill, make_student, ramped
from carla_digr.training.gradient_surgery import project_conflicting
from carla_digr.training.rollout import policy_logits
from carla_digr.training.saliency_dataset import load_dataset, make_dataset
from carla_digr.training.state_ring import StateRing
from carla_digr.training.supervision import annotated, held_out_figures, saliency_loss, split

G = torch.tensor([[[[1.0, 2.0], [3.0, 2.0]], [[0.5, 4.0], [0.0, 1.0]]]])  # (1, 2, 2, 2)
PENALISED = torch.tensor([[[True, False], [False, True]]])  # the maximum over channels is [[1, 4], [3, 2]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("paper", (1 + 2 + 0.5 + 1) / 4 / 8),
        ("share", 3 / 10),
        ("log_ratio", math.log((3 + 0.1 * 7) / 7)),
        ("coverage", math.log(3 / 2 + 0.1 * 3.5) - (math.log(4 + 0.07) + math.log(3 + 0.07)) / 2),
    ],
)
def test_losses_equal_their_formulas(kind, expected):
    assert float(saliency_loss(kind, G, PENALISED, 0.1)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["paper", "share", "log_ratio", "coverage"])
def test_losses_do_not_depend_on_the_scale_and_fall_with_the_penalised_mass(kind):
    loss = saliency_loss(kind, G, PENALISED, 0.1)
    assert float(saliency_loss(kind, 1e-12 * G, PENALISED, 0.1)) == pytest.approx(float(loss), rel=1e-5)
    less = torch.where(PENALISED[:, None], 0.5 * G, G)
    assert saliency_loss(kind, less, PENALISED, 0.1) < loss


def test_coverage_prefers_two_objects_to_one_of_the_same_mass():
    both, one = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    both[0, 0, 0, 1], both[0, 0, 1, 0] = 2, 2
    one[0, 0, 0, 1] = 4
    assert saliency_loss("coverage", both, PENALISED, 0.1) < saliency_loss("coverage", one, PENALISED, 0.1)
    assert saliency_loss("share", both, PENALISED, 0.1) == saliency_loss("share", one, PENALISED, 0.1)


def test_pcgrad_removes_the_conflict_and_leaves_agreement_alone():
    first, second = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    (combined,) = project_conflicting(first, second)
    # first without its part along second, (0.5, 0.5), plus second without its part along first, (0, 1)
    assert torch.allclose(combined, torch.tensor([0.5, 1.5]))
    for original in (first[0], second[0]):
        assert (combined * original).sum() >= 0
    assert torch.equal(project_conflicting(first, [torch.tensor([1.0, 1.0])])[0], torch.tensor([2.0, 1.0]))


def test_ramps_are_geometric_and_linear_from_zero():
    assert ramped((0.01, 1.0), 0.5) == pytest.approx(0.1)
    assert ramped((0.0, 1.0), 0.25) == 0.25
    assert (ramped((0.02, 3.0), 0.0), ramped((0.02, 3.0), 1.0)) == pytest.approx((0.02, 3.0))


def test_the_ring_gives_the_newest_states_and_the_same_draws_after_a_kill(tmp_path):
    def state(k):
        return np.full((1, 2, 3), k, np.uint8)[None].repeat(2, axis=0)

    ring = StateRing(tmp_path / "buffer.bin", (1, 2, 3), size=6, slack=4, resuming=False, actions=2)
    for k in range(8):
        ring.add(state(k))

    def sample(buffer, seed, count):
        return buffer.states(buffer.draw(np.random.default_rng(seed), count))

    kept = set(np.unique(sample(ring, 0, 200)))
    assert kept == {5, 6, 7}
    saved, expected = ring.written, sample(ring, 1, 50)
    ring.add(state(100))
    ring.add(state(101))  # after the saved state, then killed
    again = StateRing(tmp_path / "buffer.bin", (1, 2, 3), size=6, slack=4, resuming=True, actions=2)
    again.written = saved
    assert np.array_equal(sample(again, 1, 50), expected)
    with pytest.raises(UserError, match=r"buffer\.bin is damaged"):
        StateRing(tmp_path / "buffer.bin", (1, 2, 3), size=7, slack=4, resuming=True, actions=2)


def test_hard_states_are_drawn_in_proportion_to_their_hardness_and_the_rest_evenly(tmp_path):
    ring = StateRing(tmp_path / "buffer.bin", (1, 2, 3), size=4, slack=3, resuming=False, actions=2)
    for k, hardness in enumerate([9.0, 9.0, 9.0, 0.5, 0.0, 1.5, 0.5]):  # the first three are forgotten
        ring.add(np.full((1, 1, 2, 3), k, np.uint8), np.array([hardness], np.float32))
    drawn = ring.states(ring.draw(np.random.default_rng(0), 8000, hard=0.5))[:, 0, 0, 0]
    hard, even = (np.bincount(half, minlength=7)[3:] / 4000 for half in (drawn[:4000], drawn[4000:]))
    assert hard == pytest.approx([0.2, 0, 0.6, 0.2], abs=0.03)
    assert even == pytest.approx([0.25] * 4, abs=0.03)


def test_the_split_keeps_later_states_for_validation(tiny_run):
    dataset = load_dataset(tiny_run / "dataset")
    largest = dataset.largest.clone()
    largest[5] = 0.0
    train, held_out = split(replace(dataset, largest=largest), 0.25)
    assert len(train.states) == 32 and len(held_out.states) == 11
    assert torch.equal(held_out.states, dataset.states[-11:])
    assert torch.equal(train.maps, torch.cat([dataset.maps[:5], dataset.maps[6:33]]))


def test_annotation_keeps_the_known_objects_alone(tiny_run):
    dataset = load_dataset(tiny_run / "dataset")
    masks = annotated(dataset, "red_fetch_green")
    assert torch.equal(masks.maps > 0.1, dataset.importance == 1)
    assert set((masks.maps > 0.1).sum(dim=(1, 2)).tolist()) == {128}  # the tiles of agent and target
    with pytest.raises(UserError, match="driving does not know which pixels matter"):
        annotated(replace(dataset, importance=None), "driving")


def test_annotation_may_have_a_margin_and_be_confined_to_the_perturbation_maps(tiny_run):
    dataset = load_dataset(tiny_run / "dataset")
    plain, wide = (annotated(dataset, "red_fetch_green", margin).maps > 0 for margin in (0, 2))
    assert (wide | ~plain).all() and plain.sum() < wide.sum()
    both = annotated(dataset, "red_fetch_green", 2, above=0.3)
    assert torch.equal(both.maps > 0, wide & (dataset.maps > 0.3))
    assert torch.equal(both.largest > 0, both.maps.flatten(1).any(dim=1))  # states where nothing is left are not used


@pytest.mark.slow
def test_a_killed_distillation_resumes_to_the_same_student_bit_for_bit(copied_run, tiny_yaml, tiny_run):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    process = start("distill", tiny_yaml, out)
    try:
        wait_for((out / "distill" / "state.safetensors").exists, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("distill", tiny_yaml, out).wait(timeout=120) == 0
    assert (out / "student.safetensors").read_bytes() == (tiny_run / "student.safetensors").read_bytes()
    assert (out / "distill" / "curve.csv").read_text() == (tiny_run / "distill" / "curve.csv").read_text()


def test_the_student_is_better_on_held_out_maps_than_where_it_began(tiny_run, tiny_config):
    teacher, _ = checkpoint.load(tiny_run / "teacher.safetensors")
    student, card = checkpoint.load(tiny_run / "student.safetensors")
    _, held_out = split(load_dataset(tiny_run / "dataset"), tiny_config.distill.held_out)
    before = held_out_figures(make_student(tiny_config, teacher), teacher, held_out, 0.1)
    after = held_out_figures(student, teacher, held_out, 0.1)
    assert after["score"] < before["score"] and after["share"] < 0.95 * before["share"]
    assert card["metrics"]["held_out_share"] == pytest.approx(after["share"], rel=1e-5)
    assert card["teacher_sha256"] == checkpoint.load(tiny_run / "teacher.safetensors")[1]["weights_sha256"]


@pytest.mark.parametrize(
    "settings",
    [
        DistillConfig(start="random", activation="relu", loss="paper", l1_weight=(0.0, 0.0), optimiser="rmsprop"),
        DistillConfig(loss="share", pcgrad=True, warm_up=2, l1_states="all"),
        DistillConfig(loss="none", l1_weight=(0.0, 0.0)),
    ],
    ids=["paper", "pcgrad", "distillation-only"],
)
def test_other_settings_run_and_leave_a_student(copied_run, tiny_config, settings):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    short = replace(settings, iterations=5, environments=2, buffer_states=50, saliency_batch=4, buffer_batch=4)
    distill(replace(tiny_config, distill=short), out, out / "teacher.safetensors")
    student, card = checkpoint.load(out / "student.safetensors", "red_fetch_green")
    assert student.config.activation == settings.activation and card["role"] == "student"


def test_a_lost_buffer_is_named(copied_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset", "distill")
    (out / "distill" / "buffer.bin").unlink()
    with pytest.raises(UserError, match=r"buffer\.bin is damaged; delete"):
        distill(tiny_config, out, out / "teacher.safetensors")


def test_another_configuration_does_not_continue(copied_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset", "distill")
    other = replace(tiny_config, distill=replace(tiny_config.distill, loss="share"))
    with pytest.raises(UserError, match=r"distill\.loss = coverage, now it is share"):
        distill(other, out, out / "teacher.safetensors")
    shutil.rmtree(out / "dataset")
    with pytest.raises(UserError, match="There is no saliency dataset"):
        distill(tiny_config, out, out / "teacher.safetensors")


@pytest.fixture(scope="module")
def driving_run(tmp_path_factory):
    """A configuration of the driving task whose student looks at other sceneries, and a directory to distil in."""
    config = parse_config(
        {
            "task": "driving",
            "environment": {"actions": "lane", "random_scenery": 0.5},
            "saliency_dataset": {"maps": 12, "stride": 32, "environments": 2, "workers": 1, "state_interval": 1},
            "distill": {
                "loss": "none",
                "l1_weight": [0.0, 0.0],
                "iterations": 6,
                "environments": 4,
                "buffer_states": 100,
                "saliency_batch": 2,
                "buffer_batch": 6,
                "hard_states": 0.5,
                "scenery_interval": 2,
                "checkpoint_interval": 3,
            },
        },
        "driving",
    )
    out = tmp_path_factory.mktemp("driving")
    for suffix in (".safetensors", ".json"):
        shutil.copy(WEIGHTS_DIRECTORY / f"driving_calm_teacher{suffix}", out / f"teacher{suffix}")
    make_dataset(config, out, out / "teacher.safetensors")
    return config, out


def test_what_the_teacher_says_to_a_picture_is_asked_of_the_student_in_another_scenery(driving_run):
    config, out = driving_run
    teacher, card = checkpoint.load(out / "teacher.safetensors")
    config = replace(config, distill=replace(config.distill, buffer_states=4, hard_states=0.0))
    job = stage._Distillation(config, out, teacher, card, load_dataset(out / "dataset"))
    try:
        assert np.isnan(job.buffer.answers).all()
        job._look_elsewhere()  # the last four states are these
        shown = job.buffer.states((job.buffer.written - 4 + np.arange(4)) % job.buffer.slots)
        assert (shown != job.observations).any(axis=(1, 2, 3)).all()
        asked = policy_logits(teacher, job.observations)
        divergence = kl_divergence(asked, policy_logits(job.student, shown))
        assert kl_divergence(policy_logits(teacher, shown), asked).max() > 1e-3  # the teacher's own answer is another
        rng = copy.deepcopy(job.rng)
        rows = torch.from_numpy(rng.integers(len(job.train_set.states), size=2))
        slots = job.buffer.draw(rng, 6)
        job._drive, job._look_elsewhere = lambda steps: None, lambda: None
        before = kl_divergence(*(policy_logits(p, job.train_set.states[rows].numpy()) for p in (teacher, job.student)))
        at = (slots - job.buffer.written) % job.buffer.slots - (job.buffer.slots - 4)
        expected = torch.cat([before, divergence[torch.from_numpy(at)]]).mean()
        assert job._iterate()["loss_kl"] == pytest.approx(float(expected), rel=1e-4)
    finally:
        job.env.close()
        shutil.rmtree(out / "distill")


def test_a_distillation_that_looks_at_other_sceneries_resumes_to_the_same_student_bit_for_bit(tmp_path, driving_run):
    config, source = driving_run
    students = []
    for name, parts in (("whole", (6,)), ("parts", (5, 6))):
        shutil.copytree(source, tmp_path / name)
        for iterations in parts:
            run_until(iterations, config, tmp_path / name)
        students.append((tmp_path / name / "student.safetensors").read_bytes())
    assert students[0] == students[1]


def test_a_task_without_other_sceneries_is_refused(copied_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    wanting = replace(tiny_config, distill=replace(tiny_config.distill, scenery_interval=1))
    with pytest.raises(UserError, match=r"cannot show another scenery; leave distill\.scenery_interval out"):
        distill(wanting, out, out / "teacher.safetensors")
