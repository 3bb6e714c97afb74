"""What a user sees as a sentence instead of a traceback."""

from __future__ import annotations

import signal

# package -> the extra of setup.py that installs it
EXTRAS = {
    "stable_baselines3": "train",
    "tensorboard": "train",
    "captum": "train",
    "matplotlib": "train",
    "minigrid": "minigrid",
    "ale_py": "atari",
    "carla": "carla",
    "rosbags": "recording",
    "mcap": "recording",
    "backports": "recording",  # backports.zstd, of rosbags
}


class UserError(Exception):
    """Bad input or a missing part, told in one sentence that names the thing and the remedy.

    The command line prints the message to standard error and exits with status 2.
    """


def ending(status: int) -> str:
    """How a process of this exit status ended: "ended with status 2" or "was killed by SIGABRT"."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The sentence about a package that an extra installs; None: the missing module is of no extra."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"This needs the package {error.name}: pip install 'carla_digr[{EXTRAS[package]}]'."
