"""Every sensor of the simulator, decoded by the unmodified CARLA client and held against what is known of the road."""

from __future__ import annotations

import math
import queue

import carla
import numpy as np
import pytest

from carla_digr.driving.session import SensorStream, Session
from carla_digr.errors import SimulatorGone
from carla_digr.simulator import shading
from carla_digr.simulator.renderer import camera_axes
from carla_digr.simulator.road import MEDIAN_HALF_WIDTH, RAIL_OFFSET, ROAD_EDGE, Road
from carla_digr.simulator.vehicle import BUS, CAR, KINDS, TRUCK, VAN
from carla_digr.simulator.world import Camera, World

ROAD = Road.ring()
EGO = "vehicle.tesla.model3"
LABEL = {CAR: 14, VAN: 14, TRUCK: 15, BUS: 16}
STATIC = {  # CARLA's CityObjectLabel
    shading.ID_SKY: 11,
    shading.ID_ROAD: 1,
    shading.ID_LINE: 24,
    shading.ID_BARRIER: 28,
    shading.ID_RAIL: 28,
    shading.ID_VEGETATION: 9,
    shading.ID_BUILDING: 3,
    shading.ID_SIGN: 8,
    shading.ID_TERRAIN: 10,
}
FAR = 1000.0


def pixels(image: carla.Image) -> np.ndarray:
    return np.frombuffer(image.raw_data, np.uint8).reshape(image.height, image.width, 4).astype(np.int64)


def distances(image: carla.Image) -> np.ndarray:
    """Metres along the optical axis in a depth camera's picture."""
    blue, green, red = (pixels(image)[..., i] for i in range(3))
    return (red + 256 * green + 65536 * blue) / (2**24 - 1) * FAR


def listen(session: Session, kind: str, transform: carla.Transform, parent=None, **attributes) -> SensorStream:
    sensor = session.spawn(session.blueprint(f"sensor.{kind}", **attributes), transform, parent)
    return SensorStream(session, sensor)


def convert(image: carla.Image, how: carla.ColorConverter) -> np.ndarray:
    image.convert(how)
    return pixels(image)


MOUNTS = [
    (carla.Transform(carla.Location(-9.5, 0.0, 4.2), carla.Rotation(pitch=-9.0)), 128, 128, 48.0),
    (carla.Transform(carla.Location(0.4, -0.3, 1.5), carla.Rotation(pitch=4.0, yaw=-70.0, roll=25.0)), 201, 90, 110.0),
    (carla.Transform(carla.Location(0.0, 0.0, 60.0), carla.Rotation(pitch=-90.0, yaw=10.0)), 64, 150, 60.0),
]


@pytest.mark.parametrize(("mount", "width", "height", "fov"), MOUNTS, ids=["chase", "side", "above"])
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "free"])
def test_the_four_cameras_agree_with_the_world_in_process_pixel_by_pixel(session, mount, width, height, fov, attached):
    """The same vehicles in this process: pictures, ids and depths must be those that came over the wire."""
    points = session.map.get_spawn_points()
    here, ids = World(), {}
    first = 20
    for i, kind in enumerate(KINDS):
        point = points[first + i // 4 * 4 + i % 4]
        actor = session.spawn(session.blueprint(kind.blueprint, color="200,30,90"), point)
        yaw = math.radians(point.rotation.yaw)
        ids[here.spawn_vehicle(i, point.location.x, point.location.y, yaw, (200, 30, 90))] = actor.id
    ego = next(iter(ids))
    row = here.vehicle(ego)
    place = mount
    if not attached:
        x, y, yaw = float(row.x), float(row.y), float(row.yaw)
        a, b, c, s = mount.location.x, mount.location.y, math.cos(yaw), math.sin(yaw)
        turn = carla.Rotation(mount.rotation.pitch, mount.rotation.yaw + math.degrees(yaw), mount.rotation.roll)
        place = carla.Transform(carla.Location(x + c * a - s * b, y + s * a + c * b, mount.location.z), turn)
    parent = session.world.get_actor(ids[ego]) if attached else None
    size = {"image_size_x": width, "image_size_y": height, "fov": fov}
    rgb, semantic, instance, depth = (
        listen(session, f"camera.{kind}", place, parent, **size)
        for kind in ("rgb", "semantic_segmentation", "instance_segmentation", "depth")
    )
    angles = map(math.radians, (place.rotation.pitch, place.rotation.yaw, place.rotation.roll))
    where = place.location
    camera = Camera(ego if attached else 0, where.x, where.y, where.z, *angles, width, height, fov)
    frame = session.tick().frame
    here.step()

    np.testing.assert_array_equal(pixels(rgb.take(frame)), here.render(camera))
    seen = here.instances(camera)
    expected = np.vectorize(lambda i: ids.get(i, -i))(seen)
    label = np.vectorize(lambda i: STATIC[i] if i <= 0 else LABEL[KINDS[here.vehicle(i)["kind"]].body])(seen)
    picture = pixels(instance.take(frame))
    np.testing.assert_array_equal(picture[..., 1] + 256 * picture[..., 0], expected)
    np.testing.assert_array_equal(picture[..., 2], label)
    image = semantic.take(frame)
    np.testing.assert_array_equal(pixels(image)[..., 2], label)
    metres = np.minimum(here.depths(camera).astype(float), FAR)
    image = depth.take(frame)
    picture = pixels(image)
    np.testing.assert_allclose(
        (picture[..., 2] + 256 * picture[..., 1] + 65536 * picture[..., 0]) / (2**24 - 1) * FAR,
        metres,
        atol=FAR / 2**24,
    )
    # CARLA's own converters read them the same way.
    grey = convert(image, carla.ColorConverter.Depth)[..., 0]
    np.testing.assert_allclose(grey, metres / FAR * 255, atol=1.0)


def test_the_palette_of_the_client_knows_every_label(session):
    ego = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[30])
    chase, width, height, fov = MOUNTS[0]
    semantic = listen(
        session, "camera.semantic_segmentation", chase, ego, image_size_x=width, image_size_y=height, fov=fov
    )
    image = semantic.take(session.tick().frame)
    labels = pixels(image)[..., 2]
    colors = convert(image, carla.ColorConverter.CityScapesPalette)[..., 2::-1]
    # Cityscapes' own colours of road, car, sky and terrain.
    for label, color in ((1, (128, 64, 128)), (14, (0, 0, 142)), (11, (70, 130, 180)), (10, (152, 251, 152))):
        assert (labels == label).sum() > 100
        assert (colors[labels == label] == color).all()


