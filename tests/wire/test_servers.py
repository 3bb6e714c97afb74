"""The driving task on simulators: the same task as in process, servers that hang or die, what labels tell."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
from simulator_process import Simulator

from carla_digr.driving.memory import resident
from carla_digr.driving.session import Session
from carla_digr.errors import UserError
from carla_digr.files import sha256_of
from carla_digr.tasks import parse_config
from carla_digr.tasks.driving import Driving, DrivingConfig
from carla_digr.tasks.driving.classes import CLASSES
from carla_digr.tasks.driving.servers import Pace
from carla_digr.training.distill import distill
from carla_digr.training.saliency_dataset import make_dataset
from carla_digr.training.teacher import train_teacher

NO_RISK = {f"{name}_penalty": 0.0 for name in ("closing", "alongside", "edge", "offset")}
TINY = {
    "task": "driving",
    "seed": 4,
    "policy": {"convolutions": [[8, 8, 4], [8, 4, 2]], "features": 16},
    "environment": {"vehicles": 40, "episode_seconds": 4.0, **NO_RISK},
    "teacher": {
        "total_steps": 192,
        "environments": 2,
        "rollout_steps": 48,
        "epochs": 1,
        "minibatch_size": 32,
        "checkpoint_interval": 96,
    },
    "saliency_dataset": {"maps": 8, "shard_size": 8, "stride": 32, "state_interval": 3, "environments": 2},
    "distill": {
        "supervision": "both",
        "iterations": 4,
        "environments": 2,
        "environment_steps": 2,
        "buffer_states": 100,
        "buffer_batch": 4,
        "saliency_batch": 4,
        "validation_interval": 2,
        "checkpoint_interval": 2,
    },
}


def address(simulator: Simulator) -> str:
    return f"127.0.0.1:{simulator.port}"


@pytest.fixture(scope="module")
def other():
    started = Simulator()
    yield started
    started.stop()


@pytest.fixture
def both(shared_simulator, other):
    return address(shared_simulator), address(other)


def assert_left_alone(*simulators: Simulator) -> None:
    for simulator in simulators:
        with Session.connect("127.0.0.1", simulator.port) as session:
            assert not session.found_synchronous
            session.tick()
            assert [actor.type_id for actor in session.world.get_actors()] == ["spectator"]


def test_rewards_figures_pictures_classes_and_saved_states_are_those_in_process(both, long):
    """CARLA has one label for barrier and guard rail, and float32 for places: who is level with the ego's ends by less
    than a millimetre is alongside on the one route and not yet on the other."""
    config = DrivingConfig(episode_seconds=50.0 if long else 3.0, edge_horizon=1.0, steering_penalty=0.001)
    episodes, wanted = 0, 100 if long else 3
    here, there = (Driving(c).make_vec_env(2, 3) for c in (config, replace(config, simulators=both)))
    there.watch_labels(25)
    worst, level, rng, step = 0.0, 0, np.random.default_rng(5), 0
    try:
        assert (here.reset() == there.reset()).all()
        while episodes < wanted:
            if step % 4 == 0:
                actions = rng.choice([0, 1, 1, 1, 1, 1, 2, 3], 2)
            step += 1
            pictures, rewards, dones, infos = here.step(actions)
            seen, values, *over, told = there.step(actions)
            assert (pictures == seen).all() and (dones == over[0]).all()
            level += int((np.abs(rewards - values) > 1e-4).sum())
            worst = max(worst, *(d for d in np.abs(rewards - values) if d <= 1e-4))
            for one, two in zip(infos, told, strict=True):
                assert one.keys() == two.keys()
                if "metrics" in one:
                    episodes += 1
                    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
            if step % 25 == 0:
                classes = np.where(
                    here.classes() == CLASSES.index("barrier"), CLASSES.index("guard rail"), here.classes()
                )
                np.testing.assert_array_equal(there.classes(), classes)
    finally:
        here.close()
        there.close()
    print(f"{episodes} episodes, {step} decisions: largest difference {worst:.1e}, {level} level with the ego's ends")
    assert level <= step // 5000


def test_training_over_the_protocol_gives_the_same_bytes_as_in_process(both, shared_simulator, other, tmp_path, long):
    """Without the terms that float32 rounds; and so do the dataset and the student of the same teacher."""
    there = {**TINY, "environment": {**TINY["environment"], "simulators": list(both)}}
    results = {}
    for name, values in (("here", TINY), ("there", there)):
        config, out = parse_config(values, name), tmp_path / name
        train_teacher(config, out)
        files = ["teacher.safetensors"]
        if long:
            make_dataset(config, out, out / "teacher.safetensors")
            distill(config, out, out / "teacher.safetensors")
            files += ["dataset/states.safetensors", "student.safetensors"]
        results[name] = [sha256_of(out / file) for file in files]
    assert results["here"] == results["there"]
    assert_left_alone(shared_simulator, other)


@pytest.mark.parametrize("how", [pytest.param("hangs", marks=pytest.mark.long), "dies"])
def test_a_lost_server_costs_its_episode_and_the_others_go_on(shared_simulator, how, caplog):
    """The step says that it was cut; the episode begins anew when the server is back."""
    victim = Simulator()
    port, victims = victim.port, [victim]
    config = DrivingConfig(vehicles=20, simulators=(address(shared_simulator), address(victim)), timeout=3.0)
    env = Driving(config).make_vec_env(2, 8)
    try:
        first = env.reset()
        keep = np.array([1, 1])
        for _ in range(3):
            env.step(keep)
        assert env.present.all()
        assert env._paces[0]._held == pytest.approx(shared_simulator.memory(), rel=0.3)
        if how == "hangs":
            victim.process.send_signal(signal.SIGSTOP)
            threading.Timer(9.0, victim.process.send_signal, [signal.SIGCONT]).start()
        else:
            victim.stop()
            threading.Timer(1.0, lambda: victims.append(Simulator(port))).start()
        _, _, dones, infos = env.step(keep)
        assert dones.tolist() == [False, True] and infos[1]["TimeLimit.truncated"]
        assert "metrics" not in infos[1] and "is_success" not in infos[1]
        assert env.present.tolist() == env.shown.tolist() == [True, False] and env.driving == 1
        driven = 0
        while not env.present[1]:
            _, rewards, dones, _ = env.step(keep)
            driven += 1
            assert env.present[0] and not dones[1]
            assert env.present[1] or rewards[1] == 0.0
        assert driven > 3 and env.driving == 2
        assert "Its episode is cut" in caplog.text and "drives again" in caplog.text
        expected = first[1]  # the episode that was cut, again
        env.set_state({**env.get_state(), "1.actions": np.zeros(0, np.int64)})
        assert (env.observe()[1] == expected).all()
    finally:
        env.close()
    assert_left_alone(shared_simulator, victims[-1])
    victims[-1].stop()


def test_a_server_of_this_machine_is_watched_for_its_memory(shared_simulator, caplog):
    here, port = resident("127.0.0.1", shared_simulator.port), shared_simulator.port
    assert here == pytest.approx(shared_simulator.memory(), rel=0.1)
    assert resident("192.0.2.77", port) is None and resident("127.0.0.1", 1) is None
    pace = Pace("gpu1:2000")
    for held in (3 << 30, None, 5 << 30, 6 << 30, 7 << 30):
        pace.holds(held)
    assert caplog.messages == [
        "gpu1:2000 holds 6.0 GiB of memory, at first it held 3.0; start it again when it suits, the job goes on "
        "meanwhile and with it afterwards."
    ]


GROWS = """
    import itertools, time
    from carla_digr.simulator import server
    ordinary, frames, held = server.advance, itertools.count(), []

    def advance(episode, wanted):
        if next(frames) == 100:
            held.append(b"1" * (600 << 20))
        time.sleep(0.04 if held else 0.0)
        yield from ordinary(episode, wanted)

    server.advance = advance
