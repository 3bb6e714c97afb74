"""Causal truth: which object decides, by taking each out of the world, and whether a map says so.

The effect of an object is KL(pi(s) || pi(s')), s' being the same instant without it (tasks.objects). A map is held
against the effects of the policy that it explains: Atrey, Clary and Jensen 2020 asked for such a test of saliency in
reinforcement learning. The share of a map on an object is its mass within MARGIN pixels of the object's mask.

Beside the methods stand maps that know less: the same value everywhere, the map of another frame, a network with random
weights, the contrast of the picture alone, and the guess that what is near and in the way decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.evaluation import figures
from carla_digr.evaluation.report import Evaluation, markdown_table
from carla_digr.evaluation.saliency_methods import LINEAR, OF_THE_STUDENT, MapOf, saliency_methods
from carla_digr.policy import Policy, to_input
from carla_digr.saliency import METHODS, metrics
from carla_digr.saliency.faithfulness import randomised
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.perturbation import Perturbation, gaussian_blur
from carla_digr.tasks.objects import SceneObject
from carla_digr.training.effects import outputs_without
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import greedy, sampled

MARGIN = 2  # pixels around an object's mask that count as its own
DECIDING = 0.3  # KL from which on an object decides, if it has the largest effect
HELD = 0.1  # share of the map that an object must hold whose removal changes the action
EXAMPLES = ("linear", "vg", "gb")  # keys of the methods whose maps the figure shows
LOOKED_THROUGH = 10  # scenes for each one that the figure shows
LOOKS = 20  # for each scene that is wanted, after which there are no more
RESAMPLES = 500  # of the episodes, for the standard errors
FLAT, OTHER, RANDOM_WEIGHTS, CONTRAST, NEAR = (
    "every pixel alike",
    "the map of another frame",
    "random weights",
    "contrast, no policy",
    "near and in the way, no policy",
)
COLUMNS = {
    "correlation": "rank correlation, all",
    "first": "first right, all",
    "own_correlation": "rank correlation, {named}",
    "mass": "mass on the decider",
    "brightest": "brightest pixel on it",
    "nothing": "mass on nothing",
    "held": "flipping {named} with 10 %",
    "needed": "mass on {needed}",
}


@dataclass(frozen=True)
class Scene:
    """One state, its objects, and what each does to both policies' decisions.

    Attributes:
        state: uint8 (C, H, W).
        episode: number of the episode it is from.
        objects: without their pictures.
        masks: bool (K, H, W), widened by MARGIN.
        effects, flips: by policy, "teacher" or "student": float (K,) and bool (K,), whether the greedy action changes.
    """

    state: NDArray[np.uint8]
    episode: int
    objects: list[SceneObject]
    masks: NDArray[np.bool_]
    effects: dict[str, NDArray[np.float64]]
    flips: dict[str, NDArray[np.bool_]]


def asked_of(evaluation: Evaluation) -> dict[str, str]:
    """What the named objects are called and how the student plays; empty if the task cannot take things out."""
    env: Any = evaluation.task.make_vec_env(1, evaluation.seed)
    try:
        return {"named": env.named_objects, "plays": env.plays} if hasattr(env, "objects") else {}
    finally:
        env.close()


def measure_causal(evaluation: Evaluation) -> dict[str, Any]:
    """Both policies' maps against what decides.

    Returns:
        scenes: how many. named, plays: ``asked_of``. needed: kinds that the task cannot be done without. effects:
        whose -> kind of object -> mean of the largest effect of its kind, and share of the scenes in which one of them
        changes the greedy action. changes: share of consecutive decisions of the student's drive that differ. rows:
        whose -> method or control -> column -> mean, standard_error (bootstrap over episodes) and count; None where
        there is nothing to count.
    """
    part = evaluation.part
    scenes = cache(lambda: collect_scenes(evaluation))
    perturbation = Perturbation.from_settings(evaluation.config.saliency_dataset)
    policies: dict[str, Policy] = {"teacher": evaluation.teacher, "student": evaluation.student}
    methods = {whose: saliency_methods(policy, policy, perturbation)[0] for whose, policy in policies.items()}
    maps = cache(lambda whose, name: _maps(evaluation, methods[whose], whose, name, scenes()[0]))

    def row(whose: str, name: str) -> Any:
        return part(f"causal, {name} of the {whose}", lambda: causal_row(scenes()[0], maps(whose, name), whose))

    facts = {**asked_of(evaluation), **part("causal, effects", lambda: _effects(*scenes()))}
    if not facts["scenes"]:
        return {**facts, "rows": {}}
    rows = {}
    for whose, policy in policies.items():
        names = [name for name in methods[whose] if name not in OF_THE_STUDENT]  # the others are of each policy here
        controls = [FLAT, *([OTHER] if LINEAR in methods[whose] else []), CONTRAST, NEAR]
        controls += [RANDOM_WEIGHTS] if policy.offers == "layers" else []
        rows[whose] = {name: row(whose, name) for name in (*names, *controls)}
    return {**facts, "rows": rows}


def collect_scenes(evaluation: Evaluation, wanted: int | None = None) -> tuple[list[Scene], float]:
    """Scenes of the student's episodes that nothing was trained on, and how often its most probable action changes.

    Args:
        wanted: how many; None: ``causal_scenes``.

    Returns:
        The scenes, all different, with as many named objects as the task asks for, fewer where such are rare; and the
        share of consecutive decisions that differ.
    """
    settings = evaluation.config.evaluation
    wanted = wanted or settings.causal_scenes
    env: Any = evaluation.task.make_vec_env(settings.causal_environments, evaluation.seed + 5)
    decide = greedy(evaluation.student)
    rng = np.random.default_rng((evaluation.seed + 5, 1))
    play = sampled(evaluation.student, rng) if env.plays == "sampled" else decide
    policies = {"teacher": evaluation.teacher, "student": evaluation.student}
    scenes: list[Scene] = []
    seen: set[bytes] = set()  # an agent that is stuck comes to the same states again and again
    episodes = np.arange(env.num_envs)
    changed = steps = 0
    before: NDArray[np.int64] | None = None
    try:
        observations = np.asarray(env.reset())
        with Progress(total=wanted, unit="scene", desc="scenes") as progress:
            step = looks = 0
            while len(scenes) < wanted and looks < LOOKS * wanted + env.num_envs:
                decisions = decide(observations)
                changed += 0 if before is None else int((decisions != before).sum())
                steps += 0 if before is None else len(decisions)
                observations, _, dones, _ = env.step(decisions if play is decide else play(observations))
                before = decisions
                step += 1
                if dones.any():
                    episodes = np.where(dones, episodes.max() + 1 + np.arange(len(dones)), episodes)
                    before = None
                if step % settings.causal_interval:
                    continue
                looks += env.num_envs
                for i, objects in enumerate(env.objects()):
                    state = observations[i].tobytes()
                    enough = sum(item.named for item in objects) >= env.least_named
                    if enough and state not in seen and len(scenes) < wanted:
                        seen.add(state)
                        scenes.append(_scene(observations[i].copy(), int(episodes[i]), objects, policies))
                        progress.update()
    finally:
        env.close()
    return scenes, changed / max(steps, 1)


def _scene(state: NDArray[np.uint8], episode: int, objects: list[SceneObject], policies: dict[str, Policy]) -> Scene:
    effects, flips = {}, {}
    for whose, policy in policies.items():
        outputs = outputs_without(policy, state, objects)
        effects[whose] = DISTRIBUTIONS[policy.output].divergence(outputs[:1], outputs[1:]).numpy()
        flips[whose] = (outputs[1:].argmax(dim=1) != outputs[0].argmax()).numpy()
    masks = metrics.widened(np.stack([item.mask for item in objects]).astype(np.int8), MARGIN) == 1
    kept = [replace(item, without=np.zeros(0, np.uint8)) for item in objects]
    return Scene(state, episode, kept, masks, effects, flips)


def _maps(
    evaluation: Evaluation, methods: dict[str, MapOf], whose: str, name: str, scenes: list[Scene]
) -> list[NDArray[np.float64]]:
    """Maps of the first scenes, float (H, W) each, not negative; of a slow method of fewer."""
    states = to_input(torch.from_numpy(np.stack([scene.state for scene in scenes])))
    if name == FLAT:
        return list(np.ones((len(scenes), *states.shape[2:])))
    if name == NEAR:
        return [_guess(scene) for scene in scenes]
    if name == CONTRAST:
        contrast = (gaussian_blur(states, 10.0) - states).square().sum(dim=1, keepdim=True)
        return list(gaussian_blur(contrast, 1.5)[:, 0].double().numpy())
    if name == OTHER:
        linear = _maps(evaluation, methods, whose, LINEAR, scenes)
        return linear[1:] + linear[:1]
    method = methods[LINEAR if name == RANDOM_WEIGHTS else name]
    if name == RANDOM_WEIGHTS:
        *_, (_, drawn) = randomised(method.policy, evaluation.seed)
        method = replace(method, policy=drawn)
    if method.slow:
        states = states[: evaluation.config.evaluation.slow_states]
    found = [
        normalise(method(batch))[0]
        for batch in Progress(states.split(16), desc=f"causal, {name} of the {whose}", unit="batch")
    ]
    return list(torch.cat(found).double().numpy())


def _guess(scene: Scene) -> NDArray[np.float64]:
    """The nearness of each object that has one, on its mask."""
    guess = np.zeros(scene.masks.shape[1:])
    for item in scene.objects:
        if item.named:
            guess[item.mask] = item.nearness / item.mask.sum()
    return guess


def causal_row(scenes: list[Scene], maps: list[NDArray[np.float64]], whose: str) -> dict[str, Any]:
    """One map's figures against the effects on the policy that it explains.

    Returns:
        column of COLUMNS -> mean, standard_error and count. correlation: Spearman's, of effects and shares of all
        objects of a scene, mean over scenes; own_correlation: of the named ones. first: scenes in which the
        largest share is on the object of the largest effect. mass, brightest: share on it, and whether the map's
        maximum is, in scenes whose largest effect is at least DECIDING and is a named one. nothing: share on
        no object. held: of named objects whose removal changes the greedy action, those that have HELD. needed: share
        on those that the task cannot be done without, where it says so.
    """
    values: dict[str, list[tuple[int, float]]] = {column: [] for column in COLUMNS}
    for scene, found in zip(scenes, maps, strict=False):
        total = found.sum()
        effects, flips = scene.effects[whose], scene.flips[whose]
        shares = (scene.masks * found).sum(axis=(1, 2)) / total if total > 0 else np.zeros(len(effects))
        named = np.array([item.named for item in scene.objects])

        def note(column: str, value: float, scene: Scene = scene) -> None:
            if not np.isnan(value):
                values[column].append((scene.episode, float(value)))

        note("correlation", _spearman(effects, shares))
        note("own_correlation", _spearman(effects[named], shares[named]))
        first = int(effects.argmax())
        note("first", float(total > 0 and shares.argmax() == first and shares.max() > 0))
        if effects[first] >= DECIDING and named[first]:
            note("mass", shares[first])
            note("brightest", float(total > 0 and scene.masks[first].ravel()[found.argmax()]))
        note("nothing", float(found[~scene.masks.any(axis=0)].sum() / total) if total > 0 else 1.0)
        needed = np.array([item.needed for item in scene.objects])
        if needed.any():
            note("needed", float(found[scene.masks[needed].any(axis=0)].sum() / total) if total > 0 else 0.0)
        for share in shares[named & flips]:
            note("held", float(share >= HELD))
    return {column: _bootstrapped(entries) for column, entries in values.items()}


def _spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Rank correlation, 0 where the second is constant, NaN where there is nothing to rank."""
    if len(first) < 2 or np.ptp(first) == 0:
        return float("nan")
    found = float(metrics.rank_correlation(first[None], second[None])[0])
    return 0.0 if np.isnan(found) else found


