"""Parameters that are declared with description and range, and refused with one sentence."""

from __future__ import annotations

from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node

from carla_digr.errors import UserError


def declare(
    node: Node,
    name: str,
    default: Any,
    description: str,
    bounds: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """The value of a parameter of a node, read once at the start.

    Raises:
        UserError: the value has the wrong type, lies outside ``bounds`` or is not one of ``choices``.
    """
    if choices:
        description += f" ({' or '.join(choices)})"
    descriptor = ParameterDescriptor(description=description, read_only=True)
    if bounds and isinstance(default, float):
        descriptor.floating_point_range = [FloatingPointRange(from_value=bounds[0], to_value=bounds[1])]
    elif bounds:
        descriptor.integer_range = [IntegerRange(from_value=bounds[0], to_value=bounds[1], step=1)]
    where = f"The parameter {name} of the node {node.get_name()}"
    try:
        value = node.declare_parameter(name, default, descriptor).value
    except InvalidParameterTypeException:
        raise UserError(f"{where} must be {type(default).__name__}, like its default {default!r}.") from None
    except InvalidParameterValueException:
        assert bounds is not None
        raise UserError(f"{where} must lie between {bounds[0]} and {bounds[1]}.") from None
    if choices and value not in choices:
        raise UserError(f"{where} must be {' or '.join(choices)}, not {value!r}.")
    return value
