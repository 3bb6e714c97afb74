"""What the car does when a part of the drive fails, each part a real process: the rows of docs/faults.md."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
from pathlib import Path

import live_support
import pytest

live_support.workspace()

from carla_digr_ros import topics  # noqa: E402
from carla_digr_ros.carla_bridge import NEWCOMER_SECONDS  # noqa: E402

from carla_digr.live.composition import WEIGHTS, Process  # noqa: E402
from carla_digr.live.pacing import PERIOD  # noqa: E402
from carla_digr.live.supervisor import free_domain  # noqa: E402

pytestmark = pytest.mark.alone

DOCUMENT = (Path(__file__).parents[2] / "docs/faults.md").read_text()
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT, re.M)[1:]}
LEVELS = {"OK": b"\0", "WARN": b"\1", "ERROR": b"\2"}
RECOVERY = 3

# In a node's own process, before its entry point: while the file FAULT names one of these, its part breaks.
FRAME_FAULTS = {
    "no frame for 2 periods": "time.sleep(0.13)",
    "no frame for 5 periods": "time.sleep(0.3)",
    "the same picture for 2 periods in motion": "image = before.image if calls % 5 else image",
    "the same picture for 5 periods in motion": "image = before.image",
    "a frame with the stamp of the one before": "stamp = before.stamp",
    "a frame with an older stamp": "stamp = before.stamp - 0.1",
    "the clock jumps back": "stamp = 1.0",
}
POLICY_FAULTS = {
    "a decision later than 40 ms (`deadline`)": "time.sleep(1.3)",
    "the policy's output is not a number": "decision = dataclasses.replace(decision, value=float('nan'))",
    "the policy's output has a wrong shape": "raise RuntimeError('output of shape (1, 5) for 4 actions')",
}
MAP_FAULTS = {"the explanation fails": "1 / 0"}
PATCH = """
import dataclasses, os, time
FAULT = os.environ["CARLA_DIGR_FAULT"]
def fault():
    try:
        return open(FAULT).read()
    except OSError:
        return ""
"""
BRIDGE = (
    PATCH
    + """
from carla_digr.driving.scenario import Scenario
step, before, calls = Scenario.step, None, 0
def broken_step(self, command):
    global before, calls
    frame = step(self, command)
    image, stamp, name = frame.image, frame.stamp, fault()
    calls += 1
    CASES
    frame = dataclasses.replace(frame, image=image, stamp=stamp)
    if not name or not calls % 5:
        before = frame
    return frame
Scenario.step = broken_step
"""
)
EXPLAINER = (
    PATCH
    + """
from carla_digr.explainer import Explainer
decide, explain = Explainer.decide, Explainer.explain
def broken_decide(self, rgb):
    decision, name = decide(self, rgb), fault()
    CASES
    return decision
def broken_explain(self, decision):
    if fault() == "the explanation fails":
        1 / 0
    return explain(self, decision)
