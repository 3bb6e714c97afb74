"""What a simulator process must survive, and how it ends."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import carla
import msgpack
import numpy as np
import pytest
from simulator_process import Simulator, eventually

from carla_digr.driving.control import VehicleCommand
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import SensorStream, Session
from carla_digr.simulator.calls import METHODS

SERVER = [sys.executable, "-m", "carla_digr.simulator.server"]


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def call(connection: socket.socket, unpacker: msgpack.Unpacker, method: str, *arguments) -> list:
    connection.sendall(msgpack.packb([0, 7, method, [[False], *arguments]]))
    for message in unpacker:
        return message
    while data := connection.recv(1 << 16):
        unpacker.feed(data)
        for message in unpacker:
            return message
    raise AssertionError(f"{method}: the server hung up")


def assert_serves(simulator: Simulator) -> None:
    client = carla.Client("127.0.0.1", simulator.port)
    client.set_timeout(20.0)
    assert client.get_server_version() == "0.9.16"
    assert simulator.process.poll() is None


def gone(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ------------------------------------------------------------------------------------------------ begin and end


@pytest.mark.parametrize("offset", [0, 1], ids=["calls", "streams"])
def test_a_port_in_use_is_one_sentence(offset):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*SERVER, "--port", str(port - offset)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr


def test_it_listens_on_loopback_only(simulator):
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True).stdout
    for port in (simulator.port, simulator.streaming_port):
        addresses = [line.split()[1] for line in listening.splitlines() if f":{port:04X} 00000000:0000" in line]
        assert addresses == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_asked(simulator, number):
    with Session.connect("127.0.0.1", simulator.port) as session:
        session.tick()
        simulator.process.send_signal(number)
        assert simulator.process.wait(timeout=20) == 0
        assert simulator.stop() == ""


START = """
    import os, subprocess, sys, threading, time
    def start():
        global server
        server = subprocess.Popen({command} + ["--port", "0"], stdout=subprocess.PIPE, text=True)
    {how}
    line = server.stdout.readline()
    print(server.pid, line.split("127.0.0.1:")[1].split(",")[0], flush=True)
    time.sleep(600)
