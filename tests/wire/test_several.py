"""`carla-digr check-simulator` for several servers at once."""

from __future__ import annotations

import json

import pytest
from simulator_process import Simulator
from test_servers import address, assert_left_alone

from carla_digr.cli import main
from carla_digr.driving import several
from carla_digr.errors import UserError


@pytest.mark.long
def test_each_is_checked_then_what_they_have_in_common(shared_simulator, tmp_path, capfd):
    other, town = Simulator(), Simulator(options=["--traits", "town,limits"])
    report = tmp_path / "report.json"
    both = [address(shared_simulator), address(other)]
    assert main(["check-simulator", "--simulators", *both, "--out", str(report)]) == 0, capfd.readouterr().out
    said = capfd.readouterr().out
    assert [line for line in said.splitlines() if line.endswith(":")] == [f"{both[0]}:", f"{both[1]}:", "all 2:"]
    assert "pass  maps: " in said and "decisions a second in all" in said and "FAIL" not in said
    told = json.loads(report.read_text())
    assert list(told["servers"]) == both and all(line["passed"] for line in told["together"])
    assert main(["check-simulator", "--simulators", both[0], address(town)]) == 1
    assert "FAIL  maps: expected the same everywhere; saw RingHighway (" in capfd.readouterr().out
    assert_left_alone(shared_simulator, other, town)
    other.stop()
    town.stop()


def test_who_is_absent_is_told_and_the_rest_is_not_tried(tmp_path, capfd):
    report = tmp_path / "report.json"
    addresses = ["127.0.0.1:1", "127.0.0.1:3"]
    assert main(["check-simulator", "--simulators", *addresses, "--timeout", "0.3", "--out", str(report)]) == 1
    said = capfd.readouterr().out
    assert said.count("FAIL  server: ") == 2 and "saw none on 127.0.0.1:1, none on 127.0.0.1:3" in said
    assert "together" not in said
    assert not any(entry["passed"] for entry in json.loads(report.read_text())["servers"].values())


@pytest.mark.parametrize(
    "addresses, sentence",
    [(("here",), "must be given as host:port, not 'here'"), (("here:1", "here:1"), "here:1 is named twice")],
)
def test_addresses_that_cannot_be_are_told_in_one_sentence(addresses, sentence):
    with pytest.raises(UserError, match=sentence):
        several.check_simulators(addresses)


def test_a_configuration_names_them(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("task: driving\nenvironment: {simulators: ['here']}\n")
    assert main(["check-simulator", "--config", str(file)]) == 2
    assert "must be given as host:port, not 'here'" in capsys.readouterr().err
    file.write_text("task: driving\n")
    assert main(["check-simulator", "--config", str(file)]) == 2
    assert "names no environment.simulators" in capsys.readouterr().err
