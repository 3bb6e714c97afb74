"""A recorder's file that is cut or changed anywhere is refused with a sentence, or read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carla_digr.simulator import playback, recording, retelling, streaming, wire
from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.episode import Episode
from carla_digr.simulator.frames import advance
from carla_digr.simulator.recorder_calls import replay_file
from carla_digr.simulator.wire import Transform, Vector3D


def drive() -> Episode:
    episode = Episode(1, 0, wire.EpisodeSettings(True), 2001)
    for number, name in enumerate(("vehicle.tesla.model3", "walker.pedestrian.0001", "static.prop.barrel")):
        x, y, _ = (float(v[0]) for v in episode.world.road.pose([50.0 + 20.0 * number], [4.0]))
        uid = 0
        entry = episode.spawn(wire.ActorDescription(uid, name, []), Transform(Vector3D(x, y, 0.5)), 0)
        if number == 0:
            camera = wire.ActorDescription(0, "sensor.camera.rgb", [wire.AttributeValue("fov", wire.FLOAT, "40.0")])
            episode.spawn(camera, Transform(Vector3D(-6.0, 0.0, 3.0)), entry.id)
    return episode


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    episode = drive()
    episode.tape.directory = tmp_path_factory.mktemp("recordings")
    writer = episode.tape.start("drive.log", recording.header("RingHighway"), episode.world.elapsed)
    playback.record(episode)
    for _ in range(5):
        list(advance(episode, (streaming.WORLD_STREAM,)))
    episode.tape.stop()
    return writer.path


def test_what_was_written_is_read(recorded):
    header, frames = recording.read(recorded)
    frames = list(frames)
    assert header.map == "RingHighway" and len(frames) == 6
    assert [len(recording.motions(frame)) for frame in frames] == [1] * 6
    assert [len(recording.steps(frame)) for frame in frames] == [2] * 6
    np.testing.assert_allclose([frame.stamp for frame in frames], 0.05 * np.arange(6), atol=1e-9)
    assert "Frames: 6" in retelling.info(header, frames, True)


@pytest.mark.parametrize("sensors", [False, True])
def test_sensors_come_back_where_they_are_asked_for(recorded, sensors):
    episode = Episode(1, 0, wire.EpisodeSettings(True), 2001)
    episode.tape.directory = recorded.parent
    replay_file(episode, recorded.name, 0.0, 0.0, 0, sensors, Transform())
    list(advance(episode, ()))
    made = [entry.description.id for entry in episode.actors.values()]
    assert made.count("sensor.camera.rgb") == sensors and len(made) == 4 + sensors
    if sensors:
        (camera,) = (entry for entry in episode.actors.values() if entry.camera is not None)
        assert camera.camera.fov == 40.0
        assert episode.actors[camera.parent].description.id == "vehicle.tesla.model3"
        assert episode.place(camera).location.z == pytest.approx(3.0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_read(recorded, tmp_path, data):
    whole = recorded.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    changed = bytearray(whole[:cut])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6)):
        if at < len(changed):
            changed[at] = value
    (tmp_path / "changed.log").write_bytes(changed)
    episode = drive()
    episode.tape.directory = tmp_path
    try:
        retelling.info(*recording.read(tmp_path / "changed.log"), True)
        replay_file(episode, "changed.log", 0.0, 0.0, 0, True, Transform())
    except CallFailed as error:
        assert str(error)
    for _ in range(3):
        list(advance(episode, ()))
    assert np.isfinite(episode.records()["location"]).all()


def test_a_full_disk_ends_the_recording_only(tmp_path):
    episode = drive()
    episode.tape.directory = tmp_path
    writer = episode.tape.start("drive.log", recording.header("RingHighway"), 0.0)

    def full(_: bytes) -> int:
        raise OSError(28, "No space left on device")

    writer._file = type("Full", (), {"write": staticmethod(full)})()  # type: ignore[assignment]
    list(advance(episode, ()))
    assert episode.tape.writer is None
    assert not list(tmp_path.iterdir())
