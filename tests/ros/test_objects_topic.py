"""Objects of the node `explainer`: with the frame's stamp, after its map, and never in the way of a decision."""

from __future__ import annotations

from dataclasses import replace

import live_support
import numpy as np
import pytest

live_support.workspace()

from builtin_interfaces.msg import Time  # noqa: E402
from carla_digr_msgs.msg import DriveFrame, Vehicle, Vehicles  # noqa: E402
from carla_digr_ros import conversion, topics  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from carla_digr import objects  # noqa: E402
from carla_digr.driving.control import ACTIONS, Neighbour  # noqa: E402
from carla_digr.explainer import Explainer  # noqa: E402
from carla_digr.live.composition import Process  # noqa: E402
from carla_digr.simulator.sensors import instance_picture  # noqa: E402
from carla_digr.tasks.driving.drive import InProcessDrive  # noqa: E402

ANSWERS = (topics.DECISION.name, topics.SALIENCY.name, topics.OVERLAY.name)
OBJECTS = topics.OBJECTS.name
IN_TROUBLE = """
import time
from carla_digr import objects
said = objects.explain_objects
def explain_objects(*parts):
    {}
    return said(*parts)
objects.explain_objects = explain_objects
"""


class Bridge:
    """Publishes what belongs to a frame of a drive in this process, as the bridge does."""

    def __init__(self, observer):
        self.drive = InProcessDrive()
        self.drive.reset(4)
        kinds = (topics.FRAME, topics.IMAGE, topics.INSTANCES, topics.VEHICLES)
        self.out = {topic.name: topic.publisher(observer.node) for topic in kinds}
        observer.until(lambda: all(publisher.get_subscription_count() for publisher in self.out.values()))
        self.number = 0

    def header(self) -> Header:
        return Header(stamp=Time(sec=self.number // 20, nanosec=self.number % 20 * 50_000_000), frame_id="camera")

    def surroundings(self) -> tuple[np.ndarray, dict[int, Neighbour]]:
        camera = replace(self.drive.camera, width=256, height=256)
        vehicles = {int(i): Neighbour(20.0 + i, -3.5, -1) for i in self.drive.world.vehicles["id"]}
        del vehicles[self.drive.ego]
        return instance_picture(self.drive.world, camera)[:, :, 2::-1], vehicles

    def picture(self, episode: int = 1) -> np.ndarray:
        self.number += 1
        frame = self.drive.step(ACTIONS["wheels"]["keep"])
        self.out[topics.FRAME.name].publish(DriveFrame(header=self.header(), frame=1000 + self.number, episode=episode))
        self.out[topics.IMAGE.name].publish(conversion.to_message(frame.image, "rgb8", self.header()))
        return frame.image

    def segmentation(self) -> None:
        labels, vehicles = self.surroundings()
        self.out[topics.INSTANCES.name].publish(conversion.to_message(labels, "rgb8", self.header()))
        rows = [Vehicle(id=i, ahead=v.ahead, right=v.right, lane=v.lane) for i, v in vehicles.items()]
        self.out[topics.VEHICLES.name].publish(Vehicles(header=self.header(), frame=1000 + self.number, vehicles=rows))


@pytest.fixture
def explainer(start, weights):
    return start(Process("explainer", parameters={"weights": str(weights)}))


def test_objects_have_the_stamp_of_their_frame_and_come_after_its_map(explainer, observe, weights):
    observer = observe(*ANSWERS, OBJECTS)
    bridge, library = Bridge(observer), Explainer.from_checkpoint(weights)
    narrator = objects.Narrator(library.action_names)
    for number in range(12):
        segmentation_first = number % 2
        if segmentation_first:
            bridge.number += 1
            bridge.drive.step(ACTIONS["wheels"]["keep"])
            labels, vehicles = bridge.surroundings()
            bridge.segmentation()
            picture = bridge.drive.frame().image
            bridge.out[topics.IMAGE.name].publish(conversion.to_message(picture, "rgb8", bridge.header()))
        else:
            picture = bridge.picture()
            labels, vehicles = bridge.surroundings()
            bridge.segmentation()
        observer.until(lambda wanted=number + 1: len(observer.received[OBJECTS]) == wanted)
        message = observer.received[OBJECTS][-1]
        assert message.header.stamp == bridge.header().stamp
        decision = library.decide(picture)
        saliency = library.explain(decision).map
        seen = objects.viewed_objects(labels, vehicles, saliency.shape)
        expected = objects.explain_objects(library, decision, saliency, seen)
        assert message.policy_hash == library.policy_hash
        assert [(o.id, o.kind, o.lane, o.action, o.flips) for o in message.objects] == [
            (t.seen.id, t.seen.kind, t.seen.lane, t.action, t.flips) for t in expected
        ]
        np.testing.assert_allclose([o.effect for o in message.objects], [t.effect for t in expected], atol=1e-5)
        np.testing.assert_allclose([o.share for o in message.objects], [t.share for t in expected], atol=1e-5)
        assert message.sentence == narrator.say(decision.action, expected)
        for said, thing in zip(message.objects, expected, strict=True):
            rows, columns = np.nonzero(thing.seen.mask)
            assert (said.left, said.right) == (columns.min(), columns.max())
            assert (said.top, said.bottom) == (rows.min(), rows.max())
    order = [name for _, name in sorted(observer.sent)]
    assert order == [*ANSWERS, OBJECTS] * 12


@pytest.mark.parametrize("trouble", ["time.sleep(1e6)", "while True: pass", "raise OSError('of the test')"])
def test_no_decision_and_no_map_waits_for_objects(start, observe, weights, trouble):
    explainer = start(Process("explainer", parameters={"weights": str(weights)}), IN_TROUBLE.format(trouble))
    observer = observe(*ANSWERS, OBJECTS, topics.DIAGNOSTICS.name)
    bridge = Bridge(observer)
    for number in range(30):
        bridge.picture()
        bridge.segmentation()
        observer.until(lambda wanted=number + 1: all(len(observer.received[name]) == wanted for name in ANSWERS))
    assert not observer.received[OBJECTS]
    if trouble.startswith("raise"):
        observer.until(lambda: any("of the test" in s.message for s in statuses(observer)))
    else:
        observer.until(
            lambda: any(values(s).get("objects left out", "0") not in ("0", "1") for s in statuses(observer))
        )
    assert explainer.popen.poll() is None


def test_objects_that_come_late_are_left_out_and_the_newest_frame_has_its_own(start, observe, weights):
    start(Process("explainer", parameters={"weights": str(weights)}), IN_TROUBLE.format("time.sleep(0.2)"))
    observer = observe(*ANSWERS, OBJECTS)
    bridge = Bridge(observer)
    for number in range(20):
        bridge.picture()
        bridge.segmentation()
        observer.until(lambda wanted=number + 1: all(len(observer.received[name]) == wanted for name in ANSWERS))
    last = bridge.header().stamp
    observer.until(lambda: bool(observer.received[OBJECTS]) and observer.received[OBJECTS][-1].header.stamp == last)
    assert len(observer.received[OBJECTS]) < 20


def test_without_segmentation_or_switched_off_there_are_no_objects(explainer, observe):
    observer = observe(*ANSWERS, OBJECTS)
    bridge = Bridge(observer)
    bridge.picture()
    observer.until(lambda: bool(observer.received[topics.OVERLAY.name]))
    assert observer.set_parameter("explainer", "objects", False).successful
    bridge.picture()
    bridge.segmentation()
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 2)
    assert observer.set_parameter("explainer", "objects", True).successful
    bridge.picture()
    bridge.segmentation()
    observer.until(lambda: bool(observer.received[OBJECTS]))
    assert [m.header.stamp for m in observer.received[OBJECTS]] == [bridge.header().stamp]


def statuses(observer):
    return [status for message in observer.received[topics.DIAGNOSTICS.name] for status in message.status]


def values(status) -> dict[str, str]:
    return {value.key: value.value for value in status.values}
