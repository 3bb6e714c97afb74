"""How fast the embedded highway is on this machine; both goals are for one core."""

from __future__ import annotations

from pathlib import Path

from carla_digr.driving.benchmark import benchmark_simulator


def test_one_core_reaches_both_goals():
    assert benchmark_simulator(Path("runs/benchmark"))
