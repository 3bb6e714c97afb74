"""Whether the live map can be trusted: now and then, in the background, a perturbation map of the same frame beside it.

A perturbation map (eq. 3) is what the policy itself does when a part of the picture is hidden; it takes about a
thousand forward passes. A process of the lowest priority makes it, so that no decision, map or object waits for it.

`python -m carla_digr.live.trust SHARE WEIGHTS [MODULE]` is that process: it reads requests and answers each in one line
of JSON until its input ends. A request is a line of JSON, then the bytes of the state and of the map, float32.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import tell
from carla_digr.saliency.metrics import rank_correlation

SIDE = 16  # cells, to which both maps are averaged before they are compared
LOW = 0.8  # agreement that maps of random weights do not reach, nor most maps of another frame
LOW_IN_A_ROW = 3  # measurements after which a low agreement is told
SHARE = 0.05  # of a core that the measurements take at most, pass by pass; 1: a whole one, giving way to nobody
PAUSE = 2.0  # s between two measurements, at least
BATCH = 16  # perturbed states in one forward pass: larger ones take the caches from those that drive
LARGEST = 1 << 26  # bytes of a state or map

Frame = TypeVar("Frame")


def agreement(live: NDArray[np.float32], perturbation: NDArray[np.float32]) -> float:
    """Spearman's rank correlation of two maps (H, W), each averaged to SIDE x SIDE; NaN if one is constant."""
    first, second = (
        cv2.resize(m, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)[None] for m in (live, perturbation)
    )
    return float(rank_correlation(first, second)[0])


@dataclass(frozen=True)
class Judged(Generic[Frame]):
    """What was found of a frame: its ``agreement``."""

    frame: Frame
    agreement: float


class TrustMeter(Generic[Frame]):
    """Has a process compare the newest frame that it is offered, and the next one after a pause.

    Args:
        weights: the policy's.
        module: the policy's own code, empty: it has none.
    """

    def __init__(self, weights: str, module: str = ""):
        self.problem = ""
        self._command = [sys.executable, "-m", "carla_digr.live.trust", str(SHARE), weights, *filter(None, [module])]
        self._offered: tuple[Frame, NDArray[np.float32], NDArray[np.float32], int | None] | None = None
        self._judged: Judged[Frame] | None = None
        self._wake = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        threading.Thread(target=self._work, name="trust", daemon=True).start()

    def offer(
        self, frame: Frame, state: NDArray[np.float32], live: NDArray[np.float32], target: int | None = None
    ) -> None:
        """A frame that may be judged, if it is the newest when its turn comes.

        Args:
            frame: what comes back with the judgement.
            state: (1, C, H, W) in [0, 1].
            live: the map, (H, W).
            target: the action that it explains; None: the decision.
        """
        with self._wake:
            self._offered = frame, state, live, target
            self._wake.notify()

    def judged(self) -> Judged[Frame] | None:
        """What has been found since the last call."""
        with self._wake:
            judged, self._judged = self._judged, None
        return judged

    def close(self) -> None:
        """End the process; nobody waits for that, which takes long where others need the processor."""
        with self._wake:
            self._ended = True
            self._wake.notify()
            if self._process is not None:
                self._process.kill()

    def _work(self) -> None:
        try:
            self._judge()
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _judge(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ended or self._offered is not None)
                if self._ended:
                    return
                assert self._offered is not None
                (frame, state, live, target), self._offered = self._offered, None
                if self._process is None:
                    self._process = subprocess.Popen(
                        self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                    )
                process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                _write_request(process.stdin, state, live, target)
                found = json.loads(process.stdout.readline())
            except (OSError, ValueError):
                if not self._ended:
                    self.problem = "The process that makes perturbation maps has ended: the maps are not compared."
                return
            with self._wake:
                if math.isfinite(found["agreement"]):
                    self._judged = Judged(frame, found["agreement"])
                self._wake.wait_for(lambda: self._ended, PAUSE)


def _write_request(pipe: IO[bytes], state: NDArray[np.float32], live: NDArray[np.float32], target: int | None) -> None:
    request = {"state": state.shape, "map": live.shape, "target": target}
    pipe.write(json.dumps(request).encode() + b"\n" + state.tobytes() + live.tobytes())
    pipe.flush()


def _read_array(pipe: IO[bytes], shape: list[int]) -> NDArray[np.float32]:
    size = 4 * math.prod(shape)
    if not 0 < size <= LARGEST:
        raise ValueError(f"an array of {size} bytes")
    return np.frombuffer(pipe.read(size), np.float32).reshape(shape)


def give_way() -> None:
    """Run only where nobody else wants to; a session of its own is weighed as a whole, so it is told too."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # kernels without autogroups
        Path("/proc/self/autogroup").write_text("19")


class _Turns:
    """Sleeps after each pass of these torch modules so long that the work takes this share of a core."""

    def __init__(self, modules: Iterable[Any], share: float):
        self._rest = 1.0 / share - 1.0
        self.begin()
        for module in modules:
            module.register_forward_hook(self._end)

    def begin(self) -> None:
        """Work begins now."""
        self._begun = time.monotonic()

    def _end(self, *_: Any) -> None:
        time.sleep((time.monotonic() - self._begun) * self._rest)
        self.begin()


def main(arguments: list[str]) -> int:
    """Answer requests until the input ends; the exit status."""
    share = float(arguments[0])
    if share < 1.0:
        give_way()
    import torch

    from carla_digr import checkpoint
    from carla_digr.policy import ActorCritic
    from carla_digr.saliency.perturbation import Perturbation, perturbation_maps

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        policy, card = checkpoint.load(arguments[1], None, *arguments[2:3])
    except Exception as error:
        return tell(error)
    policy.eval()
    # An ActorCritic's layers are called one by one; those of other networks may take no hooks.
    layers = [*policy.convolutions, policy.trunk] if isinstance(policy, ActorCritic) else [policy]
    turns = _Turns(layers, share)
    settings = Perturbation.from_settings(card.get("config", {}).get("saliency_dataset", {}))
    perturbation = replace(settings, batch=BATCH)
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        turns.begin()
        state, live = (_read_array(sys.stdin.buffer, request[name]) for name in ("state", "map"))
        slow = perturbation_maps(policy, torch.from_numpy(state.copy()), perturbation, request["target"])[0].numpy()
        print(json.dumps({"agreement": agreement(live, slow)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
