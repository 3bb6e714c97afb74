"""What a cluster does for the stages, without one: jobs travel as bytes, and come back in any order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from ray import cloudpickle
from test_saliency_dataset import files

from carla_digr import checkpoint
from carla_digr.errors import UserError
from carla_digr.evaluation.evaluate import _contestants, _Parts, _performance
from carla_digr.tasks import make_task
from carla_digr.training.cluster import Cluster
from carla_digr.training.saliency_dataset import make_dataset


class Elsewhere:
    """Takes the place of training.cluster.Cluster."""

    def __init__(self) -> None:
        self.done = 0

    def share(self, value: Any) -> Any:
        return value

    def each(
        self, work: Callable[..., Any], jobs: Iterable[tuple[Any, tuple[Any, ...]]], device: torch.device
    ) -> Generator[tuple[Any, Any], None, None]:
        for key, sent in reversed([(key, cloudpickle.dumps((work, arguments))) for key, arguments in jobs]):
            there, arguments = cloudpickle.loads(sent)
            self.done += 1
            yield key, there(*arguments)


def test_shards_that_others_compute_are_the_same(copied_run, tiny_run, tiny_config):
    out, cluster = copied_run("teacher.safetensors", "teacher.json"), Elsewhere()
    make_dataset(tiny_config, out, out / "teacher.safetensors", cluster=cluster)
    one, two = files(out), files(tiny_run)
    assert cluster.done == 11 and one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name != "manifest.json")


def test_episodes_that_others_drive_are_the_same_and_are_kept(tmp_path, tiny_run, tiny_config):
    task = make_task(tiny_config)
    teacher, card = checkpoint.load(tiny_run / "teacher.safetensors")

    def measures() -> dict[str, Callable[[], Any]]:
        everybody = _contestants(tiny_config, task, teacher, teacher)
        return {name: partial(_performance, tiny_config, task, act, name) for name, act in everybody.items()}

    there, cluster = _Parts(tmp_path / "parts.json", tiny_config, card), Elsewhere()
    there.cluster = cluster
    found = there.all(measures())
    here = _Parts(tmp_path / "others.json", tiny_config, card)
    assert found == here.all(measures())
    assert cluster.done == len(found) > 4
    again = _Parts(tmp_path / "parts.json", tiny_config, card)
    assert again.finished == found


@pytest.mark.parametrize(
    "where, sentence",
    [
        ("here", "must be given as auto or as host:port, not 'here'"),
        ("ray://here:10001", "must be given as auto or as host:port"),
        ("127.0.0.1:1", r"No Ray head answers on 127\.0\.0\.1:1, where a cluster was to be; start one"),
    ],
)
def test_a_cluster_that_is_none_is_told_in_one_sentence(where, sentence):
    with pytest.raises(UserError, match=sentence), Cluster(where):
        pass
