"""The highway drive over CARLA's protocol: ego, camera, collision sensor and traffic on any 0.9.16 server."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence

import carla
import numpy as np

from carla_digr.driving.car import Car
from carla_digr.driving.contacts import Contacts
from carla_digr.driving.control import (
    CAMERA,
    CRUISE_SPEED,
    EGO_BLUEPRINT,
    IMAGE_SIZE,
    RETRY,
    TICK,
    DriveFrame,
    VehicleCommand,
    pedals,
    signed_speed,
    start_index,
    steering,
)
from carla_digr.driving.highway import far_reaching, highway_points, reach
from carla_digr.driving.lane import lane_curvature, reference_lines
from carla_digr.driving.session import SensorStream, Session, describe
from carla_digr.driving.situation import Situation, Situations
from carla_digr.driving.start import start_in_traffic
from carla_digr.driving.surroundings import LabelCamera, Surroundings, SurroundingsCamera, rgb_of
from carla_digr.driving.traffic import ManagedTraffic, SimulatorTraffic, Traffic
from carla_digr.errors import UserError

log = logging.getLogger(__name__)

WARM_UP_TICKS = 20  # most ticks until the camera's first picture
FILM = {
    "exposure_min_bright": "11",  # equal bounds hold the exposure; the middle of CARLA's own 10 to 12
    "exposure_max_bright": "11",
    "motion_blur_intensity": "0",
    "bloom_intensity": "0",
    "lens_flare_intensity": "0",
}
"""Attributes of the camera that keep a picture from depending on those before it, and on the sun in the lens."""
PLACE = carla.Transform(
    carla.Location(CAMERA["x"], CAMERA["y"], CAMERA["z"]),
    carla.Rotation(pitch=CAMERA["pitch"], yaw=CAMERA["yaw"], roll=CAMERA["roll"]),
)
"""Of the cameras on the ego."""
RUN_OUT = 40.0  # m before the end of a stretch at which its drive ends
WEATHERS = ("ClearNoon", "CloudyNoon", "HardRainNoon", "ClearSunset", "ClearNight", "DustStorm")
"""CARLA's names of those that the embedded highway, too, paints in different ways."""


