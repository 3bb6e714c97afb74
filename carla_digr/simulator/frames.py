"""One frame of an episode: what its actors do by themselves, the world's step, and the messages that tell of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from carla_digr.simulator import playback, streaming, walkers, wire
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.measuring import measure
from carla_digr.simulator.vehicle import DRAG, MAX_ACCELERATION, MAX_BRAKING, MAX_STEER, ROLLING


def advance(episode: Episode, wanted: Collection[int]) -> Iterator[tuple[int, bytes]]:
    """Step the world and yield (stream id, message) of the new frame, the world state last.

    Only sensors whose stream is in ``wanted`` measure: a camera nobody listens to costs nothing.
    """
    world = episode.world
    still, spinning = [], []
    for entry in episode.actors.values():
        if entry.held:
            still.append((entry.id, episode.pose(entry.id)))
        elif entry.kind >= 0 and not entry.replayed:
            if not (entry.sticky or entry.steered):
                episode.control(entry, wire.VehicleControl())
            entry.steered = False
            if entry.ackermann is not None:
                _drive_ackermann(episode, entry, entry.ackermann)
            if entry.constant_velocity is not None:
                _drive_constantly(episode, entry, entry.constant_velocity)
            if entry.spin:
                spinning.append(entry)
    for entry in spinning:
        world.vehicle(entry.id)["yaw"] += entry.spin * episode.delta
    walkers.walk(episode)
    walkers.tell(episode)
    episode.step()
    for entry in spinning:
        world.vehicle(entry.id)["yaw_rate"] += entry.spin
        entry.spin = 0.0
    for vehicle, pose in still:
        world.place(vehicle, *pose)
    if episode.tape.playback is not None:
        playback.go_on(episode)
        walkers.tell(episode)
    playback.record(episode)
    for entry in list(episode.actors.values()):
        if entry.stream and entry.stream in wanted and entry.measures(world.elapsed):
            for message in measure(episode, entry):
                yield entry.stream, message
    yield streaming.WORLD_STREAM, episode.state()
    episode.map_changed = False


def _drive_ackermann(episode: Episode, entry: Entry, wanted: wire.AckermannControl) -> None:
    """Pedals and wheels that bring the vehicle nearest to an Ackermann target within the next frame."""
    row = episode.world.vehicle(entry.id)
    speed, dt = float(row["speed"]), episode.delta
    limit = min(abs(wanted.acceleration) or MAX_BRAKING, 2.0 * MAX_BRAKING)
    change = min(max((wanted.speed - speed) / dt, -limit), limit)
    reverse = speed < 0.0 or (speed == 0.0 and wanted.speed < 0.0)
    push = (-change if reverse else change) + ROLLING + DRAG * speed * speed
    if wanted.speed == 0.0 and abs(speed) < MAX_BRAKING * dt:
        push = -MAX_BRAKING  # stands, and goes on standing
    angle = float(row["steer"]) * MAX_STEER
    turn = min(max(wanted.steer, -MAX_STEER), MAX_STEER) - angle
    if wanted.steer_speed:
        turn = min(max(turn, -abs(wanted.steer_speed) * dt), abs(wanted.steer_speed) * dt)
    episode.world.set_control(
        entry.id, push / MAX_ACCELERATION, (angle + turn) / MAX_STEER, -push / MAX_BRAKING, False, reverse
    )


def _drive_constantly(episode: Episode, entry: Entry, velocity: wire.Vector3D) -> None:
    _, _, yaw = episode.pose(entry.id)
    cos, sin = math.cos(yaw), math.sin(yaw)
    forward, right, _ = velocity
    episode.world.set_target_velocity(entry.id, forward * cos - right * sin, forward * sin + right * cos)
