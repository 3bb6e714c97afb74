"""`carla-digr live`: whatever happens, one sentence, a telling exit status, and no process left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import live_support
import pytest

from carla_digr.errors import UserError
from carla_digr.live import supervisor
from carla_digr.live.composition import Process


class Live:
    """`carla-digr live` in its own process; all it starts carries a mark in the environment."""

    def __init__(self, weights: Path, *arguments: str, port: int | None = None):
        self.mark = uuid.uuid4().hex
        self.port, self.page = port or live_support.free_port(), live_support.free_port()
        self.temporary = tempfile.TemporaryDirectory()
        environment = {**os.environ, "CARLA_DIGR_TEST": self.mark, "TMPDIR": self.temporary.name}
        for name in ("AMENT_PREFIX_PATH", "ROS_DOMAIN_ID"):  # as in a fresh terminal
            environment.pop(name, None)
        command = [sys.executable, "-m", "carla_digr.cli", "live", "--weights", str(weights)]
        command += ["--port", str(self.port), "--viewer-port", str(self.page), *arguments]
        self.popen = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.popen.stdout.readline, "")))
        self._reader.start()
        self.errors = ""

    def until_driving(self, processes: int = 5):
        """Until the page answers and the explainer and the bridge are at work."""
        live_support.until(lambda: self.popen.poll() is not None or any("page is at" in line for line in self.lines))
        live_support.until(lambda: self.popen.poll() is not None or len(self.processes()) >= processes)
        assert self.popen.poll() is None, self.popen.stderr.read()

    def until_frames(self):
        """Until the page has had some more frames, none of them from before."""

        def latest() -> int:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.page}/api/status") as page,
            ):
                return (json.load(page)["latest"] or {"frame": -1})["frame"]
            return -1

        live_support.until(lambda: self.popen.poll() is None)
        before = latest()
        live_support.until(lambda: latest() not in range(before - 1, before + 10) and latest() >= 0)

    def wait(self) -> int:
        """Its exit status, once it has ended and closed its output."""
        self.popen.wait(live_support.LIMIT)
        self._reader.join(live_support.LIMIT)
        self.errors = self.popen.stderr.read()
        return self.popen.returncode

    def processes(self) -> dict[int, str]:
        """All living processes with the mark: pid -> command line."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (directory / "environ").read_bytes():
                    found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def pid(self, part: str, default: int | None = None) -> int | None:
        """Of the process of a node, the newest if there are two; ``default`` if there is none."""
        found = [pid for pid, command in self.processes().items() if f"/{part} " in command and pid != default]
        return max(found, default=default)

    def leaves_nothing(self) -> bool:
        live_support.until(lambda: not self.processes())
        assert not [*Path(self.temporary.name).rglob("*")]
        # A process that is being taken apart has no environment any more, but its sockets for a moment.
        live_support.until(lambda: free(self.port) and free(self.page))
        return True


def free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture
def live(weights):
    started = []

    def start(*arguments: str, weights: Path = weights, port: int | None = None) -> Live:
        started.append(Live(weights, *arguments, port=port))
        return started[-1]

    yield start
    for drive in started:
        for pid in drive.processes():
            os.kill(pid, signal.SIGKILL)
        drive.popen.wait(live_support.LIMIT)
        drive.temporary.cleanup()


def pytest_generate_tests(metafunc):
    if "moment" in metafunc.fixturenames:
        metafunc.parametrize("moment", range(50 if metafunc.config.getoption("long") else 5))


def test_ctrl_c_at_any_moment_leaves_nothing(live, moment):
    drive = live()
    if moment % 5 == 4:
        drive.until_driving()
    # The moment is what is tested. In the first tenths of a second Python itself starts, and may swallow a SIGINT.
    time.sleep(random.Random(moment).uniform(0.3, 4.0))
    os.killpg(drive.popen.pid, signal.SIGINT)
    # Before the command's own handler is set up, Python's or the system's answers.
    status = drive.wait()
    assert status in ((0,) if moment % 5 == 4 else (0, 1, 130, -signal.SIGINT))
    assert drive.leaves_nothing()
    if "Traceback" in drive.errors:
        assert status in (1, -signal.SIGINT) and drive.errors.rstrip().endswith("KeyboardInterrupt")


def test_killing_the_supervisor_ends_everything(live):
    drive = live()
    drive.until_driving()
    drive.popen.kill()
    drive.wait()
    assert drive.leaves_nothing()


