"""The jobs in which a policy is watched: live drives and plays."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from carla_digr.cli.options import add_argument, add_module
from carla_digr.errors import UserError, end_on_ctrl_c


def add_live(commands: argparse._SubParsersAction) -> None:
    """`live`: drive and explain, on the embedded highway or a CARLA server."""
    from carla_digr.live import composition

    def run(args: argparse.Namespace) -> int:
        end_on_ctrl_c()
        from carla_digr.live.supervisor import run_live

        values = {argument.name: getattr(args, argument.name) for argument in composition.ARGUMENTS}
        return run_live(values, args.duration, args.out, args.headless, args.verbose)

    parser = commands.add_parser(
        "live",
        help="drive and explain 20 times a second, with a web page",
        description="Drive and explain 20 times a second until Ctrl-C, or for --duration seconds; then the exit "
        "status says whether the measured figures held.",
    )
    for argument in composition.ARGUMENTS:
        add_argument(parser, argument)
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="measure a drive of this length, then end")
    parser.add_argument(
        "--out",
        "--json",
        type=Path,
        metavar="FILE",
        help="where the measured figures go, as JSON; needs --duration",
    )
    parser.add_argument(
        "--headless", action="store_true", help="read the page in place of a browser while measuring; needs --duration"
    )
    parser.add_argument("--verbose", action="store_true", help="show all that the processes say")
    parser.set_defaults(run=run)


def add_ctl(commands: argparse._SubParsersAction) -> None:
    """`ctl`: says one thing to a running drive."""

    def run(args: argparse.Namespace) -> int:
        from carla_digr.live.supervisor import run_ctl

        return run_ctl(args.words, args.namespace, args.domain)

    parser = commands.add_parser(
        "ctl",
        help="pause, step, reset or change a running drive",
        description="Say one thing to a drive that runs on this machine: pause, resume, step, reset [SEED], "
        "policy FILE, set NAME VALUE, record on, record off, drive STEER THROTTLE BRAKE [SECONDS], or list: what can "
        "be set.",
    )
    parser.add_argument("words", metavar="WORD", nargs="+", help="such as: pause; set opacity 0.5; reset 7")
    parser.add_argument("--namespace", default="", help="of the drive's nodes")
    parser.add_argument("--domain", type=int, choices=range(233), metavar="N", help="the drive's ROS domain")
    parser.set_defaults(run=run)


def add_play(commands: argparse._SubParsersAction) -> None:
    """`play`: a task on the page, without ROS and without a simulator."""

    def run(args: argparse.Namespace) -> None:
        from carla_digr.tasks import load_config, make_task

        config = load_config(args.config)
        task = make_task(config)
        from carla_digr.live.play import Play, Settings
        from carla_digr.live.questions import shipped_policies
        from carla_digr.live.viewer.asking import Asking
        from carla_digr.live.viewer.server import ViewerServer
        from carla_digr.training import prepare_process

        prepare_process()
        ours = shipped_policies(config.task)
        if not args.weights and f"{config.task}_student" not in ours:
            raise UserError(f"No policy ships for {config.task}: name one with --weights.")
        weights = args.weights or f"{config.task}_student"
        seed = config.seed if args.seed is None else args.seed
        settings = Settings(method=args.method, rate=args.rate)
        play = Play(task, weights, seed, args.module or "", settings)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with ViewerServer(args.viewer_host, args.viewer_port, controls=play, asking=Asking(play.policy)) as page:
            print(f"The page is at {page.address} (Ctrl-C ends it)", flush=True)
            try:
                play.run(page)
            except KeyboardInterrupt:
                play.end()

    from carla_digr.saliency import DEFAULT, METHODS

    fast = [name for name, method in METHODS.loadable().items() if method.speed == "frame"]
    parser = commands.add_parser(
        "play",
        help="watch a policy play a task on the web page, with its maps",
        description="Have a policy play a task, and show play, map and decision on the web page, with its controls. No "
        "ROS, no simulator.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a task's YAML file, or the name of one that ships")
    parser.add_argument("--weights", metavar="FILE", help="the policy (default: the task's student that ships)")
    add_module(parser)
    parser.add_argument("--seed", type=int, help="of the first episodes (default: the configuration's)")
    parser.add_argument("--method", default=DEFAULT, choices=fast, help="of the maps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=15.0, help="decisions a second (default: %(default)g)")
    parser.add_argument(
        "--viewer-port", type=int, default=8765, help="port of the web page, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--viewer-host", default="127.0.0.1", help="address of the web page (default: this machine alone)"
    )
    parser.set_defaults(run=run)
