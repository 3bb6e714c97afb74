"""The reward of the driving task.

Reward of one decision: progress minus what makes a crash likely, all scaled so that a clean second is worth about 0.1,
less what the action itself costs, and -1 for the end by a crash or by leaving the lanes. The risk terms follow from
where the ego is in its lanes and who is around it, which the world tells in process and a client's own snapshot and map
over CARLA's protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import njit

from carla_digr.driving.control import CRUISE_SPEED, MAX_WHEEL_ANGLE, WHEEL_ANGLE, VehicleCommand
from carla_digr.simulator.road import LANE_WIDTH, MEDIAN_HALF_WIDTH, ROAD_EDGE
from carla_digr.simulator.traffic import ONCOMING
from carla_digr.tasks.driving.settings import DrivingConfig

if TYPE_CHECKING:
    from carla_digr.driving.situation import Situation

CLOSING_HORIZON = 4.0  # s to a collision below which the reward sinks
IN_SIGHT = 150.0  # m along the road


@njit(cache=True, nogil=True)
def hazard(ahead, across, lengths, widths, speed, other_speed):
    """How near a crash with one vehicle is, see `hazards`: (closing, alongside).

    ``ahead`` and ``across``: m from the ego's centre to the other's; ``lengths`` and ``widths``: the sums of both, m;
    speeds in m/s.
    """
    clearance = abs(across) - 0.5 * widths
    overlap = min(max(1.0 - clearance, 0.0), 1.0)
    gap = abs(ahead) - 0.5 * lengths
    if gap <= 0.0:
        return 0.0, overlap
    if ahead > 0.0 and speed > other_speed:
        time = gap / (speed - other_speed)
        return overlap * max(0.0, 1.0 - time / CLOSING_HORIZON), 0.0
    return 0.0, 0.0


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
        if abs(ahead) > IN_SIGHT:
            continue
        near = hazard(ahead, v.d - me.d, v.length + me.length, v.width + me.width, me.speed, v.speed)
        closing = max(closing, near[0])
        alongside = max(alongside, near[1])
    return closing, alongside


def hazards_seen(seen: Situation) -> tuple[float, float]:
    """`hazards` from what a client sees."""
    closing = alongside = 0.0
    for other in seen.others.values():
        if other.along and abs(other.ahead) <= IN_SIGHT:
            sizes = other.length + seen.length, other.width + seen.width
            near = hazard(other.ahead, other.across, *sizes, seen.speed, other.speed)
            closing, alongside = max(closing, near[0]), max(alongside, near[1])
    return closing, alongside


def reward_seen(config: DrivingConfig, seconds: float, speed: float, seen: Situation) -> float:
    """`reward` from what a client sees; ``speed`` in m/s."""
    lanes = seen.offset, seen.to_left, seen.to_right
    return reward(config, seconds, speed, lanes, seen.drift, *hazards_seen(seen))


def in_lanes(d: float) -> tuple[float, float, float]:
    """(offset, to_left, to_right) on the embedded highway, in m, of what is ``d`` m across its road; see Situation."""
    offset = (d - MEDIAN_HALF_WIDTH) % LANE_WIDTH - 0.5 * LANE_WIDTH
    return offset, d - MEDIAN_HALF_WIDTH, ROAD_EDGE - d


def reward(
    config: DrivingConfig,
    seconds: float,
    speed: float,
    lanes: tuple[float, float, float],
    drift: float,
    closing: float,
    alongside: float,
) -> float:
    """Reward of ``seconds`` of driving without an end, from the state at their end.

    ``speed`` in m/s; ``lanes``: (offset, to_left, to_right) in m, see Situation; ``drift`` in m/s to the right.
    """
    offset, to_left, to_right = lanes
    foreseen = drift * config.edge_horizon
    to_edge = min(to_left + min(foreseen, 0.0), to_right - max(foreseen, 0.0))
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
