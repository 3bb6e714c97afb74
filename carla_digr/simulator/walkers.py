"""Walkers and props of an episode: how walkers move from frame to frame, and what the world is told of them.

A walker goes as its WalkerControl says, or where the client leads it that runs its controller.ai.walker: the client
has the crowd, on the map of `navigation`. Nothing holds a walker up; walkers stand on the ground.
"""

from __future__ import annotations

import math

import numpy as np

from carla_digr.simulator import blueprints, shapes
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.figures import FIGURE, NOBODY
from carla_digr.simulator.shapes import SHAPES
from carla_digr.simulator.wire import Rotation, Transform, Vector3D, WalkerControl

HALF_HEIGHT = SHAPES[shapes.WALKER].height / 2
TOP_SPEED = 15.0  # m/s, the most a walker can be given
CLOTHES = ((52, 88, 140), (150, 52, 48), (70, 110, 72), (196, 170, 110), (90, 84, 120), (60, 62, 66))
PROP_COLOR = (200, 120, 40)


def is_walker(entry: Entry) -> bool:
    """Whether an actor is a walker."""
    return entry.description.id in blueprints.WALKERS


def command(entry: Entry, control: WalkerControl) -> None:
    """Have a walker go until it is told otherwise."""
    speed = min(max(control.speed, 0.0), TOP_SPEED)
    entry.walk = control._replace(speed=speed)


def lead(episode: Episode, entry: Entry, transform: Transform, speed: float) -> None:
    """Put a walker's feet where the client's crowd has it, and keep the speed (m/s) with which it came there."""
    (x, y, z), (_, yaw, _) = transform
    place = Vector3D(x, y, z + HALF_HEIGHT)
    before = entry.transform.location
    dt = episode.delta
    entry.velocity = Vector3D((x - before.x) / dt, (y - before.y) / dt, 0.0)
    if math.hypot(*entry.velocity) > TOP_SPEED:  # it was put elsewhere
        entry.velocity = Vector3D()
    turned = math.radians(yaw)
    entry.walk = WalkerControl(Vector3D(math.cos(turned), math.sin(turned), 0.0), min(max(speed, 0.0), TOP_SPEED))
    entry.transform, entry.moved = Transform(place, Rotation(0.0, yaw, 0.0)), True
    episode.aim(entry)


def walk(episode: Episode) -> None:
    """Move the walkers by a frame."""
    for entry in episode.actors.values():
        if entry.kind < 0 and is_walker(entry):
            if not entry.moved:
                _go(episode, entry)
            entry.moved = False


def tell(episode: Episode) -> None:
    """Tell the world where all walkers and props are."""
    there = [e for e in episode.actors.values() if e.kind < 0 and e.description.id in blueprints.FIGURES]
    if there or len(episode.world.figures):
        episode.world.figures = np.array([_figure(episode, entry) for entry in there], FIGURE) if there else NOBODY


def _go(episode: Episode, entry: Entry) -> None:
    (x, y, z), speed, _ = entry.walk
    length = math.hypot(x, y, z)
    if not speed or not length:
        entry.velocity = Vector3D()
        return
    entry.velocity = Vector3D(speed * x / length, speed * y / length, 0.0)
    place, dt = entry.transform.location, episode.delta
    moved = place._replace(x=place.x + dt * entry.velocity.x, y=place.y + dt * entry.velocity.y)
    entry.transform = Transform(moved, Rotation(0.0, math.degrees(math.atan2(y, x)), 0.0))
    episode.aim(entry)


def _figure(episode: Episode, entry: Entry) -> tuple:
    shape = SHAPES[blueprints.FIGURES[entry.description.id]]
    index = shapes.NAMES.index(blueprints.FIGURES[entry.description.id])
    place = episode.place(entry)
    color = CLOTHES[entry.id % len(CLOTHES)] if is_walker(entry) else PROP_COLOR
    return (
        *(entry.id, index, place.location.x, place.location.y, math.radians(place.rotation.yaw)),
        *(shape.half_length, shape.half_width, shape.mass, entry.velocity.x, entry.velocity.y),
        *(shape.label, entry.solid, color),
    )
