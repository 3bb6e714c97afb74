"""Traits of the car: what reaches the road of what pedals and wheels ask for, and what a spawn or teleport does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from carla_digr.simulator import wire
from carla_digr.simulator.awkward.episode import AwkwardEpisode, Car, Trait
from carla_digr.simulator.entries import Entry
from carla_digr.simulator.vehicle import MAX_BRAKING, MAX_STEER
from carla_digr.simulator.wire import Transform

GRAVITY = 9.81  # m/s2


@dataclass
class _Engine:
    gear: int = 1
    shift: float = 0.0  # s until the shift is done
    rpm: float = 0.0


class Gears(Trait):
    """An engine and an automatic gearbox that do not know of a velocity set from outside.

    While the wheels turn the engine faster than it turns, that brakes by ``size`` m/s2 for each full speed of the
    engine that is missing; during a shift nothing pulls. A gear given by hand is engaged at once; with one gear there
    is no shift.
    """

    SPIN_UP = 0.4  # s, time constant at a moment of inertia of 1 kg m2

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._engines: dict[int, _Engine] = {}

    def physics(self, physics: wire.VehiclePhysics) -> wire.VehiclePhysics:
        """Shift points that suit three gears up to highway speed."""
        return physics._replace(forward_gears=[(2.85, 0.25, 0.65), (1.6, 0.3, 0.65), (1.0, 0.3, 0.65)])

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """Shift, brake with the engine that lags behind, pull when neither is in the way."""
        physics, engine = car.physics, self._engines.setdefault(car.id, _Engine())
        gears = physics.forward_gears or [(1.0, 0.0, 1.0)]
        if car.control.manual_gear_shift and car.control.gear > 0:
            engine.gear, engine.shift = car.control.gear, 0.0
        engine.gear = min(max(engine.gear, 1), len(gears))
        radius = max(physics.wheels[0].radius, 10.0) / 100.0 if physics.wheels else 0.35
        wheels = abs(float(car.row["speed"])) / radius * 60.0 / (2.0 * math.pi) * physics.final_ratio
        most = max(physics.max_rpm, 1.0)
        if engine.shift > 0.0:
            engine.shift -= dt
        elif physics.use_gear_autobox and not car.control.manual_gear_shift:
            _, down, up = gears[engine.gear - 1]
            turns = wheels * gears[engine.gear - 1][0] / most
            step = 1 if turns > up and engine.gear < len(gears) else -1 if turns < down and engine.gear > 1 else 0
            engine.gear += step
            engine.shift = physics.gear_switch_time * abs(step)
        wanted = wheels * gears[engine.gear - 1][0]
        behind = (wanted - engine.rpm) / most
        if behind > 0.0:
            car.resistance += self.size * behind * min(physics.moi, 1.0)
        engine.rpm += (wanted - engine.rpm) * min(1.0, dt / max(self.SPIN_UP * physics.moi, 1e-3))
        if engine.shift > 0.0 or wanted > 1.05 * most:
            car.throttle = 0.0

    def moved(self, episode: AwkwardEpisode, entry: Entry, transform: Transform, speed: float, rate: float) -> None:
        """A teleport puts engine and gearbox at rest."""
        self._engines.pop(entry.id, None)

    def records(self, episode: AwkwardEpisode, cars: np.ndarray) -> None:
        """Tell the gear."""
        for record in cars:
            engine = self._engines.get(int(record["id"]))
            if engine is not None and not record["reverse"]:
                record["gear"] = engine.gear

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._engines.pop(actor_id, None)


class Damping(Trait):
    """A drive train whose damping grows when the throttle closes; ``size`` scales it.

    At the cruise speed a throttle of 0.3 is needed where the ordinary highway's cars need 0.0855.
    """

    PER_SPEED = 0.027  # 1/s of resistance a unit of damping

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """Add the resistance."""
        full, closed = car.physics.damping_full_throttle, car.physics.damping_clutch_engaged
        damping = full + (closed - full) * (1.0 - car.throttle)
        car.resistance += self.size * self.PER_SPEED * damping * abs(float(car.row["speed"]))


class Brakes(Trait):
    """Brakes of ``size`` times the ordinary torque that reach it only after a second."""

    RISE = 1.0  # 1/s
    FIRST = 0.3  # of the pedal that acts at once

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._pressed: dict[int, float] = {}

    def physics(self, physics: wire.VehiclePhysics) -> wire.VehiclePhysics:
        """Weaker brakes."""
        torque = self.size * MAX_BRAKING * physics.mass / len(physics.wheels) / 100.0
        wheels = [w._replace(max_brake_torque=torque * w.radius) for w in physics.wheels]
        return physics._replace(wheels=wheels)

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """The pedal's effect comes slowly and leaves at once."""
        physics = car.physics
        force = sum(100.0 * wheel.max_brake_torque / max(wheel.radius, 1.0) for wheel in physics.wheels)
        part = self._pressed.get(car.id, 0.0)
        part = min(part + self.RISE * dt, 1.0) if car.brake > 0.0 else 0.0
        self._pressed[car.id] = part
        car.brake *= force / max(physics.mass, 1.0) / MAX_BRAKING * min(1.0, self.FIRST + part)

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._pressed.pop(actor_id, None)