"""


def start_by_a_parent(how: str) -> tuple[subprocess.Popen, int, int]:
    program = textwrap.dedent(START).format(command=SERVER, how=how)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    process, port = map(int, parent.stdout.readline().split())
    return parent, process, port


def test_it_ends_with_its_parent():
    parent, process, _ = start_by_a_parent("start()")
    parent.kill()
    parent.communicate()
    eventually(lambda: gone(process))


def test_it_outlives_the_thread_that_started_it():
    parent, process, port = start_by_a_parent("t = threading.Thread(target=start); t.start(); t.join()")
    try:
        client = carla.Client("127.0.0.1", port)
        client.set_timeout(20.0)
        assert client.get_server_version() == "0.9.16"
        assert not gone(process)
    finally:
        parent.kill()
        parent.communicate()
    eventually(lambda: gone(process))


def test_it_does_not_start_for_a_parent_that_is_dead():
    done = subprocess.run([*SERVER, "--port", "0", "--parent", "1"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


# ----------------------------------------------------------------------------------------------- what comes in


def test_every_method_answers_whatever_it_is_given(simulator):
    connection, unpacker = connect(simulator.port), msgpack.Unpacker()
    names = [*METHODS, "apply_batch", "get_sensor_token", "load_new_episode", "copy_opendrive_to_file", "no_such_call"]
    for name in names:
        for arguments in (
            [],
            [None],
            [7],
            ["x"],
            [[]],
            [[[0, [7]]]],
            [4e9, 1e308],
            [[1e308] * 14],
            [2**31, [[], []]],
            [-1] * 5,
        ):
            kind, call_id, error, result = call(connection, unpacker, name, *arguments)
            assert (kind, call_id) == (1, 7)
            assert (error is None) != (result is None)
    assert_serves(simulator)
    connection.close()
    simulator.process.terminate()
    assert "Traceback" not in simulator.process.communicate(timeout=20)[1]


def test_numbers_that_are_none_are_refused(simulator):
    connection, unpacker = connect(simulator.port), msgpack.Unpacker()
    _, _, _, spectator = call(connection, unpacker, "get_spectator")
    actor = spectator[0][1][0]
    for bad in (float("nan"), float("inf"), 1e30):
        *_, result = call(connection, unpacker, "set_actor_transform", actor, [[bad, 0.0, 0.0], [0.0, 0.0, 0.0]])
        assert result[0][0] is True
    connection.close()
    assert_serves(simulator)


def test_random_and_truncated_bytes_on_both_ports(simulator):
    rng = np.random.default_rng(3)
    request = msgpack.packb([0, 1, "get_map_data", [[False]]])
    with Session.connect("127.0.0.1", simulator.port) as session:
        before = simulator.memory()
        for i in range(120):
            port = (simulator.port, simulator.streaming_port)[i % 2]
            with connect(port) as connection:
                connection.sendall(rng.bytes(int(rng.integers(1, 4000))) if i % 3 else request[: 1 + i % len(request)])
            if i % 10 == 0:
                session.tick()
        session.tick()
        assert simulator.memory() - before < 30e6
    assert_serves(simulator)


def test_fifty_clients_that_vanish(simulator):
    half = msgpack.packb([0, 1, "spawn_actor", [[False]]])[:9]
    reset = struct.pack("ii", 1, 0)
    with Session.connect("127.0.0.1", simulator.port) as session:
        connections = [connect((simulator.port, simulator.streaming_port)[i % 2]) for i in range(50)]
        for i, connection in enumerate(connections):
            connection.sendall(struct.pack("<I", 1) if i % 2 else half)
            if i % 4 < 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        session.tick()
        for connection in connections:
            connection.close()
        for _ in range(5):
            session.tick()
    descriptors = Path(f"/proc/{simulator.process.pid}/fd")
    eventually(lambda: len(list(descriptors.iterdir())) < 20)


def test_a_token_that_nobody_uses_holds_a_tick_only_for_a_moment(simulator):
    with Session.connect("127.0.0.1", simulator.port) as session:
        connection, unpacker = connect(simulator.port), msgpack.Unpacker()
        *_, result = call(connection, unpacker, "get_sensor_token", 1)
        assert result[0][0] == 1
        session.tick()
        session.tick()
        connection.close()


def test_a_client_that_stops_reading_is_dropped_and_blocks_nobody(simulator):
    with Session.connect("127.0.0.1", simulator.port) as session:
        camera = session.spawn(
            session.blueprint("sensor.camera.rgb", image_size_x=512, image_size_y=512),
            carla.Transform(carla.Location(0.0, 5.0, 4.0)),
        )
        pictures = SensorStream(session, camera)
        pictures.take(session.tick().frame)
        before = simulator.memory()
        stalled = connect(simulator.streaming_port)
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        _, _, _, token = call(connect(simulator.port), msgpack.Unpacker(raw=True), "get_sensor_token", camera.id + 1)
        stalled.sendall(token[0][1][0][:4])
        for _ in range(40):  # 1 MB each, more than it may leave unread
            pictures.take(session.tick().frame)
        assert simulator.memory() - before < 60e6
        with pytest.raises(ConnectionResetError):
            while stalled.recv(1 << 20):
                pass


def test_a_caller_that_does_not_read_answers_is_dropped(simulator):
    with Session.connect("127.0.0.1", simulator.port) as session:
        before = simulator.memory()
        caller = connect(simulator.port)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = msgpack.packb([0, 1, "get_map_data", [[False]]]) * 50
        with pytest.raises((ConnectionError, TimeoutError)):
            for _ in range(200):
                caller.sendall(request)
                session.tick()
        assert simulator.memory() - before < 60e6
        session.tick()


def test_memory_stays_flat_over_episodes(simulator):
    with Scenario.connect("embedded", "127.0.0.1", simulator.port, vehicles=30) as drive:
        sizes = []
        for episode in range(24):
            drive.reset(episode)
            for _ in range(10):
                drive.step(VehicleCommand(steer=0.0, target_speed=22.0))
            sizes.append(simulator.memory())
    assert sizes[-1] - sizes[5] < 2e6
