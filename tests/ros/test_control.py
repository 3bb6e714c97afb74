"""What a user changes while it drives: life cycle, parameters, services, manual control, attacks."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import threading
from collections import Counter

import aiohttp
import live_support
import numpy as np
import pytest

live_support.workspace()

from ackermann_msgs.msg import AckermannDrive, AckermannDriveStamped  # noqa: E402
from carla_digr_msgs.msg import DrivingDecision, VehicleControl  # noqa: E402
from carla_digr_msgs.srv import SetPolicy  # noqa: E402
from carla_digr_ros import conversion, security, topics  # noqa: E402
from geometry_msgs.msg import Twist, Vector3  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from rcl_interfaces.srv import DescribeParameters, SetParameters  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402
from strange_messages import nonsense  # noqa: E402

from carla_digr.driving.control import ACTIONS  # noqa: E402
from carla_digr.explainer import Explainer  # noqa: E402
from carla_digr.live.composition import WEIGHTS, Process  # noqa: E402
from carla_digr.live.supervisor import free_domain  # noqa: E402
from carla_digr.recordings.bag import open_bag  # noqa: E402

NAMES = [topic.name for topic in topics.TOPICS if topic is not topics.MANUAL]


# A policy in a folder "slow" takes as long to load as a large one on a slow disk.
SLOW_TO_LOAD = """
import time
from carla_digr.explainer import Explainer
load = Explainer.from_checkpoint
def slowly(weights, *arguments, **more):
    time.sleep(2.0 if "/slow/" in str(weights) else 0.0)
    return load(weights, *arguments, **more)
Explainer.from_checkpoint = slowly
"""


class Drive:
    """A paced drive with the policy that ships, watched, and its services."""

    def __init__(self, domain, directory, start):
        self.start, port = start, live_support.free_port()
        self.observer = live_support.Observer(domain, *NAMES)
        start(live_support.simulator(port))
        self.bridge = start(live_support.bridge(port, deadline=1.0, recovery=2))
        self.explainer = start(Process("explainer"), SLOW_TO_LOAD)
        self.manual = topics.MANUAL.publisher(self.observer.node)

    def call(self, kind, name, **fields):
        """The answer of a service."""
        client = self.observer.node.create_client(kind, name)
        self.observer.until(client.service_is_ready)
        answer = client.call_async(kind.Request(**fields))
        self.observer.until(answer.done)
        self.observer.node.destroy_client(client)
        return answer.result()

    def set(self, node, **values):
        """Why a node refuses new values of its parameters; "" if it takes them."""
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        results = self.call(SetParameters, f"/{node}/set_parameters", parameters=parameters).results
        assert all(result.successful == (not result.reason) for result in results)
        return "".join(result.reason for result in results)

    def last(self, topic):
        return self.observer.received[topic.name][-1]

    def new(self, topic, condition=lambda message: True, count=1):
        """The first messages of a topic from now on for which something is so."""
        seen = len(self.observer.received[topic.name])

        def found():
            return [m for m in self.observer.received[topic.name][seen:] if condition(m)]

        self.observer.until(lambda: len(found()) >= count)
        return found()[:count]

    def policy_drives(self):
        """Until the policy's decisions are applied again."""
        self.new(topics.DECISION, lambda m: not m.fallback, count=4)
        self.observer.until(lambda: not any(m.fallback for m in self.observer.received[topics.DECISION.name][-4:]))

    def status(self, node):
        for message in reversed(self.observer.received[topics.DIAGNOSTICS.name]):
            for status in message.status:
                if status.name.startswith(node):
                    return {"level": status.level, "says": status.message, **{v.key: v.value for v in status.values}}
        return {}


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    directory = tmp_path_factory.mktemp("drive")
    with free_domain() as domain, live_support.stage(domain, directory) as start:
        drive = Drive(domain, directory, start)
        drive.new(topics.OVERLAY)
        yield drive
        assert drive.bridge.popen.poll() is None and "Traceback" not in drive.bridge.output
        assert drive.explainer.popen.poll() is None and "Traceback" not in drive.explainer.output
        drive.observer.close()


def test_every_parameter_is_described(drive):
    from rcl_interfaces.srv import ListParameters

    for node in ("carla_bridge", "explainer"):
        names = drive.call(ListParameters, f"/{node}/list_parameters").result.names
        ours = [name for name in names if name not in ("use_sim_time", "start_type_description_service")]
        assert {"autostart"} <= set(ours)
        for descriptor in drive.call(DescribeParameters, f"/{node}/describe_parameters", names=ours).descriptors:
            assert descriptor.description, descriptor.name


