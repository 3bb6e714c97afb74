"""The embedded highway made as awkward as a real CARLA server: a table of traits, each of which changes one thing.

`carla-digr simulator --like carla` has all of them, `--traits` single ones or groups. Without traits nothing of this is
loaded and the highway is the ordinary one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from carla_digr.errors import UserError
from carla_digr.simulator import wire
from carla_digr.simulator.awkward import cars, scene, town
from carla_digr.simulator.awkward.episode import AwkwardEpisode, Trait


class Kind(NamedTuple):
    """A row of the table."""

    name: str
    group: str
    make: Callable[[float, np.random.Generator], Trait]
    size: float
    """How much of it by default."""
    unit: str
    """What the size is, and its unit."""
    source: str
    """Where a real server was seen to do so: C = issue or pull request of carla-simulator/carla, or the place."""


TRAITS = (
    Kind("gears", "car", cars.Gears, 16.0, "m/s2 of engine braking a full engine speed behind", "C7083, C4839, C3710"),
    Kind("damping", "car", cars.Damping, 1.0, "of the damping that physics tells", "C2172, C269"),
    Kind("brakes", "car", cars.Brakes, 0.5, "of the ordinary brake torque", "C6673"),
    Kind("steering", "car", cars.Steering, 60.0, "degrees of lock", "C1442, C1301"),
    Kind("settling", "start", cars.Settling, 1.0, "of the height it is put at", "C6477"),
    Kind("momentum", "start", cars.Momentum, 0.5, "s in which a spin fades", "scenario_runner pull request 139"),
    Kind("contacts", "start", scene.Contacts, 10.0, "s between two grazes", "C8957"),
    Kind("limits", "traffic", scene.Limits, 300.0, "m between speed signs", "C1679, C2039"),
    Kind("town", "road", town.Town, 6.0, "per cent, the steepest slope", "Town04's OpenDRIVE"),
    Kind("exposure", "camera", scene.Exposure, 2.5, "times too bright at first", "UE4 histogram exposure"),
    Kind("blur", "camera", scene.Blur, 1.0, "of motion_blur_intensity", "UE4 motion blur"),
    Kind("sight", "camera", scene.Sight, 50.0, "m of drawing distance", "documentation, rendering options: Low"),
    Kind("edges", "camera", scene.Edges, 0.5, "of the pixels on edges", "C5842"),
    Kind("weather", "camera", scene.LeftWeather, 1.0, "of the worst weather", "weather outlives its client"),
    Kind("ids", "server", scene.Ids, 65_300.0, "the first id", "instance segmentation camera: two bytes of id"),
    Kind("slow", "server", scene.Slow, 0.08, "s a frame", "published figures of 100 vehicles: 15 frames a second"),
    Kind("deadlock", "server", scene.Deadlock, 20_000.0, "frames until a tick does not return", "C9172, C9344"),
)
"""Every trait there is, by groups."""
GROUPS = tuple(dict.fromkeys(kind.group for kind in TRAITS))


def chosen_traits(like: str | None, traits: str) -> dict[str, float]:
    """The traits of a command line and their sizes.

    Args:
        like: "carla" for all, or None.
        traits: names of traits or groups, separated by commas, each trait with ``=SIZE`` if not its default; a name
            after a minus sign takes it out again.

    Raises:
        UserError: there is no such trait, or a size is no positive number.
    """
    sizes = {kind.name: kind.size for kind in TRAITS} if like else {}
    for text in filter(None, (part.strip() for part in traits.split(","))):
        name, _, size = text.removeprefix("-").partition("=")
        kinds = [kind for kind in TRAITS if name in (kind.name, kind.group)]
        if not kinds or (size and (len(kinds) > 1 or text.startswith("-"))):
            raise UserError(
                f"There is no trait {text!r}; choose from the traits {', '.join(kind.name for kind in TRAITS)} and "
                f"the groups {', '.join(GROUPS)}, a trait with =SIZE if you like, with a minus before what is to go."
            )
        for kind in kinds:
            if text.startswith("-"):
                sizes.pop(kind.name, None)
            else:
                sizes[kind.name] = _size(kind, size) if size else kind.size
    return sizes


def _size(kind: Kind, text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0.0 < size < 1e6:
        raise UserError(f"The size of the trait {kind.name} must be a positive number ({kind.unit}), not {text!r}.")
    return size


def episodes(sizes: dict[str, float], seed: int) -> Callable[[int, int, wire.EpisodeSettings, int], AwkwardEpisode]:
    """What makes a server's episodes with traits.

    Args:
        sizes: traits and their sizes, see chosen_traits.
        seed: of all chance; a trait has the same with and without others.
    """

    def new_episode(number: int, frame: int, settings: wire.EpisodeSettings, port: int) -> AwkwardEpisode:
        traits = []
        for kind in TRAITS:
            if kind.name in sizes:
                rng = np.random.default_rng([seed, number, zlib.crc32(kind.name.encode())])
                traits.append(kind.make(sizes[kind.name], rng))
        return AwkwardEpisode(number, frame, settings, port, traits)

    return new_episode
