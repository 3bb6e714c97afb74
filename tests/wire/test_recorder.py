"""Recordings behind CARLA's own calls: shown again frame by frame, told as text, in one directory of the server."""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator
from pathlib import Path

import carla
import numpy as np
import pytest
from simulator_process import Simulator

from carla_digr.driving.session import Session
from carla_digr.simulator.navigation import STRIP
from carla_digr.simulator.road import Road

ROAD = Road.ring()
EGO = "vehicle.tesla.model3"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def simulator(place) -> Iterator[Simulator]:
    started = Simulator(altered=f"import os; os.chdir({str(place)!r})")
    yield started
    alive = started.process.poll() is None
    errors = started.stop()
    assert alive and "Traceback" not in errors, errors


@pytest.fixture
def session(simulator) -> Iterator[Session]:
    with Session.connect("127.0.0.1", simulator.port, 20.0) as connected:
        yield connected


def poses(session: Session, ids: list[int]) -> list[tuple[float, ...]]:
    snapshot = session.world.get_snapshot()
    found = []
    for actor in ids:
        state = snapshot.find(actor)
        where, speed = state.get_transform(), state.get_velocity()
        found.append((where.location.x, where.location.y, where.location.z, where.rotation.yaw, speed.x, speed.y))
    return found


def test_a_drive_is_recorded_told_and_replayed_pose_by_pose(session, place):
    """As start_recording.py, show_recorder_*.py and start_replaying.py do it: traffic, a walker, a crash, weather."""
    client, points = session.client, session.map.get_spawn_points()
    ego = session.spawn(session.blueprint(EGO, role_name="hero"), points[20])
    traffic = session.spawn(
        session.blueprint("controller.traffic.highway", seed=3, vehicles=20, oncoming=5, hero=ego.id),
        carla.Transform(),
    )
    s, _, heading = (float(v) for v in ROAD.project(points[24].location.x, points[24].location.y))
    x, y, _ = (float(v) for v in ROAD.pose(s, STRIP[0] + 1.0))
    walker = session.spawn(session.blueprint("walker.pedestrian.0004"), carla.Transform(carla.Location(x, y, 0.93)))
    gone = session.spawn(session.blueprint("static.prop.box01"), carla.Transform(carla.Location(x, y + 9.0, 0.0)))
    session.tick()
    file = client.start_recorder("drive.log", True)
    assert Path(file) == place / "runs" / "recorder" / "drive.log"
    assert not Path(file).exists()  # not before it is whole
    walker.apply_control(carla.WalkerControl(carla.Vector3D(1.0, 0.0, 0.0), 1.5))
    ego.set_target_velocity(ego.get_transform().get_forward_vector() * 25.0)
    ego.apply_control(carla.VehicleControl(throttle=0.4, steer=0.01))  # into the guard rail in the end
    ids = [*sorted(actor.id for actor in session.world.get_actors().filter("vehicle.*")), walker.id]
    assert len(ids) == 27
    told = [poses(session, ids)]
    for number in range(60):
        session.tick()
        told.append(poses(session, ids))
        if number == 30:
            session.world.set_weather(carla.WeatherParameters.HardRainNoon)
            assert gone.destroy()
    client.stop_recorder()
    assert client.get_server_version()  # after the call that no client waits for
    assert Path(file).is_file() and not list(Path(file).parent.glob("*.tmp"))

    text = client.show_recorder_file_info("drive.log", False)
    assert f"Create {ego.id}: {EGO} at (" in text and "role_name = hero" in text
    assert f"Destroy {gone.id}\n" in text and "Weather: " in text
    assert "Frames: 61\n" in text and "Duration: 3 seconds" in text
    assert len(client.show_recorder_file_info("drive.log", True)) > 10 * len(text)
    crashes = client.show_recorder_collisions("drive.log", "h", "a")
    assert EGO in crashes and "static." in crashes
    assert EGO not in client.show_recorder_collisions("drive.log", "w", "v")
    assert EGO not in client.show_recorder_actors_blocked("drive.log", 2.0, 100.0)
    with pytest.raises(RuntimeError, match="'x' is no type of actors"):
        client.show_recorder_collisions("drive.log", "x", "a")

    # Again, in a world without these actors: each tick shows the next recorded frame.
    for actor in (walker, ego):
        actor.destroy()
    traffic.destroy()
    session.tick()
    before = {actor.id for actor in session.world.get_actors()}
    assert "Replaying" in client.replay_file("drive.log", 0.0, 0.0, ego.id)
    pictures: queue.SimpleQueue = queue.SimpleQueue()
    there: list[int] = []
    for number in range(1, 61):
        session.tick()
        if not there:
            new = sorted(actor.id for actor in session.world.get_actors() if actor.id not in before)
            kinds = {a.id: a.type_id for a in session.world.get_actors(new)}
            there = [i for i in new if kinds[i].startswith("vehicle.")] + [i for i in new if "walker" in kinds[i]]
            assert len(there) == len(ids)
            eye = session.spawn(
                session.blueprint("sensor.camera.rgb", image_size_x=16, image_size_y=16),
                carla.Transform(carla.Location(-8.0, 0.0, 3.0)),
                session.world.get_actor(there[0]),
            )
            session.listen(eye, pictures.put)
        np.testing.assert_allclose(poses(session, there), told[number], atol=1e-6, err_msg=str(number))
    assert pictures.get(timeout=20.0).width == 16
    speed = [session.world.get_actor(i).get_velocity().length() for i in there]
    assert max(speed) > 15.0
    for _ in range(10):
        session.tick()  # the replay is over: vehicles brake, the walker stands
    later = [session.world.get_actor(i).get_velocity().length() for i in there]
    assert all(b < a for a, b in zip(speed, later, strict=True) if a > 1.0)
    client.apply_batch_sync([carla.command.DestroyActor(i) for i in there], False)
    session.tick()

    # A part, slowly, with the spectator behind the hero, whom another one is; then nothing is left.
    client.set_replayer_time_factor(0.5)
    client.set_replayer_ignore_spectator(False)
    before = {actor.id for actor in session.world.get_actors()}
    client.replay_file("drive.log", 1.0, 0.5, ego.id, False, carla.Transform(carla.Location(-10.0, 0.0, 5.0)))
    for number in range(1, 15):
        session.tick()
        new = sorted(actor.id for actor in session.world.get_actors() if actor.id not in before)
        kinds = {a.id: a.type_id for a in session.world.get_actors(new)}
        cars = [i for i in new if kinds[i].startswith("vehicle.")]
        whole, rest = divmod(20 + 0.5 * number, 1)
        mean = (1 - rest) * np.array(told[int(whole)]) + rest * np.array(told[int(whole) + (rest > 0)])
        np.testing.assert_allclose(np.array(poses(session, cars))[:, :2], mean[: len(cars), :2], atol=1e-3)
        hero = session.world.get_actor(cars[0]).get_transform()
        expected = hero.transform(carla.Location(-10.0, 0.0, 5.0))
        assert session.world.get_spectator().get_transform().location.distance(expected) < 0.01
    client.stop_replayer(False)
    session.tick()
    assert {actor.id for actor in session.world.get_actors()} == before
    client.set_replayer_time_factor(1.0)
    client.set_replayer_ignore_spectator(True)
    client.set_replayer_ignore_hero(True)
    client.replay_file("drive.log", -1.0, 0.0, 0)
    session.tick()
    roles = [a.attributes.get("role_name") for a in session.world.get_actors() if a.id not in before]
    assert len(roles) > 20 and "hero" not in roles
    client.set_replayer_ignore_hero(False)
    client.stop_replayer(False)
    session.tick()
    assert math.isfinite(heading)


def test_names_lead_nowhere_else_and_files_must_be_recordings(session, place, tmp_path):
    client = session.client
    outside = tmp_path / "outside.log"
    for name in ("../outside.log", str(outside), "", ".hidden", "a/b.log", "a\0b", "x" * 200, "ü.log", "a\\b"):
        for call in (
            lambda name=name: client.start_recorder(name),
            lambda name=name: client.replay_file(name, 0.0, 0.0, 0),
            lambda name=name: client.show_recorder_file_info(name, False),
        ):
            with pytest.raises(RuntimeError, match=r"no name of a recording: .* they all are in .*runs/recorder"):
                call()
    assert not outside.exists()
    directory = place / "runs" / "recorder"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "other.log").write_bytes(b"CARLA_RECORDER" + bytes(100))
    (directory / "folder.log").mkdir(exist_ok=True)
    (directory / "link.log").symlink_to("/dev/zero")
    for name, why in (
        ("other.log", "no recording of this simulator"),
        ("absent.log", "No such file"),
        ("folder.log", "s a directory|Is a directory"),
        ("link.log", "not a regular file"),
    ):
        with pytest.raises(RuntimeError, match=why):
            client.replay_file(name, 0.0, 0.0, 0)
    assert session.tick()
