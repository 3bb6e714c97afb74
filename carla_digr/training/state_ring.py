"""The online buffer of distillation: states of the student's episodes, in a file mapped into memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.files import allocate


class StateRing:
    """The online buffer: the last ``size`` states, uint8, in a file mapped into memory.

    The file has room for ``slack`` more states. A killed job resumes with the count of its last saved state; what was
    written after it lies in the slack, so no state that the resumed job may draw has been overwritten.

    Attributes:
        hardness: float32 (size + slack,), by slot the last known KL(teacher || student) on its state; 0: not known.
        answers: float32 (size + slack, actions), by slot the teacher's logits that the student is to give to its state;
            NaN: those that the teacher gives to it.

    Raises:
        UserError: the file of a job that resumes has another size.
        OSError: there is no room for it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], size: int, slack: int, resuming: bool, actions: int):
        self.size, self.slots, self.written = size, size + slack, 0
        self.hardness = np.zeros(self.slots, np.float32)
        self.answers = np.full((self.slots, actions), np.nan, np.float32)
        expected = self.slots * math.prod(shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        if resuming and (not path.exists() or path.stat().st_size != expected):
            raise UserError(f"The online buffer {path} is damaged; delete {path.parent} to start this job again.")
        if not resuming:
            path.unlink(missing_ok=True)
        allocate(path, expected)
        self._states: Any = np.memmap(path, "uint8", "r+", shape=(self.slots, *shape))

    def add(
        self,
        states: NDArray[np.uint8],
        hardness: NDArray[np.float32] | None = None,
        answers: NDArray[np.float32] | float = np.nan,
    ) -> None:
        """Append states (N, C, H, W), their hardness (N,) and answers (N, A)."""
        slots = (self.written + np.arange(len(states))) % self.slots
        self._states[slots] = states
        self.hardness[slots] = 0 if hardness is None else hardness
        self.answers[slots] = answers
        self.written += len(states)

    def draw(self, rng: np.random.Generator, count: int, hard: float = 0.0) -> NDArray[np.int64]:
        """Slots of ``count`` of the kept states, with replacement.

        The first round(hard * count) are drawn in proportion to their hardness, the others evenly: int64 (count,).
        """
        kept = min(self.written, self.size)
        back = rng.integers(kept, size=count)
        by_hardness = round(hard * count)
        if by_hardness:
            total = self.hardness[(self.written - 1 - np.arange(kept)) % self.slots].cumsum(dtype=np.float64)
            back[:by_hardness] = np.searchsorted(total[:-1], rng.random(by_hardness) * total[-1], side="right")
        return (self.written - 1 - back) % self.slots

    def states(self, slots: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Their states: uint8 (N, C, H, W)."""
        return self._states[slots]

    def flush(self) -> None:
        """Write to disk."""
        self._states.flush()
