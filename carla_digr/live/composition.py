"""What runs in a live drive and in a replay: one description for `ros2 launch` and for `carla-digr live|replay`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from carla_digr.errors import REFUSED, UserError, ending
from carla_digr.files import shipped
from carla_digr.recordings.topics import IMAGE, ODOMETRY
from carla_digr.saliency import DEFAULT, METHODS

WEIGHTS = Path(__file__).parents[1] / "weights" / "driving_calm_student.safetensors"
ATTACKS = ("fgsm", "pgd")  # those of carla_digr.attacks, which needs torch, that fit into a frame
PACKAGE = "carla_digr_ros"
PARAMETERS_FILE = "configs/live.yaml"  # in the package's share directory
PAGE_IS_AT = "The page is at "  # how the viewer says that its page answers
# The first start compiles the embedded highway; a CARLA server is there or it is not.
START_SECONDS = {"embedded": 120.0, "carla": 0.0}
# The carla client aborts its process when a server hangs or dies while the client's Traffic Manager runs; the bridge
# does so itself when a call of the client never ends.
BRIDGE_RESPAWNS = 3
RESPAWN_SECONDS = 60.0  # that the server has then to be back
ONLOOKER_RESPAWNS = 3


YES_NO = ("true", "false", "True", "False")
LOG_LEVELS = ("", "debug", "info", "warn", "error", "fatal")


@dataclass(frozen=True)
class Argument:
    """One setting of a drive or a replay, as text; ``choices`` empty: anything."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


FAST_METHODS = tuple(name for name, method in METHODS.loadable().items() if method.speed == "frame")
# What all nodes take.
NODES = (
    Argument("namespace", "", "where the drive's nodes and topics are, such as car2: for several drives in one domain"),
    Argument("params_file", "", "a YAML file with parameters of the nodes, on top of those that ship"),
    Argument("log_level", "", "what the nodes log: debug, info, warn, error or fatal", LOG_LEVELS),
)
# How a policy is explained, in a drive as in a replay.
EXPLANATION = (
    Argument("target", "", "explain this action, by name or number, instead of the one that was decided on"),
    Argument("wrong_size", "", "refuse or resize pictures of another size than the policy's (default: refuse)"),
    Argument("module", "", "the policy's own code, package.module:factory, if its card asks for it"),
)
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
    Argument("weights", str(WEIGHTS), "policy that drives and is explained: a file, or the name of one that ships"),
    Argument("method", DEFAULT, "how the maps are computed: a method that fits into a frame", FAST_METHODS),
    *EXPLANATION,
    Argument("lockstep", "false", "wait for every decision instead of driving at 20 Hz", YES_NO),
    Argument(
        "realtime",
        "true",
        "simulator, bridge and explainer go before the machine's other programs where the system allows it (rtprio), "
        "but for in lockstep",
        YES_NO,
    ),
    Argument("viewer", "true", "serve the web page", YES_NO),
    Argument("viewer_port", "8765", "port of the web page on 127.0.0.1"),
    Argument("record", "false", "record the drive as a new bag in this directory (true: in recordings)"),
    *NODES,
)
REPLAY_ARGUMENTS = (
    Argument("bag", "", "the recording: a bag's directory, or its .mcap or .db3 file"),
    Argument("rate", "1.0", "speed of the replay; 2.0 is twice as fast as the drive was"),
    Argument("start", "0.0", "seconds of the recording that are left out at its beginning"),
    Argument("duration", "0.0", "seconds of the recording to replay; 0: to its end"),
    Argument("loop", "false", "begin again at the end", YES_NO),
    Argument("paused", "false", "begin with a pause; /player/pause and /player/step go on", YES_NO),
    Argument("camera", IMAGE, "the topic with the pictures, raw or compressed"),
    Argument("odometry", ODOMETRY, "the topic with the car's motion"),
    Argument("crop", "", "show and explain this part of each picture: x,y,w,h in pixels (default: all of it)"),
    Argument("remap", "", "topics to publish under other names: /old:=/new, several separated by commas"),
    Argument(
        "method",
        "recorded",
        "show what was recorded, or explain the pictures anew by this method",
        ("recorded", *METHODS),
    ),
    Argument("weights", str(WEIGHTS), "policy that explains anew: a file, or the name of one that ships"),
    *EXPLANATION,
    Argument("viewer", "true", "serve the web page", YES_NO),
    Argument("viewer_port", "8765", "port of the web page on 127.0.0.1"),
    *NODES,
)


