"""The calls of CARLA's RPC protocol on an Episode, but for those of walkers and of the recorder."""

from __future__ import annotations

import math
from typing import Any

from carla_digr.simulator import blueprints, queries, streaming, walkers, wire
from carla_digr.simulator.entries import CallFailed, Entry
from carla_digr.simulator.episode import Episode, check_place
from carla_digr.simulator.palette import PALETTES
from carla_digr.simulator.road import MAP_NAME
from carla_digr.simulator.rpc import rpc
from carla_digr.simulator.vehicle import KINDS, MAX_STEER
from carla_digr.simulator.wire import Transform, Vector3D

MIN_DELTA, MAX_DELTA = 1e-6, 60.0  # s; rates over a still shorter step would not fit the protocol's 32 bits
MAX_SPIN = 720.0  # deg/s
MAX_SPEED = 150.0  # m/s; faster velocities are refused
REAR_WHEELS = 2  # the first number of one
BRAKE_LIGHT = 8  # bit of VehicleLightState
MAX_HOST = 255  # characters of a host's name


@rpc
def spawn_actor(episode: Episode, description: wire.ActorDescription, transform: Transform) -> wire.Actor:
    """Make a vehicle, a free camera or the traffic."""
    return episode.actor(episode.spawn(description, transform, 0))


@rpc
def spawn_actor_with_parent(
    episode: Episode,
    description: wire.ActorDescription,
    transform: Transform,
    parent: int,
    attachment: int,
    socket: str,
) -> wire.Actor:
    """Make a sensor on a vehicle or on another actor; every attachment is rigid here."""
    return episode.actor(episode.spawn(description, transform, parent))


@rpc
def destroy_actor(episode: Episode, actor_id: int) -> bool:
    """Remove an actor and, of a traffic controller, its vehicles; what it carries stays where it is, as with CARLA."""
    entry = episode.entry(actor_id)
    if entry is episode.spectator:
        raise CallFailed("the spectator cannot be destroyed")
    episode.remove(entry)
    return True


@rpc
def get_actors_by_id(episode: Episode, ids: list[int]) -> list[wire.Actor]:
    """The known ones among ``ids``, each once."""
    return [episode.actor(episode.actors[i]) for i in dict.fromkeys(ids) if i in episode.actors]


@rpc
def get_spectator(episode: Episode) -> wire.Actor:
    """The free camera of CARLA's own window; here only a pose to set and get."""
    return episode.actor(episode.spectator)


@rpc
def set_actor_transform(episode: Episode, actor_id: int, transform: Transform) -> None:
    """Put an actor somewhere; a sensor with a parent moves relative to it."""
    entry = episode.entry(actor_id)
    check_place(transform)
    if entry.kind >= 0:
        episode.put(entry, transform)
        return
    entry.transform = transform
    episode.aim(entry)


@rpc
def set_actor_location(episode: Episode, actor_id: int, location: Vector3D) -> None:
    """Put an actor somewhere without turning it."""
    entry = episode.entry(actor_id)
    rotation = episode.place(entry).rotation if entry.kind >= 0 else entry.transform.rotation
    set_actor_transform(episode, actor_id, Transform(location, rotation))


@rpc
def set_actor_target_velocity(episode: Episode, actor_id: int, velocity: Vector3D) -> None:
    """Give a vehicle a speed at once: the component along its heading."""
    episode.vehicle(actor_id)
    _check_speed(velocity)
    episode.world.set_target_velocity(actor_id, velocity.x, velocity.y)


@rpc
def add_actor_impulse(episode: Episode, actor_id: int, impulse: Vector3D) -> None:
    """Change a vehicle's speed at once by the part of an impulse (N s) along its heading."""
    mass = KINDS[episode.vehicle(actor_id).kind].mass
    row = episode.world.vehicle(actor_id)
    faster = Vector3D(row["vx"] + impulse.x / mass, row["vy"] + impulse.y / mass)
    set_actor_target_velocity(episode, actor_id, faster)


@rpc
def add_actor_force(episode: Episode, actor_id: int, force: Vector3D) -> None:
    """Push a vehicle with a force (N) for one frame."""
    add_actor_impulse(episode, actor_id, Vector3D(*(part * episode.delta for part in force)))


