"""Who else is on the road of a drive over CARLA's protocol."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import carla
import msgpack
import numpy as np

from carla_digr.driving.highway import lanes_beside
from carla_digr.driving.session import Session
from carla_digr.driving.start import LANE_ROOM, along
from carla_digr.errors import UserError

log = logging.getLogger(__name__)

HIGHWAY_TRAFFIC = "controller.traffic.highway"
"""Blueprint of the embedded simulator: its own drivers, who overtake at highway speed."""
FREE_DISTANCE = 40.0  # m around the ego that stay free of traffic when an episode starts
SPREAD = 4  # nearest spawn points from which each vehicle's is drawn
DESIRED_SPEED = 40.0, 65.0  # km/h of the Traffic Manager's vehicles
MOST_IN_A_ROW, ROW_LENGTH, ROW_WIDTH = 2, 20.0, 30.0  # vehicles, m along and between their middles
RENEW_EVERY = 20  # ticks between two looks at who has fallen behind
BEHIND, AWAY = 150.0, 700.0  # m behind the ego's middle, and m in all, from which a vehicle is no traffic any more
AHEAD = 120.0, 650.0  # m before the ego where others take their place: 20 are as dense there as 64 on the embedded ring
TRIES = 4  # draws of a place for each vehicle
LIFT = 0.5  # m above the road where they are put
WAKE_AFTER = 1.0  # s that the Traffic Manager may take for a frame that the server has sent


class Traffic(Protocol):
    """Who else is on the road; ``vehicles`` of them, which may be changed and holds from the next `fill` on."""

    vehicles: int

    def fill(self, seed: int, ego: carla.Vehicle, place: carla.Location) -> None:
        """Put the traffic of an episode on the road; the ego stands at ``place``."""

    def remove(self, ids: Sequence[int]) -> None:
        """Take some of its vehicles from the road; a tick must follow."""

    def renew(self, place: carla.Transform) -> None:
        """Keep it around the ego, which is there now; called each tick."""

    def clear(self) -> None:
        """Remove it."""

    def close(self) -> None:
        """Remove it for good."""


class SimulatorTraffic:
    """The embedded simulator's own drivers."""

    def __init__(self, session: Session, points: list[carla.Transform], vehicles: int):
        self._session, self.vehicles = session, vehicles
        self._controller: carla.Actor | None = None
        if not session.blueprints.filter(HIGHWAY_TRAFFIC):
            raise UserError(
                f"The simulator at {session.address} is not the embedded highway; choose the simulator 'carla'."
            )

    def fill(self, seed: int, ego: carla.Vehicle, place: carla.Location) -> None:
        """Spawn the traffic controller."""
        blueprint = self._session.blueprint(HIGHWAY_TRAFFIC, seed=seed, vehicles=self.vehicles, hero=ego.id)
        self._controller = self._session.spawn(blueprint, carla.Transform())

    def remove(self, ids: Sequence[int]) -> None:
        """Nothing: they make way."""

    def renew(self, place: carla.Transform) -> None:
        """Nothing: they are all around the ring."""

    def clear(self) -> None:
        """Destroy the traffic controller, and its vehicles with it."""
        if self._controller is not None:
            controller, self._controller = self._controller, None
            self._session.destroy(controller)

    close = clear


