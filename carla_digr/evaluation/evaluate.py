"""Stage 4: how well teacher and student act, and how good their saliency is.

Of every task: the task's metrics over the same fresh episodes for every policy, beside a random one and, where the task
has an action that does nothing, one that always takes it; the saliency methods on fresh states of the teacher's
episodes, against the teacher's perturbation maps, and against the truth where the task knows which pixels matter. What
a task measures besides is in its own report module (``task_report``).
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr import checkpoint
from carla_digr.config import Config
from carla_digr.evaluation import figures
from carla_digr.evaluation.report import Evaluation, TaskReport, markdown_table, spread
from carla_digr.evaluation.saliency_methods import DIGR, DIGR_LINEAR, MapOf, milliseconds_per_map, saliency_methods
from carla_digr.files import atomic_write, read_json
from carla_digr.policy import Policy, device_under, to_input
from carla_digr.saliency import metrics
from carla_digr.saliency.gradient import normalise
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps
from carla_digr.tasks import Batch, Task, make_task
from carla_digr.training import prepare_worker
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import Act, greedy, load_policy, run_episodes, sampled, states_of
from carla_digr.training.state import ELSEWHERE

if TYPE_CHECKING:
    from carla_digr.training.cluster import Cluster

QUICK: dict[str, Any] = {
    "episodes": 16,
    "saliency_states": 8,
    "examples": 3,
    "table_states": 200,
    "slow_states": 8,
    "causal_scenes": 6,
    "causal_environments": 2,
    "attack_episodes": 4,
    "attack_epsilons": (0.04,),
}
"""What `--quick` measures; the rest of the section has its defaults. A task's report may change it."""

TOGETHER = 32  # states whose maps are made in one call
PERFORMANCE = "performance of "  # begins the names of such parts

REPORTS = {
    "red_fetch_green": "carla_digr.evaluation.red_fetch_green",
    "breakout": "carla_digr.evaluation.breakout",
    "driving": "carla_digr.evaluation.driving",
}
"""Modules of the reports of our tasks; a task of another package names its own in its attribute ``report``."""


def task_report(task: Task) -> TaskReport:
    """The report module of a task."""
    own = REPORTS.get(task.name) or getattr(task, "report", None)
    return cast(TaskReport, import_module(own or "carla_digr.evaluation.any_task"))


def evaluate(
    config: Config,
    out: Path,
    teacher_path: Path | None = None,
    student_path: Path | None = None,
    quick: bool = False,
    module: str | None = None,
    cluster: Cluster | None = None,
    processes: int = 1,
) -> None:
    """Measure, and write ``results.json``, ``report.md`` and pictures to ``OUT/evaluation``.

    ``quick`` measures a little of everything, to ``OUT/evaluation-quick``. A killed evaluation keeps the parts that it
    had finished. Without paths the weights of ``OUT`` are taken, or those that ship with the package. ``module``: see
    ``checkpoint.load``. ``cluster``: whose nodes drive the episodes, those of a policy each, and of a policy under
    an attack; on servers, which one policy needs all at once, this process drives. ``processes``: on the CPU as many
    besides this one measure what does not depend on anything else, if more than one; the figures are the same with any
    number.

    Raises:
        UserError: weights are missing, damaged or of another task.
    """
    if quick:
        config = replace(config, evaluation=type(config.evaluation)(**QUICK))
        config = getattr(task_report(make_task(config)), "quick", lambda c: c)(config)
    task = make_task(config)
    own = task_report(task)
    teacher_path = teacher_path or _default_weights(task, out, "teacher")
    teacher, teacher_card = load_policy(teacher_path, task, module, config.device)
    student_path = student_path or _default_weights(task, out, "student")
    student, student_card = load_policy(student_path, task, module, config.device)
    directory = out / ("evaluation-quick" if quick else "evaluation")
    parts = _Parts(directory / "parts.json", config, teacher_card, student_card)
    parts.device = device_under(teacher)
    if getattr(task, "most_environments", None) is not None:
        processes = 1
    elif cluster is not None or parts.device.type != "cpu":
        parts.cluster, processes = cluster, 1
    perturbation = Perturbation.from_settings(config.saliency_dataset)
    methods, left_out = saliency_methods(teacher, student, perturbation)
    evaluation = Evaluation(
        config,
        task,
        teacher,
        student,
        student_path,
        directory,
        methods,
        _evaluation_seed(config) + 2,
        parts.get,
        parts.all,
    )
    seed, dataset = _evaluation_seed(config), config.saliency_dataset
    states, importance = states_of(
        task,
        teacher,
        min(dataset.environments, config.evaluation.saliency_states),
        config.evaluation.saliency_states,
        dataset.state_interval,
        seed + 1,
        (seed, 2),
    )
    reference = cache(partial(_reference_maps, config, teacher, states))  # made only if a part is missing
    state = to_input(torch.from_numpy(states[:1]))
    times = {  # before other processes are at work
        name: milliseconds_per_map(method, state)
        for name, method in methods.items()
        if f"saliency, {name}" not in parts.finished
    }
    alone = _independent(evaluation)
    with parts.beside(processes, (config, teacher_path, student_path, module, directory), alone):
        saliency = {
            name: parts.get(
                f"saliency, {name}",
                partial(_saliency, config, name, method, states, importance, reference, times.get(name, (0.0, 0.0))),
            )
            for name, method in methods.items()
        }
        measured = own.measure(evaluation)
        performance = parts.all({name: part for name, part in alone.items() if name.startswith(PERFORMANCE)})
    results: dict[str, Any] = {
        "task": config.task,
        "seed": config.seed,
        "config": config.to_dict(),
        "teacher": _identity(teacher_card),
        "student": _identity(student_card),
        "performance": {name.removeprefix(PERFORMANCE): row for name, row in performance.items()},
        "left_out": left_out,
        "saliency": saliency,
        **measured,
    }
    pictures = {"figure_time.png": figures.time_per_map(results["saliency"], task.observation_shape[1:])}
    rows = np.linspace(0, len(states) - 1, min(config.evaluation.examples, len(states))).astype(int)
    shown = to_input(torch.from_numpy(states[rows]))
    maps = {name: normalise(method(shown))[0].numpy() for name, method in methods.items()}
    pictures["figure_maps.png"] = figures.map_grid(states[rows], maps)
    pictures |= own.draw(evaluation, results)
    slow = [name for name, method in methods.items() if method.slow]
    report = [*_report(results, slow), *own.report(evaluation, results)]
    for name in pictures:
        report += [f"![{Path(name).stem.replace('_', ' ')}]({name})", ""]
    for name, picture in pictures.items():
        with atomic_write(directory / name) as file:
            file.write(picture)
    text = "\n".join(report)
    for name, content in (("results.json", json.dumps(results, indent=1) + "\n"), ("report.md", text)):
        with atomic_write(directory / name) as file:
            file.write(content.encode())
    print(text)
    print(f"{directory}: results.json, report.md, {', '.join(pictures)}")