"""


def test_a_server_that_grows_and_becomes_slow_is_named_while_it_drives_on(monkeypatch, caplog):
    monkeypatch.setattr("carla_digr.tasks.driving.servers.PACED", 20)
    server = Simulator(altered=GROWS)
    env = Driving(DrivingConfig(vehicles=10, simulators=(address(server),))).make_vec_env(1, 8, evaluation=False)
    try:
        env.reset()
        for _ in range(100):
            env.step(np.array([1]))
        assert env.driving == 1
    finally:
        env.close()
    grown, slow = sorted(caplog.messages, key=lambda message: " takes " in message)
    assert grown.startswith(f"{address(server)} holds 0.") and " GiB of memory, at first it held 0." in grown
    assert slow.startswith(f"{address(server)} takes ") and " ms a decision, at first it took " in slow
    assert_left_alone(server)
    server.stop()


@pytest.mark.long
def test_processes_are_begun_anew_after_many_episodes(shared_simulator, monkeypatch):
    monkeypatch.setattr("carla_digr.tasks.driving.servers.RENEWED", 2)
    config = DrivingConfig(vehicles=10, episode_seconds=1.0)
    servers = (address(shared_simulator),)
    here, there = (Driving(c).make_vec_env(1, 8) for c in (config, replace(config, simulators=servers)))
    try:
        assert (here.reset() == there.reset()).all()
        processes = set()
        for _ in range(100):
            processes.add(there._processes[0])
            one, two = here.step(np.array([1])), there.step(np.array([1]))
            assert (one[0] == two[0]).all() and one[2] == two[2]
        assert len(processes) == 3 and there.driving == 1
    finally:
        here.close()
        there.close()
    assert_left_alone(shared_simulator)


@pytest.mark.long
def test_a_tick_that_never_returns_costs_seconds():
    """A server that takes the call and answers nothing more, to this client alone."""
    with_deadlock = Simulator(options=["--traits", "deadlock=60"])
    config = DrivingConfig(vehicles=10, simulators=(address(with_deadlock),), timeout=1.0)
    env = Driving(config).make_vec_env(1, 8)
    try:
        env.reset()
        cut = 0
        for _ in range(80):
            cut += int(env.step(np.array([1]))[2][0])
        assert cut >= 1 and env.driving == 1
    finally:
        env.close()
    with_deadlock.stop()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"simulators": ("127.0.0.1:1",)}, "No simulator answers on 127.0.0.1:1"),
        ({"simulators": ("here",)}, "must be given as host:port, not 'here'"),
        ({"simulators": ("here:1", "here:1")}, "names here:1 twice"),
        ({"simulators": ("here:1",), "random_scenery": 0.5}, "random_scenery must be 0"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Driving(DrivingConfig(timeout=0.3, **changes)).make_vec_env(1, 0)


def test_more_environments_than_simulators_are_refused():
    with pytest.raises(UserError, match=r"asks for 3 environments, but environment\.simulators names 1"):
        Driving(DrivingConfig(simulators=("here:1",))).make_vec_env(3, 0)
