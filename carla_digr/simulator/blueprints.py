"""The blueprint library the embedded highway shows to CARLA clients."""

from __future__ import annotations

import math

import numpy as np

from carla_digr.simulator import wire
from carla_digr.simulator.shapes import SHAPES, WALKER
from carla_digr.simulator.vehicle import BUS, CAR, DRAG, KINDS, MAX_STEER, TRUCK, VAN, VehicleKind
from carla_digr.simulator.wire import BOOL, COLOR, FLOAT, INT, STRING, ActorDefinition, Attribute, Vector3D

RGB = "sensor.camera.rgb"
SEMANTIC = "sensor.camera.semantic_segmentation"
INSTANCE = "sensor.camera.instance_segmentation"
DEPTH = "sensor.camera.depth"
NORMALS = "sensor.camera.normals"
COSMOS = "sensor.camera.cosmos_visualization"
FLOW = "sensor.camera.optical_flow"
DVS = "sensor.camera.dvs"
IMU = "sensor.other.imu"
GNSS = "sensor.other.gnss"
LIDAR = "sensor.lidar.ray_cast"
SEMANTIC_LIDAR = "sensor.lidar.ray_cast_semantic"
RADAR = "sensor.other.radar"
COLLISION = "sensor.other.collision"
LANE_INVASION = "sensor.other.lane_invasion"
HIGHWAY_TRAFFIC = "controller.traffic.highway"
"""Not a blueprint of CARLA's: spawning it fills the ring with the world's own drivers, destroying it removes them."""

GRAVITY = 9.81  # m/s2
STAND_INS = {
    "vehicle.lincoln.mkz_2017": "vehicle.lincoln.mkz_2020",
    "vehicle.mini.cooper_s_2021": "vehicle.mini.cooper_s",
    "vehicle.nissan.patrol": "vehicle.nissan.patrol_2021",
    "vehicle.nissan.micra": "vehicle.audi.a2",
    "vehicle.citroen.c3": "vehicle.audi.a2",
    "vehicle.seat.leon": "vehicle.mini.cooper_s",
    "vehicle.toyota.prius": "vehicle.tesla.model3",
    "vehicle.audi.etron": "vehicle.nissan.patrol_2021",
    "vehicle.audi.tt": "vehicle.tesla.model3",
    "vehicle.bmw.grandtourer": "vehicle.tesla.model3",
    "vehicle.chevrolet.impala": "vehicle.lincoln.mkz_2020",
    "vehicle.dodge.charger_2020": "vehicle.lincoln.mkz_2020",
    "vehicle.dodge.charger_police": "vehicle.lincoln.mkz_2020",
    "vehicle.dodge.charger_police_2020": "vehicle.lincoln.mkz_2020",
    "vehicle.ford.crown": "vehicle.lincoln.mkz_2020",
    "vehicle.ford.mustang": "vehicle.lincoln.mkz_2020",
    "vehicle.jeep.wrangler_rubicon": "vehicle.nissan.patrol_2021",
    "vehicle.mercedes.coupe": "vehicle.lincoln.mkz_2020",
    "vehicle.mercedes.coupe_2020": "vehicle.lincoln.mkz_2020",
    "vehicle.ford.ambulance": "vehicle.mercedes.sprinter",
    "vehicle.volkswagen.t2_2021": "vehicle.volkswagen.t2",
    "vehicle.carlamotors.firetruck": "vehicle.carlamotors.european_hgv",
}
"""Other vehicles of CARLA's catalogue, and whose body and mechanics they have here. They have no base_type: who draws
vehicles by it draws those that are what they are called."""
WALKERS = tuple(f"walker.pedestrian.{i:04d}" for i in range(1, 53))
WALKER_CONTROLLER = "controller.ai.walker"
PROPS = tuple(name for name in SHAPES if name != WALKER)
FIGURES = dict.fromkeys(WALKERS, WALKER) | {name: name for name in PROPS}
"""Walkers and props, and the shape that each has."""

MAX_IMAGE_SIDE = 2048  # px
MAX_TRAFFIC = 400  # vehicles one traffic controller may ask for

_BODY = {CAR: "car", VAN: "van", TRUCK: "truck", BUS: "bus"}
_LABEL = {CAR: 14, VAN: 14, TRUCK: 15, BUS: 16}
LABELS = np.array([_LABEL[kind.body] for kind in KINDS], np.uint8)
"""CARLA's CityObjectLabel of each kind of vehicle."""
_WHEEL_RADIUS = {CAR: 35.0, VAN: 37.0, TRUCK: 50.0, BUS: 50.0}  # cm

