"""`carla-digr check-simulator`: passes on the embedded highway with either traffic, and names what is wrong."""

from __future__ import annotations

import json
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
from carla_digr.driving import acceptance
from carla_digr.driving.checks import CHECKS
from carla_digr.driving.scenario import Scenario
from carla_digr.simulator.awkward import TRAITS

ATTEMPTS = 3


def check(port: int, *options: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "carla_digr.cli", "check-simulator", "--port", str(port), *options]
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if acceptance.LOST not in done.stdout:  # the library's own Traffic Manager lost a wake-up
            break
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
        from carla_digr.driving import checks
        from carla_digr.driving.acceptance import check_simulator
        checks.FULL_SECONDS = 0.0  # all of it is over
        raise SystemExit(not check_simulator("127.0.0.1", PORT, simulator="carla", full=True))
    """
    for _ in range(ATTEMPTS):
        client = run_client(program, simulator)
        said, _ = client.communicate(timeout=300)
        if acceptance.LOST not in said:
            break
    assert client.returncode == 0, said
    assert "saw 20 vehicles, " in said
    assert " after 3 resets of " in said, "as quick as without --full, where there is no time left"


def test_an_absent_server_fails_the_first_check_and_the_others_are_not_tried(capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["check-simulator", "--port", str(port), "--timeout", "0.3"]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL  server: expected CARLA 0.9.16 whose tick nobody owns; saw No simulator answers")
    assert "what to do: start CarlaUE4.sh" in first
    assert [line.split(":")[1] for line in others] == [" not tried"] * (len(CHECKS) - 1)


ANOTHER_VERSION = """
    from carla_digr.simulator.server import METHODS
    METHODS["version"] = METHODS["version"]._replace(function=lambda episode: "0.9.15")
"""
WITHOUT_CONTACTS_AND_HIGHWAY = """
    from carla_digr.simulator import road
    from carla_digr.simulator.calls import get_actor_definitions
    from carla_digr.simulator.server import METHODS
    road.LANE_WIDTH = 2.5
    METHODS["get_actor_definitions"] = METHODS["get_actor_definitions"]._replace(
        function=lambda episode: [d for d in get_actor_definitions(episode) if d.id != "sensor.other.collision"]
    )