def test_a_depth_picture_measures_the_road(session):
    """Straight down, forward and rolled: known distances to the ground, to a wall of the barrier and to a truck."""
    high = carla.Transform(carla.Location(-20.0, 9.2, 25.0), carla.Rotation(pitch=-90.0))
    down = listen(session, "camera.depth", high, image_size_x=40, image_size_y=30, fov=20)
    truck = next(k for k in KINDS if k.body == TRUCK)
    standing = session.map.get_spawn_points()[0]
    session.spawn(session.blueprint(truck.blueprint), standing)
    x, y, yaw = (float(v) for v in ROAD.spawn_points[0])
    eye = (x - 30.0 * math.cos(yaw), y - 30.0 * math.sin(yaw), 1.2)
    behind = carla.Transform(carla.Location(*eye), carla.Rotation(yaw=math.degrees(yaw), roll=30.0))
    ahead = listen(session, "camera.depth", behind, image_size_x=41, image_size_y=41, fov=10)
    frame = session.tick().frame

    np.testing.assert_allclose(distances(down.take(frame)), 25.0, atol=1e-4)
    picture = distances(ahead.take(frame))
    assert picture[20, 20] == pytest.approx(30.0 - truck.length / 2, abs=0.01)
    # The ground in every pixel that shows it, under a rolled camera.
    axes = camera_axes(0.0, yaw, math.radians(30.0))
    offset = (np.arange(41) + 0.5 - 20.5) / (20.5 / math.tan(math.radians(5.0)))
    fall = axes[0, 2] + offset[None, :] * axes[1, 2] - offset[:, None] * axes[2, 2]
    ground = -eye[2] / np.where(fall < 0, fall, np.nan)
    near = ground < 30.0 - truck.length / 2 - 0.5
    assert near.sum() > 40
    np.testing.assert_allclose(picture[near], ground[near], atol=1e-4)


def test_labels_lie_on_the_road_where_the_map_has_it(session):
    """From above, each column of pixels is one lateral offset of the straight road."""
    x, y, yaw = (float(v) for v in ROAD.spawn_points[1])
    _, d, _ = ROAD.project(x, y)
    height, size, fov = 60.0, 400, 40.0
    spot = carla.Location(x - float(d) * -math.sin(yaw), y - float(d) * math.cos(yaw), height)  # over the barrier
    place = carla.Transform(spot, carla.Rotation(pitch=-90.0, yaw=math.degrees(yaw)))
    stream = listen(session, "camera.semantic_segmentation", place, image_size_x=size, image_size_y=60, fov=fov)
    labels = pixels(stream.take(session.tick().frame))[..., 2]
    scale = height / (size / 2 / math.tan(math.radians(fov / 2)))  # m a pixel on the ground
    across = (np.arange(size) + 0.5 - size / 2) * scale

    def columns(low: float, high: float) -> np.ndarray:
        return labels[:, (across > low) & (across < high)]

    assert (columns(-0.25, 0.25) == 28).all()
    for edge in (MEDIAN_HALF_WIDTH, ROAD_EDGE):
        assert (labels[:, np.abs(np.abs(across) - edge) < 0.5 * scale] == 24).any()
    assert (columns(MEDIAN_HALF_WIDTH + 0.3, MEDIAN_HALF_WIDTH + 3.3) == 1).all()
    assert (columns(RAIL_OFFSET + 0.8, RAIL_OFFSET + 2.0) != 1).all()


