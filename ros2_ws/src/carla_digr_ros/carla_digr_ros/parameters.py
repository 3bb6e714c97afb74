"""Parameters that are declared with description and range, and refused with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from carla_digr.errors import UserError

REALTIME = "go before all ordinary processes of the machine, where the system grants it (rtprio)"

T = TypeVar("T", bool, int, float, str, list[str])


class Live(Generic[T]):
    """A parameter that may change while its node runs; ``value`` is the present one. Arguments as of `declare`."""

    def __init__(
        self,
        node: Node,
        name: str,
        default: T,
        description: str,
        bounds: tuple[float, float] | None = None,
        choices: tuple[str, ...] = (),
    ):
        self.value: T = declare(node, name, default, description, bounds, choices, self._change)

    def _change(self, value: T) -> None:
        self.value = value


def declare(
    node: Node,
    name: str,
    default: T,
    description: str,
    bounds: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
    changed: Callable[[T], object] | None = None,
) -> T:
    """The value of a parameter of a node at the start.

    Args:
        node: whose parameter it is.
        name: of the parameter.
        default: its value where none is given; it also says the type.
        description: what the parameter means, for `ros2 param describe`.
        bounds: the smallest and the largest value of a number.
        choices: the values of a text; none: any.
        changed: called with every value that the running node is given later, once it is accepted; None: the
            parameter is read-only, and ROS refuses changes.

    Raises:
        UserError: the value has the wrong type, lies outside ``bounds`` or is not one of ``choices``.
    """
    allowed = f"one of: {', '.join(choices)}" if choices else ""
    descriptor = ParameterDescriptor(description=description, additional_constraints=allowed, read_only=not changed)
    if bounds and isinstance(default, float):
        descriptor.floating_point_range = [FloatingPointRange(from_value=bounds[0], to_value=bounds[1])]
    elif bounds:
        descriptor.integer_range = [IntegerRange(from_value=bounds[0], to_value=bounds[1], step=1)]
    where = f"The parameter {name} of the node {node.get_name()}"
    try:
        value: T = node.declare_parameter(name, default, descriptor).value
    except InvalidParameterTypeException:
        raise UserError(f"{where} must be {type(default).__name__}, like its default {default!r}.") from None
    except InvalidParameterValueException:
        assert bounds is not None
        raise UserError(f"{where} must lie between {bounds[0]} and {bounds[1]}.") from None

    def refusal(value: Any) -> str:
        return f"{where} must be {' or '.join(choices)}, not {value!r}." if choices and value not in choices else ""

    if refusal(value):
        raise UserError(refusal(value))
    if changed is not None:
        check(node, name, refusal)

        def take(parameters: list[Parameter]) -> None:
            for new in parameters:
                if new.name == name:
                    changed(new.value)

        node.add_post_set_parameters_callback(take)
    return value


def check(node: Node, name: str, refusal: Callable[[Any], str]) -> None:
    """From now on a new value of a parameter is refused with the reason that ``refusal`` gives, "" for none."""

    def verdict(parameters: list[Parameter]) -> SetParametersResult:
        reason = "".join(refusal(new.value) for new in parameters if new.name == name)
        return SetParametersResult(successful=not reason, reason=reason)

    node.add_on_set_parameters_callback(verdict)