class ManagedTraffic:
    """Vehicles driven by the client's Traffic Manager, for servers without drivers of their own.

    It does not change lanes above about 40 km/h, and it removes vehicles at dead ends. When the server dies, or
    hangs while the library's own thread waits for it, that thread ends this process with an abort (SIGABRT) which
    nothing here can catch: who runs such a drive starts its process again.
    """

    def __init__(self, session: Session, points: list[carla.Transform], vehicles: int):
        self._session, self._points, self.vehicles = session, points, vehicles
        self._kinds = sorted(b.id for b in session.blueprints.filter("vehicle.*") if _is_car(b))
        self._ids: list[int] = []
        self._draw = np.random.default_rng(0)
        self._ticks = 0
        """Of the episode so far."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self._manager = session.client.get_trafficmanager(self._port)
        self._manager.set_synchronous_mode(True)
        self._watch = ManagerWatch(session, self._manager)

    def fill(self, seed: int, ego: carla.Vehicle, place: carla.Location) -> None:
        """Spawn vehicles at drawn spawn points and hand them over."""
        self._manager.set_random_device_seed(seed)
        self._draw = np.random.default_rng(seed)
        self._ticks = 0
        self._spawn(traffic_places(self._points, place, self.vehicles, self._draw))
        if 2 * len(self._ids) < self.vehicles:
            log.warning(
                "The start of seed %d: only %d of %d other vehicles found a place.", seed, len(self._ids), self.vehicles
            )

    def _spawn(self, places: Sequence[carla.Transform]) -> None:
        command: Any = carla.command
        low, high = DESIRED_SPEED
        batch = []
        for point in places:
            blueprint = self._session.blueprint(self._kinds[self._draw.integers(len(self._kinds))])
            spawn = command.SpawnActor(blueprint, point)
            spawn = spawn.then(command.SetAutopilot(command.FutureActor, True, self._port))
            batch.append(spawn.then(command.ApplyTargetVelocity(command.FutureActor, along(point, low / 3.6))))
        answers = self._session.client.apply_batch_sync(batch, False)
        made = [answer.actor_id for answer in answers if not answer.error]
        for vehicle in self._session.world.get_actors(made):
            self._manager.set_desired_speed(vehicle, float(low + (high - low) * self._draw.random()))
        self._ids += made

    def renew(self, place: carla.Transform) -> None:
        """Remove who has fallen behind or gone elsewhere, and put as many on the road ahead."""
        self._ticks += 1
        if not self._ids or self._ticks % RENEW_EVERY > 1:
            return
        snapshot = self._session.world.get_snapshot()
        there = {i: state.get_transform() for i in self._ids if (state := snapshot.find(i)) is not None}
        self._ids = list(there)
        if self._ticks % RENEW_EVERY == 0:
            self.remove([i for i, other in there.items() if _is_left_behind(place, other.location)])
        else:  # a tick later: without one the client crashes
            missing = self.vehicles - len(self._ids)
            self._spawn(places_ahead(self._session.map, place, list(there.values()), missing, self._draw))

    def remove(self, ids: Sequence[int]) -> None:
        """Take those of its own from the Traffic Manager, then destroy them; other orders crash the client."""
        command: Any = carla.command
        ours = [i for i in ids if i in self._ids]
        self._session.client.apply_batch_sync([command.SetAutopilot(i, False, self._port) for i in ours], False)
        self._session.client.apply_batch_sync([command.DestroyActor(i) for i in ours], False)
        self._ids = [i for i in self._ids if i not in ours]

    def clear(self) -> None:
        """Remove the vehicles, and tick before new ones come: without, the client crashes."""
        if self._ids:
            self.remove(self._ids)
            self._session.tick()

    def close(self) -> None:
        """Also shut the Traffic Manager down."""
        try:
            self.clear()
        finally:
            self._watch.stop()
        self._manager.shut_down()


class ManagerWatch:
    """Wakes the client's Traffic Manager when it sleeps through a tick, from the start until :meth:`stop`.

    In synchronous mode the library's tick and its manager's thread (``TrafficManagerLocal::SynchronousTick``, ``Run``)
    notify each other without the lock that they wait with. About once in 5,000 ticks a notification goes unheard, both
    wait for ever, and no time limit holds. Leaving the mode notifies the thread once more. The manager's own methods
    wait for a lock that the tick holds; its RPC port does not. A manager that is only slow must be left alone: woken
    while it works, it goes through the next frame by itself, beside whoever destroys its vehicles meanwhile.
    """

    def __init__(self, session: Session, manager: carla.TrafficManager):
        self._session, self._port = session, manager.get_port()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic-manager-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; safe to call twice."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        seen = None
        while not self._stopped.wait(WAKE_AFTER):
            before = self._session.ticking_from
            try:
                frame = self._session.world.get_snapshot().frame
            except RuntimeError:  # of a world that was loaded anew
                continue
            ticked = before is not None and frame > before and frame == seen  # the server has, the library has not
            if ticked and _all_sleep() and self._server_answers() and self._session.ticking_from == before:
                log.warning("The Traffic Manager slept through frame %d of %s; woken.", frame, self._session.address)
                self._wake()
            seen = frame

    def _server_answers(self) -> bool:
        try:
            self._session.client.get_server_version()
        except RuntimeError:  # it is the server that is waited for
            return False
        return True

    def _wake(self) -> None:
        try:
            with socket.create_connection(("127.0.0.1", self._port), WAKE_AFTER) as connection:
                for number, synchronous in enumerate((False, True)):
                    connection.sendall(msgpack.packb([0, number, "set_synchronous_mode", [synchronous]]))
                    connection.recv(64)
        except OSError as error:
            log.warning("The Traffic Manager does not answer: %s.", error)


def _all_sleep() -> bool:
    """Whether no thread of this process but the caller's runs, or waits for a processor."""
    own, states = threading.get_native_id(), []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # of a thread that has ended
            if int(task.name) != own:
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return "R" not in states


