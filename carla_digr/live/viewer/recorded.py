"""Recordings for the page: what is in one, or in two of the same drive, and each frame when it is looked at."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.images import Crop, to_array, to_rgb
from carla_digr.live.questions import shipped_policy
from carla_digr.live.viewer.message import encode, plain
from carla_digr.live.viewer.page_decision import map_title, outline_of, page_decision
from carla_digr.recordings.bag import Bag, Channel, open_bag
from carla_digr.recordings.drive import LEADING, Decoder, Drive, read_drive
from carla_digr.recordings.playback import GAP_SECONDS, LONGEST_GAP
from carla_digr.recordings.topics import IMAGE, OBJECTS, ODOMETRY, SALIENCY
from carla_digr.saliency.metrics import rank_correlation

AT_ONCE = 8  # frames that are read together, for a chunk holds several
KEPT_BYTES = 1 << 27  # of them
SIDE = 65_500  # pixels of the longest side of a JPEG picture
KEPT = 400  # frames of a side whose pictures stay in memory, 20 s
COARSE = 32  # maps are compared at 32 x 32
LOW = 0.05  # the share of frames with the lowest agreement that count as events
DECIDES = 0.1  # nats, `objects.MATTERS`, whose module loads torch
LASTS = 5  # frames that an object must decide before that counts as an event
EQUAL = 0.99  # of maps that agree like this none counts: they are the same but for rounding


class _Shown(NamedTuple):
    """What is looked at of a frame: a picture or a map is None where it is missing; of each object its polygons."""

    rgb: NDArray[np.uint8] | None
    saliency: NDArray[np.float32] | None
    outlines: list[list[list[int]]]


class Side:
    """One recording: its frames, and their pictures on request, from any thread.

    Raises:
        UserError: the recording has no pictures, is damaged, or has maps of other parts of them than ``crop``.
    """

    def __init__(
        self, bag: Bag, path: Path, camera: str, compared: bool, odometry: str, crop: Crop | None, resize: bool
    ):
        self.name = path.name
        self._bag, self._decode = bag, Decoder()
        self.coarse: dict[int, NDArray[np.float32]] = {}  # time of a map -> (COARSE, COARSE)
        self._damaged = 0
        self.drive: Drive = read_drive(bag, camera, self._survey if compared else None, odometry)
        self._camera = self.drive.camera
        explained = Crop.parse(self.drive.facts.get("crop", ""))
        if crop and crop != explained and any(frame.saliency is not None for frame in self.drive.frames):
            part = f"the crop {explained}" if explained else "whole pictures"
            raise UserError(f"The maps in {path} are of {part}, not of the crop {crop}: explain it anew with that one.")
        self._resize, crop = resize, crop or explained
        self._shown = (lambda message: crop.of(_picture(message))) if crop else _picture  # what the map is of
        self._trust = _last_known(self.drive)
        self._kept: OrderedDict[int, _Shown] = OrderedDict()
        self._lock = threading.Lock()  # the reader has one place in its file

    @property
    def policy(self) -> str:
        """Hash of the policy that explains; empty if it is not known."""
        names = (frame.policy.policy_hash for frame in self.drive.frames if frame.policy is not None)
        return next(names, self.drive.facts.get("policy_hash", ""))

    @property
    def method(self) -> str:
        """How its maps were made."""
        facts = self.drive.facts
        return map_title(facts["method"], facts.get("target", "")) if "method" in facts else "live"

    @property
    def ignored(self) -> list[str]:
        """Sentences about what is in the recording and not shown."""
        return [*self.drive.ignored, *(sentence.rstrip(".") for sentence in self._bag.damage)]

    def _survey(self, channel: Channel, time: int, data: bytes) -> None:
        if channel.topic != SALIENCY:
            return
        try:
            coarse = cv2.resize(_map(self._decode(channel, data)), (COARSE, COARSE), interpolation=cv2.INTER_AREA)
        except (UserError, ValueError, cv2.error):
            return
        self.coarse[time] = coarse.astype(np.float32)

    def decision(self, index: int) -> dict[str, Any]:
        """What the page shows about a frame."""
        frame = self.drive.frames[index]
        return page_decision(
            frame.policy,
            frame.fallback,
            frame.facts,
            frame.odometry,
            frame.sentence,
            self._trust[index],
            frame.objects,
        )

    def pictures(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """A frame's picture (H, W, 3) and map (H, W).

        Raises:
            UserError: the recording is damaged there.
        """
        with self._lock:
            shown = self._look(index)
        if shown.rgb is None:
            number = self.drive.frames[index].number
            raise UserError(f"The picture of frame {number} in {self.name} is damaged, or too large to be shown.")
        return shown.rgb, shown.saliency

    def message(self, index: int) -> bytes:
        """A frame's picture and map, as `message.encode` has them; its header has the outlines of the frame's objects.

        Raises:
            UserError: the recording is damaged there, or the picture of another size than its map, which is refused.
        """
        rgb, saliency = self.pictures(index)
        number = self.drive.frames[index].number
        if not self._resize and saliency is not None and saliency.shape != rgb.shape[:2]:
            (height, width), (rows, columns) = rgb.shape[:2], saliency.shape
            raise UserError(
                f"The picture of frame {number} in {self.name} has {width}x{height} pixels, its map {columns}x{rows}; "
                f"--wrong-size resize stretches it."
            )
        header = {
            "width": rgb.shape[1],
            "height": rgb.shape[0],
            "saliency": None if saliency is None else list(saliency.shape),
        }
        with self._lock:
            header["outlines"] = self._look(index).outlines
        return encode(header, rgb, saliency)

    def _look(self, index: int) -> _Shown:
        if index not in self._kept:
            self._read(index)
        self._kept.move_to_end(index)
        return self._kept[index]

    def _read(self, first: int) -> None:
        frames = self.drive.frames[first : first + AT_ONCE]
        parts: dict[tuple[str, int], tuple[int, Callable[[Any], Any]]] = {}
        for index, frame in enumerate(frames, first):
            parts[frame.picture(self._camera)] = index, self._shown
            if frame.saliency is not None:
                parts[SALIENCY, frame.saliency] = index, _map
            if frame.said is not None:
                parts[OBJECTS, frame.said] = index, _outlines
        found: dict[int, dict[Callable[[Any], Any], Any]] = {index: {} for index, _ in parts.values()}
        times, wanted, size = [time for _, time in parts], {topic for topic, _ in parts}, 0
        for channel, time, data in self._bag.read(min(times), max(times) + 1, lambda c: c.topic in wanted):
            index, convert = parts.get((channel.topic, time), (-1, _picture))
            if index != first and size > KEPT_BYTES:
                found.pop(index, None)  # another time, when it is asked for
            if index in found:
                try:
                    found[index][convert] = part = convert(self._decode(channel, data))
                except (UserError, ValueError):
                    continue
                size += 0 if convert is _outlines else part.nbytes
        for index, shown in reversed(found.items()):
            self._kept[index] = _Shown(shown.get(self._shown), shown.get(_map), shown.get(_outlines, []))
        while len(self._kept) > KEPT or (len(self._kept) > 1 and self._kept_bytes() > KEPT_BYTES):
            self._kept.popitem(last=False)

    def _kept_bytes(self) -> int:
        return sum(part.nbytes for shown in self._kept.values() for part in shown[:2] if part is not None)


def _picture(message: Any) -> NDArray[np.uint8]:
    """A picture, if a JPEG file can have it; ValueError: it is none."""
    rgb = to_rgb(message)
    if max(rgb.shape) > SIDE:
        raise ValueError(f"a picture of {rgb.shape[1]}x{rgb.shape[0]} cannot be shown")
    return rgb


def _map(message: Any) -> NDArray[np.float32]:
    """A saliency map, (H, W); ValueError: it is none."""
    saliency = to_array(message)
    if saliency.dtype != np.float32:
        raise ValueError(f"a map is of 32FC1, not {message.encoding}")
    return saliency


def _outlines(message: Any) -> list[list[list[int]]]:
    """The outlines of the objects that a frame of a drive keeps."""
    return [outline_of(thing) for thing in message.objects[:LEADING]]


def _last_known(drive: Drive) -> list[tuple[float, float] | None]:
    """For each frame the last agreement with a perturbation map, and its age in s."""
    known: tuple[int, float, float] | None = None  # time in ns at which it had an age in s
    found: list[tuple[float, float] | None] = []
    for frame in drive.frames:
        if frame.trust is not None:
            known = frame.time, frame.trust.age, frame.trust.agreement
        found.append(None if known is None else (known[2], known[1] + (frame.time - known[0]) * 1e-9))
    return found


class Recorded:
    """One recording, or two of the same drive side by side: by two methods, or two policies.

    Args:
        paths: one or two bags.
        camera: the topic with the pictures.
        odometry: the topic with the car's motion.
        crop: the part of each picture that is shown; None: what its map is of.
        wrong_size: "resize" the map to a picture of another size, or "refuse" that frame.

    Raises:
        UserError: a bag cannot be opened, has no pictures, or maps of another crop, or the two have no frame in common.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        camera: str = IMAGE,
        odometry: str = ODOMETRY,
        crop: Crop | None = None,
        wrong_size: str = "resize",
    ):
        self._open = ExitStack()
        with ExitStack() as opening:
            compared = len(paths) > 1
            self.sides = [
                Side(
                    opening.enter_context(open_bag(path)),
                    path,
                    camera,
                    compared,
                    odometry,
                    crop,
                    resize=wrong_size == "resize",
                )
                for path in paths
            ]
            first, *others = (side.drive.frames for side in self.sides)
            places = [{frame.time: index for index, frame in enumerate(frames)} for frames in others]
            # For each frame of the first recording: its place in every recording, None where it is missing.
            self._places = [[index, *(p.get(frame.time) for p in places)] for index, frame in enumerate(first)]
            if others and not any(place is not None for _, *rest in self._places for place in rest):
                raise UserError(f"{paths[0]} and {paths[1]} have no frame in common: they are not of the same drive.")
            self._open = opening.pop_all()

    def policy(self, side: int) -> tuple[str, str]:
        """The weights of the policy of a recording, and no code of its own.

        Raises:
            UserError: it does not ship.
            LookupError: there is no such side.
        """
        weights = shipped_policy(self.sides[side].policy)
        if weights is None:
            raise UserError(
                f"The policy {self.sides[side].policy or 'of the recording'} does not ship: nobody can ask it."
            )
        return str(weights), ""

    def pictures(self, side: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """The picture (H, W, 3) and the map (h, w) of a frame of the first recording in one of them.

        Raises:
            UserError, LookupError: as `message`.
        """
        return self.sides[side].pictures(self._place(side, index))

    def close(self) -> None:
        """Close the bags."""
        self._open.close()

    def message(self, side: int, index: int) -> bytes:
        """The picture and map of a frame of the first recording in one of them.

        Raises:
            UserError: as `Side.message`.
            LookupError: there is no such frame.
        """
        return self.sides[side].message(self._place(side, index))

    def _place(self, side: int, index: int) -> int:
        place = self._places[index][side] if index >= 0 and side >= 0 else None
        if place is None:
            raise LookupError(f"side {side} has no frame {index}")
        return place

    def description(self) -> dict[str, Any]:
        """All but the pictures, JSON-ready.

        ``sides``: name, policy, method of each recording; ``frames``: number, stamp (s), time since the first frame
        (s), agreement (rank correlation of both maps or None), decisions (a dict or None for each side) and explained
        (whether there is a map); ``events``: kind and index of the first frame of each; ``ignored``: sentences.
        """
        rows = self.rows
        return plain(
            {
                "sides": [{"name": s.name, "policy": s.policy, "method": s.method} for s in self.sides],
                "frames": rows,
                "events": _events(rows),
                "ignored": [sentence for side in self.sides for sentence in side.ignored],
            }
        )

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The ``frames`` of the `description`."""
        frames = self.sides[0].drive.frames
        times = _times([frame.time for frame in frames])
        agreement = self._agreement()
        rows: list[dict[str, Any]] = []
        for frame, time, places, value in zip(frames, times, self._places, agreement, strict=True):
            pairs = list(zip(self.sides, places, strict=True))
            rows.append(
                {
                    "frame": frame.number,
                    "stamp": frame.stamp * 1e-9,
                    "time": time,
                    "agreement": value,
                    "decisions": [None if place is None else side.decision(place) for side, place in pairs],
                    "explained": [
                        place is not None and side.drive.frames[place].saliency is not None for side, place in pairs
                    ],
                }
            )
        return rows

    def _agreement(self) -> list[float]:
        """Rank correlation of the two sides' maps for each frame, NaN where one is missing."""
        result = []
        for places in self._places:
            maps = [
                side.coarse.get(side.drive.frames[place].saliency or -1)
                for side, place in zip(self.sides, places, strict=True)
                if place is not None
            ]
            both = [map_ for map_ in maps if map_ is not None]
            pair = (both[0][None], both[1][None]) if len(both) == 2 else None
            result.append(float(rank_correlation(*pair)[0]) if pair else float("nan"))
        return result


def _times(places: list[int]) -> list[float]:
    """Seconds since the first of these times in ns; a gap that nobody wants to wait for counts as GAP_SECONDS."""
    cut, times = 0, [0.0]
    for before, now in pairwise(places):
        if now - before > LONGEST_GAP * 1e9:
            cut += now - before - round(GAP_SECONDS * 1e9)
        times.append((now - places[0] - cut) * 1e-9)
    return times


def _events(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first frame of each run of frames in which something was so."""

    def decider(row: dict[str, Any]) -> Hashable:
        things = (row["decisions"][0] or {}).get("objects") or [None]
        first = things[0]
        return (first["id"] or (first["kind"], first["lane"])) if first and first["effect"] >= DECIDES else None

    def action(decision: dict[str, Any] | None) -> str:
        names = (decision or {}).get("action_names") or []
        return dict(enumerate(names)).get(decision["action"], "") if decision and names else ""

    agreements = np.array([row["agreement"] for row in rows])
    low = min(np.nanquantile(agreements, LOW), EQUAL) if np.isfinite(agreements).any() else -np.inf
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "collision": lambda row: "collision" in row["decisions"][0].get("events", []),
        "off the road": lambda row: "off the road" in row["decisions"][0].get("events", []),
        "watchdog brake": lambda row: row["decisions"][0]["fallback"],
        "brake": lambda row: action(row["decisions"][0]) == "brake" and not row["decisions"][0]["fallback"],
        "low agreement": lambda row: row["agreement"] <= low,
        "other action": lambda row: len({action(decision) for decision in row["decisions"] if decision}) > 1,
    }
    events = []
    for kind, holds in kinds.items():
        flags = [bool(holds(row)) for row in rows]
        starts = [index for index, flag in enumerate(flags) if flag and not (index and flags[index - 1])]
        events += [{"kind": kind, "index": index} for index in starts]
    deciders = [decider(row) for row in rows]
    lasting = [i for i in range(len(rows) - LASTS) if len(set(deciders[i : i + LASTS])) == 1]
    changes = [b for a, b in pairwise(lasting) if deciders[a] != deciders[b] and deciders[b] is not None]
    events += [{"kind": "another object decides", "index": index} for index in changes]
    return sorted(events, key=lambda event: event["index"])
