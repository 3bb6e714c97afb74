"""The `carla-digr` command: one sub-command a job.

A job is a function ``add_<job>(commands)`` that declares its sub-command and sets ``run``; what a job imports
stands in its run function, so that help is fast and a job needs only its own extras.

An option has one name and meaning in all jobs: ``--weights`` a policy, ``--out`` where results go, ``--port`` the
simulator's, ``--viewer-port`` the page's. What a job called it before stays as a second name.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carla_digr import __version__
from carla_digr.errors import SENTENCE, UserError, end_on_ctrl_c, tell
from carla_digr.training import STAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from carla_digr.driving.rollouts import Decide

RESUMES = "Interrupted; run the same command again to resume."


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


# --- the offline stages ---


def add_train_teacher(commands: argparse._SubParsersAction) -> None:
    """`train-teacher`: PPO."""

    def run(args: argparse.Namespace) -> None:
        config, out = _stage(args)
        from carla_digr.training.teacher import train_teacher

        train_teacher(config, out)

    _add_stage(commands, "train-teacher", run)


def add_make_dataset(commands: argparse._SubParsersAction) -> None:
    """`make-dataset`: perturbation saliency maps over the teacher's states."""

    def run(args: argparse.Namespace) -> None:
        config, out = _stage(args)
        from carla_digr.training.saliency_dataset import make_dataset

        make_dataset(config, out, args.weights or out / "teacher.safetensors", args.module)

    parser = _add_stage(commands, "make-dataset", run)
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

        evaluate(config, out, args.teacher, args.student, args.quick, args.module)

    parser = _add_stage(commands, "evaluate", run)
    weights = "(default: OUT/{0}.safetensors if there, else the weights that ship)"
    parser.add_argument("--teacher", type=Path, help="teacher's weights " + weights.format("teacher"))
    parser.add_argument("--student", type=Path, help="student's weights " + weights.format("student"))
    _add_module(parser)
    parser.add_argument("--quick", action="store_true", help="measure a little of everything, in under a minute")


def add_import(commands: argparse._SubParsersAction) -> None:
    """`import`: another library's policy as a checkpoint."""

    def run(args: argparse.Namespace) -> None:
        from carla_digr.importing import ImportOptions, InputOptions, import_policy, read_controls

        given = ImportOptions(
            actions=args.actions,
            output=args.output,
            task=args.task,
            input=InputOptions(
                args.input_shape,
                args.input,
                args.colour,
                args.stack,
                args.scale,
                args.mean,
                args.deviation,
                args.layout,
            ),
            controls=read_controls(args.controls) if args.controls else None,
            activation=args.activation,
            strides=args.strides,
            paddings=args.paddings,
            module=args.module,
        )
        base = ImportOptions.from_yaml(args.card) if args.card else ImportOptions()
        for line in import_policy(args.file, args.out, given.over(base)):
            print(line)

    parser = commands.add_parser(
        "import",
        help="make a checkpoint of another library's policy",
        description="Make a checkpoint of a policy by stable-baselines3 (.zip), of a state dict (CleanRL and its "
        "like), TorchScript, torch.export or ONNX file. Nothing is unpickled. What the file does not say is assumed, "
        "and printed with the option that says it.",
    )
    numbers, whole = _list_of(float), _list_of(int)
    parser.add_argument("file", metavar="FILE", type=Path, help="what the other library has written")
    parser.add_argument(
        "--out", metavar="STEM", type=Path, required=True, help="the checkpoint: STEM.safetensors, .json"
    )
    parser.add_argument(
        "--card", metavar="FILE", type=Path, help="YAML file with any of the following (docs/policies.md)"
    )
    parser.add_argument("--actions", metavar="A,B,...", type=_list_of(str), help="names, in the order of the outputs")
    parser.add_argument("--input", metavar="HxW", type=_list_of(int, "x", 2), help="size of a picture, pixels")
    parser.add_argument("--input-shape", metavar="C,H,W", type=_list_of(int, ",", 3), help="shape of a state")
    parser.add_argument("--colour", choices=("rgb", "bgr", "grey"), help="channels of a picture")
    parser.add_argument("--stack", metavar="K", type=int, help="pictures in a state, the oldest first")
    parser.add_argument(
        "--scale", type=float, help="the network takes (pixel * scale - mean) / deviation, pixel 0 to 255"
    )
    parser.add_argument("--mean", metavar="M,...", type=numbers, help="one number, or one a channel of the state")
    parser.add_argument("--deviation", metavar="D,...", type=numbers, help="one number, or one a channel of the state")
    parser.add_argument("--layout", choices=("chw", "hwc"), help="order of the axes of the network's input")
    parser.add_argument(
        "--output",
        choices=("logits", "q_values", "gaussian", "squashed_gaussian", "deterministic"),
        help="what the network gives",
    )
    parser.add_argument("--task", help="the task it is for, such as driving (default: any)")
    parser.add_argument("--controls", metavar="FILE", type=Path, help="YAML list of what each action does to the car")
    parser.add_argument("--activation", help="of a state dict's hidden layers, such as relu or tanh")
    parser.add_argument("--strides", metavar="N,...", type=whole, help="of a state dict's convolutions")
    parser.add_argument("--paddings", metavar="N,...", type=whole, help="of a state dict's convolutions")
    parser.add_argument(
        "--module", metavar="PACKAGE.MODULE:FACTORY", help="code that builds a state dict's network; it is run"
    )
    parser.set_defaults(run=run)