@rpc
def set_actor_target_angular_velocity(episode: Episode, actor_id: int, velocity: Vector3D) -> None:
    """Turn a vehicle about its vertical axis (deg/s) for one frame: then its tyres have the road again."""
    entry = episode.vehicle(actor_id)
    if abs(velocity.z) > MAX_SPIN:
        raise CallFailed(f"vehicles turn at most {MAX_SPIN:.0f} deg/s, not {velocity.z:g}")
    episode.spin(entry, math.radians(velocity.z))


@rpc
def add_actor_angular_impulse(episode: Episode, actor_id: int, impulse: Vector3D) -> None:
    """Turn a vehicle for one frame by an angular impulse (kg m2 deg/s), its mass spread evenly over its box."""
    entry = episode.vehicle(actor_id)
    kind = KINDS[entry.kind]
    inertia = kind.mass * (kind.length**2 + kind.width**2) / 12.0
    turn = math.degrees(entry.spin) + impulse.z / inertia
    set_actor_target_angular_velocity(episode, actor_id, Vector3D(0.0, 0.0, turn))


@rpc
def add_actor_torque(episode: Episode, actor_id: int, torque: Vector3D) -> None:
    """Turn a vehicle by a torque that lasts a frame. (Client 0.9.16 sends Actor.add_torque as an angular impulse.)"""
    add_actor_angular_impulse(episode, actor_id, Vector3D(*(part * episode.delta for part in torque)))


@rpc
def set_actor_collisions(episode: Episode, actor_id: int, enabled: bool) -> None:
    """Let everything pass through a vehicle or prop, or not.

    Walkers are hit all the same: their controllers switch it off when they start, and CARLA on again at a hit.
    """
    entry = episode.entry(actor_id)
    if entry.kind >= 0:
        episode.world.vehicle(actor_id)["ghost"] = not enabled
    entry.solid = enabled or walkers.is_walker(entry)


@rpc
def enable_actor_constant_velocity(episode: Episode, actor_id: int, velocity: Vector3D) -> None:
    """Hold a velocity given in the vehicle's frame."""
    _check_speed(velocity)
    episode.vehicle(actor_id).constant_velocity = velocity


@rpc
def disable_actor_constant_velocity(episode: Episode, actor_id: int) -> None:
    """Leave the vehicle to its controls again."""
    episode.vehicle(actor_id).constant_velocity = None


@rpc
def set_actor_simulate_physics(episode: Episode, actor_id: int, enabled: bool) -> None:
    """Without physics only transforms move a vehicle; gone actors too, or the Traffic Manager's thread dies of it."""
    entry = episode.actors.get(actor_id)
    if entry is not None and entry.kind >= 0:
        entry.held = not enabled


@rpc
def set_actor_enable_gravity(episode: Episode, actor_id: int, enabled: bool) -> None:
    """Accepted without effect: the ground is flat and vehicles stay on it."""


@rpc
def get_actor_bounding_box(episode: Episode, actor_id: int) -> wire.BoundingBox:
    """A vehicle's box, an empty one for what has none or is gone (the Traffic Manager must get an answer)."""
    entry = episode.actors.get(actor_id)
    return wire.BoundingBox(actor_id=actor_id) if entry is None else episode.actor(entry).box


@rpc
def apply_control_to_vehicle(episode: Episode, actor_id: int, control: wire.VehicleControl) -> None:
    """Set pedals and wheels until the next call; values beyond their range are cut."""
    entry = episode.vehicle(actor_id)
    entry.ackermann = None
    episode.control(entry, control)


@rpc
def apply_ackermann_control_to_vehicle(episode: Episode, actor_id: int, control: wire.AckermannControl) -> None:
    """Hold a speed and a wheel angle until the next control.

    The embedded vehicles answer to their pedals at once, so the target is met as fast as they and its limits allow,
    without a controller; jerk has no meaning for them.
    """
    speed = min(max(control.speed, -MAX_SPEED), MAX_SPEED)
    steer = min(max(control.steer, -math.pi), math.pi)
    episode.vehicle(actor_id).ackermann = control._replace(speed=speed, steer=steer)


@rpc
def get_ackermann_controller_settings(episode: Episode, actor_id: int) -> wire.AckermannSettings:
    """What was applied last, else CARLA's own values."""
    return episode.vehicle(actor_id).ackermann_settings


