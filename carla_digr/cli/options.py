"""What several jobs have in common."""

from __future__ import annotations

import argparse

RESUMES = "Interrupted; run the same command again to resume."


def add_module(parser: argparse.ArgumentParser) -> None:
    """`--module`, of jobs that load a policy."""
    parser.add_argument(
        "--module", metavar="PACKAGE.MODULE:FACTORY", help="the policy's own code, if its card asks for it; it is run"
    )


def add_argument(parser: argparse.ArgumentParser, argument) -> None:
    """An argument of a composition as an option."""
    default = f" (default: {argument.default})" if argument.default else ""
    parser.add_argument(
        f"--{argument.name.replace('_', '-')}",
        default=argument.default,
        choices=argument.choices or None,
        help=argument.description + default,
    )
