"""Made-up recordings, without ROS: a few frames of a drive, written by the recorder's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from carla_digr.driving.control import TICK, Neighbour
from carla_digr.recordings import drive as drive_bag
from carla_digr.recordings import topics
from carla_digr.recordings.bag import Channel, offered_qos
from carla_digr.recordings.definitions import definition, typestore
from carla_digr.recordings.drive import blank
from carla_digr.recordings.recorder import Recorder
from carla_digr.recordings.topics import CLOCK, DIAGNOSTICS, OVERLAY

TYPES = {
    **{
        t: k
        for t, k in drive_bag.TYPES.items()
        if t not in (topics.OBSERVATION, topics.OBJECTS, topics.TRUST, topics.FACTS_TOPIC)
    },
    **{t: topics.TYPES[t] for t in (OVERLAY, CLOCK, DIAGNOSTICS)},
}
STORE = typestore()
PERIOD = round(TICK * 1e9)  # ns
PER_FRAME = 7  # messages of a frame


def channel(topic: str, kind: str) -> Channel:
    return Channel(topic, kind, definition(STORE, kind), offered_qos())


SURROUNDINGS = {
    topic: topics.TYPES[topic] for topic in (topics.INSTANCES, topics.VEHICLES, topics.TRUST, topics.OBJECTS)
}
CHANNELS = {topic: channel(topic, kind) for topic, kind in {**TYPES, **SURROUNDINGS}.items()}


def header(stamp: int) -> Any:
    time = blank(STORE, "builtin_interfaces/msg/Time", sec=stamp // 10**9, nanosec=stamp % 10**9)
    return blank(STORE, "std_msgs/msg/Header", stamp=time, frame_id="ego_vehicle/camera")


def image(stamp: int, picture: np.ndarray, encoding: str, padding: int = 0) -> Any:
    height, width = picture.shape[:2]
    rows = np.ascontiguousarray(picture).view(np.uint8).reshape(height, -1)
    data = np.pad(rows, ((0, 0), (0, padding))).ravel()
    fields = {"height": height, "width": width, "encoding": encoding, "step": len(data) // height, "data": data}
    return blank(STORE, topics.PICTURE_TYPE, header=header(stamp), **fields)


def serialized(kind: str, message: Any) -> bytes:
    return bytes(STORE.serialize_cdr(message, kind))


def picture(number: int, size: int = 128) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


def probabilities(number: int) -> np.ndarray:
    return np.random.default_rng(number).dirichlet([1, 1, 1, 1]).astype(np.float32)


def random_map(number: int, size: int = 128) -> np.ndarray:
    return np.random.default_rng(-number % 2**32).random((size, size), np.float32)


class DriveRecorder:
    """Records frames as the recorder node does; frame ``number`` has the stamp ``number`` * 50 ms.

    With ``surroundings`` there are topics for what the pixels show.
    """

    def __init__(
        self,
        path: Path,
        size: int = 128,
        policy_hash: str = "0123456789ab",
        surroundings: bool = False,
        **facts: str,
    ):
        self.size, self.policy_hash = size, policy_hash
        channels = [c for topic, c in CHANNELS.items() if surroundings or topic not in SURROUNDINGS]
        self.recorder = Recorder(path, channels, {"policy_hash": policy_hash, **facts})

    def add(self, topic: str, message: Any, stamp: int | None) -> None:
        self.recorder.add(CHANNELS[topic], serialized(topics.TYPES[topic], message), stamp)

    def trust(self, number: int, agreement: float, age: float) -> None:
        """What was known at a frame of an earlier frame's map."""
        stamp, kind = number * PERIOD, topics.TYPES[topics.TRUST]
        self.add(topics.TRUST, blank(STORE, kind, header=header(stamp), agreement=agreement, age=age), stamp)

    def decides(self, number: int, sentence: str, *things: dict[str, Any]) -> None:
        """What decides on a frame, the largest effect first."""
        stamp, kind = number * PERIOD, topics.TYPES[topics.OBJECTS]
        rows = [blank(STORE, "carla_digr_msgs/msg/ExplainedObject", **thing) for thing in things]
        message = blank(STORE, kind, header=header(stamp), frame=number, sentence=sentence, objects=rows)
        self.add(topics.OBJECTS, message, stamp)

    def surroundings(self, number: int, labels: np.ndarray, vehicles: dict[int, Neighbour]) -> None:
        """What the pixels of a frame show."""
        stamp = number * PERIOD
        rows = [
            blank(STORE, "carla_digr_msgs/msg/Vehicle", id=i, ahead=v.ahead, right=v.right, lane=v.lane)
            for i, v in vehicles.items()
        ]
        kind = topics.TYPES[topics.VEHICLES]
        self.add(topics.VEHICLES, blank(STORE, kind, header=header(stamp), frame=number, vehicles=rows), stamp)
        self.add(topics.INSTANCES, image(stamp, labels, "rgb8"), stamp)

    def frame(
        self,
        number: int,
        rgb: np.ndarray | None = None,
        saliency: np.ndarray | None = None,
        action: int | None = None,
        fallback: bool = False,
        collision: str = "",
    ) -> None:
        stamp = number * PERIOD
        first, size = header(stamp), self.size
        rgb = picture(number, size) if rgb is None else rgb
        saliency = random_map(number, size) if saliency is None else saliency
        clock = blank(STORE, TYPES[CLOCK], clock=first.stamp)
        self.add(CLOCK, clock, stamp)
        fields = {"frame": number, "seed": 7, "episode": 1, "collision": collision}
        self.add(topics.FRAME, blank(STORE, TYPES[topics.FRAME], header=first, **fields), stamp)
        odometry = blank(STORE, TYPES[topics.ODOMETRY], header=first)
        odometry.twist.twist.linear.x = 20.0
        self.add(topics.ODOMETRY, odometry, stamp)
        self.add(topics.IMAGE, image(stamp, rgb, "rgb8"), stamp)
        self.decision(
            number,
            action_names=["left", "keep", "right", "brake"],
            probabilities=probabilities(number),
            action=int(probabilities(number).argmax()) if action is None else action,
            target_speed=22.0,
            value=float(number),
            policy_hash=self.policy_hash,
            inference_ms=1.0,
            saliency_ms=2.0,
        )
        if fallback:
            self.decision(number, brake=1.0, target_speed=float("nan"), fallback=True)
        self.add(topics.SALIENCY, image(stamp, saliency, "32FC1"), stamp)
        self.add(OVERLAY, image(stamp, rgb // 2, "rgb8"), stamp)

    def decision(self, number: int, **fields: Any) -> None:
        stamp = number * PERIOD
        kind = TYPES[topics.DECISION]
        self.add(topics.DECISION, blank(STORE, kind, header=header(stamp), frame=number, **fields), stamp)

    def close(self) -> None:
        self.recorder.commit()
        self.recorder.close()
        assert not self.recorder.problem


def record(path: Path, frames: int, size: int = 128, policy_hash: str = "0123456789ab") -> Path:
    """A recording of that many frames, one chunk a second."""
    drive = DriveRecorder(path, size, policy_hash)
    for number in range(1, frames + 1):
        drive.frame(number)
        if number % 20 == 0:
            drive.recorder.commit()
    drive.close()
    return path
