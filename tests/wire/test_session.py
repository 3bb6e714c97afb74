"""Sessions and scenarios with the simulator: whose the tick is, what is left behind, and what goes wrong."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
import weakref
from pathlib import Path

import carla
import msgpack
import numpy as np
import pytest
from simulator_process import Simulator, eventually, run_client

from carla_digr.driving.control import ACTIONS, VehicleCommand
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import Session
from carla_digr.errors import SimulatorGone, UserError

CRUISE = VehicleCommand(steer=0.0, target_speed=22.0)


def look(port: int) -> tuple[bool, list[str]]:
    """Whether the world is synchronous, and its actors, as a client that changes nothing sees them."""
    client = carla.Client("127.0.0.1", port)
    client.set_timeout(20.0)
    world = client.get_world()
    if not world.get_settings().synchronous_mode:
        world.wait_for_tick(20.0)
    eventually(lambda: world.get_snapshot().frame > 0)
    return world.get_settings().synchronous_mode, sorted(a.type_id for a in world.get_actors())


def zombie(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# ---------------------------------------------------------------------------------------------------- connecting


def test_an_absent_simulator_is_named_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        UserError, match=f"No simulator answers on 127.0.0.1:{port}.*carla-digr simulator --port {port}"
    ):
        Session.connect("127.0.0.1", port, 0.3)
    with pytest.raises(UserError, match=r"No simulator answers on no\.such\.host\.invalid"):
        Session.connect("no.such.host.invalid", 2000, 0.3)
    with pytest.raises(UserError, match="Port 70000 does not exist"):
        Session.connect("127.0.0.1", 70000, 0.3)


def test_something_else_on_the_port_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match="does not answer as a CARLA server"):
            Session.connect("127.0.0.1", port, 0.3)


def test_another_version_is_refused_with_both_named():
    def answer() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            unpacker = msgpack.Unpacker()
            while data := client.recv(4096):
                unpacker.feed(data)
                for _, call_id, _method, _params in unpacker:
                    client.sendall(msgpack.packb([1, call_id, None, [[1, "0.9.15"]]]))

    listener = socket.create_server(("127.0.0.1", 0))
    stand_in = threading.Thread(target=answer, daemon=True)
    stand_in.start()
    with pytest.raises(UserError, match=r"is CARLA 0\.9\.15, this client is 0\.9\.16"):
        Session.connect("127.0.0.1", listener.getsockname()[1], 10.0)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    stand_in.join(timeout=20)


# ------------------------------------------------------------------------------------------------- the one owner


def test_a_second_owner_is_refused_and_told_who_the_first_is(simulator):
    with Scenario.connect("embedded", "127.0.0.1", simulator.port, vehicles=5) as drive:
        drive.reset(1)
        second = run_client(
            """
            from carla_digr.driving.session import Session
            from carla_digr.errors import UserError
            try:
                Session.connect("127.0.0.1", PORT)
            except UserError as error:
                print(error)
            """,
            simulator,
        )
        said, _ = second.communicate(timeout=60)
        assert f"process {os.getpid()} on {socket.gethostname()} owns the tick of 127.0.0.1:{simulator.port}" in said
        drive.step(CRUISE)
    with Session.connect("127.0.0.1", simulator.port) as session:
        session.tick()


def test_somebody_elses_ticks_are_noticed(session, shared_simulator):
    other = carla.Client("127.0.0.1", shared_simulator.port)
    other.set_timeout(10.0)
    session.tick()
    other.get_world().tick(10.0)
    with pytest.raises(UserError, match="Another client also ticks"):
        session.tick()


# ------------------------------------------------------------------------------------------------ leaving again

NOTING = """
    import sys
    from carla_digr.simulator.server import Server

    dispatch = Server._dispatch

    def note(server, connection, request):
        actors, arguments = server._episode.actors, request.arguments
        match request.method:
            case "destroy_actor" if arguments[0] in actors:
                print("destroy", actors[arguments[0]].description.id, file=sys.stderr)
            case "apply_batch":
                for kind in sorted({command[0][0] for command in arguments[0]}):
                    print({0: "spawn batch", 1: "destroy batch"}.get(kind, "other batch"), file=sys.stderr)
            case "set_episode_settings":
                print("synchronous" if arguments[0][0] else "asynchronous", file=sys.stderr)
            case "tick_cue" | "destroy_traffic_manager":
                print(request.method, file=sys.stderr)
        dispatch(server, connection, request)

    Server._dispatch = note