# What CARLA's cameras offer beyond size, fov and tick, with its defaults. Accepted and without effect here: the
# embedded renderer has no lens and no film.
_LENS = (
    ("lens_circle_falloff", "5.0"),
    ("lens_circle_multiplier", "0.0"),
    ("lens_k", "-1.0"),
    ("lens_kcube", "0.0"),
    ("lens_x_size", "0.08"),
    ("lens_y_size", "0.08"),
)
_FILM = (
    ("bloom_intensity", "0.675"),
    ("lens_flare_intensity", "0.1"),
    ("motion_blur_intensity", "0.45"),
    ("motion_blur_max_distortion", "0.35"),
    ("motion_blur_min_object_screen_size", "0.1"),
    ("gamma", "2.2"),
    ("shutter_speed", "200.0"),
    ("iso", "100.0"),
    ("fstop", "1.4"),
    ("min_fstop", "1.2"),
    ("exposure_compensation", "0.0"),
    ("exposure_min_bright", "10.0"),
    ("exposure_max_bright", "12.0"),
    ("exposure_speed_up", "3.0"),
    ("exposure_speed_down", "1.0"),
    ("calibration_constant", "16.0"),
    ("focal_distance", "1000.0"),
    ("blur_amount", "1.0"),
    ("blur_radius", "0.0"),
    ("slope", "0.88"),
    ("toe", "0.55"),
    ("shoulder", "0.26"),
    ("black_clip", "0.0"),
    ("white_clip", "0.04"),
    ("temp", "6500.0"),
    ("tint", "0.0"),
    ("chromatic_aberration_intensity", "0.0"),
    ("chromatic_aberration_offset", "0.0"),
)


def _fixed(name: str, kind: int, value: str) -> Attribute:
    return Attribute(name, kind, value, modifiable=False)


def _vehicle(kind: VehicleKind, name: str = "") -> tuple[str, str, tuple[Attribute, ...]]:
    colors = tuple(",".join(map(str, c)) for c in kind.colors)
    attributes = (
        _fixed("base_type", STRING, "" if name else _BODY[kind.body]),
        _fixed("special_type", STRING, ""),
        _fixed("object_type", STRING, ""),
        _fixed("number_of_wheels", INT, "4"),
        _fixed("generation", INT, "2"),
        _fixed("has_lights", BOOL, "true"),
        _fixed("has_dynamic_doors", BOOL, "false"),
        Attribute("color", COLOR, colors[0], colors),
        Attribute("role_name", STRING, "autopilot", ("autopilot", "scenario", "ego_vehicle")),
        Attribute("sticky_control", BOOL, "true"),
        Attribute("terramechanics", BOOL, "false"),
    )
    name = name or kind.blueprint
    return name, name.replace(".", ","), attributes


KIND_INDEX = {kind.blueprint: i for i, kind in enumerate(KINDS)}
KIND_INDEX |= {name: KIND_INDEX[kind] for name, kind in STAND_INS.items()}