Explainer.decide, Explainer.explain = broken_decide, broken_explain
"""
)


def patched(program: str, faults: dict[str, str]) -> str:
    cases = "\n    ".join(f"if name == {name!r}: {code}" for name, code in faults.items())
    return program.replace("CASES", cases)


class Drive:
    """A paced drive, watched; ``deadline`` is one that only a missing decision passes."""

    def __init__(self, port, start, observe, weights=WEIGHTS, faults=("", ""), deadline=1.0, **parameters):
        self.start, self.weights, self.port = start, weights, port
        self.observer = observe(
            topics.DECISION.name, topics.OVERLAY.name, topics.ODOMETRY.name, topics.DIAGNOSTICS.name
        )
        parameters = {"deadline": deadline, "recovery": RECOVERY, **parameters}
        self.bridge = start(live_support.bridge(port, **parameters), faults[0])
        self.explainer = self.start_explainer(faults[1])

    def start_explainer(self, fault=""):
        return self.start(Process("explainer", parameters={"weights": str(self.weights)}), fault)

    def decisions(self, fallback: bool):
        return [m for m in self.observer.received[topics.DECISION.name] if m.fallback == fallback]

    def drives(self, frames: int = 5) -> None:
        """Until the policy has driven on some more frames."""
        before = len(self.applied())
        self.observer.until(lambda: len(self.applied()) >= before + frames)

    def applied(self) -> list[int]:
        """Frames on which the policy's decision was applied, once the bridge has ruled on the next one."""
        braked = {m.frame for m in self.decisions(fallback=True)}
        return [m.frame for m in self.decisions(fallback=False) if m.frame not in braked][:-1]

    def braked(self, after: int):
        """What the bridge did instead of the policy's decisions after a frame."""
        return [m for m in self.decisions(fallback=True) if m.frame > after]

    def speed(self) -> float:
        return self.observer.received[topics.ODOMETRY.name][-1].twist.twist.linear.x

    def reports(self, node: str, since: int = 0):
        """What a node said on /diagnostics: level, message, values; the newest first."""
        for message in reversed(self.observer.received[topics.DIAGNOSTICS.name][since:]):
            for status in message.status:
                if status.name.startswith(node):
                    yield status.level, status.message, {v.key: v.value for v in status.values}

    def report(self, node: str):
        return next(self.reports(node), (None, "", {}))

    def said(self, row: str, since: int = 0):
        """Whether diagnostics have said all that a row of the document promises; a stop also shows as its state."""
        car, diagnostics = ROWS[row]
        for node, level, text in re.findall(r"(\w+) (OK|WARN|ERROR) `(.+?)`", diagnostics):
            matching = [r for r in self.reports(node, since) if r[0] == LEVELS[level] and text in r[1]]
            if car.startswith("stops") and node == "carla_bridge":
                matching = [report for report in matching if report[2]["watchdog"] == "stopping"]
            if not matching:
                return False
        return True


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Of a simulator that serves one test after the other."""
    number = live_support.free_port()
    with live_support.stage(0, tmp_path_factory.mktemp("simulator")) as start:
        start(live_support.simulator(number))
        yield number


def test_a_slow_first_decision_is_waited_for(port, start, observe):
    """A policy's first pass may be slower than the deadline: nobody brakes, and no period counts as missed."""
    first = (
        "import time; from carla_digr.explainer import Explainer; decide = Explainer.decide; calls = []; "
        "Explainer.decide = lambda self, rgb: (calls.append(1), len(calls) == 2 and time.sleep(1.5), "
        "decide(self, rgb))[2]"
    )
    drive = Drive(port, start, observe, faults=("", first))
    drive.drives(10)
    assert not [m for m in drive.decisions(fallback=True) if m.frame <= drive.applied()[0]]
    drive.observer.until(lambda: int(drive.report("carla_bridge")[2].get("episode", 0)) == 1)
    assert "Braking" not in drive.bridge.output


def test_the_explainer_is_killed(port, start, observe, weights):
    drive = Drive(port, start, observe, weights)
    drive.drives()
    drive.explainer.end(signal.SIGKILL)
    drive.observer.until(lambda: drive.said("the explainer is killed") and bool(drive.decisions(fallback=True)))
    stopping = drive.decisions(fallback=True)[0]
    assert (stopping.brake, stopping.throttle, stopping.steer) == (1.0, 0.0, 0.0)
    drive.start_explainer()
    drive.drives()
    drive.observer.until(lambda: drive.report("carla_bridge")[2].get("watchdog") == "driving")


def test_the_bridge_is_killed(port, start, observe, weights):
    """The world stands still until another bridge comes, which finds it as the first one had found it."""
    drive = Drive(port, start, observe, weights)
    drive.drives()
    drive.bridge.end(signal.SIGKILL)
    drive.observer.until(lambda: drive.said("the bridge is killed"))
    drive.bridge = drive.start(live_support.bridge(port))
    drive.drives()
    assert drive.bridge.end() == 0
    assert "Traceback" not in drive.bridge.output


