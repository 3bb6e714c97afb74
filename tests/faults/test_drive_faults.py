"""What the car does when a part of the drive fails, each part a real process."""

from __future__ import annotations

import signal

import live_support
import pytest

live_support.workspace()

from carla_digr_ros import topics  # noqa: E402

from carla_digr.live.composition import Process  # noqa: E402

NAN_DECISIONS = (
    "import dataclasses, numpy; from carla_digr.live.explainer import Explainer; decide = Explainer.decide; "
    "Explainer.decide = lambda self, rgb: dataclasses.replace(decide(self, rgb), value=numpy.nan)"
)
BROKEN_MAPS = (  # from the second map on; the first is the node's own when it starts
    "from carla_digr.live.explainer import Explainer; explain = Explainer.explain; calls = []; "
    "Explainer.explain = lambda self, decision: 1 / 0 if calls else calls.append(1) or explain(self, decision)"
)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Of a simulator that serves one test after the other."""
    number = live_support.free_port()
    with live_support.stage(0, tmp_path_factory.mktemp("simulator")) as start:
        start(live_support.simulator(number))
        yield number


class Drive:
    """A paced drive with a deadline that only a missing decision passes."""

    def __init__(self, port, start, observe, weights, fault="", **parameters):
        self.start, self.weights = start, weights
        self.observer = observe(
            topics.DECISION.name, topics.OVERLAY.name, topics.ODOMETRY.name, topics.DIAGNOSTICS.name
        )
        self.bridge = start(live_support.bridge(port, deadline=1.0, recovery=3, **parameters))
        self.explainer = self.start_explainer(fault)

    def start_explainer(self, fault=""):
        return self.start(Process("explainer", parameters={"weights": str(self.weights)}), fault)

    def decisions(self, fallback: bool):
        return [m for m in self.observer.received[topics.DECISION.name] if m.fallback == fallback]

    def speed(self) -> float:
        return self.observer.received[topics.ODOMETRY.name][-1].twist.twist.linear.x

    def report(self, node: str):
        """The newest diagnostics of a node: level, message, values."""
        for message in reversed(self.observer.received[topics.DIAGNOSTICS.name]):
            for status in message.status:
                if status.name.startswith(node):
                    return status.level, status.message, {v.key: v.value for v in status.values}
        return None, "", {}


def test_the_car_brakes_when_the_explainer_is_killed_and_drives_again_with_a_new_one(port, start, observe, weights):
    drive = Drive(port, start, observe, weights)
    observer = drive.observer
    observer.until(lambda: len(drive.decisions(fallback=False)) >= 5)
    drive.explainer.end(signal.SIGKILL)
    observer.until(lambda: bool(drive.decisions(fallback=True)))
    stopping = drive.decisions(fallback=True)[0]
    assert (stopping.brake, stopping.throttle, stopping.steer) == (1.0, 0.0, 0.0)
    assert not stopping.probabilities and not stopping.policy_hash
    observer.until(lambda: drive.report("carla_bridge")[2].get("watchdog") == "stopping")
    level, message, _ = drive.report("carla_bridge")
    assert level == b"\1" and "no decision for frame" in message

    drive.start_explainer()
    driven = len(drive.decisions(fallback=False))
    observer.until(lambda: len(drive.decisions(fallback=False)) >= driven + 5)
    observer.until(lambda: drive.report("carla_bridge")[2].get("watchdog") == "driving")
    applied = drive.decisions(fallback=False)[-1].frame
    assert applied not in {m.frame for m in drive.decisions(fallback=True)}


def test_the_car_brakes_on_decisions_that_are_not_numbers(port, start, observe, weights):
    drive = Drive(port, start, observe, weights, fault=NAN_DECISIONS)
    drive.observer.until(lambda: len(drive.decisions(fallback=True)) >= 5)
    assert all((m.brake, m.throttle, m.steer) == (1.0, 0.0, 0.0) for m in drive.decisions(fallback=True))
    drive.observer.until(lambda: drive.report("explainer")[0] == b"\2")
    assert "not a number" in drive.report("explainer")[1]
    drive.observer.until(lambda: "steer is nan" in drive.report("carla_bridge")[1])


def test_a_map_that_fails_never_stops_the_decisions(port, start, observe, weights):
    drive = Drive(port, start, observe, weights, fault=BROKEN_MAPS)
    drive.observer.until(lambda: len(drive.decisions(fallback=False)) >= 20)
    assert not drive.decisions(fallback=True)
    assert not drive.observer.received[topics.OVERLAY.name]
    drive.observer.until(lambda: drive.report("explainer")[0] == b"\2")
    assert "No map for this frame: ZeroDivisionError" in drive.report("explainer")[1]
    assert drive.explainer.popen.poll() is None


def test_the_bridge_ends_with_a_sentence_when_the_simulator_is_killed(start, observe, weights):
    port = live_support.free_port()
    simulator = start(live_support.simulator(port))
    drive = Drive(port, start, observe, weights, patience=1.0)
    drive.observer.until(lambda: len(drive.decisions(fallback=False)) >= 5)
    simulator.end(signal.SIGKILL)
    assert drive.bridge.wait() == 2
    sentences = [line for line in drive.bridge.output.splitlines() if line.startswith("carla-digr: ")]
    assert len(sentences) == 1 and "no simulator answers" in sentences[0]
    assert "is gone" in drive.bridge.output
    assert "Traceback" not in drive.bridge.output


@pytest.mark.parametrize("kind", ["embedded", "carla"])
def test_the_drive_goes_on_after_the_simulator_hung_and_after_it_was_killed(kind, start, observe, weights):
    """With the world's own traffic and with the Traffic Manager's; each time ego, camera and traffic are new."""
    port = live_support.free_port()
    simulator = start(live_support.simulator(port))
    drive = Drive(port, start, observe, weights, simulator=kind, vehicles=8)
    observer = drive.observer

    def goes_on(episode: int) -> None:
        observer.until(lambda: f"Episode {episode}" in drive.bridge.output)
        driven = len(drive.decisions(fallback=False))
        observer.until(lambda: len(drive.decisions(fallback=False)) >= driven + 10)
        observer.until(lambda: drive.report("carla_bridge")[2].get("watchdog") == "driving")

    goes_on(1)
    simulator.popen.send_signal(signal.SIGSTOP)
    observer.until(lambda: "the simulator does not answer" in drive.report("carla_bridge")[1])
    assert drive.report("carla_bridge")[0] == b"\1"
    simulator.popen.send_signal(signal.SIGCONT)
    goes_on(2)
    if kind == "embedded":  # a Traffic Manager's thread ends its whole process when its server dies
        simulator.end(signal.SIGKILL)
        observer.until(lambda: drive.bridge.output.count("is gone") == 2)
        start(live_support.simulator(port))
        goes_on(3)
    assert drive.bridge.end() == 0
    assert "Traceback" not in drive.bridge.output


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"roads": "2, 777"}, "no spawn point on the road 777"),
        ({"spawn_points": "5, 9999"}, "not 9999"),
        ({"roads": "north"}, "roads must be a whole number"),
    ],
    ids=["roads", "points", "words"],
)
def test_places_that_the_map_does_not_have_are_refused_before_the_drive(port, start, parameters, sentence):
    bridge = start(live_support.bridge(port, **parameters))
    assert bridge.wait() == 2
    assert sentence in bridge.output
    assert "Traceback" not in bridge.output


def test_the_bridge_leaves_the_simulator_as_it_was(port, start, observe, weights):
    """A second bridge can drive after the first one has ended."""
    observer = observe(topics.OVERLAY.name)
    start(Process("explainer", parameters={"weights": str(weights)}))
    for drive in (1, 2):
        bridge = start(live_support.bridge(port))
        observer.until(lambda bridge=bridge: "Episode 1" in bridge.output)
        observer.received.clear()
        observer.until(lambda: len(observer.received[topics.OVERLAY.name]) >= 3)
        assert bridge.end() == 0, drive
        assert "Traceback" not in bridge.output
