"""What the camera's pixels show, and where the vehicles among it are: a second camera on the same frame."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import carla
import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import CAMERA, IMAGE_SIZE, UNKNOWN_LANE, Neighbour
from carla_digr.driving.session import SensorStream, Session

CAMERA_BLUEPRINT = "sensor.camera.instance_segmentation"
SIZE = 2 * IMAGE_SIZE  # pixels: lane lines are thinner than a pixel of the picture
VEHICLE_LABELS = (12, 13, 14, 15, 16, 17, 18, 19)  # CARLA's, of what moves
_OF_VEHICLES = np.isin(np.arange(256), VEHICLE_LABELS)  # by label
WAITING = 3  # pictures that wait to be asked for
FOLLOWED = 100.0  # m along the ego's lane to a vehicle on another road


class Surroundings(NamedTuple):
    """Of one frame: ``labels`` uint8 (SIZE, SIZE, 3), CARLA's label, low and high byte of the actor's id; and by their
    ids the ``vehicles`` that are among them."""

    labels: NDArray[np.uint8]
    vehicles: dict[int, Neighbour]


class SurroundingsCamera:
    """An instance segmentation camera at the place of the driving task's camera.

    Nothing waits for its pictures: one that comes late, or not at all, is missing and no more.

    Args:
        session: whose server has CAMERA_BLUEPRINT.
        ego: what carries it.
        place: of the camera on it.
    """

    def __init__(self, session: Session, ego: carla.Vehicle, place: carla.Transform):
        self._map, self._ego = session.map, ego.id
        pictures: deque[Any] = deque(maxlen=WAITING)  # alone: the library's thread must not keep the session
        self._pictures = pictures
        blueprint = session.blueprint(CAMERA_BLUEPRINT, image_size_x=SIZE, image_size_y=SIZE, fov=CAMERA["fov"])
        session.listen(session.spawn(blueprint, place, ego), pictures.append)
        self._snapshot: carla.WorldSnapshot | None = None
        self._known: dict[int, tuple[str, tuple[float, float, float]]] = {}  # id -> type and size

    @staticmethod
    def offered(session: Session) -> bool:
        """Whether the server has such a camera."""
        return bool(session.blueprints.filter(CAMERA_BLUEPRINT))

    def meet(self, world: carla.World) -> None:
        """Ask the server what the vehicles are that there are now, and how large."""
        self._known = {}
        for actor in world.get_actors().filter("vehicle.*"):
            half = actor.bounding_box.extent
            self._known[actor.id] = actor.type_id, (2.0 * half.x, 2.0 * half.y, 2.0 * half.z)

    def ticked(self, snapshot: carla.WorldSnapshot) -> None:
        """A new frame has begun."""
        self._snapshot = snapshot

    def take(self) -> Surroundings | None:
        """Those of the present frame, None while its picture has not come; once a frame."""
        snapshot = self._snapshot
        if snapshot is None:
            return None
        for picture in list(self._pictures):
            if picture.frame == snapshot.frame:
                self._snapshot = None
                labels = rgb_of(picture)
                return Surroundings(labels, self._vehicles(labels, snapshot))
        return None

    def _vehicles(self, labels: NDArray[np.uint8], snapshot: carla.WorldSnapshot) -> dict[int, Neighbour]:
        """Of the actors of the frame those that the picture shows; it has the two low bytes of their ids."""
        shown = labels[_OF_VEHICLES[labels[..., 0]]].astype(np.int32)
        low_bytes = set(np.unique(shown[:, 1] | shown[:, 2] << 8).tolist())
        ego = snapshot.find(self._ego)
        if ego is None:
            return {}
        here = ego.get_transform()
        lane = self._map.get_waypoint(here.location)
        return {
            actor.id: self._neighbour(here, lane, actor)
            for actor in snapshot
            if actor.id & 0xFFFF in low_bytes and actor.id != self._ego
        }

    def _neighbour(self, here: carla.Transform, lane: carla.Waypoint, actor: carla.ActorSnapshot) -> Neighbour:
        there = actor.get_transform()
        east, south = there.location.x - here.location.x, there.location.y - here.location.y
        yaw = math.radians(here.rotation.yaw)
        ahead = east * math.cos(yaw) + south * math.sin(yaw)
        right = south * math.cos(yaw) - east * math.sin(yaw)
        turned = math.remainder(math.radians(there.rotation.yaw) - yaw, 2.0 * math.pi)
        kind, size = self._known.get(actor.id, ("", (0.0, 0.0, 0.0)))
        beside = self._lane(lane, there, ahead)
        return Neighbour(ahead, right, beside, turned, actor.get_velocity().length(), size, kind)

    def _lane(self, ours: carla.Waypoint, there: carla.Transform, ahead: float) -> int:
        """Lanes from ours to the right. On one road by the lanes' numbers, which grow from its middle to both sides; on
        another one by how far it is beside our lane's course, if that leads past it."""
        theirs = self._map.get_waypoint(there.location)
        if (theirs.road_id, theirs.section_id) == (ours.road_id, ours.section_id):
            same_way = theirs.lane_id * ours.lane_id > 0
            return abs(theirs.lane_id) - abs(ours.lane_id) if same_way else UNKNOWN_LANE
        if not 0.1 < abs(ahead) <= FOLLOWED:
            return UNKNOWN_LANE
        course = ours.next(ahead) if ahead > 0 else ours.previous(-ahead)
        if not course:
            return UNKNOWN_LANE
        beside = course[0].transform
        turned = math.radians(theirs.transform.rotation.yaw - beside.rotation.yaw)
        if math.cos(turned) < 0.5:  # it goes elsewhere
            return UNKNOWN_LANE
        to_right, across = beside.get_right_vector(), there.location - beside.location
        return round((across.x * to_right.x + across.y * to_right.y) / course[0].lane_width)


class LabelCamera:
    """An instance segmentation camera that may be switched off between pictures, which the embedded highway, where one
    takes its processor's time, does not miss; on a CARLA server the first frames after are lost.

    Args:
        session: owns the tick.
        ego: what carries it.
        place: of the camera on it.
        size: pixels, square.

    Raises:
        UserError: the server has no such camera.
    """

    def __init__(self, session: Session, ego: carla.Vehicle, place: carla.Transform, size: int):
        self._session = session
        blueprint = session.blueprint(CAMERA_BLUEPRINT, image_size_x=size, image_size_y=size, fov=CAMERA["fov"])
        self._sensor = session.spawn(blueprint, place, ego)
        self._stream: SensorStream | None = None

    def switch(self, on: bool) -> None:
        """Have pictures from the next tick on, each to be taken, or none."""
        if on and self._stream is None:
            self._stream = SensorStream(self._session, self._sensor)
        elif not on and self._stream is not None:
            self._sensor.stop()
            self._stream = None

    def poll(self, frame: int, timeout: float) -> carla.Image | None:
        """The picture of a frame, None if it has not come after ``timeout`` seconds or the camera is off."""
        return None if self._stream is None else self._stream.poll(frame, timeout)


def rgb_of(picture: carla.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB view of a copy of a camera's BGRA picture, whose memory is the client library's."""
    bgra = np.frombuffer(picture.raw_data, np.uint8).reshape(picture.height, picture.width, 4).copy()
    return bgra[:, :, 2::-1]
