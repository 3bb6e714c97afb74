"""The embedded highway as CARLA clients see it: actors and where they are.

An Episode maps CARLA's notions to the world's: actors to vehicles and cameras, degrees to radians. frames.py lets it
go on, calls.py offers it to clients, server.py moves the bytes.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.simulator import blueprints, entries, sensors, streaming, wire
from carla_digr.simulator.entries import CallFailed, Entry
from carla_digr.simulator.recording import Tape
from carla_digr.simulator.renderer import camera_axes
from carla_digr.simulator.road import SPEED_LIMIT, Road
from carla_digr.simulator.shapes import SHAPES, WALKER
from carla_digr.simulator.vehicle import KINDS
from carla_digr.simulator.wire import Rotation, Transform, Vector3D
from carla_digr.simulator.world import Camera, SpawnCollision, World

DEFAULT_DELTA = 0.05  # s, the step while a client has set none
MAX_DISTANCE = 1e5  # m from the origin; farther positions are refused
SPAWN_HEIGHT = 0.5  # m, spawn points hang above the ground as in CARLA's maps; vehicles are put on it
MAX_ACTORS = 1000  # that clients may make; all of them are told to each client that asks
MAX_TURN = 1e6  # degrees; larger angles mean nothing and do not fit the protocol's 32 bits

CLEAR_NOON = wire.Weather(5.0, 0.0, 0.0, 10.0, -1.0, 45.0, 2.0, 0.75, 0.1, 0.0, 1.0, 0.03)


class Episode:
    """One episode of the simulated world.

    Args:
        number: episode id, different from that of the episode before.
        frame: frames counted so far; they go on across episodes.
        settings: as CARLA's clients set them.
        streaming_port: goes into the streams' tokens.
        road: of the world; None: the ring.

    Attributes:
        definitions: the blueprints there are.
    """

    definitions = blueprints.DEFINITIONS

    def __init__(
        self, number: int, frame: int, settings: wire.EpisodeSettings, streaming_port: int, road: Road | None = None
    ):
        self.number = number
        self.settings = settings
        self.streaming_port = streaming_port
        self.world = World(road)
        self.world.frame = frame
        self.weather = CLEAR_NOON
        self.actors: dict[int, Entry] = {}
        self.streams: dict[int, int] = {streaming.WORLD_STREAM: 0}
        """Stream id to actor id."""
        self.traffic_managers: dict[int, tuple[str, int]] = {}
        self.tape = Tape()
        self.map_changed = True
        self.spectator = self._add(wire.ActorDescription(0, "spectator", []))
        self.spectator.transform = Transform(Vector3D(0.0, 0.0, 40.0), Rotation(-30.0))

    # ------------------------------------------------------------------------------------------------- frames

    @property
    def delta(self) -> float:
        """Seconds a frame takes."""
        return self.settings.fixed_delta or DEFAULT_DELTA

    def step(self) -> None:
        """Move the world by a frame."""
        self.world.step(self.delta)

    def state(self) -> bytes:
        """The world state message of the present frame."""
        world = self.world
        return streaming.world_state(
            world.frame, world.elapsed, self.number, time.time(), self.delta, self.records(), self.map_changed
        )

    def records(self) -> NDArray[np.void]:
        """What the world state says of the actors, (N,) of streaming.ACTOR_STATE: vehicles first, in their order."""
        world = self.world
        vehicles = world.vehicles
        others = [e for e in self.actors.values() if e.kind < 0]
        records = np.zeros(len(vehicles) + len(others), streaming.ACTOR_STATE)
        records["state"] = streaming.ACTIVE
        cars = records[: len(vehicles)]
        cars["id"] = vehicles["id"]
        cars["location"][:, 0] = vehicles["x"]
        cars["location"][:, 1] = vehicles["y"]
        cars["rotation"][:, 1] = wrapped_degrees(vehicles["yaw"])
        cars["velocity"][:, 0] = vehicles["vx"]
        cars["velocity"][:, 1] = vehicles["vy"]
        cars["angular_velocity"][:, 2] = np.degrees(vehicles["yaw_rate"])
        cars["acceleration"][:, 0] = vehicles["ax"]
        cars["acceleration"][:, 1] = vehicles["ay"]
        for name in ("throttle", "steer", "brake", "hand_brake", "reverse"):
            cars[name] = vehicles[name]
        cars["gear"] = np.where(vehicles["reverse"], -1, 1)
        cars["speed_limit"] = SPEED_LIMIT
        cars["traffic_light_state"] = streaming.GREEN_LIGHT
        for record, entry in zip(records[len(vehicles) :], others, strict=True):
            place = self.place(entry)
            record["id"], record["location"], record["rotation"] = entry.id, place.location, place.rotation
        walkers = records.view(streaming.WALKER_STATE)[len(vehicles) :]
        for walker, entry in zip(walkers, others, strict=True):
            if entry.description.id in blueprints.WALKERS:
                walker["velocity"] = entry.velocity
                walker["direction"], walker["speed"], walker["jump"] = entry.walk
        return records

    def picture(self, entry: Entry, camera: Camera) -> NDArray[np.uint8]:
        """What a camera sees now, (H, W, 4) uint8 BGRA, encoded as its kind does."""
        _, draw = sensors.PICTURES[entry.description.id]
        return draw(self.world, camera)

    # ------------------------------------------------------------------------------------------------- actors

    def _add(self, description: wire.ActorDescription, parent: int = 0, actor_id: int = 0) -> Entry:
        entry = Entry(actor_id or self.world.new_id(), description, parent)
        defaults = blueprints.BY_ID.get(description.id)
        if defaults is not None:
            entry.attributes = {a.id: a.value for a in defaults.attributes}
        entry.attributes.update((a.id, a.value) for a in description.attributes)
        self.actors[entry.id] = entry
        return entry

    def place(self, entry: Entry) -> Transform:
        """Where an actor is in the world, in the protocol's units."""
        if entry.kind >= 0:
            x, y, yaw = self.pose(entry.id)
            return Transform(Vector3D(x, y, 0.0), Rotation(0.0, float(wrapped_degrees(yaw)), 0.0))
        vehicle, mount = self.mount(entry)
        if not vehicle:
            return mount
        x0, y0, heading = self.pose(vehicle)
        (x, y, z), (pitch, yaw, roll) = mount
        cos, sin = math.cos(heading), math.sin(heading)
        turned = float(wrapped_degrees(heading + math.radians(yaw)))
        return Transform(Vector3D(x0 + cos * x - sin * y, y0 + sin * x + cos * y, z), Rotation(pitch, turned, roll))

    def mount(self, entry: Entry) -> tuple[int, Transform]:
        """The vehicle that carries what is no vehicle, 0 for none, and where it is on it, else in the world."""
        transform, parent = entry.transform, self.actors.get(entry.parent)
        while parent is not None and parent.kind < 0:
            transform, parent = mounted(parent.transform, transform), self.actors.get(parent.parent)
        return 0 if parent is None else parent.id, transform

    def put(self, entry: Entry, transform: Transform) -> None:
        """Put a vehicle elsewhere."""
        (x, y, _), (_, yaw, _) = transform
        self.world.place(entry.id, x, y, math.radians(yaw))

    def control(self, entry: Entry, control: wire.VehicleControl) -> None:
        """Set a vehicle's pedals and wheels until the next call."""
        throttle, steer, brake, hand_brake, reverse, *_ = control
        self.world.set_control(entry.id, throttle, steer, brake, hand_brake, reverse)
        entry.steered = True

    def spin(self, entry: Entry, rate: float) -> None:
        """Turn a vehicle at a rate (rad/s) in the next frame, besides what its wheels do."""
        entry.spin = rate

    def physics(self, entry: Entry) -> wire.VehiclePhysics:
        """A vehicle's mechanics: what a client applied last, else its kind's own."""
        return entry.physics or blueprints.physics(KINDS[entry.kind], *self.pose(entry.id))

    def opendrive(self) -> str:
        """The map."""
        return self.world.road.opendrive()

    def spawn_points(self) -> list[Transform]:
        """Where the map offers to put vehicles."""
        return [
            Transform(Vector3D(x, y, SPAWN_HEIGHT), Rotation(0.0, math.degrees(yaw), 0.0))
            for x, y, yaw in self.world.road.spawn_points.tolist()
        ]

    def takes_tick(self, client: int) -> bool:
        """Whether a tick that a client (a number of its own) asks for will be done."""
        return True

    def pose(self, vehicle: int) -> tuple[float, float, float]:
        """x, y (m) and yaw (rad) of a vehicle."""
        row = self.world.vehicles[self.world.index(vehicle)]
        return float(row["x"]), float(row["y"]), float(row["yaw"])

    def actor(self, entry: Entry) -> wire.Actor:
        """An actor as clients are told of it."""
        box, tags = wire.BoundingBox(actor_id=entry.id), b""
        if entry.kind >= 0:
            kind = KINDS[entry.kind]
            box, tags = blueprints.bounding_box(kind, entry.id), blueprints.semantic_tags(kind)
        elif entry.description.id in blueprints.FIGURES:
            shape = SHAPES[blueprints.FIGURES[entry.description.id]]
            box, tags = blueprints.figure_box(entry.description.id, entry.id), bytes([shape.label])
        token = streaming.token(entry.stream, self.streaming_port) if entry.stream else b""
        return wire.Actor(entry.id, entry.parent, entry.description, box, tags, token)

    def entry(self, actor_id: int) -> Entry:
        """The entry of an actor; raises CallFailed for an unknown id."""
        try:
            return self.actors[actor_id]
        except KeyError:
            raise CallFailed(f"no actor has the id {actor_id}") from None

    def vehicle(self, actor_id: int) -> Entry:
        """The entry of a vehicle; raises CallFailed for other actors."""
        entry = self.entry(actor_id)
        if entry.kind < 0:
            raise CallFailed(f"actor {actor_id} ({entry.description.id}) is no vehicle")
        return entry

    def remove(self, entry: Entry) -> None:
        """Remove an actor and, of a traffic controller, its vehicles. What is attached to it stays where it is."""
        own = {vehicle: self.actors[vehicle] for vehicle in entry.traffic if vehicle in self.actors}
        gone = {entry.id: entry, **own}
        orphans = [e for e in self.actors.values() if e.parent in gone]
        for orphan in orphans:
            orphan.transform = self.place(orphan)
        for number, each in gone.items():
            del self.actors[number]
            self.streams.pop(each.stream, None)
        for orphan in orphans:
            orphan.parent = 0
            self.aim(orphan)
        self.world.destroy(*(number for number, each in gone.items() if each.kind >= 0))

    def spawn_vehicle(
        self, description: wire.ActorDescription, transform: Transform, overlapping: bool = False
    ) -> Entry:
        """Make a vehicle, where others are too only if ``overlapping`` allows it; raises CallFailed."""
        kind = blueprints.KIND_INDEX[description.id]
        color = next((a.value for a in description.attributes if a.id == "color"), None)
        (x, y, _), (_, yaw, _) = transform
        try:
            actor_id = self.world.spawn_vehicle(
                kind, x, y, math.radians(yaw), None if color is None else entries.color(color), overlapping
            )
        except SpawnCollision:
            raise CallFailed("Spawn failed because of collision at spawn position") from None
        entry = self._add(description, actor_id=actor_id)
        entry.kind = kind
        entry.sticky = entry.attributes["sticky_control"].lower() == "true"
        return entry

    def _spawn_sensor(self, description: wire.ActorDescription, transform: Transform, parent: int) -> Entry:
        if parent:
            self.entry(parent)
        entry = self._add(description, parent)
        entry.transform = transform
        try:
            self.aim(entry)
            if "sensor_tick" in entry.attributes:
                entry.sensor_tick = entries.number(entry, "sensor_tick", 0.0, 3600.0)
            if description.id in sensors.LIDARS:
                entry.beams, entry.echoes = entries.beams(entry), entries.echoes(entry)
            elif description.id == blueprints.RADAR:
                entry.cone, entry.draw = entries.cone(entry), np.random.default_rng(entry.id)
            elif description.id == blueprints.DVS:
                entry.memory = entries.event_camera(entry)
            elif "noise_seed" in entry.attributes:
                names = [name for name in entry.attributes if name.startswith("noise_")]
                entry.noise = sensors.Noise({name: entries.noise(entry, name) for name in names})
        except CallFailed:
            del self.actors[entry.id]
            raise
        if description.id != blueprints.LANE_INVASION:  # that one is the client's own computation
            entry.stream = entry.id + streaming.WORLD_STREAM
            self.streams[entry.stream] = entry.id
        return entry

    def aim(self, entry: Entry) -> None:
        """Make the views of a camera, and of the cameras attached to an actor, from attributes and transforms.

        Raises:
            CallFailed: the attributes of one are impossible.
        """
        if entry.description.id in sensors.PICTURES or entry.description.id == blueprints.FLOW:
            vehicle, ((x, y, z), angles) = self.mount(entry)
            pitch, yaw, roll = map(math.radians, angles)
            entry.camera = Camera(
                parent=vehicle,
                x=x,
                y=y,
                z=z,
                pitch=pitch,
                yaw=yaw,
                roll=roll,
                width=entries.integer(entry, "image_size_x", 1, blueprints.MAX_IMAGE_SIDE),
                height=entries.integer(entry, "image_size_y", 1, blueprints.MAX_IMAGE_SIDE),
                fov=entries.number(entry, "fov", 1.0, 170.0),
            )
        for child in [e for e in self.actors.values() if e.parent == entry.id]:
            self.aim(child)

    def _spawn_traffic(self, description: wire.ActorDescription) -> Entry:
        for other in self.actors.values():
            if other.description.id == blueprints.HIGHWAY_TRAFFIC:
                raise CallFailed(f"traffic controller {other.id} already fills the road; destroy it first")
        entry = self._add(description)
        try:
            seed = entries.integer(entry, "seed", 0, 2**63 - 1)
            count = entries.integer(entry, "vehicles", 0, blueprints.MAX_TRAFFIC)
            oncoming = entries.integer(entry, "oncoming", 0, blueprints.MAX_TRAFFIC)
            hero = entries.integer(entry, "hero", 0, 2**32 - 1)
            if hero:
                self.vehicle(hero)
            entry.traffic = self.world.spawn_traffic(seed, count, hero or None, oncoming)
        except (CallFailed, UserError) as error:
            del self.actors[entry.id]
            raise CallFailed(str(error)) from None
        for vehicle in entry.traffic:
            row = self.world.vehicle(vehicle)
            kind = int(row["kind"])
            definition = blueprints.BY_ID[KINDS[kind].blueprint]
            own = {"color": ",".join(map(str, row["color"].tolist())), "role_name": "traffic"}
            values = [wire.AttributeValue(a.id, a.type, own.get(a.id, a.value)) for a in definition.attributes]
            made = wire.ActorDescription(definition.uid, definition.id, values)
            self._add(made, actor_id=vehicle).kind = kind
        return entry

    def spawn(self, description: wire.ActorDescription, transform: Transform, parent: int) -> Entry:
        """Make an actor; raises CallFailed."""
        check_place(transform)
        entries.check_attributes(description)
        if len(self.actors) >= MAX_ACTORS:
            raise CallFailed(f"there are {len(self.actors)} actors already; destroy some of them first")
        if description.id in blueprints.KIND_INDEX:
            if parent:
                raise CallFailed("a vehicle cannot be attached to another actor")
            return self.spawn_vehicle(description, transform)
        if description.id == blueprints.HIGHWAY_TRAFFIC:
            return self._spawn_traffic(description)
        if description.id == blueprints.WALKER_CONTROLLER:
            if not parent or self.entry(parent).description.id not in blueprints.WALKERS:
                raise CallFailed("a walker's controller needs a walker to be attached to")
            return self._add(description, parent)
        if description.id in blueprints.FIGURES:
            entry = self._add(description, parent and self.entry(parent).id)
            entry.transform = transform
            if description.id in blueprints.WALKERS and not parent:
                place = transform.location
                half = SHAPES[WALKER].height / 2
                entry.transform = transform._replace(location=place._replace(z=max(place.z, half)))
            return entry
        if description.id in blueprints.BY_ID:
            return self._spawn_sensor(description, transform, parent)
        raise CallFailed(f"this simulator has no blueprint {description.id!r}")