def test_parameters_change_live_and_are_refused_with_a_reason(drive):
    assert drive.set("explainer", opacity=0.0, colormap="turbo") == ""
    drive.new(topics.OVERLAY)
    overlay = drive.new(topics.OVERLAY)[0]
    (picture,) = [m for m in drive.observer.received[topics.IMAGE.name] if m.header.stamp == overlay.header.stamp]
    np.testing.assert_array_equal(conversion.to_rgb(overlay), conversion.to_rgb(picture))
    assert "out of range" in drive.set("explainer", opacity=1.5)
    assert "out of range" in drive.set("explainer", attack_epsilon=float("nan"))
    assert "must be inferno or" in drive.set("explainer", colormap="rainbow")
    assert "must be none or fgsm or pgd, not 'cw'" in drive.set("explainer", attack="cw")
    assert "Wrong parameter type" in drive.set("explainer", opacity="much")
    assert "call the service" in drive.set("explainer", weights=str(WEIGHTS)).lower()
    assert "read-only" in drive.set("carla_bridge", port=2002)
    assert drive.set("carla_bridge", recovery=1, patience=30.0) == ""
    assert drive.set("explainer", opacity=0.8, colormap="inferno") == ""
    assert drive.set("carla_bridge", recovery=2) == ""


def test_explanation_is_switched_off_and_on(drive):
    assert drive.set("explainer", explanation=False) == ""
    drive.new(topics.DECISION, lambda m: m.unexplained)
    maps = len(drive.observer.received[topics.SALIENCY.name])
    drive.new(topics.DECISION, count=10)
    assert len(drive.observer.received[topics.SALIENCY.name]) - maps <= 1  # one may have been under way
    assert drive.set("explainer", explanation=True) == ""
    drive.new(topics.SALIENCY)


def test_pause_step_and_reset(drive):
    refused = drive.call(Trigger, "/carla_bridge/step")
    assert not refused.success and "Pause the drive first" in refused.message
    assert drive.call(SetBool, "/carla_bridge/pause", data=True).success
    drive.observer.until(lambda: drive.status("carla_bridge")["says"] == "paused")

    def explained():
        return drive.last(topics.OVERLAY).header.stamp == drive.last(topics.FRAME).header.stamp

    drive.observer.until(explained)
    number = drive.last(topics.FRAME).frame
    for step in (1, 2):
        assert drive.call(Trigger, "/carla_bridge/step").success
        drive.observer.until(lambda step=step: drive.last(topics.FRAME).frame == number + step and explained())
    episode = drive.last(topics.FRAME).episode
    assert drive.set("carla_bridge", seed=77) == ""
    assert "77" in drive.call(Trigger, "/carla_bridge/reset").message
    facts = drive.new(topics.FRAME)[0] if drive.last(topics.FRAME).episode == episode else drive.last(topics.FRAME)
    assert (facts.episode, facts.seed) == (episode + 1, 77)
    assert drive.call(SetBool, "/carla_bridge/pause", data=False).success
    drive.policy_drives()
    assert drive.last(topics.FRAME).seed == 77


def test_manual_control_wins_while_it_is_fresh_and_a_wrong_command_brakes(drive):
    drive.observer.until(lambda: drive.manual.get_subscription_count() == 1)

    def command(**values):
        """Publish until it is applied; the decision that says so."""
        seen = len(drive.observer.received[topics.DECISION.name])

        def applied():
            return [m for m in drive.observer.received[topics.DECISION.name][seen:] if m.manual]

        live_support.until(
            lambda: len(applied()) >= 2,
            lambda: (drive.manual.publish(VehicleControl(**values)), drive.observer.spin()),
        )
        return applied()[-1]

    driven = command(throttle=0.5, steer=-0.25)
    assert driven.fallback and np.isnan(driven.target_speed)
    assert (driven.throttle, driven.steer, driven.brake) == (0.5, -0.25, 0.0)
    drive.policy_drives()
    for wrong in ({"steer": float("nan")}, {"throttle": 1.5}, {"brake": -1.0}):
        drive.policy_drives()
        stopped = command(**wrong)
        assert (stopped.throttle, stopped.steer, stopped.brake) == (0.0, 0.0, 1.0)
    drive.policy_drives()
    assert "Full brake: in the manual command" in drive.bridge.output


