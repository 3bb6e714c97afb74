"""What is in a recording, as text: behind CARLA's show_recorder calls."""

from __future__ import annotations

import math
from collections.abc import Iterable

from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.recording import Frame, Header, Recorded, motions, steps

MOST_LINES = 20_000  # of an answer
TYPES = {"h": "hero", "v": "vehicle", "w": "walker", "t": "traffic light", "o": "other", "a": "any"}


class _Text:
    """Lines between what each of CARLA's answers begins and ends with."""

    def __init__(self, header: Header):
        self._lines = ["Version: 1", f"Map: {header.map}", f"Date: {header.date}", ""]
        self._frames = 0
        self._stamp = 0.0

    @property
    def full(self) -> bool:
        return len(self._lines) >= MOST_LINES

    def frame(self, frame: Frame) -> None:
        self._frames, self._stamp = self._frames + 1, frame.stamp

    def add(self, line: str) -> None:
        if not self.full:
            self._lines.append(line)

    def whole(self) -> str:
        left_out = ["... and more, for which there is no room"] if self.full else []
        end = ["", f"Frames: {self._frames}", f"Duration: {self._stamp:g} seconds", ""]
        return "\n".join([*self._lines, *left_out, *end])


def info(header: Header, frames: Iterable[Frame], everything: bool) -> str:
    """Who came and went and who touched whom, and with ``everything`` where all were in each frame."""
    text = _Text(header)
    for number, frame in enumerate(frames, start=1):
        text.frame(frame)
        if text.full or not (everything or frame.came or frame.went or frame.contacts or frame.weather):
            continue
        text.add(f"Frame {number} at {frame.stamp:g} seconds")
        for actor in frame.came:
            x, y, z = actor.place.location
            text.add(f" Create {actor.id}: {actor.type} at ({x:g}, {y:g}, {z:g})")
            for attribute in actor.attributes:
                text.add(f"  {attribute.id} = {attribute.value}")
        for gone in frame.went:
            text.add(f" Destroy {gone}")
        for contact in frame.contacts:
            text.add(f" Collision of {contact.id} with {contact.other or contact.name}")
        if frame.weather is not None:
            text.add(f" Weather: {', '.join(f'{value:g}' for value in frame.weather)}")
        if everything:
            for row in motions(frame):
                yaw = math.degrees(row["yaw"])
                text.add(
                    f" Vehicle {row['id']}: ({row['x']:.3f}, {row['y']:.3f}) yaw {yaw:.2f} at {row['speed']:.2f} m/s"
                )
            for row in steps(frame):
                text.add(f" Figure {row['id']}: ({row['x']:.3f}, {row['y']:.3f}, {row['z']:.3f}) yaw {row['yaw']:.2f}")
        text.add("")
    return text.whole()


def collisions(header: Header, frames: Iterable[Frame], first: str, second: str) -> str:
    """When two of these types began to touch; see TYPES."""
    for wanted in (first, second):
        if wanted not in TYPES:
            raise CallFailed(f"{wanted!r} is no type of actors; use one of {', '.join(TYPES)}")
    text, known, touching = _Text(header), dict[int, Recorded](), set[tuple[int, int, str]]()
    text.add(f"{'Time':>8}  Types {'Id':>6} {'Actor 1':<35} {'Id':>6} Actor 2")
    for frame in frames:
        text.frame(frame)
        known |= {actor.id: actor for actor in frame.came}
        now = {(c.id, c.other, c.name) for c in frame.contacts}
        for one, other, name in sorted(now - touching):
            a, b = _kinds(known.get(one)), _kinds(known.get(other))
            if first in a and second in b:
                who, whom = known[one].type if one in known else "", known[other].type if other in known else name
                text.add(f"{frame.stamp:8.1f}   {a[0]} {b[0]} {one:>8} {who:<35} {other:>6} {whom}")
        touching = now
    return text.whole()


def _kinds(actor: Recorded | None) -> str:
    """The letters of TYPES that an actor has, the most special first."""
    if actor is None:
        return "oa"
    hero = any(a.id == "role_name" and a.value == "hero" for a in actor.attributes)
    kind = {"vehicle": "v", "walker": "w"}.get(actor.type.split(".")[0], "o")
    return ("h" if hero else "") + kind + "a"


def blocked(header: Header, frames: Iterable[Frame], seconds: float, centimetres: float) -> str:
    """Vehicles that have moved less than a distance in a time or longer, who stood longest first."""
    text, known = _Text(header), dict[int, str]()
    since: dict[int, tuple[float, float, float]] = {}
    found: list[tuple[float, float, int]] = []
    stamp = 0.0

    def leave(actor: int, now: float) -> None:
        begun, _, _ = since.pop(actor)
        if now - begun >= seconds:
            found.append((now - begun, begun, actor))

    for frame in frames:
        text.frame(frame)
        stamp = frame.stamp
        known |= {actor.id: actor.type for actor in frame.came}
        rows = motions(frame)
        for actor, x, y in zip(rows["id"].tolist(), rows["x"].tolist(), rows["y"].tolist(), strict=True):
            if actor in since and 100.0 * math.hypot(x - since[actor][1], y - since[actor][2]) >= centimetres:
                leave(actor, stamp)
            since.setdefault(actor, (stamp, x, y))
        for gone in [actor for actor in frame.went if actor in since]:
            leave(gone, stamp)
    for actor in list(since):
        leave(actor, stamp)
    text.add(f"{'Time':>8} {'Id':>6} {'Actor':<35} {'Duration':>10}")
    for duration, begun, actor in sorted(found, reverse=True):
        text.add(f"{begun:8.1f} {actor:>6} {known.get(actor, ''):<35} {duration:10.1f}")
    return text.whole()
