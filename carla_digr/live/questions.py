"""What a user asks about a picture: the decision without a part of it, why not another action, another method's map.

Answered by a process of the lowest priority, `python -m carla_digr.live.questions`, so that no drive waits for it. It
reads requests until its input ends. A request is a line of JSON, then the bytes of the picture; the answer
lines of JSON with the ``progress`` of what takes long, one with what was found or the ``error``, then the bytes of a
picture and of a map where it names their shapes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError, sentence
from carla_digr.files import read_json
from carla_digr.live.composition import WEIGHTS
from carla_digr.live.trust import give_way
from carla_digr.saliency import DEFAULT, METHODS
from carla_digr.saliency.overlay import rgb_of

if TYPE_CHECKING:
    from carla_digr.explainer import Decision, Explainer
    from carla_digr.policy import Policy

KINDS = ("without", "target", "map", "teacher")
PATIENCE = 300.0  # s that an answer may take
BATCH = 8  # perturbed states in one forward pass: larger ones take the caches from those that drive
LARGEST = 1 << 26  # bytes of a picture or map
KEPT = 4  # policies that stay loaded


@dataclass(frozen=True)
class Question:
    """About a picture.

    Attributes:
        weights: of the policy.
        kind: "without" a part of it, "target" for why not another action, "map" by another method, "teacher" for that
            of the policy that this one was taught by, itself where that does not ship.
        what: the part's left, top, right and bottom, pixels of the policy's picture, all inclusive, separated by
            commas; the action; the method.
        module: the policy's own code, empty: it has none.
    """

    weights: str
    kind: str
    what: str
    module: str = ""


@dataclass(frozen=True)
class Answer:
    """What was found, JSON-ready: the ``decision``, and that ``without``; the picture, uint8 (H, W, 3), that was
    decided on in the end; and the map, float32 (H, W), None where none was asked for."""

    found: dict[str, Any]
    picture: NDArray[np.uint8]
    map: NDArray[np.float32] | None


class Questions:
    """Has a process answer one question after the other; it is started with the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()
        self._ended = False

    def ask(self, question: Question, rgb: NDArray[np.uint8], progress: Callable[[float], object]) -> Answer:
        """The answer to a question about a picture. Callable from any thread.

        Args:
            question: what is asked.
            rgb: uint8 (H, W, 3), or a whole state (H, W, C) of a policy that decides on several pictures.
            progress: called with the share that is done of what takes long.

        Raises:
            UserError: it has none.
        """
        with self._one_at_a_time:
            if self._ended:
                raise UserError("The page is about to end.")
            if self._process is None or self._process.poll() is not None:
                command = [sys.executable, "-m", "carla_digr.live.questions"]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            patience = threading.Timer(PATIENCE, process.kill)
            patience.start()
            try:
                request = {**question.__dict__, "shape": rgb.shape}
                process.stdin.write(json.dumps(request).encode() + b"\n" + rgb.tobytes())
                process.stdin.flush()
                while "progress" in (found := json.loads(process.stdout.readline())):
                    progress(found["progress"])
                if "error" in found:
                    raise UserError(found["error"])
                picture = _read_array(process.stdout, found.pop("picture"), np.uint8)
                size = found.pop("map")
                return Answer(found, picture, None if size is None else _read_array(process.stdout, size, np.float32))
            except (OSError, ValueError):
                process.kill()
                process.wait()
                raise UserError("The process that answers questions has ended; ask again.") from None
            finally:
                patience.cancel()

    def close(self) -> None:
        """End the process."""
        self._ended = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def shipped_policy(digest: str) -> Path | None:
    """The policy that ships whose SHA-256 begins so; None: there is none."""
    for card in sorted(WEIGHTS.parent.glob("*.json")):
        if digest and str(read_json(card).get("weights_sha256", "")).startswith(digest):
            return card.with_suffix(WEIGHTS.suffix)
    return None


def shipped_policies(task: str) -> list[str]:
    """Names of the policies that ship for a task."""
    cards = sorted(WEIGHTS.parent.glob("*.json"))
    there = [card for card in cards if card.with_suffix(WEIGHTS.suffix).is_file()]
    return [card.stem for card in there if read_json(card).get("task") == task]


def _read_array(pipe: IO[bytes], shape: list[int], kind: Any) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(kind).itemsize
    if not 0 < size <= LARGEST:
        raise ValueError(f"an array of {size} bytes")
    data = pipe.read(size)
    if len(data) < size:
        raise ValueError("cut off")
    return np.frombuffer(data, kind).reshape(shape)


