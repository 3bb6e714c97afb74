"""A task played by a policy on the page: play, map and decision, with the page's controls. No ROS, no simulator."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carla_digr import checkpoint
from carla_digr.errors import UserError
from carla_digr.explainer import Decision, Explainer, Saliency, action_index
from carla_digr.live.composition import ATTACKS
from carla_digr.live.questions import shipped_policies
from carla_digr.live.viewer.page_decision import map_title
from carla_digr.live.viewer.server import ViewerServer
from carla_digr.objects import map_shares, outlines
from carla_digr.saliency import DEFAULT, METHODS
from carla_digr.saliency.overlay import COLORMAP, COLORMAPS, rgb_of
from carla_digr.tasks import Task

RATE = 15.0  # decisions a second: Breakout's own pace
SEEDS = 2**31


@dataclass(frozen=True)
class Settings:
    """What may change while it plays; as the parameters of a drive's nodes."""

    method: str = DEFAULT
    target: str = ""
    explanation: bool = True
    objects: bool = True
    attack: str = "none"
    attack_epsilon: float = 0.02
    opacity: float = 0.8
    colormap: str = COLORMAP
    rate: float = RATE


CHOICES = {"attack": ("none", *ATTACKS), "colormap": tuple(COLORMAPS)}
RANGES = {"attack_epsilon": (0.0, 0.2), "opacity": (0.0, 1.0), "rate": (1.0, 60.0)}