@dataclass(frozen=True)
class Process:
    """One process of a drive: an executable of PACKAGE, which is a ROS node, or a Python module.

    ``parameters`` are the node's, on top of those in PARAMETERS_FILE and ``params_file``; ``remappings`` give topics
    of its ``namespace`` other names. ``tidies_up``: it has something to leave in order (a CARLA server, a recording),
    so it is asked to end, not killed, when its supervisor dies. ``respawns``: how often it is started again after a
    signal has killed it (a status it ends with itself always ends the drive), then with ``respawn_parameters`` too.
    ``finite``: when it ends with status 0 its work is done, and all others end too. ``onlooker``: nothing of the drive
    needs it, so whatever ends it but its own refusal to start, it is started again, or the drive goes on without it.
    ``restarted``: it takes the place of one that has ended.
    """

    name: str
    module: str = ""
    arguments: tuple[str, ...] = ()
    parameters: Mapping[str, bool | int | float | str | list[str]] = field(default_factory=dict)
    remappings: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""
    params_file: str = ""
    log_level: str = ""
    tidies_up: bool = False
    respawns: int = 0
    respawn_parameters: Mapping[str, float] = field(default_factory=dict)
    finite: bool = False
    onlooker: bool = False
    restarted: bool = False

    def ros_arguments(self, share: Path) -> list[str]:
        """What follows `--ros-args` on the node's command line; ``share`` is PACKAGE's share directory."""
        arguments = ["--params-file", str(share / PARAMETERS_FILE)]
        if self.params_file:
            arguments += ["--params-file", self.params_file]
        for name, value in self.parameters.items():
            arguments += ["-p", f"{name}:={json.dumps(value)}"]  # JSON is YAML, and quotes what looks like a number
        for old, new in self.remappings.items():
            arguments += ["-r", f"{old.lstrip('/')}:={new}"]  # a relative name is that of the node's namespace
        if self.namespace:
            arguments += ["-r", f"__ns:={self.namespace}"]
        if self.log_level:
            arguments += ["--log-level", self.log_level]
        return arguments

    def ends_everything(self, status: int) -> bool:
        """Whether the others end when this one has ended with a status that says nothing good."""
        if self.onlooker:  # a shutdown is wanted, bad input is told at once, and a measurement is what was asked for
            return status == 0 or (status == REFUSED and not self.restarted) or (self.finite and not self.respawns)
        return status >= 0 or not self.respawns

    def again(self) -> Process | None:
        """What is started in its place, if anything is."""
        if not self.respawns:
            return None
        parameters = {**self.parameters, **self.respawn_parameters}
        return replace(self, respawns=self.respawns - 1, parameters=parameters, restarted=True)


def restart_notice(process: Process, status: int) -> str:
    """What to tell when a process has ended that does not end the others."""
    if not process.respawns:
        return f"{process.name} {ending(status)} once more; the drive goes on without it"
    return f"{process.name} {ending(status)}; starting it again ({process.respawns - 1} more such ends are allowed)"


def shutdown_notice(process: Process) -> str:
    """What to tell when a node of a drive was shut down, which ends the drive well."""
    return f"{process.name} has been shut down, so everything ends"


def plain(values: Mapping[str, str]) -> dict[str, str]:
    """The values of arguments with true and false as they are compared here; Python's True and False mean the same."""
    return {name: text.lower() if text in YES_NO else text for name, text in values.items()}


def in_place(processes: list[Process], values: Mapping[str, str]) -> list[Process]:
    """The processes with what the values of NODES say of all nodes.

    Raises:
        UserError: there is no such parameter file, or no such namespace can be.
    """
    name, file = values["namespace"].strip("/"), values["params_file"]
    if name and not re.fullmatch(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*", name):
        raise UserError(f"The argument namespace must be a name such as car2, not {values['namespace']!r}.")
    if file and not Path(file).is_file():
        raise UserError(f"There is no parameter file {file}.")
    space, path, level = f"/{name}" if name else "", str(Path(file).absolute()) if file else "", values["log_level"]
    return [
        process if process.module else replace(process, namespace=space, params_file=path, log_level=level)
        for process in processes
    ]


def wants_realtime(values: Mapping[str, str]) -> bool:
    """Whether a drive asks for real-time scheduling: one that waits for its decisions need not go first."""
    return values["realtime"] == "true" and values["lockstep"] != "true"


def live(values: Mapping[str, str]) -> list[Process]:
    """The processes of a drive, in the order in which they are started.

    Args:
        values: one text for each of ARGUMENTS.

    Raises:
        UserError: a value is not of its argument's kind.
    """
    from carla_digr.driving.control import IMAGE_SIZE  # numpy, which help does without

    values = plain(values)
    simulator, lockstep = values["simulator"], values["lockstep"] == "true"
    realtime = wants_realtime(values)
    host = "127.0.0.1" if simulator == "embedded" else values["host"]
    port = whole_number("port", values["port"], 1, 65534)
    processes = []
    if simulator == "embedded":
        arguments = ["simulator", "--host", host, "--port", str(port), "--parent", str(os.getpid())]
        arguments += ["--realtime"] if realtime else []
        processes.append(Process("simulator", module="carla_digr.cli", arguments=tuple(arguments)))
    recording = values["record"] not in ("false", "")
    if recording:
        directory = "recordings" if values["record"] == "true" else values["record"]
        parameters = {"directory": str(Path(directory).absolute()), "weights": _weights(values)}
        recorder = Process("recorder", parameters=parameters, tidies_up=True)
        processes.append(replace(recorder, onlooker=True, respawns=ONLOOKER_RESPAWNS))
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
                "realtime": realtime,
                "listeners": ["recorder"] if recording else [""],
            },
            tidies_up=True,
            respawns=BRIDGE_RESPAWNS,
            respawn_parameters={"start_seconds": max(START_SECONDS[simulator], RESPAWN_SECONDS)},
        ),
        Process("explainer", parameters={**_explainer(values, camera=IMAGE_SIZE), "realtime": realtime}),
    ]
    return in_place([*processes, *_viewer(values)], values)


