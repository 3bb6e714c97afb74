"""The events of a dynamic vision sensor: where, when and to which side the brightness has crossed a threshold.

As CARLA's documentation of its DVS camera has it: between two frames the brightness of a pixel changes evenly, and
each time it is a threshold away from where it was at the pixel's last event there is a new one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from carla_digr.simulator.shading import compiled

EVENT = np.dtype([("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("pol", "?")])
"""Column and row, nanosecond of the simulated time, and whether it got brighter."""
LUMA = (0.114, 0.587, 0.2989)  # of blue, green and red
LEAST_THRESHOLD = 0.01
LEAST_CHANGE = 1e-6  # of the brightness; smaller ones are rounding
MOST_EVENTS = 2**20  # of a frame; the rest is lost


class Contrast(NamedTuple):
    """Settings; names and defaults are those of CARLA's blueprint."""

    positive_threshold: float = 0.3
    negative_threshold: float = 0.3
    sigma_positive_threshold: float = 0.0
    sigma_negative_threshold: float = 0.0
    refractory_period_ns: int = 0
    use_log: bool = True
    log_eps: float = 0.001


class EventCamera:
    """What one camera remembers from frame to frame.

    Args:
        contrast: its settings.
        seed: of the noise of the thresholds.
    """

    def __init__(self, contrast: Contrast, seed: int):
        self._contrast = contrast
        self._draw = np.random.default_rng(seed)
        self._level = self._reference = np.empty(0)
        self._last = np.empty(0, np.int64)
        self._now = 0

    def __call__(self, bgra: NDArray[np.uint8], stamp: float) -> NDArray[np.void]:
        """The events since the last picture, (N,) of EVENT in the order of their time; none at the first picture.

        Args:
            bgra: (H, W, 4) uint8, the present picture.
            stamp: its simulated second.
        """
        grey = bgra[..., :3].reshape(-1, 3) @ np.array(LUMA)
        level = np.log(self._contrast.log_eps + grey / 255.0) if self._contrast.use_log else grey
        before, begun, self._level, self._now = self._level, self._now, level, round(stamp * 1e9)
        if len(before) != len(level):
            self._reference, self._last = level.copy(), np.full(len(level), -(2**62))
            return np.empty(0, EVENT)
        change = level - before
        found = []
        for sign in (1, -1):
            pixels = np.flatnonzero(sign * change > LEAST_CHANGE)
            threshold = self._thresholds(sign, len(pixels))
            steps = np.floor(sign * (level - self._reference)[pixels] / threshold + 1e-9).clip(0).astype(np.int64)
            steps = np.where(np.cumsum(steps) <= MOST_EVENTS // 2, steps, 0)
            crossed = np.repeat(np.arange(len(pixels)), steps)
            number = np.arange(len(crossed)) - np.repeat(np.cumsum(steps) - steps, steps) + 1
            where = pixels[crossed]
            at = self._reference[where] + sign * number * threshold[crossed]
            share = np.clip((at - before[where]) / change[where], 0.0, 1.0)
            events = np.empty(len(where), EVENT)
            events["y"], events["x"] = np.divmod(where, bgra.shape[1])
            events["t"], events["pol"] = begun + (share * (self._now - begun)).astype(np.int64), sign > 0
            kept = np.ones(len(where), np.bool_)
            _rest(where, events["t"].copy(), self._last, self._contrast.refractory_period_ns, kept)
            found.append(events[kept])
            self._reference[pixels] += sign * steps * threshold
        both = np.concatenate(found)
        return both[np.argsort(both["t"], kind="stable")]

    def _thresholds(self, sign: int, count: int) -> NDArray[np.float64]:
        c = self._contrast
        mean, sigma = (
            (c.positive_threshold, c.sigma_positive_threshold)
            if sign > 0
            else (c.negative_threshold, c.sigma_negative_threshold)
        )
        noise = self._draw.normal(0.0, sigma, count) if sigma else np.zeros(count)
        return np.maximum(mean + noise, LEAST_THRESHOLD)


@compiled
def _rest(pixels, times, last, period, kept):
    """Drop the events of pixels that rest: those within a period (ns) of the one before."""
    for k in range(pixels.shape[0]):
        if times[k] - last[pixels[k]] < period:
            kept[k] = False
        else:
            last[pixels[k]] = times[k]