"""
UNFIT = """
    import time
    from contextlib import suppress
    from itertools import cycle
    import numpy as np
    from carla_digr.simulator import world
    from carla_digr.simulator.calls import apply_control_to_vehicle, destroy_actor, spawn_actor
    from carla_digr.simulator.calls import set_actor_target_velocity, set_actor_transform
    from carla_digr.simulator.entries import CallFailed
    from carla_digr.simulator.server import METHODS
    from carla_digr.simulator.wire import ActorDescription, Transform, Vector3D
    from carla_digr.simulator.world import World

    strangers = iter(range(3, 200, 8))
    step, traffic, shift = World.step, World.spawn_traffic, cycle((0.0, 1.0))

    def slow_at_first(world, delta):
        time.sleep(0.06 * (50 < world.frame < 120))
        return step(world, delta)

    def with_a_stuck_wheel(episode, vehicle, control):
        apply_control_to_vehicle(episode, vehicle, control._replace(throttle=0.0, brake=0.0, steer=0.005))

    def a_third(episode, vehicle, velocity):
        set_actor_target_velocity(episode, vehicle, Vector3D(*(part / 3.0 for part in velocity)))

    def never_to_the_same_place(episode, actor, place):
        x, y, z = place.location
        set_actor_transform(episode, actor, Transform(place.location._replace(x=x + next(shift)), place.rotation))

    def sensors_only(episode, actor):
        return episode.entry(actor).kind >= 0 or destroy_actor(episode, actor)

    def with_a_stranger(episode, description, place):
        if "traffic" in description.id:
            for point in strangers:
                with suppress(CallFailed):  # where vehicles that stay stand already
                    episode.spawn(ActorDescription(0, "vehicle.audi.a2", []), episode.spawn_points()[point], 0)
                    break
        return spawn_actor(episode, description, place)

    World.step = slow_at_first
    world.render = lambda road, pose, width, height, *rest, **palette: np.zeros((height, width, 4), np.uint8)
    World.spawn_traffic = lambda world, seed, vehicles, *rest: traffic(world, seed, min(vehicles, 3), rest[0], 0)
    for changed, function in {
        "apply_control_to_vehicle": with_a_stuck_wheel,
        "set_actor_target_velocity": a_third,
        "spawn_actor": with_a_stranger,
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


def test_each_line_that_no_trait_breaks_fails_for_its_own_reason(capsys):
    """Too slow, without a picture, pedals, wheel and traffic, with other places each time and vehicles that stay."""
    failed = failures(UNFIT, capsys)
    expected = {
        "ticks": r"saw 0\.0500 s a frame, \d+ frames a second, .*what to do: start the server with -RenderOffScreen",
        "camera": r"contrast 0 of 255; what to do: turn rendering on",
        "rolling start": r"saw 7\.\d m/s at first, .*what to do: hold the velocity",
        "cruise": r"saw -1\d\.\d+ m/s, .*what to do: lower the damping",
        "pedals": r"throttle 1 -0\.1.*what to do: use CARLA 0",
        "steering": r"saw 3\d % at 5 m/s, .*what to do: divide the steer",
        "keeping": r"saw \d\.\d\d m off it at the most in \d+ m; what to do: see steering and reach",
        "car": r"saw \d\d\.\d\d m/s off at the most, .*what to do: see rolling start",
        "drive": r"saw \d\d m, \d+ frames a second with pictures; what to do: choose other spawn points",
        "traffic": r"saw \d+ vehicles, .*what to do: where only the limits are low",
        "repetition": r"saw 1\.00 m between the two, .*what to do: stop other clients that move actors",
        "resets": r"saw \+3 actors and \+\d+ MiB in this client after 3 resets .*what to do: stop other",
        "leaving": r"saw .*vehicle\.audi\.a2 \d+, .*settings as before; what to do: stop other clients that make",
    }
    assert list(failed) == list(expected)
    for what, text in expected.items():
        assert re.search(text, failed[what]), failed[what]


TURNS_RED = {
    "gears": "rolling start",
    "damping": "cruise",
    "brakes": "pedals",
    "steering": "steering",
    "settling": "settling",
    "momentum": "teleport",
    "contacts": "contacts",
    "limits": "traffic",
    "town": "reach",
    "exposure": "pictures",
    "blur": "pictures",
    "sight": "sight",
    "edges": "instances",
    "weather": "weather",
    "ids": "ids",
    "slow": "ticks",
    "deadlock": "ticks",
}


def test_every_trait_has_its_line():
    assert list(TURNS_RED) == [kind.name for kind in TRAITS]
    assert set(TURNS_RED.values()) < {check.what for check in CHECKS}


@pytest.mark.parametrize("trait", [name for name in TURNS_RED if name != "slow"])
def test_a_trait_turns_its_line_red_and_no_other(trait, tmp_path):
    size = {"deadlock": "=90"}.get(trait, "")  # within the frames that are timed
    simulator = Simulator(options=["--traits", trait + size])
    try:
        code, lines = check(simulator.port, "--timeout", "5", "--out", str(tmp_path / "report.json"))
    finally:
        simulator.stop()
    assert code == 1
    assert [line.split(":")[0] for line in lines if line.startswith("FAIL")] == [f"FAIL  {TURNS_RED[trait]}"], lines
    report = json.loads((tmp_path / "report.json").read_text())
    assert [line["check"] for line in report["checks"] if not line["passed"]] == [TURNS_RED[trait]]
    assert report["figures"]["reach"]["starts"]


def test_a_slow_server_turns_the_line_of_the_ticks_red(capsys, monkeypatch):
    """Only the first lines, as all of them would take a minute and a half there."""
    monkeypatch.setattr(acceptance, "CHECKS", CHECKS[: 1 + [check.what for check in CHECKS].index("ids")])
    simulator = Simulator(options=["--traits", "slow"])
    try:
        assert main(["check-simulator", "--port", str(simulator.port)]) == 1
    finally:
        simulator.stop()
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert [line.split(":")[0] for line in failed] == ["FAIL  ticks"]


def test_a_world_that_is_not_rendered_is_named_and_a_drive_has_it_rendered_meanwhile(shared_simulator, capsys):
    client = carla.Client("127.0.0.1", shared_simulator.port)
    client.set_timeout(20.0)
    world = client.get_world()
    found, settings = world.get_settings(), world.get_settings()
    settings.no_rendering_mode = True
    world.apply_settings(settings)
    try:
        assert main(["check-simulator", "--port", str(shared_simulator.port), "--timeout", "1"]) == 1
        with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, 20.0, vehicles=0) as drive:
            assert drive.reset(0).image.std() > 5.0
        assert world.get_settings().no_rendering_mode
    finally:
        world.apply_settings(found)
    failed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("pass")]
    assert len(failed) == 1
    assert re.search(
        r"FAIL  camera: .* was not rendered \(no_rendering_mode\).*what to do: turn rendering on", failed[0]
    )


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


def test_a_check_that_never_returns_is_given_up_with_its_line_in_the_report(tmp_path):
    report = tmp_path / "report.json"
    program = f"""
import pathlib, time
from carla_digr.driving import acceptance
acceptance.STALL = 0.5, 0.5
acceptance.CHECKS = (
    acceptance.Check("good", "", "", lambda visit: (True, "it")),
    acceptance.Check("stuck", "", "", lambda visit: time.sleep(100)),
)
acceptance.check_simulator("127.0.0.1", 1, 0.1, report=pathlib.Path({str(report)!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"FAIL  stuck: {acceptance.LOST}; what to do" in done.stdout
    lines = json.loads(report.read_text())["checks"]
    assert [(line["check"], line["passed"]) for line in lines] == [("good", True), ("stuck", False)]


@pytest.mark.parametrize("extra", [["--port", "0"], ["--port", "99999"]])
def test_impossible_ports_are_named(extra, capsys):
    assert main(["check-simulator", *extra]) == 1
    assert "does not exist" in capsys.readouterr().out