def test_a_users_teleop_drives_with_the_same_precedence(drive):
    twist = topics.CMD_VEL.publisher(drive.observer.node)
    ackermann = topics.ACKERMANN.publisher(drive.observer.node)
    drive.observer.until(lambda: twist.get_subscription_count() == ackermann.get_subscription_count() == 1)

    def command(publisher, message):
        """Publish until it is applied; the decision that says so."""
        drive.policy_drives()
        seen = len(drive.observer.received[topics.DECISION.name])

        def applied():
            return [m for m in drive.observer.received[topics.DECISION.name][seen:] if m.manual]

        live_support.until(lambda: len(applied()) >= 2, lambda: (publisher.publish(message), drive.observer.spin()))
        return applied()[-1]

    def twisted(speed, turn):
        return Twist(linear=Vector3(x=speed), angular=Vector3(z=turn))

    driven = command(twist, twisted(12.0, 0.1))  # to the left, on a circle of 120 m
    assert driven.target_speed == 12.0
    assert driven.steer == pytest.approx(-np.arctan(2.88 / 120.0) / np.radians(70.0), abs=1e-6)
    driven = command(ackermann, AckermannDriveStamped(drive=AckermannDrive(speed=9.0, steering_angle=-0.35)))
    assert (driven.target_speed, driven.steer) == (9.0, pytest.approx(0.35 / np.radians(70.0), abs=1e-6))
    for publisher, wrong in (
        (twist, twisted(-1.0, 0.0)),
        (twist, twisted(float("nan"), 0.0)),
        (ackermann, AckermannDriveStamped(drive=AckermannDrive(speed=5.0, steering_angle=2.0))),
    ):
        stopped = command(publisher, wrong)
        assert (stopped.throttle, stopped.steer, stopped.brake) == (0.0, 0.0, 1.0)
    for publisher in (twist, ackermann):
        drive.observer.node.destroy_publisher(publisher)
    drive.policy_drives()


def test_the_overlay_is_compressed_while_somebody_listens(drive):
    jpegs = []
    heard = drive.observer.node.create_subscription(
        topics.OVERLAY_JPEG.type, topics.OVERLAY_JPEG.name, jpegs.append, topics.QOS
    )
    drive.observer.until(lambda: len(jpegs) >= 3)
    drive.observer.node.destroy_subscription(heard)
    assert jpegs[-1].format == "rgb8; jpeg compressed bgr8"
    raw = {(m.header.stamp.sec, m.header.stamp.nanosec): m for m in drive.observer.received[topics.OVERLAY.name]}
    for message in jpegs[:-1]:
        picture = conversion.to_rgb(raw[message.header.stamp.sec, message.header.stamp.nanosec]).astype(int)
        assert np.abs(conversion.to_rgb(message) - picture).mean() < 8


def test_an_attack_changes_what_the_policy_sees_and_is_told(drive):
    library = Explainer.from_checkpoint(WEIGHTS)
    for attack, epsilon in (("fgsm", 0.05), ("pgd", 0.02)):
        assert drive.set("explainer", attack_epsilon=epsilon) == ""
        assert drive.set("explainer", attack=attack) == ""
        decision = drive.new(topics.DECISION, lambda m, a=attack: m.attack.startswith(a))[0]
        assert decision.attack == f"{attack} {epsilon:g}"
        stamp = decision.header.stamp

        def of(topic, stamp=stamp):
            return [m for m in drive.observer.received[topic.name] if m.header.stamp == stamp]

        drive.observer.until(lambda of=of: bool(of(topics.OBSERVATION)) and bool(of(topics.SALIENCY)))
        seen, true = conversion.to_rgb(of(topics.OBSERVATION)[0]), conversion.to_rgb(of(topics.IMAGE)[0])
        change = np.abs(seen.astype(int) - true)
        assert 0 < change.max() <= epsilon * 255 + 1e-6
        expected = library.decide(seen)
        np.testing.assert_allclose(decision.probabilities, expected.probabilities, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            conversion.to_array(of(topics.SALIENCY)[0]), library.explain(expected).map, atol=1e-5
        )
    assert drive.set("explainer", attack="none") == ""
    drive.new(topics.DECISION, lambda m: not m.attack and not m.fallback)


