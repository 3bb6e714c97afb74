"""The stages on a Ray cluster: drives beside their servers, shards and measurements on any node.

The stage itself, with the learner, stays the one process that was started; what it wants done elsewhere it hands over
here, and gets the same results to the last bit. Nothing but this module imports Ray, and it only where a cluster is
asked for. docs/cluster.md says how one is started.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any

import ray
import torch
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import carla_digr
from carla_digr.driving.control import RETRY
from carla_digr.driving.drive_process import (
    CALLS,
    FAREWELL,
    LEAVE,
    START,
    Answer,
    SimulatorProcess,
    Work,
    accepts,
    address_of,
    wait_awake,
)
from carla_digr.errors import SimulatorGone, UserError
from carla_digr.tasks.driving.servers import ServersVecEnv
from carla_digr.training import prepare_process

SERVER = "simulator:{}"
"""The resource by which a node says that a server, host:port, is to be driven from there."""
ANSWER = 60.0  # s in which each node must say what it runs
NETWORK = 10.0  # s more than its process a drive elsewhere may take to answer
LOOK = 1.0  # s after which it is looked for nodes that have come
HEAD = 5.0  # s in which a head must answer a connection
_TOKEN = re.compile(r"Authentication token is [\w ]+")
"""What Ray writes, and raises nowhere, where a cluster wants another token."""
_VERSION = re.compile(r"(?:Ray|Python): [\w.]+")
"""Of the cluster, then of this process, where it raises that they are not the same."""
_SETTINGS = b"\x04"  # a frame of settings, with which both sides of HTTP/2 begin, RFC 9113, sections 3.4 and 6.5
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"

log = logging.getLogger(__name__)


class Cluster:
    """A Ray cluster that this process has joined; to be entered once.

    While it is entered, environments on servers drive on the nodes that have these, see :class:`ClusterDrive`.

    Args:
        address: host:port of the cluster's head, or "auto": the one that runs on this machine, or that of RAY_ADDRESS.
    """

    def __init__(self, address: str):
        self._address = address

    def __enter__(self) -> Cluster:
        """Join.

        Raises:
            UserError: there is no cluster, it wants another token or Ray, or a node has another version of this
                package.
        """
        _join(self._address)
        try:
            _refuse_other_code()
        except BaseException:
            ray.shutdown()
            raise
        ServersVecEnv.begin_drive = ClusterDrive
        return self

    def __exit__(self, *_: object) -> None:
        """Leave; what still runs for this process ends."""
        ServersVecEnv.begin_drive = SimulatorProcess
        ray.shutdown()

    def share(self, value: Any) -> Any:
        """Something that many jobs take, sent to each node once.

        Raises:
            UserError: it cannot be sent.
        """
        try:
            return ray.put(value)
        except TypeError as error:
            raise UserError(
                "A policy of this kind of network cannot be sent to other machines; leave --ray out."
            ) from error

    def each(
        self, work: Callable[..., Any], jobs: Iterable[tuple[Any, tuple[Any, ...]]], device: torch.device
    ) -> Generator[tuple[Any, Any], None, None]:
        """Call ``work`` for each job on some node; what runs on a node that dies is done again on another.

        Args:
            work: of a module's own level.
            jobs: keys and arguments, of which those by ``share`` arrive as they were.
            device: where the networks are; on a GPU each job has one for itself.

        Yields:
            Keys and results, in the order in which they are finished.

        Raises:
            UserError: of ``work``.
        """
        task = _call.options(num_gpus=int(device.type == "cuda"))
        code, todo = _digest(), iter(jobs)
        running: dict[Any, Any] = {}
        while True:
            room = 2 * int(ray.cluster_resources().get("CPU", 1)) - len(running)
            for key, arguments in islice(todo, max(0, room)):
                running[task.remote(code, work, *arguments)] = key
            if not running:
                return
            for done in ray.wait(list(running), timeout=LOOK)[0]:
                try:
                    yield running.pop(done), ray.get(done)
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, UserError) else error from None


class ClusterDrive:
    """A :class:`carla_digr.driving.drive_process.SimulatorProcess` on the node that has its server.

    That is a node with the resource SERVER of this address. Where it dies, its server is gone like one that has died
    itself, until some node has the resource.
    """

    def __init__(self, work: Work, settings: Any, simulator: str, host: str, port: int, timeout: float, **options: Any):
        self._make = functools.partial(ClusterDrive, work, settings, simulator, host, port, timeout, **options)
        self.address, self._timeout = f"{host}:{port}", timeout
        self.map_name = self.map_hash = ""
        self._answers = 0.0
        remote: Any = ray.remote(num_cpus=0)(_Drive)
        self._actor = remote.options(resources={SERVER.format(self.address): 1}).remote(
            _digest(), work, settings, simulator, host, port, timeout, options
        )

    def ready(self) -> None:
        """Wait for the connection.

        Raises:
            UserError: there is none, or no node has the server.
        """
        resource = SERVER.format(self.address)
        if resource not in ray.cluster_resources():
            raise SimulatorGone(
                f"No node of the cluster has the resource {resource}; start one beside that server, with it."
            )
        told = self._result(self._actor.ready.remote(), START + CALLS * self._timeout)[0]
        self.map_name, self.map_hash = told["name"], told["hash"]

    def ask(self, request: dict[str, Any]) -> None:
        """See SimulatorProcess; what fails is told by the answer."""
        self._actor.ask.remote(request)

    def answer(self, more: float = 0.0) -> Answer:
        """See SimulatorProcess.

        Raises:
            SimulatorGone: the simulator does not answer, or the process or the node has ended or hangs.
            UserError: the process says why it ends.
        """
        return self._result(self._actor.answer.remote(more), CALLS * self._timeout + more)

    def _result(self, reference: Any, seconds: float) -> Answer:
        try:
            if not wait_awake(lambda part: ray.wait([reference], timeout=part)[0], seconds + NETWORK):
                raise SimulatorGone(f"The node that drives on {self.address} does not answer.")
            facts, arrays = ray.get(reference)
        except RayActorError:
            raise SimulatorGone(f"The node that drove on {self.address} is gone, or the process there.") from None
        if "error" in facts:
            raise (SimulatorGone if facts["gone"] else UserError)(facts["error"])
        return facts, arrays

    def reconnect(self, patience: float, given_up: Callable[[], bool] = lambda: False) -> ClusterDrive:
        """See SimulatorProcess; the same or another node may have the server by then.

        Raises:
            UserError: that of the last try.
        """
        deadline = time.monotonic() + patience
        self.close(FAREWELL)
        while True:
            again = self._make()
            try:
                again.ready()
                return again
            except UserError as error:
                again.close(0.0)
                if time.monotonic() >= deadline or given_up():
                    raise error
            time.sleep(RETRY)

    def close(self, leave: float = LEAVE) -> None:
        """See SimulatorProcess."""
        with contextlib.suppress(RayError):
            ray.get(self._actor.close.remote(leave), timeout=leave + 1.0)
        ray.kill(self._actor)


def _told(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """A method that answers with its UserError, in the words of ``SimulatorProcess``, in place of a traceback."""

    @functools.wraps(method)
    def call(*arguments: Any) -> Answer:
        try:
            return method(*arguments)
        except UserError as error:
            return {"error": str(error), "gone": isinstance(error, SimulatorGone)}, []

    return call


class _Drive:
    """The end of a ClusterDrive that is beside the server."""

    def __init__(self, code: str, *arguments: Any):
        self._code = code
        *self._arguments, self._options = arguments
        self._process: SimulatorProcess | None = None

    @_told
    def ready(self) -> Answer:
        _refuse_unlike(self._code)
        self._process = SimulatorProcess(*self._arguments, **self._options)
        self._process.ready()
        return {"name": self._process.map_name, "hash": self._process.map_hash}, []

    @_told
    def ask(self, request: dict[str, Any]) -> Answer:
        assert self._process is not None
        self._process.ask(request)
        return {}, []

    @_told
    def answer(self, more: float) -> Answer:
        assert self._process is not None
        return self._process.answer(more)

    def close(self, leave: float) -> None:
        if self._process is not None:
            self._process.close(leave)


@ray.remote(num_cpus=1, max_retries=-1)  # as often as nodes die under it; what `work` raises is no reason
def _call(code: str, work: Callable[..., Any], *arguments: Any) -> Any:
    _refuse_unlike(code)
    prepare_process()
    return work(*arguments)


def _join(address: str) -> None:
    remedy = (
        "start one with `ray start --head`, give this machine its token and RAY_AUTH_MODE=token, or leave --ray out"
    )
    host, _, port = address.rpartition(":")
    if address != "auto" and (not host or not port.isdecimal() or "/" in host):
        raise UserError(f"A Ray cluster must be given as auto or as host:port, not {address!r}.")
    with tempfile.TemporaryFile() as said:
        try:
            with _errors_to(said):
                head = canonicalize_bootstrap_address_or_die(address)
                if head_speaks := _speaks_as_heads_do(head):
                    ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=False)
        except Exception as error:  # of a dozen kinds, some of them plain RuntimeErrors
            text = str(error).strip() or type(error).__name__
            if len(versions := _VERSION.findall(text)) == 4:
                theirs, ours = (" with ".join(versions[k : k + 2]).replace(":", "") for k in (0, 2))
                raise UserError(
                    f"The Ray cluster {address} runs {theirs}, this machine {ours}; install the same everywhere."
                ) from error
            why = next(iter(_TOKEN.findall(_end_of(said))), text.splitlines()[0].partition(". ")[0].rstrip(".:"))
            raise UserError(f"The Ray cluster {address} cannot be joined: {why}; {remedy}.") from error
    if not head_speaks:
        where = head if address == "auto" else address
        raise UserError(f"No Ray head answers on {where}, where a cluster was to be; {remedy}.")


def _speaks_as_heads_do(address: str) -> bool:
    """Whether a server of HTTP/2 listens, as gRPC's are; Ray waits for minutes for any other to become one."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return accepts(address)
    try:
        with socket.create_connection(address_of(address), HEAD) as connection:
            connection.sendall(_HELLO)
            return connection.recv(4, socket.MSG_WAITALL)[3:] == _SETTINGS
    except OSError:
        return False


