"""The jobs of the offline stages."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from carla_digr.cli.options import RESUMES, add_module
from carla_digr.errors import UserError
from carla_digr.training import STAGES


def add_train_teacher(commands: argparse._SubParsersAction) -> None:
    """`train-teacher`: PPO."""

    def run(args: argparse.Namespace) -> None:
        config, out = _stage(args)
        from carla_digr.tasks import make_task
        from carla_digr.training.teacher import train_teacher

        if args.ray is not None and getattr(make_task(config), "most_environments", None) is None:
            raise UserError(
                "A teacher is trained on a cluster by driving on its servers: name them in "
                "environment.simulators, or leave --ray out."
            )
        with _cluster(args):
            train_teacher(config, out)

    parser = _add_stage(commands, "train-teacher", run)
    _add_ray(parser, "drive on environment.simulators from the nodes that have them")


def add_make_dataset(commands: argparse._SubParsersAction) -> None:
    """`make-dataset`: perturbation saliency maps over the teacher's states."""

    def run(args: argparse.Namespace) -> None:
        config, out = _stage(args)
        from carla_digr.training.saliency_dataset import make_dataset

        with _cluster(args) as cluster:
            make_dataset(config, out, args.weights or out / "teacher.safetensors", args.module, cluster)

    parser = _add_stage(commands, "make-dataset", run)
    _add_ray(parser, "compute the maps on all nodes")
    _add_teacher(parser)


def add_distill(commands: argparse._SubParsersAction) -> None:
    """`distill`: the DIGR student."""

    def run(args: argparse.Namespace) -> None:
        config, out = _stage(args)
        from carla_digr.training.distill import distill

        distill(config, out, args.weights or out / "teacher.safetensors", args.module)

    parser = _add_stage(commands, "distill", run)
    _add_teacher(parser)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """`evaluate`: performance and saliency of teacher and student."""

    def run(args: argparse.Namespace) -> None:
        config, out = _stage(args)
        from carla_digr.evaluation.evaluate import evaluate
        from carla_digr.scheduling import usable_cores

        processes = 1 if args.quick else usable_cores()
        with _cluster(args) as cluster:
            evaluate(config, out, args.teacher, args.student, args.quick, args.module, cluster, processes)

    parser = _add_stage(commands, "evaluate", run)
    _add_ray(parser, "drive the policies' episodes on all nodes")
    weights = "(default: OUT/{0}.safetensors if there, else the weights that ship)"
    parser.add_argument("--teacher", type=Path, help="teacher's weights " + weights.format("teacher"))
    parser.add_argument("--student", type=Path, help="student's weights " + weights.format("student"))
    add_module(parser)
    parser.add_argument("--quick", action="store_true", help="measure a little of everything, in under a minute")


def add_combine(commands: argparse._SubParsersAction) -> None:
    """`combine`: evaluations of several seeds as one."""

    def run(args: argparse.Namespace) -> None:
        from carla_digr.evaluation.seeds import combine_seeds

        combine_seeds(args.evaluations, args.out)

    parser = commands.add_parser(
        "combine",
        help="combine the evaluations of several seeds",
        description="Combine the evaluations of several seeds: mean and standard deviation over the seeds of every "
        "figure, as a report.",
    )
    parser.add_argument(
        "evaluations",
        metavar="EVALUATION",
        type=Path,
        nargs="+",
        help="directories of evaluate, such as RUN/evaluation",
    )
    parser.add_argument("--out", type=Path, required=True, help="where the report goes")
    parser.set_defaults(run=run)


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        "--teacher",
        type=Path,
        metavar="FILE",
        help="the teacher, any policy (default: OUT/teacher.safetensors)",
    )
    add_module(parser)


def _add_stage(commands: argparse._SubParsersAction, name: str, run) -> argparse.ArgumentParser:
    summary = next(stage.summary for stage in STAGES if stage.name == name)
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. A job that was stopped resumes."
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a task's YAML file, or the name of one that ships")
    parser.add_argument("--out", type=Path, help="where results and saved states go (default: runs/<task>)")
    parser.add_argument("--seed", type=int, help="replaces the configuration's seed")
    parser.add_argument(
        "--progress",
        choices=("bar", "json"),
        default="bar",
        help="a bar, or for programs once a second a line of JSON on standard output (default: %(default)s)",
    )
    parser.set_defaults(run=run, interrupted=RESUMES)
    return parser


def _add_ray(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--ray", metavar="ADDRESS", help=f"{what} of the Ray cluster at host:port, or auto: of this machine's"
    )


def _cluster(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """The cluster that is asked for, or None."""
    if args.ray is None:
        return nullcontext()
    from carla_digr.training.cluster import Cluster

    return Cluster(args.ray)


def _stage(args: argparse.Namespace):
    """The configuration and the output directory of a stage, checked before anything slow is imported."""
    import logging
    from dataclasses import replace

    from carla_digr.tasks import load_config

    config = load_config(args.config)
    if args.seed is not None:
        if not 0 <= args.seed < 2**31:
            raise UserError(f"--seed must lie in [0, {2**31 - 1}], not {args.seed}.")
        config = replace(config, seed=args.seed)
    out = args.out or Path("runs") / config.task
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"Cannot write to {out}: {existing} is not a writable directory; choose another --out.")

    from carla_digr.training import prepare_process
    from carla_digr.training.progress import BesideBars, Progress

    Progress.as_json = args.progress == "json"
    logging.basicConfig(handlers=[BesideBars()], format="%(message)s")
    prepare_process()
    return config, out
