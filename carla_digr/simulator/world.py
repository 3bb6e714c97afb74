"""The embedded highway as one object: vehicles, traffic, collisions and cameras, stepped in process.

Pure and deterministic: the same calls give bit-equal states in any process. It knows no protocol and starts no thread.
Controls, velocities and poses are rounded to float32 on entry, the precision in which CARLA's protocol carries them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.simulator.contacts import box_overlap, collide, static_overlap
from carla_digr.simulator.figures import NOBODY, drawn_with, strike
from carla_digr.simulator.lidar import Beams, Scan, scan
from carla_digr.simulator.palette import Palette
from carla_digr.simulator.renderer import Pose, VehicleTable, depths, instances, render
from carla_digr.simulator.road import (
    LANE_WIDTH,
    LANES,
    MEDIAN_HALF_WIDTH,
    Road,
    project_to,
)
from carla_digr.simulator.shapes import NAMES
from carla_digr.simulator.traffic import (
    CLIENT,
    VEHICLE,
    fill_kind,
    populate,
    step_traffic,
)
from carla_digr.simulator.vehicle import KINDS, MAX_STEER, step_bicycle

STATIC = 0
"""`Collision.other` of the barrier and the guard rails."""
SNAP_DISTANCE, SNAP_ANGLE = 0.01, 1e-3  # m and rad within which a pose means a spawn point of the road
LONGEST_PART = 0.05  # s that vehicles move between two looks around
TOP_SPEED = 100.0  # m/s, the most a vehicle can be given
_LARGEST = 1e9  # of controls, metres and m/s that make sense
_CONTACTS = 256  # contacts reported a step at most


class SpawnCollision(UserError):
    """A vehicle was to be put where another one, the barrier or a guard rail is."""


@dataclass(frozen=True)
class Collision:
    """A contact of the last step as one of its two partners feels it.

    Args:
        id: the vehicle that reports it.
        other: the other one's id, or STATIC.
        other_name: the other one's blueprint id, its shape, or ``static.barrier`` or ``static.guardrail``.
        impulse: (x, y, z) in N s on the vehicle that reports it.
    """

    id: int
    other: int
    other_name: str
    impulse: tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; metres and radians, relative to ``parent`` (its origin is the box's centre on the ground).

    Args:
        parent: id of the vehicle that carries it, 0 for one that stands in the world.
        width, height: pixels.
        fov: horizontal field of view in degrees.
    """

    parent: int
    x: float
    y: float
    z: float
    pitch: float
    yaw: float
    roll: float
    width: int
    height: int
    fov: float


@njit(cache=True, nogil=True)
def _step(vehicles, pieces, contacts, dt):
    """Advance the table (N,) of VEHICLE by dt seconds; returns the number of contacts."""
    n = vehicles.shape[0]
    heading = np.empty(n)
    before = np.empty((n, 2))
    for i in range(n):
        v = vehicles[i]
        _, _, heading[i] = project_to(pieces, v.x, v.y)
        before[i, 0], before[i, 1] = v.speed * math.cos(v.yaw), v.speed * math.sin(v.yaw)
    yaw = vehicles["yaw"].copy()
    step_traffic(vehicles, pieces, heading, dt)
    for i in range(n):
        v = vehicles[i]
        if v.driver == CLIENT:
            v.x, v.y, v.yaw, v.speed, _ = step_bicycle(
                v.x,
                v.y,
                v.yaw,
                v.speed,
                v.wheelbase,
                v.throttle,
                v.steer * MAX_STEER,
                v.brake,
                v.hand_brake,
                v.reverse,
                dt,
            )
            v.brake_light = v.brake > 0.05
    count = collide(vehicles, pieces, contacts)
    for i in range(n):
        v = vehicles[i]
        if v.driver == CLIENT:
            v.s, v.d, _ = project_to(pieces, v.x, v.y)
        v.yaw = (v.yaw + math.pi) % (2.0 * math.pi) - math.pi
        v.yaw_rate = ((v.yaw - yaw[i] + math.pi) % (2.0 * math.pi) - math.pi) / dt
        v.vx, v.vy = v.speed * math.cos(v.yaw), v.speed * math.sin(v.yaw)
        v.ax, v.ay = (v.vx - before[i, 0]) / dt, (v.vy - before[i, 1]) / dt
    return count


