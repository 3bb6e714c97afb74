"""What the page shows about a frame, from the messages about it: rclpy's in the drive, rosbags' from a recording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from carla_digr.driving.control import UNKNOWN_LANE, VehicleCommand, pedals
from carla_digr.errors import UserError
from carla_digr.saliency import METHODS

SHOWN_OBJECTS = 6  # of a frame, at most
LONGEST_OUTLINE = 1000  # numbers of a thing's outline


def map_title(method: str, target: str = "") -> str:
    """What the page calls a map: "DIGR", or "Vanilla Gradient of brake"; of one that cannot be had here its key."""
    try:
        title = METHODS[method].title
    except (KeyError, UserError):  # not installed, or its package is broken
        title = method
    return f"{title} of {target}" if target else title


def page_objects(objects: Sequence[Any], action_names: Sequence[str]) -> list[dict[str, Any]]:
    """What of a frame decides, JSON-ready but for NaN, those with the largest effects first.

    Args:
        objects: of carla_digr_msgs/ExplainedObjects.
        action_names: of the policy.
    """
    return [
        {
            "id": thing.id,
            "kind": thing.kind,
            "lane": None if thing.lane == UNKNOWN_LANE else thing.lane,
            "distance": thing.distance,
            "share": thing.share,
            "effect": thing.effect,
            "without": action_names[thing.action] if 0 <= thing.action < len(action_names) else None,
            "flips": thing.flips,
            "box": [thing.left, thing.top, thing.right, thing.bottom],
            "outline": outline_of(thing),
        }
        for thing in objects[:SHOWN_OBJECTS]
    ]


def outline_of(thing: Any) -> list[list[int]]:
    """A polygon for each part of a carla_digr_msgs/ExplainedObject: column and row of each corner by turns.

    Empty where it has none, as in older recordings, or one that cannot be.
    """
    corners, parts = getattr(thing, "outline", ()), getattr(thing, "parts", ())
    if max(len(corners), len(parts)) > LONGEST_OUTLINE or 2 * sum(int(part) for part in parts) != len(corners):
        return []
    ends = accumulate((2 * int(part) for part in parts), initial=0)
    return [[int(number) for number in corners[a:b]] for a, b in pairwise(ends)]


def page_decision(
    policy: Any,
    fallback: Any,
    facts: Any,
    odometry: Any,
    sentence: str = "",
    trust: tuple[float, float] | None = None,
    objects: Sequence[Any] = (),
) -> dict[str, Any]:
    """The decision as `ViewerServer.publish` wants it; a fallback's control replaces the policy's.

    Args:
        policy: the policy's carla_digr_msgs/DrivingDecision, or None, like each of these.
        fallback: the bridge's in its place.
        facts: carla_digr_msgs/DriveFrame.
        odometry: nav_msgs/Odometry of the ego.
        sentence: what decides, of carla_digr_msgs/ExplainedObjects; empty: nobody says it.
        trust: agreement of the last map that was held against a perturbation map, and the s since its frame.
        objects: what decides, of carla_digr_msgs/ExplainedObjects.
    """
    shown: dict[str, Any] = {"fallback": fallback is not None}
    message = fallback if policy is None else policy
    if message is not None:
        shown.update(
            action_names=list(message.action_names),
            probabilities=[float(p) for p in message.probabilities],
            action=message.action,
            value=message.value,
            policy_hash=message.policy_hash,
            inference_ms=message.inference_ms,
            saliency_ms=message.saliency_ms,
        )
        if method := getattr(message, "method", ""):  # older recordings do not say it
            shown["map"] = map_title(method, message.target)
        attack = getattr(message, "attack", "")  # recordings before attacks lack it
        if attack and fallback is None:
            shown["status"] = f"The policy sees the picture under attack: {attack}."
    if trust is not None:
        shown["trust"], shown["trust_age"] = trust
    if sentence and fallback is None:
        shown["sentence"] = sentence
    if len(objects) and message is not None and fallback is None:
        shown["objects"] = page_objects(objects, message.action_names)
    applied = policy if fallback is None else fallback
    if applied is not None:
        wanted = VehicleCommand(applied.steer, applied.throttle, applied.brake, applied.target_speed)
        speed = math.nan if odometry is None else odometry.twist.twist.linear.x
        throttle, brake = pedals(wanted, speed)  # what the cruise control makes of it at this speed
        shown.update(throttle=throttle, steer=applied.steer, brake=brake)
    if fallback is not None and getattr(fallback, "manual", False):
        shown["status"] = "manual control"
    if facts is not None:
        shown["events"] = (["collision"] if facts.collision else []) + (["off the road"] if facts.off_road else [])
        if facts.over:
            shown["status"] = "The episode is over; the next one starts in a moment."
    return shown
