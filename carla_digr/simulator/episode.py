"""The embedded highway as CARLA clients see it: actors, sensors, settings and the calls of the RPC protocol.

An Episode maps CARLA's calls to the world (degrees to radians, actors to vehicles and cameras) and gives the
streaming messages of each frame. It knows no sockets; server.py moves the bytes.
"""

from __future__ import annotations

import logging
import math
import time
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from carla_digr.errors import UserError
from carla_digr.simulator import blueprints, wire
from carla_digr.simulator.palette import PALETTES
from carla_digr.simulator.road import MAP_NAME, SPEED_LIMIT
from carla_digr.simulator.vehicle import KINDS
from carla_digr.simulator.wire import Rotation, Transform, Vector3D
from carla_digr.simulator.world import Camera, SpawnCollision, World

DEFAULT_DELTA = 0.05  # s, the step while a client has set none
MAX_DELTA = 1.0  # s
MAX_DISTANCE = 1e5  # m from the origin; farther positions are refused
MAX_SPEED = 150.0  # m/s; faster velocities are refused
SPAWN_HEIGHT = 0.5  # m, spawn points hang above the ground as in CARLA's maps; vehicles are put on it
BRAKE_LIGHT = 8  # bit of VehicleLightState
NESTED_BATCHES = 4  # deepest chain of commands to run after a spawn

ORIGIN = Transform()
CLEAR_NOON = wire.Weather(5.0, 0.0, 0.0, 10.0, -1.0, 45.0, 2.0, 0.75, 0.1, 0.0, 1.0, 0.03)

log = logging.getLogger(__name__)


class CallFailed(Exception):
    """A call that cannot be done; the text reaches the client as a RuntimeError."""


class Method(NamedTuple):
    """One RPC: the function, how its arguments are checked, and whether it returns a value."""

    function: Callable[..., Any]
    arguments: tuple[wire.Decoder, ...]
    returns: bool


METHODS: dict[str, Method] = {}
"""Every RPC an Episode answers; filled by the decorator below from the methods' annotations."""


def rpc(function: Callable[..., Any]) -> Callable[..., Any]:
    """Offer a method of Episode to clients under its own name."""
    hints = typing.get_type_hints(function)
    returns = hints.pop("return") is not type(None)
    METHODS[function.__name__] = Method(function, tuple(map(wire.decoder, hints.values())), returns)
    return function


@dataclass
class Entry:
    """What the server keeps of an actor; a vehicle's motion is in the world."""

    id: int
    description: wire.ActorDescription
    parent: int = 0
    transform: Transform = ORIGIN
    """Of actors that are no vehicles; relative to the parent if there is one."""
    stream: int = 0
    kind: int = -1
    """Index into KINDS of a vehicle, else -1."""
    attributes: dict[str, str] = field(default_factory=dict)
    camera: Camera | None = None
    fov: float = 0.0
    sensor_tick: float = 0.0
    due: float = 0.0
    """Simulated second from which the sensor measures again."""
    lights: int = 0
    physics: wire.VehiclePhysics | None = None
    constant_velocity: Vector3D | None = None
    traffic: list[int] = field(default_factory=list)
    """Vehicles of a traffic controller."""