def test_the_bridge_ends_with_a_sentence_when_the_simulator_does_not_come_back(start, observe, weights):
    port = live_support.free_port()
    simulator = start(live_support.simulator(port))
    drive = Drive(port, start, observe, weights, patience=1.0)
    drive.drives()
    simulator.end(signal.SIGKILL)
    assert drive.bridge.wait() == 2
    sentences = [line for line in drive.bridge.output.splitlines() if line.startswith("carla-digr: ")]
    assert len(sentences) == 1 and "No simulator answers" in sentences[0]
    assert "is gone" in drive.bridge.output
    assert "Traceback" not in drive.bridge.output


@pytest.mark.parametrize("kind", ["embedded", "carla"])
def test_the_simulator_hangs_or_is_killed(kind, start, observe):
    """With the world's own traffic and with the Traffic Manager's; each time ego, camera and traffic are new.

    The policy is the one that ships: random weights leave the road after a second or two, and a hang that falls into
    the reset after that, where no car drives, is none of the document's row.
    """
    port = live_support.free_port()
    simulator = start(live_support.simulator(port))
    drive = Drive(port, start, observe, simulator=kind, vehicles=8)
    observer = drive.observer

    def goes_on(episode: int) -> None:
        observer.until(lambda: f"Episode {episode}" in drive.bridge.output)
        drive.drives(10)
        observer.until(lambda: drive.report("carla_bridge")[2].get("watchdog") == "driving")

    goes_on(1)
    simulator.popen.send_signal(signal.SIGSTOP)
    observer.until(lambda: drive.said("no frame for 5 periods"))  # while the call hangs
    observer.until(lambda: drive.said("the simulator hangs"))
    simulator.popen.send_signal(signal.SIGCONT)
    goes_on(2)
    if kind == "embedded":  # a Traffic Manager's thread ends its whole process when its server dies
        reports = len(observer.received[topics.DIAGNOSTICS.name])
        simulator.end(signal.SIGKILL)
        observer.until(lambda: drive.said("the simulator is killed", reports))
        start(live_support.simulator(port))
        goes_on(3)
    assert drive.bridge.end() == 0
    assert "Traceback" not in drive.bridge.output


