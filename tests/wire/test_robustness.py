"""What a simulator process must survive, and how it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import carla
import msgpack
import numpy as np
import pytest
from simulator_process import Simulator, eventually, processor_time, resident, run_client

from carla_digr.driving.control import VehicleCommand
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import SensorStream, Session
from carla_digr.simulator.server import METHODS

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
    assert f"Port {port} of 127.0.0.1 is in use" in done.stderr


def test_it_listens_on_loopback_only(simulator):
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True).stdout
    for port in (simulator.port, simulator.streaming_port):
        addresses = [line.split()[1] for line in listening.splitlines() if f":{port:04X} 00000000:0000" in line]
        assert addresses == [f"0100007F:{port:04X}"]


def test_clients_can_leave_in_order_after_a_ctrl_c_that_comes_twice(simulator):
    with Session.connect("127.0.0.1", simulator.port) as session:
        session.tick()
        for _ in range(2):
            simulator.process.send_signal(signal.SIGINT)
            session.tick()
    assert simulator.process.wait(timeout=20) == 0
    assert simulator.stop() == ""


STOPPED_WHILE_COMPILING = """
    import ctypes, os, signal
    from carla_digr.simulator import server
    # llvmlite compiles in C and comes back to Python in a callback, which loses exceptions
    ask = ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.{number}))
    server.Server._warm_up = lambda *_: ask()
    server.run("127.0.0.1", 0)
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_it_ends_when_asked_while_it_compiles(number):
    program = textwrap.dedent(STOPPED_WHILE_COMPILING).format(number=number)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            assert server.communicate(timeout=60) == (b"", None)
        finally:
            server.kill()
    assert server.returncode == 0


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
        server = subprocess.Popen({command} + ["--port", "0"] + {options}, stdout=subprocess.PIPE, text=True)
    {how}
    line = server.stdout.readline()
    print(server.pid, line.split("127.0.0.1:")[1].split(",")[0], flush=True)
    time.sleep(600)
