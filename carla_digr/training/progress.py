"""How a stage tells how far it is: a bar for people, or lines of JSON for the program that started it."""

from __future__ import annotations

import json
import logging
import sys
import threading
from typing import Any, ClassVar

from tqdm import tqdm

# No two processes draw here, and the lock between processes that tqdm makes otherwise outlives one that is ended.
tqdm.set_lock(threading.RLock())


class BesideBars(logging.Handler):
    """Writes what is logged to standard error on lines of its own, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=sys.stderr)


class Progress(tqdm):
    """tqdm's bar, drawn once a second; or, if ``as_json`` is set, as often one line of JSON on standard output.

    A line has "phase" (the bar's description), "done", "total" and "unit", "rate" (units per second, null: unknown),
    "seconds_left" (of this phase, null: unknown) and "figures" (the latest, by name).
    """

    as_json: ClassVar[bool] = False
    hidden: ClassVar[bool] = False  # in processes beside the one that tells

    def __init__(self, *args: Any, **kwargs: Any):
        self.figures: dict[str, float] = {}
        super().__init__(*args, **{"mininterval": 1, "disable": self.hidden, **kwargs})

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True, **kwargs: Any) -> None:
        """Show the latest figures."""
        self.figures = {**(ordered_dict or {}), **kwargs}
        super().set_postfix(ordered_dict, refresh, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar or write the line; tqdm decides when.

        Raises:
            BrokenPipeError: nobody reads the lines any more, which ends a stage whose starter has died.
        """
        if not self.as_json:
            super().display(msg, pos)
            return
        state = self.format_dict
        rate = state["rate"] or ((self.n - self.initial) / state["elapsed"] if state["elapsed"] else 0.0)
        line = {
            "phase": state["prefix"],
            "done": self.n,
            "total": self.total,
            "unit": self.unit,
            "rate": rate or None,
            "seconds_left": (self.total - self.n) / rate if rate and self.total is not None else None,
            "figures": self.figures,
        }
        print(json.dumps(line), flush=True)
