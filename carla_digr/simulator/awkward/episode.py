"""The embedded highway seen through traits: an episode in which single things are as awkward as on a CARLA server."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator import wire
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.road import Road
from carla_digr.simulator.traffic import CLIENT
from carla_digr.simulator.wire import Rotation, Transform
from carla_digr.simulator.world import Camera

OUT_OF_SIGHT = 5e4  # m that a vehicle is away while a picture is drawn without it
BODY_SWING = math.radians(45.0)  # rad, no more pitch or roll is told than this


@dataclass
class Car:
    """A vehicle that a client drives, as the traits of one frame shape it.

    Args:
        id: of its actor.
        row: its row of the world's table.
        physics: its mechanics in force.
        control: what its client asked for last.
        throttle, steer, brake: what reaches engine, wheels and brakes in the coming frame; throttle and brake of the
            ordinary highway's 4 and 8 m/s2, steer of its 70 degrees.
        push: m/s2 along the heading besides.
        resistance: m/s2 against the motion besides.
    """

    id: int
    row: Any
    physics: wire.VehiclePhysics
    control: wire.VehicleControl
    throttle: float
    steer: float
    brake: float
    push: float = 0.0
    resistance: float = 0.0


@dataclass
class Stance:
    """Where a vehicle is besides its place on the plane: m above the ground's height, m/s upwards, rad."""

    height: float = 0.0
    climb: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0