def _bootstrapped(entries: list[tuple[int, float]]) -> dict[str, float] | None:
    """Mean of the values, and its standard error by drawing the episodes anew."""
    if not entries:
        return None
    numbers, values = (np.array(column) for column in zip(*entries, strict=True))
    _, index = np.unique(numbers, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return {"mean": float(values.mean()), "standard_error": float(means.std()), "count": len(values)}


def _effects(scenes: list[Scene], changes: float) -> dict[str, Any]:
    kinds = list(dict.fromkeys(item.kind for scene in scenes for item in scene.objects))
    effects: dict[str, dict[str, Any]] = {}
    for whose in ("teacher", "student"):
        effects[whose] = {}
        for kind in kinds:
            largest, flipped = [], []
            for scene in scenes:
                of_kind = [k for k, item in enumerate(scene.objects) if item.kind == kind]
                largest.append(max((scene.effects[whose][k] for k in of_kind), default=0.0))
                flipped.append(any(scene.flips[whose][k] for k in of_kind))
            effects[whose][kind] = {"largest": float(np.mean(largest)), "flips": float(np.mean(flipped))}
    needed = list(dict.fromkeys(item.kind for scene in scenes for item in scene.objects if item.needed))
    return {
        "needed": " and ".join(needed),
        "scenes": len(scenes),
        "episodes": len({scene.episode for scene in scenes}),
        "effects": effects,
        "changes": changes,
    }


def draw_causal(evaluation: Evaluation) -> dict[str, bytes]:
    """The scenes in which a named object has most effect, one of each of as many stretches as there are ``examples``.

    Returns:
        figure_causal.png, of the student's effects and maps; nothing if there was no scene.
    """
    count = evaluation.config.evaluation.examples
    scenes = collect_scenes(evaluation, LOOKED_THROUGH * count)[0]
    if not scenes:
        return {}
    student = evaluation.student
    stretches = np.array_split(np.arange(len(scenes)), min(count, len(scenes)))
    shown = [scenes[max(stretch, key=lambda k: _named_effect(scenes[k]))] for stretch in stretches]
    perturbation = Perturbation.from_settings(evaluation.config.saliency_dataset)
    methods = saliency_methods(student, student, perturbation)[0]
    titles = [METHODS[key].title for key in EXAMPLES]
    maps = {name: _maps(evaluation, methods, "student", name, shown) for name in titles if name in methods}
    rows = [
        figures.ObjectsOfState(
            scene.state,
            [item.name for item in scene.objects],
            np.stack([item.mask for item in scene.objects]),
            scene.effects["student"],
            {
                name: (found[k], (scene.masks * found[k]).sum(axis=(1, 2)))
                for name, found in maps.items()
                if k < len(found)
            },
        )
        for k, scene in enumerate(shown)
    ]
    return {"figure_causal.png": figures.causal_grid(rows)}


def _named_effect(scene: Scene) -> float:
    """The student's largest effect of a named object."""
    return max(effect for effect, item in zip(scene.effects["student"], scene.objects, strict=True) if item.named)


def report_causal(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown for ``measure_causal``."""
    named = results["named"]
    if not results["scenes"]:
        return ["## Which object decides?", "", "No scene had as many objects as it takes to ask.", ""]
    lines = [
        "## Which object decides?",
        "",
        f"Each object of {results['scenes']} fresh scenes of {results['episodes']} {results['plays']} episodes of the "
        "student was taken out and the instant drawn again: its effect is KL(pi || pi'). A map's share on an object is "
        f"its mass within {MARGIN} pixels of it. Rank correlation: of effects and shares, mean over scenes. First "
        "right: the largest share is where the largest effect is. The decider: the object with the largest effect, "
        f"where that is at least {DECIDING} and it is among the {named}. Nothing: outside all objects. With 10 %: of "
        f"the {named} without which the greedy action is another one. ± one standard error by bootstrap over episodes.",
        "",
    ]
    columns = {c: title.format(named=named, needed=results.get("needed")) for c, title in COLUMNS.items()}
    if not results.get("needed"):  # nor did reports of before know it
        del columns["needed"]
    for whose, rows in results["rows"].items():
        lines += [f"Maps of the {whose}:", ""]
        table = [[name, *(_text(row[c]) for c in columns)] for name, row in rows.items()]
        lines += markdown_table(["map", *columns.values()], table)
        lines.append("")
    lines += [
        f"The student's greedy action changes in {100 * results['changes']:.0f} % of consecutive decisions. What "
        "objects of each kind do: mean of the largest effect in a scene, and scenes in which taking one out changes "
        "the greedy action:",
        "",
    ]
    lines += markdown_table(
        ["kind", "teacher: effect", "changes the action", "student: effect", "changes the action"],
        [
            [
                name,
                *(
                    text
                    for whose in ("teacher", "student")
                    for text in (
                        f"{results['effects'][whose][name]['largest']:.3f}",
                        f"{100 * results['effects'][whose][name]['flips']:.0f} %",
                    )
                ),
            ]
            for name in results["effects"]["student"]
        ],
    )
    return [*lines, ""]


def _text(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.2f} ± {value['standard_error']:.2f}"
