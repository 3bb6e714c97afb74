"""The node `viewer` alone: synthetic topics in, the page's stream out."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading

import aiohttp
import live_support
import numpy as np
import pytest
import simplejpeg
import yaml

live_support.workspace()

from builtin_interfaces.msg import Time  # noqa: E402
from carla_digr_msgs.msg import DriveFrame, DrivingDecision, ExplainedObject, ExplainedObjects  # noqa: E402
from carla_digr_ros import conversion, topics  # noqa: E402
from carla_digr_ros.viewer import PATIENCE  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from rcl_interfaces.srv import SetParameters  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from carla_digr.driving.control import VehicleCommand, pedals  # noqa: E402
from carla_digr.live.composition import PARAMETERS_FILE, Process  # noqa: E402
from carla_digr.saliency.overlay import COLORMAP, colours  # noqa: E402


class Page:
    """Keeps the headers and pictures of the frames that a browser would get, by frame number."""

    def __init__(self, port: int):
        self.frames: dict[int, dict] = {}
        self.pictures: dict[int, np.ndarray] = {}
        self.connected = threading.Event()
        self._port = port
        threading.Thread(target=lambda: asyncio.run(self._read()), daemon=True).start()
        assert self.connected.wait(live_support.LIMIT)

    async def _read(self) -> None:
        url = f"http://127.0.0.1:{self._port}/ws"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as stream:
            self.colours = [(await stream.receive_json())["colormap"]]  # of the greeting, then every change
            self.connected.set()
            async for message in stream:
                if message.type is aiohttp.WSMsgType.TEXT and (told := json.loads(message.data).get("colormap")):
                    self.colours.append(told)
                if message.type is aiohttp.WSMsgType.BINARY:
                    size = int.from_bytes(message.data[:4], "little")
                    header = json.loads(message.data[4 : 4 + size])
                    jpeg = message.data[4 + size : 4 + size + header["jpeg_bytes"]]
                    self.pictures[header["frame"]] = simplejpeg.decode_jpeg(jpeg)
                    self.frames[header["frame"]] = header
                    await stream.send_str(str(header["sequence"]))


class Feed:
    """Publishes parts of frames as bridge and explainer do."""

    def __init__(self, observer, viewer: subprocess.Popen):
        self.viewer = viewer
        kinds = (topics.FRAME, topics.ODOMETRY, topics.IMAGE, topics.DECISION, topics.SALIENCY)
        kinds += topics.OBSERVATION, topics.OBJECTS
        self.out = {topic.name: topic.publisher(observer.node) for topic in kinds}
        observer.until(lambda: all(publisher.get_subscription_count() for publisher in self.out.values()))

    def send(self, number: int, *topics_to_send, fallback=False, saliency=0.5, **more) -> None:
        header = Header(stamp=Time(sec=number // 20, nanosec=number % 20 * 50_000_000))
        odometry = Odometry(header=header)
        odometry.twist.twist.linear.x = 20.0
        messages = {
            topics.FRAME.name: DriveFrame(header=header, frame=number, collision="static.guardrail"),
            topics.ODOMETRY.name: odometry,
            topics.IMAGE.name: conversion.to_message(np.full((128, 128, 3), number, np.uint8), "rgb8", header),
            topics.SALIENCY.name: conversion.to_message(np.full((128, 128), saliency, np.float32), "32FC1", header),
            topics.DECISION.name: DrivingDecision(
                header=header,
                action_names=[] if fallback else ["left", "keep", "right", "brake"],
                probabilities=[] if fallback else [0.5, 0.25, 0.25, 0.0],
                target_speed=float("nan") if fallback else 22.0,
                brake=1.0 if fallback else 0.0,
                fallback=fallback,
                **more,
            ),
            topics.OBSERVATION.name: conversion.to_message(np.full((128, 128, 3), 255, np.uint8), "rgb8", header),
            topics.OBJECTS.name: ExplainedObjects(
                header=header,
                frame=number,
                sentence=f"Brakes because of {number}.",
                objects=[
                    ExplainedObject(
                        id=7,
                        kind="truck",
                        lane=127,
                        distance=24.0,
                        share=0.5,
                        effect=1.0,
                        action=2,
                        flips=True,
                        outline=[1, 2, 3, 2, 3, 4, 7, 7, 9, 7],
                        parts=[3, 2],
                    )
                ],
            ),
        }
        for topic in topics_to_send:
            self.out[topic.name].publish(messages[topic.name])


ALL = (topics.FRAME, topics.ODOMETRY, topics.IMAGE, topics.DECISION, topics.SALIENCY)


@pytest.fixture
def feed_and_page(start, observe):
    port = live_support.free_port()
    viewer = start(Process("viewer", parameters={"port": port}))
    live_support.until(lambda: f"The page is at http://127.0.0.1:{port}/" in viewer.output)
    return Feed(observe(), viewer.popen), Page(port)


def test_the_page_gets_what_belongs_to_a_frame_together(feed_and_page):
    feed, page = feed_and_page
    feed.send(41, *ALL)
    live_support.until(lambda: 41 in page.frames)  # the newest frame wins: sent at once, the first could be left out
    feed.send(42, topics.FRAME, topics.SALIENCY, topics.DECISION, topics.IMAGE, saliency=0.0)  # in another order
    live_support.until(lambda: 42 in page.frames)
    whole, flat = page.frames[41], page.frames[42]
    assert whole["stamp"] == pytest.approx(2.05)
    assert whole["saliency"] == [128, 128]
    decision = whole["decision"]
    assert decision["action_names"] == ["left", "keep", "right", "brake"]
    assert decision["probabilities"] == [0.5, 0.25, 0.25, 0.0]
    throttle, brake = pedals(VehicleCommand(0.0, target_speed=22.0), 20.0)
    assert (decision["throttle"], decision["brake"]) == (throttle, brake)
    assert decision["latency_ms"] >= 0.0
    assert decision["events"] == ["collision"]
    assert not decision["fallback"]
    assert flat["decision"]["saliency_flat"] and not decision["saliency_flat"]


def test_the_page_says_what_was_said_last_and_for_a_second(feed_and_page):
    feed, page = feed_and_page

    def sentence(number: int) -> str | None:
        feed.send(number, *ALL)
        live_support.until(lambda: number in page.frames)
        return page.frames[number]["decision"].get("sentence")

    assert sentence(41) is None
    feed.send(41, topics.OBJECTS)  # its frame is on the page already
    number = 42
    while sentence(number) != "Brakes because of 41.":
        number += 1
        assert number <= 61
    assert sentence(61) == "Brakes because of 41."
    (truck,) = page.frames[61]["decision"]["objects"]
    assert (truck["kind"], truck["lane"], truck["without"], truck["share"]) == ("truck", None, "right", 0.5)
    assert truck["outline"] == [[1, 2, 3, 2, 3, 4], [7, 7, 9, 7]]
    assert sentence(62) is None
    assert page.frames[61]["decision"]["saliency_ms"] is not None  # nothing waited for it


def test_the_page_has_the_colours_of_the_parameter_and_takes_others_while_it_is_open(feed_and_page, observe):
    _, page = feed_and_page
    observer = observe()
    client = observer.node.create_client(SetParameters, "/viewer/set_parameters")
    observer.until(client.service_is_ready)

    def choose(colormap: str) -> str:
        chosen = Parameter("colormap", value=colormap).to_parameter_msg()
        answer = client.call_async(SetParameters.Request(parameters=[chosen]))
        observer.until(answer.done)
        return answer.result().results[0].reason

    assert choose("turbo") == ""
    live_support.until(lambda: len(page.colours) > 1)
    assert page.colours == [colours(name).ravel().tolist() for name in ("inferno", "turbo")]
    assert "must be inferno or" in choose("rainbow")


def test_the_overlay_topic_and_the_page_begin_in_the_same_colours():
    nodes = yaml.safe_load(live_support.installed(PARAMETERS_FILE).read_text())
    chosen = {nodes[f"/**/{node}"]["ros__parameters"]["colormap"] for node in ("explainer", "viewer")}
    assert chosen == {COLORMAP}


def test_a_fallback_is_an_alarm_with_the_brakes_of_the_bridge(feed_and_page):
    feed, page = feed_and_page
    feed.send(1, topics.FRAME, topics.IMAGE)
    feed.send(1, topics.DECISION, fallback=True)
    live_support.until(lambda: 1 in page.frames)
    alone = page.frames[1]
    assert alone["saliency"] is None
    assert (alone["decision"]["fallback"], alone["decision"]["brake"]) == (True, 1.0)
    assert "status" not in alone["decision"]
    feed.send(2, topics.FRAME, topics.IMAGE)
    feed.send(2, topics.DECISION, fallback=True, manual=True)
    live_support.until(lambda: 2 in page.frames)
    assert page.frames[2]["decision"]["status"] == "manual control"


def test_an_attacked_picture_an_unexplained_frame_and_a_new_beginning_of_time_are_shown(feed_and_page):
    feed, page = feed_and_page
    parts = (topics.FRAME, topics.IMAGE, topics.DECISION, topics.SALIENCY)
    feed.send(41, *parts, attack="fgsm 0.05")
    feed.send(41, topics.OBSERVATION)  # without it the frame would wait
    live_support.until(lambda: 41 in page.frames)
    assert page.frames[41]["decision"]["status"] == "The policy sees the picture under attack: fgsm 0.05."
    assert page.pictures[41].min() > 240  # what the policy saw, not the camera's picture
    feed.send(42, *parts[:3], unexplained=True)
    live_support.until(lambda: 42 in page.frames)
    assert page.frames[42]["saliency"] is None
    feed.send(1, *parts)  # the simulator began anew
    live_support.until(lambda: 1 in page.frames)


@pytest.mark.parametrize("held", [False, True])
def test_a_frame_without_map_is_shown_when_newer_ones_have_come(feed_and_page, held):
    feed, page = feed_and_page
    if held:  # it finds all pictures at once, before the decisions that came with them
        feed.viewer.send_signal(signal.SIGSTOP)
    for number in range(1, PATIENCE + 2):
        feed.send(number, topics.FRAME, topics.IMAGE, topics.DECISION)
    feed.viewer.send_signal(signal.SIGCONT)
    live_support.until(lambda: 1 in page.frames)
    assert page.frames[1]["saliency"] is None
    assert page.frames[1]["decision"]["probabilities"] == [0.5, 0.25, 0.25, 0.0]
