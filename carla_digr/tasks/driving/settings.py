"""Settings of the driving task and of its evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from carla_digr.config import EvaluationConfig, setting


@dataclass(frozen=True)
class DrivingConfig:
    """The highway drive; see reward.py for what the reward's terms are."""

    vehicles: int = setting(64, minimum=0, maximum=160)  # on the ring's own carriageway: 7 within 150 m
    # host:port of CARLA servers or embedded simulators to drive on, one for each environment; none: in this process
    simulators: tuple[str, ...] | None = None
    kind: Literal["embedded", "carla"] = "embedded"  # whose traffic there: the embedded highway's, or CARLA's
    roads: tuple[int, ...] | None = None  # OpenDRIVE ids of the roads there on which episodes start; none: any highway
    spawn_points: tuple[int, ...] | None = None  # or indices of the map's spawn points at which they start
    timeout: float = setting(10.0, minimum=0.1)  # s for each call to a simulator
    patience: float = setting(60.0, minimum=0)  # s for which all simulators may be lost
    episode_seconds: float = setting(50.0, minimum=1)
    decision_ticks: int = setting(1, minimum=1, maximum=4)  # ticks of 0.05 s a decision lasts in evaluation and live
    training_decision_ticks: int = setting(2, minimum=1, maximum=4)  # the same for the teacher's training
    actions: Literal["wheels", "lane"] = "wheels"  # absolute wheel angles, or finer ones relative to the lane's curve
    random_scenery: float = setting(
        0.0, minimum=0, maximum=1
    )  # share of training episodes of another weather and scenery
    progress_reward: float = setting(0.01, minimum=0)  # per 0.1 s at 22 m/s
    closing_penalty: float = setting(0.03, minimum=0)  # times how far inside 4 s to a collision
    alongside_penalty: float = setting(0.03, minimum=0)  # times the lateral overlap with a vehicle alongside
    edge_penalty: float = setting(0.03, minimum=0)  # times the nearness to the edge of the lanes
    edge_horizon: float = setting(0.0, minimum=0)  # s ahead that the nearness to the edge is foreseen from the drift
    offset_penalty: float = setting(0.008, minimum=0)  # per square metre off the lane's centre
    steering_penalty: float = setting(0.0, minimum=0)  # per 0.1 s times (the action's wheel angle / the largest)^2
    change_penalty: float = setting(0.0, minimum=0)  # for another action than the decision before


@dataclass(frozen=True)
class DrivingEvaluation(EvaluationConfig):
    """What `evaluate` measures of driving besides."""

    attack_seconds: float = setting(20.0, minimum=1)  # length of an attacked episode
    drive_seconds: float = setting(600.0, minimum=1)  # the long drive, and in it the stretch that is shown
