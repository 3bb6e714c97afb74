"""The one exception a user sees as a sentence instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing part, told in one sentence that names the thing and the remedy.

    The command line prints the message to standard error and exits with status 2.
    """