def wrapped_degrees(angle: Any) -> Any:
    """Radians to degrees in [-180, 180)."""
    return (np.degrees(angle) + 180.0) % 360.0 - 180.0


def mounted(base: Transform, mounted: Transform) -> Transform:
    """Where something is that is mounted on what is at ``base``."""
    frame = camera_axes(*map(math.radians, base.rotation))
    location = frame.T @ mounted.location + base.location
    forward, right, up = camera_axes(*map(math.radians, mounted.rotation)) @ frame
    pitch = math.atan2(forward[2], math.hypot(forward[0], forward[1]))
    yaw, roll = math.atan2(forward[1], forward[0]), math.atan2(-right[2], up[2])
    return Transform(Vector3D(*location.tolist()), Rotation(*map(math.degrees, (pitch, yaw, roll))))


def check_place(transform: Transform) -> None:
    """Refuse a position out of this world.

    Raises:
        CallFailed: it is one.
    """
    if max(map(abs, transform.location)) > MAX_DISTANCE:
        raise CallFailed(f"positions must be within {MAX_DISTANCE:.0f} m of the origin, not {transform.location}")
    if max(map(abs, transform.rotation)) > MAX_TURN:
        raise CallFailed(f"angles must be within {MAX_TURN:.0f} degrees, not {transform.rotation}")