def test_the_page_is_frozen(port, start, observe, weights):
    drive = Drive(port, start, observe, weights)
    page = live_support.free_port()
    viewer = start(Process("viewer", parameters={"port": page}))
    drive.observer.until(lambda: "The page is at" in viewer.output)
    key = base64.b64encode(os.urandom(16)).decode()
    with socket.create_connection(("127.0.0.1", page)) as browser:  # asks for the stream, then never reads or answers
        browser.sendall(
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{page}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert ROWS["the page is frozen"] == ("drives on", "viewer OK, `frames dropped for slow clients` counts")
        drive.observer.until(
            lambda: (
                int(drive.report("viewer")[2].get("frames dropped for slow clients", 0)) > 10
                and drive.report("viewer")[0] == LEVELS["OK"]
            )
        )
        drive.drives(10)
    assert not drive.decisions(fallback=True)


def test_the_recorders_disk_is_full(port, start, observe, weights, tmp_path):
    """A limit on the size of its files, which a write meets with an error as it meets a full disk."""
    drive = Drive(port, start, observe, weights)
    recorder = Process("recorder", parameters={"directory": str(tmp_path / "recordings"), "weights": str(weights)})
    limit = "resource.RLIMIT_FSIZE, (500_000, 500_000)"
    running = start(
        recorder, f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit({limit})"
    )
    drive.observer.until(lambda: drive.said("the recorder's disk is full"))
    drive.drives(20)
    assert not drive.decisions(fallback=True)
    assert running.end() == 0
    assert "make room and run `carla-digr repair" in running.output


def test_two_bridges_on_one_simulator(port, start, observe, weights):
    drive = Drive(port, start, observe, weights)
    drive.drives()
    with free_domain() as other:
        second = live_support.Running(live_support.bridge(port), other, drive.bridge.log.with_suffix(".second"))
        assert second.wait() == 2
    assert f"process {drive.bridge.popen.pid} on {socket.gethostname()} owns the tick" in second.output
    drive.drives()


def test_two_bridges_in_one_ros_domain(port, start, observe, weights):
    drive = Drive(port, start, observe, weights)
    drive.drives(1)
    stranger = drive.observer.node.create_publisher(topics.CLOCK.type, topics.CLOCK.name, 10)  # which ends no drive
    drive.drives(round(NEWCOMER_SECONDS / PERIOD) + 10)  # from then on it is the other one that leaves
    drive.observer.node.destroy_publisher(stranger)
    other = live_support.free_port()
    start(live_support.simulator(other))
    second = start(live_support.bridge(other))
    assert second.wait() == 2
    assert "Another node publishes /clock too" in second.output
    drive.drives()
    assert drive.bridge.popen.poll() is None


def test_every_row_of_the_document_is_a_test():
    named = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")}
    here = {*FRAME_FAULTS, *POLICY_FAULTS, *MAP_FAULTS}
    two = {"the simulator hangs", "the simulator is killed"}
    for row in ROWS.keys() - here - two:
        assert row.lower().replace("'", "") in named, row


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


# The last tests here: their drive keeps the shared simulator.


@pytest.fixture(scope="module")
def broken_at_will(port, tmp_path_factory):
    """A drive with the policy that ships, and the file that names the part of it that is broken."""
    directory = tmp_path_factory.mktemp("drive")
    fault = directory / "fault"
    with free_domain() as domain, pytest.MonkeyPatch.context() as patch:
        patch.setitem(live_support.workspace(), "CARLA_DIGR_FAULT", str(fault))
        with live_support.stage(domain, directory) as start:
            observer = live_support.Observer(domain, *(t.name for t in topics.TOPICS))
            faults = patched(BRIDGE, FRAME_FAULTS), patched(EXPLAINER, POLICY_FAULTS)
            drive = Drive(port, start, lambda *names: observer, faults=faults)
            yield drive, fault
            observer.close()


@pytest.mark.parametrize("row", [*FRAME_FAULTS, *POLICY_FAULTS, *MAP_FAULTS])
def test_the_car_stops_or_drives_on_as_the_document_says_and_recovers(broken_at_will, row):
    drive, fault = broken_at_will
    observer = drive.observer
    drive.drives()
    frame = drive.applied()[-1]
    reports = len(observer.received[topics.DIAGNOSTICS.name])
    stops = ROWS[row][0].startswith("stops")
    try:
        temporary = fault.with_suffix(".new")
        temporary.write_text(row)
        os.replace(temporary, fault)
        observer.until(lambda: drive.said(row, reports))
        if stops:
            observer.until(lambda: bool(drive.braked(frame)))
        else:
            drive.drives()
        if row == "the explanation fails":
            assert not drive.braked(frame)
    finally:
        fault.unlink()
    drive.drives()
    braked = drive.braked(frame)
    assert all((m.brake, m.throttle) == (1.0, 0.0) for m in braked)
    if stops and not row.startswith("no frame"):  # there the frames that come are good ones
        stopped = [m for m in braked if m.steer == 0.0]
        assert stopped
        assert not any(m.probabilities or m.policy_hash for m in stopped)
    if stops:  # the row of good decisions
        answered = {m.frame for m in drive.decisions(fallback=False)}
        assert {m.frame for m in braked[1 - RECOVERY :]} <= answered
    commands = observer.received[topics.DECISION.name]
    assert all(0 <= m.brake <= 1 and 0 <= m.throttle <= 1 for m in commands)
    assert all(abs(m.steer) <= 1 for m in drive.decisions(fallback=True))
    for running in (drive.bridge, drive.explainer):
        assert running.popen.poll() is None and "Traceback" not in running.output