class Episode:
    """One episode of the simulated world.

    Parameters:
        number: episode id, different from that of the episode before
        frame: frames counted so far; they go on across episodes
        settings: as CARLA's clients set them
        streaming_port: goes into the streams' tokens
    """

    def __init__(self, number: int, frame: int, settings: wire.EpisodeSettings, streaming_port: int):
        self.number = number
        self.settings = settings
        self.streaming_port = streaming_port
        self.world = World()
        self.world.frame = frame
        self.weather = CLEAR_NOON
        self.actors: dict[int, Entry] = {}
        self.streams: dict[int, int] = {wire.WORLD_STREAM: 0}
        """Stream id to actor id."""
        self.traffic_managers: dict[int, tuple[str, int]] = {}
        self.map_changed = True
        self.spectator = self._add(wire.ActorDescription(0, "spectator", []))
        self.spectator.transform = Transform(Vector3D(0.0, 0.0, 40.0), Rotation(-30.0))

    # ------------------------------------------------------------------------------------------------- frames

    @property
    def delta(self) -> float:
        """Seconds a frame takes."""
        return self.settings.fixed_delta or DEFAULT_DELTA

    def advance(self, wanted: Collection[int]) -> Iterator[tuple[int, bytes]]:
        """Step the world and yield (stream id, message) of the new frame, the world state last.

        Only sensors whose stream is in ``wanted`` measure: a camera nobody listens to costs nothing.
        """
        for entry in self.actors.values():
            if entry.constant_velocity is not None:
                self._drive_constantly(entry)
        self.world.step(self.delta)
        for entry in list(self.actors.values()):
            if entry.stream in wanted and entry.stream and self.world.elapsed >= entry.due - 1e-6:
                entry.due = self.world.elapsed + entry.sensor_tick
                for message in self._measure(entry):
                    yield entry.stream, message
        yield wire.WORLD_STREAM, self.state()
        self.map_changed = False

    def state(self) -> bytes:
        """The world state message of the present frame."""
        world = self.world
        vehicles = world.vehicles
        others = [e for e in self.actors.values() if e.kind < 0]
        records = np.zeros(len(vehicles) + len(others), wire.ACTOR_STATE)
        records["state"] = wire.ACTIVE
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
        cars["traffic_light_state"] = wire.GREEN_LIGHT
        for record, entry in zip(records[len(vehicles) :], others, strict=True):
            place = self._place(entry)
            record["id"], record["location"], record["rotation"] = entry.id, place.location, place.rotation
        return wire.world_state(
            world.frame, world.elapsed, self.number, time.time(), self.delta, records, self.map_changed
        )

    def _measure(self, entry: Entry) -> Iterator[bytes]:
        world = self.world
        if entry.camera is not None:
            picture = world.render(entry.camera)
            yield wire.image(world.frame, world.elapsed, self._place(entry), entry.fov, picture)
            return
        for contact in world.collisions:
            if contact.id == entry.parent:
                other = self.actors.get(contact.other)
                struck = _static(contact.other_name) if other is None else self._actor(other)
                yield wire.collision(
                    world.frame,
                    world.elapsed,
                    self._place(entry),
                    self._actor(self.actors[contact.id]),
                    struck,
                    Vector3D(*map(float, contact.impulse)),
                )

    def _drive_constantly(self, entry: Entry) -> None:
        _, _, yaw = self._pose(entry.id)
        assert entry.constant_velocity is not None
        forward, right, _ = entry.constant_velocity
        cos, sin = math.cos(yaw), math.sin(yaw)
        self.world.set_target_velocity(entry.id, forward * cos - right * sin, forward * sin + right * cos)

    # ------------------------------------------------------------------------------------------------- actors

    def _add(self, description: wire.ActorDescription, parent: int = 0, actor_id: int = 0) -> Entry:
        entry = Entry(actor_id or self.world.new_id(), description, parent)
        defaults = blueprints.BY_ID.get(description.id)
        if defaults is not None:
            entry.attributes = {a.id: a.value for a in defaults.attributes}
        entry.attributes.update((a.id, a.value) for a in description.attributes)
        self.actors[entry.id] = entry
        return entry

    def _place(self, entry: Entry) -> Transform:
        """Where an actor is in the world, in the protocol's units."""
        if entry.kind >= 0:
            x, y, yaw = self._pose(entry.id)
            return Transform(Vector3D(x, y, 0.0), Rotation(0.0, float(wrapped_degrees(yaw)), 0.0))
        if not entry.parent:
            return entry.transform
        x0, y0, heading = self._pose(entry.parent)
        (x, y, z), (pitch, yaw, roll) = entry.transform
        cos, sin = math.cos(heading), math.sin(heading)
        turned = float(wrapped_degrees(heading + math.radians(yaw)))
        return Transform(Vector3D(x0 + cos * x - sin * y, y0 + sin * x + cos * y, z), Rotation(pitch, turned, roll))

    def _pose(self, vehicle: int) -> tuple[float, float, float]:
        """x, y (m) and yaw (rad) of a vehicle."""
        row = self.world.vehicle(vehicle)
        return float(row["x"]), float(row["y"]), float(row["yaw"])

    def _actor(self, entry: Entry) -> wire.Actor:
        box, tags = wire.BoundingBox(actor_id=entry.id), b""
        if entry.kind >= 0:
            kind = KINDS[entry.kind]
            box, tags = blueprints.bounding_box(kind, entry.id), blueprints.semantic_tags(kind)
        token = wire.token(entry.stream, self.streaming_port) if entry.stream else b""
        return wire.Actor(entry.id, entry.parent, entry.description, box, tags, token)

    def _entry(self, actor_id: int) -> Entry:
        try:
            return self.actors[actor_id]
        except KeyError:
            raise CallFailed(f"no actor has the id {actor_id}") from None

    def _vehicle(self, actor_id: int) -> Entry:
        entry = self._entry(actor_id)
        if entry.kind < 0:
            raise CallFailed(f"actor {actor_id} ({entry.description.id}) is no vehicle")
        return entry

    def _remove(self, entry: Entry) -> None:
        del self.actors[entry.id]
        self.streams.pop(entry.stream, None)
        for child in [e for e in self.actors.values() if e.parent == entry.id]:
            self._remove(child)
        for vehicle in entry.traffic:
            if vehicle in self.actors:
                self._remove(self.actors[vehicle])
        if entry.kind >= 0:
            self.world.destroy(entry.id)

    def _spawn_vehicle(self, description: wire.ActorDescription, transform: Transform) -> Entry:
        kind = blueprints.KIND_INDEX[description.id]
        color = next((a.value for a in description.attributes if a.id == "color"), None)
        (x, y, _), (_, yaw, _) = transform
        try:
            actor_id = self.world.spawn_vehicle(kind, x, y, math.radians(yaw), None if color is None else _color(color))
        except SpawnCollision:
            raise CallFailed("Spawn failed because of collision at spawn position") from None
        entry = self._add(description, actor_id=actor_id)
        entry.kind = kind
        return entry

    def _spawn_sensor(self, description: wire.ActorDescription, transform: Transform, parent: int) -> Entry:
        if parent:
            self._vehicle(parent)
        elif description.id != blueprints.RGB:
            raise CallFailed(f"{description.id} must be attached to a vehicle")
        entry = self._add(description, parent)
        entry.transform = transform
        try:
            if description.id == blueprints.RGB:
                self._aim(entry)
                entry.sensor_tick = _number(entry, "sensor_tick", 0.0, 3600.0)
        except CallFailed:
            del self.actors[entry.id]
            raise
        if description.id != blueprints.LANE_INVASION:  # that one is the client's own computation
            entry.stream = entry.id + wire.WORLD_STREAM
            self.streams[entry.stream] = entry.id
        return entry

    def _aim(self, entry: Entry) -> None:
        (x, y, z), angles = entry.transform
        pitch, yaw, roll = map(math.radians, angles)
        entry.fov = _number(entry, "fov", 1.0, 170.0)
        entry.camera = Camera(
            parent=entry.parent,
            x=x,
            y=y,
            z=z,
            pitch=pitch,
            yaw=yaw,
            roll=roll,
            width=int(_number(entry, "image_size_x", 1, blueprints.MAX_IMAGE_SIDE)),
            height=int(_number(entry, "image_size_y", 1, blueprints.MAX_IMAGE_SIDE)),
            fov=entry.fov,
        )

    def _spawn_traffic(self, description: wire.ActorDescription) -> Entry:
        for other in self.actors.values():
            if other.description.id == blueprints.HIGHWAY_TRAFFIC:
                raise CallFailed(f"traffic controller {other.id} already fills the road; destroy it first")
        entry = self._add(description)
        try:
            seed = int(_number(entry, "seed", 0, 2**63 - 1))
            count = int(_number(entry, "vehicles", 0, blueprints.MAX_TRAFFIC))
            hero = int(_number(entry, "hero", 0, 2**32 - 1))
            if hero:
                self._vehicle(hero)
            entry.traffic = self.world.spawn_traffic(seed, count, hero or None)
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

    def _spawn(self, description: wire.ActorDescription, transform: Transform, parent: int) -> Entry:
        _check_place(transform)
        if description.id in blueprints.KIND_INDEX:
            if parent:
                raise CallFailed("a vehicle cannot be attached to another actor")
            return self._spawn_vehicle(description, transform)
        if description.id == blueprints.HIGHWAY_TRAFFIC:
            return self._spawn_traffic(description)
        if description.id in blueprints.BY_ID:
            return self._spawn_sensor(description, transform, parent)
        raise CallFailed(f"this simulator has no blueprint {description.id!r}")

    @rpc
    def spawn_actor(self, description: wire.ActorDescription, transform: Transform) -> wire.Actor:
        """Make a vehicle, a free camera or the traffic."""
        return self._actor(self._spawn(description, transform, 0))

    @rpc
    def spawn_actor_with_parent(
        self,
        description: wire.ActorDescription,
        transform: Transform,
        parent: int,
        attachment: int,
        socket: str,
    ) -> wire.Actor:
        """Make a sensor on a vehicle; every attachment is rigid here."""
        return self._actor(self._spawn(description, transform, parent))

    @rpc
    def destroy_actor(self, actor_id: int) -> bool:
        """Remove an actor, the sensors it carries and, of a traffic controller, its vehicles."""
        entry = self._entry(actor_id)
        if entry is self.spectator:
            raise CallFailed("the spectator cannot be destroyed")
        self._remove(entry)
        return True

    @rpc
    def get_actors_by_id(self, ids: list[int]) -> list[wire.Actor]:
        """The known ones among ``ids``."""
        return [self._actor(self.actors[i]) for i in ids if i in self.actors]

    @rpc
    def get_spectator(self) -> wire.Actor:
        """The free camera of CARLA's own window; here only a pose to set and get."""
        return self._actor(self.spectator)

    @rpc
    def set_actor_transform(self, actor_id: int, transform: Transform) -> None:
        """Put an actor somewhere; a sensor with a parent moves relative to it."""
        entry = self._entry(actor_id)
        _check_place(transform)
        if entry.kind >= 0:
            (x, y, _), (_, yaw, _) = transform
            self.world.place(actor_id, x, y, math.radians(yaw))
            return
        entry.transform = transform
        if entry.camera is not None:
            self._aim(entry)

    @rpc
    def set_actor_location(self, actor_id: int, location: Vector3D) -> None:
        """Put an actor somewhere without turning it."""
        entry = self._entry(actor_id)
        rotation = self._place(entry).rotation if entry.kind >= 0 else entry.transform.rotation
        self.set_actor_transform(actor_id, Transform(location, rotation))

    @rpc
    def set_actor_target_velocity(self, actor_id: int, velocity: Vector3D) -> None:
        """Give a vehicle a speed at once: the component along its heading."""
        self._vehicle(actor_id)
        _check_speed(velocity)
        self.world.set_target_velocity(actor_id, velocity.x, velocity.y)

    @rpc
    def enable_actor_constant_velocity(self, actor_id: int, velocity: Vector3D) -> None:
        """Hold a velocity given in the vehicle's frame."""
        _check_speed(velocity)
        self._vehicle(actor_id).constant_velocity = velocity

    @rpc
    def disable_actor_constant_velocity(self, actor_id: int) -> None:
        """Leave the vehicle to its controls again."""
        self._vehicle(actor_id).constant_velocity = None

    @rpc
    def set_actor_simulate_physics(self, actor_id: int, enabled: bool) -> None:
        """Accepted without effect, for gone actors too: the Traffic Manager's thread dies of an error here."""

    @rpc
    def set_actor_enable_gravity(self, actor_id: int, enabled: bool) -> None:
        """Accepted without effect: the ground is flat and vehicles stay on it."""

    @rpc
    def get_actor_bounding_box(self, actor_id: int) -> wire.BoundingBox:
        """A vehicle's box, an empty one for what has none or is gone (the Traffic Manager must get an answer)."""
        entry = self.actors.get(actor_id)
        return wire.BoundingBox(actor_id=actor_id) if entry is None else self._actor(entry).box

    @rpc
    def apply_control_to_vehicle(self, actor_id: int, control: wire.VehicleControl) -> None:
        """Set pedals and wheels until the next call; values beyond their range are cut."""
        self._vehicle(actor_id)
        throttle, steer, brake, hand_brake, reverse, *_ = control
        self.world.set_control(actor_id, throttle, steer, brake, hand_brake, reverse)

    @rpc
    def get_physics_control(self, actor_id: int) -> wire.VehiclePhysics:
        """What was applied last, else the kind's own values."""
        entry = self._vehicle(actor_id)
        if entry.physics is not None:
            return entry.physics
        return blueprints.physics(KINDS[entry.kind], *self._pose(actor_id))

    @rpc
    def apply_physics_control(self, actor_id: int, control: wire.VehiclePhysics) -> None:
        """Kept for get_physics_control; the bicycle model has no parameters to take from it."""
        self._vehicle(actor_id).physics = control

    @rpc
    def get_vehicle_light_state(self, actor_id: int) -> tuple[int]:
        """Light flags: those a client set, and the brake light while the vehicle brakes."""
        return (self._lights(self._vehicle(actor_id)),)

    @rpc
    def set_vehicle_light_state(self, actor_id: int, state: tuple[int]) -> None:
        """Keep light flags."""
        self._vehicle(actor_id).lights = state[0]

    @rpc
    def get_vehicle_light_states(self) -> list[tuple[int, int]]:
        """Ids and light flags of all vehicles."""
        return [(e.id, self._lights(e)) for e in self.actors.values() if e.kind >= 0]

    def _lights(self, entry: Entry) -> int:
        return entry.lights | (BRAKE_LIGHT if self.world.vehicle(entry.id)["brake_light"] else 0)

    # -------------------------------------------------------------------------------------------------- world

    @rpc
    def version(self) -> str:
        """The protocol's version, which is the only one the client must have."""
        return wire.VERSION

    @rpc
    def get_episode_info(self) -> tuple[int, tuple[bytes]]:
        """Episode id and the token of the world state's stream."""
        return self.number, (wire.token(wire.WORLD_STREAM, self.streaming_port),)

    @rpc
    def get_episode_settings(self) -> tuple[Any, ...]:
        """The settings in wire form."""
        return wire.settings_to_wire(self.settings)

    @rpc
    def set_episode_settings(self, settings: wire.EpisodeSettings) -> int:
        """Take the settings; returns the present frame, whose state is out already."""
        delta = settings.fixed_delta
        if delta is not None and not 0.0 <= delta <= MAX_DELTA:
            raise CallFailed(f"fixed_delta_seconds must be between 0 and {MAX_DELTA}, not {delta}")
        self.settings = settings
        return self.world.frame

    @rpc
    def get_available_maps(self) -> list[str]:
        """The one map there is."""
        return [f"/Game/Carla/Maps/{MAP_NAME}"]

    @rpc
    def get_map_info(self) -> tuple[str, list[Transform]]:
        """Name of the map and its spawn points."""
        points = self.world.road.spawn_points
        return f"Carla/Maps/{MAP_NAME}", [
            Transform(Vector3D(x, y, SPAWN_HEIGHT), Rotation(0.0, math.degrees(yaw), 0.0))
            for x, y, yaw in points.tolist()
        ]

    @rpc
    def get_map_data(self) -> str:
        """The map as OpenDRIVE text."""
        return self.world.road.opendrive()

    @rpc
    def get_required_files(self, folder: str) -> list[str]:
        """None: there is nothing to download."""
        return []

    @rpc
    def get_navigation_mesh(self) -> bytes:
        """None: there are no pedestrians."""
        return b""

    @rpc
    def get_actor_definitions(self) -> tuple[wire.ActorDefinition, ...]:
        """The blueprint library."""
        return blueprints.DEFINITIONS

    @rpc
    def get_weather_parameters(self) -> wire.Weather:
        """The weather last set."""
        return self.weather

    @rpc
    def set_weather_parameters(self, weather: wire.Weather) -> None:
        """Keep the weather and paint with the palette nearest to it."""
        self.weather = weather
        self.world.palette = [p.name for p in PALETTES].index(palette_of(weather))

    @rpc
    def query_lights_state(self, client: str) -> list[Any]:
        """No street lamps."""
        return []

    @rpc
    def draw_debug_shape(self, shape: Any) -> None:
        """Accepted and not drawn: cameras show the world only."""

    @rpc
    def reset_all_traffic_lights(self) -> None:
        """There are none."""

    @rpc
    def is_traffic_manager_running(self, port: int) -> bool:
        """Whether a client registered a Traffic Manager for this port."""
        return port in self.traffic_managers

    @rpc
    def get_traffic_manager_running(self, port: int) -> tuple[str, int]:
        """Address of the Traffic Manager registered for this port, ("", 0) without one."""
        return self.traffic_managers.get(port, ("", 0))

    @rpc
    def add_traffic_manager_running(self, address: tuple[str, int]) -> bool:
        """Register a Traffic Manager; a later one takes the place of one whose client has died."""
        self.traffic_managers[address[1]] = address
        return True

    @rpc
    def destroy_traffic_manager(self, port: int) -> bool:
        """Forget a Traffic Manager."""
        return self.traffic_managers.pop(port, None) is not None

    # ------------------------------------------------------------------------------------------------ batches

    def apply_batch(self, commands: Any, depth: int = 0) -> list[Any]:
        """Run batch commands; a list of envelopes, one a command: the actor's id, or why it failed."""
        if type(commands) is not list:
            raise CallFailed("apply_batch: expected an array of commands")
        return [self._command(command, depth) for command in commands]

    def _command(self, command: Any, depth: int) -> Any:
        try:
            match command:
                case [[0, payload]]:
                    return wire.value(self._spawn_command(_SPAWN(payload), depth))
                case [[16 | 17, [int(actor_id), bool()]]]:  # autopilot and its display are the client's business
                    return wire.value(self._entry(actor_id).id)
                case [[18, [int(actor_id), int(flags)]]]:
                    self.set_vehicle_light_state(actor_id, (flags,))
                    return wire.value(actor_id)
                case [[int(kind), [int(actor_id), *arguments]]] if kind in _COMMANDS:
                    self._entry(actor_id)
                    call(self, _COMMANDS[kind], [actor_id, *arguments])
                    return wire.value(actor_id)
                case [[int(kind), _]]:
                    raise CallFailed(f"batch command {kind} is not implemented by this simulator")
            raise CallFailed(f"not a batch command: {command!r:.60}")
        except (CallFailed, wire.ProtocolError) as error:
            return wire.value_error(str(error))

    def _spawn_command(self, command: wire.SpawnCommand, depth: int) -> int:
        if depth == NESTED_BATCHES:
            raise CallFailed(f"batch commands are nested more than {NESTED_BATCHES} deep")
        actor_id = self._spawn(command.description, command.transform, command.parent or 0).id
        following = []
        for later in command.then:
            match later:
                case [[int(kind), [0, *rest]]] if kind != 0:
                    later = [[kind, [actor_id, *rest]]]
            following.append(later)
        self.apply_batch(following, depth + 1)
        return actor_id