def _default_weights(task: Task, out: Path, role: str) -> Path:
    """The run's own weights, else those that ship for the task and its actions."""
    own = out / f"{role}.safetensors"
    if own.exists():
        return own
    shipped = sorted(checkpoint.WEIGHTS_DIRECTORY.glob(f"{task.name}*_{role}.safetensors"))
    return next(
        (path for path in shipped if checkpoint.read_card(path)["action_names"] == list(task.action_names)), own
    )


def _evaluation_seed(config: Config) -> int:
    return config.seed + 3_000_003  # no stage before has seen these episodes


def _contestants(config: Config, task: Task, teacher: Policy, student: Policy) -> dict[str, Callable[[Batch], Act]]:
    """Every policy to measure, made for the environments that it is to act in; each draws from its own generator."""

    def rng(k: int) -> np.random.Generator:
        return np.random.default_rng((_evaluation_seed(config), k))

    actions = len(task.action_names)
    random = rng(0)
    contestants: dict[str, Callable[[Batch], Act]] = {
        "teacher, sampled": lambda env: sampled(teacher, rng(1)),
        "student, sampled": lambda env: sampled(student, rng(1)),
        "teacher, greedy": lambda env: greedy(teacher),
        "student, greedy": lambda env: greedy(student),
        "random": _unseeing(lambda observations: random.integers(actions, size=len(observations))),
    }
    idle = task.idle_action
    if idle is not None:
        name = f"always {task.action_names[idle]}"
        contestants[name] = _unseeing(lambda observations: np.full(len(observations), idle))
    if task.expert is not None:
        contestants["expert with full state"] = task.expert
    return contestants


def _unseeing(act: Act) -> Callable[[Batch], Act]:
    """A contestant that does not look at the observations."""

    def contestant(env: Any) -> Act:
        if hasattr(env, "look_away"):
            env.look_away()
        return act

    return contestant


def _independent(evaluation: Evaluation) -> dict[str, Callable[[], Any]]:
    """Parts of which none needs another, by name."""
    config, task = evaluation.config, evaluation.task
    contestants = _contestants(config, task, evaluation.teacher, evaluation.student)
    performance = {
        f"{PERFORMANCE}{name}": partial(_performance, config, task, act, name) for name, act in contestants.items()
    }
    return performance | getattr(task_report(task), "independent", lambda evaluation: {})(evaluation)