def _list_of(kind: type, separator: str = ",", count: int | None = None):
    """A parser of an option's value: ``count`` entries, any number of them where it is None, as a tuple."""

    def parse(text: str) -> tuple:
        values = tuple(kind(part.strip()) for part in text.split(separator))
        if count is not None and len(values) != count:
            raise ValueError
        return values

    parse.__name__ = f"list of {kind.__name__}"
    return parse


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
    _add_module(parser)


def _add_module(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module", metavar="PACKAGE.MODULE:FACTORY", help="the policy's own code, if its card asks for it; it is run"
    )


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


# --- the simulator ---


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


def add_check_simulator(commands: argparse._SubParsersAction) -> None:
    """`check-simulator`: whether a CARLA server can be driven on."""

    def run(args: argparse.Namespace) -> int:
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
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for each call (default: %(default)g)")
    parser.add_argument("--full", action="store_true", help="measure longer, for about ten minutes at most")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where all figures go, a JSON file")
    parser.set_defaults(run=run)


# --- the live drive ---


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
        _add_argument(parser, argument)
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
    _add_module(parser)
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


def _add_argument(parser: argparse.ArgumentParser, argument) -> None:
    """An argument of a composition as an option."""
    default = f" (default: {argument.default})" if argument.default else ""
    parser.add_argument(
        f"--{argument.name.replace('_', '-')}",
        default=argument.default,
        choices=argument.choices or None,
        help=argument.description + default,
    )


# --- recordings ---


def add_replay(commands: argparse._SubParsersAction) -> None:
    """`replay`: a recording as if it were a live drive."""
    from carla_digr.live import composition

    def run(args: argparse.Namespace) -> int:
        end_on_ctrl_c()
        from carla_digr.live.supervisor import run_replay

        values = {argument.name: getattr(args, argument.name) for argument in composition.REPLAY_ARGUMENTS}
        return run_replay(values, args.verbose)

    parser = commands.add_parser(
        "replay",
        help="replay a recording on its topics, with the web page",
        description="Publish a recording's messages, and /clock, as in the drive; or the pictures alone, which an "
        "explainer explains anew.",
    )
    for argument in composition.REPLAY_ARGUMENTS:
        if argument.name == "bag":
            parser.add_argument("bag", metavar="BAG", help=argument.description)
        else:
            _add_argument(parser, argument)
    parser.add_argument("--verbose", action="store_true", help="show all that the processes say")
    parser.set_defaults(run=run)


def add_explain(commands: argparse._SubParsersAction) -> None:
    """`explain`: pictures, of a recording or in files, explained by any policy and method."""
    from carla_digr.saliency import DEFAULT, METHODS

    def run(args: argparse.Namespace) -> None:
        import torch

        from carla_digr.recordings import frames

        torch.set_num_threads(1)  # as in the drive: equal maps
        (_explain_frames if frames.is_frames(args.input) else _explain_bag)(args)

    parser = commands.add_parser(
        "explain",
        help="explain pictures by any policy and method: of a recording, a folder, an .npz or a video",
        description="Explain pictures by any policy and method. Of a recording it makes a copy with new decisions, "
        "saliency maps and overlays; of PNG or JPEG files, an .npz (frames, uint8 (N, H, W, C)) or a video a directory "
        "with an overlay a frame, maps.npz and explained.json. The same input and policy give the same bytes. "
        "Interrupted, the same command resumes.",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        type=Path,
        help="a bag's directory, or its .mcap or .db3 file, or a ROS 1 .bag file; a folder of pictures, an .npz file "
        "or a video",
    )
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the new recording, or directory")
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.loadable().items())
    parser.add_argument("--method", default=DEFAULT, choices=tuple(METHODS), help=f"{methods} (default: {DEFAULT})")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        type=Path,
        help="the policy, a file or the name of one that ships (default: the one that drove, if it ships)",
    )
    parser.add_argument(
        "--target",
        metavar="ACTION",
        help="the action to explain, by name or number, also one that was not chosen (default: what was decided)",
    )
    _add_module(parser)
    _add_camera(parser)
    parser.add_argument(
        "--crop", default="", metavar="X,Y,W,H", help="explain this part of each picture, pixels (default: all of it)"
    )
    parser.add_argument(
        "--wrong-size",
        default="refuse",
        choices=("refuse", "resize"),
        help="what becomes of a picture of another size than the policy's (default: refuse)",
    )
    parser.add_argument(
        "--resize", dest="wrong_size", action="store_const", const="resize", help="the same as --wrong-size resize"
    )
    parser.set_defaults(run=run, interrupted=RESUMES)


