"""The jobs about simulators: the embedded highway as a server, and what is tried on any."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from carla_digr.errors import UserError, end_on_ctrl_c

if TYPE_CHECKING:
    from collections.abc import Callable

    from carla_digr.driving.rollouts import Decide


def add_simulator(commands: argparse._SubParsersAction) -> None:
    """`simulator`: the embedded highway as a server."""
    from carla_digr.simulator import add_server_options

    def run(args: argparse.Namespace) -> None:
        end_on_ctrl_c()
        from carla_digr.simulator.server import run_with

        run_with(args)

    parser = commands.add_parser(
        "simulator",
        help="serve the embedded highway to CARLA clients",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
A server for carla.Client 0.9.16, without Unreal Engine and without a GPU: the map RingHighway, a closed motorway of
2.7 km with four lanes a side. Programs connect as to CARLA:

    client = carla.Client("localhost", 2000)

It runs until it is told to end, by Ctrl-C, SIGTERM or --parent; 'nohup carla-digr simulator &' outlives its shell.
What it offers of CARLA, and what to use instead of the rest: docs/embedded_server.md.""",
    )
    add_server_options(parser)
    parser.set_defaults(run=run)


def add_check_simulator(commands: argparse._SubParsersAction) -> None:
    """`check-simulator`: whether a CARLA server can be driven on."""

    def run(args: argparse.Namespace) -> int:
        if args.config is not None:
            from carla_digr.tasks import load_config

            args.simulators = getattr(load_config(Path(args.config)).environment, "simulators", None)
            if not args.simulators:
                raise UserError(f"{args.config} names no environment.simulators; give --simulators HOST:PORT ....")
        if args.out is not None:
            print(f"All figures will be in {args.out}.", file=sys.stderr, flush=True)
        if args.simulators:
            from carla_digr.driving.several import check_simulators

            return 0 if check_simulators(tuple(args.simulators), args.timeout, args.full, args.out) else 1
        from carla_digr.driving.acceptance import check_simulator

        return 0 if check_simulator(args.host, args.port, args.timeout, full=args.full, report=args.out) else 1

    parser = commands.add_parser(
        "check-simulator",
        help="check a CARLA server or the embedded highway, step by step",
        description="Check whether the live drive can run on a CARLA 0.9.16 server; one line a check: what was "
        "expected, what was seen, pass or fail, and what to do. Exit status 1 says that a check failed.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where the server runs (default: this machine)")
    parser.add_argument("--port", type=int, default=2000, help="its port for calls (default: 2000)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--simulators",
        metavar="HOST:PORT",
        nargs="+",
        help="several servers in place of one: each, whether they have one map, and how fast they are together",
    )
    several.add_argument("--config", metavar="CONFIG", help="those of a driving task's YAML file")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for each call (default: %(default)g)")
    parser.add_argument("--full", action="store_true", help="measure longer, for about ten minutes at most")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where all figures go, a JSON file")
    parser.set_defaults(run=run)


def add_rollout(commands: argparse._SubParsersAction) -> None:
    """`rollout`: a policy's episodes on running simulators."""
    from carla_digr.live import composition

    def run(args: argparse.Namespace) -> None:
        import json

        from tqdm import tqdm

        from carla_digr.config import parse_section, read_yaml
        from carla_digr.driving.rollouts import RolloutConfig, drive_episodes, simulator_name, summary
        from carla_digr.files import atomic_write

        config = parse_section(RolloutConfig, read_yaml(args.config), str(args.config), "")
        who, driver = ("the scripted driver", None) if args.driver == "planner" else _policy_driver(args.weights)
        with tqdm(total=config.episodes, unit="episode") as progress:
            episodes = drive_episodes(config, driver, lambda _: progress.update())
        figures = summary(episodes)
        on = simulator_name(config.kind, episodes)
        results = {"simulator": on, "policy": who, "mean": figures, "episodes": episodes}
        with atomic_write(args.out) as file:
            file.write(json.dumps(results, indent=2).encode())
        print(
            f"{len(episodes)} episodes on {on}: {100 * figures['clean']:.0f} % clean, {figures['distance']:.0f} m and "
            f"{figures['mean_speed']:.1f} m/s on average; each of them is in {args.out}"
        )

    parser = commands.add_parser(
        "rollout",
        help="drive a policy's episodes on running simulators",
        description="Drive episodes on one or several running simulators at once and write down how they ended.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file like configs/rollout.yaml")
    parser.add_argument(
        "--weights", type=Path, default=composition.WEIGHTS, help="the policy (default: the student that ships)"
    )
    parser.add_argument(
        "--driver",
        choices=("policy", "planner"),
        default="policy",
        help="who drives: the policy, or a script that sees map and vehicles, the first thing to try on a server "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/rollout.json"), help="where results go (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _policy_driver(weights: Path) -> tuple[str, Callable[[], Decide]]:
    """The hash of a policy, and what makes its driver of an episode."""
    from carla_digr import checkpoint
    from carla_digr.driving.control import commands_of
    from carla_digr.explainer import Explainer
    from carla_digr.training import prepare_process

    prepare_process()
    policy, card = checkpoint.load(weights, "driving")
    explainer = Explainer(policy, card)
    if not explainer.discrete:
        raise UserError(f"The policy {weights} is continuous, which can be explained but does not drive.")
    commands = commands_of(explainer.card)
    if commands is None:
        raise UserError(f"The card of {weights} does not say what its actions do; add controls to it.")

    def driver() -> Decide:
        own = Explainer(policy, card)
        return lambda rgb: commands[own.decide(rgb).action]

    return explainer.policy_hash, driver


def add_benchmark(commands: argparse._SubParsersAction) -> None:
    """`benchmark`: how fast the embedded highway is here."""

    def run(args: argparse.Namespace) -> int:
        from carla_digr.driving.benchmark import benchmark_simulator

        return 0 if benchmark_simulator(args.out, args.seconds) else 1

    parser = commands.add_parser(
        "benchmark",
        help="measure how fast the embedded highway is",
        description="Measure the embedded highway in process and over CARLA's protocol; write a table and two plots. "
        "Exit status 1 says that a goal was missed.",
    )
    parser.add_argument("what", choices=("simulator",), help="what to measure")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="where results go (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="how long each point is measured (default: %(default)s)"
    )
    parser.set_defaults(run=run)