class Play:
    """Plays one episode after the other, in the caller's thread; the page's controls come from others.

    Args:
        task: what is played.
        weights: the policy.
        seed: of the first episode.
        module: the policy's own code, empty: it has none.
        settings: at the start.

    Raises:
        UserError: the policy cannot be had, or is of another task or another size of picture.
    """

    def __init__(self, task: Task, weights: str, seed: int = 0, module: str = "", settings: Settings | None = None):
        self._task, self._seed, self._module = task, seed, module
        self.weights = weights
        self.settings = settings or Settings()
        self._explainer = self._load(weights, self.settings.method)
        self._page: ViewerServer | None = None
        self._lock = threading.Lock()  # of what follows, and of the settings
        self._changed = threading.Condition(self._lock)
        self._paused = False
        self._steps = 0  # that are to be taken although it is paused
        self._reset: int | None = None
        self._frame = self._episode = 0
        self._ended = False

    def run(self, page: ViewerServer) -> None:
        """Play until `end`.

        Args:
            page: where it is shown.
        """
        self._page = page
        self._tell()
        due = time.monotonic()
        while not self._ended:
            batch = self._task.make_vec_env(1, self._seed)
            with self._changed:
                self._reset = None
            try:
                observations = batch.reset()
                self._begin_episode()
                score, over = 0.0, False
                while not self._ended and self._reset is None:
                    action = self._show(batch, observations, score, over)
                    due = self._wait(due)
                    if self._reset is not None or self._ended:
                        break
                    observations, rewards, dones, _ = batch.step(np.array([action]))
                    over = bool(dones[0])
                    score = (0.0 if over else score) + float(rewards[0])
                    if over:
                        self._begin_episode()
            finally:
                batch.close()

    def end(self) -> None:
        """End `run` soon."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # --- the page's controls ---

    def do(self, words: Sequence[str]) -> str:
        """Do what the words say, as `carla_digr_ros.controls` for a drive.

        Raises:
            UserError: they say nothing that can be done.
        """
        match words:
            case ["pause" | "resume" as verb]:
                self._set_paused(verb == "pause")
                return "paused" if verb == "pause" else "playing"
            case ["step"]:
                with self._changed:
                    if not self._paused:
                        raise UserError("Hold the play first.")
                    self._steps += 1
                    self._changed.notify_all()
                return "one step"
            case ["reset", *seed] if len(seed) <= 1:
                return self._restart(*seed)
            case ["policy", name] if name in shipped_policies(self._task.name):
                self._exchange(name, self.settings.method)
                return f"Policy {self._explainer.policy_hash} plays."
            case ["set", name, text] if name in Settings.__dataclass_fields__:
                self._change(name, text)
                return f"{name}: {text}"
        raise UserError("A play can be held, stepped and reset, take another policy that ships, and be set.")

    def policy(self, side: int) -> tuple[str, str]:
        """Weights and module of the policy that plays, for questions."""
        return self.weights, self._module

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            self._paused, self._steps = paused, 0
            self._changed.notify_all()
        self._tell()

    def _restart(self, seed: str = "") -> str:
        wanted = int(seed) if seed.isdecimal() else self._seed + 1 if not seed else -1
        if not 0 <= wanted < SEEDS:
            raise UserError(f"A seed is a whole number below {SEEDS}, not {seed!r:.40}.")
        with self._changed:
            self._seed = self._reset = wanted
            self._changed.notify_all()
        self._tell()
        return f"Seed {wanted} comes next."

    def _exchange(self, weights: str, method: str) -> None:
        """Another policy, or another method: loaded while the present one plays on."""
        explainer = self._load(weights, method)
        with self._lock:
            target = self.settings.target if self.settings.target in explainer.action_names else ""
            explainer.target = target or None
            self._explainer, self.weights = explainer, weights
            self.settings = replace(self.settings, method=method, target=target)
        self._tell()

    def _change(self, name: str, text: str) -> None:
        value = _value(name, text, type(getattr(Settings(), name)))
        if name == "method":
            METHODS.find(text)
            self._exchange(self.weights, text)
            return
        if name == "target":
            self._explainer.target = action_index(text, self._explainer.action_names) if text else None
        if name == "attack" and text != "none":
            self._explainer.attacked(np.zeros(self._explainer.image_shape, np.uint8), text, 0.0)
        with self._lock:
            self.settings = replace(self.settings, **{name: value})
        if name == "colormap" and self._page is not None:
            self._page.change_colormap(text)
        self._tell()

    def _tell(self) -> None:
        """Tell the pages how it is set."""
        if self._page is None:
            return
        fast = [name for name, method in METHODS.loadable().items() if method.speed == "frame"]
        choices = {**CHOICES, "method": fast}
        settings = {
            name: {"value": value, "range": RANGES.get(name), "choices": choices.get(name)}
            for name, value in self.settings.__dict__.items()
        }
        self._page.tell(
            {
                "paused": self._paused,
                "control": "policy",
                "episode": str(self._episode),
                "seed": str(self._seed),
                "drives": False,
                "policies": shipped_policies(self._task.name),
                "settings": settings,
            }
        )

    # --- playing ---

    def _load(self, weights: str, method: str) -> Explainer:
        policy, card = checkpoint.load(weights, self._task.name, self._module or None)
        explainer = Explainer(policy, card, method)
        if not explainer.discrete or tuple(policy.input_shape) != tuple(self._task.observation_shape):
            raise UserError(
                f"The policy {weights} takes states of {tuple(policy.input_shape)}, those of the task are "
                f"{tuple(self._task.observation_shape)}; choose another one with --weights."
            )
        height, width = policy.input_shape[1:]
        blank = np.zeros((height, width, policy.input_shape[0]), np.uint8)
        explainer.explain(explainer.decide(blank))  # so that the first step is as fast as the others
        explainer.restart()
        return explainer

    def _begin_episode(self) -> None:
        self._episode += 1
        self._explainer.restart()

    def _wait(self, due: float) -> float:
        """Until the next step is due, and while it is paused; when the one after it is due."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or self._reset is not None,
                max(0.0, due + 1.0 / self.settings.rate - time.monotonic()),
            )
            self._changed.wait_for(
                lambda: self._ended or self._reset is not None or not self._paused or self._steps > 0
            )
            self._steps = max(0, self._steps - 1)
        return max(due + 1.0 / self.settings.rate, time.monotonic() - 1.0 / self.settings.rate)

    def _show(self, batch: Any, observations: NDArray[np.uint8], score: float, over: bool) -> int:
        """Decide, explain and show a state, uint8 (1, C, H, W); the action."""
        with self._lock:
            explainer, settings = self._explainer, self.settings
        start = time.monotonic()
        state = np.ascontiguousarray(observations[0].transpose(1, 2, 0))
        if settings.attack != "none":
            state = explainer.attacked(state, settings.attack, settings.attack_epsilon)
        decision = explainer.decide(state)
        saliency = explainer.explain(decision) if settings.explanation else None
        told = self._told(explainer, decision, saliency)
        if saliency is not None:
            told["latency_ms"] = (time.monotonic() - start) * 1000.0
        if settings.objects and hasattr(batch, "objects"):
            told["objects"] = _things(batch, explainer, decision, saliency)
        told["events"] = ["the episode is over"] if over else []
        if settings.attack != "none":
            told["status"] = f"The policy sees the picture under attack: {settings.attack} {settings.attack_epsilon:g}."
        told["value"] = decision.value
        told["score"] = score
        self._frame += 1
        picture = rgb_of(state.transpose(2, 0, 1)[None])[0]
        assert self._page is not None
        stamp = self._frame / settings.rate
        self._page.publish(stamp, self._frame, picture, None if saliency is None else saliency.map, told, state)
        return max(decision.action, 0)

    def _told(self, explainer: Explainer, decision: Decision, saliency: Saliency | None) -> dict[str, Any]:
        return {
            "action_names": list(explainer.action_names),
            "probabilities": decision.probabilities,
            "action": decision.action,
            "policy_hash": explainer.policy_hash,
            "map": map_title(explainer.method, explainer.target_name),
            "inference_ms": decision.inference_ms,
            "saliency_ms": math.nan if saliency is None else saliency.saliency_ms,
            "saliency_flat": saliency is not None and saliency.flat,
            "fallback": False,
        }