def _definitions() -> tuple[ActorDefinition, ...]:
    role = Attribute("role_name", STRING, "default")
    tick = Attribute("sensor_tick", FLOAT, "0.0")
    camera = (
        role,
        Attribute("image_size_x", INT, "800"),
        Attribute("image_size_y", INT, "600"),
        Attribute("fov", FLOAT, "90.0"),
        tick,
        *(Attribute(name, FLOAT, value) for name, value in _LENS),
    )
    film = (
        Attribute("enable_postprocess_effects", BOOL, "true"),
        Attribute("exposure_mode", STRING, "histogram", ("histogram", "manual"), restricted=True),
        Attribute("blade_count", INT, "5"),
        *(Attribute(name, FLOAT, value) for name, value in _FILM),
    )
    noise = Attribute("noise_seed", INT, "0")
    inertial = [f"noise_{part}_{axis}" for part in ("accel_stddev", "gyro_stddev", "gyro_bias") for axis in "xyz"]
    satellite = [f"noise_{quantity}_{part}" for quantity in ("alt", "lat", "lon") for part in ("stddev", "bias")]
    beams = (
        role,
        tick,
        Attribute("channels", INT, "32"),
        Attribute("range", FLOAT, "10.0"),
        Attribute("points_per_second", INT, "56000"),
        Attribute("rotation_frequency", FLOAT, "10.0"),
        Attribute("upper_fov", FLOAT, "10.0"),
        Attribute("lower_fov", FLOAT, "-30.0"),
        Attribute("horizontal_fov", FLOAT, "360.0"),
    )
    echo = (
        Attribute("atmosphere_attenuation_rate", FLOAT, "0.004"),
        Attribute("dropoff_general_rate", FLOAT, "0.45"),
        Attribute("dropoff_intensity_limit", FLOAT, "0.8"),
        Attribute("dropoff_zero_intensity", FLOAT, "0.4"),
        Attribute("noise_stddev", FLOAT, "0.0"),
        noise,
    )
    events = (
        Attribute("positive_threshold", FLOAT, "0.3"),
        Attribute("negative_threshold", FLOAT, "0.3"),
        Attribute("sigma_positive_threshold", FLOAT, "0.0"),
        Attribute("sigma_negative_threshold", FLOAT, "0.0"),
        Attribute("refractory_period_ns", INT, "0"),
        Attribute("use_log", BOOL, "true"),
        Attribute("log_eps", FLOAT, "0.001"),
    )
    cone = (
        role,
        tick,
        Attribute("horizontal_fov", FLOAT, "30.0"),
        Attribute("vertical_fov", FLOAT, "30.0"),
        Attribute("range", FLOAT, "100.0"),
        Attribute("points_per_second", INT, "1500"),
    )
    traffic = (
        role,
        Attribute("seed", INT, "0"),
        Attribute("vehicles", INT, "64"),
        Attribute("oncoming", INT, "24"),
        Attribute("hero", INT, "0"),
    )
    walker = (
        role,
        _fixed("gender", STRING, "female"),
        _fixed("age", STRING, "adult"),
        _fixed("generation", INT, "2"),
        Attribute("is_invincible", BOOL, "true"),
        Attribute("speed", FLOAT, "1.4", ("0.0", "1.4", "2.5")),
    )
    rows = [
        *map(_vehicle, KINDS),
        (RGB, "sensor,camera,rgb", camera + film),
        (SEMANTIC, "sensor,camera,semantic_segmentation", camera),
        (INSTANCE, "sensor,camera,instance_segmentation", camera),
        (DEPTH, "sensor,camera,depth", camera),
        (IMU, "sensor,other,imu", (role, tick, noise, *(Attribute(name, FLOAT, "0.0") for name in inertial))),
        (GNSS, "sensor,other,gnss", (role, tick, noise, *(Attribute(name, FLOAT, "0.0") for name in satellite))),
        (LIDAR, "sensor,lidar,ray_cast", beams + echo),
        (SEMANTIC_LIDAR, "sensor,lidar,ray_cast_semantic", beams),
        (COLLISION, "sensor,other,collision", (role,)),
        (LANE_INVASION, "sensor,other,lane_invasion", (role,)),
        (HIGHWAY_TRAFFIC, "controller,traffic,highway", traffic),
        *(_vehicle(KINDS[KIND_INDEX[kind]], name) for name, kind in STAND_INS.items()),
        *((name, name.replace(".", ","), walker) for name in WALKERS),
        *((name, name.replace(".", ","), (role, _fixed("size", STRING, "medium"))) for name in PROPS),
        (WALKER_CONTROLLER, "controller,ai,walker", (role,)),
        *((name, name.replace(".", ","), camera) for name in (NORMALS, COSMOS, FLOW)),
        (DVS, "sensor,camera,dvs", camera + film + events),
        (RADAR, "sensor,other,radar", cone),
    ]
    return tuple(
        ActorDefinition(i, name, tags, tuple(map(_with_recommendation, attributes)))
        for i, (name, tags, attributes) in enumerate(rows, start=1)
    )


def _with_recommendation(attribute: Attribute) -> Attribute:
    """As on CARLA, the default of what can be set is its first recommended value."""
    if attribute.recommended or not attribute.modifiable:
        return attribute
    return attribute._replace(recommended=(attribute.value,))


DEFINITIONS = _definitions()
BY_ID = {definition.id: definition for definition in DEFINITIONS}


def bounding_box(kind: VehicleKind, actor_id: int) -> wire.BoundingBox:
    """The vehicle's box; its origin is on the ground, so the centre is half a height up."""
    extent = Vector3D(kind.length / 2, kind.width / 2, kind.height / 2)
    return wire.BoundingBox(Vector3D(0.0, 0.0, kind.height / 2), extent, wire.Rotation(), actor_id)