def test_an_inertial_unit_feels_gravity_pedals_and_curves(session):
    ego = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[2])
    level = listen(session, "other.imu", carla.Transform(), ego)
    nose_up = listen(session, "other.imu", carla.Transform(rotation=carla.Rotation(pitch=90.0)), ego)
    frame = session.tick().frame
    reading = level.take(frame)
    assert (reading.accelerometer.x, reading.accelerometer.y) == pytest.approx((0.0, 0.0), abs=1e-5)
    assert reading.accelerometer.z == pytest.approx(9.81)
    turned = nose_up.take(frame)
    assert turned.accelerometer.x == pytest.approx(9.81)
    assert turned.accelerometer.z == pytest.approx(0.0, abs=1e-5)

    ego.set_target_velocity(carla.Vector3D(20.0 * math.cos(0), 0.0, 0.0))
    ego.apply_control(carla.VehicleControl(throttle=1.0, steer=0.02))
    session.tick()
    session.tick()
    snapshot = session.tick()
    reading = level.take(snapshot.frame)
    state = snapshot.find(ego.id)
    yaw, rate = math.radians(state.get_transform().rotation.yaw), math.radians(state.get_angular_velocity().z)
    acceleration = state.get_acceleration()
    assert rate > 0.05
    assert reading.gyroscope.z == pytest.approx(rate, rel=1e-4)
    assert reading.accelerometer.x == pytest.approx(
        acceleration.x * math.cos(yaw) + acceleration.y * math.sin(yaw), rel=1e-4
    )
    assert reading.accelerometer.x > 1.0
    assert reading.accelerometer.y == pytest.approx(rate * ego.get_velocity().length(), rel=0.05)
    assert reading.compass == pytest.approx(yaw + math.pi / 2, abs=1e-5)  # north is -y


def test_a_satellite_receiver_agrees_with_the_map(session):
    for point in session.map.get_spawn_points()[::20]:
        ego = session.spawn(session.blueprint(EGO), point)
        stream = listen(session, "other.gnss", carla.Transform(carla.Location(1.0, 0.5, 2.0)), ego)
        reading = stream.take(session.tick().frame)
        expected = session.map.transform_to_geolocation(reading.transform.location)
        assert reading.latitude == pytest.approx(expected.latitude, abs=1e-9)
        assert reading.longitude == pytest.approx(expected.longitude, abs=1e-9)
        assert reading.altitude == pytest.approx(2.0)
        assert reading.latitude == pytest.approx(49.0, abs=0.02)


def test_noise_is_drawn_from_its_seed(session):
    ego = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[2])
    noisy = {"noise_accel_stddev_x": 0.5, "noise_gyro_bias_z": 0.1}
    streams = [listen(session, "other.imu", carla.Transform(), ego, noise_seed=s, **noisy) for s in (3, 3, 4)]
    frames = [session.tick().frame for _ in range(30)]
    a, b, c = ([stream.take(frame) for frame in frames] for stream in streams)
    assert [r.accelerometer.x for r in a] == [r.accelerometer.x for r in b]
    assert [r.accelerometer.x for r in a] != [r.accelerometer.x for r in c]
    assert 0.2 < np.std([r.accelerometer.x for r in a]) < 1.0
    assert [r.gyroscope.z for r in a] == pytest.approx([0.1] * len(frames))
    assert [r.accelerometer.y for r in a] == pytest.approx([0.0] * len(frames))
    with pytest.raises(Exception, match="noise_accel_stddev_x must be between"):
        listen(session, "other.imu", carla.Transform(), ego, noise_accel_stddev_x=-1.0)


def test_cameras_rest_while_rendering_is_off(session):
    rgb = listen(session, "camera.rgb", carla.Transform(carla.Location(0, 5, 4)), image_size_x=32, image_size_y=32)
    rgb.take(session.tick().frame)
    settings = session.world.get_settings()
    settings.no_rendering_mode = True
    session.world.apply_settings(settings)
    session.frame = session.world.get_snapshot().frame
    for _ in range(3):
        dark = session.tick().frame
    settings.no_rendering_mode = False
    session.world.apply_settings(settings)
    session.frame = session.world.get_snapshot().frame
    session.tick()
    with pytest.raises(SimulatorGone, match=f"skipped frame {dark}"):
        rgb.take(dark)
    session.gone = False