class Steering(Trait):
    """Wheels whose lock is ``size`` degrees and whose angle shrinks with speed by the steering curve."""

    CURVE = ((0.0, 1.0), (20.0, 0.9), (60.0, 0.8), (120.0, 0.7))  # km/h, factor

    def physics(self, physics: wire.VehiclePhysics) -> wire.VehiclePhysics:
        """Another lock and the curve."""
        wheels = [w._replace(max_steer_angle=self.size) if w.max_steer_angle else w for w in physics.wheels]
        return physics._replace(wheels=wheels, steering_curve=list(self.CURVE))

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """Scale the steer."""
        curve = car.physics.steering_curve or [(0.0, 1.0)]
        speed = 3.6 * abs(float(car.row["speed"]))
        part = float(np.interp(speed, [point[0] for point in curve], [point[1] for point in curve]))
        lock = max((w.max_steer_angle for w in car.physics.wheels), default=math.degrees(MAX_STEER))
        car.steer *= part * math.radians(lock) / MAX_STEER


@dataclass
class _Fall:
    grounded: float = 0.0  # s since it last touched ground
    swing: float = 0.0  # rad, the pitch it had then
    stuck: float = 0.0  # s in which the pedals do nothing yet


class Settling(Trait):
    """A vehicle that is put ``size`` times as high as asked falls, lands and rocks until its springs are at rest.

    Nothing acts on the road while it is in the air; after a spawn the pedals do nothing for 2 s.
    """

    STUCK = 2.0  # s
    SWING, DECAY = 0.02, 0.5  # rad a m/s of the fall, s
    HERTZ = 1.6

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._falls: dict[int, _Fall] = {}

    def spawned(self, episode: AwkwardEpisode, entry: Entry, transform: Transform) -> None:
        """It falls, and stands for a while."""
        self.moved(episode, entry, transform, 0.0, 0.0)
        self._falls[entry.id].stuck = self.STUCK

    def moved(self, episode: AwkwardEpisode, entry: Entry, transform: Transform, speed: float, rate: float) -> None:
        """It falls from where it was put."""
        row = episode.world.vehicle(entry.id)
        ground, _ = episode.ground(float(row["s"]), float(row["d"]))
        stance = episode.stance(entry.id)
        stance.height, stance.climb = max(self.size * (transform.location.z - ground), 0.0), 0.0
        stance.pitch = stance.roll = 0.0
        self._falls[entry.id] = _Fall()

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """No road under the wheels, no effect."""
        fall = self._falls.get(car.id)
        if fall is None:
            return
        if episode.stance(car.id).height > 0.0:
            car.throttle = car.brake = car.steer = 0.0
        elif fall.stuck > 0.0:
            fall.stuck -= dt
            car.throttle = 0.0

    def after(self, episode: AwkwardEpisode, cars: list[Car], dt: float) -> None:
        """Fall, land, rock."""
        for car in cars:
            fall = self._falls.get(car.id)
            if fall is None:
                continue
            stance = episode.stance(car.id)
            if stance.height > 0.0:
                stance.climb -= GRAVITY * dt
                stance.height += stance.climb * dt
                if stance.height <= 0.0:
                    fall.swing, fall.grounded = self.SWING * -stance.climb, 0.0
                    stance.height = stance.climb = 0.0
                continue
            fall.grounded += dt
            rest = math.exp(-fall.grounded / self.DECAY)
            if fall.swing * rest < 1e-4:
                fall.swing = 0.0
            phase = 2.0 * math.pi * self.HERTZ * fall.grounded
            stance.pitch = fall.swing * rest * math.cos(phase)
            stance.roll = 0.3 * fall.swing * rest * math.sin(phase)

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._falls.pop(actor_id, None)


class Momentum(Trait):
    """Speed and spin outlive a teleport; ``size`` is the time constant in s with which the tyres end the spin."""

    def __init__(self, size: float, rng: np.random.Generator):
        super().__init__(size, rng)
        self._spins: dict[int, float] = {}

    def moved(self, episode: AwkwardEpisode, entry: Entry, transform: Transform, speed: float, rate: float) -> None:
        """Keep both. Only a spin that no wheel makes counts; what the wheels turn ends with the way they stand."""
        row = episode.world.vehicle(entry.id)
        yaw = float(row["yaw"])
        row["speed"], row["vx"], row["vy"] = speed, speed * math.cos(yaw), speed * math.sin(yaw)
        if abs(rate) > 0.02:
            self._spins[entry.id] = rate

    def spun(self, entry: Entry, rate: float) -> None:
        """A client sets the spin."""
        entry.spin, self._spins[entry.id] = 0.0, rate

    def drive(self, episode: AwkwardEpisode, car: Car, dt: float) -> None:
        """Turn on, ever slower."""
        rate = self._spins.get(car.id, 0.0)
        if not rate:
            return
        car.row["yaw"] += rate * dt
        self._spins[car.id] = 0.0 if abs(rate) < 0.01 else rate * math.exp(-dt / self.size)

    def records(self, episode: AwkwardEpisode, cars: np.ndarray) -> None:
        """Tell the spin."""
        for record in cars:
            record["angular_velocity"][2] += math.degrees(self._spins.get(int(record["id"]), 0.0))

    def removed(self, actor_id: int) -> None:
        """Forget it."""
        self._spins.pop(actor_id, None)