class Trait:
    """One awkward thing. Every method does nothing here; a trait has those of what it changes.

    Args:
        size: how much of it, in the unit that the table of traits names.
        rng: its own source of chance.
    """

    def __init__(self, size: float, rng: np.random.Generator):
        self.size, self.rng = size, rng

    def road(self) -> Road | None:
        """The road of the world, None: leave it."""
        return None

    def opendrive(self, text: str) -> str:
        """Change the map that clients are given."""
        return text

    def begin(self, episode: AwkwardEpisode) -> None:
        """A new episode: the world is there and empty."""

    def spawned(self, episode: AwkwardEpisode, entry: Entry, transform: Transform) -> None:
        """A vehicle was put into the world."""

    def moved(self, episode: AwkwardEpisode, entry: Entry, transform: Transform, speed: float, rate: float) -> None:
        """A vehicle was put elsewhere; it had a speed (m/s) and a yaw rate (rad/s) before."""

    def spun(self, entry: Entry, rate: float) -> None:
        """A client gave a vehicle a yaw rate in rad/s."""

    def physics(self, physics: wire.VehiclePhysics) -> wire.VehiclePhysics:
        """The mechanics that a vehicle comes with."""
        return physics

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """Shape what reaches a vehicle in the coming frame."""

    def after(self, episode: AwkwardEpisode, cars: list[Car], dt: float) -> None:
        """The frame is done."""

    def records(self, episode: AwkwardEpisode, cars: NDArray[np.void]) -> None:
        """Change what the world state says of the vehicles, rows of streaming.ACTOR_STATE."""

    def view(self, episode: AwkwardEpisode, entry: Entry, camera: Camera, hidden: set[int]) -> None:
        """Add the ids of vehicles that a camera does not draw."""

    def picture(self, episode: AwkwardEpisode, entry: Entry, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Change a camera's picture, (H, W, 4) uint8 BGRA."""
        return picture

    def ground(self, s: float, d: float) -> tuple[float, float]:
        """Height of the ground at a point of the road (m), and its slope along the road (tangent)."""
        return 0.0, 0.0

    def removed(self, actor_id: int) -> None:
        """An actor is gone."""

    def takes_tick(self, client: int) -> bool:
        """Whether a tick asked for by a client will be done."""
        return True


class AwkwardEpisode(Episode):
    """An episode with traits.

    Args:
        traits: new ones, made for this episode.
        others: as for Episode.
    """

    def __init__(self, number: int, frame: int, settings: wire.EpisodeSettings, port: int, traits: Sequence[Trait]):
        self.traits = traits
        self.stances: dict[int, Stance] = {}
        self._controls: dict[int, wire.VehicleControl] = {}
        road = next((road for trait in traits if (road := trait.road()) is not None), None)
        super().__init__(number, frame, settings, port, road)
        for trait in traits:
            trait.begin(self)

    # What clients ask for.

    def control(self, entry: Entry, control: wire.VehicleControl) -> None:
        """Keep the gear too."""
        super().control(entry, control)
        self._controls[entry.id] = control

    def physics(self, entry: Entry) -> wire.VehiclePhysics:
        """What a client applied last, else what the traits make of the kind's own."""
        physics = super().physics(entry)
        if entry.physics is None:
            for trait in self.traits:
                physics = trait.physics(physics)
        return physics

    def put(self, entry: Entry, transform: Transform) -> None:
        """Put a vehicle elsewhere, and let the traits see it."""
        row = self.world.vehicle(entry.id)
        speed, rate = float(row["speed"]), float(row["yaw_rate"])
        super().put(entry, transform)
        for trait in self.traits:
            trait.moved(self, entry, transform, speed, rate)

    def spin(self, entry: Entry, rate: float) -> None:
        """Turn a vehicle, and let the traits see it."""
        super().spin(entry, rate)
        for trait in self.traits:
            trait.spun(entry, rate)

    def spawn(self, description: wire.ActorDescription, transform: Transform, parent: int) -> Entry:
        """Make an actor, and let the traits see a vehicle."""
        entry = super().spawn(description, transform, parent)
        if entry.kind >= 0:
            for trait in self.traits:
                trait.spawned(self, entry, transform)
        return entry

    def remove(self, entry: Entry) -> None:
        """Remove an actor, and have the traits forget it."""
        super().remove(entry)
        self.stances.pop(entry.id, None)
        self._controls.pop(entry.id, None)
        for trait in self.traits:
            trait.removed(entry.id)

    def takes_tick(self, client: int) -> bool:
        """Whether every trait lets it be done."""
        return all(trait.takes_tick(client) for trait in self.traits)

    # What happens.

    def step(self) -> None:
        """Move the world by a frame, with what the traits make of pedals and wheels."""
        dt = self.delta
        cars = [
            self._car(row) for row in self.world.vehicles.view(np.recarray) if row["driver"] == CLIENT and self.traits
        ]
        asked = []
        for car in cars:
            row = car.row
            asked.append((row["throttle"], row["steer"], row["brake"]))
            for trait in self.traits:
                trait.drive(self, car, dt)
            row["throttle"], row["steer"], row["brake"] = car.throttle, car.steer, car.brake
            row["speed"] = _pushed(float(row["speed"]), car.push, car.resistance, dt)
        super().step()
        for car, (throttle, steer, brake) in zip(cars, asked, strict=True):
            car.row["throttle"], car.row["steer"], car.row["brake"] = throttle, steer, brake
        for trait in self.traits:
            trait.after(self, cars, dt)

    def _car(self, row: Any) -> Car:
        entry = self.actors[int(row["id"])]
        pedals = (float(row[name]) for name in ("throttle", "steer", "brake"))
        control = self._controls.get(entry.id, wire.VehicleControl())
        return Car(entry.id, row, self.physics(entry), control, *pedals)

    def stance(self, actor_id: int) -> Stance:
        """A vehicle's stance, to be changed."""
        return self.stances.setdefault(actor_id, Stance())

    def ground(self, s: float, d: float) -> tuple[float, float]:
        """Height of the ground at a point of the road (m), and its slope along the road (tangent)."""
        height = slope = 0.0
        for trait in self.traits:
            h, k = trait.ground(s, d)
            height, slope = height + h, slope + k
        return height, slope

    def _tilt(self, row: Any) -> tuple[float, float]:
        """Height of the ground under a vehicle (m), and its slope in the direction the vehicle looks in (tangent)."""
        height, slope = self.ground(float(row["s"]), float(row["d"]))
        if slope:
            heading = float(self.world.road.pose(float(row["s"]), 0.0)[2])
            slope *= math.cos(float(row["yaw"]) - heading)
        return height, slope

    # What clients are told.

    def records(self) -> NDArray[np.void]:
        """The ordinary ones with heights, angles and what else the traits change."""
        records = super().records()
        vehicles = self.world.vehicles
        cars = records[: len(vehicles)]
        for record, row in zip(cars, vehicles, strict=True):
            height, slope = self._tilt(row)
            stance = self.stances.get(int(row["id"]))
            rise = slope * float(row["speed"])
            pitch = math.atan(slope)
            if stance is not None:
                height, rise, pitch = height + stance.height, rise + stance.climb, pitch + stance.pitch
                record["rotation"][2] = math.degrees(max(-BODY_SWING, min(stance.roll, BODY_SWING)))
            record["location"][2], record["velocity"][2] = height, rise
            record["rotation"][0] = math.degrees(max(-BODY_SWING, min(pitch, BODY_SWING)))
        for trait in self.traits:
            trait.records(self, cars)
        return records

    def place(self, entry: Entry) -> Transform:
        """Where an actor is, in the world with its heights."""
        place = super().place(entry)
        vehicle, mount = (entry.id, entry.transform) if entry.kind >= 0 else self.mount(entry)
        if not vehicle:
            return place
        height, slope = self._tilt(self.world.vehicle(vehicle))
        stance = self.stances.get(vehicle, Stance())
        pitch = math.degrees(math.atan(slope) + stance.pitch)
        forward = 0.0 if entry.kind >= 0 else mount.location.x
        up = height + stance.height + forward * math.sin(math.radians(pitch))
        location = place.location._replace(z=place.location.z + up)
        return Transform(location, Rotation(place.rotation.pitch + pitch, place.rotation.yaw, place.rotation.roll))

    def opendrive(self) -> str:
        """The road's map after the traits."""
        text = super().opendrive()
        for trait in self.traits:
            text = trait.opendrive(text)
        return text

    def spawn_points(self) -> list[Transform]:
        """The road's, as far above the ground as on the ordinary highway."""
        points = []
        for place, rotation in super().spawn_points():
            s, d, _ = (float(value) for value in self.world.road.project(place.x, place.y))
            height, slope = self.ground(s, d)
            pitch = math.degrees(math.atan(slope))
            points.append(Transform(place._replace(z=place.z + height), rotation._replace(pitch=pitch)))
        return points

    def picture(self, entry: Entry, camera: Camera) -> NDArray[np.uint8]:
        """What a camera sees after what the traits do to scene and film."""
        if camera.parent in self.stances:
            stance = self.stances[camera.parent]
            camera = dataclasses.replace(camera, z=camera.z + stance.height, pitch=camera.pitch + stance.pitch)
        hidden: set[int] = set()
        for trait in self.traits:
            trait.view(self, entry, camera, hidden)
        rows = [self.world.vehicle(vehicle) for vehicle in hidden]
        places = [float(row["x"]) for row in rows]
        for row in rows:
            row["x"] += OUT_OF_SIGHT
        picture = super().picture(entry, camera)
        for row, x in zip(rows, places, strict=True):
            row["x"] = x
        for trait in self.traits:
            picture = trait.picture(self, entry, picture)
        return picture


def _pushed(speed: float, push: float, resistance: float, dt: float) -> float:
    """Speed after dt with a push (m/s2 along the heading) and a resistance (m/s2) that only ever slows."""
    speed += push * dt
    slowing = resistance * dt
    return math.copysign(max(abs(speed) - slowing, 0.0), speed)
