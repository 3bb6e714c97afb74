"""How calls of CARLA's RPC protocol are offered, checked and answered.

One function a call; its name is the call's, its annotations say how arguments are checked and whether a value is
returned. The functions are in calls.py, walker_calls.py and recorder_calls.py; what is not there, is not offered.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from carla_digr.simulator import wire
from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.episode import Episode


class Method(NamedTuple):
    """One RPC: the function, how its arguments are checked, and whether it returns a value."""

    function: Callable[..., Any]
    arguments: tuple[wire.Decoder, ...]
    returns: bool


METHODS: dict[str, Method] = {}
"""Every call an Episode answers; filled by the decorator below."""


def rpc(function: Callable[..., Any]) -> Callable[..., Any]:
    """Offer a function to clients under its own name."""
    hints = typing.get_type_hints(function, include_extras=True)
    returns = hints.pop("return") is not type(None)
    _, *arguments = hints.values()
    METHODS[function.__name__] = Method(function, tuple(map(wire.decoder, arguments)), returns)
    return function


def call(episode: Episode, name: str, arguments: list[Any]) -> Any:
    """Check the arguments of an RPC and run it; raises CallFailed or ProtocolError."""
    method = METHODS[name]
    if len(arguments) != len(method.arguments):
        raise CallFailed(f"{name} takes {len(method.arguments)} arguments, not {len(arguments)}")
    checked = [d(a) for d, a in zip(method.arguments, arguments, strict=True)]
    try:
        return method.function(episode, *checked)
    except (ValueError, OverflowError) as error:  # numbers out of this world
        raise CallFailed(f"{name}: {error}") from None


def answer(episode: Episode, name: str, arguments: list[Any]) -> Any:
    """The envelope with the result or the failure of an RPC in METHODS."""
    returns = METHODS[name].returns
    try:
        result = call(episode, name, arguments)
        return wire.value(result) if returns else wire.done()
    except (CallFailed, wire.ProtocolError) as error:
        message = f"{name}: {error}" if isinstance(error, wire.ProtocolError) else str(error)
    return wire.value_error(message) if returns else wire.void_error(message)