WEATHERS = {
    "ClearNoon": "noon",
    "CloudyNoon": "overcast",
    "WetNoon": "noon",
    "WetCloudyNoon": "overcast",
    "MidRainyNoon": "overcast",
    "HardRainNoon": "overcast",
    "SoftRainNoon": "overcast",
    "ClearSunset": "sunset",
    "CloudySunset": "sunset",
    "HardRainSunset": "overcast",
    "ClearNight": "dusk",
    "CloudyNight": "dusk",
    "HardRainNight": "dusk",
    "DustStorm": "fog",
    "Default": "noon",
}
"""Presets of CARLA and the palette each is painted with."""


def test_every_weather_preset_has_its_picture(session):
    place = carla.Transform(carla.Location(0, 5, 4))
    rgb = listen(session, "camera.rgb", place, image_size_x=96, image_size_y=64)
    pictures: dict[str, np.ndarray] = {}
    presets = {name: getattr(carla.WeatherParameters, name) for name in WEATHERS}
    fog = carla.WeatherParameters(cloudiness=20.0, sun_altitude_angle=60.0, fog_density=70.0)
    for name, weather in [*presets.items(), ("a fog", fog)]:
        session.world.set_weather(weather)
        picture = pixels(rgb.take(session.tick().frame))
        palette = WEATHERS.get(name, "fog")
        np.testing.assert_array_equal(picture, pictures.setdefault(palette, picture), name)
    session.world.set_weather(presets["Default"])
    assert set(pictures) == {"noon", "overcast", "sunset", "fog", "dusk"}
    for a in pictures:
        for b in pictures:
            assert a == b or np.abs(pictures[a] - pictures[b])[..., :3].mean() > 6.0, (a, b)


def test_lane_invasions_come_from_the_clients_own_map(session):
    """No stream: the client compares the vehicle's corners with the OpenDRIVE marks, solid ones too."""
    ego = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[2])
    sensor = session.spawn(session.blueprint("sensor.other.lane_invasion"), carla.Transform(), ego)
    events: queue.SimpleQueue = queue.SimpleQueue()
    session.listen(sensor, events.put)
    session.tick()
    ego.set_target_velocity(carla.Vector3D(20.0, 0.0, 0.0))
    ego.apply_control(carla.VehicleControl(steer=0.03, throttle=0.2))
    kinds = []
    for _ in range(80):
        frame = session.tick().frame
        while not events.empty():
            event = events.get()
            assert event.frame <= frame
            kinds += [(mark.type, mark.color) for mark in event.crossed_lane_markings]
    assert (carla.LaneMarkingType.Broken, carla.LaneMarkingColor.White) in kinds
    assert (carla.LaneMarkingType.Solid, carla.LaneMarkingColor.White) in kinds


def test_sensor_tick_thins_the_pictures(session):
    place = carla.Transform(carla.Location(0, 5, 4))
    pictures = listen(session, "camera.rgb", place, image_size_x=32, image_size_y=32, sensor_tick=0.2)
    frames = [session.tick().frame for _ in range(12)]
    got = [frame for frame in frames if frame in {frames[0], frames[4], frames[8]}]
    assert [pictures.take(frame).frame for frame in got] == got


def test_collisions_name_the_other_and_carry_an_impulse(session):
    ego = session.spawn(session.blueprint(EGO), session.map.get_spawn_points()[0])
    ahead = carla.Transform(carla.Location(20.0, 3.8, 0.5))
    truck = session.spawn(session.blueprint("vehicle.carlamotors.european_hgv"), ahead)
    sensor = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), ego)
    events: queue.SimpleQueue = queue.SimpleQueue()
    session.listen(sensor, events.put)
    ego.set_target_velocity(carla.Vector3D(20.0, 0.0, 0.0))
    for _ in range(15):
        session.tick()
    event = events.get(timeout=10)
    assert (event.actor.id, event.other_actor.id) == (ego.id, truck.id)
    assert event.other_actor.type_id == truck.type_id
    assert abs(event.normal_impulse.x) > 1000.0
    ego.set_transform(carla.Transform(carla.Location(-60.0, 2.0, 0.5), carla.Rotation(yaw=-20)))
    session.tick()
    while not events.empty():
        events.get()
    ego.apply_control(carla.VehicleControl(throttle=1.0))
    names = set()
    for _ in range(60):
        session.tick()
        while not events.empty():
            names.add(events.get().other_actor.type_id)
    assert names == {"static.barrier"}
