"""The trust meter of the node `explainer`: published with its age, and told where it stays low."""

from __future__ import annotations

import live_support
import pytest

live_support.workspace()

from builtin_interfaces.msg import Time  # noqa: E402
from carla_digr_msgs.msg import DriveFrame  # noqa: E402
from carla_digr_ros import conversion, topics  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from carla_digr.checkpoint import WEIGHTS_DIRECTORY  # noqa: E402
from carla_digr.live.composition import Process  # noqa: E402
from carla_digr.live.trust import LOW  # noqa: E402
from carla_digr.tasks.driving.drive import InProcessDrive  # noqa: E402

STUDENT = WEIGHTS_DIRECTORY / "driving_student.safetensors"
TRUST = topics.TRUST.name
AT_ONCE = """
import carla_digr_ros.explainer as node, carla_digr.live.trust as t
node.SETTLED = 1
t.SHARE, t.PAUSE = 1.0, 0.0
"""
MIRRORED = """
from carla_digr.explainer import Explainer, Saliency
true = Explainer.explain
def mirrored(self, decision):
    found = true(self, decision)
    return Saliency(found.map[::-1, ::-1].copy(), found.flat, found.saliency_ms)
Explainer.explain = mirrored
"""


class Camera:
    """One picture of the highway again and again, with other stamps."""

    def __init__(self, observer):
        self.observer = observer
        self.facts, self.images = (topic.publisher(observer.node) for topic in (topics.FRAME, topics.IMAGE))
        observer.until(lambda: self.images.get_subscription_count() and self.facts.get_subscription_count())
        self.picture = InProcessDrive().reset(5).image
        self.number = 0

    def send(self) -> None:
        self.number += 1
        stamp = Time(sec=self.number // 20, nanosec=self.number % 20 * 50_000_000)
        header = Header(stamp=stamp, frame_id="camera")
        self.facts.publish(DriveFrame(header=header, frame=1000 + self.number))
        self.images.publish(conversion.to_message(self.picture, "rgb8", header))
        seen = len(self.observer.received[topics.OVERLAY.name])
        self.observer.until(lambda: len(self.observer.received[topics.OVERLAY.name]) > seen)


def statuses(observer):
    return [status for message in observer.received[topics.DIAGNOSTICS.name] for status in message.status]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_agreement_is_published_with_its_age_and_told_where_it_stays_low(start, observe, wrong):
    explainer = Process("explainer", parameters={"weights": str(STUDENT), "method": "linear"})
    start(explainer, AT_ONCE + (MIRRORED if wrong else ""))
    observer = observe(topics.OVERLAY.name, TRUST, topics.DIAGNOSTICS.name)
    camera = Camera(observer)

    def numbered():  # a picture may come before its frame's number, on another topic
        return [message for message in observer.received[TRUST] if message.frame]

    live_support.until(lambda: len(numbered()) >= 4, camera.send)
    for message in numbered():
        now = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        assert message.age == pytest.approx(now - (message.frame - 1000) * 0.05, abs=1e-3)
        assert message.age > 0.0
        assert (message.method, message.target) == ("linear", "")
        assert (message.agreement < LOW) == wrong
    seen = len(statuses(observer))
    observer.until(lambda: len(statuses(observer)) > seen)
    camera.send()  # pictures go on
    latest = statuses(observer)[-1]
    assert {"agreement with a perturbation map", "age of the agreement (s)"} <= {v.key for v in latest.values}
    assert ("agree little" in latest.message) == wrong


def test_switched_off_there_is_no_process(start, observe):
    explainer = start(
        Process("explainer", parameters={"weights": str(STUDENT), "trust": False}),
        AT_ONCE + "\ndef never(*_): raise SystemExit('started')\nt.subprocess.Popen = never",
    )
    observer = observe(topics.OVERLAY.name, TRUST)
    camera = Camera(observer)
    for _ in range(20):
        camera.send()
    assert not observer.received[TRUST]
    assert "started" not in explainer.output
