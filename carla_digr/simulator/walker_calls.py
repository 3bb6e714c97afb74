"""The calls of CARLA's RPC protocol that have walkers go, and that tell clients where they may."""

from __future__ import annotations

from carla_digr.simulator import navigation, walkers, wire
from carla_digr.simulator.entries import CallFailed, Entry
from carla_digr.simulator.episode import Episode, check_place
from carla_digr.simulator.rpc import rpc
from carla_digr.simulator.wire import Transform


@rpc
def apply_control_to_walker(episode: Episode, actor_id: int, control: wire.WalkerControl) -> None:
    """Have a walker go in a direction until the next call."""
    walkers.command(_walker(episode, actor_id), control)


@rpc
def set_walker_state(episode: Episode, actor_id: int, transform: Transform, speed: float) -> None:
    """Put a walker where the client has it that runs its controller."""
    check_place(transform)
    walkers.lead(episode, _walker(episode, actor_id), transform, speed)


@rpc
def set_actor_dead(episode: Episode, actor_id: int) -> None:
    """Stop a walker: the client gives up one that a vehicle has hit."""
    walkers.command(_walker(episode, actor_id), wire.WalkerControl())


def _walker(episode: Episode, actor_id: int) -> Entry:
    entry = episode.entry(actor_id)
    if not walkers.is_walker(entry):
        raise CallFailed(f"actor {actor_id} ({entry.description.id}) is no walker")
    return entry


@rpc
def request_file(episode: Episode, name: str) -> bytes:
    """The one file that get_required_files names."""
    if name != navigation.file_name(episode.world.road):
        raise CallFailed(f"this simulator has no file {name!r:.80}; get_map_data has the map")
    return navigation.mesh(episode.world.road)


@rpc
def get_required_files(episode: Episode, folder: str) -> list[str]:
    """Where walkers may go, for the folder "Nav"; nothing else has to be downloaded."""
    return [navigation.file_name(episode.world.road)] if folder == "Nav" else []


@rpc
def get_navigation_mesh(episode: Episode) -> bytes:
    """Where walkers may go."""
    return navigation.mesh(episode.world.road)
