"""The calls of CARLA's RPC protocol that record, retell and replay; files in one directory of the server."""

from __future__ import annotations

from carla_digr.simulator import playback, recording, retelling, wire
from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.episode import Episode, check_place
from carla_digr.simulator.playback import Playback
from carla_digr.simulator.road import MAP_NAME
from carla_digr.simulator.rpc import rpc
from carla_digr.simulator.wire import Transform

SLOWEST, FASTEST = 0.01, 100.0  # of a replay


@rpc
def start_recorder(episode: Episode, name: str, additional_data: bool) -> str:
    """Record from the present frame on; the path of the file, which is there when the recording is stopped."""
    writer = episode.tape.start(name, recording.header(MAP_NAME), episode.world.elapsed)
    playback.record(episode)
    return str(writer.path.absolute())


@rpc
def stop_recorder(episode: Episode) -> None:
    """End the recording."""
    episode.tape.stop()


@rpc
def show_recorder_file_info(episode: Episode, name: str, show_all: bool) -> str:
    """What happened in a recording."""
    return retelling.info(*recording.read(episode.tape.path(name)), show_all)


@rpc
def show_recorder_collisions(episode: Episode, name: str, first: int, second: int) -> str:
    """Who touched whom; the types are characters as numbers."""
    types = (chr(code) if 0 < code < 128 else "?" for code in (first, second))
    return retelling.collisions(*recording.read(episode.tape.path(name)), *types)


@rpc
def show_recorder_actors_blocked(episode: Episode, name: str, seconds: float, centimetres: float) -> str:
    """Who stood."""
    return retelling.blocked(*recording.read(episode.tape.path(name)), seconds, centimetres)


@rpc
def replay_file(
    episode: Episode,
    name: str,
    start: float,
    duration: float,
    follow: wire.U32,
    sensors: bool,
    offset: Transform,
) -> str:
    """Show a recording again, from a second on (negative: from its end), for some seconds (0: to its end)."""
    check_place(offset)
    path = episode.tape.path(name)
    header, frames = recording.read(path)
    if header.map != MAP_NAME:
        raise CallFailed(f"{name} was recorded on another map, {header.map:.80}")
    last = 0.0
    for frame in frames:
        last = frame.stamp
    start = min(max(start if start >= 0.0 else last + start, 0.0), last)
    end = min(start + duration, last) if duration > 0.0 else last
    _, frames = recording.read(path)
    playback.stop(episode, keep=True)
    shown = Playback(frames, start, end, follow, offset, sensors)
    try:
        shown.begin(episode)
    except CallFailed:
        shown.stop(episode, keep=False)
        raise
    episode.tape.playback = shown
    return f"Replaying {path.absolute()} from {start:g} to {end:g} seconds of {last:g}\n"


@rpc
def stop_replayer(episode: Episode, keep_actors: bool) -> None:
    """End the replay."""
    playback.stop(episode, keep_actors)


@rpc
def set_replayer_time_factor(episode: Episode, factor: float) -> None:
    """How fast the present and all later replays are."""
    if not SLOWEST <= factor <= FASTEST:
        raise CallFailed(f"the time factor must be between {SLOWEST} and {FASTEST}, not {factor}")
    episode.tape.time_factor = factor


@rpc
def set_replayer_ignore_hero(episode: Episode, ignore: bool) -> None:
    """Whether later replays leave vehicles alone whose role_name is hero."""
    episode.tape.ignore_hero = ignore


@rpc
def set_replayer_ignore_spectator(episode: Episode, ignore: bool) -> None:
    """Whether the spectator stays where it is though a replay follows an actor."""
    episode.tape.ignore_spectator = ignore