def _explain_bag(args: argparse.Namespace) -> None:
    from carla_digr.images import Crop
    from carla_digr.recordings.explain import explain_bag

    done = explain_bag(
        args.input,
        args.out,
        args.method,
        args.weights,
        args.camera,
        args.wrong_size,
        args.target,
        args.module,
        args.odometry,
        Crop.parse(args.crop),
    )
    for sentence in done.left_out:
        print(f"Left out: {sentence}")
    _say_explained(args, done, "pictures", done.policy_hash)


def _explain_frames(args: argparse.Namespace) -> None:
    from carla_digr.explainer import Explainer
    from carla_digr.images import Crop
    from carla_digr.recordings.frames import explain_frames

    if args.weights is None:
        raise UserError(f"Name the policy that is to explain {args.input} with --weights FILE.")
    resize = args.wrong_size == "resize"
    explainer = Explainer.from_checkpoint(args.weights, None, args.method, args.target, resize, args.module)
    done = explain_frames(args.input, args.out, explainer, Crop.parse(args.crop))
    _say_explained(args, done, "frames", explainer.policy_hash)


def _say_explained(args: argparse.Namespace, done: Any, unit: str, policy: str) -> None:
    notes = f", {done.resumed} of them before it was interrupted" if done.resumed else ""
    if done.refused:
        count = done.refused.total()
        why = "; ".join(f"{number} times: {reason}" for reason, number in done.refused.most_common(3))
        share = 100.0 * done.frames / (done.frames + count)
        notes += f", {count} {unit} were refused, so {share:.3g} % are explained ({why})"
    print(f"{args.out}: {done.frames} frames explained by {args.method} of the policy {policy}{notes}")


def add_view(commands: argparse._SubParsersAction) -> None:
    """`view`: recordings on the web page."""

    def run(args: argparse.Namespace) -> None:
        import gc
        from contextlib import ExitStack, suppress

        from carla_digr.images import Crop
        from carla_digr.live.viewer.asking import Asking
        from carla_digr.live.viewer.recorded import Recorded
        from carla_digr.live.viewer.server import ViewerServer
        from carla_digr.live.viewer.shelf import Shelf, is_bag, source

        signal.signal(signal.SIGTERM, signal.default_int_handler)

        def opened(bags: list[Path]) -> Recorded:
            return Recorded(bags, args.camera, args.odometry, Crop.parse(args.crop), args.wrong_size)

        gc.disable()  # millions of objects, none in a cycle: looking for cycles takes as long as reading
        with ExitStack() as stack, suppress(KeyboardInterrupt):
            shown: Recorded | Shelf
            if args.other is None and args.bag.is_dir() and not is_bag(args.bag):
                shown = Shelf(args.bag, opened)
                if not shown.names:
                    raise UserError(f"There is no recording in {args.bag}.")
            else:
                shown = recorded = opened([args.bag, *([args.other] if args.other else [])])
                stack.callback(recorded.close)
            asking = Asking(recordings=source(shown))
            page = stack.enter_context(
                ViewerServer(args.viewer_host, args.viewer_port, colormap=args.colormap, recorded=shown, asking=asking)
            )
            gc.freeze()
            gc.enable()
            print(f"The page is at {page.address} (Ctrl-C ends it)", flush=True)
            signal.pause()

    parser = commands.add_parser(
        "view",
        help="show a recording on the web page, or two of the same drive side by side",
        description="Serve the web page for a recording: timeline, speed, steps, jumps to events; with a second one, "
        "for example by another method or policy, both side by side and jumps to where their maps agree least.",
    )
    parser.add_argument(
        "bag",
        metavar="BAG",
        type=Path,
        help="a bag's directory, or its .mcap or .db3 file; or a folder of recordings, which the page lists",
    )
    parser.add_argument("other", metavar="BAG2", type=Path, nargs="?", help="another recording of the same drive")
    parser.add_argument(
        "--viewer-port",
        "--port",
        type=int,
        default=8765,
        help="port of the web page, 0 for a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--viewer-host", "--host", default="127.0.0.1", help="address of the web page (default: this machine alone)"
    )
    parser.add_argument(
        "--colormap", default="inferno", help="colours of the map, such as turbo, hot or viridis (default: %(default)s)"
    )
    _add_camera(parser)
    parser.add_argument(
        "--crop",
        default="",
        metavar="X,Y,W,H",
        help="show this part of each picture, pixels (default: what its map is of)",
    )
    parser.add_argument(
        "--wrong-size",
        default="resize",
        choices=("refuse", "resize"),
        help="what becomes of a picture of another size than its map: the map is stretched over it, or it is left out "
        "with a sentence (default: resize)",
    )
    parser.set_defaults(run=run)


