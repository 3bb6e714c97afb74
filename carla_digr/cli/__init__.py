"""The `carla-digr` command: one sub-command a job.

A job is a function ``add_<job>(commands)`` that declares its sub-command and sets ``run``; what a job imports
stands in its run function, so that help is fast and a job needs only its own extras.

An option has one name and meaning in all jobs: ``--weights`` a policy, ``--out`` where results go, ``--port`` the
simulator's, ``--viewer-port`` the page's. What a job called it before stays as a second name.
"""

from __future__ import annotations

import argparse
import sys

from carla_digr import __version__
from carla_digr.cli.drives import add_ctl, add_live, add_play
from carla_digr.cli.policies import add_import
from carla_digr.cli.recordings import add_explain, add_repair, add_replay, add_video, add_view
from carla_digr.cli.simulators import add_benchmark, add_check_simulator, add_rollout, add_simulator
from carla_digr.cli.stages import add_combine, add_distill, add_evaluate, add_make_dataset, add_train_teacher
from carla_digr.errors import SENTENCE, tell


def main(argv: list[str] | None = None) -> int:
    """Run one job.

    Returns:
        Exit status: 0 on success, 1 when a job's checks failed, 2 on bad input (one sentence on standard error),
        130 on Ctrl-C.
    """
    message = "Interrupted."
    try:
        try:
            args = parser().parse_args(argv)
            message = getattr(args, "interrupted", message)
            return args.run(args) or 0
        finally:
            sys.stdout.flush()  # where an error of it is told
    except KeyboardInterrupt:
        print(f"\n{SENTENCE}{message}", file=sys.stderr)
        return 130
    except Exception as error:
        return tell(error)


def parser() -> argparse.ArgumentParser:
    """The command line, with every job."""
    parser = argparse.ArgumentParser(
        prog="carla-digr", description="Live driving explainer: DIGR policies and their saliency maps."
    )
    parser.add_argument("--version", action="version", version=f"carla-digr {__version__}")
    commands = parser.add_subparsers(title="jobs", metavar="JOB", required=True)
    for add in JOBS:
        add(commands)
    return parser


JOBS = (
    add_train_teacher,
    add_make_dataset,
    add_distill,
    add_evaluate,
    add_combine,
    add_import,
    add_simulator,
    add_check_simulator,
    add_rollout,
    add_benchmark,
    add_live,
    add_ctl,
    add_play,
    add_replay,
    add_explain,
    add_view,
    add_video,
    add_repair,
)
