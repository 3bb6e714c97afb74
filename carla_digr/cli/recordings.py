"""The jobs on recordings, and on pictures in files."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from carla_digr.cli.options import RESUMES, add_argument, add_module
from carla_digr.errors import UserError, end_on_ctrl_c


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
            add_argument(parser, argument)
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
    add_module(parser)
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
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "auto", "cuda"),
        help="where the policy computes; auto: on a GPU if there is one (default: cpu)",
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
        args.device,
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
    explainer = Explainer.from_checkpoint(
        args.weights, None, args.method, args.target, resize, args.module, args.device
    )
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


def _add_camera(parser: argparse.ArgumentParser) -> None:
    from carla_digr.recordings.topics import IMAGE, ODOMETRY

    parser.add_argument(
        "--camera", default=IMAGE, metavar="TOPIC", help="the pictures, raw or compressed (default: %(default)s)"
    )
    parser.add_argument("--odometry", default=ODOMETRY, metavar="TOPIC", help="the car's motion (default: %(default)s)")
