"""The one exception a user sees as a sentence instead of a traceback."""

from __future__ import annotations

import signal


class UserError(Exception):
    """Bad input or a missing part, told in one sentence that names the thing and the remedy.

    The command line prints the message to standard error and exits with status 2.
    """


def ending(status: int) -> str:
    """How a process of this exit status ended: "ended with status 2" or "was killed by SIGABRT"."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