def _things(batch: Any, explainer: Explainer, decision: Decision, saliency: Saliency | None) -> list[dict[str, Any]]:
    """What the task can take out of the state, and what would be decided then; the largest effect first."""
    things = batch.objects()[0]
    if not things:
        return []
    without = np.stack([thing.without for thing in things]).astype(np.float32) / 255.0
    effects, actions = explainer.instead(decision, torch.from_numpy(without))
    masks = np.stack([thing.mask for thing in things])
    shares = np.full(len(things), np.nan) if saliency is None else map_shares(saliency.map, masks)
    found = []
    for i, thing in enumerate(things):
        rows, columns = np.flatnonzero(thing.mask.any(axis=1)), np.flatnonzero(thing.mask.any(axis=0))
        if not len(rows):
            continue
        found.append(
            {
                "id": thing.name,
                "kind": thing.name,
                "lane": None,
                "distance": None,
                "share": shares[i],
                "effect": effects[i],
                "without": explainer.action_names[actions[i]],
                "flips": actions[i] != decision.action,
                "box": [columns[0], rows[0], columns[-1], rows[-1]],
                "outline": [part.ravel() for part in outlines(thing.mask)],
            }
        )
    return sorted(found, key=lambda thing: -thing["effect"])[:6]


def _value(name: str, text: str, kind: type) -> Any:
    """A setting's value from its text.

    Raises:
        UserError: it cannot have that.
    """
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is str and (name not in CHOICES or text in CHOICES[name]):
        return text
    if kind is float:
        low, high = RANGES[name]
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if low <= number <= high:
            return number
        raise UserError(f"{name} must be a number from {low:g} to {high:g}, not {text!r:.40}.")
    raise UserError(f"{name} cannot be {text!r:.40}: choose {' or '.join(CHOICES.get(name, ('true', 'false')))}.")
