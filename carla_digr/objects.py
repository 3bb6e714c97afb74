"""Which thing in the picture decides: live, from a segmentation of the same frame. No ROS, no CARLA.

Each vehicle, lane line and barrier has a share of the map, and an effect: KL(pi || pi'), pi' being what the policy
decides when the thing is painted over. The truth of an explanation is what happens without the thing (Atrey, Clary,
Jensen 2020, arXiv 1912.05743, asked for such a test); on a road that cannot be rendered anew, its pixels are
replaced by those beside them. All pictures without one thing go through the policy as one batch.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import CAMERA, Neighbour
from carla_digr.explainer import Decision, Explainer
from carla_digr.saliency.windows import Changes

# CARLA's CityObjectLabel.
KINDS = {
    12: "pedestrian",
    13: "motorcycle",  # its rider
    14: "car",
    15: "truck",
    16: "bus",
    17: "train",
    18: "motorcycle",
    19: "bicycle",
}
LINE, BARRIER = "lane line", "barrier"
_VEHICLE, _LINE, _BARRIER = 1, 2, 3
_CLASSES = np.zeros(256, np.uint8)  # by label
_CLASSES[list(KINDS)] = _VEHICLE
_CLASSES[24] = _LINE
_CLASSES[[4, 5, 28]] = _BARRIER  # wall, fence, guard rail

MOST_OBJECTS = 16  # of a frame, those that cover most of the picture
LEAST_PIXELS = 4  # that show a thing, or it is not in view
SHADOW = 2  # pixels below a vehicle
MARGIN = 2  # pixels around a mask whose share of the map is the thing's
OUTLINE_PARTS, OUTLINE_CORNERS = 8, 96  # of a thing's outline, at most
OUTLINED = 6  # things of a frame that a message has the outlines of
OUTLINE_ERROR = 0.8  # pixels that it may lie beside the thing's edge

FAR = 45.0  # m, beyond which a pixel is more than two metres of road
LINES_APART = 2.4  # m, less than two lane lines are
_BIN = 0.3  # m, of the histogram of lines
_SIDE = 18.0  # m to both sides in which lines are looked for
_FITTED = 160  # pixels of lines that the course of the road is fitted to
_COURSES = np.stack(  # heading against the road, rad, and curvature of the road, 1/m
    np.meshgrid(np.linspace(-0.06, 0.06, 13), np.linspace(-1 / 200, 1 / 200, 17)), axis=-1
).reshape(-1, 2)


@dataclass(frozen=True)
class ViewedObject:
    """One thing in view.

    Attributes:
        id: of a vehicle the actor's; 0: the thing has none.
        kind: one of KINDS, LINE or BARRIER.
        lane: of a vehicle as its `Neighbour` has it; of a line its number, -1 the first to the ego's left and 1 the
            first to its right; of a barrier -1 or 1, its side.
        distance: m, of a vehicle between the centres, negative behind; of a line or a barrier to the side. NaN where
            nobody knows it.
        mask: bool (H, W).
    """

    id: int
    kind: str
    lane: int
    distance: float
    mask: NDArray[np.bool_] = field(repr=False, compare=False)

    @property
    def identity(self) -> Hashable:
        """What is the same for the same thing in the next frame."""
        return self.id or (self.kind, self.lane)


@dataclass(frozen=True)
class ExplainedObject:
    """What a thing does to a decision.

    Attributes:
        seen: the thing.
        share: of the map's mass that lies within MARGIN pixels of it; a pixel near several counts for one of them, so
            that the shares of a frame have a sum of at most 1. NaN of a flat map, or without one.
        effect: divergence of the decision from that without it, nats.
        action: index of the action without it; -1 of continuous actions.
        flips: whether that is another action than the decision's.
    """

    seen: ViewedObject
    share: float
    effect: float
    action: int
    flips: bool


def viewed_objects(
    labels: NDArray[np.uint8], neighbours: Mapping[int, Neighbour], shape: tuple[int, int] | None = None
) -> list[ViewedObject]:
    """The things in a segmentation of the driving task's camera, at most MOST_OBJECTS.

    A vehicle is one of the neighbours, whatever else has a vehicle's label: so the ego is none.

    Args:
        labels: uint8 (h, w, 3): CARLA's label, low and high byte of the actor's id, as its instance camera has them. It
            may be finer than the picture: a pixel belongs to everything that shows in it, for a lane line is thinner
            than a pixel from 20 m on.
        neighbours: the vehicles around the ego by their actors' ids.
        shape: H, W of the masks; None: h, w.
    """
    shape = shape or labels.shape[:2]
    fineness = max(labels.shape[0] // shape[0], 1)
    fine = shape[0] * fineness, shape[1] * fineness
    if labels.shape[:2] != fine:
        labels = cv2.resize(labels, fine[::-1], interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)
    flat = labels.reshape(-1, 3)
    kinds = _CLASSES[flat[:, 0]]
    parts = [
        *_vehicles(flat, np.flatnonzero(kinds == _VEHICLE), neighbours),
        *_lines_and_barriers(fine, np.flatnonzero(kinds == _LINE), np.flatnonzero(kinds == _BARRIER)),
    ]
    parts.sort(key=lambda part: -len(part.pixels))
    bits = np.zeros(fine, np.uint32)
    for number, part in enumerate(parts[:MOST_OBJECTS]):
        bits.reshape(-1)[part.pixels] |= np.uint32(1 << number)
    bits = functools.reduce(np.bitwise_or, [bits[:, column::fineness] for column in range(fineness)])
    bits = functools.reduce(np.bitwise_or, [bits[row::fineness] for row in range(fineness)])
    masks = [(bits & np.uint32(1 << number)) > 0 for number in range(min(len(parts), MOST_OBJECTS))]
    return [
        ViewedObject(part.id, part.kind, part.lane, part.distance, mask)
        for part, mask in zip(parts, masks, strict=False)
        if np.count_nonzero(mask) >= LEAST_PIXELS
    ]


class _Part(NamedTuple):
    """As a `ViewedObject`, with the flat indices of the pixels of a fine segmentation that show it."""

    id: int
    kind: str
    lane: int
    distance: float
    pixels: NDArray[np.int64]


def _vehicles(
    labels: NDArray[np.uint8], pixels: NDArray[np.int64], neighbours: Mapping[int, Neighbour]
) -> Iterator[_Part]:
    """The neighbours that are in view; ``labels`` (N, 3), ``pixels`` those that show a vehicle."""
    by_low_bytes = {actor & 0xFFFF: (actor, neighbour) for actor, neighbour in neighbours.items()}
    shown = labels[pixels]
    ids = shown[:, 1].astype(np.int32) | shown[:, 2].astype(np.int32) << 8
    for number in np.unique(ids).tolist():
        if number in by_low_bytes:
            actor, there = by_low_bytes[number]
            own = ids == number
            kind = KINDS[int(np.bincount(shown[own, 0]).argmax())]  # at edges the server mixes labels
            distance = math.copysign(math.hypot(there.ahead, there.right), there.ahead)
            yield _Part(actor, kind, there.lane, distance, pixels[own])


def _lines_and_barriers(
    shape: tuple[int, int], lines: NDArray[np.int64], barriers: NDArray[np.int64]
) -> Iterator[_Part]:
    """Lane lines one by one, and the barriers of each side.

    The label does not tell one line from another, and dashes are not connected. But on the ground, straightened by the
    course of the road, every line is at one distance to the side: of a grid of courses the one is taken that gathers
    the lines' pixels in the fewest places.
    """
    ahead, right = _on_the_ground(shape, lines)
    course = _course(ahead, right)
    places, line_of = _places(_aside(course, ahead, right), ahead <= FAR)
    to_the_left = sum(place < 0 for place in places)
    for number, place in enumerate(places):
        lane = number - to_the_left + (place >= 0)
        yield _Part(0, LINE, lane, abs(place), lines[line_of == number])
    aside = _aside(course, *_on_the_ground(shape, barriers))
    for lane, on_side in ((-1, aside < 0), (1, aside >= 0)):
        if on_side.any():
            yield _Part(0, BARRIER, lane, _middle(np.abs(aside[on_side])), barriers[on_side])


def _on_the_ground(
    shape: tuple[int, int], pixels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """m ahead of the ego's centre (at most about 2 FAR) and to its right, where pixels' rays meet a flat road."""
    height, width = shape
    rows, columns = np.divmod(pixels, width)
    focal = width / (2.0 * math.tan(math.radians(CAMERA["fov"]) / 2.0))
    pitch = -math.radians(CAMERA["pitch"])
    across, down = (columns + 0.5 - width / 2) / focal, (rows + 0.5 - height / 2) / focal
    sinks = math.sin(pitch) + down * math.cos(pitch)
    reach = CAMERA["z"] / np.maximum(sinks, CAMERA["z"] / (2 * FAR))
    return CAMERA["x"] + reach * (math.cos(pitch) - down * math.sin(pitch)), CAMERA["y"] + reach * across


def _aside(course: NDArray, ahead: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """m to the right of the ego's own line along the road; ``course`` (..., 2) gives (..., N)."""
    heading, curvature = course[..., 0, None], course[..., 1, None]
    return right - heading * ahead - curvature * np.minimum(ahead, FAR) ** 2 / 2