class _Answers:
    """The process's side."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], tuple[Policy, Explainer]] = {}

    def answer(self, question: Question, rgb: NDArray[np.uint8]) -> Answer:
        """Find it."""
        if question.kind == "without":
            return self._without(question, rgb)
        policy, explainer = self._load(question.weights, question.module)
        if question.kind == "teacher":
            teacher = shipped_policy(explainer.card.get("teacher_sha256", ""))
            if teacher is not None:
                policy, explainer = self._load(str(teacher), "")
        if question.kind == "target":
            return self._map(policy, explainer, rgb, DEFAULT, question.what)
        return self._map(policy, explainer, rgb, question.what)

    def _map(
        self, policy: Policy, explainer: Explainer, rgb: NDArray[np.uint8], name: str, action: str | None = None
    ) -> Answer:
        from carla_digr.explainer import action_index
        from carla_digr.policy import ActorCritic
        from carla_digr.saliency.gradient import normalise
        from carla_digr.saliency.perturbation import Perturbation
        from carla_digr.saliency.windows import trunk_passes

        method = METHODS.find(name)
        settings = explainer.card.get("config", {}).get("saliency_dataset", {})
        perturbation = replace(Perturbation.from_settings(settings), batch=BATCH)
        target = None if action is None else action_index(action, explainer.action_names)
        picture, decision = _decide(explainer, rgb)
        rows, columns = (round(side / perturbation.stride) for side in picture.shape[:2])
        counted: Any = policy
        passes = math.ceil(rows * columns / BATCH)
        if isinstance(policy, ActorCritic) and len(policy.convolutions):
            counted, passes = policy.trunk, trunk_passes(rows, 1, BATCH)
        start = time.monotonic()
        with _counted(counted, passes if method.perturbs else 0):
            maps, flat = normalise(method(policy, decision.state.clone(), target, perturbation))
        found = {
            "title": method.title,
            "decision": _told(explainer, decision),
            "flat": bool(flat[0]),
            "seconds": time.monotonic() - start,
        }
        return Answer(found, _shown(picture), maps[0].detach().numpy())

    def _without(self, question: Question, rgb: NDArray[np.uint8]) -> Answer:
        from carla_digr.objects import painted_over

        _, explainer = self._load(question.weights, question.module)
        picture, decision = _decide(explainer, rgb)
        try:
            left, top, right, bottom = map(int, question.what.split(","))
        except ValueError:
            raise UserError("A part of a picture is LEFT,TOP,RIGHT,BOTTOM in pixels.") from None
        mask = np.zeros((1, *picture.shape[:2]), np.bool_)
        mask[0, max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
        painted = painted_over(picture.transpose(2, 0, 1).astype(np.float32), mask)[0].transpose(1, 2, 0)
        without, another = _decide(explainer, np.ascontiguousarray(painted.round().astype(np.uint8)))
        found = {"decision": _told(explainer, decision), "without": _told(explainer, another)}
        return Answer(found, _shown(without), None)

    def _load(self, weights: str, module: str) -> tuple[Policy, Explainer]:
        from carla_digr import checkpoint
        from carla_digr.explainer import Explainer

        if (weights, module) not in self._loaded:
            policy, card = checkpoint.load(weights, None, module or None)
            while len(self._loaded) >= KEPT:
                del self._loaded[next(iter(self._loaded))]
            # Only asked what it decides, which every policy can be; so any method that needs no more will do.
            self._loaded[weights, module] = policy, Explainer(policy, card, "gb", resize=True)
        return self._loaded[weights, module]


def _decide(explainer: Explainer, rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Decision]:
    """The picture in the policy's size, and the decision on it alone."""
    explainer.restart()
    picture = explainer.fitted(rgb)
    return picture, explainer.decide(picture)


def _shown(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture or state (H, W, C) as an RGB picture."""
    return np.ascontiguousarray(rgb_of(picture.transpose(2, 0, 1)[None])[0])


@contextlib.contextmanager
def _counted(module: Any, passes: int) -> Iterator[None]:
    """Tell the progress of so many passes of a torch module, if there are any."""
    done = itertools.count(1)

    def tell(*_: Any) -> None:
        print(json.dumps({"progress": min(next(done) / passes, 1.0)}), flush=True)

    hook = module.register_forward_hook(tell) if passes else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _told(explainer: Explainer, decision: Decision) -> dict[str, Any]:
    return {
        "action_names": list(explainer.action_names),
        "probabilities": [float(p) for p in decision.probabilities],
        "action": decision.action,
        "policy_hash": explainer.policy_hash,
    }


def main() -> int:
    """Answer until the input ends; the exit status."""
    give_way()
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    answers = _Answers()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        rgb = _read_array(sys.stdin.buffer, request.pop("shape"), np.uint8)
        try:
            answer = answers.answer(Question(**request), rgb)
        except Exception as error:  # of a policy's own code any
            print(json.dumps({"error": sentence(error) or f"That failed: {error!r}."}), flush=True)
            continue
        shapes = {"picture": answer.picture.shape, "map": None if answer.map is None else answer.map.shape}
        print(json.dumps({**answer.found, **shapes}), flush=True)
        sys.stdout.buffer.write(answer.picture.tobytes() + (b"" if answer.map is None else answer.map.tobytes()))
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
