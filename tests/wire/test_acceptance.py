"""`carla-digr check-simulator`: passes on the embedded highway with either traffic, and names what is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import carla
import pytest
from simulator_process import Simulator, run_client

from carla_digr.cli import main
from carla_digr.driving.acceptance import CHECKS


def check(port: int, *options: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "carla_digr.cli", "check-simulator", "--port", str(port), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()


def test_the_embedded_highway_passes_and_is_not_called_carla(shared_simulator):
    client = carla.Client("127.0.0.1", shared_simulator.port)
    client.set_timeout(20.0)
    world = client.get_world()
    somebody_elses = world.spawn_actor(
        world.get_blueprint_library().find("sensor.camera.rgb"), carla.Transform(carla.Location(0.0, 5.0, 4.0))
    )
    code, lines = check(shared_simulator.port)
    assert [line.split(":")[0] for line in lines] == [f"pass  {check.what}" for check in CHECKS]
    assert code == 0
    assert "embedded highway, not CARLA" in lines[0]
    assert somebody_elses.destroy()


def test_it_passes_with_the_traffic_of_a_carla_server_too(simulator):
    program = """
        from carla_digr.driving.acceptance import check_simulator
        raise SystemExit(not check_simulator("127.0.0.1", PORT, simulator="carla"))
    """
    client = run_client(program, simulator)
    said, _ = client.communicate(timeout=200)
    assert client.returncode == 0, said
    assert "with 20 others" in said


def test_an_absent_server_fails_the_first_check_and_the_others_are_not_tried(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["check-simulator", "--port", str(port), "--timeout", "0.3"]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL  server: expected CARLA 0.9.16 whose tick nobody owns; saw No simulator answers")
    assert "what to do: start CarlaUE4.sh" in first
    assert [line.split(":")[1] for line in others] == [" not tried"] * (len(CHECKS) - 1)


ANOTHER_VERSION = """
    from carla_digr.simulator.calls import METHODS
    METHODS["version"] = METHODS["version"]._replace(function=lambda episode: "0.9.15")
"""
WITHOUT_CONTACTS_AND_HIGHWAY = """
    from carla_digr.simulator import road
    from carla_digr.simulator.calls import METHODS, get_actor_definitions
    road.LANE_WIDTH = 2.5
    METHODS["get_actor_definitions"] = METHODS["get_actor_definitions"]._replace(
        function=lambda episode: [d for d in get_actor_definitions(episode) if d.id != "sensor.other.collision"]
    )
"""
UNFIT = """
    import time
    from itertools import count
    import numpy as np
    from carla_digr.simulator import world
    from carla_digr.simulator.calls import METHODS, apply_control_to_vehicle, destroy_actor, set_actor_transform
    from carla_digr.simulator.wire import Transform
    from carla_digr.simulator.world import World

    step, traffic, shift = World.step, World.spawn_traffic, count()

    def slow_at_first(world, delta):
        time.sleep(0.06 * (world.frame < 60))
        return step(world, delta)

    def without_brakes(episode, vehicle, control):
        apply_control_to_vehicle(episode, vehicle, control._replace(brake=0.0))

    def never_to_the_same_place(episode, actor, place):
        x, y, z = place.location
        set_actor_transform(episode, actor, Transform(place.location._replace(x=x + next(shift)), place.rotation))

    def sensors_only(episode, actor):
        return episode.entry(actor).kind >= 0 or destroy_actor(episode, actor)

    World.step = slow_at_first
    world.render = lambda road, pose, width, height, *rest, **palette: np.zeros((height, width, 4), np.uint8)
    World.spawn_traffic = lambda world, seed, vehicles, *rest: traffic(world, seed, min(vehicles, 3), rest[0], 0)
    for changed, function in {
        "apply_control_to_vehicle": without_brakes,
        "set_actor_transform": never_to_the_same_place,
        "destroy_actor": sensors_only,
    }.items():
        METHODS[changed] = METHODS[changed]._replace(function=function)
