"""Recorder and replayer at work in an episode: frames to a file, and frames of a file shown again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np

from carla_digr.simulator import blueprints, entries, wire
from carla_digr.simulator.entries import CallFailed, Entry
from carla_digr.simulator.episode import Episode, mounted
from carla_digr.simulator.recording import MOTION, STEPS, Contact, Frame, Recorded, motions, steps
from carla_digr.simulator.road import project_to
from carla_digr.simulator.wire import Rotation, Transform, Vector3D

log = logging.getLogger(__name__)

SAME = 1e-4  # s within which the time of a replay is that of a recorded frame
_COLUMNS = [name for name in MOTION.names or () if name != "id"]
NOT_REPLAYED = ("spectator", blueprints.HIGHWAY_TRAFFIC, blueprints.WALKER_CONTROLLER)


def record(episode: Episode) -> None:
    """Add the present frame to the recording under way, if there is one."""
    tape = episode.tape
    if (writer := tape.writer) is None:
        return
    world, there = episode.world, set(episode.actors)
    vehicles = np.zeros(len(world.vehicles), MOTION)
    for name in MOTION.names or ():
        vehicles[name] = world.vehicles[name]
    standing = [e for e in episode.actors.values() if e.description.id in blueprints.FIGURES]
    figures = np.zeros(len(standing), STEPS)
    for row, entry in zip(figures, standing, strict=True):
        place = episode.place(entry)
        row["id"], row["yaw"], row["vx"], row["vy"] = entry.id, place.rotation.yaw, entry.velocity.x, entry.velocity.y
        row["x"], row["y"], row["z"] = place.location
    frame = Frame(
        world.elapsed - writer.began,
        [_recorded(episode, episode.actors[i]) for i in sorted(there - writer.known)],
        sorted(writer.known - there),
        vehicles.tobytes(),
        figures.tobytes(),
        [Contact(c.id, c.other, c.other_name) for c in world.collisions],
        None if episode.weather == writer.weather else episode.weather,
    )
    writer.known, writer.weather = there, episode.weather
    tape.add(frame)


def _recorded(episode: Episode, entry: Entry) -> Recorded:
    place = entry.transform if entry.kind < 0 else episode.place(entry)
    values = [a._replace(value=entry.attributes.get(a.id, a.value)) for a in entry.description.attributes]
    return Recorded(entry.id, entry.description.id, entry.parent, values, place)


class Playback:
    """A recording that is shown again.

    Args:
        frames: of it.
        start: its second to begin with.
        end: and to end with.
        follow: id in the recording of the actor that the spectator follows, 0 for none.
        offset: of the spectator from it.
        sensors: whether sensors are made anew too.
    """

    def __init__(
        self, frames: Iterator[Frame], start: float, end: float, follow: int, offset: Transform, sensors: bool
    ):
        self._frames, self._at, self._end = frames, start, end
        self._follow, self._offset, self._sensors = follow, offset, sensors
        self._actors: dict[int, int] = {}
        """Ids of the recording and here."""
        self._made: list[int] = []
        self._last: Frame | None = None
        self._next: Frame | None = next(frames, None)

    def begin(self, episode: Episode) -> None:
        """Show the first frame."""
        self._show(episode)

    def go_on(self, episode: Episode) -> bool:
        """Show the next frame, that of a frame's time later; False when it was the last one."""
        self._at += episode.delta * episode.tape.time_factor
        self._show(episode)
        return self._next is not None and self._at < self._end - SAME

    def stop(self, episode: Episode, keep: bool) -> None:
        """Leave the actors to themselves, vehicles braking, or remove those that the replay has made."""
        for here in self._actors.values():
            entry = episode.actors.get(here)
            if entry is None:
                continue
            entry.replayed = False
            if entry.kind >= 0:
                episode.world.set_control(here, 0.0, 0.0, 1.0)
            entry.walk, entry.moved = wire.WalkerControl(), False
        for here in self._made:
            if not keep and here in episode.actors:
                episode.remove(episode.actors[here])

    def _show(self, episode: Episode) -> None:
        while self._next is not None and (self._last is None or self._next.stamp <= self._at + SAME):
            self._last, self._next = self._next, next(self._frames, None)
            self._come_and_go(episode, self._last)
        if self._last is None:
            return
        share = 0.0
        if self._next is not None and self._at > self._last.stamp + SAME:
            share = (self._at - self._last.stamp) / (self._next.stamp - self._last.stamp)
        self._drive(episode, share)
        self._walk(episode, share)
        followed = episode.actors.get(self._actors.get(self._follow, 0))
        if followed is not None and not episode.tape.ignore_spectator:
            episode.spectator.transform = mounted(episode.place(followed), self._offset)

    def _come_and_go(self, episode: Episode, frame: Frame) -> None:
        for recorded in frame.came:
            self._come(episode, recorded)
        for gone in frame.went:
            here = self._actors.pop(gone, 0)
            if here in self._made and here in episode.actors:
                episode.remove(episode.actors[here])

    def _come(self, episode: Episode, recorded: Recorded) -> None:
        """Find the actor among those that are there, else make it."""
        hero = any(a.id == "role_name" and a.value == "hero" for a in recorded.attributes)
        if recorded.type in NOT_REPLAYED or (hero and episode.tape.ignore_hero):
            return
        moves = recorded.type in blueprints.KIND_INDEX or recorded.type in blueprints.FIGURES
        if not moves and not self._sensors:
            return
        entry = episode.actors.get(recorded.id)
        if entry is None or entry.description.id != recorded.type or entry.id in self._actors.values():
            uid = blueprints.BY_ID[recorded.type].uid if recorded.type in blueprints.BY_ID else 0
            description = wire.ActorDescription(uid, recorded.type, recorded.attributes)
            if recorded.type in blueprints.KIND_INDEX:
                entries.check_attributes(description)
                entry = episode.spawn_vehicle(description, recorded.place, overlapping=True)
            else:
                entry = episode.spawn(description, recorded.place, self._actors.get(recorded.parent, 0))
            self._made.append(entry.id)
        entry.replayed = moves
        self._actors[recorded.id] = entry.id

    def _drive(self, episode: Episode, share: float) -> None:
        assert self._last is not None
        later = motions(self._next) if self._next is not None and share else None
        for row in motions(self._last):
            here = self._actors.get(int(row["id"]), 0)
            if here not in episode.actors:
                continue
            vehicle = episode.world.vehicle(here)
            for name in _COLUMNS:
                vehicle[name] = row[name]
            if later is not None and len(found := later[later["id"] == row["id"]]):
                for name in ("x", "y", "speed", "vx", "vy"):
                    vehicle[name] += share * (found[0][name] - row[name])
                vehicle["yaw"] += share * ((found[0]["yaw"] - row["yaw"] + math.pi) % (2 * math.pi) - math.pi)
            vehicle["s"], vehicle["d"], _ = project_to(episode.world.road.pieces, vehicle["x"], vehicle["y"])

    def _walk(self, episode: Episode, share: float) -> None:
        assert self._last is not None
        later = steps(self._next) if self._next is not None and share else None
        for row in steps(self._last):
            entry = episode.actors.get(self._actors.get(int(row["id"]), 0))
            if entry is None or entry.parent:
                continue
            place = [float(row[name]) for name in ("x", "y", "z")]
            if later is not None and len(found := later[later["id"] == row["id"]]):
                place = [a + share * (float(found[0][n]) - a) for a, n in zip(place, ("x", "y", "z"), strict=True)]
            entry.transform = Transform(Vector3D(*place), Rotation(0.0, float(row["yaw"]), 0.0))
            entry.velocity = Vector3D(float(row["vx"]), float(row["vy"]), 0.0)
            entry.moved = True
            episode.aim(entry)


def stop(episode: Episode, keep: bool) -> None:
    """End the replay, if there is one."""
    playback, episode.tape.playback = episode.tape.playback, None
    if playback is not None:
        playback.stop(episode, keep)


def go_on(episode: Episode) -> None:
    """Show the next frame of the replay, if there is one; what cannot be shown ends it."""
    if episode.tape.playback is None:
        return
    try:
        if episode.tape.playback.go_on(episode):
            return
    except CallFailed as error:
        log.warning("the replay ends: %s", error)
    stop(episode, keep=True)