def test_a_policy_is_checked_before_it_takes_over(drive, weights, tmp_path):
    before = drive.last(topics.DECISION).policy_hash
    refused = drive.call(SetPolicy, "/explainer/set_policy", weights=str(tmp_path / "none.safetensors"))
    assert not refused.success and "Cannot read the policy weights" in refused.message
    assert refused.policy_hash == before
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    refused = drive.call(SetPolicy, "/explainer/set_policy", weights=str(fifo))
    assert not refused.success and "It is not a regular file" in refused.message
    slow = tmp_path / "slow" / weights.name
    slow.parent.mkdir()
    for file in (weights, weights.with_suffix(".json")):
        shutil.copy(file, slow.with_suffix(file.suffix))
    drive.policy_drives()
    number = drive.last(topics.FRAME).frame
    taken = drive.call(SetPolicy, "/explainer/set_policy", weights=str(slow))
    assert taken.success and taken.policy_hash not in ("", before)
    changed = drive.new(topics.DECISION, lambda m: m.policy_hash == taken.policy_hash)[0]
    assert list(changed.action_names) == list(ACTIONS["wheels"])
    drive.observer.until(lambda: drive.status("explainer")["policy hash"] == taken.policy_hash)
    assert drive.call(SetPolicy, "/explainer/set_policy", weights=str(WEIGHTS)).success
    drive.new(topics.DECISION, lambda m: m.policy_hash == before)
    decisions = {m.frame: m for m in drive.observer.received[topics.DECISION.name] if not m.fallback}
    frames = range(number, max(decisions))
    assert all(frame in decisions for frame in frames)  # no frame was missed while a policy was loaded
    braked = {m.frame for m in drive.observer.received[topics.DECISION.name] if m.fallback}
    assert len(frames) > 10 and not braked & set(frames)  # nor did the car brake


def test_a_second_decider_is_named_and_another_policy_is_not_applied(drive):
    """By their stamps: this decides for each frame beside the explainer, first by another policy."""
    publisher = topics.DECISION.publisher(drive.observer.node)
    policy = drive.last(topics.DECISION).policy_hash

    def decide(policy_hash):
        seen = drive.last(topics.IMAGE).header
        if seen != decide.last:
            decide.last = seen
            publisher.publish(DrivingDecision(header=seen, brake=1.0, policy_hash=policy_hash))
        drive.observer.spin()

    decide.last = None
    drive.policy_drives()
    live_support.until(
        lambda: "policy 'abc' are not applied" in drive.status("carla_bridge")["says"], lambda: decide("abc")
    )
    drive.policy_drives()
    live_support.until(
        lambda: "Several nodes decide (explainer, observer)" in drive.status("carla_bridge")["says"],
        lambda: decide(policy),
    )
    drive.observer.node.destroy_publisher(publisher)
    drive.policy_drives()


@pytest.fixture(scope="module")
def onlookers(drive, weights, tmp_path_factory):
    """A viewer and a recorder of the drive, and where the recorder makes its bag."""
    bags = tmp_path_factory.mktemp("bags")
    recorder = Process("recorder", parameters={"directory": str(bags), "weights": str(weights)})
    viewer = Process("viewer", parameters={"port": live_support.free_port()})
    return drive.start(viewer), drive.start(recorder), bags


def test_no_frame_is_lost_while_the_onlookers_are_stopped_and_the_drive_goes_on(drive, onlookers):
    """Three seconds of the drive; afterwards they have them all, or what is newest."""
    viewer, recorder, _ = onlookers

    def recorded() -> int:
        return int(drive.status("recorder").get("messages recorded", 0))

    drive.observer.until(lambda: recorded() > 300 and float(drive.status("viewer").get("frames (Hz)", 0.0)) > 1.0)
    before, sent = recorded(), len(drive.observer.received[topics.FRAME.name])
    for running in (viewer, recorder):
        running.popen.send_signal(signal.SIGSTOP)
    stopped, _ = drive.new(topics.FRAME, count=2)
    drive.new(topics.FRAME, lambda m: m.header.stamp.sec >= stopped.header.stamp.sec + 3)
    reports = len(drive.observer.received[topics.DIAGNOSTICS.name])
    for running in (viewer, recorder):
        running.popen.send_signal(signal.SIGCONT)
    frames = drive.observer.received[topics.FRAME.name]
    drive.observer.until(lambda: recorded() - before > 8 * (len(frames) - sent) > 8 * 60)
    drive.observer.until(lambda: len(drive.observer.received[topics.DIAGNOSTICS.name]) > reports + 8)
    assert drive.status("recorder")["frames lacking"] == "0"
    assert float(drive.status("viewer").get("frames (Hz)", 0.0)) > 1.0