def test_a_drive_outlives_its_onlookers_and_the_death_of_the_explainer_ends_it_with_its_reason(live, tmp_path):
    drive = live("--record", str(tmp_path / "bags"))
    drive.until_driving(processes=6)
    drive.until_frames()
    for name in ("viewer", "recorder"):
        first = drive.pid(name)
        os.kill(first, signal.SIGKILL)
        live_support.until(lambda name=name, first=first: {first} != {drive.pid(name, first)})
    drive.until_frames()  # on the page of the new viewer
    live_support.until(lambda: len([*(tmp_path / "bags").iterdir()]) == 2)
    os.kill(drive.pid("explainer"), signal.SIGKILL)
    assert drive.wait() == 2
    for name in ("viewer", "recorder"):
        assert f"{name} was killed by SIGKILL; starting it again (2 more" in drive.errors
    assert "The process explainer was killed by SIGKILL" in drive.errors
    assert drive.leaves_nothing()


def test_a_node_that_was_shut_down_ends_the_drive_well(capfd):
    page = live_support.free_port()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", page), 1.0).close()
            return True
        return False

    def shut_down(pid: int) -> None:
        live_support.until(answers)
        os.kill(pid, signal.SIGTERM)  # it ends with status 0, as after the transition

    watched = supervisor.Supervisor(live_support.workspace(), supervisor.Stop())
    try:
        watched.start(Process("viewer", parameters={"port": page}))
        threading.Thread(target=shut_down, args=tuple(watched.pids().values())).start()
        assert watched.watch() is None
    finally:
        watched.end()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    assert "viewer has been shut down, so everything ends" in capfd.readouterr().err


def test_a_bridge_that_the_carla_client_aborts_is_started_again_and_drives_on(live, start):
    """A Traffic Manager's thread aborts its process when its server has died; here at once, there some time later."""
    port = live_support.free_port()
    server = start(live_support.simulator(port))
    drive = live("--simulator", "carla", port=port)
    drive.until_driving(processes=4)
    drive.until_frames()
    first = drive.pid("carla_bridge")
    server.end(signal.SIGKILL)
    os.kill(first, signal.SIGABRT)
    live_support.until(lambda: first not in drive.processes())
    server = start(live_support.simulator(port))
    drive.until_frames()
    assert drive.pid("carla_bridge") != first
    drive.popen.send_signal(signal.SIGINT)
    assert drive.wait() == 0
    assert "carla_bridge was killed by SIGABRT" in drive.errors and "starting it again" in drive.errors
    assert server.end() == 0  # and its ports are free
    assert drive.leaves_nothing()


ENDLESS = """
import sys

if any("/carla_bridge" in word for word in sys.orig_argv):
    import itertools, pathlib, threading
    from carla_digr.driving.scenario import Scenario
    from carla_digr_ros import carla_bridge

    carla_bridge.ENDLESS_SECONDS = 5.0
    step, steps, once = Scenario.step, itertools.count(), pathlib.Path(__file__).with_name("once")

    def step_or_wait(drive, command):
        if next(steps) == 60 and not once.exists():
            once.touch()
            threading.Event().wait()
        return step(drive, command)

    Scenario.step = step_or_wait
"""


