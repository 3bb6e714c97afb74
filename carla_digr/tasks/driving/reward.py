"""The reward of the driving task.

Reward of one decision: progress minus what makes a crash likely, all scaled so that a clean second is worth about 0.1,
and -1 for the end by a crash or by leaving the lanes. The risk terms need the state of the traffic, so they exist only
in process; over CARLA's protocol the reward is progress, what the action itself costs, and the terminal -1.
"""

from __future__ import annotations

from numba import njit

from carla_digr.driving.control import CRUISE_SPEED, MAX_WHEEL_ANGLE, WHEEL_ANGLE, VehicleCommand
from carla_digr.simulator.road import LANE_WIDTH, MEDIAN_HALF_WIDTH, ROAD_EDGE
from carla_digr.simulator.traffic import ONCOMING
from carla_digr.tasks.driving.settings import DrivingConfig

CLOSING_HORIZON = 4.0  # s to a collision below which the reward sinks


@njit(cache=True, nogil=True)
def hazards(vehicles, ego, ring):
    """How near a crash is, from the vehicle table (N,) of traffic.VEHICLE; ``ego`` is the ego's row.

    Returns:
        (closing, alongside), both in [0, 1]: how far the ego is inside CLOSING_HORIZON of the time to a collision with
        a vehicle ahead, weighted by how much the two overlap across the road, and the largest such overlap with a
        vehicle alongside. The overlap falls from 1 to 0 over the last metre of clearance.
    """
    me = vehicles[ego]
    closing = 0.0
    alongside = 0.0
    for i in range(vehicles.shape[0]):
        v = vehicles[i]
        if i == ego or v.driver == ONCOMING:
            continue
        ahead = (v.s - me.s + 0.5 * ring) % ring - 0.5 * ring
        if abs(ahead) > 150.0:
            continue
        clearance = abs(v.d - me.d) - 0.5 * (v.width + me.width)
        overlap = min(max(1.0 - clearance, 0.0), 1.0)
        gap = abs(ahead) - 0.5 * (v.length + me.length)
        if gap <= 0.0:
            alongside = max(alongside, overlap)
        elif ahead > 0.0 and me.speed > v.speed:
            time = gap / (me.speed - v.speed)
            closing = max(closing, overlap * max(0.0, 1.0 - time / CLOSING_HORIZON))
    return closing, alongside


def reward(
    config: DrivingConfig, seconds: float, speed: float, d: float, drift: float, closing: float, alongside: float
) -> float:
    """Reward of ``seconds`` of driving without an end, from the state at their end.

    ``speed`` in m/s, ``d`` across the road in m, ``drift`` the change of ``d`` in m/s.
    """
    offset = (d - MEDIAN_HALF_WIDTH) % LANE_WIDTH - 0.5 * LANE_WIDTH
    foreseen = d + drift * config.edge_horizon
    to_edge = min(min(d, foreseen) - MEDIAN_HALF_WIDTH, ROAD_EDGE - max(d, foreseen))
    edge = min(max((1.4 - to_edge) / 1.4, 0.0), 1.0)
    value = config.progress_reward * speed / CRUISE_SPEED - config.closing_penalty * closing
    value -= config.alongside_penalty * alongside + config.edge_penalty * edge + config.offset_penalty * offset**2
    return value * seconds / 0.1


def less_effort(config: DrivingConfig, value: float, seconds: float, wanted: VehicleCommand, changed: bool) -> float:
    """A reward less the prices of steering and of changing one's mind.

    ``wanted`` was held for ``seconds``; ``changed``: whether the decision before was another one.
    """
    effort = (wanted.steer * MAX_WHEEL_ANGLE / WHEEL_ANGLE) ** 2
    return value - config.steering_penalty * effort * seconds / 0.1 - config.change_penalty * changed
