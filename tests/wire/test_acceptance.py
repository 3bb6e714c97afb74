"""`carla-digr check-simulator`: passes on the embedded highway with either traffic, and names what is wrong."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading

import pytest
from simulator_process import run_client

from carla_digr.cli import main
from carla_digr.driving.acceptance import CHECKS


def check(port: int, *options: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "carla_digr.cli", "check-simulator", "--port", str(port), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()


def test_the_embedded_highway_passes_and_is_not_called_carla(shared_simulator):
    code, lines = check(shared_simulator.port)
    assert [line.split(":")[0] for line in lines] == [f"pass  {check.what}" for check in CHECKS]
    assert code == 0
    assert "embedded highway, not CARLA" in lines[0]


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
    assert first.startswith("FAIL  server: expected CARLA 0.9.16 whose tick nobody owns; saw no simulator answers")
    assert "what to do: start CarlaUE4.sh" in first
    assert [line.split(":")[1] for line in others] == [" not tried"] * (len(CHECKS) - 1)


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