@rpc
def apply_ackermann_controller_settings(episode: Episode, actor_id: int, settings: wire.AckermannSettings) -> None:
    """Kept for get_ackermann_controller_settings; there is no controller to take them."""
    episode.vehicle(actor_id).ackermann_settings = settings


@rpc
def get_physics_control(episode: Episode, actor_id: int) -> wire.VehiclePhysics:
    """What was applied last, else the kind's own values."""
    return episode.physics(episode.vehicle(actor_id))


@rpc
def apply_physics_control(episode: Episode, actor_id: int, control: wire.VehiclePhysics) -> None:
    """Kept for get_physics_control; the bicycle model has no parameters to take from it."""
    episode.vehicle(actor_id).physics = control


@rpc
def get_vehicle_light_state(episode: Episode, actor_id: int) -> tuple[int]:
    """Light flags: those a client set, and the brake light while the vehicle brakes."""
    return (_lights(episode, episode.vehicle(actor_id)),)


@rpc
def set_vehicle_light_state(episode: Episode, actor_id: int, state: tuple[int]) -> None:
    """Keep light flags."""
    if not 0 <= state[0] < 2**32:
        raise CallFailed(f"light flags are 32 bits, not {state[0]}")
    episode.vehicle(actor_id).lights = state[0]


@rpc
def get_vehicle_light_states(episode: Episode) -> list[tuple[int, int]]:
    """Ids and light flags of all vehicles."""
    return [(e.id, _lights(episode, e)) for e in episode.actors.values() if e.kind >= 0]


def _lights(episode: Episode, entry: Entry) -> int:
    return entry.lights | (BRAKE_LIGHT if episode.world.vehicle(entry.id)["brake_light"] else 0)


@rpc
def version(episode: Episode) -> str:
    """The protocol's version, which is the only one the client must have."""
    return wire.VERSION


@rpc
def get_episode_info(episode: Episode) -> tuple[int, tuple[bytes]]:
    """Episode id and the token of the world state's stream."""
    return episode.number, (streaming.token(streaming.WORLD_STREAM, episode.streaming_port),)


@rpc
def get_episode_settings(episode: Episode) -> tuple[Any, ...]:
    """The settings in wire form."""
    return wire.settings_to_wire(episode.settings)


@rpc
def set_episode_settings(episode: Episode, settings: wire.EpisodeSettings) -> int:
    """Take the settings; returns the present frame, whose state is out already."""
    delta = settings.fixed_delta
    if delta and not MIN_DELTA <= delta <= MAX_DELTA:
        raise CallFailed(f"fixed_delta_seconds must be 0 or between {MIN_DELTA} and {MAX_DELTA}, not {delta}")
    episode.settings = settings
    return episode.world.frame


@rpc
def get_available_maps(episode: Episode) -> list[str]:
    """The one map there is."""
    return [f"/Game/Carla/Maps/{MAP_NAME}"]


@rpc
def get_map_info(episode: Episode) -> tuple[str, list[Transform]]:
    """Name of the map and its spawn points."""
    return f"Carla/Maps/{MAP_NAME}", episode.spawn_points()


@rpc
def get_map_data(episode: Episode) -> str:
    """The map as OpenDRIVE text."""
    return episode.opendrive()


@rpc
def get_actor_definitions(episode: Episode) -> tuple[wire.ActorDefinition, ...]:
    """The blueprint library."""
    return episode.definitions


@rpc
def get_environment_objects(episode: Episode, label: wire.U8) -> list[wire.EnvironmentObject]:
    """Houses, gantries, trees, barrier and guard rails with a label, or all of them."""
    return queries.environment(episode.world, label)


@rpc
def get_names_of_all_objects(episode: Episode) -> list[str]:
    """Names of the same things."""
    return [thing.name for thing in queries.environment(episode.world, queries.ANY)]


@rpc
def get_all_level_BBs(episode: Episode, label: wire.U8) -> list[wire.BoundingBox]:
    """Boxes in the world of the same things, of vehicles, walkers and props."""
    boxes = [thing.box for thing in queries.environment(episode.world, label)]
    for entry in episode.actors.values():
        told = episode.actor(entry)
        if told.tags and label in (queries.ANY, *told.tags):
            (x, y, z), (_, yaw, _) = episode.place(entry)
            foot = z + told.box.center.z - told.box.extent.z
            boxes.append(queries.box(x, y, math.radians(yaw), foot, told.box.extent))
    return boxes