"""


def failures(altered: str, capsys) -> dict[str, str]:
    """The lines that fail on a simulator that was altered, by what they check; those after a break are left out."""
    simulator = Simulator(altered=altered)
    try:
        assert main(["check-simulator", "--port", str(simulator.port), "--timeout", "5"]) == 1
    finally:
        simulator.stop()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL  ")]
    return {line.removeprefix("FAIL  ").split(":")[0]: line for line in lines}


def test_another_version_is_named(capsys):
    failed = failures(ANOTHER_VERSION, capsys)
    assert list(failed) == ["server"]
    assert re.search(r"is CARLA 0\.9\.15, this client is 0\.9\.16; .*start CarlaUE4\.sh of CARLA 0", failed["server"])


def test_missing_blueprints_and_roads_that_are_no_highway_are_named(capsys):
    failed = failures(WITHOUT_CONTACTS_AND_HIGHWAY, capsys)
    assert list(failed) == ["blueprints", "map"]
    assert re.search(r"saw no sensor\.other\.collision; what to do: use the unmodified pack", failed["blueprints"])
    assert re.search(r"has no highway: none of its \d+ spawn points .*what to do: load Town04", failed["map"])


def test_each_line_fails_for_its_own_reason(capsys):
    """Too slow, without a picture, brakes and traffic, with other places each time and vehicles that stay."""
    failed = failures(UNFIT, capsys)
    expected = {
        "ticks": r"saw 0\.0500 s a frame, \d+ frames a second; what to do: lower the graphics",
        "camera": r"contrast 0 of 255; what to do: turn rendering on",
        "control": r"saw 22\.\d m/s after setting 22, \+\d\.\d degrees, -?0\.\d m/s slower; what to do: use CARLA 0",
        "drive": r"m with 4 others, \d of them moving, .*what to do: choose other spawn points",
        "repetition": r"saw 1\.00 m between the two; what to do: stop other clients that move actors",
        "leaving": r"saw vehicle\.tesla\.model3 \d+, .*settings as before; what to do: stop other clients that make",
    }
    assert list(failed) == list(expected)
    for what, text in expected.items():
        assert re.search(text, failed[what]), failed[what]


def test_a_world_that_is_not_rendered_is_named(shared_simulator, capsys):
    client = carla.Client("127.0.0.1", shared_simulator.port)
    client.set_timeout(20.0)
    world = client.get_world()
    found, settings = world.get_settings(), world.get_settings()
    settings.no_rendering_mode = True
    world.apply_settings(settings)
    try:
        assert main(["check-simulator", "--port", str(shared_simulator.port), "--timeout", "1"]) == 1
    finally:
        world.apply_settings(found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0][:4] for line in lines] == ["pass"] * 4 + ["FAIL"] + ["  --"] * 4
    assert re.search(r"camera.rgb sent nothing for frame \d+ .*what to do: turn rendering on", lines[4])


def test_the_owner_of_the_tick_is_named(session, shared_simulator):
    session.spawn(session.blueprint("vehicle.tesla.model3"), session.map.get_spawn_points()[3])
    session.tick()
    code, (first, *others) = check(shared_simulator.port)
    assert code == 1
    assert re.search(
        rf"process {os.getpid()} on .* owns the tick.*what to do: .*stop other clients that tick it", first
    )
    assert all("not tried" in line for line in others)
    session.tick()


def test_a_server_that_hangs_half_way_is_reported(simulator):
    lines = []

    def read() -> None:
        for line in client.stdout:
            lines.append(line)
            if "ticks" in line:
                simulator.process.send_signal(signal.SIGSTOP)

    command = [sys.executable, "-m", "carla_digr.cli", "check-simulator", "--port", str(simulator.port)]
    client = subprocess.Popen([*command, "--timeout", "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reader = threading.Thread(target=read)
    reader.start()
    assert client.wait(timeout=100) == 1
    reader.join(timeout=20)
    client.communicate()
    failed = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert len(failed) == 1 and "no answer in 3 s" in lines[failed[0]], lines
    assert all("not tried" in line for line in lines[failed[0] + 1 :])


@pytest.mark.parametrize("extra", [["--port", "0"], ["--port", "99999"]])
def test_impossible_ports_are_named(extra, capsys):
    assert main(["check-simulator", *extra]) == 1
    assert "does not exist" in capsys.readouterr().out