def replay(values: Mapping[str, str]) -> list[Process]:
    """The processes of a replay, in the order in which they are started; `player` ends with the recording.

    Args:
        values: one text for each of REPLAY_ARGUMENTS.

    Raises:
        UserError: a value is not of its argument's kind, or no bag is named.
    """
    values = plain(values)
    if not values["bag"]:
        raise UserError("Name the recording to replay: bag:=DIRECTORY.")
    processes = _viewer(values, replays=True)
    anew = values["method"] != "recorded"
    if anew:
        processes.append(Process("explainer", parameters=_explainer(values, camera=0)))
    player = Process(
        "player",
        parameters={
            "bag": str(Path(values["bag"]).absolute()),
            "rate": number("rate", values["rate"], 0.01, 100.0),
            "start": number("start", values["start"], 0.0, 1e9),
            "duration": number("duration", values["duration"], 0.0, 1e9),
            "loop": values["loop"] == "true",
            "paused": values["paused"] == "true",
            "explanations": not anew,
            "camera": values["camera"],
            "odometry": values["odometry"],
            "crop": values["crop"],
            "listeners": [process.name for process in processes] or [""],
        },
        remappings=remappings(values["remap"]),
        finite=True,
    )
    return in_place([*processes, player], values)


def _explainer(values: Mapping[str, str], camera: int) -> dict[str, bool | int | float | str | list[str]]:
    given = {argument.name: values[argument.name] for argument in EXPLANATION if values[argument.name]}
    return {"weights": _weights(values), "method": values["method"], **given, "camera": camera, "drives": camera > 0}


def _weights(values: Mapping[str, str]) -> str:
    return str(shipped(values["weights"], WEIGHTS.parent, WEIGHTS.suffix))


def _viewer(values: Mapping[str, str], replays: bool = False) -> list[Process]:
    if values["viewer"] != "true":
        return []
    port = whole_number("viewer_port", values["viewer_port"], 1, 65535)
    shown: dict[str, bool | int] = {"port": port, **({"replays": True} if replays else {})}
    return [Process("viewer", parameters=shown, onlooker=True, respawns=ONLOOKER_RESPAWNS)]


def remappings(text: str) -> dict[str, str]:
    """ "/old:=/new, /a:=/b" as a table.

    Raises:
        UserError: a part is not of this kind.
    """
    table = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        old, separator, new = part.partition(":=")
        if not separator or not all(re.fullmatch(r"/?\w+(/\w+)*", name) for name in (old, new)):
            raise UserError(f"The argument remap must be /old:=/new, several separated by commas, not {part!r}.")
        table[old] = new
    return table


def number(name: str, text: str, smallest: float, largest: float) -> float:
    """The number that an argument's text stands for.

    Raises:
        UserError: it is none, or out of range.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not smallest <= value <= largest:
        raise UserError(f"{name} must be a number from {smallest:g} to {largest:g}, not {text!r}.")
    return value


def whole_number(name: str, text: str, smallest: int, largest: int) -> int:
    """The number that an argument's text stands for.

    Raises:
        UserError: it is none, or out of range.
    """
    if not text.isdecimal() or not smallest <= int(text) <= largest:
        raise UserError(f"{name} must be a whole number from {smallest} to {largest}, not {text!r}.")
    return int(text)
