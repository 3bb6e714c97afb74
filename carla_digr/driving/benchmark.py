"""How fast the embedded highway is: stepped in process, and over CARLA's protocol by the real client.

Both routes drive the same scene: a column of the world's own drivers, every 7 m one in the next lane, and the driving
task's camera on the last of them, so that all are in view as far as one sees. A step is 0.05 s with its picture, drawn
with 2x supersampling; a round trip is ``tick()`` and the picture of that frame in the client's hands.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import carla
from matplotlib.figure import Figure

from carla_digr.driving.control import CAMERA, IMAGE_SIZE, TICK
from carla_digr.driving.session import SensorStream, Session
from carla_digr.errors import UserError
from carla_digr.files import atomic_write
from carla_digr.simulator.road import LANES, Road, lane_center
from carla_digr.simulator.world import Camera, World

STEP_VEHICLES, STEP_GOAL = 28, 1000.0  # environment steps a second that one core must reach, and with how many vehicles
TRIP_VEHICLES, TRIP_GOAL = 20, 600.0  # the same for round trips over the protocol
VEHICLES = (10, 20, 28, 50, 100, 200)
SIZES = (64, 128, 256, 512)  # px, square pictures
GAP = 7.0  # m along the road from one vehicle of the column to the next
BATCH = 5  # steps between looks at the clock
START = 40.0  # m, where the column begins
READY = re.compile(r"ready: .* on 127\.0\.0\.1:(\d+)")


class Rate(NamedTuple):
    """A measured rate: by the clock, and by the processor time that all processes took together.

    The second is what one core does, whatever else runs on the machine.
    """

    per_second: float
    per_cpu_second: float


def benchmark_simulator(out: Path, seconds: float = 1.5) -> bool:
    """Measure, write ``results.json`` and two plots, and print a table.

    Args:
        out: directory for the results, made if need be.
        seconds: how long each of the points is measured.

    Returns:
        Whether one core reaches both goals.

    Raises:
        UserError: ``seconds`` is not positive, ``out`` is no directory or the simulator process does not start.
    """
    if not seconds > 0.0:
        raise UserError(f"A point cannot be measured for {seconds:g} s; choose a positive time.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Results cannot go to {out} ({error.strerror}); choose another directory.") from None
    load = os.getloadavg()
    vehicles: dict[str, dict[int, Rate]] = {"steps": {}, "round_trips": {}}
    sizes: dict[str, dict[int, Rate]] = {"steps": {}, "round_trips": {}}
    routes: dict[str, Callable[[int, int, float], Rate]] = {"steps": measure_steps}
    with _simulator_process() as (port, process):
        routes["round_trips"] = lambda count, size, length: measure_round_trips(port, process, count, size, length)
        for route, measure in routes.items():
            for count in VEHICLES:
                vehicles[route][count] = measure(count, IMAGE_SIZE, seconds)
            for size in SIZES:
                sizes[route][size] = measure(STEP_VEHICLES, size, seconds)
    goals = {
        f"steps/s with picture, {STEP_VEHICLES} vehicles": (vehicles["steps"][STEP_VEHICLES], STEP_GOAL),
        f"round trips/s, {TRIP_VEHICLES} vehicles": (vehicles["round_trips"][TRIP_VEHICLES], TRIP_GOAL),
    }
    results = {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "load_before": load,
        "picture_size": IMAGE_SIZE,
        "by_vehicles": _plain(vehicles),
        "by_picture_size": _plain(sizes),
        "goals": {name: {**rate._asdict(), "goal": goal} for name, (rate, goal) in goals.items()},
    }
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(results, indent=2).encode())
    _plot(out / "vehicles.png", vehicles, f"vehicles on the road (picture {IMAGE_SIZE}x{IMAGE_SIZE})")
    _plot(out / "picture_size.png", sizes, f"side of the picture, pixels ({STEP_VEHICLES} vehicles)")
    for name, (rate, goal) in goals.items():
        verdict = "reached" if rate.per_cpu_second >= goal else "missed"
        rates = f"{rate.per_cpu_second:.0f} on one core, {rate.per_second:.0f} by the clock"
        print(f"{name}: {rates}; goal of {goal:.0f} {verdict}")
    print(f"load average before: {load[0]:.1f} on {os.cpu_count()} cores; results and plots are in {out}")
    return all(rate.per_cpu_second >= goal for rate, goal in goals.values())


def measure_steps(vehicles: int, size: int, seconds: float) -> Rate:
    """Environment steps with picture in this process."""
    road = Road.ring()
    world = World(road)
    ids = world.spawn_traffic(0, vehicles, oncoming=0)
    for actor, place in zip(ids, column(road, vehicles), strict=True):
        world.place(actor, *place)
    camera = Camera(
        parent=ids[0],
        width=size,
        height=size,
        fov=CAMERA["fov"],
        **{k: CAMERA[k] for k in "xyz"},
        **{k: math.radians(CAMERA[k]) for k in ("pitch", "yaw", "roll")},
    )

    def step() -> None:
        world.step(TICK)
        world.render(camera)

    return _rate(step, time.process_time, seconds)


def measure_round_trips(port: int, process: int, vehicles: int, size: int, seconds: float) -> Rate:
    """Ticks with picture by a CARLA client in this process; the simulator is process number ``process``."""
    with Session.connect("127.0.0.1", port) as session:
        before = {actor.id for actor in session.world.get_actors()}
        traffic = session.blueprint("controller.traffic.highway", seed=0, vehicles=vehicles, oncoming=0)
        session.spawn(traffic, carla.Transform())
        session.tick()
        found = session.world.get_actors().filter("vehicle.*")
        drivers = sorted((a for a in found if a.id not in before), key=lambda a: a.id)
        for driver, (x, y, yaw) in zip(drivers, column(Road.ring(), vehicles), strict=True):
            driver.set_transform(carla.Transform(carla.Location(x, y), carla.Rotation(yaw=math.degrees(yaw))))
        blueprint = session.blueprint("sensor.camera.rgb", image_size_x=size, image_size_y=size, fov=CAMERA["fov"])
        place = carla.Transform(
            carla.Location(CAMERA["x"], CAMERA["y"], CAMERA["z"]), carla.Rotation(pitch=CAMERA["pitch"])
        )
        pictures = SensorStream(session, session.spawn(blueprint, place, drivers[0]))
        ticks = os.sysconf("SC_CLK_TCK")

        def processor_time() -> float:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            return time.process_time() + (int(fields[11]) + int(fields[12])) / ticks

        return _rate(lambda: pictures.take(session.tick().frame), processor_time, seconds)


def column(road: Road, vehicles: int) -> list[tuple[float, float, float]]:
    """x, y (m) and yaw (rad) of each vehicle of the scene."""
    places = (road.pose(START + GAP * i, lane_center((i + 1) % LANES)) for i in range(vehicles))
    return [(float(x), float(y), float(yaw)) for x, y, yaw in places]


def _rate(action: Callable[[], object], processor_time: Callable[[], float], seconds: float) -> Rate:
    for _ in range(BATCH):
        action()
    count, start, used = 0, time.perf_counter(), processor_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(BATCH):
            action()
        count += BATCH
    return Rate(count / elapsed, count / max(processor_time() - used, 1e-9))


@contextlib.contextmanager
def _simulator_process() -> Iterator[tuple[int, int]]:
    """A simulator of our own: its port and its process id."""
    command = [sys.executable, "-m", "carla_digr.simulator.server", "--port", "0", "--parent", str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = READY.search(process.stdout.readline())
            if found is None:
                raise UserError("The simulator did not start; run 'carla-digr simulator' to see why.")
            yield int(found[1]), process.pid
        finally:
            process.terminate()


def _plain(rates: dict[str, dict[int, Rate]]) -> dict[str, Any]:
    return {route: {str(n): rate._asdict() for n, rate in points.items()} for route, points in rates.items()}


def _plot(path: Path, rates: dict[str, dict[int, Rate]], label: str) -> None:
    figure = Figure(figsize=(7.0, 4.5))
    axes = figure.subplots()
    names = {"steps": "steps in process", "round_trips": "round trips over CARLA's protocol"}
    for color, (route, points) in zip(("tab:blue", "tab:orange"), rates.items(), strict=True):
        for style, field, how in (("o-", "per_cpu_second", "one core"), ("x:", "per_second", "by the clock")):
            values = [getattr(rate, field) for rate in points.values()]
            axes.plot(list(points), values, style, color=color, label=f"{names[route]}, {how}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(next(iter(rates.values()))), [str(n) for n in next(iter(rates.values()))])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("a second")
    values = [rate for points in rates.values() for rate in points.values()]
    if max(values).per_second > 5.0 * min(values).per_second:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")


def _processor() -> str:
    """The processor's name, as Linux has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
