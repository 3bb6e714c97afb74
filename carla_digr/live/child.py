"""A process of ours and what it says."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence

from carla_digr.errors import SENTENCE


class Child:
    """A process in a session of its own, so that a Ctrl-C in the terminal does not reach it, and its output.

    Args:
        command: what to start, with its arguments.
        environment: None: ours.
        prepare: called in the new process before it becomes the command.

    Attributes:
        process: the process.
        output: file descriptor of its output, readable without waiting, to wait on.
        closed: whether nothing more will come.
        sentence: why it ends, in its own words, "" while it has not said so.
        data: the latest line of JSON.
        last_words: the latest other line.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.output, False)
        self.closed = False
        self.sentence = self.data = self.last_words = ""
        self._partial = b""

    def read(self) -> list[str]:
        """The whole lines that have come, without waiting."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.output, 65536)
            self.closed = not data
        *whole, self._partial = (self._partial + data).split(b"\n")
        if self.closed and self._partial:
            whole.append(self._partial)
            self._partial = b""
        lines = [line.decode(errors="replace").lstrip("\r").rstrip() for line in whole]
        for line in filter(None, lines):
            if line.startswith(SENTENCE):
                self.sentence = line.removeprefix(SENTENCE)
            elif line.startswith("{"):
                self.data = line
            else:
                self.last_words = line
        return lines

    def close(self) -> None:
        """Give up its output; it is told so when it writes again."""
        assert self.process.stdout is not None
        self.process.stdout.close()
