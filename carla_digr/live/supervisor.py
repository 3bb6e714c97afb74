"""`carla-digr live|replay`: the processes of a drive, started together and ended together, without a ROS installation.

What `ros2 launch carla_digr_ros live.launch.py` does where ROS 2 is installed, from the same composition. Every
process runs in a session of its own, so a Ctrl-C in the terminal reaches the supervisor only, and dies with the
supervisor even when that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from carla_digr.errors import UserError, ending
from carla_digr.files import atomic_write
from carla_digr.live.child import Child
from carla_digr.live.composition import (
    ONLOOKER_RESPAWNS,
    PACKAGE,
    PAGE_IS_AT,
    Process,
    in_place,
    live,
    plain,
    replay,
    restart_notice,
    shutdown_notice,
    wants_realtime,
)
from carla_digr.live.viewer.control import TOKEN, new_token

WORKSPACE = Path(__file__).parents[2] / "ros2_ws"
SETUP = WORKSPACE / "install" / "setup.bash"
END_SECONDS = 5.0  # that a process has after each request to end
PR_SET_PDEATHSIG = 1
CLAIM = "carla_digr-ros-domain-"  # name of the socket by which a drive claims its ROS domain
LIBC = ctypes.CDLL(None)


def run_live(
    values: Mapping[str, str],
    duration: float | None = None,
    report: Path | None = None,
    headless: bool = False,
    verbose: bool = False,
) -> int:
    """Drive until Ctrl-C, or until ``duration`` seconds have been measured.

    Args:
        values: a text for each of `composition.ARGUMENTS`.
        duration: seconds to measure; None: no measurement, no end.
        report: where the figures of the measurement go, as JSON.
        headless: the measurement reads the web page itself, in place of a browser.
        verbose: show everything the processes say instead of warnings and errors.

    Returns:
        Exit status: 0 after Ctrl-C or when the measured figures hold, 1 when they do not, 130 when a measurement was
        interrupted.

    Raises:
        UserError: bad input, or a process that has died.
    """
    if duration is not None and not 1.0 <= duration <= 86400.0:
        raise UserError(f"--duration must lie between 1 and 86400 seconds, not {duration:g}.")
    if duration is None and (report is not None or headless):
        raise UserError("--out and --headless need --duration: how long to measure, in seconds.")
    values = plain(values)
    processes = live(values)
    with started(processes, verbose) as supervisor:
        if values["simulator"] == "embedded":
            print("Starting the drive; if the simulator is not compiled yet, that takes a minute.", flush=True)
        if duration is not None:
            page = f"http://127.0.0.1:{values['viewer_port']}/" if headless and values["viewer"] == "true" else ""
            measured_by = measurement(duration, supervisor.pids(), page, wants_realtime(values))
            supervisor.start(*in_place([measured_by], values))
        measured = supervisor.watch()
    if measured is not None:
        return conclude(measured.data, report)
    return 0 if duration is None else 130


def run_replay(values: Mapping[str, str], verbose: bool = False) -> int:
    """Replay a recording until its end or Ctrl-C.

    Args:
        values: a text for each of `composition.REPLAY_ARGUMENTS`.
        verbose: show everything the processes say instead of warnings and errors.

    Returns:
        Exit status 0.

    Raises:
        UserError: bad input, or a process that has died.
    """
    with started(replay(values), verbose) as supervisor:
        supervisor.watch()
    return 0


def run_ctl(words: list[str], namespace: str = "", domain: int | None = None) -> int:
    """Say one thing to a running drive.

    Args:
        words: what to say; carla_digr_ros.ctl has the table.
        namespace: of the drive.
        domain: its ROS domain; None: ROS_DOMAIN_ID, else that of the one drive that runs on this machine.

    Returns:
        Exit status: 0, or 2 where it could not be done, which is told in a sentence.

    Raises:
        UserError: no drive runs here, or several do, or no such namespace can be.
    """
    environment = workspace_environment()
    if domain is not None:
        environment["ROS_DOMAIN_ID"] = str(domain)
    elif "ROS_DOMAIN_ID" not in environment:
        environment["ROS_DOMAIN_ID"] = str(domain_of_the_drive())
    settings = {"namespace": namespace, "params_file": "", "log_level": ""}
    (process,) = in_place([Process("ctl", arguments=tuple(words))], settings)
    return subprocess.run(command_line(process, environment), env=environment, check=False).returncode


class Stop:
    """Counts the SIGINTs and SIGTERMs from now on."""

    def __init__(self) -> None:
        self.requests = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, stack: object) -> None:
        self.requests += 1


class Running(Child):
    """A process of the composition ``what`` that has been started; ``replaced``: it has ended, and that is told."""

    def __init__(self, what: Process, environment: Mapping[str, str]):
        supervisor = os.getpid()
        last_wish = signal.SIGTERM if what.tidies_up else signal.SIGKILL

        def die_with_the_supervisor() -> None:
            LIBC.prctl(PR_SET_PDEATHSIG, last_wish)
            if os.getppid() != supervisor:
                os._exit(1)

        super().__init__(command_line(what, environment), environment, die_with_the_supervisor)
        self.name = what.name
        self.what = what
        self.replaced = False


class Supervisor:
    """Starts processes, shows what they say, notices when one dies, and ends them all."""

    def __init__(self, environment: Mapping[str, str], stop: Stop, verbose: bool = False):
        self._environment = environment
        self._stop = stop
        self._verbose = verbose
        self._children: list[Running] = []
        self._output = selectors.DefaultSelector()

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {child.name: child.process.pid for child in self._children}

    def start(self, process: Process) -> None:
        """Start one process; it gets SIGTERM (or SIGKILL, if it has nothing to leave in order) when we die."""
        child = Running(process, self._environment)
        self._children.append(child)
        self._output.register(child.output, selectors.EVENT_READ, child)

    def watch(self) -> Running | None:
        """Until a stop is requested (None) or a finite process has ended well.

        A process that does not end everything is started again while it has respawns left. Where nothing is finite, a
        node that was shut down is a request to stop too.

        Raises:
            UserError: a process has died.
        """
        while not self._stop.requests:
            self._forward(timeout=0.1)
            for child in [child for child in self._children if not child.replaced]:
                status = child.process.poll()
                if status is None:
                    continue
                self._forward(timeout=0.0)
                if child.what.finite and status == 0:
                    return child
                if status == 0 and not child.what.module and not any(other.what.finite for other in self._children):
                    print(shutdown_notice(child.what), file=sys.stderr)
                    return None
                if child.what.ends_everything(status):
                    raise UserError(obituary(child, status))
                print(restart_notice(child.what, status), file=sys.stderr)
                child.replaced = True
                if again := child.what.again():
                    self.start(again)
        return None

    def end(self) -> None:
        """End all: the nodes, so that the bridge can tidy up, then the simulator. Asked twice, then killed.

        A second Ctrl-C shortens the waiting.
        """
        nodes = [child for child in self._children if child.name != "simulator"]
        for group in (nodes, [child for child in self._children if child not in nodes]):
            # SIGTERM: to a node it means the same as SIGINT, and one that is still importing ends without a traceback.
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                for child in group:
                    if child.process.poll() is None:
                        os.killpg(child.process.pid, number)
                deadline = time.monotonic() + END_SECONDS
                while any(child.process.poll() is None for child in group) and time.monotonic() < deadline:
                    self._forward(timeout=0.05, show=False)
                    if self._stop.requests > 1 and number != signal.SIGKILL:
                        break
        self._output.close()
        for child in self._children:
            child.close()

    def _forward(self, timeout: float, show: bool = True) -> None:
        ready = self._output.select(timeout)
        if not ready and not self._output.get_map():
            time.sleep(timeout)
        for key, _ in ready:
            child: Running = key.data
            lines = child.read()
            if child.closed:
                self._output.unregister(child.output)
            if show:
                for line in lines:
                    self._show(child, line)

    def _show(self, child: Running, text: str) -> None:
        if PAGE_IS_AT in text:
            print(f"{text[text.index(PAGE_IS_AT) :]} (Ctrl-C ends the drive)", flush=True)
        elif self._verbose or text.startswith(("[WARN]", "[ERROR]", "[FATAL]")):
            print(f"{child.name}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def started(processes: Iterable[Process], verbose: bool) -> Iterator[Supervisor]:
    """The processes of a composition in a ROS domain of their own; they end with the context.

    Raises:
        UserError: there is no built workspace, no free domain, or no such executable.
    """
    stop = Stop()
    environment = workspace_environment()
    with free_domain() as domain:
        environment.setdefault("ROS_DOMAIN_ID", str(domain))
        environment[TOKEN] = new_token()  # which a page's server that is started again keeps
        supervisor = Supervisor(environment, stop, verbose)
        try:
            for process in processes:
                supervisor.start(process)
            yield supervisor
        finally:
            supervisor.end()


def obituary(child: Running, status: int) -> str:
    """One sentence about a process that has ended too early."""
    if child.sentence:
        return child.sentence
    return f"The process {child.name} {ending(status)}, so the drive is over." + (
        f" Its last words: {child.last_words}" if child.last_words else ""
    )


def measurement(duration: float, pids: Mapping[str, int], page: str, realtime: bool) -> Process:
    """The process that measures the others, and when they go first does so too."""
    processes = [f"{name}={pid}" for name, pid in pids.items()]
    parameters: dict[str, bool | int | float | str | list[str]] = {"duration": duration, "processes": processes}
    measure = Process("measure", parameters={**parameters, "page": page, "realtime": realtime}, finite=True)
    return replace(measure, onlooker=True, respawns=ONLOOKER_RESPAWNS)


def conclude(figures: str, report: Path | None) -> int:
    """Print the measured figures, write the file, and return the exit status."""
    measured = json.loads(figures)
    if report is not None:
        with atomic_write(report) as file:
            file.write((json.dumps(measured, indent=2) + "\n").encode())
    for row in measured["criteria"]:
        print(
            f"{'held    ' if row['held'] else 'NOT HELD'}  {row['figure']}: {row['measured']} (must be {row['must']})"
        )
    return 0 if measured["held"] else 1


def command_line(process: Process, environment: Mapping[str, str]) -> list[str]:
    """The arguments to start a process with.

    Raises:
        UserError: the workspace has no such executable.
    """
    if process.module:
        return [sys.executable, "-m", process.module, *process.arguments]
    for prefix in environment["AMENT_PREFIX_PATH"].split(os.pathsep):
        executable = Path(prefix) / "lib" / PACKAGE / process.name
        if executable.exists():
            break
    else:
        raise UserError(f"The ROS workspace has no executable {process.name}; build it again with `make setup`.")
    command = [str(executable), *process.arguments, "--ros-args", "--disable-external-lib-logs"]
    return command + process.ros_arguments(Path(prefix) / "share" / PACKAGE)


def workspace_environment() -> dict[str, str]:
    """The environment with the ROS workspace in it, as after sourcing its setup.bash.

    Raises:
        UserError: there is no built workspace.
    """
    environment = dict(os.environ)
    prefixes = environment.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    if not any((Path(prefix) / "share" / PACKAGE).is_dir() for prefix in prefixes if prefix):
        if not (WORKSPACE / "src").is_dir():
            raise UserError(
                "The drive needs the ROS 2 packages carla_digr_msgs and carla_digr_ros, which pip does not install: "
                "run `make live` in carla_digr's source, or build its ros2_ws/src in a ROS 2 workspace and source that."
            )
        if not SETUP.is_file():
            raise UserError(f"The ROS workspace is not built ({SETUP} is missing); run `make setup` first.")
        # ROS from the PyPI wheels lies in this Python's prefix, which the workspace's setup file does not know.
        environment.setdefault("AMENT_PREFIX_PATH", sys.prefix)
        sourcing = ["bash", "-c", 'source "$0" >/dev/null && env -0', str(SETUP)]
        # In a session of its own a Ctrl-C in the terminal does not reach it.
        sourced = subprocess.run(sourcing, env=environment, stdout=subprocess.PIPE, check=True, start_new_session=True)
        environment = dict(entry.split("=", 1) for entry in sourced.stdout.decode().split("\0") if "=" in entry)
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")  # nothing stays in /dev/shm after a kill
    environment.setdefault("RCUTILS_CONSOLE_OUTPUT_FORMAT", "[{severity}] {message}")
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


@contextlib.contextmanager
def free_domain() -> Iterator[int]:
    """A ROS domain id, 1 to 101, that nothing on this machine uses, claimed until the context ends.

    A domain's discovery and data use the UDP ports from 7400 + 250 * domain on.
    """
    used = {(port - 7400) // 250 for port in _bound_udp_ports()}
    for domain in range(1, 102):
        if domain in used:
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(f"\0{CLAIM}{domain}")  # abstract: gone with this process, no file
            except OSError:
                continue
            yield domain
            return
    raise UserError("All ROS domains from 1 to 101 are in use on this machine; set ROS_DOMAIN_ID to share one.")


def domain_of_the_drive() -> int:
    """The ROS domain of the drive or replay that runs on this machine.

    Raises:
        UserError: none does, or more than one.
    """
    with contextlib.suppress(OSError):
        names = (line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines())
        domains = sorted(int(name[len(CLAIM) + 1 :]) for name in names if name.startswith(f"@{CLAIM}"))
        if len(domains) == 1:
            return domains[0]
        if domains:
            several = " or ".join(map(str, domains))
            raise UserError(f"Several drives run here: name the ROS domain of one with --domain {several}.")
    raise UserError("No drive runs here: start one with carla-digr live, or name its ROS domain with --domain.")


def _bound_udp_ports() -> set[int]:
    ports = set()
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        with contextlib.suppress(OSError):
            ports |= {int(line.split()[1].rpartition(":")[2], 16) for line in Path(table).read_text().splitlines()[1:]}
    return ports
