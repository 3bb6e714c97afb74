"""Two drives in one ROS domain, each in a namespace of its own, with its page and its recording."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request

import live_support
import pytest

live_support.workspace()

from carla_digr_ros import topics  # noqa: E402
from rcl_interfaces.srv import GetParameters  # noqa: E402

from carla_digr.live.supervisor import free_domain  # noqa: E402
from carla_digr.recordings.bag import open_bag  # noqa: E402
from carla_digr.recordings.drive import read_drive  # noqa: E402
from carla_digr.recordings.topics import FACTS_TOPIC  # noqa: E402

SEEDS = {"car1": 3, "car2": 8}


def unsourced() -> dict[str, str]:
    """The environment of a fresh terminal."""
    return {name: value for name, value in os.environ.items() if name != "AMENT_PREFIX_PATH"}


class Car:
    """`carla-digr live` in a namespace, in lockstep: two paced drives want more than two cores."""

    def __init__(self, name, domain, directory):
        self.bags, self.page = directory / name, live_support.free_port()
        parameters = directory / f"{name}.yaml"
        parameters.write_text(f"/**/explainer:\n  ros__parameters:\n    opacity: 0.{SEEDS[name]}\n")
        options = {
            "namespace": name,
            "seed": str(SEEDS[name]),
            "port": str(live_support.free_port()),
            "viewer-port": str(self.page),
            "record": str(self.bags),
            "params-file": str(parameters),
            "lockstep": "True",
            "log-level": "info",
        }
        command = [sys.executable, "-m", "carla_digr.cli", "live"]
        for option, value in options.items():
            command += [f"--{option}", value]
        self.process = subprocess.Popen(command, env={**unsourced(), "ROS_DOMAIN_ID": str(domain)})

    def frames(self) -> int:
        """The number of the page's latest frame; -1: none."""
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.page}/api/status") as page,
        ):
            return (json.load(page)["latest"] or {"frame": -1})["frame"]
        return -1


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cars")
    with free_domain() as domain:
        cars = {name: Car(name, domain, directory) for name in SEEDS}
        try:
            yield cars, domain
        finally:
            for car in cars.values():
                car.process.kill()


def steer_by_the_command_line(cars, domain):
    """`carla-digr ctl` reaches one of the two."""

    def say(*words, status=0):
        command = [
            sys.executable,
            "-m",
            "carla_digr.cli",
            "ctl",
            *words,
            "--namespace",
            "car1",
            "--domain",
            str(domain),
        ]
        said = subprocess.run(command, capture_output=True, text=True, env=unsourced())
        assert said.returncode == status, said.stdout + said.stderr
        return said.stdout + said.stderr

    assert say("pause") == "paused\n"
    held, other = cars["car1"].frames(), cars["car2"].frames()
    live_support.until(lambda: cars["car2"].frames() > other + 5)
    assert cars["car1"].frames() <= held + 1  # one was on its way
    assert say("step") == "one frame\n"
    say("set", "opacity", "0.6")
    say("set", "colormap", "hot")
    listed = say("list")
    assert "opacity: 0.6 " in listed and "colormap: 'hot' " in listed and "weights" not in listed
    assert "must be inferno or turbo" in say("set", "colormap", "beige", status=2)
    assert "no beauty to set; choose one of attack," in say("set", "beauty", "1", status=2)
    assert "driving_studet" in say("policy", "driving_studet", status=2)
    assert say("drive", "0", "0", "0.5", "0.1") == "driven for 0.1 s\n"
    assert "STEER must lie in [-1, 1]" in say("drive", "-2", "0", "0", status=2)
    assert say("record", "on") == "recording\n"
    assert say("reset", "77").endswith("Seed 77 comes next.\n")
    assert say("resume") == "driving\n"
    live_support.until(lambda: cars["car1"].frames() > held + 5)


def test_two_cars_drive_beside_each_other(cars):
    cars, domain = cars
    observer = live_support.Observer(domain)
    seen = {name: set() for name in SEEDS}
    for name in SEEDS:

        def keep(message, name=name):
            seen[name].add(message.seed)

        observer.node.create_subscription(topics.FRAME.type, f"/{name}{topics.FRAME.name}", keep, 10)
    observer.until(lambda: all(seen.values()) and all(car.frames() > 0 for car in cars.values()))
    for name, car in cars.items():
        client = observer.node.create_client(GetParameters, f"/{name}/explainer/get_parameters")
        observer.until(client.service_is_ready)
        answer = client.call_async(GetParameters.Request(names=["opacity", "wrong_size"]))
        observer.until(answer.done)
        opacity, wrong_size = answer.result().values
        assert opacity.double_value == pytest.approx(SEEDS[name] / 10)  # of the file given
        assert wrong_size.string_value == "refuse"  # and the shipped one holds in a namespace too
        before = car.frames()
        live_support.until(lambda car=car, before=before: car.frames() > before + 5)
        assert car.process.poll() is None
    names = {name for name, _ in observer.node.get_topic_names_and_types()}
    assert not [name for name in names if name.startswith("/carla_digr") or name in ("/clock", "/tf", "/tf_static")]
    for name in SEEDS:
        assert {f"/{name}{topic.name}" for topic in (topics.CLOCK, topics.TF, topics.OVERLAY)} <= names
    observer.close()
    steer_by_the_command_line(cars, domain)
    for name, car in cars.items():
        car.process.send_signal(signal.SIGINT)
        assert car.process.wait(live_support.LIMIT) == 0
        (bag,) = car.bags.iterdir()
        with open_bag(bag) as opened:
            drive = read_drive(opened)
        assert len(drive.frames) > 10
        later = {max(seen[name]) + 1} | ({77, 78} if name == "car1" else set())
        assert {frame.facts.seed for frame in drive.frames if frame.facts} <= seen[name] | later
        assert min(seen[name]) == SEEDS[name]
        filled = {channel.topic for channel in opened.channels if opened.counts[channel]}
        assert filled <= {topic.name for topic in topics.TOPICS} | {FACTS_TOPIC}