_SPAWN = wire.decoder(wire.SpawnCommand)
_COMMANDS = {
    1: "destroy_actor",
    2: "apply_control_to_vehicle",
    5: "apply_physics_control",
    6: "set_actor_transform",
    8: "set_actor_target_velocity",
    14: "set_actor_simulate_physics",
    15: "set_actor_enable_gravity",
    19: "set_actor_location",
}
"""Batch commands whose payload is the arguments of an RPC."""


def call(episode: Episode, name: str, arguments: list[Any]) -> Any:
    """Check the arguments of an RPC and run it; raises CallFailed or ProtocolError."""
    method = METHODS[name]
    if len(arguments) != len(method.arguments):
        raise CallFailed(f"{name} takes {len(method.arguments)} arguments, not {len(arguments)}")
    return method.function(episode, *(d(a) for d, a in zip(method.arguments, arguments, strict=True)))


def answer(episode: Episode, name: str, arguments: list[Any]) -> Any:
    """The envelope with the result or the failure of an RPC in METHODS."""
    returns = METHODS[name].returns
    try:
        result = call(episode, name, arguments)
        return wire.value(result) if returns else wire.done()
    except (CallFailed, wire.ProtocolError) as error:
        message = f"{name}: {error}" if isinstance(error, wire.ProtocolError) else str(error)
    return wire.value_error(message) if returns else wire.void_error(message)