class Operator:
    """A page with the token: says words to the drive, and keeps what it is told."""

    def __init__(self, viewer):
        live_support.until(lambda: "#token=" in viewer.output)
        self.url, self.token = re.search(r"The page is at (\S+)#token=(\S+)", viewer.output).groups()
        self.state, self.answers, self._number = {}, {}, 0
        self._loop, ready = asyncio.new_event_loop(), threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._read(ready)))
        self._thread.start()
        assert ready.wait(live_support.LIMIT)

    async def _read(self, ready):
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}ws", max_msg_size=0) as stream:
            self._stream = stream
            await stream.send_json({"token": self.token})
            ready.set()
            async for message in stream:
                if message.type is aiohttp.WSMsgType.BINARY:
                    size = int.from_bytes(message.data[:4], "little")
                    await stream.send_str(str(json.loads(message.data[4 : 4 + size])["sequence"]))
                    continue
                told = json.loads(message.data)
                if told["type"] == "state":
                    self.state = told
                elif told["type"] == "answer":
                    self.answers[told["id"]] = told

    def say(self, *words):
        self._number += 1
        request = {"id": self._number, "words": list(words)}
        asyncio.run_coroutine_threadsafe(self._stream.send_json(request), self._loop).result(live_support.LIMIT)
        return self._number

    def setting(self, name):
        return self.state.get("settings", {}).get(name, {}).get("value")

    def close(self):
        asyncio.run_coroutine_threadsafe(self._stream.close(), self._loop).result(live_support.LIMIT)
        self._thread.join()


def test_a_page_with_the_token_controls_the_drive_and_sees_what_others_change(drive, onlookers):
    viewer, _, bags = onlookers
    page, observer = Operator(viewer), drive.observer

    def answer(*words):
        """To what is asked, again while there is too much at once: these tests drive faster than the page's keys do."""
        said = {"said": "Too many requests"}
        while "Too many requests" in said["said"]:
            number = page.say(*words)
            observer.until(lambda number=number: number in page.answers)
            said = page.answers[number]
        return said

    observer.until(lambda: page.setting("vehicles") == 64 and page.setting("opacity") is not None)
    assert drive.set("explainer", opacity=0.5) == ""
    observer.until(lambda: page.setting("opacity") == 0.5)
    assert answer("set", "opacity", "0.8")["said"] == "opacity: 0.8"
    observer.until(lambda: page.setting("opacity") == 0.8)
    assert "The page sets no deadline" in answer("set", "deadline", "1")["said"]
    assert "must be inferno or" in answer("set", "colormap", "beige")["said"]
    assert "offers no policy /etc/passwd" in answer("policy", "/etc/passwd")["said"]

    assert answer("pause")["said"] == "paused"
    observer.until(lambda: page.state["paused"])
    assert drive.call(SetBool, "/carla_bridge/pause", data=False).success
    observer.until(lambda: not page.state["paused"])

    hand = {"throttle": 0.0, "steer": 0.0, "brake": 0.25}

    def until_braked_by(strength, send):
        seen = len(observer.received[topics.DECISION.name])

        def found():
            send()
            observer.spin()
            return [m for m in observer.received[topics.DECISION.name][seen:] if m.manual and m.brake == strength]

        live_support.until(found, lambda: None)

    until_braked_by(0.5, lambda: page.say("drive", "0", "0", "0.5"))
    live_support.until(
        lambda: page.state["control"] == "page", lambda: (page.say("drive", "0", "0", "0.5"), observer.spin())
    )

    def both():
        drive.manual.publish(VehicleControl(**hand))
        page.say("drive", "0", "0", "0.5")

    until_braked_by(0.25, both)
    seen = len(observer.received[topics.DECISION.name])
    for _ in range(5):
        both()
        drive.new(topics.DECISION)
    manual = [m.brake for m in observer.received[topics.DECISION.name][seen:] if m.manual]
    assert manual and set(manual) == {0.25}  # whoever stands beside the car
    drive.policy_drives()

    method = answer("set", "method", "gbp")
    assert method["ok"], method
    drive.new(topics.DECISION, lambda m: m.method == "gbp")
    assert "longer than a frame" in answer("set", "method", "gb")["said"]
    assert answer("set", "method", "linear")["ok"]
    drive.new(topics.DECISION, lambda m: m.method == "linear")
    before = drive.last(topics.IMAGE)
    assert answer("set", "weather", "ClearNight")["ok"]
    dark = 0.6 * conversion.to_rgb(before).mean()
    drive.new(topics.IMAGE, lambda m: conversion.to_rgb(m).mean() < dark)
    assert answer("set", "weather", "ClearNoon")["ok"]

    assert answer("record", "off")["said"] == "not recording"
    observer.until(lambda: page.state["recording"] is False)
    assert answer("record", "on")["said"] == "recording"
    observer.until(lambda: page.state["recording"])
    observer.until(lambda: len(list(bags.iterdir())) == 2)
    page.close()
    drive.policy_drives()