class Scenario:
    """A :class:`carla_digr.driving.control.Drive` over CARLA's protocol.

    The same seed and commands give the same frames as
    :class:`carla_digr.tasks.driving.drive.InProcessDrive` when the server is the embedded simulator. One ego and one
    camera serve all episodes. Made by :meth:`connect`.
    """

    fov = CAMERA["fov"]
    """Horizontal field of view of the camera, degrees."""
    _again: Callable[[], Scenario]

    def __init__(
        self,
        session: Session,
        points: list[carla.Transform],
        traffic: Traffic,
        surroundings: bool = False,
        picture_ticks: int = 1,
    ):
        self._session = session
        self._picture_ticks = picture_ticks
        self._points = points
        self._traffic = traffic
        session.before_close(traffic.close)
        self._ego = self._spawn_ego()
        self._weather = ""
        self._car: Car | None = None
        """On a server that is not the embedded highway."""
        if isinstance(traffic, ManagedTraffic):
            self._car = Car(self._ego)
            self.change_weather("ClearNoon")
        # Before the camera: the embedded simulator sends a frame's messages in the order its sensors were made.
        self._contacts = Contacts(session, self._ego)
        camera = session.blueprint(
            "sensor.camera.rgb", image_size_x=IMAGE_SIZE, image_size_y=IMAGE_SIZE, fov=CAMERA["fov"]
        )
        for attribute, value in FILM.items():
            if camera.has_attribute(attribute):
                camera.set_attribute(attribute, value)
        if picture_ticks > 1:
            camera.set_attribute("sensor_tick", str(picture_ticks * TICK))
        self._pictures = SensorStream(session, session.spawn(camera, PLACE, self._ego))
        self._surroundings: SurroundingsCamera | None = None
        if surroundings and SurroundingsCamera.offered(session):
            self._surroundings = SurroundingsCamera(session, self._ego, PLACE)
        self._wait_for(self._pictures)
        self._first_picture = session.frame
        self._lines = reference_lines(session.map.to_opendrive())
        for pieces in [pieces for pieces in self._lines.values() if len(pieces)][:1]:
            lane_curvature(pieces, 0.0, 0.0, 0.0)  # loads its compiled code, for which no tick of a drive has the time
        self._last: DriveFrame | None = None
        self._situations = Situations(session, self._ego, self._lines)
        self._height = 0.0  # m, of the ego
        self._left = 0.0
        """m that can still be driven in this episode, where there is a car of its own."""
        self._lane = (0, 0)
        """The road and lane that are so."""
        self._first_frame = 0
        self._at: carla.Waypoint | None = None
        """Of the ego in the frame before, in this episode."""

    @property
    def ego(self) -> carla.Vehicle:
        """The car that is driven."""
        return self._ego

    @property
    def session(self) -> Session:
        """The session with the server."""
        return self._session

    @property
    def seconds(self) -> float:
        """Driven in the present episode, the first frame included."""
        return (self._session.frame - self._first_frame + 1) * TICK

    @classmethod
    def connect(
        cls,
        simulator: str,
        host: str,
        port: int,
        timeout: float = 10.0,
        vehicles: int = 64,
        roads: Sequence[int] = (),
        spawn_points: Sequence[int] = (),
        surroundings: bool = False,
        picture_ticks: int = 1,
    ) -> Scenario:
        """Connect to a server and put ego, camera and collision sensor on its highway.

        Args:
            simulator: "embedded" takes the simulator's own traffic, "carla" the client's Traffic Manager.
            timeout: seconds for connecting and for every later call and tick.
            vehicles: other vehicles (on the embedded highway: on the ego's carriageway).
            roads, spawn_points: where drives start, see :func:`carla_digr.driving.highway.highway_points`.
            surroundings: have them too, where the server has a camera for them.
            picture_ticks: on the embedded highway, frames from one that has a picture of its own to the next, beginning
                with an episode's first; those between have the picture before.

        Raises:
            UserError: as :meth:`Session.connect` and ``highway_points``, or the server lacks what the drive needs.
                Nothing has been spawned when the map has no highway.
        """
        session = Session.connect(host, port, timeout)
        try:
            points = highway_points(session.map, roads, spawn_points)
            if simulator == "carla" and not spawn_points:
                points = far_reaching(session.map, points)
            traffic = SimulatorTraffic if simulator == "embedded" else ManagedTraffic
            scenario = cls(session, points, traffic(session, points, vehicles), surroundings, picture_ticks)
        except BaseException:
            session.close()
            raise
        scenario._again = functools.partial(
            cls.connect, simulator, host, port, timeout, vehicles, roads, spawn_points, surroundings, picture_ticks
        )
        return scenario

    def reconnect(self, patience: float = 60.0) -> Scenario:
        """The same drive anew on the same server, after SimulatorGone: a new connection, a new ego and camera.

        What this one left on a server that only hung is removed.

        Args:
            patience: seconds in which the server must answer again.

        Raises:
            UserError: that of the last try.
        """
        deadline = time.monotonic() + patience
        while True:
            self.close()
            try:
                return self._again()
            except UserError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(RETRY)

    def reset(self, seed: int) -> DriveFrame:
        """Start an episode; see :meth:`carla_digr.driving.control.Drive.reset`.

        Raises:
            SimulatorGone: the simulator does not answer in time.
        """
        point = self._points[start_index(seed, len(self._points))]
        self._at = None
        yaw = math.radians(point.rotation.yaw)
        try:
            self._traffic.clear()
            if self._car is not None:
                self._start(self._car, point, seed)
                return self._first()
            while not self._pictured(self._session.frame + 1):
                self._session.tick()
            self._ego.set_transform(point)
            self._ego.apply_control(carla.VehicleControl())
            self._ego.set_target_velocity(carla.Vector3D(CRUISE_SPEED * math.cos(yaw), CRUISE_SPEED * math.sin(yaw)))
            self._traffic.fill(seed, self._ego, point.location)
        except RuntimeError as error:
            raise self._session.lost(describe(error)) from None
        self._first_frame = self._session.frame + 1
        return self._first()

    def _pictured(self, frame: int) -> bool:
        """Whether the camera sends a picture of that frame."""
        return (frame - self._first_picture) % self._picture_ticks == 0

    def _first(self) -> DriveFrame:
        frame = self._tick()
        if self._surroundings is not None:
            try:
                self._surroundings.meet(self._session.world)
            except RuntimeError as error:
                raise self._session.lost(describe(error)) from None
        return frame

    def step(self, command: VehicleCommand) -> DriveFrame:
        """Apply a command, advance 0.05 s and return the frame.

        Raises:
            SimulatorGone: the simulator does not answer in time.
        """
        speed = self._last.speed if self._last else 0.0
        steer = steering(command, self._curvature() if command.along_lane else 0.0)
        if self._car is not None:
            self._ego.apply_control(self._car.control(command, steer, speed))
        else:
            throttle, brake = pedals(command, speed)
            self._ego.apply_control(carla.VehicleControl(throttle=throttle, steer=steer, brake=brake))
        return self._tick()

    def _curvature(self) -> float:
        """Of the ego's lane in the last frame, 1/m; 0 where the map knows no road."""
        if self._last is None:
            return 0.0
        at = self._session.map.get_waypoint(carla.Location(self._last.x, self._last.y, self._height))
        if at is None or at.road_id not in self._lines:
            return 0.0
        return lane_curvature(self._lines[at.road_id], self._last.x, self._last.y, self._last.yaw)

    @property
    def weather(self) -> str:
        """One of WEATHERS; empty: as the server has it, which gets it back when the drive ends."""
        return self._weather

    def change_weather(self, name: str) -> None:
        """Have one of WEATHERS from the next frame on.

        Raises:
            SimulatorGone: the simulator does not answer in time.
        """
        world = self._session.world
        try:
            if not self._weather:
                found = world.get_weather()
                self._session.before_close(lambda: world.set_weather(found))
            world.set_weather(getattr(carla.WeatherParameters, name))
        except RuntimeError as error:
            raise self._session.lost(describe(error)) from None
        self._weather = name

    @property
    def vehicles(self) -> int:
        """Other vehicles; another number holds from the next episode on."""
        return self._traffic.vehicles

    @vehicles.setter
    def vehicles(self, number: int) -> None:
        self._traffic.vehicles = number

    @property
    def segments(self) -> bool:
        """Whether there is a camera for the surroundings."""
        return self._surroundings is not None

    def surroundings(self) -> Surroundings | None:
        """Those of the present frame, once; None before their picture has come, and without a camera for them."""
        return None if self._surroundings is None else self._surroundings.take()

    def situation(self) -> Situation:
        """Where the ego is on its road and who is around it, in the present frame.

        Raises:
            SimulatorGone: the simulator does not answer in time.
        """
        try:
            return self._situations.of(self._session.world.get_snapshot())
        except RuntimeError as error:
            raise self._session.lost(describe(error)) from None

    def add_label_camera(self, size: int) -> LabelCamera:
        """A camera of what the camera's pixels show, switched on and at work; called between two episodes.

        Args:
            size: pixels, square.

        Raises:
            UserError: the server has no such camera.
            SimulatorGone: the simulator does not answer in time.
        """
        camera = LabelCamera(self._session, self._ego, PLACE, size)
        camera.switch(True)
        self._wait_for(camera)
        return camera

    def others(self) -> list[float]:
        """Speeds (m/s) of the other vehicles in the present frame."""
        vehicles = self._session.world.get_actors().filter("vehicle.*")
        return [vehicle.get_velocity().length() for vehicle in vehicles if vehicle.id != self._ego.id]

    def close(self) -> None:
        """Remove traffic, sensors and ego, restore the server's settings; safe to call twice."""
        self._session.close()

    def __enter__(self) -> Scenario:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tick(self) -> DriveFrame:
        snapshot = self._session.tick()
        if self._surroundings is not None:
            self._surroundings.ticked(snapshot)
        picture = self._last.image if self._last else None
        if picture is None or self._pictured(snapshot.frame):
            picture = rgb_of(self._pictures.take(snapshot.frame))
        ego = snapshot.find(self._ego.id)
        if ego is None:
            raise UserError(f"Somebody destroyed the ego on {self._session.address}; start the drive anew.")
        place, velocity = ego.get_transform(), ego.get_velocity()
        yaw = math.radians(place.rotation.yaw)
        self._height = place.location.z
        try:
            self._traffic.renew(place)
        except RuntimeError as error:
            raise self._session.lost(describe(error)) from None
        contact = self._contacts.take(snapshot, self._first_frame)
        before, self._at = self._at, self._session.map.get_waypoint(place.location)
        right, up = place.get_right_vector(), place.get_up_vector()
        self._last = DriveFrame(
            frame=snapshot.frame,
            stamp=snapshot.timestamp.elapsed_seconds,
            image=picture,
            x=place.location.x,
            y=place.location.y,
            yaw=float(np.float32(yaw)),
            speed=signed_speed(velocity.x, velocity.y, yaw),
            collision=contact.other if contact else None,
            off_road=_off_road(self._at, place.location),
            road_ends=self._road_ends(place, velocity.length()),
            struck=contact is not None and contact.struck and self._car is not None,
            z=place.location.z,
            pitch=math.radians(place.rotation.pitch),
            roll=math.radians(place.rotation.roll),
            yaw_rate=math.radians(ego.get_angular_velocity().z),
            sideways=velocity.x * right.x + velocity.y * right.y + velocity.z * right.z,
            upwards=velocity.x * up.x + velocity.y * up.y + velocity.z * up.z,
            lane_change=0 if before is None else _lane_change(before, self._at),
        )
        return self._last

    def _road_ends(self, place: carla.Transform, speed: float) -> bool:
        """Whether the stretch that can be driven ends here; never on the embedded highway, which is a ring."""
        if self._car is None:
            return False
        at = self._session.map.get_waypoint(place.location)
        self._left -= speed * TICK
        if self._left <= 0.0 or (at.road_id, at.lane_id) != self._lane:  # its lane may end before the one beside it
            self._lane = at.road_id, at.lane_id
            self._left = reach(self._session.map, place).metres - RUN_OUT
        return self._left <= 0.0

    def _start(self, car: Car, point: carla.Transform, seed: int) -> None:
        """Start an episode on a CARLA server, where one call does not."""
        complaints = start_in_traffic(self._session, self._ego, car.physics, self._traffic, point, seed, CRUISE_SPEED)
        for complaint in complaints:
            log.warning("The start of seed %d: %s.", seed, complaint)
        car.reset()
        self._left = 0.0
        self._first_frame = self._session.frame + 1

    def _spawn_ego(self) -> carla.Vehicle:
        blueprint = self._session.blueprint(EGO_BLUEPRINT)
        for point in self._points:
            try:
                return self._session.spawn(blueprint, point)
            except UserError as error:
                failure = error
        raise failure

    def _wait_for(self, pictures: SensorStream | LabelCamera) -> None:
        """Tick until a camera delivers: a subscription may take effect some frames after listen() returned."""
        for _ in range(WARM_UP_TICKS):
            frame = self._session.tick().frame
            if pictures.poll(frame, self._session.timeout / WARM_UP_TICKS) is not None:
                return
        raise self._session.lost(f"its camera sent no picture in {WARM_UP_TICKS} frames")


def _lane_change(before: carla.Waypoint, now: carla.Waypoint) -> int:
    """Lanes to the right from one place to the next; 0 where a road or a section of it ends between them."""
    if (before.road_id, before.section_id) != (now.road_id, now.section_id):
        return 0
    if before.lane_id * now.lane_id < 0:  # over the middle of the road
        return -1
    return abs(now.lane_id) - abs(before.lane_id)


def _off_road(lane: carla.Waypoint, place: carla.Location) -> bool:
    """Whether a place is beside the driving lanes, the nearest of which is ``lane``.

    Not asked with project_to_road=False: within a few centimetres of a border between two lanes the client's map finds
    no lane, or the wrong one of the two.
    """
    right = lane.transform.get_right_vector()
    across = place - lane.transform.location
    offset = across.x * right.x + across.y * right.y
    if abs(offset) <= lane.lane_width / 2.0:
        return False
    neighbour = lane.get_right_lane() if offset > 0.0 else lane.get_left_lane()
    return neighbour is None or neighbour.lane_type != carla.LaneType.Driving
