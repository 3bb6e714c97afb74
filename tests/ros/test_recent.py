"""Rate and latency of recent events, which nodes report while other threads add some, and what is told seldom."""

from __future__ import annotations

import sys
import threading
import time

import live_support
import pytest

live_support.workspace()

from carla_digr_ros.diagnostics import Recent, Seldom  # noqa: E402


def test_figures_can_be_asked_for_while_another_thread_adds_events():
    recent, end = Recent(seconds=0.02), threading.Event()

    def add() -> None:
        while not end.is_set():
            recent.add(3.0)

    thread, interval = threading.Thread(target=add), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(100):
            assert recent.rate() >= 0.0
            assert recent.latency(50) == pytest.approx(3.0, nan_ok=True) or not recent.rate()
    finally:
        end.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_what_is_told_seldom_costs_nothing_when_it_is_not_told():
    told = Seldom(3600.0)
    assert told()
    begun = time.process_time()
    assert not any(told() for _ in range(1000))
    assert time.process_time() - begun < 0.1  # rclpy's own throttle takes half a second for it
    assert Seldom(0.0)() and Seldom()()
