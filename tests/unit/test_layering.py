"""The walls between the parts: who may import whom, and a library that needs neither CARLA nor ROS nor a display."""

from __future__ import annotations

import ast
import graphlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "carla_digr"

# The rooms from the ground up: each imports from those before it only, on any line of its files.
FLOORS = (
    *("errors", "images", "files", "registry", "config", "distributions", "scheduling"),
    *("simulator", "driving", "policy", "onnx_operators", "networks", "checkpoint", "importing", "saliency"),
    *("tasks", "attacks", "training", "explainer", "objects", "api"),
    *("evaluation", "recordings", "live", "cli"),
)
KNOWS_NO_JOB = tuple(
    f"carla_digr.{room}" for room in ("training", "evaluation", "simulator", "tasks", "driving", "recordings", "live")
)
# part -> prefixes of modules it must not import
WALLS = {
    "policy.py": KNOWS_NO_JOB,
    "attacks.py": KNOWS_NO_JOB,
    "checkpoint.py": KNOWS_NO_JOB,
    "explainer.py": KNOWS_NO_JOB,
    "importing": KNOWS_NO_JOB,
    "networks.py": KNOWS_NO_JOB,
    "onnx_operators.py": KNOWS_NO_JOB,
    "saliency": (*KNOWS_NO_JOB, "carla_digr.explainer"),
    "simulator": ("carla_digr.training", "carla_digr.driving", "carla_digr.live", "carla_digr.tasks", "torch"),
    "driving": ("carla_digr.training", "carla_digr.tasks", "carla_digr.live", "torch"),
    "tasks": (
        "carla_digr.training",
        "carla_digr.evaluation",
        "carla_digr.live",
        "carla_digr.recordings",
        "stable_baselines3",
    ),
    "training": ("carla_digr.evaluation", "carla_digr.live", "carla_digr.recordings"),
    "evaluation": ("carla_digr.live", "carla_digr.recordings"),
    "recordings": (
        "carla_digr.training",
        "carla_digr.evaluation",
        "carla_digr.simulator",
        "carla_digr.live",
        "stable_baselines3",
    ),
    "live": ("carla_digr.training", "carla_digr.evaluation", "carla_digr.simulator", "stable_baselines3"),
}
PROTOCOL_CODE = {
    "__init__.py",
    "blueprints.py",
    "batches.py",
    "calls.py",
    "connections.py",
    "entries.py",
    "episode.py",
    "frames.py",
    "measuring.py",
    "playback.py",
    "process.py",
    "recorder_calls.py",
    "recording.py",
    "queries.py",
    "refusals.py",
    "retelling.py",
    "rpc.py",
    "sensors.py",
    "server.py",
    "streaming.py",
    "walker_calls.py",
    "walkers.py",
    "wire.py",
}
PROTOCOL = (
    *(f"carla_digr.simulator.{name.removesuffix('.py')}" for name in PROTOCOL_CODE - {"__init__.py"}),
    "msgpack",
    "socket",
    "asyncio",
)


def is_module(name: str) -> bool:
    """Whether it is one of ours, not what stands in one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth of the file."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names
            if not all(is_module(name) for name in names):
                found.add(base)
    return found


def crosses(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def files(part: str) -> list[Path]:
    path = LIBRARY / part
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", WALLS)
def test_a_part_imports_nothing_behind_its_wall(part):
    assert files(part)
    for path in files(part):
        assert not {m for m in imports(path) if crosses(m, WALLS[part])}, path


def test_no_import_runs_upwards():
    rooms = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms == {*FLOORS, "__init__"}, "a new room needs its floor"
    for floor, room in enumerate(FLOORS):
        higher = tuple(f"carla_digr.{name}" for name in FLOORS[floor + 1 :])
        for path in files(room if (LIBRARY / room).is_dir() else f"{room}.py"):
            assert not {m for m in imports(path) if crosses(m, higher)}, path


def test_no_imports_run_in_a_circle():
    """Of modules, wherever in a file an import stands: a circle that a function hides is one all the same."""

    def name(path: Path) -> str:
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    known = {name(path): path for path in LIBRARY.rglob("*.py")}
    graph = {module: imports(path) & known.keys() - {module} for module, path in known.items()}
    graph["carla_digr"] = set()  # names what others define, for its users
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which has the circle


def test_world_code_knows_no_protocol():
    world = [path for path in files("simulator") if path.name not in PROTOCOL_CODE and path.parent.name != "awkward"]
    assert {"road.py", "world.py", "traffic.py", "renderer.py"} <= {path.name for path in world}
    for path in world:
        assert not {m for m in imports(path) if crosses(m, PROTOCOL)}, path


def test_only_driving_imports_carla_and_only_the_workspace_imports_ros():
    for path in LIBRARY.rglob("*.py"):
        found = imports(path)
        if path.parent != LIBRARY / "driving":
            assert not {m for m in found if crosses(m, ("carla",))}, path
        assert not {m for m in found if crosses(m, ("rclpy", "sensor_msgs", "launch", "ament_index_python"))}, path


def test_only_the_cluster_imports_ray_and_only_a_job_that_is_asked_for_it_imports_the_cluster():
    for path in LIBRARY.rglob("*.py"):
        assert path == LIBRARY / "training" / "cluster.py" or not {m for m in imports(path) if crosses(m, ("ray",))}
    script = "import sys, carla_digr.cli, carla_digr.training.teacher, carla_digr.evaluation.evaluate\n"
    script += "sys.exit('ray' in sys.modules or 'carla_digr.training.cluster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=240).returncode == 0


def test_nothing_imports_the_command_line():
    others = [path for path in LIBRARY.rglob("*.py") if LIBRARY / "cli" not in path.parents]
    for path in [*others, *(ROOT / "ros2_ws" / "src").rglob("*.py")]:
        assert not {m for m in imports(path) if crosses(m, ("carla_digr.cli",))}, path


@pytest.mark.slow
def test_the_library_imports_without_carla_ros_or_a_display():
    modules = [
        m.name
        for m in pkgutil.walk_packages([str(LIBRARY)], "carla_digr.")
        if not m.name.startswith("carla_digr.driving.") or m.name == "carla_digr.driving.control"
    ]
    assert "carla_digr.simulator.road" in modules
    script = (
        "import importlib, sys\n"
        "class Wall:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('carla', 'rclpy'):\n"
        "            raise ImportError(name + ' is not installed')\n"
        "sys.meta_path.insert(0, Wall())\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "AMENT_PREFIX_PATH")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
