"""The job that makes a checkpoint of another library's policy."""

from __future__ import annotations

import argparse
from pathlib import Path


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