"""


@pytest.fixture
def noting():
    """A simulator that notes who is destroyed, ticks and settings, and gives the notes when it is stopped."""
    started = Simulator(altered=NOTING)
    yield started
    started.stop()


IN_ORDER = [
    "destroy controller.traffic.highway",
    "destroy sensor.camera.rgb",
    "destroy sensor.other.collision",
    "destroy vehicle.tesla.model3",
    "asynchronous",
]
"""Traffic, then what has a stream, then what carries it; the clock runs again when all are gone."""


def test_only_own_actors_go_and_the_settings_come_back(noting):
    simulator = noting
    other = carla.Client("127.0.0.1", simulator.port)
    other.set_timeout(10.0)
    world = other.get_world()
    settings = world.get_settings()
    settings.max_substeps = 9
    settings.fixed_delta_seconds = 0.1
    world.apply_settings(settings)
    foreign = world.spawn_actor(
        world.get_blueprint_library().find("vehicle.audi.a2"), world.get_map().get_spawn_points()[9]
    )
    with (
        pytest.raises(ZeroDivisionError),
        Scenario.connect("embedded", "127.0.0.1", simulator.port, vehicles=5) as drive,
    ):
        drive.reset(1)
        raise ZeroDivisionError
    synchronous, actors = look(simulator.port)
    assert not synchronous
    assert actors == ["spectator", "vehicle.audi.a2"]
    assert foreign.is_alive
    assert (world.get_settings().max_substeps, world.get_settings().fixed_delta_seconds) == (9, 0.1)
    assert [line for line in noting.stop().splitlines() if line != "tick_cue"][-5:] == IN_ORDER


DRIVE = """
    import signal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, has it ignored
    from carla_digr.driving.scenario import Scenario
    from carla_digr.driving.control import ACTIONS
    with Scenario.connect("embedded", "127.0.0.1", PORT, vehicles=5) as drive:
        drive.reset(1)
        print("here", flush=True)
        while True:
            drive.step(ACTIONS["wheels"]["keep"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_world_as_it_was(noting, number):
    client = run_client(DRIVE, noting)
    assert client.stdout.readline() == "here\n"
    client.send_signal(number)
    client.communicate(timeout=60)
    assert client.returncode != 0
    assert look(noting.port) == (False, ["spectator"])
    assert [line for line in noting.stop().splitlines() if line != "tick_cue"][-5:] == IN_ORDER


def test_a_signal_in_the_middle_of_tidying_up_does_not_keep_the_rest(noting):
    program = """
        import signal
        import carla
        from carla_digr.driving.session import Session
        with Session.connect("127.0.0.1", PORT) as session:
            session.spawn(session.blueprint("sensor.camera.rgb"), carla.Transform())
            session.before_close(lambda: signal.raise_signal(signal.SIGINT))
    """
    client = run_client(program, noting)
    assert "KeyboardInterrupt" in client.communicate(timeout=60)[1]
    assert client.returncode == -signal.SIGINT
    seen, notes = look(noting.port), noting.stop().splitlines()
    assert (seen, notes[-2:]) == ((False, ["spectator"]), ["destroy sensor.camera.rgb", "asynchronous"]), notes


def test_what_fails_while_tidying_up_does_not_keep_the_rest(shared_simulator):
    def fail() -> None:
        raise UserError("somebody else ticks too")

    with Session.connect("127.0.0.1", shared_simulator.port) as session:
        session.spawn(session.blueprint("sensor.camera.rgb"), carla.Transform())
        session.before_close(fail)
    assert look(shared_simulator.port) == (False, ["spectator"])


def test_nothing_is_left_on_a_server_that_hung_while_it_was_left(simulator):
    session = Session.connect("127.0.0.1", simulator.port)
    session.spawn(session.blueprint("sensor.camera.rgb"), carla.Transform())
    session.before_close(lambda: simulator.process.send_signal(signal.SIGSTOP))
    session.close()
    assert session.gone
    simulator.process.send_signal(signal.SIGCONT)
    session.close()
    assert look(simulator.port) == (False, ["spectator"])


def test_an_interpreter_that_ends_without_closing_leaves_the_world_as_it_was(noting):
    program = """
        from carla_digr.driving.scenario import Scenario
        drive = Scenario.connect("embedded", "127.0.0.1", PORT, vehicles=5)
        drive.reset(1)
    """
    _, errors = run_client(program, noting).communicate(timeout=60)
    assert "Traceback" not in errors
    assert look(noting.port) == (False, ["spectator"])
    assert [line for line in noting.stop().splitlines() if line != "tick_cue"][-5:] == IN_ORDER


def test_what_a_killed_session_left_is_removed_by_the_next_one(simulator):
    client = run_client(DRIVE, simulator)
    assert client.stdout.readline() == "here\n"
    client.kill()
    eventually(lambda: zombie(client.pid))
    synchronous, actors = look(simulator.port)
    assert synchronous
    assert "sensor.camera.rgb" in actors
    with Session.connect("127.0.0.1", simulator.port) as session:
        session.tick()
        assert [a.type_id for a in session.world.get_actors()] == ["spectator"]
    assert look(simulator.port) == (False, ["spectator"])
    client.communicate()


def test_a_session_is_closed_when_the_library_has_let_go_of_what_its_sensors_call(shared_simulator):
    def receive(_: carla.Image) -> None:
        pass

    alive = weakref.ref(receive)
    with Session.connect("127.0.0.1", shared_simulator.port) as session:
        camera = session.blueprint("sensor.camera.rgb", image_size_x=32, image_size_y=32)
        session.listen(session.spawn(camera, carla.Transform()), receive)
        del receive
        late = session.world.on_tick(lambda _: time.sleep(0.2))  # its thread is busy when the sensor is stopped
        session.tick()
        session.world.remove_on_tick(late)
    assert alive() is None


ENDING = """
    import threading
    import time
    import carla
    from carla_digr.driving.session import SensorStream, Session
    from carla_digr.errors import SimulatorGone

    session = Session.connect("127.0.0.1", PORT, 1.0)
    camera = session.blueprint("sensor.camera.rgb", image_size_x=32, image_size_y=32)
"""
BUSY = """
    stream = SensorStream(session, session.spawn(camera, carla.Transform()))
    late = session.world.on_tick(lambda _: time.sleep(HOLD))
    session.tick()
    session.world.remove_on_tick(late)
"""
GONE = """
    class SlowEnd:
        def __del__(self, sleep=time.sleep):
            sleep(0.3)

    _end = SlowEnd()  # an interpreter that takes its time to end
    streams = [SensorStream(session, session.spawn(camera, carla.Transform())) for _ in range(2)]
    session.tick()
    print("here", flush=True)
    input()
    try:
        session.tick()
    except SimulatorGone:
        print("gone")
"""


@pytest.mark.parametrize("how", ["session.close()", "pass"])
def test_an_interpreter_that_ends_is_not_aborted_by_the_librarys_busy_thread(shared_simulator, how):
    """Which needs the interpreter when it lets go of what a sensor calls; the interpreter takes some 0.05 s to end."""
    for hold in ("0.02", "0.04", "0.06", "0.08"):
        client = run_client(ENDING + BUSY.replace("HOLD", hold) + "    " + how, shared_simulator)
        _, errors = client.communicate(timeout=60)
        assert (client.returncode, errors) == (0, "")


@pytest.mark.parametrize("how", ["session.close()", "pass"])
def test_an_interpreter_that_ends_after_its_simulator_is_not_aborted(simulator, how):
    client = run_client(ENDING + GONE + "    " + how, simulator)
    assert client.stdout.readline() == "here\n"
    simulator.process.kill()
    simulator.process.wait()
    said, errors = client.communicate("\n", timeout=60)
    assert (client.returncode, said, errors) == (0, "gone\n", "")


# ----------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_simulator_that_goes_mid_drive_is_named(simulator, number):
    drive = Scenario.connect("embedded", "127.0.0.1", simulator.port, timeout=2.0, vehicles=5)
    drive.reset(1)
    drive.step(CRUISE)
    simulator.process.send_signal(number)
    with pytest.raises(SimulatorGone, match=f"The simulator at 127.0.0.1:{simulator.port} is gone .*start it again"):
        for _ in range(3):
            drive.step(CRUISE)
    drive.close()
    drive.close()


def test_a_drive_goes_on_after_its_simulator_hung(simulator):
    """No operator: the lost drive connects anew, removes what it had left, and drives as before."""
    drive = Scenario.connect("embedded", "127.0.0.1", simulator.port, timeout=2.0, vehicles=5)
    first = [drive.reset(4), *(drive.step(CRUISE) for _ in range(3))]
    simulator.process.send_signal(signal.SIGSTOP)
    with pytest.raises(SimulatorGone):
        drive.step(CRUISE)
    with pytest.raises(UserError, match="does not answer"):
        drive.reconnect(patience=0.0)
    simulator.process.send_signal(signal.SIGCONT)
    with drive.reconnect(patience=30.0) as again:
        second = [again.reset(4), *(again.step(CRUISE) for _ in range(3))]
        assert all((a.image == b.image).all() for a, b in zip(first, second, strict=True))
        assert len(again._session.world.get_actors().filter("sensor.*")) == 2  # camera and collision sensor
    assert look(simulator.port) == (False, ["spectator"])


def test_nothing_is_left_on_a_server_that_only_hung(simulator):
    """By a session that nobody wants to go on with: the end of the interpreter closes it."""
    program = """
        from carla_digr.driving.control import ACTIONS
        from carla_digr.driving.scenario import Scenario
        from carla_digr.errors import SimulatorGone
        drive = Scenario.connect("embedded", "127.0.0.1", PORT, timeout=1.0, vehicles=6)
        try:
            drive.reset(1)
            drive.step(ACTIONS["wheels"]["keep"])
            print("here", flush=True)
            while True:
                drive.step(ACTIONS["wheels"]["keep"])
        except SimulatorGone:
            drive.close()
            print("gone", flush=True)
            input()
    """
    client = run_client(program, simulator)
    assert client.stdout.readline() == "here\n"
    simulator.process.send_signal(signal.SIGSTOP)
    assert client.stdout.readline() == "gone\n"
    simulator.process.send_signal(signal.SIGCONT)
    _, errors = client.communicate("\n", timeout=60)
    assert client.returncode == 0, errors
    assert "Traceback" not in errors
    assert look(simulator.port) == (False, ["spectator"])


def test_a_drive_goes_on_with_a_simulator_that_was_started_again():
    simulator = Simulator()
    drive = Scenario.connect("embedded", "127.0.0.1", simulator.port, timeout=2.0, vehicles=5)
    drive.reset(4)
    simulator.stop()
    with pytest.raises(SimulatorGone):
        drive.step(CRUISE)
    simulator = Simulator(simulator.port)
    with drive.reconnect(patience=30.0) as again:
        assert again.reset(4).speed == pytest.approx(22.0, abs=0.1)
    simulator.stop()


def test_a_session_on_another_machine_keeps_its_tick_and_its_actors(simulator):
    client = carla.Client("127.0.0.1", simulator.port)
    client.set_timeout(20.0)
    world = client.get_world()
    found = world.get_settings()
    settings = world.get_settings()
    settings.synchronous_mode, settings.fixed_delta_seconds = True, 0.05
    world.apply_settings(settings)
    blueprint = world.get_blueprint_library().find("vehicle.tesla.model3")
    blueprint.set_attribute("role_name", "carla_digr elsewhere 17")
    theirs = world.spawn_actor(blueprint, world.get_map().get_spawn_points()[0])
    world.tick()
    with pytest.raises(UserError, match="process 17 on elsewhere owns the tick"):
        Session.connect("127.0.0.1", simulator.port, 10.0)
    world.apply_settings(found)
    with Session.connect("127.0.0.1", simulator.port, 10.0) as mine:
        assert mine.world.get_actor(theirs.id) is not None


def test_a_process_owns_a_tick_only_once(session, shared_simulator):
    with pytest.raises(UserError, match="This process already owns the tick"):
        Session.connect("127.0.0.1", shared_simulator.port)
    session.tick()


def test_frames_follow_each_other_and_pictures_are_their_own(shared_simulator):
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, vehicles=20) as drive:
        frames = [drive.reset(3), *(drive.step(CRUISE) for _ in range(20))]
        again = [drive.reset(3), *(drive.step(CRUISE) for _ in range(20))]
    assert [f.frame - frames[0].frame for f in frames] == list(range(21))
    assert np.diff([f.stamp for f in frames]) == pytest.approx(0.05)
    assert frames[0].image.shape == (128, 128, 3)
    assert frames[0].image.dtype == np.uint8
    assert all((a.image == b.image).all() for a, b in zip(frames, again, strict=True))
    assert all((a.image != b.image).any() for a, b in itertools.pairwise(frames))
    assert frames[-1].speed == pytest.approx(22.0, abs=0.5)


def test_a_crash_is_reported_once_and_not_carried_into_the_next_episode(shared_simulator):
    with Scenario.connect("embedded", "127.0.0.1", shared_simulator.port, vehicles=0) as drive:
        first = drive.reset(2)
        assert first.collision is None
        assert not first.off_road
        frame = first
        for _ in range(200):
            frame = drive.step(ACTIONS["wheels"]["left"])
            if frame.collision:
                break
        assert frame.collision == "static.barrier"
        assert frame.off_road
        again = drive.reset(2)
        assert (again.collision, again.off_road) == (None, False)
        assert (again.x, again.y, again.speed) == (first.x, first.y, first.speed)
        assert drive.step(CRUISE).collision is None


def test_the_traffic_manager_drives_where_the_simulator_does_not(noting):
    program = """
        from carla_digr.driving.scenario import Scenario
        from carla_digr.driving.control import ACTIONS
        with Scenario.connect("carla", "127.0.0.1", PORT, vehicles=12) as drive:
            for seed in (1, 2):
                drive.reset(seed)
                for _ in range(60):
                    drive.step(ACTIONS["wheels"]["keep"])
                world = drive._session.world
                vehicles = world.get_actors().filter("vehicle.*")
                print(len(vehicles), sum(v.get_velocity().length() > 3.0 for v in vehicles), flush=True)
    """
    client = run_client(program, noting)
    said, errors = client.communicate(timeout=120)
    assert client.returncode == 0, errors
    for line in said.splitlines():
        vehicles, moving = map(int, line.split())
        assert vehicles == 13
        assert moving >= 10
    assert len(said.splitlines()) == 2
    assert look(noting.port) == (False, ["spectator"])
    end = ["destroy batch", "tick_cue", "destroy_traffic_manager", *IN_ORDER[1:]]
    assert noting.stop().splitlines()[-len(end) :] == end