def _course(ahead: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of _COURSES the one along which the pixels of lines have the fewest places."""
    near = np.flatnonzero(ahead <= FAR)
    if not len(near):
        return np.zeros(2)
    near = near[:: -(-len(near) // _FITTED)]
    places = int(2 * _SIDE / _BIN)
    bins = ((_aside(_COURSES, ahead[near], right[near]) + _SIDE) / _BIN).astype(np.int64).clip(0, places - 1)
    bins += np.arange(len(_COURSES))[:, None] * places
    counts = np.bincount(bins.ravel(), minlength=len(_COURSES) * places).reshape(len(_COURSES), places)
    return _COURSES[(counts.astype(np.int64) ** 2).sum(axis=1).argmax()]


def _places(aside: NDArray[np.float64], near: NDArray[np.bool_]) -> tuple[list[float], NDArray[np.int64]]:
    """Where lines are, m to the right, in this order; and of each pixel the line's number, -1: there is none."""
    left, places = aside[near & (np.abs(aside) < _SIDE)], []
    bins = ((left + _SIDE) / _BIN).astype(np.int64)
    while len(left) >= LEAST_PIXELS:
        counts = np.bincount(bins, minlength=int(2 * _SIDE / _BIN))
        peak = (np.convolve(counts, np.ones(3), "same").argmax() + 0.5) * _BIN - _SIDE
        around = np.abs(left - peak) < LINES_APART / 2
        places.append(_middle(left[around]) if around.any() else float(peak))
        others = np.abs(left - places[-1]) >= LINES_APART
        left, bins = left[others], bins[others]
    places.sort()
    if not places:
        return [], np.full(len(aside), -1)
    return places, np.abs(aside[:, None] - places).argmin(axis=1)


def _middle(values: NDArray[np.float64]) -> float:
    """The median, of an even number the larger of the two in the middle."""
    return float(np.partition(values, len(values) // 2)[len(values) // 2])


def painted_over(state: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The state without what is under each mask: every row from the pixels beside it.

    Between its neighbours to the left and to the right a pixel is interpolated linearly; where there is only one, it
    has that one's value, and a row without any stays. Pixels outside the mask are untouched.

    Args:
        state: float32 (C, H, W).
        masks: bool (K, H, W).

    Returns:
        float32 (K, C, H, W).
    """
    return _painted(state, masks).made(state, len(masks))


def _painted(state: NDArray[np.float32], masks: NDArray[np.bool_]) -> Changes:
    """What `painted_over` changes."""
    width = state.shape[2]
    of_mask, of_row = np.nonzero(masks.any(axis=2))
    # The rows one after the other, an unmasked pixel before each: where this changes, a run begins or ends.
    rows = np.zeros(len(of_row) * (width + 1) + 1, np.bool_)
    rows[1:].reshape(-1, width + 1)[:, :width] = masks[of_mask, of_row]
    edges = np.flatnonzero(rows[1:] != rows[:-1])
    line, first = np.divmod(edges[::2], width + 1)
    left, right = first - 1, first + edges[1::2] - edges[::2]
    beside = (left >= 0) | (right < width)
    if not beside.all():
        line, first, left, right = line[beside], first[beside], left[beside], right[beside]
    lengths = right - first
    run = np.repeat(np.arange(len(first)), lengths)
    column = np.arange(len(run)) + np.repeat(first + lengths - lengths.cumsum(), lengths)
    left = np.where(left < 0, right, left)
    right = np.where(right >= width, left, right)
    weight = ((column - left[run]) / np.maximum(right - left, 1)[run]).astype(np.float32)
    row = of_row[line]
    colours = state[:, row, left][:, run] * (1 - weight) + state[:, row, right][:, run] * weight
    return Changes(of_mask[line][run], row[run], column, colours.T)


def explain_objects(
    explainer: Explainer, decision: Decision, saliency: NDArray[np.float32] | None, objects: list[ViewedObject]
) -> list[ExplainedObject]:
    """What each thing in view does to a decision, the largest effect first.

    Of a policy that decides on several pictures, the newest picture's masks are painted over in all of them.

    Args:
        explainer: the policy.
        decision: its decision on the frame.
        saliency: the map of the frame, float32 (H, W) of the policy's size; None: there is none.
        objects: of the same frame, with masks of the policy's size.
    """
    if not objects:
        return []
    masks = np.stack([thing.mask for thing in objects])
    shown = np.logical_or.reduce(masks).any(axis=1)
    rows = slice(int(shown.argmax()), len(shown) - int(shown[::-1].argmax()) + SHADOW)
    vehicles = np.array([thing.id > 0 for thing in objects])
    changes = _painted(decision.state[0, :, rows].cpu().numpy(), _with_shadows(masks[:, rows], vehicles))
    changes = changes._replace(row=changes.row + rows.start)
    effects, actions = explainer.instead(decision, changes, len(objects))
    shares = map_shares(saliency, masks) if saliency is not None else np.full(len(objects), np.nan)
    explained = [
        ExplainedObject(thing, float(share), float(effect), int(action), bool(action != decision.action))
        for thing, share, effect, action in zip(objects, shares, effects, actions, strict=True)
    ]
    return sorted(explained, key=lambda thing: -thing.effect)


def fields_of(things: Sequence[ExplainedObject]) -> list[dict[str, Any]]:
    """The fields of each thing's message, carla_digr_msgs/ExplainedObject; of the first OUTLINED with its outline."""
    found = []
    for place, thing in enumerate(things):
        rows, columns = np.flatnonzero(thing.seen.mask.any(axis=1)), np.flatnonzero(thing.seen.mask.any(axis=0))
        parts = outlines(thing.seen.mask) if place < OUTLINED else []
        found.append(
            {
                "id": thing.seen.id,
                "kind": thing.seen.kind,
                "lane": thing.seen.lane,
                "distance": thing.seen.distance,
                "share": thing.share,
                "effect": thing.effect,
                "action": thing.action,
                "flips": thing.flips,
                "left": int(columns[0]),
                "top": int(rows[0]),
                "right": int(columns[-1]),
                "bottom": int(rows[-1]),
                "outline": np.concatenate(parts).ravel() if parts else np.zeros(0, np.uint16),
                "parts": np.array([len(part) for part in parts], np.uint16),
            }
        )
    return found


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.uint16]]:
    """What surrounds a mask's pixels: a polygon for each of its parts, the largest first.

    Args:
        mask: bool (H, W).

    Returns:
        At most OUTLINE_PARTS polygons of OUTLINE_CORNERS corners in all, uint16 (corners, 2): column and row of pixels
        beside the mask's, or in it at the picture's edge.
    """
    grown = cv2.dilate(mask.view(np.uint8), np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = sorted(contours, key=cv2.contourArea, reverse=True)[:OUTLINE_PARTS]
    simple = [cv2.approxPolyDP(contour, OUTLINE_ERROR, True)[:, 0].astype(np.uint16) for contour in largest]
    corners = accumulate(len(part) for part in simple)
    return [part for part, total in zip(simple, corners, strict=True) if total <= OUTLINE_CORNERS]


def _with_shadows(masks: NDArray[np.bool_], vehicles: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Masks (K, H, W), those of ``vehicles`` (K,) with their edges, which are mixed colours, and their shadows on the
    road: a pixel to each side and SHADOW below."""
    count, height, width = masks.shape
    apart = np.zeros((count, height + SHADOW, width), np.uint8)  # one above the other, so that none reaches the next
    apart[:, :height] = masks
    grown = cv2.dilate(apart.reshape(-1, width), np.ones((1 + SHADOW, 3), np.uint8), anchor=(1, SHADOW))
    return np.where(vehicles[:, None, None], grown.reshape(apart.shape)[:, :height].view(np.bool_), masks)


def map_shares(saliency: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of a map's mass within MARGIN pixels of each mask, (K,): of a pixel near several the last one's, of one
    that is in several too; NaN of a map of zeros."""
    owner = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in enumerate(masks, 1):
        owner[mask] = number
    around = cv2.dilate(owner, np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8))
    owner = np.where(owner > 0, owner, around)
    mass = np.bincount(owner.ravel(), weights=saliency.ravel(), minlength=len(masks) + 1)
    total = mass.sum()
    return mass[1:] / total if total > 0 else np.full(len(masks), np.nan)


# --- in words ---

MATTERS = 0.1  # nats: a thing whose effect is less decides nothing
VOTES = 10  # frames, half a second, that are asked
MAJORITY = 6  # of them that change what is said
NEAR = 3.0  # m
MOVED = 0.2  # a distance is said anew when it has changed by this share of itself, and by NEAR
BESIDE = 5.0  # m between centres, less than a car's length
_NUMBERS = ("", "first", "second", "third", "fourth")
_LANES = ("", "one lane", "two lanes", "three lanes", "four lanes")


class _Steady:
    """A value that changes only when MAJORITY of the last VOTES frames had the new one; the first is taken at once."""

    def __init__(self) -> None:
        self._votes: deque[Hashable] = deque(maxlen=VOTES)
        self._value: Hashable = None

    def __call__(self, value: Hashable) -> Any:
        """The steady value after a frame's value."""
        if not self._votes:
            self._value = value
        self._votes.append(value)
        most, votes = Counter(self._votes).most_common(1)[0]
        if votes >= MAJORITY:
            self._value = most
        return self._value


class Narrator:
    """Says in one sentence what decides, frame by frame; see `say`.

    Args:
        action_names: of the policy.
    """

    def __init__(self, action_names: tuple[str, ...]):
        self._names = action_names
        self.restart()

    def restart(self) -> None:
        """Forget the frames before."""
        self._leader, self._actions = _Steady(), _Steady()
        self._lead: Hashable = None
        self._said: ViewedObject | None = None  # as it was when its place was said
        self._sentence = ""

    def say(self, action: int, objects: list[ExplainedObject]) -> str:
        """The sentence after one more frame.

        It names the thing with the largest effect, if that is MATTERS or more. It names another one, or other actions,
        only when that was so in most of the last frames.

        Args:
            action: what was decided; -1: a continuous action.
            objects: of the frame.
        """
        first = max(objects, key=lambda thing: thing.effect, default=None)
        decides = first is not None and first.effect >= MATTERS
        lead = self._leader(first.seen.identity if first is not None and decides else None)
        if lead != self._lead:
            self._lead, self._said, self._actions = lead, None, _Steady()
        now = next((thing for thing in objects if thing.seen.identity == lead), None)
        if now is None and lead is not None:
            return self._sentence  # it is out of view for a moment
        if now is not None and (self._said is None or _moved(self._said, now.seen)):
            self._said = now.seen
        with_it, without = self._actions((action, action if now is None else now.action))
        self._sentence = self._words(with_it, without)
        return self._sentence

    def _words(self, action: int, without: int) -> str:
        if action < 0:
            return (
                f"What weighs most is {_described(self._said)}." if self._said else "Nothing in view decides by itself."
            )
        does = _verb(self._names[action])
        if self._said is None:
            return f"{does.now}; nothing in view decides that by itself."
        if action == without:
            return f"{does.now}; {_described(self._said)} weighs most, but it would do the same without it."
        would = _verb(self._names[without]).infinitive
        return f"{does.now} because of {_described(self._said)}: without it, it would {would}."


class _Verb(NamedTuple):
    now: str
    infinitive: str


def _verb(action: str) -> _Verb:
    """An action's name as what a driver does."""
    if action in ("keep", "brake"):
        rest = " the lane" if action == "keep" else ""
        return _Verb(f"{action.capitalize()}s{rest}", f"{action}{rest}")
    words = action.replace("_", " ")
    if {"left", "right"} & set(words.split()):
        return _Verb(f"Steers {words}", f"steer {words}")
    return _Verb(f"Chooses {words}", f"choose {words}")


def _moved(said: ViewedObject, now: ViewedObject) -> bool:
    change = abs(now.distance - said.distance)
    return now.lane != said.lane or (now.id > 0 and change > max(NEAR, MOVED * abs(said.distance)))


def _described(thing: ViewedObject) -> str:
    side = "left" if thing.lane < 0 else "right"
    number = abs(thing.lane)
    if thing.kind == BARRIER:
        return f"the barrier on the {side}"
    if thing.kind == LINE:
        which = f"{_NUMBERS[number]} " if 1 < number < len(_NUMBERS) else ""
        return f"the {which}lane line on the {side}"
    lane = f" {_LANES[number]} to the {side}" if 0 < number < len(_LANES) else ""
    if math.isnan(thing.distance):
        return f"the {thing.kind}{lane}"
    if abs(thing.distance) < BESIDE:
        return f"the {thing.kind}{lane} beside it"
    comma = "," if lane else ""
    return f"the {thing.kind}{lane}{comma} {abs(thing.distance):.0f} m {'ahead' if thing.distance > 0 else 'behind'}"
