"""The ego of a CARLA server brakes as the task means, on brakes that come slowly, at once, or weaker than set."""

from __future__ import annotations

from collections.abc import Callable

import carla
import numpy as np
import pytest

from carla_digr.driving.car import SPARE, Car
from carla_digr.driving.control import ACTIONS, BRAKE, CRUISE_SPEED, TICK

WANTED = 8.0 * BRAKE  # m/s2


class Vehicle:
    """An ego that keeps what it is told."""

    def __init__(self) -> None:
        self.physics = carla.VehiclePhysicsControl(max_rpm=6000.0, final_ratio=4.0, mass=1800.0)
        self.physics.wheels = [carla.WheelPhysicsControl(radius=35.0) for _ in range(4)]

    def get_physics_control(self) -> carla.VehiclePhysicsControl:
        return self.physics

    def apply_physics_control(self, physics: carla.VehiclePhysicsControl) -> None:
        self.physics = physics


def slowing(brakes: Callable[[float, float], float], seconds: float = 1.5) -> np.ndarray:
    """m/s2 in each tick of braking, for brakes of (pedal, s since it was pressed)."""
    car, speed, found = Car(Vehicle()), CRUISE_SPEED, []
    car.control(ACTIONS["wheels"]["keep"], 0.0, speed)
    for tick in range(round(seconds / TICK)):
        pedal = car.control(ACTIONS["wheels"]["brake"], 0.0, speed).brake
        found.append(brakes(pedal, tick * TICK))
        speed -= found[-1] * TICK
    return np.array(found)


@pytest.mark.parametrize(
    ("brakes", "ticks"),
    [
        (lambda pedal, t: 8.0 * SPARE * pedal * min(0.3 + t, 1.0), 8),
        (lambda pedal, t: 8.0 * SPARE * pedal, 8),
        (lambda pedal, t: 8.0 * pedal, 1),
        (lambda pedal, t: 6.0 * pedal, 8),
    ],
    ids=["slow", "strong", "as they were", "weak"],
)
def test_it_slows_as_the_task_means_soon(brakes, ticks):
    found = slowing(brakes)
    assert np.abs(found[ticks:] - WANTED).max() < 0.25 * WANTED, found.round(1)
    assert found.max() < 2.1 * WANTED


def test_a_brake_is_released_at_once():
    car = Car(Vehicle())
    for _ in range(10):
        car.control(ACTIONS["wheels"]["brake"], 0.0, CRUISE_SPEED)
    assert car.control(ACTIONS["wheels"]["keep"], 0.0, CRUISE_SPEED).brake == 0.0
    assert car.control(ACTIONS["wheels"]["brake"], 0.0, CRUISE_SPEED).brake == pytest.approx(BRAKE)


class Stubborn(Vehicle):
    """An ego whose server keeps its gears."""

    def apply_physics_control(self, physics: carla.VehiclePhysicsControl) -> None:
        physics.forward_gears = [carla.GearPhysicsControl(ratio=ratio) for ratio in (2.8, 1.6, 1.0)]
        super().apply_physics_control(physics)


def test_a_car_that_the_server_does_not_make_as_asked_is_warned_of(caplog):
    Car(Vehicle())
    assert not caplog.messages
    Car(Stubborn())
    assert caplog.messages[0].startswith("The ego has 3 gears, 70 degrees of lock, of which 100 % at 22 m/s")
