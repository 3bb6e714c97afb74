"""An episode of driving: when it ends, when it is cut, and its figures; the same in process and over a protocol."""

from __future__ import annotations

from typing import Any

from carla_digr.driving.control import TICK


class RunningEpisode:
    """Counts the ticks of one episode.

    It ends when the ego touches anything or its centre leaves the driving lanes, and is cut after its time, where the
    stretch of road ends that can be driven, or when somebody drives into the ego.

    Args:
        seconds: after which it is cut.

    Attributes:
        ticks: of ``control.TICK`` seconds, so far.
        distance: driven, m.
        collision, off_road, road_ends, struck: of the last tick, as in ``control.DriveFrame``.
    """

    def __init__(self, seconds: float):
        self.limit = seconds
        self.ticks = 0
        self.distance = 0.0
        self.collision: str | None = None
        self.off_road = False
        self.road_ends = False
        self.struck = False

    def count(
        self, speed: float, collision: str | None, off_road: bool, road_ends: bool = False, struck: bool = False
    ) -> None:
        """One more tick: the speed (m/s) at its end, and what happened in it."""
        self.ticks += 1
        self.distance += speed * TICK
        self.collision, self.off_road, self.road_ends, self.struck = collision, bool(off_road), road_ends, struck

    @property
    def seconds(self) -> float:
        """Driven so far."""
        return self.ticks * TICK

    @property
    def terminated(self) -> bool:
        """It ended in an incident."""
        return (self.collision is not None and not self.struck) or self.off_road

    @property
    def truncated(self) -> bool:
        """Its time is over, or its road, or somebody drove into the ego, and there was no incident of its own."""
        return not self.terminated and (self.struck or self.road_ends or self.seconds >= self.limit - 1e-9)

    @property
    def over(self) -> bool:
        """It ended or was cut."""
        return self.terminated or self.truncated

    def figures(self) -> dict[str, Any]:
        """clean, collision (what was hit, or None), struck (that drove into the ego: clean all the same), off_road,
        seconds, driven (of its time), distance, mean_speed."""
        return {
            "clean": not self.terminated,
            "collision": self.collision,
            "struck": self.struck,
            "off_road": self.off_road,
            "seconds": self.seconds,
            "driven": self.seconds / self.limit,
            "distance": self.distance,
            "mean_speed": self.distance / max(self.seconds, TICK),
        }