def _performance(
    config: Config, task: Task, contestant: Callable[[Batch], Act], name: str
) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and standard error of each of the task's metrics."""
    settings = config.evaluation
    env = task.make_vec_env(min(settings.environments, settings.episodes), _evaluation_seed(config))
    try:
        episodes = run_episodes(env, contestant(env), settings.episodes, name)
    finally:
        env.close()
    known = [metric for metric in episodes[0] if all(metric in episode for episode in episodes)]
    return {metric: spread([episode[metric] for episode in episodes]) for metric in known}


def _reference_maps(config: Config, teacher: Policy, states: NDArray[np.uint8]) -> Tensor:
    """The teacher's normalised perturbation maps, float (N, H, W), which other maps are compared with.

    Those of the first ``slow_states`` are made together as the method's own are, so that they are the same bits.
    """
    perturbation = Perturbation.from_settings(config.saliency_dataset)
    device, slow = device_under(teacher), config.evaluation.slow_states
    inputs = to_input(torch.from_numpy(states))
    batches = [batch for some in (inputs[:slow], inputs[slow:]) for batch in some.split(TOGETHER) if len(batch)]
    maps = [
        perturbation_maps(teacher, batch.to(device), perturbation).cpu()
        for batch in Progress(batches, unit="batch", desc="reference maps")
    ]
    return normalise(torch.cat(maps))[0]


def _saliency(
    config: Config,
    name: str,
    method: MapOf,
    states: NDArray[np.uint8],
    importance: NDArray[np.int8] | None,
    reference: Callable[[], Tensor],
    times: tuple[float, float],
) -> dict[str, float | None]:
    """Scores of one method's maps, means over the states; slow methods take the first ``slow_states`` of them.

    share: of a map's mass where the teacher's perturbation map is at or below the threshold. agreement: AUC against the
    pixels above it. important, unimportant, auc: Table 1, None without truth. flat: share of maps without a gradient.
    milliseconds, milliseconds_deviation: ``times``, of one map. None where no state has both a map and a reference.
    """
    states = states[: config.evaluation.slow_states] if method.slow else states
    inputs = to_input(torch.from_numpy(states))
    batches = Progress(inputs.split(TOGETHER), desc=name, unit="batch")
    normalised, flags = normalise(torch.cat([method(batch) for batch in batches]))
    maps, flat = normalised.numpy(), flags.numpy()
    kept = (reference()[: len(states)] > config.saliency_dataset.threshold).numpy()
    scored = np.flatnonzero(kept.any(axis=(1, 2)) & ~flat)
    shares = [float((maps[i] * ~kept[i]).sum() / maps[i].sum()) for i in scored]
    agreements = [metrics.auc(maps[i][kept[i]], maps[i][~kept[i]]) for i in scored]
    truth = metrics.score(maps, importance[: len(states)]) if importance is not None else None
    milliseconds, deviation = times
    return {
        "share": float(np.mean(shares)) if shares else None,
        "agreement": float(np.mean(agreements)) if agreements else None,
        "important": truth.important if truth else None,
        "unimportant": truth.unimportant if truth else None,
        "auc": truth.auc if truth else None,
        "flat": float(flat.mean()),
        "milliseconds": milliseconds,
        "milliseconds_deviation": deviation,
    }


def _report(results: dict[str, Any], slow: list[str]) -> list[str]:
    names = {name: f"{card['weights_sha256'][:12]}, {card['steps']} steps" for name, card in
             (("teacher", results["teacher"]), ("student", results["student"]))}  # fmt: skip
    settings = results["config"]["evaluation"]
    lines = [
        f"# Evaluation: {results['task']}",
        "",
        f"Teacher {names['teacher']}; student {names['student']}; seed {results['seed']}.",
        "",
        f"## Performance, {settings['episodes']} episodes each, mean ± standard error",
        "",
    ]
    metric_names = list(next(iter(results["performance"].values())))
    lines += markdown_table(
        ["policy", *metric_names],
        [
            [policy, *(f"{row[m]['mean']:.4g} ± {row[m]['standard_error']:.2g}" for m in metric_names)]
            for policy, row in results["performance"].items()
        ],
    )
    lines += [
        "",
        f"## Saliency, {settings['saliency_states']} fresh states",
        "",
        f"{DIGR} is eq. 2 on the student, {DIGR_LINEAR} its linearised perturbation map; the others explain the "
        "teacher. share: of a map's mass outside the teacher's perturbation map (lower is better). agreement: AUC "
        "against that map (higher is better). important, unimportant, auc: against the truth, where the task knows "
        f"it. flat: maps without a gradient. Slow methods ({', '.join(slow)}) are scored on "
        f"{min(settings['slow_states'], settings['saliency_states'])} states.",
        "",
    ]
    columns = ("share", "agreement", "important", "unimportant", "auc", "flat", "milliseconds")
    lines += markdown_table(
        ["method", *columns],
        [
            [name, *("-" if row[c] is None else f"{row[c]:.4g}" for c in columns)]
            for name, row in results["saliency"].items()
        ],
    )
    lines += ["", *(f"{name} is left out: {why}" for name, why in results["left_out"].items())]
    return [*lines, ""] if results["left_out"] else lines


