"""Episodes on several simulators at once: the same as on one, and as in process; simulators may hang on the way."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
from simulator_process import Simulator

from carla_digr.cli import main
from carla_digr.driving.control import ACTIONS, VehicleCommand
from carla_digr.driving.rollouts import RolloutConfig, drive_episodes, simulator_name, summary
from carla_digr.driving.session import Session
from carla_digr.errors import UserError
from carla_digr.tasks.driving.environment import DrivingEnv

KEEP = 1


def keep(_: np.ndarray) -> VehicleCommand:
    return ACTIONS["wheels"]["keep"]


def config(*simulators: Simulator, **changes) -> RolloutConfig:
    addresses = tuple(f"127.0.0.1:{simulator.port}" for simulator in simulators)
    return RolloutConfig(addresses, **({"episodes": 6, "episode_seconds": 4.0, "vehicles": 40, "seed": 5} | changes))


@pytest.fixture(scope="module")
def other():
    started = Simulator()
    yield started
    started.stop()


def test_several_simulators_drive_what_one_drives_and_what_is_driven_in_process(shared_simulator, other):
    def without_place(episodes):
        return [{name: value for name, value in e.items() if name != "simulator"} for e in episodes]

    one = drive_episodes(config(shared_simulator), lambda: keep)
    both = drive_episodes(config(shared_simulator, other), lambda: keep)
    assert without_place(one) == without_place(both)
    assert len({episode["simulator"] for episode in both}) == 2
    assert [episode["seed"] for episode in one] == list(range(5, 11))
    for episode in one:
        env = DrivingEnv()
        env.drive.vehicles = 40
        env.reset(seed=episode["seed"])
        ticks = 0
        while ticks < 80:
            _, _, over, _, _ = env.step(KEEP)
            ticks += 1
            if over:
                break
        assert episode["seconds"] == pytest.approx(0.05 * ticks)
        assert episode["clean"] == (not over)
    assert summary(one)["clean"] == np.mean([e["clean"] for e in one])


def test_an_episode_of_a_simulator_that_hung_is_driven_again(other):
    """And the results are those of simulators that never hung; nothing is left on it."""
    victim = Simulator()
    calls = threading.Semaphore(0)
    stopped = threading.Event()

    def decide(_: np.ndarray) -> VehicleCommand:
        calls.release()
        if not stopped.is_set() and calls._value == 40:
            stopped.set()
            victim.process.send_signal(signal.SIGSTOP)
            threading.Timer(3.0, victim.process.send_signal, [signal.SIGCONT]).start()
        return keep(_)

    expected = drive_episodes(config(other), lambda: keep)
    seen = drive_episodes(config(victim, timeout=1.0, patience=30.0), lambda: decide)
    assert stopped.is_set()
    assert [e["distance"] for e in seen] == [e["distance"] for e in expected]
    with Session.connect("127.0.0.1", victim.port) as session:
        assert not session.found_synchronous
        session.tick()
        assert [a.type_id for a in session.world.get_actors()] == ["spectator"]
    victim.stop()


def test_who_decides_is_asked_for_anew_in_each_episode(shared_simulator, other):
    drivers = []

    def driver():
        own = []
        drivers.append(own)

        def decide(picture: np.ndarray) -> VehicleCommand:
            own.append(picture)
            return keep(picture)

        return decide

    episodes = drive_episodes(config(shared_simulator, other, episode_seconds=1.0), driver)
    assert sorted(map(len, drivers)) == sorted(round(episode["seconds"] / 0.05) for episode in episodes)


def test_an_abort_of_the_client_library_costs_one_episode_a_second_try(other):
    """Nothing that was driven is lost, and the others go on meanwhile."""
    victims = []

    def decide(_: np.ndarray) -> VehicleCommand:
        if len(done) == 2 and not victims:
            (process,) = multiprocessing.active_children()
            victims.append(process.pid)
            os.kill(process.pid, signal.SIGABRT)
        return keep(_)

    done: list = []
    expected = drive_episodes(config(other), lambda: keep)
    seen = drive_episodes(config(other, timeout=5.0), lambda: decide, done.append)
    assert victims
    assert seen == expected
    assert [episode["seed"] for episode in done] == list(range(5, 11))
    assert not multiprocessing.active_children()


def test_rollouts_with_the_traffic_manager_survive_a_server_that_hangs():
    """Which may end the process that drives by an abort inside of the library."""
    victim = Simulator()
    calls = itertools.count()

    def decide(_: np.ndarray) -> VehicleCommand:
        if next(calls) == 50:
            victim.process.send_signal(signal.SIGSTOP)
            threading.Timer(5.0, victim.process.send_signal, [signal.SIGCONT]).start()
        return keep(_)

    settings = {"kind": "carla", "timeout": 2.0, "patience": 60.0, "vehicles": 8, "episodes": 2, "episode_seconds": 2.0}
    episodes = drive_episodes(config(victim, **settings), lambda: decide)
    assert next(calls) > 50
    assert [episode["seed"] for episode in episodes] == [5, 6]
    assert simulator_name("carla", episodes) == "the embedded highway with a Traffic Manager's traffic"
    assert simulator_name("carla", [{"map": "Town04"}]) == "CARLA 0.9.16 (Town04)"
    with Session.connect("127.0.0.1", victim.port) as session:
        session.tick()
        assert [a.type_id for a in session.world.get_actors()] == ["spectator"]
    victim.stop()


def test_the_others_take_over_from_a_simulator_that_does_not_come_back(shared_simulator):
    victim = Simulator()

    def decide(_: np.ndarray) -> VehicleCommand:
        victim.process.kill()
        return keep(_)

    episodes = drive_episodes(config(victim, shared_simulator, timeout=1.0, patience=0.0), lambda: decide)
    assert len(episodes) == 6
    assert {e["simulator"] for e in episodes} == {f"127.0.0.1:{shared_simulator.port}"}
    victim.stop()
    with pytest.raises(UserError, match="No simulator answers"):
        drive_episodes(config(victim, timeout=0.3), lambda: keep)


@pytest.mark.parametrize("text", ["2000", "localhost:", ":2000", "host:http"])
def test_an_address_must_be_host_and_port(text):
    with pytest.raises(UserError, match="must be given as host:port"):
        drive_episodes(RolloutConfig((text,)), lambda: keep)


def test_the_command_writes_each_episode_and_whose_they_are(shared_simulator, other, tmp_path, capsys):
    file, out = tmp_path / "rollout.yaml", tmp_path / "results.json"
    file.write_text(
        f"simulators: [127.0.0.1:{shared_simulator.port}, 127.0.0.1:{other.port}]\n"
        "episodes: 3\nepisode_seconds: 2.0\nspawn_points: [3, 4]\n"
    )
    assert main(["rollout", str(file), "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["simulator"] == "the embedded highway"
    assert len(results["episodes"]) == 3
    assert "3 episodes on the embedded highway" in capsys.readouterr().out
    assert main(["rollout", str(file), "--out", str(out), "--driver", "planner"]) == 0
    results = json.loads(out.read_text())
    assert results["policy"] == "the scripted driver"
    assert results["mean"]["clean"] == 1.0
    file.write_text("simulators: []\n")
    assert main(["rollout", str(file), "--out", str(out)]) == 2
    assert "'simulators' must not be an empty list" in capsys.readouterr().err
