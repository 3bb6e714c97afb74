"""The client's own Traffic Manager drives on the ring for minutes."""

from __future__ import annotations

import json
import queue
import threading
from typing import Any

from live_support import free_port
from simulator_process import Simulator, run_client

from carla_digr.driving.control import TICK
from carla_digr.simulator.road import MEDIAN_HALF_WIDTH, ROAD_EDGE

DRIVE = """
    import json
    import carla
    from carla_digr.driving.session import Session
    from carla_digr.simulator.road import Road

    road = Road.ring()
    with Session.connect("127.0.0.1", PORT, 20.0) as session:
        manager = session.client.get_trafficmanager(MANAGER)
        manager.set_synchronous_mode(True)
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
        manager.shut_down()
"""

SILENCE = 30.0  # s in which a living client, once it drives, gets a tick on


def test_twenty_vehicles_of_the_traffic_manager_drive_for_minutes(simulator, long):
    seconds = 600.0 if long else 60.0
    drives = drives_of(simulator, round(seconds / TICK))
    ticks = [tick for drive in drives for tick in drive]
    assert all(tick["alive"] == 20 and not tick["hits"] for tick in ticks)
    offsets = [offset for tick in ticks for offset in tick["offsets"]]
    assert MEDIAN_HALF_WIDTH < min(offsets) < max(offsets) < ROAD_EDGE
    slowest = min(sum(vehicle) * TICK for vehicle in zip(*(tick["speeds"] for tick in ticks), strict=True))
    assert slowest > 8.0 * (seconds - 5.0 * (len(drives) - 1))  # each drive begins at rest
    assert simulator.process.poll() is None


def drives_of(simulator: Simulator, count: int) -> list[list[dict[str, Any]]]:
    """What clients say of so many ticks, one drive after the other: one that falls silent is followed by another.

    The client library notifies its manager's thread without holding the lock that the thread waits with: a wake-up may
    be lost, and then its tick never ends (seen from the 30th tick on, on a quiet machine too).
    """
    drives: list[list[dict[str, Any]]] = []
    for _ in range(12):
        left = count - sum(map(len, drives))
        program = DRIVE.replace("COUNT", str(left)).replace("MANAGER", str(free_port()))
        said, ended = said_until_silence(program, simulator)
        drives.append([json.loads(line) for line in said])
        if ended:
            assert len(said) == left
            return drives
    raise AssertionError(f"twelve clients fell silent: {[len(drive) for drive in drives]} ticks")


def said_until_silence(program: str, simulator: Simulator) -> tuple[list[str], bool]:
    """The lines that the program says, and whether it came to its end or had to be killed."""
    client = run_client(program, simulator)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in (*client.stdout, "")])
    reader.start()
    said = []
    try:
        while line := lines.get(timeout=SILENCE):
            said.append(line)
    except queue.Empty:
        client.kill()
    finally:
        reader.join()
        status, errors = client.wait(), client.stderr.read()
    assert status in (0, -9), errors
    return said, status == 0
