"""What a user sees as a sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

REFUSED = 2  # exit status of a process that says why it ends
SENTENCE = "carla-digr: "  # begins the line on standard error in which a process says why it ends

# package -> the extra of setup.py that installs it
EXTRAS = {
    "stable_baselines3": "train",
    "tensorboard": "train",
    "captum": "train",
    "matplotlib": "train",
    "minigrid": "minigrid",
    "ale_py": "atari",
    "carla": "carla",
    "ray": "ray",
    "rosbags": "recording",
    "mcap": "recording",
    "backports": "recording",  # backports.zstd, of rosbags
}

# modules of what every installation has, and what pip calls them
BASE = {
    **{name: name for name in ("torch", "numpy", "numba", "safetensors", "tqdm", "msgpack", "gymnasium")},
    **{name: name for name in ("defusedxml", "onnx", "onnxruntime")},
    **{"cv2": "opencv-python-headless", "yaml": "PyYAML", "aiohttp": "aiohttp", "simplejpeg": "simplejpeg"},
}


# What libraries say that have their own errors for a memory that is full.
NO_MEMORY = ("can't allocate memory", "Insufficient memory", "can't start new thread", "failed to map segment")


class UserError(Exception):
    """Bad input or a missing part, told in one sentence that names the thing and the remedy.

    The command line prints the message to standard error and exits with status 2.
    """


class SimulatorGone(UserError):
    """The simulator stopped answering; the session cannot go on, a new one can be connected."""


def end_on_ctrl_c(status: int | None = None) -> None:
    """Until the process has a handler of its own, Ctrl-C ends it without a word: while modules load, a
    KeyboardInterrupt may get lost in them, or print their inside.

    A Ctrl-C that came before counts too, where the process was started with SIGINT blocked.

    Args:
        status: to exit with; None: as killed by SIGINT.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL if status is None else lambda *_: os._exit(status))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def ending(status: int) -> str:
    """How a process of this exit status ended: "ended with status 2" or "was killed by SIGABRT"."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The sentence about a package that pip or ROS 2 installs; None: the missing module is of neither."""
    package = (error.name or "").partition(".")[0]
    if package in BASE:
        return f"This needs the package {BASE[package]}: pip install {BASE[package]}."
    if package.endswith("_msgs"):
        debian = package.replace("_", "-")
        return f"This needs the ROS 2 package {package}: apt install ros-$ROS_DISTRO-{debian}, or rosdep install."
    if package not in EXTRAS:
        return None
    return f"This needs the package {error.name}: pip install 'carla_digr[{EXTRAS[package]}]'."


def sentence(error: BaseException) -> str | None:
    """What to tell a user about an error; None: it is a fault of the program, and needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError):
        return _machine(error)
    if isinstance(error, RecursionError):
        return "What was given is nested too deeply: nothing that is meant needs so many levels."
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        return "There is not enough memory: end other programs, or choose smaller settings, and run it again."
    return None


def _machine(error: OSError) -> str:
    """What the system refuses."""
    text = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{text}; make room and run the same command again."
    if not _directory_is_there():
        return "The directory in which this was started is no more: go to another one."
    return f"{where}{text}."


def _directory_is_there() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def tell(error: Exception) -> int:
    """Say on standard error why a process ends.

    Returns:
        The exit status, REFUSED.

    Raises:
        Exception: the error itself, where there is no `sentence` for it.
    """
    text = sentence(error)
    if text is None:
        raise error
    with contextlib.suppress(OSError):
        print(f"{SENTENCE}{text}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # what waits for standard output cannot be written: the interpreter would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return REFUSED
