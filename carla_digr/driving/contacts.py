"""What the ego touches, and who drove into whom."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import carla

from carla_digr.driving.session import Session

GROUND = tuple(f"static.{name}" for name in ("road", "roadline", "ground", "sidewalk", "terrain", "bridge"))
"""What a car stands on: a CARLA server tells contacts with it that are no accident; who leaves the road is off_road."""
REMEMBERED = 8  # frames in which a contact that comes late still finds its own


class Contact(NamedTuple):
    """The first incident of a frame."""

    other: str
    """Type of what was touched."""
    struck: bool
    """Whether the other drove into the ego, not the ego into it."""


class Contacts:
    """A collision sensor on the ego and the frames around its contacts.

    Args:
        session: owns the tick.
        ego: what carries the sensor.
    """

    def __init__(self, session: Session, ego: carla.Vehicle):
        self._ego = ego
        self._snapshots: deque[carla.WorldSnapshot] = deque(maxlen=REMEMBERED)
        self._world = session.world
        events: deque[tuple[int, int, str]] = deque(maxlen=100)
        self._events = events  # alone: the library's thread must not keep the drive
        sensor = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), ego)
        session.listen(
            sensor, lambda event: events.append((event.frame, event.other_actor.id, event.other_actor.type_id))
        )

    def take(self, snapshot: carla.WorldSnapshot, since: int) -> Contact | None:
        """What was hit in the frames from ``since`` on and not taken yet, None: nothing; once a frame.

        Contacts come on their own connection. The embedded simulator sends them before pictures and state, and the
        client handles messages in the order they come in: what a frame touched is known with its picture. Where a
        server or a network changes the order, a contact that comes late is told with the next frame.
        """
        self._snapshots.append(snapshot)
        found = None
        while self._events:
            frame, other, kind = self._events.popleft()
            if found is None and frame >= since and kind not in GROUND:
                found = Contact(kind, self._struck(frame, other))
        return found

    def _struck(self, frame: int, other: int) -> bool:
        """Whether the other one drove into the ego, by the last frame before they touched."""
        before = next((s for s in reversed(self._snapshots) if s.frame < frame), None)
        if before is None or not other:
            return False
        ego, theirs = before.find(self._ego.id), before.find(other)
        actor = self._world.get_actor(other)
        if ego is None or theirs is None or not isinstance(actor, carla.Vehicle):
            return False
        return struck(_body(ego, self._ego), _body(theirs, actor))


class Body(NamedTuple):
    """A car as seen from above: place (m), velocity (m/s), direction of its nose, half its length and width (m)."""

    place: carla.Location
    velocity: carla.Vector3D
    forward: carla.Vector3D
    half: carla.Vector3D


def _body(state: carla.ActorSnapshot, actor: carla.Vehicle) -> Body:
    place = state.get_transform()
    return Body(place.location, state.get_velocity(), place.get_forward_vector(), actor.bounding_box.extent)


def struck(ego: Body, other: Body) -> bool:
    """Whether the other one drives into the ego: it comes nearer by its own motion more than the ego does by its.

    Args:
        ego, other: just before they touch. What counts is the motion across the gap between them: along the ego's
            length where one is before the other, along its width where they are side by side. Whoever changes lanes
            into a car beside it is to blame, and whoever runs into one ahead, standing or not.
    """
    fx, fy = ego.forward.x, ego.forward.y
    east, south = other.place.x - ego.place.x, other.place.y - ego.place.y
    along, across = east * fx + south * fy, south * fx - east * fy
    turned = abs(other.forward.x * fx + other.forward.y * fy), abs(other.forward.y * fx - other.forward.x * fy)
    length = ego.half.x + other.half.x * turned[0] + other.half.y * turned[1]
    width = ego.half.y + other.half.x * turned[1] + other.half.y * turned[0]
    one_before_other = abs(along) - length > abs(across) - width
    nx, ny = (fx, fy) if one_before_other else (-fy, fx)
    sign = 1.0 if (along if one_before_other else across) > 0.0 else -1.0
    ego_comes = sign * (ego.velocity.x * nx + ego.velocity.y * ny)
    other_comes = -sign * (other.velocity.x * nx + other.velocity.y * ny)
    return other_comes > ego_comes