def test_the_policy_of_sros_names_what_the_nodes_hear_publish_and_answer(drive, onlookers):
    root = security.policy().getroot()
    assert (root.tag, root.attrib, [child.tag for child in root]) == ("policy", {"version": "0.2.0"}, ["enclaves"])
    node = drive.observer.node
    profiles = {profile.get("node"): profile for profile in root.iter("profile")}
    assert {e.get("path") for e in root.iter("enclave")} == {f"/carla_digr/{name}" for name in profiles}
    for name in ("carla_bridge", "explainer", "viewer", "recorder"):
        granted = {}
        for group in profiles[name]:
            ((verb, ruling),) = group.attrib.items()
            assert ruling == "ALLOW" and {child.tag for child in group} == {group.tag.removesuffix("s")}
            granted[group.tag, verb] = {f"/{child.text}" for child in group}
        asked = {
            ("topics", "subscribe"): node.get_subscriber_names_and_types_by_node,
            ("topics", "publish"): node.get_publisher_names_and_types_by_node,
            ("services", "reply"): node.get_service_names_and_types_by_node,
        }
        for right, ask in asked.items():
            drive.observer.until(
                lambda ask=ask, name=name, wanted=granted[right]: {n for n, _ in ask(name, "/")} == wanted
            )
    assert {p.get("ns") for p in security.policy("car2").getroot().iter("profile")} == {"/car2"}


def test_nothing_that_arrives_ends_a_node_or_the_drive(drive, onlookers):
    """Each message has the stamp of the frame that is driven on; they come until the node has told of them."""
    *watching, bags = onlookers
    measure = drive.start(Process("measure", parameters={"duration": 86400.0}))
    heard = {
        "carla_bridge": (topics.DECISION, topics.MANUAL, topics.CMD_VEL, topics.ACKERMANN),
        "explainer": (topics.FRAME, topics.IMAGE, topics.INSTANCES, topics.VEHICLES),
        "viewer": (topics.ODOMETRY, topics.OBSERVATION, topics.SALIENCY, topics.OBJECTS, topics.TRUST),
        "recorder": (topics.OVERLAY, topics.TF, topics.EVENTS),
    }
    for node, its_topics in heard.items():
        drive.observer.until(lambda node=node: bool(drive.status(node)))
        before = int(drive.status(node)["messages refused"])
        node_here = drive.observer.node
        out = [(topic, node_here.create_publisher(topic.type, topic.name, topics.QOS)) for topic in its_topics]

        def send(out=out):
            for topic, publisher in out:
                for message in nonsense(topic, drive.last(topics.IMAGE).header):
                    publisher.publish(message)
                    drive.observer.spin()

        live_support.until(
            lambda node=node, wanted=before + 30: int(drive.status(node)["messages refused"]) >= wanted, send
        )
        for _, publisher in out:
            node_here.destroy_publisher(publisher)
    told = drive.status("recorder")  # what it lacks on a busy machine comes before
    assert "Refused what came on /" in told["says"] + told.get("refused", "")
    client = drive.observer.node.create_client(SetParameters, "/explainer/set_parameters")
    drive.observer.until(client.service_is_ready)
    wrong = Parameter("opacity", value=0.5).to_parameter_msg()
    wrong.value.type = 99  # there is no such type, and no answer
    client.call_async(SetParameters.Request(parameters=[wrong]))
    assert drive.set("explainer", opacity=0.8) == ""
    drive.policy_drives()
    drive.observer.until(lambda: float(drive.status("viewer").get("frames (Hz)", 0.0)) > 1.0)
    enough = drive.last(topics.IMAGE).header.stamp.sec + 5
    drive.observer.until(lambda: drive.last(topics.IMAGE).header.stamp.sec >= enough)
    for running in watching:
        assert running.end() == 0 and "Traceback" not in running.output, running.output
    measure.end()
    assert "Traceback" not in measure.output
    told = [line for line in measure.output.splitlines() if line.startswith("{")]
    assert told, measure.output
    figures = json.loads(told[-1])["figures"]
    assert figures["stamps_without_picture"] == 0  # which strangers' messages have
    assert figures["frames"] > 60 and figures["frames_without_decision"] < 0.1 * figures["frames"]
    with open_bag(max(bags.iterdir())) as opened:  # the last one
        kept = {c.topic: Counter() for c in opened.channels}
        for channel, time, _ in opened.read():
            kept[channel.topic][time] += 1
    pictures = set(kept[topics.IMAGE.name])  # which the recorder hears last
    driven = {t for t in kept[topics.FRAME.name] if t in kept[topics.CLOCK.name] and min(pictures) <= t < max(pictures)}
    assert len(driven) > 60 and driven <= pictures