def test_a_bridge_in_a_call_that_never_ends_is_started_again_and_drives_on(live, tmp_path, monkeypatch):
    """As where the client's Traffic Manager has lost a wake-up."""
    (tmp_path / "sitecustomize.py").write_text(ENDLESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    drive = live()
    drive.until_driving()
    first = drive.pid("carla_bridge")
    live_support.until(lambda: first not in drive.processes())
    drive.until_frames()
    assert drive.pid("carla_bridge") != first
    drive.popen.send_signal(signal.SIGINT)
    assert drive.wait() == 0
    assert "The carla client never ends a call" in drive.errors
    assert "carla_bridge was killed by SIGABRT" in drive.errors and "starting it again" in drive.errors
    assert drive.leaves_nothing()


def test_a_missing_package_of_a_node_is_one_sentence(live, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", live_support.without("rosbags", tmp_path)["PYTHONPATH"])
    drive = live("--viewer", "false", "--record", str(tmp_path / "bags"))
    assert drive.wait() == 2
    assert drive.errors == "carla-digr: This needs the package rosbags: pip install 'carla_digr[recording]'.\n"
    assert drive.leaves_nothing()


def test_a_process_that_dies_again_and_again_ends_the_drive(tmp_path, capfd):
    (tmp_path / "dies.py").write_text("import os; os.kill(os.getpid(), 6)")
    watched = supervisor.Supervisor({**os.environ, "PYTHONPATH": str(tmp_path)}, supervisor.Stop())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        watched.start(Process("dies", module="dies", respawns=2))
        with pytest.raises(UserError, match="The process dies was killed by SIGABRT"):
            watched.watch()
    finally:
        watched.end()
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    assert capfd.readouterr().err.count("starting it again") == 2


def test_a_drive_goes_on_without_an_onlooker_that_dies_again_and_again(tmp_path, monkeypatch, capfd):
    (tmp_path / "dies.py").write_text("import os; open('deaths', 'a').write('x'); os.kill(os.getpid(), 6)")
    (tmp_path / "lives.py").write_text("import os, time\nwhile os.path.getsize('deaths') < 3: time.sleep(0.01)")
    (tmp_path / "deaths").touch()
    monkeypatch.chdir(tmp_path)
    watched = supervisor.Supervisor({**os.environ, "PYTHONPATH": str(tmp_path)}, supervisor.Stop())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    dies = Process("dies", module="dies", respawns=2, onlooker=True)
    try:
        watched.start(dies)
        watched.start(Process("lives", module="lives", finite=True))
        assert watched.watch().name == "lives"
    finally:
        watched.end()
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    assert capfd.readouterr().err.count("starting it again") == 2
    assert dies.ends_everything(2) and not dies.again().ends_everything(2)  # bad input is told at once


@pytest.mark.alone
def test_a_measured_drive_writes_its_figures_and_says_whether_they_held(live, tmp_path):
    report = tmp_path / "figures.json"
    drive = live("--duration", "3", "--headless", "--json", str(report))
    status = drive.wait()
    figures = json.loads(report.read_text())
    assert status == (0 if figures["held"] else 1), drive.errors
    assert figures["held"] == all(row["held"] for row in figures["criteria"])
    assert {row["figure"] for row in figures["criteria"]} >= {"frames", "rate_hz", "frame_to_overlay_ms.p99"}
    measured = figures["figures"]
    assert measured["frames"] == 60
    assert measured["frames_without_decision"] == measured["frames_without_overlay"] == 0
    assert measured["stamps_without_picture"] == measured["frames_lost"] == 0
    assert measured["frames_without_objects"] < 60
    assert measured["frames_read_from_page"] > 0
    assert 0 < measured["frame_to_decision_ms"]["p50"] < measured["frame_to_overlay_ms"]["p50"]
    assert measured["distance_m"] > 10
    assert set(figures["processes"]) == {"simulator", "carla_bridge", "explainer", "viewer"}
    assert all(process["cpu_s"] > 0 for process in figures["processes"].values())
    granted = subprocess.run(["chrt", "--rr", "1", "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0
    first = {name for name, process in figures["processes"].items() if process["realtime"]}
    assert first == ({"simulator", "carla_bridge", "explainer"} if granted else set())
    assert all(process["end_mb"] > 10 for process in figures["memory"].values())
    assert drive.leaves_nothing()


def missing(weights: Path, directory: Path) -> tuple[Path, str]:
    return directory / "none.safetensors", "Cannot read the policy weights"


def truncated(weights: Path, directory: Path) -> tuple[Path, str]:
    path = directory / "short.safetensors"
    path.write_bytes(weights.read_bytes()[:1000])
    shutil.copy(weights.with_suffix(".json"), path.with_suffix(".json"))
    return path, "is damaged"


@pytest.mark.parametrize("damage", [missing, truncated])
def test_bad_weights_end_in_one_sentence(live, weights, tmp_path, damage):
    path, sentence = damage(weights, tmp_path)
    drive = live(weights=path)
    assert drive.wait() == 2
    assert_one_sentence(drive.errors, sentence)
    assert drive.leaves_nothing()


@pytest.mark.parametrize("option", ["--port", "--viewer-port"])
def test_a_port_in_use_ends_in_one_sentence(live, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        drive = live(option, str(port))
        assert drive.wait() == 2
        assert_one_sentence(drive.errors, f"ort {port}", "is in use")
        live_support.until(lambda: not drive.processes())


def test_an_absent_carla_server_ends_in_one_sentence(live):
    drive = live("--simulator", "carla")
    assert drive.wait() == 2
    assert_one_sentence(drive.errors, f"No simulator answers on 127.0.0.1:{drive.port}")
    assert drive.leaves_nothing()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "70000"], "port must be a whole number from 1 to 65534, not '70000'."),
        (["--seed", "x"], "seed must be a whole number"),
        (["--json", "x.json"], "need --duration"),
        (["--duration", "0"], "--duration must lie between 1 and 86400"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments, sentence):
    command = [sys.executable, "-m", "carla_digr.cli", "live", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=live_support.LIMIT)
    assert result.returncode == 2
    assert_one_sentence(result.stderr, sentence)


def assert_one_sentence(errors: str, *parts: str) -> None:
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("carla-digr: "), errors
    for part in parts:
        assert part in lines[0]


def test_a_workspace_that_is_not_built_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "SETUP", tmp_path / "setup.bash")
    monkeypatch.delenv("AMENT_PREFIX_PATH", raising=False)
    with pytest.raises(UserError, match="run `make setup` first"):
        supervisor.workspace_environment()


def test_two_drives_get_different_ros_domains_and_used_ones_are_left_out():
    with supervisor.free_domain() as first, supervisor.free_domain() as second:
        assert first != second
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
            with supervisor.free_domain() as third:
                participant.bind(("127.0.0.1", 7400 + 250 * third + 10))
            with supervisor.free_domain() as fourth:
                assert fourth not in (first, second, third)
