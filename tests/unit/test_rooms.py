"""The saliency evaluation dataset: made once, kept, and checked."""

from __future__ import annotations

import numpy as np
import pytest

from carla_digr.errors import UserError
from carla_digr.evaluation.rooms import evaluation_rooms
from carla_digr.tasks.red_fetch_green import RedFetchGreenVecEnv, importance_of, pictures_of


def test_is_made_once_and_equal_to_the_environments_own_states(tmp_path):
    cells = evaluation_rooms(tmp_path, 50, 7)
    written = (tmp_path / "rooms.npz").stat().st_mtime_ns
    assert np.array_equal(evaluation_rooms(tmp_path, 50, 7), cells)
    assert (tmp_path / "rooms.npz").stat().st_mtime_ns == written
    env = RedFetchGreenVecEnv(50, 7)
    assert np.array_equal(pictures_of(cells), env.reset())
    importance = importance_of(cells)
    assert np.array_equal(importance, env.importance())
    assert ((importance == 1).sum(axis=(1, 2)) == 2 * 64).all()  # two tiles
    assert ((importance == 0).sum(axis=(1, 2)) == 32 * 64).all()


def test_another_seed_or_count_makes_another(tmp_path):
    first = evaluation_rooms(tmp_path, 20, 7)
    assert not np.array_equal(evaluation_rooms(tmp_path, 20, 8), first)
    assert evaluation_rooms(tmp_path, 30, 8).shape == (30, 8, 8)
    assert np.array_equal(evaluation_rooms(tmp_path, 20, 7), first)


@pytest.mark.parametrize("name", ["rooms.npz", "rooms.json"])
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    evaluation_rooms(tmp_path, 20, 7)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rooms\.npz is damaged; delete .*rooms\.json to make it again\.$"):
        evaluation_rooms(tmp_path, 20, 7)
    (tmp_path / "rooms.json").unlink()
    assert evaluation_rooms(tmp_path, 20, 7).shape == (20, 8, 8)