def wrapped_degrees(angle: Any) -> Any:
    """Radians to degrees in [-180, 180)."""
    return (np.degrees(angle) + 180.0) % 360.0 - 180.0


def palette_of(weather: wire.Weather) -> str:
    """Name of the renderer's palette that is nearest to a weather; CARLA's "as the map has it" (-1) is noon."""
    if weather.sun_altitude_angle < -5.0:
        return "dusk"
    if weather.fog_density >= 40.0 or weather.dust_storm >= 50.0:
        return "fog"
    if weather.precipitation >= 30.0:
        return "overcast"
    if 0.0 <= weather.sun_altitude_angle < 25.0:
        return "sunset"
    return "overcast" if weather.cloudiness >= 60.0 else "noon"


def _check_place(transform: Transform) -> None:
    if max(map(abs, transform.location)) > MAX_DISTANCE:
        raise CallFailed(f"positions must be within {MAX_DISTANCE:.0f} m of the origin, not {transform.location}")


def _check_speed(velocity: Vector3D) -> None:
    if max(map(abs, velocity)) > MAX_SPEED:
        raise CallFailed(f"velocities must be within {MAX_SPEED:.0f} m/s, not {velocity}")


def _static(name: str) -> wire.Actor:
    """A part of the map as a collision names it."""
    return wire.Actor(0, 0, wire.ActorDescription(0, name, []), wire.BoundingBox(), b"", b"")


def _color(text: str) -> tuple[int, int, int]:
    try:
        r, g, b = (int(part) for part in text.split(","))
    except ValueError:
        raise CallFailed(f"color must be 'r,g,b', not {text!r:.40}") from None
    if not all(0 <= c <= 255 for c in (r, g, b)):
        raise CallFailed(f"color must be three numbers from 0 to 255, not {text!r:.40}")
    return r, g, b


def _number(entry: Entry, name: str, low: float, high: float) -> float:
    """A numeric attribute within its range."""
    text = entry.attributes[name]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise CallFailed(f"{entry.description.id}: {name} must be between {low} and {high}, not {text!r:.40}")
    return number
