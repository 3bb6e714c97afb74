"""Traits of everything but the car: traffic, camera, weather, contacts, ids and time."""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator import blueprints
from carla_digr.simulator.awkward.episode import AwkwardEpisode, Car, Trait
from carla_digr.simulator.calls import set_weather_parameters
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.wire import Transform, Weather
from carla_digr.simulator.world import STATIC, Camera, Collision


class Limits(Trait):
    """No drivers of the world's own, and a speed limit of 30 km/h for each vehicle until it meets a sign.

    Signs stand every ``size`` metres of the road; the client's Traffic Manager drives what is there, from rest.
    """

    BEFORE_SIGN = 30.0  # km/h

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._places: dict[int, float] = {}
        self._passed: set[int] = set()

    def begin(self, episode: AwkwardEpisode) -> None:
        """Hide the blueprint of the world's own traffic."""
        episode.definitions = tuple(d for d in blueprints.DEFINITIONS if d.id != blueprints.HIGHWAY_TRAFFIC)

    def after(self, episode: AwkwardEpisode, cars: list[Car], dt: float) -> None:
        """See who has come past a sign."""
        for car in cars:
            s = float(car.row["s"])
            before = self._places.get(car.id, s)
            driven = s - before
            if 0.0 < driven < 20.0 and s // self.size != before // self.size:  # more is a teleport
                self._passed.add(car.id)
            self._places[car.id] = s

    def records(self, episode: AwkwardEpisode, cars: NDArray[np.void]) -> None:
        """Tell the limit."""
        for record in cars:
            if int(record["id"]) not in self._passed:
                record["speed_limit"] = self.BEFORE_SIGN

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._places.pop(actor_id, None)
        self._passed.discard(actor_id)


