"""Vehicle kinds of the embedded highway and the bicycle model that moves the ones a client drives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numba import njit

MAX_STEER = math.radians(70.0)
"""Wheel angle in radians at steer 1, as CARLA's passenger cars have it."""
MAX_ACCELERATION = 4.0  # m/s2 at throttle 1
MAX_BRAKING = 8.0  # m/s2 at brake 1
HAND_BRAKING = 6.0  # m/s2
ROLLING = 0.1  # m/s2, constant resistance
DRAG = 0.0005  # 1/m, air resistance: DRAG * speed^2
MAX_REVERSE_SPEED = 8.0  # m/s

CAR, VAN, TRUCK, BUS = range(4)


@dataclass(frozen=True)
class VehicleKind:
    """One kind of vehicle: blueprint, shape and size. The actor's origin is the centre of its box on the ground."""

    blueprint: str
    body: int  # CAR, VAN, TRUCK or BUS
    length: float  # m
    width: float  # m
    height: float  # m
    wheelbase: float  # m
    mass: float  # kg
    colors: tuple[tuple[int, int, int], ...]  # RGB, the recommended ones


_CAR_COLORS = (
    (180, 24, 24),
    (24, 60, 150),
    (235, 235, 235),
    (28, 28, 32),
    (130, 134, 140),
    (196, 160, 60),
    (30, 100, 60),
    (70, 140, 190),
)
_VAN_COLORS = ((240, 240, 240), (60, 90, 140), (200, 180, 120), (150, 40, 40))
_TRUCK_COLORS = ((210, 210, 205), (40, 80, 150), (170, 50, 40), (50, 110, 70))
_BUS_COLORS = ((220, 180, 40), (40, 120, 170), (200, 60, 50))

KINDS: tuple[VehicleKind, ...] = (
    VehicleKind("vehicle.tesla.model3", CAR, 4.79, 1.95, 1.49, 2.88, 1845.0, _CAR_COLORS),
    VehicleKind("vehicle.audi.a2", CAR, 3.71, 1.79, 1.55, 2.40, 1200.0, _CAR_COLORS),
    VehicleKind("vehicle.lincoln.mkz_2020", CAR, 4.89, 1.85, 1.50, 2.85, 1700.0, _CAR_COLORS),
    VehicleKind("vehicle.mini.cooper_s", CAR, 3.81, 1.73, 1.46, 2.50, 1225.0, _CAR_COLORS),
    VehicleKind("vehicle.nissan.patrol_2021", CAR, 5.20, 1.98, 1.94, 3.08, 2700.0, _CAR_COLORS),
    VehicleKind("vehicle.volkswagen.t2", VAN, 4.48, 1.80, 2.04, 2.40, 1400.0, _VAN_COLORS),
    VehicleKind("vehicle.mercedes.sprinter", VAN, 5.91, 1.99, 2.56, 3.66, 2500.0, _VAN_COLORS),
    VehicleKind("vehicle.carlamotors.carlacola", TRUCK, 5.20, 2.40, 2.67, 3.40, 5500.0, _TRUCK_COLORS),
    VehicleKind("vehicle.carlamotors.european_hgv", TRUCK, 8.60, 2.50, 3.46, 4.60, 18000.0, _TRUCK_COLORS),
    VehicleKind("vehicle.mitsubishi.fusorosa", BUS, 10.27, 2.50, 3.20, 5.30, 9500.0, _BUS_COLORS),
)


@njit(cache=True, nogil=True)
def step_bicycle(x, y, yaw, speed, wheelbase, throttle, wheel_angle, brake, hand_brake, reverse, dt):
    """One step of the kinematic bicycle about the centre of the wheelbase; no state but pose and speed.

    The wheels take ``wheel_angle`` (rad, positive right) and the engine its torque at once: a single picture and the
    speed tell the whole state.

    Returns:
        x, y (m), yaw (rad), speed (m/s, signed along the heading) and the yaw rate (rad/s) of this step.
    """
    resistance = ROLLING + DRAG * speed * speed + MAX_BRAKING * brake
    if hand_brake:
        resistance += HAND_BRAKING
    pull = -MAX_ACCELERATION * throttle if reverse else MAX_ACCELERATION * throttle
    new = speed + pull * dt
    if new > 0.0:
        new = max(0.0, new - resistance * dt)
    elif new < 0.0:
        new = min(0.0, new + resistance * dt)
    if new < -MAX_REVERSE_SPEED:
        new = min(speed, -MAX_REVERSE_SPEED) if speed < -MAX_REVERSE_SPEED else -MAX_REVERSE_SPEED
    mean = 0.5 * (speed + new)
    slip = math.atan(0.5 * math.tan(wheel_angle))
    rate = mean * math.cos(slip) * math.tan(wheel_angle) / wheelbase
    course = yaw + 0.5 * rate * dt + slip
    x += mean * math.cos(course) * dt
    y += mean * math.sin(course) * dt
    yaw += rate * dt
    return x, y, yaw, new, rate
