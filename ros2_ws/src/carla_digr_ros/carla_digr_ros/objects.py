"""The explainer's third stage: which object decides, in a thread of its own that nothing waits for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from carla_digr_msgs.msg import ExplainedObject, ExplainedObjects, Vehicle, Vehicles
from numpy.typing import NDArray
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from carla_digr import objects
from carla_digr.driving.control import Neighbour
from carla_digr.explainer import Decision, Explainer
from carla_digr.scheduling import BESIDE, this_thread_goes_first
from carla_digr_ros.conversion import to_message, to_rgb
from carla_digr_ros.diagnostics import Recent

END_SECONDS = 1.0
PRACTICE_SECONDS = 10.0  # that a start waits for the practice
KNOWN_FRAMES = 8  # whose parts wait for the others
WAITING = 4  # frames, 0.2 s
CAR_LABEL, LINE_LABEL, RAIL_LABEL = 14, 24, 28  # CARLA's


@dataclass(frozen=True)
class Explained:
    """A frame with its decision and its map, float32 (H, W).

    ``drive`` changes where the sentence must begin anew.
    """

    header: Header
    frame: int
    explainer: Explainer
    decision: Decision
    saliency: NDArray[np.float32]
    drive: Hashable


class ObjectsStage:
    """Takes what belongs to a frame, in any order, from one thread; works in another one.

    There is room for WAITING frames: where they come faster than they are done for longer than a hiccup of the machine
    lasts, the oldest is `dropped`.

    Args:
        publish: called from the stage's thread.
        realtime: whether that goes before the machine's ordinary processes.
    """

    def __init__(self, publish: Callable[[ExplainedObjects], None], realtime: bool = False):
        self.done = Recent()
        self.dropped = 0
        self.problem = ""  # of the last frame
        self._publish, self._realtime = publish, realtime
        self._parts: dict[tuple[int, int], dict[type, Explained | Image | Vehicles]] = {}
        self._waiting: deque[tuple[Explained, Image, Vehicles]] = deque()
        self._practice: tuple[Explained, Image, Vehicles] | None = None
        self._wake = threading.Condition()
        self._ended = False
        self._narrator: tuple[Hashable, objects.Narrator] | None = None
        self._thread = threading.Thread(target=self._work, name="objects", daemon=True)
        self._thread.start()

    def practise(self, explainer: Explainer) -> None:
        """Work through a made-up frame, so that the first one that is driven on costs no more than the others.

        What fails or hangs in it does so in the stage's thread, as with a frame.
        """
        height, width, _ = explainer.image_shape
        decision = explainer.decide(np.zeros(explainer.image_shape, np.uint8))
        saliency = explainer.explain(decision).map
        labels = np.zeros((2 * height, 2 * width, 3), np.uint8)
        labels[height:, ::9, 0] = LINE_LABEL
        labels[height:, : width // 4, 0] = RAIL_LABEL
        labels[height : height + height // 4, width : width + width // 4] = CAR_LABEL, 1, 0
        vehicles = Vehicles(vehicles=[Vehicle(id=1, ahead=20.0)])
        explained = Explained(Header(), 0, explainer, decision, saliency, None)
        with self._wake:
            self._practice = explained, to_message(labels, "rgb8", Header()), vehicles
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._practice is None, PRACTICE_SECONDS)
        explainer.restart()

    def add_explained(
        self,
        header: Header,
        frame: int,
        explainer: Explainer,
        decision: Decision,
        saliency: NDArray[np.float32],
        drive: Hashable,
    ) -> None:
        """What the explainer made of a frame; the arguments are `Explained`'s."""
        self.add(Explained(header, frame, explainer, decision, saliency, drive))

    def add(self, part: Explained | Image | Vehicles) -> None:
        """One of the three parts of a frame."""
        key = part.header.stamp.sec, part.header.stamp.nanosec
        parts = self._parts.setdefault(key, {})
        parts[type(part)] = part
        if len(parts) == 3:
            del self._parts[key]
            with self._wake:
                self._waiting.append((parts[Explained], parts[Image], parts[Vehicles]))
                if len(self._waiting) > WAITING:
                    self._waiting.popleft()
                    self.dropped += 1
                self._wake.notify()
        while len(self._parts) > KNOWN_FRAMES:
            del self._parts[next(iter(self._parts))]

    def close(self) -> None:
        """End the thread after its present frame, which is waited for a moment."""
        with self._wake:
            self._ended = True
            self._waiting.clear()
            self._wake.notify()
        self._thread.join(END_SECONDS)

    def _work(self) -> None:
        torch.set_num_threads(1)  # is a thread's own
        if self._realtime:  # an ordinary one that holds Python's lock while others run keeps a decision waiting
            this_thread_goes_first(BESIDE)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ended or self._practice is not None or bool(self._waiting))
                if self._ended:
                    return
                practice = self._practice
                parts = self._waiting.popleft() if practice is None else None
            if practice is not None:
                with contextlib.suppress(Exception):  # the first frame will tell
                    self._message(*practice)
                with self._wake:
                    self._narrator, self._practice = None, None
                    self._wake.notify_all()
                continue
            assert parts is not None
            start = time.monotonic()
            try:
                message = self._message(*parts)
                message.objects_ms = (time.monotonic() - start) * 1000.0
                if not self._ended:
                    self._publish(message)
            except Exception as error:  # objects are missing, the drive goes on
                self.problem = f"No objects for this frame: {error!r}"
            else:
                self.problem = ""
                self.done.add((time.monotonic() - start) * 1000.0)

    def _message(self, explained: Explained, labels: Image, vehicles: Vehicles) -> ExplainedObjects:
        """What the parts of a frame say.

        Raises:
            ValueError: the segmentation is no RGB picture.
        """
        neighbours = {there.id: Neighbour(there.ahead, there.right, there.lane) for there in vehicles.vehicles}
        seen = objects.viewed_objects(to_rgb(labels), neighbours, explained.saliency.shape)
        found = objects.explain_objects(explained.explainer, explained.decision, explained.saliency, seen)
        if self._narrator is None or self._narrator[0] != explained.drive:
            self._narrator = explained.drive, objects.Narrator(explained.explainer.action_names)
        return ExplainedObjects(
            header=explained.header,
            frame=explained.frame,
            sentence=self._narrator[1].say(explained.decision.action, found),
            objects=[ExplainedObject(**fields) for fields in objects.fields_of(found)],
            policy_hash=explained.explainer.policy_hash,
        )
