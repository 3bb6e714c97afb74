"""Stage 2: the offline saliency dataset, the teacher's perturbation maps (eq. 3) over states of its own episodes.

On disk, under ``OUT/dataset``: ``manifest.json`` lists ``states.safetensors`` and the map shards with their SHA-256.
A shard follows from its states and the teacher alone, so a damaged or missing one is computed again, equal to the last
bit, and a killed job goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from carla_digr import checkpoint
from carla_digr.config import Config
from carla_digr.errors import UserError
from carla_digr.files import atomic_write, read_json, sha256_of
from carla_digr.policy import Policy, device_of, device_under, to_input
from carla_digr.saliency.gradient import FLAT
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.saliency.windows import STATES as TOGETHER
from carla_digr.tasks import make_task
from carla_digr.training import prepare_worker
from carla_digr.training.effects import EffectsOfStates, ObjectEffects
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import load_policy, states_of, varied_task
from carla_digr.training.state import check_same_job, only_job_in

if TYPE_CHECKING:
    from carla_digr.training.cluster import Cluster

STATES = "states.safetensors"
_OBJECTS = ("object_states", "object_masks", "object_effects")  # the fields of ObjectEffects


@dataclass(frozen=True)
class SaliencyDataset:
    """The dataset in memory, in the order of collection.

    Attributes:
        states: uint8 (N, C, H, W).
        maps: float16 (N, H, W), normalised to [0, 1].
        largest: float32 (N,), each raw map's maximum, the KL that normalising divided by; 0 for a map without saliency.
        importance: int8 (N, H, W) where the task knows what matters, else None; see ``metrics.score``.
        objects: what each object does to the teacher's decision, with ``saliency_dataset.effects``.
    """

    states: Tensor
    maps: Tensor
    largest: Tensor
    importance: Tensor | None
    objects: ObjectEffects | None = None

    def part(self, rows: Tensor) -> SaliencyDataset:
        """The states ``rows``, int64, and what belongs to them."""
        importance = None if self.importance is None else self.importance[rows]
        objects = None if self.objects is None else self.objects.of(rows)
        return SaliencyDataset(self.states[rows], self.maps[rows], self.largest[rows], importance, objects)


def make_dataset(
    config: Config, out: Path, teacher_path: Path, module: str | None = None, cluster: Cluster | None = None
) -> None:
    """Compute the dataset, or what is missing or damaged of it.

    Args:
        module: code of the teacher's own, see ``checkpoint.load``.
        cluster: whose nodes compute the shards, in place of ``workers``.

    Raises:
        UserError: the teacher is missing or of another task, or the directory holds another dataset.
    """
    policy, card = load_policy(teacher_path, make_task(config), module, config.device)
    with only_job_in(out / "dataset"):
        _make_dataset(config, out / "dataset", _Teacher(teacher_path, module), policy, card, cluster)


class _Teacher(NamedTuple):
    """Where the teacher is, for processes that load it themselves."""

    path: Path
    module: str | None


def _make_dataset(
    config: Config,
    directory: Path,
    teacher: _Teacher,
    policy: Policy,
    card: dict[str, Any],
    cluster: Cluster | None,
) -> None:
    settings = config.saliency_dataset
    manifest = _open_manifest(directory, config, card)
    _ensure_states(directory, manifest, config, policy)
    todo = [k for k in range(_shard_count(config)) if not _intact(directory, manifest["shards"].get(str(k)))]
    done = settings.maps - sum(len(_rows(config, k)) for k in todo)
    progress = Progress(total=settings.maps, initial=done, unit="map", desc="maps")
    computed = (
        _computed(config, directory, teacher, todo)
        if cluster is None
        else _computed_on(cluster, config, directory, policy, todo)
    )
    with progress, closing(computed) as shards:
        for k, entry in shards:
            manifest["shards"][str(k)] = entry
            _write_manifest(directory, manifest)
            progress.update(len(_rows(config, k)))
    print(f"{directory}: {settings.maps} maps in {_shard_count(config)} shards")


def load_dataset(directory: Path, teacher_sha256: str | None = None) -> SaliencyDataset:
    """Read and verify a whole dataset.

    Args:
        directory: ``OUT/dataset``.
        teacher_sha256: weights that the maps must be of.

    Raises:
        UserError: something is missing, damaged, or of another teacher.
    """
    remedy = "run make-dataset again"
    manifest = _read_manifest(directory)
    if manifest is None:
        raise UserError(f"There is no saliency dataset in {directory}; {remedy}.")
    if teacher_sha256 is not None and manifest["teacher_sha256"] != teacher_sha256:
        raise UserError(
            f"The saliency dataset in {directory} is of another teacher; {remedy} in a new --out directory."
        )
    settings = manifest["config"]["saliency_dataset"]
    count = -(-settings["maps"] // settings["shard_size"])
    for entry in [manifest["states"], *(manifest["shards"].get(str(k)) for k in range(count))]:
        if entry is None:
            raise UserError(f"The saliency dataset in {directory} is not complete; {remedy} to finish it.")
        if not _intact(directory, entry):
            raise UserError(f"{directory / entry['file']} is damaged or missing; {remedy} to restore it.")
    states = safetensors.torch.load_file(directory / STATES)
    shards = [safetensors.torch.load_file(directory / _shard_name(k)) for k in range(count)]
    return SaliencyDataset(
        states=states["states"],
        maps=torch.cat([shard["maps"] for shard in shards]),
        largest=torch.cat([shard["largest"] for shard in shards]),
        importance=states.get("importance"),
        objects=ObjectEffects(*(states[name] for name in _OBJECTS)) if _OBJECTS[0] in states else None,
    )


def _ensure_states(directory: Path, manifest: dict[str, Any], config: Config, policy: Policy) -> None:
    """Collect the states unless they are there; the seed makes them the same each time."""
    if _intact(directory, manifest["states"]):
        return
    settings = config.saliency_dataset
    seed = config.seed + 1_000_003  # the stages see different episodes
    task = varied_task(config)
    effects = EffectsOfStates(policy) if settings.effects else None
    look = None if effects is None else effects.look
    states, importance = states_of(
        task, policy, settings.environments, settings.maps, settings.state_interval, seed, look=look
    )
    tensors = {"states": torch.from_numpy(states)}
    if effects is not None:
        objects = effects.of_first(settings.maps)
        tensors |= zip(_OBJECTS, (objects.states, objects.masks, objects.effects), strict=True)
    if importance is not None:
        tensors["importance"] = torch.from_numpy(importance)
    with atomic_write(directory / STATES) as file:
        file.write(safetensors.torch.save(tensors))
    entry = {"file": STATES, "sha256": sha256_of(directory / STATES)}
    if manifest["states"] not in (None, entry):
        manifest["shards"] = {}  # other states, as another machine's arithmetic may give: other maps
    manifest["states"] = entry
    _write_manifest(directory, manifest)


def _computed(
    config: Config, directory: Path, teacher: _Teacher, todo: list[int]
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Number and manifest entry of each missing shard as it is finished."""
    workers = min(config.saliency_dataset.workers, len(todo))
    if workers <= 1:
        for k in todo:
            yield k, _make_shard(config, directory, teacher, k)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker)
    try:
        futures = {pool.submit(_make_shard, config, directory, teacher, k): k for k in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _computed_on(
    cluster: Cluster, config: Config, directory: Path, policy: Policy, todo: list[int]
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """The same on the nodes of a cluster, which need none of this machine's files."""
    states = safetensors.torch.load_file(directory / STATES)["states"]
    shared = cluster.share(policy)
    jobs = ((k, (config, shared, states[_rows(config, k)].clone())) for k in todo)
    with closing(cluster.each(_shard, jobs, device_of(config.device))) as shards:
        for k, data in shards:
            yield k, _write_shard(directory, k, data)


def _make_shard(config: Config, directory: Path, teacher: _Teacher, k: int) -> dict[str, Any]:
    policy, _ = checkpoint.load(teacher.path, config.task, teacher.module)
    policy.to(device_of(config.device))
    states = safetensors.torch.load_file(directory / STATES)["states"][_rows(config, k)]
    return _write_shard(directory, k, _shard(config, policy, states))


def _shard(config: Config, policy: Policy, states: Tensor) -> bytes:
    """The file of a shard: the maps of these states."""
    perturbation = Perturbation.from_settings(config.saliency_dataset)
    states = states.to(device_under(policy))
    raw = torch.cat([perturbation_maps(policy, to_input(some), perturbation) for some in states.split(TOGETHER)]).cpu()
    largest = raw.amax(dim=(1, 2))
    largest = torch.where(largest > FLAT, largest, torch.zeros_like(largest))
    maps = raw / torch.where(largest > 0, largest, torch.full_like(largest, torch.inf))[:, None, None]
    return safetensors.torch.save({"maps": maps.half(), "largest": largest})


def _write_shard(directory: Path, k: int, data: bytes) -> dict[str, Any]:
    """Its entry in the manifest."""
    path = directory / _shard_name(k)
    with atomic_write(path) as file:
        file.write(data)
    return {"file": path.name, "sha256": sha256_of(path)}


def _rows(config: Config, k: int) -> range:
    size = config.saliency_dataset.shard_size
    return range(k * size, min((k + 1) * size, config.saliency_dataset.maps))


def _shard_count(config: Config) -> int:
    return -(-config.saliency_dataset.maps // config.saliency_dataset.shard_size)


def _shard_name(k: int) -> str:
    return f"maps-{k:05d}.safetensors"


def _intact(directory: Path, entry: dict[str, Any] | None) -> bool:
    if entry is None or not (directory / entry["file"]).is_file():
        return False
    return sha256_of(directory / entry["file"]) == entry["sha256"]


def _open_manifest(directory: Path, config: Config, card: dict[str, Any]) -> dict[str, Any]:
    values = config.to_dict()
    sections = {key: values[key] for key in ("task", "seed", "environment", "saliency_dataset")}
    for key in ("workers", "threshold"):  # the maps are the same with any of them
        sections["saliency_dataset"].pop(key)
    manifest = _read_manifest(directory)
    if manifest is None:
        return {"teacher_sha256": card["weights_sha256"], "config": sections, "states": None, "shards": {}}
    path = directory / "manifest.json"
    check_same_job(path, manifest["config"], sections)
    if manifest["teacher_sha256"] != card["weights_sha256"]:
        raise UserError(f"{path} is of another teacher; use another --out directory or delete {directory}.")
    return manifest


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    path = directory / "manifest.json"
    try:
        manifest = read_json(path)
        if {"teacher_sha256", "config", "states", "shards"} <= manifest.keys() and _is_whole(manifest):
            return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    raise UserError(f"{path} is damaged; delete {directory} and run make-dataset again.")


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether its entries are of the files that a dataset has, for they may have been changed."""
    settings = manifest["config"]["saliency_dataset"]
    if not all(type(settings[key]) is int and 0 < settings[key] <= 2**31 for key in ("maps", "shard_size")):
        return False
    names = {STATES: manifest["states"]} | {_shard_name(int(k)): entry for k, entry in manifest["shards"].items()}
    return all(
        entry is None or (entry["file"] == name and isinstance(entry["sha256"], str)) for name, entry in names.items()
    )


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    with atomic_write(directory / "manifest.json") as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())
