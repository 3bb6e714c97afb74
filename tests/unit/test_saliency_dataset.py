"""Stage 2: shards that survive kills and damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from test_teacher import start, wait_for

from carla_digr import checkpoint
from carla_digr.errors import UserError
from carla_digr.policy import to_input
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.training.saliency_dataset import load_dataset, make_dataset


def files(out):
    return {path.name: path.read_bytes() for path in (out / "dataset").iterdir() if not path.name.endswith(".tmp")}


def test_the_maps_are_the_teachers_perturbation_maps_of_their_states(tiny_run, tiny_config):
    dataset = load_dataset(tiny_run / "dataset")
    assert dataset.states.shape == (44, 3, 64, 64) and dataset.maps.shape == (44, 64, 64)
    policy, _ = checkpoint.load(tiny_run / "teacher.safetensors")
    raw = perturbation_maps(policy, to_input(dataset.states[[0, 43]]), Perturbation(4.0, 3.0, stride=4))
    assert torch.allclose(dataset.maps[[0, 43]].float(), normalise(raw)[0], atol=1e-3)
    assert torch.allclose(dataset.largest[[0, 43]], raw.amax(dim=(1, 2)))
    assert dataset.importance is not None and dataset.importance.shape == (44, 64, 64)


@pytest.mark.slow
def test_a_killed_job_resumes_without_loss_or_duplicates_and_restores_a_truncated_shard(
    tmp_path, copied_run, tiny_yaml, tiny_run, tiny_config
):
    out = copied_run("teacher.safetensors", "teacher.json")
    manifest = out / "dataset" / "manifest.json"
    process = start("make-dataset", tiny_yaml, out)
    try:
        wait_for(lambda: manifest.exists() and len(json.loads(manifest.read_text())["shards"]) >= 2, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = json.loads(manifest.read_text())["shards"]
    assert len(kept) < 11
    truncated, whole = (out / "dataset" / kept[k]["file"] for k in ("0", "1"))
    truncated.write_bytes(truncated.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"damaged or missing|not complete"):
        load_dataset(out / "dataset")
    written = whole.stat().st_mtime_ns
    make_dataset(tiny_config, out, out / "teacher.safetensors")
    assert whole.stat().st_mtime_ns == written
    assert files(out) == files(tiny_run)


@pytest.mark.slow
def test_workers_make_the_same_dataset(copied_run, tiny_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json")
    settings = replace(tiny_config.saliency_dataset, workers=2)
    make_dataset(replace(tiny_config, saliency_dataset=settings), out, out / "teacher.safetensors")
    one, two = files(out), files(tiny_run)
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name != "manifest.json")
    manifests = [json.loads(item["manifest.json"]) for item in (one, two)]
    assert manifests[0] == manifests[1]  # as values: shards may finish in another order


@pytest.mark.parametrize("name", ["states.safetensors", "maps-00003.safetensors"])
def test_a_damaged_file_is_found_and_restored(copied_run, tiny_run, tiny_config, name):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    path = out / "dataset" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged or missing; run make-dataset again"):
        load_dataset(out / "dataset")
    make_dataset(tiny_config, out, out / "teacher.safetensors")
    assert files(out) == files(tiny_run)


def test_a_dataset_of_another_teacher_is_refused(copied_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    policy, card = checkpoint.load(out / "teacher.safetensors")
    with torch.no_grad():
        policy.trunk.bias += 0.1
    other = out / "other.safetensors"
    card = checkpoint.save(other, policy, card)
    with pytest.raises(UserError, match="of another teacher"):
        make_dataset(tiny_config, out, other)
    with pytest.raises(UserError, match="of another teacher"):
        load_dataset(out / "dataset", card["weights_sha256"])


def test_other_settings_do_not_mix_with_the_dataset(copied_run, tiny_config):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    other = replace(tiny_config, saliency_dataset=replace(tiny_config.saliency_dataset, radius=5.0))
    with pytest.raises(UserError, match=r"saliency_dataset\.radius = 4\.0, now it is 5\.0"):
        make_dataset(other, out, out / "teacher.safetensors")


def test_the_score_changes_the_maps_and_another_threshold_does_not(copied_run, tiny_config, tiny_run):
    out = copied_run("teacher.safetensors", "teacher.json", "dataset")
    settings = tiny_config.saliency_dataset
    make_dataset(
        replace(tiny_config, saliency_dataset=replace(settings, threshold=0.3)), out, out / "teacher.safetensors"
    )
    assert files(out) == files(tiny_run)
    by_logits = replace(tiny_config, saliency_dataset=replace(settings, score="logits", maps=4))
    shutil.rmtree(out / "dataset")
    make_dataset(by_logits, out, out / "teacher.safetensors")
    policy, _ = checkpoint.load(out / "teacher.safetensors")
    dataset = load_dataset(out / "dataset")
    raw = perturbation_maps(policy, to_input(dataset.states[:1]), Perturbation(4.0, 3.0, stride=4, score="logits"))
    assert torch.allclose(dataset.maps[0].float(), raw[0] / raw.max(), atol=1e-3)


def test_an_absent_dataset_and_a_damaged_manifest_are_named(tmp_path):
    with pytest.raises(UserError, match="There is no saliency dataset in"):
        load_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    "change",
    {
        "nested": lambda text: text[:-3] + ', "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "another file": lambda text: text.replace("maps-00001.safetensors", "../../../etc/passwd"),
        "a list": lambda text: "[]",
        "no size": lambda text: text.replace('"shard_size": 4', '"shard_size": 0'),
        "no number": lambda text: text.replace('"maps": 44', '"maps": "44"'),
        "a number for a file": lambda text: text.replace('"states.safetensors"', "7"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_manifest_that_was_changed_is_refused_in_a_sentence(copied_run, change):
    out = copied_run("dataset")
    path = out / "dataset" / "manifest.json"
    text = change[1](path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged; delete .* and run make-dataset again"):
        load_dataset(out / "dataset")
    path.unlink()
    os.mkfifo(path)  # which nobody writes to
    with pytest.raises(UserError, match="is damaged"):
        load_dataset(out / "dataset")
