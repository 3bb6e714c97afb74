"""How a simulator's process gets its ports, ends, and starts several of its kind."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from carla_digr.errors import UserError, ending

PORT_STEP = 10  # from one instance's port to the next one's
MAX_INSTANCES = 64


def bind(host: str, port: int) -> socket.socket:
    """A socket that owns the port but refuses connections until :func:`listen`.

    Raises:
        UserError: the port cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _no_port(host, port, error) from None
    return listener


def listen(listener: socket.socket) -> None:
    """Accept connections from now on.

    Raises:
        UserError: the port cannot be had after all.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(128)
    except OSError as error:  # somebody else who had bound it too was faster
        raise _no_port(host, port, error) from None


def _no_port(host: str, port: int, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return UserError(
            f"Port {port} of {host} is in use; stop the program that has it or choose another with --port."
        )
    reason = getattr(error, "strerror", None) or error
    return UserError(f"Cannot listen on {host}:{port} ({reason}); check --host and --port.")


def end(*_: object) -> None:
    """End this process now: nothing is left to save, and taking the interpreter apart takes most of a second.

    Not by an exception: numba would take it for a failed compilation.
    """
    os._exit(0)


def exit_with(parent: int, leave: Callable[[], None] = end) -> None:
    """End this process when ``parent`` is no longer its parent, in a long computation too.

    The kernel sends the signal also when only the thread that started this process ends, so the handler looks
    whether the parent is really gone.
    """

    def look(*_: object) -> None:
        if os.getppid() != parent:
            leave()

    signal.signal(signal.SIGUSR1, look)
    ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
    look()


def run_instances(count: int, port: int, parent: int | None, options: Sequence[str]) -> None:
    """Run several simulators, each a process of its own, until SIGTERM, SIGINT or the end of one of them.

    Args:
        port: of the first; the others follow PORT_STEP apart.
        parent: end with this process, which must be the one that started this; None: with no other.
        options: of the command line besides ports and parent, the same for all.

    Raises:
        UserError: there are too many, their ports do not exist, or one has ended by itself; the others have, too.
    """
    last = port + (count - 1) * PORT_STEP
    if not 1 <= count <= MAX_INSTANCES:
        raise UserError(f"--instances must be between 1 and {MAX_INSTANCES}, not {count}.")
    if not 0 < port < last < 65535:
        raise UserError(f"{count} instances need the ports {port} to {last + 1}; choose another --port.")
    command = [sys.executable, "-m", "carla_digr.simulator.server", "--whole", "--parent", str(os.getpid()), *options]
    instances: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []
    failure: UserError | None = None

    def pass_on(number: int, _: object = None) -> None:
        asked.append(number)
        for instance in instances:
            instance.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    if parent is not None:
        exit_with(parent, lambda: pass_on(signal.SIGTERM))
    for i in range(count):
        if not asked:
            instances.append(subprocess.Popen([*command, "--port", str(port + i * PORT_STEP)], start_new_session=True))
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    ended = next(i for i, instance in enumerate(instances) if instance.poll() is not None)
    if not asked:
        pass_on(signal.SIGTERM)
        how = f"The simulator on port {port + ended * PORT_STEP} {ending(instances[ended].returncode)}"
        failure = UserError(f"{how}; the other instances were ended too.")
    for instance in instances:
        instance.wait()
    if failure is not None:
        raise failure
