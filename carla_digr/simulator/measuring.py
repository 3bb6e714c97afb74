"""What the sensors of an episode measure in a frame, as messages to their listeners."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from carla_digr.simulator import blueprints, sensors, streaming, wire
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.events import EventCamera
from carla_digr.simulator.optics import Look, flow
from carla_digr.simulator.radar import Cone, detections
from carla_digr.simulator.renderer import Pose
from carla_digr.simulator.traffic import VEHICLE
from carla_digr.simulator.wire import Vector3D
from carla_digr.simulator.world import Camera


def measure(episode: Episode, entry: Entry) -> Iterator[bytes]:
    """The messages of one sensor about the present frame."""
    when = episode.world.frame, episode.world.elapsed
    if entry.camera is not None:
        if not episode.settings.no_rendering:
            yield from _look(episode, entry, entry.camera)
    elif entry.beams is not None:
        pose, seconds = _pose(episode, entry), max(episode.delta, entry.sensor_tick)
        seen = episode.world.scan(pose, entry.beams, entry.angle, seconds)
        entry.angle = seen.angle
        counts, echoes = entry.echoes(seen) if entry.echoes else (seen.counts, sensors.labelled(episode.world, seen))
        kind = sensors.LIDARS[entry.description.id]
        yield streaming.lidar(kind, *when, episode.place(entry), math.radians(seen.angle), counts, echoes)
    elif entry.cone is not None:
        yield streaming.radar(*when, episode.place(entry), _sweep(episode, entry, entry.cone))
    elif entry.noise is not None:
        yield _read(episode, entry, entry.noise)
    else:
        yield from _contacts(episode, entry)


def _look(episode: Episode, entry: Entry, camera: Camera) -> Iterator[bytes]:
    world = episode.world
    when = world.frame, world.elapsed
    if entry.description.id == blueprints.FLOW:
        movers = world.movers()
        now = Look(world.pose(camera), movers[:, 0].astype(np.int64), movers[:, 1:4])
        before = entry.memory if isinstance(entry.memory, Look) else now
        entry.memory = now
        motion = flow(world.depths(camera), world.instances(camera), camera.fov, now, before)
        yield streaming.flow(*when, episode.place(entry), camera.fov, motion)
        return
    kind, _ = sensors.PICTURES[entry.description.id]
    picture = episode.picture(entry, camera)
    if isinstance(entry.memory, EventCamera):
        found = entry.memory(picture, world.elapsed)
        if len(found):  # as on CARLA: what has not changed is not told of
            size = camera.width, camera.height
            yield streaming.events(*when, episode.place(entry), size, camera.fov, found)
        return
    yield streaming.image(kind, *when, episode.place(entry), camera.fov, picture)


def _pose(episode: Episode, entry: Entry) -> Pose:
    place = episode.place(entry)
    pitch, yaw, roll = map(math.radians, place.rotation)
    return *place.location, pitch, yaw, roll


def _sweep(episode: Episode, entry: Entry, cone: Cone):
    """The points of a radar, which moves as the vehicle that carries it moves and turns."""
    assert entry.draw is not None
    pose, velocity = _pose(episode, entry), (0.0, 0.0)
    vehicle, _ = episode.mount(entry)
    if vehicle:
        row = episode.world.vehicle(vehicle)
        x, y, rate = pose[0] - float(row["x"]), pose[1] - float(row["y"]), float(row["yaw_rate"])
        velocity = float(row["vx"]) - rate * y, float(row["vy"]) + rate * x
    seconds = max(episode.delta, entry.sensor_tick)
    return detections(episode.world, pose, velocity, cone, seconds, entry.draw)


def _read(episode: Episode, entry: Entry, noise: sensors.Noise) -> bytes:
    world, place = episode.world, episode.place(entry)
    if entry.description.id == blueprints.IMU:
        vehicle, mount = episode.mount(entry)
        moving = world.vehicle(vehicle) if vehicle else np.zeros(1, VEHICLE)[0]
        return streaming.imu(world.frame, world.elapsed, place, sensors.inertial(moving, mount.rotation, noise))
    return streaming.gnss(world.frame, world.elapsed, place, sensors.satellite(place.location, noise))


def _contacts(episode: Episode, entry: Entry) -> Iterator[bytes]:
    world = episode.world
    for contact in world.collisions:
        if contact.id != entry.parent or contact.id not in episode.actors:
            continue
        other = episode.actors.get(contact.other)
        struck = _static(contact.other_name) if other is None else episode.actor(other)
        bearer, impulse = episode.actor(episode.actors[contact.id]), Vector3D(*map(float, contact.impulse))
        yield streaming.collision(world.frame, world.elapsed, episode.place(entry), bearer, struck, impulse)


def _static(name: str) -> wire.Actor:
    """A part of the map as a collision names it."""
    return wire.Actor(0, 0, wire.ActorDescription(0, name, []), wire.BoundingBox(), b"", b"")
