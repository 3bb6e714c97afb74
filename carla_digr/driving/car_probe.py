"""The line of `check-simulator` on the car that the drive makes of the server's: what a policy will meet."""

from __future__ import annotations

import math

import carla

from carla_digr.driving.car import Car
from carla_digr.driving.control import BRAKE, CRUISE_SPEED, MAX_WHEEL_ANGLE, TICK, WHEEL_ANGLE, VehicleCommand
from carla_digr.driving.keeper import lane_steer
from carla_digr.driving.probes import HELD_COMMAND, Bench, Figures, physics_dump, turn

DECELERATION = -4.3  # m/s2 of BRAKE, air and rolling resistance included
CAR = (
    f"{CRUISE_SPEED:g} m/s within 0.5 for 2 s, yaw rates of wheels at {WHEEL_ANGLE:g} rad within 10 % and "
    f"{DECELERATION:+.1f} m/s2 of brake {BRAKE:g} within a quarter, with what the drive does about the car"
)


def tamed_car(bench: Bench) -> Figures:
    """Off: m/s from the cruise speed in 2 s of rolling on; parts: yaw rate to the left and right over the wanted one;
    brake: m/s2; and the physics that the server tells of the car then. The bench's car keeps them."""
    car = Car(bench.car)
    bench.physics = car.physics
    bench.roll(CRUISE_SPEED)

    def step(command: VehicleCommand, steer: float) -> tuple[carla.Transform, float]:
        bench.car.apply_control(car.control(command, steer, bench.car.get_velocity().length()))
        bench.session.tick()
        return bench.car.get_transform(), bench.car.get_velocity().length()

    off, place = 0.0, bench.car.get_transform()
    for _ in range(40):
        place, speed = step(HELD_COMMAND, lane_steer(bench.session.map, place, CRUISE_SPEED))
        off = max(off, abs(speed - CRUISE_SPEED))
    parts = []
    for angle in (-WHEEL_ANGLE, WHEEL_ANGLE):
        seen = [step(HELD_COMMAND, angle / MAX_WHEEL_ANGLE) for _ in range(7)]  # the wheels may take one to get there
        turned = math.radians(math.remainder(seen[-1][0].rotation.yaw - seen[0][0].rotation.yaw, 360.0))
        parts.append(turned / turn(sum(speed for _, speed in seen[1:]) * TICK, angle))
    speeds = [step(VehicleCommand(0.0, brake=BRAKE), 0.0)[1] for _ in range(16)]
    slowed = (speeds[15] - speeds[7]) / (8 * TICK)  # a brake that comes slowly is pressed harder by then
    return {"off": off, "parts": parts, "brake": slowed, "physics": physics_dump(car.physics)}


def judged_car(seen: Figures) -> tuple[bool, str]:
    """Whether it is the task's car, and a sentence of the figures."""
    good = seen["off"] < 0.5 and all(abs(part - 1.0) < 0.1 for part in seen["parts"])
    good = good and abs(seen["brake"] - DECELERATION) < 0.25 * abs(DECELERATION)
    left, right = (f"{100 * part:.0f} %" for part in seen["parts"])
    return (
        good,
        f"{seen['off']:.2f} m/s off at the most, {left} to the left, {right} to the right, brake {seen['brake']:+.1f}",
    )
