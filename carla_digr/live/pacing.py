"""When the next tick of a paced drive is due."""

from __future__ import annotations

import math
import time

from carla_digr.driving.control import TICK

PERIOD = TICK  # s between ticks of wall time: simulation time at its natural speed


class Pacer:
    """Boundaries of a fixed grid of wall-clock time; nothing drifts, and periods that were missed are counted."""

    def __init__(self) -> None:
        self.missed = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new grid now."""
        self.next = time.monotonic() + PERIOD

    def advance(self) -> None:
        """The present boundary is used; aim at the next one that is not over yet."""
        behind = math.floor((time.monotonic() - self.next) / PERIOD)
        if behind > 0:
            self.missed += behind
            self.next += behind * PERIOD
        self.next += PERIOD