def _identity(card: dict[str, Any]) -> dict[str, Any]:
    return {key: card.get(key) for key in ("weights_sha256", "steps", "seed", "commit", "metrics")}


class _Parts:
    """Finished parts of an evaluation, on disk; of other weights or settings they are measured again."""

    def __init__(self, path: Path, config: Config, *cards: dict[str, Any]):
        self.path = path
        values = config.to_dict()
        sections = {key: values[key] for key in ("seed", "environment", "evaluation")}
        for key in ELSEWHERE:
            sections["environment"].pop(key, None)
        used = ("radius", "blur_sigma", "stride", "score", "threshold", "environments", "state_interval")
        sections |= {key: values["saliency_dataset"][key] for key in used}
        self.key = {"weights": [card["weights_sha256"] for card in cards], **sections}
        self.finished: dict[str, Any] = {}
        self.cluster: Cluster | None = None
        self.device = torch.device("cpu")
        self._begun: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        try:
            stored = read_json(path)
            if stored["key"] == self.key:
                self.finished = stored["finished"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a cache: without it everything is measured

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of this name, measured unless it is there or is being measured beside."""
        if name in self._begun:
            try:
                return self._begun[name].result()
            except BrokenProcessPool:
                pass  # a process was killed: what it had is measured here
        if name not in self.finished:
            self._keep(name, measure())
        return self.finished[name]

    @contextmanager
    def beside(self, processes: int, given: tuple[Any, ...], names: Iterable[str]) -> Generator[None, None, None]:
        """While this lasts, other processes measure those of the parts of ``_independent`` that are missing.

        Args:
            processes: how many; with one nothing is measured beside.
            given: arguments of ``_begin_beside``.
        """
        missing = [name for name in names if name not in self.finished]
        if processes < 2 or len(missing) < 2:
            yield
            return
        others = {*multiprocessing.active_children()}
        pool = ProcessPoolExecutor(
            min(processes, len(missing)), multiprocessing.get_context("spawn"), _begin_beside, given
        )
        progress = Progress(total=len(missing), unit="part", desc=f"in {processes} other processes")

        def done(name: str, future: Future[Any]) -> None:
            if not future.cancelled() and future.exception() is None:
                self._keep(name, future.result())
                progress.update()

        try:
            for name in reversed(missing):  # the last ones, drives by two threads, keep several cores busy to the end
                self._begun[name] = pool.submit(_measured_beside, name)
                self._begun[name].add_done_callback(partial(done, name))
            yield
        finally:
            for child in {*multiprocessing.active_children()} - others:
                child.terminate()
            pool.shutdown(cancel_futures=True)  # its own thread joins them: two that do leave one that seems to live
            progress.close()
            self._begun.clear()

    def all(self, measures: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Parts of which none needs another: on the cluster at the same time, if there is one."""
        if self.cluster is not None:
            missing = [name for name in measures if name not in self.finished]
            done = Progress(total=len(missing), unit="part", desc="on the cluster")
            jobs = ((name, (self.cluster.share(measures[name]),)) for name in missing)
            with done, closing(self.cluster.each(_measured, jobs, self.device)) as results:
                for name, result in results:
                    self._keep(name, result)
                    done.update()
        return {name: self.get(name, measure) for name, measure in measures.items()}

    def _keep(self, name: str, result: Any) -> None:
        with self._lock:
            self.finished[name] = result
            with atomic_write(self.path) as file:
                file.write(json.dumps({"key": self.key, "finished": self.finished}).encode())


def _measured(measure: Callable[[], Any]) -> Any:
    return measure()


_beside: dict[str, Callable[[], Any]] = {}  # in a process beside the evaluation's own: what it can measure


def _begin_beside(config: Config, teacher_path: Path, student_path: Path, module: str | None, directory: Path) -> None:
    """Prepare a process that measures parts of ``_independent`` by their names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the evaluation ends it
    prepare_worker()
    Progress.hidden = True
    task = make_task(config)
    teacher, student = (load_policy(path, task, module, config.device)[0] for path in (teacher_path, student_path))
    seed = _evaluation_seed(config) + 2
    kept = _Parts(directory / "parts.json", config)  # of which none is asked for here
    evaluation = Evaluation(config, task, teacher, student, student_path, directory, {}, seed, kept.get, kept.all)
    _beside.update(_independent(evaluation))


def _measured_beside(name: str) -> Any:
    return _beside[name]()