@rpc
def project_point(
    episode: Episode, location: Vector3D, direction: Vector3D, distance: float
) -> tuple[bool, wire.LabelledPoint]:
    """The first surface in a direction, as cameras see it, and whether there is one."""
    hit = queries.project(episode.world, location, direction, distance)
    return hit is not None, hit or wire.LabelledPoint()


@rpc
def cast_ray(episode: Episode, start: Vector3D, end: Vector3D) -> list[wire.LabelledPoint]:
    """The surfaces between two points, as cameras see them."""
    return queries.cast(episode.world, start, end)


@rpc
def get_telemetry_data(episode: Episode, actor_id: int) -> wire.VehicleTelemetry:
    """What the bicycle model has of a vehicle's mechanics; it slips nowhere, and its engine is in the highest gear."""
    entry = episode.vehicle(actor_id)
    return blueprints.telemetry(episode.world.vehicle(actor_id), episode.physics(entry))


@rpc
def get_wheel_steer_angle(episode: Episode, actor_id: int, wheel: wire.U8) -> float:
    """Degrees to the right: of front wheels, 0 and 1, what the control asks for; rear wheels, 2 and 3, do not turn."""
    episode.vehicle(actor_id)
    return float(episode.world.vehicle(actor_id)["steer"]) * math.degrees(MAX_STEER) if wheel < REAR_WHEELS else 0.0


@rpc
def get_weather_parameters(episode: Episode) -> wire.Weather:
    """The weather last set."""
    return episode.weather


@rpc
def set_weather_parameters(episode: Episode, weather: wire.Weather) -> None:
    """Keep the weather and paint with the palette nearest to it."""
    episode.weather = weather
    episode.world.palette = [p.name for p in PALETTES].index(palette_of(weather))


@rpc
def query_lights_state(episode: Episode, client: str) -> list[Any]:
    """No street lamps."""
    return []


@rpc
def draw_debug_shape(episode: Episode, shape: Any) -> None:
    """Accepted and not drawn: cameras show the world only."""


@rpc
def reset_all_traffic_lights(episode: Episode) -> None:
    """There are none."""


@rpc
def is_traffic_manager_running(episode: Episode, port: int) -> bool:
    """Whether a client registered a Traffic Manager for this port."""
    return port in episode.traffic_managers


@rpc
def get_traffic_manager_running(episode: Episode, port: int) -> tuple[str, int]:
    """Address of the Traffic Manager registered for this port, ("", 0) without one."""
    return episode.traffic_managers.get(port, ("", 0))


@rpc
def add_traffic_manager_running(episode: Episode, address: tuple[str, wire.U16]) -> bool:
    """Register a Traffic Manager; a later one takes the place of one whose client has died."""
    if len(address[0]) > MAX_HOST:
        raise CallFailed(f"a host's name has at most {MAX_HOST} characters, not {len(address[0])}")
    episode.traffic_managers[address[1]] = address
    return True


@rpc
def destroy_traffic_manager(episode: Episode, port: int) -> bool:
    """Forget a Traffic Manager."""
    return episode.traffic_managers.pop(port, None) is not None


def palette_of(weather: wire.Weather) -> str:
    """Name of the renderer's palette that is nearest to a weather; a sun at -1, "as the map has it", stands at noon."""
    sun = 45.0 if weather.sun_altitude_angle == -1.0 else weather.sun_altitude_angle
    if sun < -5.0:
        return "dusk"
    if weather.fog_density >= 40.0 or weather.dust_storm >= 50.0:
        return "fog"
    if weather.precipitation >= 30.0:
        return "overcast"
    if sun < 25.0:
        return "sunset"
    return "overcast" if weather.cloudiness >= 60.0 else "noon"


def _check_speed(velocity: Vector3D) -> None:
    if max(map(abs, velocity)) > MAX_SPEED:
        raise CallFailed(f"velocities must be within {MAX_SPEED:.0f} m/s, not {velocity}")
