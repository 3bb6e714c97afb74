"""When the messages of a recording are due: rate, pause, step. No ROS, and the clock is injected."""

from __future__ import annotations

import math
from collections.abc import Callable

LONGEST_GAP = 60.0  # s between two messages that is still kept to
GAP_SECONDS = 1.0  # that a longer one lasts


class Playback:
    """Maps a recording's time to the wall clock.

    Args:
        clock: s, monotonic.
        rate: seconds of the recording in a second.
        paused: begin with a pause.
    """

    def __init__(self, clock: Callable[[], float], rate: float, paused: bool):
        self._clock = clock
        self._rate = rate
        self.paused = paused
        self._steps = 0
        self._reached = 0  # ns of the recording up to which messages are out, or were let out by a step
        self._base = 0, clock()  # a time of the recording in ns, and when it was or would be due

    def begin(self, time: int) -> None:
        """The recording goes on from ``time`` (ns) now."""
        self._base = time, self._clock()
        self._reached = time - 1

    @property
    def position(self) -> int:
        """Where the replay is, ns of the recording."""
        if self.paused:
            return self._reached
        time, due = self._base
        return time + round((self._clock() - due) * self._rate * 1e9)

    @property
    def rate(self) -> float:
        """Seconds of the recording in a second."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._base = self.position, self._clock()
        self._rate = rate

    def pause(self, paused: bool) -> None:
        """Hold, or go on from where the replay is."""
        if paused and not self.paused:
            self._reached = self.position
        if self.paused and not paused:
            self._base = self._reached, self._clock()
        self.paused, self._steps = paused, 0

    def step(self) -> None:
        """Hold after the next frame; each further call lets one more pass."""
        if not self.paused:
            self.pause(True)
        self._steps += 1

    def delay(self, time: int, frame: bool) -> float:
        """Seconds until a message is due, not positive when it is; infinite while it is held.

        Args:
            time: of the message, ns; not before that of the message asked about before.
            frame: whether it is what a step waits for. What has the same time goes with it.
        """
        if not self.paused:
            start, due = self._base
            return due + (time - start) * 1e-9 / self._rate - self._clock()
        if time > self._reached:
            if not self._steps:
                return math.inf
            if frame:
                self._steps -= 1
                self._reached = time
        return 0.0