def add_video(commands: argparse._SubParsersAction) -> None:
    """`video`: a recording as a video file."""

    def run(args: argparse.Namespace) -> None:
        from contextlib import closing

        from tqdm import tqdm

        from carla_digr.images import Crop
        from carla_digr.live.viewer.recorded import Recorded
        from carla_digr.live.viewer.video import export_video

        bags = [args.bag, *([args.other] if args.other else [])]
        with (
            closing(Recorded(bags, args.camera, args.odometry, Crop.parse(args.crop))) as recorded,
            tqdm(total=100, unit="%") as bar,
        ):
            frames, damaged = export_video(
                recorded,
                args.out,
                args.start,
                args.duration,
                args.height,
                args.opacity,
                args.colormap,
                lambda share: bar.update(int(100 * share) - bar.n),
            )
        rest = f"; {damaged} damaged ones were left out" if damaged else ""
        print(f"{args.out}: {frames} frames{rest}")

    parser = commands.add_parser(
        "video",
        help="write a recording as a video, or two of the same drive side by side",
        description="Write a video of a recording's pictures with their maps and decisions: MP4, or WebM, which "
        "browsers play.",
    )
    parser.add_argument("bag", metavar="BAG", type=Path, help="a bag's directory, or its .mcap or .db3 file")
    parser.add_argument("other", metavar="BAG2", type=Path, nargs="?", help="another recording of the same drive")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the video goes, .mp4 or .webm")
    parser.add_argument("--start", type=float, default=0.0, help="seconds that are left out at the beginning")
    parser.add_argument("--duration", type=float, default=0.0, help="seconds of the recording; 0: to its end")
    parser.add_argument("--height", type=int, default=512, help="of the pictures, pixels (default: %(default)s)")
    parser.add_argument("--opacity", type=float, default=0.8, help="of the maps (default: %(default)s)")
    parser.add_argument("--colormap", default="inferno", help="colours of the maps (default: %(default)s)")
    parser.add_argument("--crop", default="", metavar="X,Y,W,H", help="as of view")
    _add_camera(parser)
    parser.set_defaults(run=run)


def _add_camera(parser: argparse.ArgumentParser) -> None:
    from carla_digr.recordings.topics import IMAGE, ODOMETRY

    parser.add_argument(
        "--camera", default=IMAGE, metavar="TOPIC", help="the pictures, raw or compressed (default: %(default)s)"
    )
    parser.add_argument("--odometry", default=ODOMETRY, metavar="TOPIC", help="the car's motion (default: %(default)s)")


def add_repair(commands: argparse._SubParsersAction) -> None:
    """`repair`: what is whole of an unfinished or damaged recording."""

    def run(args: argparse.Namespace) -> None:
        from carla_digr.recordings.repair import repair

        out = args.out or args.bag.with_name(f"{args.bag.stem}-repaired")
        saved = repair(args.bag, out)
        rest = f"; {saved.damaged_chunks} damaged chunks were left out" if saved.damaged_chunks else ""
        rest += f"; {saved.damaged_messages} damaged messages were left out" if saved.damaged_messages else ""
        rest += "; the file ended inside a record" if saved.cut else ""
        print(f"{out}: {saved.messages} messages of {saved.topics} topics over {saved.seconds:.2f} s{rest}")

    parser = commands.add_parser(
        "repair",
        help="save what is whole of a recording that was killed or damaged",
        description="Make a whole bag of all that can be read of an unfinished or damaged MCAP or sqlite3 recording, "
        "which stays as it is.",
    )
    parser.add_argument("bag", metavar="BAG", type=Path, help="the bag's directory or its .mcap or .db3 file")
    parser.add_argument("--out", type=Path, metavar="BAG2", help="the new bag (default: BAG-repaired)")
    parser.set_defaults(run=run)


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


if __name__ == "__main__":
    sys.exit(main())
