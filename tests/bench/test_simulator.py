"""How fast the embedded highway is on this machine, both goals for one core, and how soon it ends when it must."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carla_digr.driving.benchmark import benchmark_simulator
from carla_digr.simulator.server import FAREWELL

PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "carla_digr.simulator.server", "--port", "0", "--parent", str(os.getpid())]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
print(server.pid, server.stdout.readline().split("127.0.0.1:")[1].split(",")[0], flush=True)
time.sleep(600)
"""
CLIENT = """
import sys
import carla
from carla_digr.driving.session import Session
port, busy = int(sys.argv[1]), sys.argv[2]
session = Session.connect("127.0.0.1", port, 20.0)
if busy == "cameras of 2048x2048":
    for _ in range(2):
        camera = session.blueprint("sensor.camera.rgb", image_size_x=2048, image_size_y=2048)
        session.spawn(camera, carla.Transform(carla.Location(0.0, 5.0, 4.0))).listen(lambda picture: None)
if busy == "the Traffic Manager":
    manager = session.client.get_trafficmanager(port + 7)
    manager.set_synchronous_mode(True)
    points = session.map.get_spawn_points()
    for i in range(20):
        vehicle = session.spawn(session.blueprint("vehicle.tesla.model3"), points[11 * i])
        vehicle.set_autopilot(True, port + 7)
for i in range(10**9):
    session.tick()
    if i == 20:
        print("here", flush=True)
"""


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen, int, int]]:
    """The process that started a simulator, the simulator's process id and its port."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    process, port = map(int, parent.stdout.readline().split())
    yield parent, process, port
    parent.kill()
    parent.communicate()


@pytest.mark.parametrize("busy", ["nobody", "ticks", "cameras of 2048x2048", "the Traffic Manager"])
@pytest.mark.parametrize("why", ["SIGTERM", "the death of its parent"])
def test_it_ends_at_once_or_when_its_clients_have_left(server, busy, why):
    """SIGTERM ends it in any state; when its parent dies, its clients have FAREWELL seconds to leave."""
    parent, process, port = server
    client = None
    if busy != "nobody":
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(port), busy], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        assert client.stdout.readline() == "here\n"
    start = time.perf_counter()
    if why == "SIGTERM":
        subprocess.run(["kill", "-TERM", str(process)], check=True)
    else:
        parent.kill()
    while not ended(process):
        time.sleep(0.002)
    seconds = time.perf_counter() - start
    print(f"{why}, busy with {busy}: {seconds:.3f} s")
    if client is not None:
        client.kill()
        client.communicate()
    assert seconds < 1.0 + (FAREWELL if client is not None and why != "SIGTERM" else 0.0)


def test_one_core_reaches_both_goals():
    assert benchmark_simulator(Path("runs/benchmark"))
