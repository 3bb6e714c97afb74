"""The embedded highway stepped in this process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import (
    CAMERA,
    CRUISE_SPEED,
    EGO_BLUEPRINT,
    IMAGE_SIZE,
    TICK,
    DriveFrame,
    VehicleCommand,
    pedals,
    signed_speed,
    start_index,
    steering,
)
from carla_digr.driving.lane import lane_curvature
from carla_digr.simulator.palette import drawn_palette
from carla_digr.simulator.road import MEDIAN_HALF_WIDTH, ROAD_EDGE, Road, project_to
from carla_digr.simulator.scenery import SCENERIES
from carla_digr.simulator.shading import WITHOUT_BUILDINGS, WITHOUT_TREES
from carla_digr.simulator.traffic import ONCOMING
from carla_digr.simulator.vehicle import KINDS
from carla_digr.simulator.world import Camera, World
from carla_digr.tasks.driving.classes import SAMPLES, class_picture
from carla_digr.tasks.driving.reward import hazards, in_lanes, reward
from carla_digr.tasks.driving.settings import DrivingConfig

SCENES = 2**20  # that can be drawn
_BLACK = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
EGO_KIND = [kind.blueprint for kind in KINDS].index(EGO_BLUEPRINT)


class InProcessDrive:
    """The embedded highway stepped in this process: what training drives on.

    Implements :class:`carla_digr.driving.control.Drive`; the same seed and commands give the same frames as a
    :class:`carla_digr.driving.scenario.Scenario` on the simulator process.

    Args:
        vehicles: others on the ego's carriageway.
        road: to drive on, by default the ring.
        random_scenery: share of the episodes that have another weather, other trees and other houses, drawn from
            their seed.

    Attributes:
        blind: nobody looks: frames have a black picture, which costs nothing.
    """

    def __init__(self, vehicles: int = 64, road: Road | None = None, random_scenery: float = 0.0):
        self.vehicles = vehicles
        self.random_scenery = random_scenery
        self.road = road or Road.ring()
        self.world = World(self.road)
        self.ego = 0
        self.scene = 0
        self.blind = False

    def reset(self, seed: int) -> DriveFrame:
        """Start an episode; see :meth:`Drive.reset`."""
        self.world = World(self.road)
        points = self.road.spawn_points
        x, y, yaw = points[start_index(seed, len(points))]
        self._mount(self.world.spawn_vehicle(EGO_KIND, x, y, yaw))
        self.world.set_target_velocity(self.ego, CRUISE_SPEED * math.cos(yaw), CRUISE_SPEED * math.sin(yaw))
        self.world.spawn_traffic(seed, self.vehicles, self.ego)
        self.world.step(TICK)
        draw = np.random.default_rng((seed, SCENES))
        self.set_scene(int(draw.integers(1, SCENES)) if draw.random() < self.random_scenery else 0)
        return self.frame()

    def set_scene(self, scene: int) -> None:
        """Drive on under this weather, among these trees and houses; 0: the usual ones."""
        self.scene = scene
        draw = np.random.default_rng(scene)
        self.world.palette = drawn_palette(draw) if scene else 0
        self.world.scenery_seed = int(draw.integers(1, SCENERIES)) if scene else 0

    def picture_in(self, scene: int) -> NDArray[np.uint8]:
        """The present picture in another scene, 0: in its own, but without trees and houses; uint8 (3, H, W)."""
        own = self.scene
        self.set_scene(scene or own)
        picture = self.world.render(self.camera, without=0 if scene else WITHOUT_TREES | WITHOUT_BUILDINGS)
        self.set_scene(own)
        return picture[:, :, 2::-1].transpose(2, 0, 1)

    def _mount(self, ego: int) -> None:
        """Make a vehicle the ego, with the task's camera on it."""
        self.ego = ego
        self.camera = Camera(
            parent=ego,
            x=CAMERA["x"],
            y=CAMERA["y"],
            z=CAMERA["z"],
            pitch=math.radians(CAMERA["pitch"]),
            yaw=math.radians(CAMERA["yaw"]),
            roll=math.radians(CAMERA["roll"]),
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            fov=CAMERA["fov"],
        )

    def advance(self, wanted: VehicleCommand) -> None:
        """Apply a command and advance one tick without a picture."""
        throttle, brake = pedals(wanted, self.speed())
        self.world.set_control(
            self.ego, throttle, steering(wanted, self.curvature() if wanted.along_lane else 0.0), brake
        )
        self.world.step(TICK)

    def curvature(self) -> float:
        """Of the ego's lane, 1/m, from where the ego can be seen to be over CARLA's protocol too."""
        ego = self.world.row(self.ego)
        x, y, yaw = (float(np.float32(ego[name])) for name in ("x", "y", "yaw"))
        return lane_curvature(self.road.pieces, x, y, yaw)

    def speed(self) -> float:
        """The ego's speed in m/s, as it can be seen over CARLA's protocol too."""
        ego = self.world.row(self.ego)
        return signed_speed(ego["vx"], ego["vy"], ego["yaw"])

    def step(self, wanted: VehicleCommand) -> DriveFrame:
        """Apply a command, advance 0.05 s and return the frame."""
        self.advance(wanted)
        return self.frame()

    def incident(self) -> tuple[str | None, bool, bool, bool]:
        """What the ego hit in the last tick, whether its centre is off the driving lanes, and what never happens here:
        that the road ends, or that somebody drives into it."""
        hits = [contact.other_name for contact in self.world.collisions if contact.id == self.ego]
        off_road = not MEDIAN_HALF_WIDTH < self.world.row(self.ego)["d"] < ROAD_EDGE
        return (hits[0] if hits else None), off_road, False, False

    def ahead(self) -> dict[int, float]:
        """m along the road from the ego to each vehicle of its carriageway, in [-ring / 2, ring / 2), by their ids."""
        ring, vehicles = self.road.length, self.world.vehicles
        relative = (vehicles["s"] - self.world.row(self.ego)["s"] + 0.5 * ring) % ring - 0.5 * ring
        others = (vehicles["driver"] != ONCOMING) & (vehicles["id"] != self.ego)
        return dict(zip(vehicles["id"][others].tolist(), relative[others].tolist(), strict=True))

    def frame(self) -> DriveFrame:
        """The present frame with its picture."""
        ego = self.world.row(self.ego)
        collision, off_road, *_ = self.incident()
        return DriveFrame(
            frame=self.world.frame,
            stamp=self.world.elapsed,
            image=_BLACK if self.blind else self.world.render(self.camera)[:, :, 2::-1],
            x=float(np.float32(ego["x"])),
            y=float(np.float32(ego["y"])),
            yaw=float(np.float32(ego["yaw"])),
            speed=self.speed(),
            collision=collision,
            off_road=off_road,
        )

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the present picture shows, int8 (H, W); see driving.classes."""
        size = IMAGE_SIZE * SAMPLES
        return class_picture(self.world.instances(replace(self.camera, width=size, height=size)), self.ego)

    def reward(self, config: DrivingConfig, seconds: float) -> float:
        """Reward of the last ``seconds`` if nothing ended in them."""
        ego = self.world.row(self.ego)
        closing, alongside = hazards(self.world.vehicles, self.world.index(self.ego), self.road.length)
        heading = project_to(self.road.pieces, ego["x"], ego["y"])[2]
        drift = float(ego["speed"] * math.sin(ego["yaw"] - heading))
        return reward(config, seconds, self.speed(), in_lanes(ego["d"]), drift, closing, alongside)

    def restore(self, state: dict[str, Any], ego: int) -> None:
        """Continue from ``World.get_state`` with the ego of this id."""
        self.world = World(self.road)
        self.world.set_state(state)
        self._mount(ego)

    def close(self) -> None:
        """Nothing to release."""
