"""What a file of another library does not say of its policy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from carla_digr.config import parse_section, read_yaml, setting
from carla_digr.errors import UserError

Output = Literal["logits", "q_values", "gaussian", "squashed_gaussian", "deterministic"]
Colour = Literal["rgb", "bgr", "grey"]
Layout = Literal["chw", "hwc"]


@dataclass(frozen=True)
class InputOptions:
    """How frames become states; see `carla_digr.policy.InputRecipe`. What is None comes from the file or is assumed."""

    shape: tuple[int, int, int] | None = setting(None, minimum=1)  # C, H, W of a state
    size: tuple[int, int] | None = setting(None, minimum=1)  # H, W, where the file knows C
    colour: Colour | None = None
    stack: int | None = setting(None, minimum=1)
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class Control:
    """What one action does to the car, as `carla_digr.driving.control.VehicleCommand`."""

    steer: float = setting(0.0, minimum=-1, maximum=1)
    throttle: float = setting(0.0, minimum=0, maximum=1)
    brake: float = setting(0.0, minimum=0, maximum=1)
    target_speed: float | None = setting(None, minimum=0, maximum=100)  # m/s, in place of the pedals
    along_lane: bool | None = None  # the steering is added to what the curve of the lane asks for


@dataclass(frozen=True)
class ImportOptions:
    """What a file does not say of its policy; the keys of ``--card FILE.yaml``."""

    actions: tuple[str, ...] | None = None  # names, in the order of the outputs
    output: Output | None = None
    task: str | None = None
    input: InputOptions = InputOptions()
    controls: tuple[Control, ...] | None = None  # one an action
    activation: str | None = None  # of a state dict's hidden layers, a key of carla_digr.networks.ACTIVATIONS
    strides: tuple[int, ...] | None = setting(None, minimum=1)  # of a state dict's convolutions
    paddings: tuple[int, ...] | None = setting(None, minimum=0)
    module: str | None = None  # package.module:factory of a state dict's network

    @classmethod
    def from_yaml(cls, path: Path) -> ImportOptions:
        """Read a card of options.

        Raises:
            UserError: it is missing or no YAML, or a key or value in it is wrong.
        """
        return parse_section(cls, read_yaml(path), str(path), "")

    def over(self, base: ImportOptions) -> ImportOptions:
        """These options, and where they are None those of ``base``."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "input"}
        shown = {f.name: getattr(self.input, f.name) for f in fields(self.input)}
        return replace(
            base,
            **{name: value for name, value in given.items() if value is not None},
            input=replace(base.input, **{name: value for name, value in shown.items() if value is not None}),
        )


def read_controls(path: Path) -> tuple[Control, ...]:
    """The controls of a YAML file: a list, one mapping an action.

    Raises:
        UserError: it is missing or no such list.
    """
    values = read_yaml(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: the controls must be a list, one entry an action.")
    return tuple(parse_section(Control, value, str(path), f"[{index}]") for index, value in enumerate(values))
