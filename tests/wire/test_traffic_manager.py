"""The client's own Traffic Manager drives on the ring for minutes."""

from __future__ import annotations

import json
import queue
import threading

from simulator_process import Simulator, run_client

from carla_digr.simulator.road import MEDIAN_HALF_WIDTH, ROAD_EDGE

DRIVE = """
    import json, math
    import carla
    from carla_digr.driving.session import Session
    from carla_digr.simulator.road import Road

    road = Road.ring()
    with Session.connect("127.0.0.1", PORT, 20.0) as session:
        manager = session.client.get_trafficmanager(TM_PORT)
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
        distance = dict.fromkeys((v.id for v in vehicles), 0.0)
        offsets = [math.inf, -math.inf]
        for tick in range(TICKS):
            if tick % 100 == 0:
                print(tick, flush=True)
            snapshot = session.tick()
            for vehicle in vehicles:
                state = snapshot.find(vehicle.id)
                place = state.get_transform().location
                distance[vehicle.id] += 0.05 * state.get_velocity().length()
                _, d, _ = road.project(place.x, place.y)
                offsets = [min(offsets[0], float(d)), max(offsets[1], float(d))]
        alive = sum(v.is_alive for v in vehicles)
        for vehicle in vehicles:
            vehicle.set_autopilot(False, manager.get_port())
        session.tick()
        for actor in list(session._actors)[::-1]:
            session.destroy(actor)
        session.tick()
        manager.shut_down()
        print(json.dumps({"alive": alive, "least": min(distance.values()), "offsets": offsets, "hits": hits}))
"""


SILENCE = 60.0  # s in which a living drive gets 100 ticks on


def test_twenty_vehicles_of_the_traffic_manager_drive_for_minutes(simulator, long):
    seconds = 600.0 if long else 60.0
    program = DRIVE.replace("TICKS", str(round(seconds / 0.05))).replace("TM_PORT", str(simulator.port + 5))
    said = next(filter(None, (last_words(program, simulator) for _ in range(3))), None)
    assert said is not None, "three drives fell silent"
    seen = json.loads(said)
    assert seen["alive"] == 20
    assert not seen["hits"]
    assert MEDIAN_HALF_WIDTH < seen["offsets"][0] < seen["offsets"][1] < ROAD_EDGE
    assert seen["least"] > 8.0 * seconds
    assert simulator.process.poll() is None


def last_words(program: str, simulator: Simulator) -> str | None:
    """The last line that the program says, or None if it had to be killed.

    The client library notifies its manager's thread without holding the lock that the thread waits with: a wake-up may
    be lost, and then its tick never ends (seen once in a dozen drives on a busy machine).
    """
    client = run_client(program, simulator)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in (*client.stdout, "")])
    reader.start()
    said = ""
    try:
        while line := lines.get(timeout=SILENCE):
            said = line
    except queue.Empty:
        client.kill()
        return None
    finally:
        reader.join()
        status, errors = client.wait(), client.stderr.read()
    assert status == 0, errors
    return said
