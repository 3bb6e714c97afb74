"""The saliency evaluation dataset of Red-Fetch-Green (section 4.4): rooms whose important pixels are known.

On disk ``rooms.npz`` (compressed, no pickle) holds tile numbers, from which pictures and importance follow, and
``rooms.json`` says how they were made. The same seed gives the same rooms.
"""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.files import atomic_write, read_json, sha256_of
from carla_digr.tasks.red_fetch_green import SIZE, RedFetchGreenVecEnv

GENERATOR = "first states of RedFetchGreenVecEnv(count, seed): agent, direction and balls uniform over the room"


def evaluation_rooms(directory: Path, count: int, seed: int) -> NDArray[np.uint8]:
    """The dataset; made if it is missing or was made for another count or seed.

    Returns:
        Tile numbers uint8 (count, 8, 8) for ``pictures_of`` and ``importance_of``.

    Raises:
        UserError: the files are damaged.
    """
    data, manifest_path = directory / "rooms.npz", directory / "rooms.json"
    wanted: dict[str, str | int] = {"generator": GENERATOR, "seed": seed, "count": count}
    if not manifest_path.exists():
        return _make(data, manifest_path, wanted)
    try:
        manifest = read_json(manifest_path)
        digest = manifest.pop("sha256")
        if manifest != wanted:
            return _make(data, manifest_path, wanted)
        if sha256_of(data) == digest:
            with np.load(data, allow_pickle=False) as file:
                return file["cells"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile):
        pass
    raise UserError(f"The saliency evaluation dataset {data} is damaged; delete {manifest_path} to make it again.")


def _make(data: Path, manifest_path: Path, wanted: dict[str, str | int]) -> NDArray[np.uint8]:
    env = RedFetchGreenVecEnv(int(wanted["count"]), int(wanted["seed"]))
    env.reset()
    cells = env.cells().astype(np.uint8)
    assert cells.shape[1:] == (SIZE, SIZE)
    manifest_path.unlink(missing_ok=True)  # a kill between the two files leaves none of another dataset
    with atomic_write(data) as file:
        np.savez_compressed(file, cells=cells)
    with atomic_write(manifest_path) as file:
        file.write((json.dumps({**wanted, "sha256": sha256_of(data)}, indent=1) + "\n").encode())
    return cells
