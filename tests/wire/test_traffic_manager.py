"""The client's own Traffic Manager drives on the ring for minutes."""

from __future__ import annotations

import hashlib
import json
import queue
import socket
import threading
from types import SimpleNamespace

import msgpack
import pytest
from live_support import free_port
from simulator_process import run_client

from carla_digr.driving import traffic
from carla_digr.driving.control import TICK
from carla_digr.simulator.road import MEDIAN_HALF_WIDTH, ROAD_EDGE

DRIVE = """
    import json
    import carla
    from carla_digr.driving.session import Session
    from carla_digr.driving.traffic import ManagerWatch
    from carla_digr.simulator.road import Road

    road = Road.ring()
    with Session.connect("127.0.0.1", PORT, 20.0) as session:
        manager = session.client.get_trafficmanager(MANAGER)
        manager.set_synchronous_mode(True)
        watch = ManagerWatch(session, manager)
        manager.set_random_device_seed(7)
        points = session.map.get_spawn_points()
        kinds = sorted(session.blueprints.filter("vehicle.*"), key=lambda b: b.id)
        vehicles = [
            session.spawn(session.blueprint(kinds[i % len(kinds)].id), points[11 * i % len(points)]) for i in range(20)
        ]
        hits = []
        for vehicle in vehicles:
            sensor = session.spawn(session.blueprint("sensor.other.collision"), carla.Transform(), vehicle)
            session.listen(sensor, lambda e: hits.append((e.frame, e.actor.id, e.other_actor.type_id)))
            vehicle.set_autopilot(True, manager.get_port())
        for _ in range(COUNT):
            snapshot = session.tick()
            states = [snapshot.find(v.id) for v in vehicles]
            places = [s.get_transform().location for s in states]
            print(json.dumps({
                "speeds": [s.get_velocity().length() for s in states],
                "offsets": [float(road.project(p.x, p.y)[1]) for p in places],
                "alive": sum(v.is_alive for v in vehicles),
                "hits": hits,
            }), flush=True)
        for vehicle in vehicles:
            vehicle.set_autopilot(False, manager.get_port())
        session.tick()
        for actor in session._actors[::-1]:
            session.destroy(actor)
        session.tick()
        watch.stop()
        manager.shut_down()
"""


def test_twenty_vehicles_of_the_traffic_manager_drive_for_minutes(simulator, long):
    """Over more ticks than the library's own thread stays awake for: ManagerWatch."""
    seconds = 600.0 if long else 60.0
    count = round(seconds / TICK)
    program = DRIVE.replace("COUNT", str(count)).replace("MANAGER", str(free_port()))
    said, errors = run_client(program, simulator).communicate(timeout=60.0 + 2.0 * seconds)
    ticks = [json.loads(line) for line in said.splitlines()]
    assert len(ticks) == count, errors
    assert all(tick["alive"] == 20 and not tick["hits"] for tick in ticks)
    offsets = [offset for tick in ticks for offset in tick["offsets"]]
    assert MEDIAN_HALF_WIDTH < min(offsets) < max(offsets) < ROAD_EDGE
    slowest = min(sum(vehicle) * TICK for vehicle in zip(*(tick["speeds"] for tick in ticks), strict=True))
    assert slowest > 8.0 * seconds
    assert simulator.process.poll() is None


@pytest.fixture
def manager():
    """Stands for a manager's RPC port: (its port, a queue of the calls that it gets)."""
    calls: queue.SimpleQueue[tuple[str, list]] = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    unpacker = msgpack.Unpacker()
                    while data := connection.recv(4096):
                        unpacker.feed(data)
                        for _, number, method, arguments in unpacker:
                            calls.put((method, arguments))
                            connection.sendall(msgpack.packb([1, number, None, None]))

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], calls
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


class Ticking:
    """A session whose tick does what a test says."""

    address = "here"

    def __init__(self, ticking_from: int | None, frame: int, answers: bool = True):
        self.answers = answers
        self.ticking_from, self.frame, self.looks = ticking_from, frame, queue.SimpleQueue()
        self.world = SimpleNamespace(get_snapshot=self._snapshot)
        self.client = SimpleNamespace(get_server_version=self._version)

    def _version(self) -> str:
        if not self.answers:
            raise RuntimeError("time-out")
        return "0.9.16"

    def _snapshot(self) -> SimpleNamespace:
        self.looks.put(self.frame)
        return SimpleNamespace(frame=self.frame)


@pytest.mark.parametrize(
    ("ticking_from", "answers", "woken"),
    [(6, True, True), (7, True, False), (None, True, False), (6, False, False)],
    ids=["the frame is here and the tick goes on", "no frame came", "nobody ticks", "the server hangs"],
)
def test_the_manager_is_woken_when_it_sleeps_and_only_then(manager, monkeypatch, ticking_from, answers, woken):
    monkeypatch.setattr(traffic, "WAKE_AFTER", 0.05)
    port, calls = manager
    session = Ticking(ticking_from, 7, answers)
    watch = traffic.ManagerWatch(session, SimpleNamespace(get_port=lambda: port))
    try:
        if woken:
            assert [calls.get(timeout=30.0) for _ in range(2)] == [
                ("set_synchronous_mode", [False]),
                ("set_synchronous_mode", [True]),
            ]
        for _ in range(4):
            session.looks.get(timeout=30.0)
    finally:
        watch.stop()
    assert woken or calls.empty()


def test_a_manager_that_works_is_left_alone(manager, monkeypatch):
    monkeypatch.setattr(traffic, "WAKE_AFTER", 0.05)
    port, calls = manager
    session, over = Ticking(6, 7), threading.Event()

    def work() -> None:
        """Outside of Python's lock, as the library's thread does."""
        while not over.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)

    worker = threading.Thread(target=work)
    worker.start()
    watch = traffic.ManagerWatch(session, SimpleNamespace(get_port=lambda: port))
    try:
        for _ in range(8):
            session.looks.get(timeout=30.0)
    finally:
        watch.stop()
        over.set()
        worker.join()
    assert calls.empty()


def test_a_manager_that_keeps_up_is_left_alone(manager, monkeypatch):
    monkeypatch.setattr(traffic, "WAKE_AFTER", 0.05)
    port, calls = manager
    session = Ticking(6, 7)
    watch = traffic.ManagerWatch(session, SimpleNamespace(get_port=lambda: port))
    try:
        for _ in range(8):
            frame = session.looks.get(timeout=30.0)
            session.ticking_from, session.frame = frame, frame + 1
    finally:
        watch.stop()
    assert calls.empty()


def test_the_library_knows_what_wakes_it(simulator):
    """The call that the watch makes is one of the real manager's, which answers without an error."""
    program = """
        import socket
        import msgpack
        from carla_digr.driving.session import Session

        with Session.connect("127.0.0.1", PORT, 20.0) as session:
            manager = session.client.get_trafficmanager(MANAGER)
            manager.set_synchronous_mode(True)
            session.tick()
            with socket.create_connection(("127.0.0.1", manager.get_port()), 20.0) as connection:
                for mode in (False, True):
                    connection.sendall(msgpack.packb([0, 3, "set_synchronous_mode", [mode]]))
                    print(msgpack.unpackb(connection.recv(4096)), flush=True)
            session.tick()
            manager.shut_down()
    """
    said, errors = run_client(program.replace("MANAGER", str(free_port())), simulator).communicate(timeout=120)
    assert said.splitlines() == ["[1, 3, None, None]"] * 2, errors
