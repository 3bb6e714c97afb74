"""The trust meter: a figure that tells right maps from wrong ones, and a process that nothing waits for."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import live_support
import numpy as np
import pytest
import torch

from carla_digr import checkpoint
from carla_digr.checkpoint import WEIGHTS_DIRECTORY
from carla_digr.driving.control import commands_of
from carla_digr.explainer import Explainer
from carla_digr.live.trust import BATCH, LOW, SHARE, TrustMeter, agreement
from carla_digr.policy import TorchPolicy
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.tasks.driving.drive import InProcessDrive

STUDENT = WEIGHTS_DIRECTORY / "driving_student.safetensors"
NARROW = f"""
from torch import nn


class Narrow(nn.Sequential):
    def forward(self, states):
        assert len(states) <= {BATCH}
        return super().forward(states)


def build():
    return Narrow(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
"""


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    """Where others keep all cores busy, a process that gives way would not come to its answer."""
    monkeypatch.setattr("carla_digr.live.trust.SHARE", 1.0)


@pytest.fixture
def meter():
    meters = []

    def make(*arguments):
        meters.append(TrustMeter(*arguments))
        return meters[-1]

    yield make
    for made in meters:
        made.close()


def wait_for(meter):
    """What is found next."""
    found = []
    live_support.until(
        lambda: bool(found) or bool(meter.problem), lambda: (time.sleep(0.02), found.extend(judged(meter)))
    )
    return found[0] if found else None


def judged(meter):
    return [found for found in [meter.judged()] if found is not None]


@pytest.mark.parametrize("seed", range(3))
def test_the_agreement_is_that_of_ranks(seed):
    rng = np.random.default_rng(seed)
    first = rng.random((128, 128), np.float32)
    assert agreement(first, first) == pytest.approx(1.0)
    assert agreement(first, 3 * first + 1) == pytest.approx(1.0)
    assert agreement(first, -first) == pytest.approx(-1.0)
    assert abs(agreement(first, rng.random((128, 128), np.float32))) < 0.3
    assert np.isnan(agreement(first, np.zeros_like(first)))


def test_the_process_finds_the_agreement_with_the_perturbation_map_and_names_its_frame(meter):
    explainer = Explainer.from_checkpoint(STUDENT, method="linear")
    drive = InProcessDrive()
    frame = drive.reset(5)
    commands = commands_of(explainer.card)
    assert commands is not None
    for _ in range(20):
        frame = drive.step(commands[explainer.decide(frame.image).action])
    decision = explainer.decide(frame.image)
    live = explainer.explain(decision).map
    trust = meter(str(STUDENT))
    trust.offer("this frame", decision.state.numpy(), live)
    found = wait_for(trust)
    policy, card = checkpoint.load(STUDENT)
    settings = Perturbation.from_settings(card["config"]["saliency_dataset"])
    slow = perturbation_maps(policy, decision.state, replace(settings, batch=BATCH))  # another rounds differently
    assert found.frame == "this frame"
    assert found.agreement == pytest.approx(agreement(live, slow[0].numpy()), abs=1e-4)
    assert found.agreement > LOW
    assert trust.judged() is None


def test_it_runs_where_nobody_else_wants_to_and_ends_with_the_meter(meter, monkeypatch):
    monkeypatch.setattr("carla_digr.live.trust.SHARE", SHARE)
    trust = meter(str(STUDENT))
    trust.offer(0, np.zeros((1, 3, 128, 128), np.float32), np.eye(128, dtype=np.float32))
    live_support.until(lambda: trust._process is not None)
    process = trust._process
    live_support.until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    trust.close()
    assert process.wait(60) == -signal.SIGKILL


def test_a_wrong_map_is_low(meter):
    torch.manual_seed(0)
    explainer = Explainer.from_checkpoint(STUDENT, method="linear")
    drive = InProcessDrive()
    decision = explainer.decide(drive.reset(5).image)
    live = explainer.explain(decision).map
    trust = meter(str(STUDENT))
    trust.offer(1, decision.state.numpy(), live[:, ::-1].copy())
    assert wait_for(trust).agreement < LOW


def test_offers_never_wait_and_the_newest_is_taken(meter, weights):
    trust = meter(str(weights))
    state, live = np.random.default_rng(0).random((1, 3, 128, 128), np.float32), np.eye(128, dtype=np.float32)
    trust.offer(0, state, live)
    assert wait_for(trust).frame == 0
    start = time.monotonic()
    for number in range(1, 1000):
        trust.offer(number, state, live)
    assert time.monotonic() - start < 2.0
    assert wait_for(trust).frame == 999


def test_no_pass_is_larger_than_what_leaves_the_caches_to_those_that_drive(meter, tmp_path, monkeypatch):
    (tmp_path / "narrow_network.py").write_text(NARROW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    from narrow_network import build

    torch.manual_seed(0)
    policy = TorchPolicy(build(), (3, 32, 32), 4)
    card = {"role": "imported", "action_names": list("abcd"), "config": {"saliency_dataset": {"stride": 2}}}
    network = {"kind": "module", "factory": "narrow_network:build"}
    checkpoint.save(tmp_path / "narrow.safetensors", policy, {**card, "network": network})
    trust = meter(str(tmp_path / "narrow.safetensors"), "narrow_network:build")
    rng = np.random.default_rng(0)
    trust.offer(0, rng.random((1, 3, 32, 32), np.float32), rng.random((32, 32), np.float32))
    assert wait_for(trust) is not None, trust.problem


def test_weights_that_cannot_be_read_end_in_a_sentence_and_not_in_the_drive(meter, tmp_path):
    trust = meter(str(tmp_path / "none.safetensors"))
    trust.offer(0, np.zeros((1, 3, 128, 128), np.float32), np.eye(128, dtype=np.float32))
    assert wait_for(trust) is None
    assert trust.problem == "The process that makes perturbation maps has ended: the maps are not compared."