def test_the_life_cycle_stops_and_starts_the_drive(drive):
    def change(node, transition):
        return drive.call(ChangeState, f"/{node}/change_state", transition=Transition(id=transition)).success

    def state(node):
        return drive.call(GetState, f"/{node}/get_state").current_state.label

    assert state("carla_bridge") == state("explainer") == "active"
    assert change("carla_bridge", Transition.TRANSITION_DEACTIVATE)
    drive.observer.until(lambda: drive.status("carla_bridge")["says"] == "not active")
    pictures = len(drive.observer.received[topics.IMAGE.name])
    assert change("carla_bridge", Transition.TRANSITION_CLEANUP)
    assert state("carla_bridge") == "unconfigured"
    assert len(drive.observer.received[topics.IMAGE.name]) == pictures
    assert change("explainer", Transition.TRANSITION_DEACTIVATE)
    assert change("explainer", Transition.TRANSITION_ACTIVATE)
    assert change("carla_bridge", Transition.TRANSITION_CONFIGURE)
    assert change("carla_bridge", Transition.TRANSITION_ACTIVATE)
    drive.policy_drives()
    # A transition that fails says why in the log, also of a node that started by itself.
    assert change("explainer", Transition.TRANSITION_DEACTIVATE)
    assert change("explainer", Transition.TRANSITION_CLEANUP)
    assert drive.set("explainer", weights="/nowhere.safetensors") == ""
    assert not change("explainer", Transition.TRANSITION_CONFIGURE)
    live_support.until(lambda: "Cannot read the policy weights /nowhere.safetensors" in drive.explainer.output)
    assert drive.set("explainer", weights=str(WEIGHTS)) == ""
    assert change("explainer", Transition.TRANSITION_CONFIGURE)
    assert change("explainer", Transition.TRANSITION_ACTIVATE)
    drive.policy_drives()


def test_without_autostart_a_node_waits_and_refuses_what_it_cannot_do(start, observe, tmp_path):
    parameters = {"autostart": False, "weights": str(tmp_path / "none.safetensors")}
    explainer = start(Process("explainer", parameters=parameters))
    observer = observe()
    client = observer.node.create_client(ChangeState, "/explainer/change_state")
    observer.until(client.service_is_ready)

    def change(transition):
        answer = client.call_async(ChangeState.Request(transition=Transition(id=transition)))
        observer.until(answer.done)
        return answer.result().success

    assert not change(Transition.TRANSITION_CONFIGURE)
    live_support.until(lambda: "Cannot read the policy weights" in explainer.output)
    assert explainer.popen.poll() is None

    def set_policy(path):
        client = observer.node.create_client(SetPolicy, "/explainer/set_policy")
        observer.until(client.service_is_ready)
        answer = client.call_async(SetPolicy.Request(weights=str(path)))
        observer.until(answer.done)
        return answer.result()

    refused = set_policy(tmp_path / "none.safetensors")
    assert not refused.success and "Cannot read the policy weights" in refused.message and not refused.policy_hash
    taken = set_policy(WEIGHTS)
    assert (taken.success, taken.policy_hash) == (True, "") and "when the node is configured" in taken.message
    assert change(Transition.TRANSITION_CONFIGURE)
    assert WEIGHTS.name in explainer.output
    assert change(Transition.TRANSITION_ACTIVATE)
    assert set_policy(WEIGHTS).policy_hash
    assert change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
    assert explainer.wait() == 0