@contextlib.contextmanager
def _errors_to(file: IO[bytes]) -> Generator[None, None, None]:
    """What this process writes to standard error goes there: Ray's core has no other place for its tries to connect."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def _end_of(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return file.read().decode(errors="replace")


@functools.cache
def _digest() -> str:
    """What this package does, in 12 digits: two copies with the same source have the same."""
    digest = hashlib.sha256(f"{carla_digr.__version__} {torch.__version__}".encode())
    root = Path(carla_digr.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _refuse_unlike(code: str) -> None:
    """Refuse to work for a process with another source."""
    if _digest() != code:
        where = ray.util.get_node_ip_address()
        raise UserError(
            f"The node {where} has carla_digr {carla_digr.__version__} ({_digest()}), which is another than this "
            f"machine's ({code}); install the same everywhere."
        )


def _refuse_other_code() -> None:
    def about(code: str) -> str:
        try:
            from carla_digr.training import cluster
        except ImportError as error:
            return f"lacks what the stages need ({error})"
        try:
            cluster._refuse_unlike(code)
        except cluster.UserError as error:
            return str(error)
        return ""

    alike = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked = ray.remote(about).options(num_cpus=0, scheduling_strategy=there)
            alike[asked.remote(_digest())] = node["NodeManagerAddress"]
    for reference, where in alike.items():
        try:
            told = ray.get(reference, timeout=ANSWER)
        except TaskUnschedulableError:  # it has died, which the head may notice late
            continue
        except RayError as error:
            raise UserError(
                f"The node {where} of the cluster does not answer: {type(error).__name__}; restart it."
            ) from None
        if told:
            raise UserError(told if told.startswith("The node") else f"The node {where} {told}; install it there too.")