"""


def start_by_a_parent(how: str, options: str = '["--parent", str(os.getpid())]') -> tuple[subprocess.Popen, int, int]:
    program = textwrap.dedent(START).format(command=SERVER, how=how, options=options)
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


def test_without_a_parent_named_it_outlives_whoever_started_it():
    parent, process, port = start_by_a_parent("start()", "[]")
    try:
        parent.kill()
        parent.communicate()
        client = carla.Client("127.0.0.1", port)
        client.set_timeout(20.0)
        world = client.get_world()
        for _ in range(30):  # frames of 0.05 s: it looks for a parent every 0.25 s, and would leave within 3 s
            world.wait_for_tick(20.0)
        assert client.get_server_version() == "0.9.16"
    finally:
        os.kill(process, signal.SIGTERM)
    eventually(lambda: gone(process))


def free_ports(count: int) -> int:
    """The first of ``count`` ports ten apart that are free, and so are those above them."""
    for first in range(21000, 60000, 997):
        with contextlib.ExitStack() as bound:
            try:
                for port in (first + 10 * i + j for i in range(count) for j in range(2)):
                    bound.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no ports are free")


@pytest.mark.parametrize("end", ["SIGTERM", "one is killed"])
def test_several_instances_are_worlds_of_their_own_and_end_together(end):
    first = free_ports(2)
    command = [*SERVER, "--port", str(first), "--instances", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            ready = sorted(started.stdout.readline() for _ in range(2))
            assert [f"127.0.0.1:{port}," in line for port, line in zip((first, first + 10), ready, strict=True)]
            children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True)
            processes = list(map(int, children.stdout.split()))
            if end == "SIGTERM":
                with Session.connect("127.0.0.1", first) as one, Session.connect("127.0.0.1", first + 10) as other:
                    car = one.spawn(one.blueprint("vehicle.tesla.model3"), one.map.get_spawn_points()[0])
                    one.tick(), other.tick()
                    assert [a.id for a in one.world.get_actors().filter("vehicle.*")] == [car.id]
                    assert not other.world.get_actors().filter("vehicle.*")
            if end == "one is killed":
                os.kill(processes[0], signal.SIGKILL)
            else:
                started.send_signal(signal.SIGTERM)
            _, errors = started.communicate(timeout=30)
        finally:
            started.kill()
    assert len(processes) == 2 and all(map(gone, processes))
    if end == "one is killed":
        assert started.returncode == 2 and "was killed by SIGKILL; the other instances were ended too." in errors
    else:
        assert (started.returncode, errors) == (0, "")


def test_instances_need_their_ports():
    for options, sentence in (("--instances 0", "between 1 and 64"), ("--port 65500 --instances 9", "65500 to 65581")):
        done = subprocess.run([*SERVER, *options.split()], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert sentence in done.stderr


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


CAMERA = "sensor.camera.rgb"
HERE = [[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "attribute",
    [
        ["enable_postprocess_effects", 1, "2048"],
        ["role_name", 77, "x"],
        ["role_name", 0, "x"],
        ["role_name", 2, "7"],  # another type than the blueprint's
        ["tint", 3, "a little"],
        ["image_size_x", 2, "12.5"],
        ["paint", 5, "1,2"],
        ["paint", 5, "1,2,256"],
        ["role_name", 4, "x" * 2**13],
        ["x" * 2**20, 4, ""],
    ],
    ids=lambda attribute: f"{attribute[0][:30]}, {attribute[1]}, {attribute[2][:8]}",
)
def test_an_attribute_that_no_client_could_read_is_refused(shared_simulator, attribute):
    with connect(shared_simulator.port) as connection:
        *_, result = call(connection, msgpack.Unpacker(), "spawn_actor", [0, CAMERA, [attribute]], HERE)
    assert result[0][0] == 0
    assert attribute[0][:20] in result[0][1][0] or "characters" in result[0][1][0]
    client = carla.Client("127.0.0.1", shared_simulator.port)
    client.set_timeout(20.0)
    for actor in client.get_world().get_actors():
        assert all(isinstance(value, str) for value in actor.attributes.values())


def test_actors_are_told_once_and_there_is_an_end_to_them(simulator):
    connection, unpacker = connect(simulator.port), msgpack.Unpacker()
    spawn = [[0, [[0, CAMERA, []], HERE, [False], 0, "", []]]]
    *_, result = call(connection, unpacker, "apply_batch", [spawn] * 1500, False)
    made = [answer[0][1] for answer in result if answer[0][0] == 1]
    assert 900 < len(made) <= 1000
    assert "destroy some" in result[-1][0][1][0]
    *_, result = call(connection, unpacker, "get_actors_by_id", made * 9)
    assert [actor[0] for actor in result[0][1]] == made
    *_, result = call(connection, unpacker, "get_actors_by_id", made * 11)  # more than a world can have
    assert result[0][0] == 0
    *_, result = call(connection, unpacker, "apply_batch", [[[1, [actor]]] for actor in made], False)
    assert all(answer[0][0] == 1 for answer in result)
    connection.close()
    assert_serves(simulator)


def test_a_long_batch_lets_the_others_tick_and_keeps_the_order_of_its_own_client(simulator):
    """A batch whose commands spawn and destroy takes seconds; another client ticks meanwhile."""
    with Session.connect("127.0.0.1", simulator.port) as session:
        session.tick()
        connection = connect(simulator.port)
        spawn = [[0, [[0, CAMERA, []], HERE, [False], 0, "", [[[1, [0]]]] * 40]]]
        calls = [("apply_batch", [spawn] * 10_000, False), ("version",), ("apply_batch", [], False)]
        for number, (method, *arguments) in enumerate(calls):
            connection.sendall(msgpack.packb([0, number, method, [[False], *arguments]]))
        ticks = 0
        connection.setblocking(False)
        while True:
            session.tick()
            ticks += 1
            with contextlib.suppress(BlockingIOError):
                data = connection.recv(1 << 16)
                break
        assert ticks > 20
        connection.setblocking(True)
        unpacker, answers = msgpack.Unpacker(), []
        while len(answers) < 3:
            unpacker.feed(data)
            answers += unpacker
            data = connection.recv(1 << 16) if len(answers) < 3 else b""
        assert [answer[1] for answer in answers] == [0, 1, 2]
        assert len(answers[0][3]) == 10_000
        assert answers[1][3] == [[1, "0.9.16"]]
        assert answers[2][3] == []
        connection.close()


def test_a_batch_is_of_ten_thousand_commands_at_most_and_dies_with_its_client(simulator):
    connection, unpacker = connect(simulator.port), msgpack.Unpacker()
    *_, result = call(connection, unpacker, "apply_batch", [[[1, [0]]]] * 10_001, False)
    assert "at most 10000 commands" in result[0][0][1][0]
    connection.sendall(msgpack.packb([0, 7, "apply_batch", [[False], [[[1, [0]]]] * 10_000, False]]))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert_serves(simulator)


def test_a_call_of_many_parts_costs_about_what_it_takes_to_read_it(simulator):
    """Not a search for garbage in all that the simulator has loaded, which would hold up the ticks of others."""
    many = msgpack.packb([0, 7, "apply_batch", [[False], [[1, [7]]] * 100_000, False]])
    gc.disable()
    begun = time.process_time()
    for _ in range(5):
        msgpack.unpackb(many)
    reading = time.process_time() - begun
    gc.enable()
    before = processor_time(simulator.process.pid)
    for _ in range(5):
        connection = connect(simulator.port)
        connection.sendall(many)
        assert b"at most 10000 commands" in connection.recv(1 << 16)
        connection.close()
    assert processor_time(simulator.process.pid) - before < 6.0 * reading


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


def test_a_client_that_reads_drop_by_drop_holds_the_others_only_for_a_while(simulator):
    with Session.connect("127.0.0.1", simulator.port, 60.0) as session:
        camera = session.spawn(
            session.blueprint("sensor.camera.rgb", image_size_x=1024, image_size_y=1024),
            carla.Transform(carla.Location(0.0, 5.0, 4.0)),
        )
        pictures = SensorStream(session, camera)
        slow = connect(simulator.streaming_port)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # else the kernel takes nothing for a second
        _, _, _, token = call(connect(simulator.port), msgpack.Unpacker(raw=True), "get_sensor_token", camera.id + 1)
        slow.sendall(token[0][1][0][:4])
        over = threading.Event()

        def sip() -> None:
            with contextlib.suppress(ConnectionResetError):
                while not over.is_set() and slow.recv(1 << 12):
                    time.sleep(0.01)

        reader = threading.Thread(target=sip)
        reader.start()
        try:
            for _ in range(6):
                pictures.take(session.tick().frame)
        finally:
            over.set()
            reader.join()
            slow.close()
    assert "reads too slowly" in simulator.stop()


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


def test_memory_stays_flat_over_50_episodes(simulator):
    """On both sides, with one camera and one ego for all of them."""
    with Scenario.connect("embedded", "127.0.0.1", simulator.port, vehicles=30) as drive:
        server, client = [], []
        for episode in range(50):
            drive.reset(episode)
            for _ in range(10):
                drive.step(VehicleCommand(steer=0.0, target_speed=22.0))
            server.append(simulator.memory())
            client.append(resident(os.getpid()))
    assert server[-1] - server[5] < 2e6
    assert client[-1] - client[5] < 4e6


VANISHING = """
    import os, signal, sys
    import carla
    clients = []
    for i in range(50):
        client = carla.Client("127.0.0.1", PORT)
        client.set_timeout(20.0)
        assert client.get_server_version() == "0.9.16"
        if i % 5 == 0:
            world = client.get_world()
            blueprint = world.get_blueprint_library().find("sensor.camera.rgb")
            camera = world.spawn_actor(blueprint, carla.Transform(carla.Location(0, 5, 4)))
            camera.listen(lambda image: None)
            clients.append((world, camera))
        clients.append(client)
    print("here", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_fifty_carla_clients_that_are_killed_together(simulator):
    """Their actors stay, as on CARLA; their connections and what they subscribed to do not."""
    descriptors = Path(f"/proc/{simulator.process.pid}/fd")
    with Session.connect("127.0.0.1", simulator.port, 20.0) as session:
        session.tick()
        idle = len(list(descriptors.iterdir()))
        run_client(VANISHING, simulator).communicate(timeout=120)
        eventually(lambda: len(list(descriptors.iterdir())) <= idle)
        session.tick()
        left = session.world.get_actors().filter("sensor.*")
        assert len(left) == 10
        before = simulator.memory()
        for _ in range(100):
            session.tick()
        assert simulator.memory() - before < 2e6
        for camera in left:
            assert camera.destroy()


TICKING = """
    import carla
    client = carla.Client("127.0.0.1", PORT)
    client.set_timeout(20.0)
    world = client.get_world()
    settings = world.get_settings()
    settings.synchronous_mode, settings.fixed_delta_seconds = True, 0.05
    world.apply_settings(settings)
    blueprint = world.get_blueprint_library().find("sensor.camera.rgb")
    blueprint.set_attribute("image_size_x", "512")
    blueprint.set_attribute("image_size_y", "512")
    camera = world.spawn_actor(blueprint, carla.Transform(carla.Location(0, 5, 4)))
    camera.listen(lambda image: None)
    world.tick()
    print("here", flush=True)
    while True:
        world.tick()
"""


def test_clients_killed_in_the_middle_of_a_tick(simulator):
    """One after the other owns the tick and is killed while frames and pictures are under way."""
    watcher = carla.Client("127.0.0.1", simulator.port)
    watcher.set_timeout(20.0)
    world = watcher.get_world()
    sizes = []
    for i in range(8):
        client = run_client(TICKING, simulator)
        assert client.stdout.readline() == "here\n"
        frame = world.get_snapshot().frame
        eventually(lambda frame=frame, more=i: world.get_snapshot().frame > frame + more)
        client.kill()
        client.communicate()
        assert world.tick(20.0) > 0  # another client can go on at once
        for sensor in world.get_actors().filter("sensor.*"):
            sensor.destroy()
        world.tick(20.0)
        sizes.append(simulator.memory())
    assert sizes[-1] - sizes[2] < 4e6
    assert_serves(simulator)


def test_clients_that_only_look_and_one_that_drives(simulator):
    """Four processes follow the states and pictures of a world that this one ticks; all see every frame."""
    program = """
        import queue, time
        import carla
        client = carla.Client("127.0.0.1", PORT)
        client.set_timeout(20.0)
        world = client.get_world()
        while not world.get_actors().filter("sensor.camera.rgb"):
            time.sleep(0.01)  # the state of the halted world is on its way
        (camera,) = world.get_actors().filter("sensor.camera.rgb")
        frames = queue.SimpleQueue()
        camera.listen(lambda image: frames.put(image.frame))
        snapshots = queue.SimpleQueue()
        world.on_tick(lambda snapshot: snapshots.put(snapshot.frame))
        print("here", flush=True)
        seen = [frames.get(timeout=60) for _ in range(60)]
        assert seen == list(range(seen[0], seen[0] + 60)), seen
        seen = [snapshots.get(timeout=60) for _ in range(60)]
        assert seen == list(range(seen[0], seen[0] + 60)), seen
        camera.stop()
        print("saw them", flush=True)
    """
    with Session.connect("127.0.0.1", simulator.port, 20.0) as session:
        place = carla.Transform(carla.Location(0.0, 5.0, 4.0))
        session.spawn(session.blueprint("sensor.camera.rgb", image_size_x=32, image_size_y=32), place)
        session.tick()
        watchers = [run_client(program, simulator) for _ in range(4)]
        for watcher in watchers:
            assert watcher.stdout.readline() == "here\n"
        while any(watcher.poll() is None for watcher in watchers):
            session.tick()
        for watcher in watchers:
            said, errors = watcher.communicate(timeout=60)
            assert said == "saw them\n", errors


def test_half_open_connections_do_not_pile_up(simulator):
    """Streaming connections that never subscribe are closed after a while; callers may stay idle."""
    silent = [connect(simulator.streaming_port) for _ in range(30)]
    idle = connect(simulator.port)
    with Session.connect("127.0.0.1", simulator.port) as session:
        session.tick()
        for connection in silent:
            assert connection.recv(1) == b""
    kind, _, _, result = call(idle, msgpack.Unpacker(), "version")
    assert (kind, result) == (1, [[1, "0.9.16"]])