def _f32(value: float) -> float:
    """The nearest float32 number; raises ValueError where there is none."""
    if not abs(value) < _LARGEST:
        raise ValueError(f"{value} is not a number that a vehicle can be given")
    return float(np.float32(value))


class World:
    """The highway and everything on it.

    Attributes:
        road: the road all of it is on.
        frame: steps taken so far; starts at 0 and never goes back.
        elapsed: simulated seconds.
        palette: index of the renderer's palette, or a palette: the weather of the pictures.
        scenery_seed: of the trees and houses beside the road; 0: the usual ones.
        collisions: the contacts of the last step, two entries for one between vehicles.
        figures: (N,) of figures.FIGURE, walkers and props: whoever puts them there moves them.
    """

    def __init__(self, road: Road | None = None):
        self.road = road if road is not None else Road.ring()
        self.frame = 0
        self.elapsed = 0.0
        self.palette: int | Palette = 0
        self.scenery_seed = 0
        self.collisions: list[Collision] = []
        self.figures = NOBODY
        self._table = np.zeros(16, VEHICLE)
        self._count = 0
        self._found = 0  # row of the vehicle that was asked for last
        self._last_id = 0
        self._contacts = np.zeros((_CONTACTS, 5))

    # What is there.

    @property
    def vehicles(self) -> NDArray[np.void]:
        """The table (N,) of `traffic.VEHICLE`, in order of spawning; a view that the next spawn or destroy outdates."""
        return self._table[: self._count]

    def ids(self) -> list[int]:
        """Ids of the vehicles in order of spawning."""
        return self.vehicles["id"].tolist()

    def index(self, vehicle_id: int) -> int:
        """Row of a vehicle in the table.

        Raises:
            KeyError: there is no such id.
        """
        ids = self._table["id"]
        if self._found < self._count and ids[self._found] == vehicle_id:  # mostly the ego is asked for again
            return self._found
        found = int((ids[: self._count] == vehicle_id).argmax()) if self._count else 0
        if not self._count or ids[found] != vehicle_id:
            raise KeyError(f"there is no vehicle with id {vehicle_id}")
        self._found = found
        return found

    def vehicle(self, vehicle_id: int) -> np.record:
        """One row of the table (``row.x`` or ``row["x"]``, ...), a view like `vehicles`.

        Raises:
            KeyError: there is no such id.
        """
        return self._table.view(np.recarray)[self.index(vehicle_id)]

    def row(self, vehicle_id: int) -> np.void:
        """``vehicle`` without attributes, in a tenth of the time.

        Raises:
            KeyError: there is no such id.
        """
        return self._table[self.index(vehicle_id)]

    def new_id(self) -> int:
        """The next actor id: 1, 2, ..."""
        self._last_id += 1
        return self._last_id

    # Coming and going.

    def spawn_vehicle(
        self,
        kind: int,
        x: float,
        y: float,
        yaw: float,
        color: tuple[int, int, int] | None = None,
        overlapping: bool = False,
    ) -> int:
        """Put a vehicle that a client drives on the road, standing; returns its id.

        Args:
            kind: index into `vehicle.KINDS`.
            x, y, yaw: metres and radians; within 1 cm and 1 mrad of a spawn point of the road it is that point.
            color: RGB, by default the kind's first one.
            overlapping: put it there whatever is there.

        Raises:
            SpawnCollision: it would overlap a vehicle, the barrier or a guard rail.
            ValueError: the pose is not finite.
        """
        row = np.zeros(1, VEHICLE)
        fill_kind(row[0], kind, color if color is not None else KINDS[kind].colors[0])
        self._pose(row[0], x, y, yaw)
        if not overlapping:
            self._refuse_overlap(row[0])
        return self._append(row)[0]

    def place(self, vehicle_id: int, x: float, y: float, yaw: float) -> None:
        """Put a vehicle elsewhere, standing; the same rules as for spawning, but overlaps are left to the next step.

        A driver of the traffic goes on in the lane it finds itself in.

        Raises:
            KeyError: there is no such id.
            ValueError: the pose is not finite.
        """
        row = self.row(vehicle_id)
        self._pose(row, x, y, yaw)
        row["lane"] = min(max(int((row["d"] - MEDIAN_HALF_WIDTH) // LANE_WIDTH), row["leftmost_lane"]), LANES - 1)
        for name in ("speed", "vx", "vy", "yaw_rate", "ax", "ay", "slope"):
            row[name] = 0.0

    def destroy(self, *vehicle_ids: int) -> bool:
        """Remove vehicles; False when one of these ids is none's."""
        return self._remove(np.isin(self.vehicles["id"], vehicle_ids)) == len(vehicle_ids)

    def spawn_traffic(self, seed: int, vehicles: int = 64, ego_id: int | None = None, oncoming: int = 24) -> list[int]:
        """Fill the ring with the world's own drivers; returns their ids.

        Args:
            seed: equal seeds and equal worlds give equal traffic.
            vehicles: on the own carriageway.
            ego_id: a client's vehicle that must be there; 40 m around every client's vehicle stay free.
            oncoming: on the other carriageway.

        Raises:
            UserError: they do not fit.
            KeyError: there is no ``ego_id``.
        """
        if ego_id:
            self.index(ego_id)
        return self._append(populate(self.road, seed, vehicles, oncoming, self.vehicles))

    def destroy_traffic(self) -> None:
        """Remove every vehicle that no client drives."""
        self._remove(self.vehicles["driver"] != CLIENT)

    # Driving.

    def set_control(
        self,
        vehicle_id: int,
        throttle: float,
        steer: float,
        brake: float,
        hand_brake: bool = False,
        reverse: bool = False,
    ) -> None:
        """Controls of a vehicle until the next call, as CARLA has them: throttle and brake in [0, 1], steer in [-1, 1].

        Values beyond are clipped; on vehicles of the traffic they have no effect.

        Raises:
            KeyError: there is no such id.
            ValueError: a value is no finite number.
        """
        row = self.row(vehicle_id)
        row["throttle"] = min(max(_f32(throttle), 0.0), 1.0)
        row["steer"] = min(max(_f32(steer), -1.0), 1.0)
        row["brake"] = min(max(_f32(brake), 0.0), 1.0)
        row["hand_brake"], row["reverse"] = hand_brake, reverse

    def set_target_velocity(self, vehicle_id: int, vx: float, vy: float) -> None:
        """Set the speed at once to the part of (vx, vy), in m/s, along the heading; vehicles do not slide sideways.

        At most TOP_SPEED is taken.

        Raises:
            KeyError: there is no such id.
            ValueError: a value is no finite number.
        """
        row = self.row(vehicle_id)
        c, sn = math.cos(row["yaw"]), math.sin(row["yaw"])
        speed = min(max(_f32(vx) * c + _f32(vy) * sn, -TOP_SPEED), TOP_SPEED)
        row["speed"], row["vx"], row["vy"] = speed, speed * c, speed * sn

    def step(self, dt: float = 0.05) -> None:
        """Advance by dt seconds: traffic decides on the state before, all move, contacts resolve.

        Steps longer than 0.05 s are done in equal parts; `collisions` has the contacts of all of them.

        Raises:
            ValueError: dt is not positive.
        """
        if not dt > 0.0:
            raise ValueError(f"a step of {dt} s does not go forward")
        parts = max(1, math.ceil(dt / LONGEST_PART - 1e-6))
        self.collisions = []
        for _ in range(parts):
            count = _step(self.vehicles, self.road.pieces, self._contacts, dt / parts)
            self.collisions += [c for contact in self._contacts[:count] for c in self._report(contact)]
            if len(self.figures):
                count = strike(self.vehicles, self.figures, self._contacts)
                self.collisions += [c for contact in self._contacts[:count] for c in self._report_figure(contact)]
        self.frame += 1
        self.elapsed += dt

    def render(self, camera: Camera, without: int = 0, without_vehicle: int = 0) -> NDArray[np.uint8]:
        """The camera's picture of the present state, (height, width, 4) uint8 BGRA.

        Args:
            camera: where it looks from.
            without: what is not drawn, `shading`'s bits: what the instant would look like if it were not there.
            without_vehicle: id of a vehicle that is not drawn, nor its shadow; 0: none.
        """
        road, pose, width, height, fov, table = self._scene(camera)
        if without_vehicle:
            kept = table.id != without_vehicle
            table = VehicleTable(*(column[kept] for column in table))
        return render(
            road, pose, width, height, fov, table, self.palette, without=without, scenery_seed=self.scenery_seed
        )

    def instances(self, camera: Camera) -> NDArray[np.int32]:
        """What each pixel's centre shows, (height, width) int32: a vehicle's id or one of `shading`'s ID_ constants."""
        return instances(*self._scene(camera), self.scenery_seed)

    def depths(self, camera: Camera) -> NDArray[np.float32]:
        """Metres along the optical axis to what each pixel's centre shows, (height, width) float32, inf for the sky."""
        return depths(*self._scene(camera), self.scenery_seed)

    def scan(self, pose: Pose, beams: Beams, angle: float, seconds: float) -> Scan:
        """What a lidar at a pose (m, rad) sees in a frame of so many seconds that begins at an angle (degrees)."""
        return scan(self.road, pose, self.drawn(), beams, angle, seconds, self.scenery_seed)

    def _scene(self, camera: Camera) -> tuple[Road, Pose, int, int, float, VehicleTable]:
        """The renderer's arguments up to the vehicles."""
        return self.road, self.pose(camera), camera.width, camera.height, camera.fov, self.drawn()

    def pose(self, camera: Camera) -> Pose:
        """Where a camera is now, m and rad."""
        x, y, yaw = camera.x, camera.y, camera.yaw
        if camera.parent:
            row = self.row(camera.parent)
            c, sn = math.cos(row["yaw"]), math.sin(row["yaw"])
            x, y = row["x"] + c * camera.x - sn * camera.y, row["y"] + sn * camera.x + c * camera.y
            yaw += row["yaw"]
        return (x, y, camera.z, camera.pitch, yaw, camera.roll)

    def drawn(self) -> VehicleTable:
        """Vehicles and figures as the renderer takes them."""
        v = self.vehicles
        table = VehicleTable(
            v["id"].astype(np.int32),
            v["kind"].copy(),
            v["x"].copy(),
            v["y"].copy(),
            v["yaw"].copy(),
            v["color"].copy(),
            v["brake_light"].copy(),
        )
        return drawn_with(table, self.figures) if len(self.figures) else table

    def movers(self) -> NDArray[np.float64]:
        """Id, x, y (m), yaw (rad), vx and vy (m/s) of vehicles and figures, (N, 6) in the order of their ids."""
        columns = ("id", "x", "y", "yaw", "vx", "vy")
        table = np.concatenate([np.stack([t[c] for c in columns], axis=1) for t in (self.vehicles, self.figures)])
        return table[np.argsort(table[:, 0], kind="stable")]

    # The whole state.

    def get_state(self) -> dict[str, Any]:
        """The state without the road: ``vehicles`` (N,) of VEHICLE (a copy), ``frame``, ``last_id``, ``elapsed``."""
        return {
            "vehicles": self.vehicles.copy(),
            "frame": self.frame,
            "last_id": self._last_id,
            "elapsed": self.elapsed,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state` of a world on the same road, bit for bit; `collisions` are empty."""
        table = np.asarray(state["vehicles"])
        if table.dtype != VEHICLE:
            raise ValueError("the state's vehicle table is of another version of the simulator")
        self._table = np.zeros(max(16, len(table)), VEHICLE)
        self._table[: len(table)] = table
        self._count = len(table)
        self.frame, self._last_id = int(state["frame"]), int(state["last_id"])
        self.elapsed = float(state["elapsed"])
        self.collisions = []

    # Inside.

    def _pose(self, row: np.void, x: float, y: float, yaw: float) -> None:
        x, y = _f32(x), _f32(y)
        if not math.isfinite(yaw):
            raise ValueError(f"a yaw of {yaw} is not an angle")
        yaw = (yaw + math.pi) % (2.0 * math.pi) - math.pi
        points = self.road.spawn_points
        nearest = points[np.argmin((points[:, 0] - x) ** 2 + (points[:, 1] - y) ** 2)]
        turned = abs((yaw - nearest[2] + math.pi) % (2.0 * math.pi) - math.pi)
        if math.hypot(nearest[0] - x, nearest[1] - y) <= SNAP_DISTANCE and turned <= SNAP_ANGLE:
            x, y, yaw = (float(value) for value in nearest)
        row["x"], row["y"], row["yaw"] = x, y, yaw
        row["s"], row["d"], _ = project_to(self.road.pieces, x, y)

    def _refuse_overlap(self, row: np.void) -> None:
        box = np.array([row["x"], row["y"], row["yaw"], 0.5 * row["length"], 0.5 * row["width"]])
        for other in self.vehicles:
            there = np.array([other["x"], other["y"], other["yaw"], 0.5 * other["length"], 0.5 * other["width"]])
            if box_overlap(box, there)[0] > 0.0:
                raise SpawnCollision(
                    f"vehicle {other['id']} stands where a {KINDS[row['kind']].blueprint} was to be spawned; "
                    "choose another place."
                )
        if static_overlap(row, self.road.pieces)[0] > 0.0:
            raise SpawnCollision(
                f"a {KINDS[row['kind']].blueprint} at ({row['x']:.1f}, {row['y']:.1f}) would stand in the barrier, "
                "in a guard rail or beyond it; choose a place on the road."
            )

    def _append(self, rows: NDArray[np.void]) -> list[int]:
        needed = self._count + len(rows)
        if needed > len(self._table):
            table = np.zeros(max(needed, 2 * len(self._table)), VEHICLE)
            table[: self._count] = self.vehicles
            self._table = table
        new = self._table[self._count : needed]
        new[:] = rows
        new["id"] = [self.new_id() for _ in rows]
        self._count = needed
        return new["id"].tolist()

    def _remove(self, gone: NDArray[np.bool_]) -> int:
        kept = self.vehicles[~gone]
        removed = self._count - len(kept)
        self._table[: len(kept)] = kept
        self._count = len(kept)
        return removed

    def _report_figure(self, contact: NDArray[np.float64]) -> list[Collision]:
        vehicle, figure = self.vehicles[int(contact[0])], self.figures[int(contact[1])]
        x, y = float(contact[2] * contact[4]), float(contact[3] * contact[4])
        return [
            Collision(int(vehicle["id"]), int(figure["id"]), NAMES[figure["shape"]], (-x, -y, 0.0)),
            Collision(int(figure["id"]), int(vehicle["id"]), KINDS[vehicle["kind"]].blueprint, (x, y, 0.0)),
        ]

    def _report(self, contact: NDArray[np.float64]) -> list[Collision]:
        first = self.vehicles[int(contact[0])]
        name = KINDS[first["kind"]].blueprint
        x, y = float(contact[2] * contact[4]), float(contact[3] * contact[4])
        if contact[1] < 0:
            other_name = "static.barrier" if contact[1] == -1 else "static.guardrail"
            return [Collision(int(first["id"]), STATIC, other_name, (-x, -y, 0.0))]
        second = self.vehicles[int(contact[1])]
        return [
            Collision(int(first["id"]), int(second["id"]), KINDS[second["kind"]].blueprint, (-x, -y, 0.0)),
            Collision(int(second["id"]), int(first["id"]), name, (x, y, 0.0)),
        ]
