"""What runs in a live drive: one description for `ros2 launch` and for `carla-digr live`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from carla_digr.errors import UserError

WEIGHTS = Path(__file__).parents[1] / "weights" / "driving_student.safetensors"
PACKAGE = "carla_digr_ros"
PARAMETERS_FILE = "configs/live.yaml"  # in the package's share directory
PAGE_IS_AT = "The page is at "  # how the viewer says that its page answers
# The first start compiles the embedded highway; a CARLA server is there or it is not.
START_SECONDS = {"embedded": 120.0, "carla": 0.0}
# The carla client aborts its process when a server hangs while the client's Traffic Manager runs.
BRIDGE_RESPAWNS = 3


@dataclass(frozen=True)
class Argument:
    """One setting of a drive, as text; ``choices`` empty: anything."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


ARGUMENTS = (
    Argument(
        "simulator",
        "embedded",
        "drive on the embedded highway, which is started too, or on a CARLA 0.9.16 server that runs already",
        ("embedded", "carla"),
    ),
    Argument("host", "127.0.0.1", "where the CARLA server runs; the embedded highway always runs on this machine"),
    Argument("port", "2000", "the simulator's port; it also uses the next one"),
    Argument("seed", "1", "of the first episode (place and traffic); every further episode adds 1"),
    Argument("weights", str(WEIGHTS), "policy that drives and is explained"),
    Argument("lockstep", "false", "wait for every decision instead of driving at 20 Hz", ("true", "false")),
    Argument("viewer", "true", "serve the web page", ("true", "false")),
    Argument("viewer_port", "8765", "port of the web page on 127.0.0.1"),
)


@dataclass(frozen=True)
class Process:
    """One process of a drive: an executable of PACKAGE, which is a ROS node, or a Python module.

    ``parameters`` are the node's, on top of those in PARAMETERS_FILE. ``tidies_up``: it has a CARLA server to leave
    in order, so it is asked to end, not killed, when its supervisor dies. ``respawns``: how often it is started again
    after a signal has killed it (a status it ends with itself always ends the drive).
    """

    name: str
    module: str = ""
    arguments: tuple[str, ...] = ()
    parameters: Mapping[str, bool | int | float | str | list[str]] = field(default_factory=dict)
    tidies_up: bool = False
    respawns: int = 0


def live(values: Mapping[str, str]) -> list[Process]:
    """The processes of a drive, in the order in which they are started.

    Args:
        values: one text for each of ARGUMENTS.

    Raises:
        UserError: a value is not of its argument's kind.
    """
    simulator, lockstep = values["simulator"], values["lockstep"] == "true"
    host = "127.0.0.1" if simulator == "embedded" else values["host"]
    port = whole_number("port", values["port"], 1, 65534)
    processes = []
    if simulator == "embedded":
        arguments = ("simulator", "--host", host, "--port", str(port))
        processes.append(Process("simulator", module="carla_digr.cli", arguments=arguments))
    processes += [
        Process(
            "carla_bridge",
            parameters={
                "simulator": simulator,
                "host": host,
                "port": port,
                "start_seconds": START_SECONDS[simulator],
                "seed": whole_number("seed", values["seed"], 0, 2**31 - 1),
                "lockstep": lockstep,
            },
            tidies_up=True,
            respawns=BRIDGE_RESPAWNS,
        ),
        Process("explainer", parameters={"weights": values["weights"]}),
    ]
    if values["viewer"] == "true":
        port = whole_number("viewer_port", values["viewer_port"], 1, 65535)
        processes.append(Process("viewer", parameters={"port": port}))
    return processes


def whole_number(name: str, text: str, smallest: int, largest: int) -> int:
    """The number that an argument's text stands for.

    Raises:
        UserError: it is none, or out of range.
    """
    if not text.isdecimal() or not smallest <= int(text) <= largest:
        raise UserError(f"{name} must be a whole number from {smallest} to {largest}, not {text!r}.")
    return int(text)