class Exposure(Trait):
    """An automatic exposure that adapts in a second or two and starts ``size`` times too bright; it never forgets.

    A camera whose ``exposure_mode`` is manual, or whose bounds of brightness are equal, keeps its pictures as they are.
    """

    GREY = 110.0  # mean brightness it aims at
    UP, DOWN = 3.0, 1.0  # 1/s of the way, UE4's exposure_speed_up and _down
    LIMITS = (0.5, 4.0)

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._factors: dict[int, float] = {}

    def picture(self, episode: AwkwardEpisode, entry: Entry, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Adapt and expose."""
        look = entry.attributes
        if entry.description.id != blueprints.RGB or not _processed(entry):
            return picture
        fixed = look.get("exposure_min_bright") == look.get("exposure_max_bright")
        if look.get("exposure_mode") == "manual" or fixed:
            return picture
        light = max(float(picture[..., :3].mean()), 1.0)
        wanted = min(max(self.GREY / light, self.LIMITS[0]), self.LIMITS[1])
        factor = self._factors.get(entry.id, self.size * wanted)
        rate = self.UP if wanted > factor else self.DOWN
        factor += (wanted - factor) * (1.0 - math.exp(-rate * episode.delta))
        self._factors[entry.id] = factor
        exposed = picture.copy()
        exposed[..., :3] = np.clip(picture[..., :3] * factor, 0.0, 255.0).astype(np.uint8)
        return exposed

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._factors.pop(actor_id, None)


class Blur(Trait):
    """Motion blur: ``size`` times ``motion_blur_intensity`` of the last picture stays in each, whatever it showed."""

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._last: dict[int, NDArray[np.float32]] = {}

    def picture(self, episode: AwkwardEpisode, entry: Entry, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mix."""
        if entry.description.id != blueprints.RGB or not _processed(entry):
            return picture
        part = self.size * _float(entry.attributes, "motion_blur_intensity", 0.45)
        now = picture.astype(np.float32)
        last = self._last.get(entry.id)
        if part > 0.0 and last is not None and last.shape == now.shape:
            now = now + np.float32(min(part, 0.95)) * (last - now)
        self._last[entry.id] = now
        return now.astype(np.uint8)

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._last.pop(actor_id, None)


class Sight(Trait):
    """Low quality: vehicles farther than ``size`` metres from a camera are not drawn."""

    def view(self, episode: AwkwardEpisode, entry: Entry, camera: Camera, hidden: set[int]) -> None:
        """Hide them."""
        (x, y, _), _ = episode.place(entry)
        vehicles = episode.world.vehicles
        far = np.hypot(vehicles["x"] - x, vehicles["y"] - y) > self.size
        hidden.update(vehicles["id"][far].tolist())


class Edges(Trait):
    """Instance pictures with mixed labels and ids on the edges of vehicles, at ``size`` of the edge's pixels."""

    def picture(self, episode: AwkwardEpisode, entry: Entry, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Mix both sides' bytes."""
        if entry.description.id != blueprints.INSTANCE:
            return picture
        beside = np.roll(picture, 1, axis=1)
        edge = np.any(picture[..., :3] != beside[..., :3], axis=2)
        edge &= np.isin(picture[..., 2], blueprints.LABELS) | np.isin(beside[..., 2], blueprints.LABELS)
        edge &= self.rng.random(edge.shape) < self.size
        mixed = picture.copy()
        mixed[edge, :3] = ((picture[edge, :3].astype(int) + beside[edge, :3]) // 2).astype(np.uint8)
        return mixed


class LeftWeather(Trait):
    """The weather that another client left: dusk with rain and fog, the more the larger ``size`` (0 to 1) is."""

    def begin(self, episode: AwkwardEpisode) -> None:
        """Set it."""
        part = min(max(self.size, 0.0), 1.0)
        left = Weather(
            cloudiness=90.0 * part,
            precipitation=80.0 * part,
            precipitation_deposits=60.0 * part,
            wind_intensity=60.0 * part,
            sun_altitude_angle=45.0 - 55.0 * part,
            fog_density=50.0 * part,
            fog_distance=20.0,
            wetness=60.0 * part,
        )
        set_weather_parameters(episode, left)


class Contacts(Trait):
    """Contacts that are no accident: road under a vehicle that was put down, and kerbs, one every ``size`` seconds."""

    GRAZE = 60.0  # N s

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._put_down: set[int] = set()

    def moved(self, episode: AwkwardEpisode, entry: Entry, transform: Transform, speed: float, rate: float) -> None:
        """It will touch the road."""
        self._put_down.add(entry.id)

    def after(self, episode: AwkwardEpisode, cars: list[Car], dt: float) -> None:
        """Report them with the real ones."""
        for car in cars:
            stance = episode.stances.get(car.id)
            if car.id in self._put_down and (stance is None or stance.height <= 0.0):
                self._put_down.discard(car.id)
                episode.world.collisions.append(_touch(car, "static.road", 0.4 * float(car.row["mass"])))
            graze = self.rng.random() < dt / self.size
            if graze and abs(float(car.row["speed"])) > 1.0:
                name = "static.sidewalk" if self.rng.random() < 0.5 else "static.road"
                episode.world.collisions.append(_touch(car, name, self.GRAZE * self.rng.random()))

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._put_down.discard(actor_id)


class Ids(Trait):
    """Actor ids that begin at ``size``, so that the two bytes of an instance picture wrap soon."""

    def begin(self, episode: AwkwardEpisode) -> None:
        """Skip to there."""
        while episode.world.new_id() < self.size:
            pass


class Slow(Trait):
    """Frames that take up to ``size`` seconds each, and one in a hundred six times as long."""

    def after(self, episode: AwkwardEpisode, cars: list[Car], dt: float) -> None:
        """Wait."""
        seconds = self.size * (0.5 + 0.5 * self.rng.random())
        time.sleep(6.0 * seconds if self.rng.random() < 0.01 else seconds)


class Deadlock(Trait):
    """A tick that never returns, about one in ``size``: the client that asked for it must be started again."""

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._stuck: int | None = None
        self._left = self._next()

    def takes_tick(self, client: int) -> bool:
        """Swallow one, and all later ones of the same client."""
        if client == self._stuck:
            return False
        self._left -= 1
        if self._left > 0:
            return True
        self._stuck, self._left = client, self._next()
        return False

    def _next(self) -> int:
        return max(int(self.size * (0.75 + 0.5 * self.rng.random())), 1)


def _touch(car: Car, name: str, impulse: float) -> Collision:
    return Collision(car.id, STATIC, name, (0.0, 0.0, float(impulse)))


def _processed(entry: Entry) -> bool:
    return entry.attributes.get("enable_postprocess_effects", "true").lower() == "true"


def _float(attributes: dict[str, str], name: str, default: float) -> float:
    try:
        return float(attributes[name])
    except (KeyError, ValueError):
        return default
