"""The real `ros2` tools on our nodes, launch files and bags, where there is a ROS 2 installation.

The same is tested without them elsewhere: by stand-ins of `launch` (test_launch.py) and by nodes of our own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess

import drive_bags
import live_support
import pytest
import yaml
from rosbags.rosbag2 import Writer

from carla_digr.live import composition
from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.drive import read_drive
from carla_digr.recordings.topics import PICTURE_TYPE

pytestmark = [
    pytest.mark.skipif(shutil.which("ros2") is None, reason="needs a ROS 2 installation"),
    pytest.mark.alone,
]


@pytest.fixture
def ros2_launch(domain):
    processes = []

    def launch(name: str, *arguments: str) -> subprocess.Popen[str]:
        command = ["ros2", "launch", composition.PACKAGE, f"{name}.launch.py", *arguments]
        environment = {**live_support.workspace(), "ROS_DOMAIN_ID": str(domain)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield launch
    for process in processes:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.fixture
def ros2(domain):
    """Runs `ros2 ...` until it ends; what it says."""

    def run(*command: str) -> str:
        environment = {**live_support.workspace(), "ROS_DOMAIN_ID": str(domain)}
        done = subprocess.run(["ros2", *command], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_ros2_launch_runs_a_pipeline(ros2_launch, tmp_path):
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    teacher = {"total_steps": 256, "environments": 8, "rollout_steps": 16, "minibatch_size": 64}
    maps = {"maps": 8, "shard_size": 4, "stride": 8, "environments": 4}
    config.write_text(yaml.safe_dump({"task": "red_fetch_green", "teacher": teacher, "saliency_dataset": maps}))
    pipeline = ros2_launch(
        "pipeline", f"config:={config}", f"out:={out}", "seed:=4", "stages:=train_teacher,make_dataset"
    )
    said, _ = pipeline.communicate(timeout=live_support.LIMIT)
    assert pipeline.returncode == 0, said
    assert json.loads((out / "teacher.json").read_text())["seed"] == 4
    assert f"{out / 'dataset'}: 8 maps in 2 shards" in said
    failing = ros2_launch("distill", f"config:={config}", f"out:={tmp_path / 'empty'}")
    said, _ = failing.communicate(timeout=live_support.LIMIT)
    assert failing.returncode == 1
    assert "run_stage ended with status 2, so everything ends" in said


def test_ros2_launch_drives_until_a_process_dies(ros2_launch):
    port, page = live_support.free_port(), live_support.free_port()
    drive = ros2_launch("live", f"port:={port}", f"viewer_port:={page}", "rviz:=false")
    pids: dict[str, int] = {}

    def until(text: str) -> None:
        for line in drive.stdout:
            started = re.search(r"\[(\w+)-\d+\]: process started with pid \[(\d+)\]", line)
            pids.update({started[1]: int(started[2])} if started else {})
            if text in line:
                return
        raise AssertionError(f"the launch ended without {text!r}")

    until("Policy ")
    os.kill(pids["carla_bridge"], signal.SIGABRT)
    until("carla_bridge was killed by SIGABRT; starting it again")
    until("process started")
    os.kill(pids["explainer"], signal.SIGKILL)
    until("explainer was killed by SIGKILL, so everything ends")
    drive.communicate(timeout=live_support.LIMIT)
    assert drive.returncode == 1


def test_ros2_launch_records_a_drive_and_replays_it(ros2_launch, tmp_path):
    port, page = live_support.free_port(), live_support.free_port()
    rviz = shutil.which("rviz2") is not None
    arguments = [f"port:={port}", f"viewer_port:={page}", f"record:={tmp_path}", *(["rviz:=false"] if rviz else [])]
    drive = ros2_launch("live", *arguments)
    heard = iter(drive.stdout.readline, "")
    assert rviz or any("RViz is not installed" in line for line in heard)
    assert any("The policy drives" in line for line in heard)
    live_support.until(lambda: any(file.stat().st_size > 2_000_000 for file in tmp_path.glob("*/*.mcap")))
    drive.send_signal(signal.SIGINT)
    drive.communicate(timeout=live_support.LIMIT)
    (bag,) = tmp_path.iterdir()
    with open_bag(bag) as opened:
        assert len(read_drive(opened).frames) > 20
    replay = ros2_launch("replay", f"bag:={bag}", f"viewer_port:={page}", "rate:=4.0", "rviz:=false")
    said, _ = replay.communicate(timeout=live_support.LIMIT)
    assert replay.returncode == 0, said


def test_a_drive_in_a_namespace_is_seen_and_steered_by_ros2(ros2_launch, ros2, domain, tmp_path):
    """Frames, markers, names, life cycle, a teleop's commands and the compressed overlay, each as ros2 has them."""
    port, page = live_support.free_port(), live_support.free_port()
    drive = ros2_launch(
        "live", "namespace:=car2", f"port:={port}", f"viewer_port:={page}", f"record:={tmp_path}", "rviz:=False"
    )
    assert any("The policy drives" in line for line in iter(drive.stdout.readline, ""))
    listed = dict(re.findall(r"^(\S+) \[(\S+)\]$", ros2("topic", "list", "-t"), re.MULTILINE))
    assert not [name for name in listed if name.startswith(("/carla_digr", "/tf", "/clock"))]
    assert listed["/car2/tf"] == listed["/car2/tf_static"] == "tf2_msgs/msg/TFMessage"
    assert listed["/car2/carla_digr/markers"] == "visualization_msgs/msg/MarkerArray"
    assert listed["/car2/carla_digr/overlay/compressed"] == "sensor_msgs/msg/CompressedImage"
    transforms = yaml.safe_load(ros2("topic", "echo", "--once", "/car2/tf_static").partition("---")[0])["transforms"]
    assert {t["child_frame_id"] for t in transforms} == {"ego_vehicle/camera", "ego_vehicle/camera_optical"}
    assert "format: jpeg" in ros2("topic", "echo", "--once", "--no-arr", "/car2/carla_digr/overlay/compressed")
    assert {"/car2/explainer", "/car2/carla_bridge"} <= set(ros2("node", "list").split())
    assert ros2("lifecycle", "get", "/car2/explainer").startswith("active")
    assert "Set parameter successful" in ros2("param", "set", "/car2/explainer", "opacity", "0.25")
    teleop = subprocess.Popen(
        ["ros2", "topic", "pub", "--rate", "10", "/car2/cmd_vel", "geometry_msgs/msg/Twist", "{linear: {x: 5.0}}"],
        env={**live_support.workspace(), "ROS_DOMAIN_ID": str(domain)},
        stdout=subprocess.DEVNULL,
    )
    try:
        live_support.until(
            lambda: "manual: true" in ros2("topic", "echo", "--once", "/car2/carla_digr/decision"), lambda: None
        )
    finally:
        teleop.terminate()
        teleop.wait(live_support.LIMIT)
    ros2("lifecycle", "set", "/car2/carla_bridge", "shutdown")
    drive.communicate(timeout=live_support.LIMIT)
    assert drive.returncode == 0
    (bag,) = tmp_path.iterdir()
    told = ros2("bag", "info", str(bag))
    assert re.search(r"Topic: /carla_digr/overlay \| Type: sensor_msgs/msg/Image \| Count: [1-9]", told)


def test_ros2_replays_another_robots_camera(ros2_launch, tmp_path):
    """Crop and size as on the command line."""
    bag = tmp_path / "front"
    with Writer(bag, version=8) as writer:
        camera = writer.add_connection("/front", PICTURE_TYPE, typestore=drive_bags.STORE)
        for number in range(1, 11):
            message = drive_bags.image(number * 10**8, drive_bags.picture(number, 300), "rgb8")
            writer.write(camera, number * 10**8, drive_bags.serialized(PICTURE_TYPE, message))
    replay = ros2_launch(
        "replay",
        f"bag:={bag}",
        "camera:=/front",
        "method:=linear",
        "crop:=40,10,200,200",
        "wrong_size:=resize",
        "viewer:=false",
        "rviz:=false",
    )
    said, _ = replay.communicate(timeout=live_support.LIMIT)
    assert replay.returncode == 0, said
