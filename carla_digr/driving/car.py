"""The ego of a CARLA server made to answer like the car of the driving task, as far as the server lets it."""

from __future__ import annotations

import logging
import math

import carla
import numpy as np

from carla_digr.driving.control import (
    CRUISE_GAIN,
    CRUISE_SPEED,
    FULL_THROTTLE_ACCELERATION,
    MAX_WHEEL_ANGLE,
    TICK,
    VehicleCommand,
    pedals,
)

FULL_BRAKE_ACCELERATION = 8.0  # m/s2 at brake 1
TOP_SPEED = 35.0  # m/s that the one gear must reach
LITTLE = 0.01  # of moments of inertia and damping rates: as good as none
INTEGRAL = 0.3  # 1/s2, of the cruise control's own error
INTEGRAL_WITHIN = 3.0  # m/s; farther off it is not held against the pedals
MOST_TRIM = 0.5  # throttle
STANDING = 0.5  # m/s, below which a brake is applied as it is
SPARE = 2.0  # times the brakes that are needed, for those that come slowly
BRAKE_GAIN = 0.8  # of the missing deceleration a tick

log = logging.getLogger(__name__)


class Car:
    """A car whose steer means a wheel angle and whose cruise control holds its speed uphill too.

    Its physics are set once: one gear, hardly any damping, torques for the accelerations of control.py, wheels that
    turn by their full angle at any speed. What the server does not take is divided out of the steer, an integral term
    brings the cruise control to its speed, and brakes that come slowly are pressed harder.

    Args:
        vehicle: the ego; it should stand, and must not be driven for a few frames.
    """

    def __init__(self, vehicle: carla.Vehicle):
        self.vehicle = vehicle
        wanted = tamed(vehicle.get_physics_control())
        vehicle.apply_physics_control(wanted)
        self.physics = vehicle.get_physics_control()
        self._lock = math.radians(max((w.max_steer_angle for w in self.physics.wheels), default=0.0)) or MAX_WHEEL_ANGLE
        curve = [(point.x, point.y) for point in self.physics.steering_curve] or [(0.0, 1.0)]
        self._speeds, self._parts = ([point[i] for point in curve] for i in (0, 1))
        self._trim = 0.0
        self._press: float | None = None
        """Brake pedal of the frame before."""
        self._asked = 0.0
        """What it was for."""
        self._before = 0.0
        """m/s in the frame before."""
        flat = set(self._parts) == {1.0} and abs(self._lock - MAX_WHEEL_ANGLE) < 1e-3
        taken = flat and len(list(self.physics.forward_gears)) == 1
        log.log(logging.INFO if taken else logging.WARNING, "The ego has %s.", self)

    def __str__(self) -> str:
        gears = len(list(self.physics.forward_gears))
        part = float(np.interp(3.6 * CRUISE_SPEED, self._speeds, self._parts))
        return (
            f"{gears} gear{'s' if gears != 1 else ''}, {math.degrees(self._lock):.0f} degrees of lock, of which "
            f"{100 * part:.0f} % at {CRUISE_SPEED:g} m/s, and a damping of {self.physics.damping_rate_full_throttle:g}"
        )

    def reset(self) -> None:
        """Forget the drive before."""
        self._trim, self._press = 0.0, None

    def control(self, command: VehicleCommand, steer: float, speed: float) -> carla.VehicleControl:
        """Pedals and wheels for a command and its steering (of 70 degrees) at the present speed (m/s)."""
        throttle, brake = pedals(command, speed)
        if not math.isnan(command.target_speed):
            error = command.target_speed - speed
            if abs(error) < INTEGRAL_WITHIN:
                self._trim += INTEGRAL * error * TICK / (CRUISE_GAIN * FULL_THROTTLE_ACCELERATION)
                self._trim = max(-MOST_TRIM, min(self._trim, MOST_TRIM))
            throttle = max(0.0, min(throttle + self._trim, 1.0)) if brake == 0.0 else throttle
        brake = self._pressed(brake, speed)
        part = float(np.interp(3.6 * abs(speed), self._speeds, self._parts)) or 1.0
        steer *= MAX_WHEEL_ANGLE / (self._lock * part)
        return carla.VehicleControl(throttle=throttle, steer=max(-1.0, min(steer, 1.0)), brake=brake)

    def _pressed(self, brake: float, speed: float) -> float:
        """The pedal for a brake of the task, pressed harder while the car does not slow as it means."""
        slowed, self._before = (self._before - speed) / TICK, speed
        if brake == 0.0 or speed < STANDING:
            self._press = None
            return brake
        press = brake
        if self._press is not None:
            missing = self._asked * FULL_BRAKE_ACCELERATION - slowed
            press = self._press + brake - self._asked + BRAKE_GAIN * missing / (SPARE * FULL_BRAKE_ACCELERATION)
        self._press, self._asked = max(0.0, min(press, 1.0)), brake
        return self._press


def tamed(physics: carla.VehiclePhysicsControl) -> carla.VehiclePhysicsControl:
    """The physics (changed in place) with one gear, hardly any damping, flat steering and the task's accelerations."""
    wheels = list(physics.wheels)
    radius = (wheels[0].radius / 100.0 if wheels else 0.0) or 0.35
    turns = TOP_SPEED / radius * 60.0 / (2.0 * math.pi) * max(physics.final_ratio, 0.1)  # 1/min at a ratio of 1
    ratio = min(1.0, 0.9 * physics.max_rpm / turns)
    torque = physics.mass * FULL_THROTTLE_ACCELERATION * radius / (ratio * max(physics.final_ratio, 0.1))
    physics.forward_gears = [carla.GearPhysicsControl(ratio=ratio, down_ratio=0.0, up_ratio=1.0)]
    physics.gear_switch_time = 0.0
    physics.torque_curve = [carla.Vector2D(0.0, torque), carla.Vector2D(physics.max_rpm, torque)]
    physics.moi = LITTLE
    physics.damping_rate_full_throttle = LITTLE
    physics.damping_rate_zero_throttle_clutch_engaged = LITTLE
    physics.damping_rate_zero_throttle_clutch_disengaged = LITTLE
    physics.steering_curve = [carla.Vector2D(0.0, 1.0), carla.Vector2D(120.0, 1.0)]
    for wheel in wheels:
        wheel.max_brake_torque = SPARE * physics.mass * FULL_BRAKE_ACCELERATION * radius / len(wheels)
        if wheel.max_steer_angle > 0.0:
            wheel.max_steer_angle = math.degrees(MAX_WHEEL_ANGLE)
    physics.wheels = wheels
    return physics