def figure_box(name: str, actor_id: int) -> wire.BoundingBox:
    """The box of a walker, whose origin is its middle, or of a prop, whose origin is its foot."""
    shape = SHAPES[FIGURES[name]]
    extent = Vector3D(shape.half_length, shape.half_width, shape.height / 2)
    center = Vector3D() if name in WALKERS else Vector3D(0.0, 0.0, extent.z)
    return wire.BoundingBox(center, extent, wire.Rotation(), actor_id)


def semantic_tags(kind: VehicleKind) -> bytes:
    """CARLA's semantic label of the vehicle, one byte."""
    return bytes([_LABEL[kind.body]])


def physics(kind: VehicleKind, x: float, y: float, yaw: float) -> wire.VehiclePhysics:
    """CARLA's description of the vehicle's mechanics at a pose (m, rad).

    Mass, wheel positions (cm, world) and the largest wheel angle are the kind's own; the rest are CARLA's defaults,
    for scripts that read and write them back: the bicycle model has no engine curve and no tyres.
    """
    wheels = []
    for forward in (kind.wheelbase / 2, -kind.wheelbase / 2):
        for right in (-kind.width / 2 + 0.12, kind.width / 2 - 0.12):
            position = Vector3D(
                100.0 * (x + forward * math.cos(yaw) - right * math.sin(yaw)),
                100.0 * (y + forward * math.sin(yaw) + right * math.cos(yaw)),
                _WHEEL_RADIUS[kind.body],
            )
            front = forward > 0.0
            wheels.append(
                wire.Wheel(
                    tire_friction=3.5,
                    damping_rate=0.25,
                    max_steer_angle=math.degrees(MAX_STEER) if front else 0.0,
                    radius=_WHEEL_RADIUS[kind.body],
                    max_brake_torque=1500.0,
                    max_handbrake_torque=0.0 if front else 3000.0,
                    lat_stiff_max_load=3.0,
                    lat_stiff_value=20.0,
                    long_stiff_value=3000.0,
                    position=position,
                )
            )
    return wire.VehiclePhysics(
        torque_curve=[(0.0, 400.0), (1000.0, 500.0), (5000.0, 300.0)],
        max_rpm=5000.0,
        moi=1.0,
        damping_full_throttle=0.15,
        damping_clutch_engaged=2.0,
        damping_clutch_disengaged=0.35,
        use_gear_autobox=True,
        gear_switch_time=0.5,
        clutch_strength=10.0,
        final_ratio=4.0,
        forward_gears=[(2.85, 0.5, 0.65), (1.6, 0.5, 0.65), (1.0, 0.5, 0.65)],
        mass=kind.mass,
        drag_coefficient=0.3,
        center_of_mass=Vector3D(),
        steering_curve=[(0.0, 1.0), (120.0, 1.0)],
        wheels=wheels,
        use_sweep_wheel_collision=False,
    )


def telemetry(vehicle: np.void, physics: wire.VehiclePhysics) -> wire.VehicleTelemetry:
    """What wheels and engine do, from a row of the world's table: forces are shared evenly by the wheels."""
    speed, yaw = float(vehicle["speed"]), float(vehicle["yaw"])
    ax, ay = float(vehicle["ax"]), float(vehicle["ay"])
    share = physics.mass / len(physics.wheels)
    along, across = share * (ax * math.cos(yaw) + ay * math.sin(yaw)), share * (ay * math.cos(yaw) - ax * math.sin(yaw))
    load = share * GRAVITY
    wheels = []
    for wheel in physics.wheels:
        radius = wheel.radius / 100.0
        wheels.append(
            wire.WheelTelemetry(
                tire_friction=wheel.tire_friction,
                omega=speed / radius,
                tire_load=load,
                normalized_tire_load=1.0,
                torque=along * radius,
                long_force=along,
                lat_force=across,
                normalized_long_force=along / load,
                normalized_lat_force=across / load,
            )
        )
    turns = abs(wheels[0].omega) * 60.0 / (2.0 * math.pi) * physics.final_ratio * physics.forward_gears[-1][0]
    return wire.VehicleTelemetry(
        speed=abs(speed),
        steer=float(vehicle["steer"]),
        throttle=float(vehicle["throttle"]),
        brake=float(vehicle["brake"]),
        engine_rpm=min(turns, physics.max_rpm),
        gear=-1 if vehicle["reverse"] else 1,
        drag=physics.mass * DRAG * speed * speed,
        wheels=wheels,
    )