def traffic_places(
    points: Sequence[carla.Transform], ego: carla.Location, count: int, draw: np.random.Generator
) -> list[carla.Transform]:
    """Where vehicles stand when an episode begins: around the ego, at most two in a row of lanes, so that it can pass.

    Args:
        points: the spawn points there are; FREE_DISTANCE around the ego stays free.
        count: vehicles at most.
    """
    near = sorted(
        (p for p in points if p.location.distance(ego) > FREE_DISTANCE), key=lambda p: p.location.distance(ego)
    )
    near = near[: SPREAD * count]
    places: list[carla.Transform] = []
    for index in draw.permutation(len(near)):
        point = near[index]
        beside = sum(_is_beside(other, point) for other in places)
        if beside < MOST_IN_A_ROW and len(places) < count:
            places.append(point)
    return places


def places_ahead(
    road_map: carla.Map,
    ego: carla.Transform,
    others: Sequence[carla.Transform],
    count: int,
    draw: np.random.Generator,
) -> list[carla.Transform]:
    """Where vehicles come onto the road ahead of the ego, at most ``count``, as far apart as in traffic_places."""
    places: list[carla.Transform] = []
    for _ in range(TRIES * count):
        ahead = road_map.get_waypoint(ego.location).next(float(draw.uniform(*AHEAD)))
        lanes = lanes_beside(ahead[0]) if len(ahead) == 1 and not ahead[0].is_junction else []
        if not lanes or len(places) == count:
            continue
        point = lanes[draw.integers(len(lanes))].transform
        point.location.z += LIFT
        near = [other for other in (*others, *places) if _is_beside(other, point)]
        if len(near) < MOST_IN_A_ROW and not any(_is_in_lane(other, point) for other in near):
            places.append(point)
    return places


def _is_left_behind(ego: carla.Transform, other: carla.Location) -> bool:
    forward, away = ego.get_forward_vector(), other - ego.location
    return away.x * forward.x + away.y * forward.y < -BEHIND or away.length() > AWAY


def _is_beside(other: carla.Transform, point: carla.Transform) -> bool:
    forward = point.get_forward_vector()
    away = other.location - point.location
    along = away.x * forward.x + away.y * forward.y
    return abs(along) < ROW_LENGTH and other.location.distance(point.location) < ROW_WIDTH


def _is_in_lane(other: carla.Transform, point: carla.Transform) -> bool:
    right, away = point.get_right_vector(), other.location - point.location
    return abs(away.x * right.x + away.y * right.y) < LANE_ROOM


def _is_car(blueprint: carla.ActorBlueprint) -> bool:
    """Whether it is an ordinary car: the largest vehicles cannot make some turns, and hide the road."""
    if blueprint.has_attribute("base_type"):
        return blueprint.get_attribute("base_type").as_str() == "car"
    return int(blueprint.get_attribute("number_of_wheels")) == 4
