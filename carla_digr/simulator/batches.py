"""The commands of apply_batch, most of which are calls in another dress."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from carla_digr.simulator import calls, rpc, wire
from carla_digr.simulator.entries import CallFailed
from carla_digr.simulator.episode import Episode

NESTED_BATCHES = 4  # deepest chain of commands to run after a spawn

Answers = Generator[None, None, list[Any]]


def apply_batch(episode: Episode, commands: Any, depth: int = 0) -> Answers:
    """Run batch commands, and stop after each, so that a long batch can make room for other clients.

    Returns:
        In the end a list of envelopes, one a command: the actor's id, or why it failed.

    Raises:
        CallFailed: it is no batch, or has more than wire.MAX_ITEMS commands.
    """
    if type(commands) is not list:
        raise CallFailed("apply_batch: expected an array of commands")
    if len(commands) > wire.MAX_ITEMS:
        raise CallFailed(f"a batch has at most {wire.MAX_ITEMS} commands, not {len(commands)}; send several")
    answers = []
    for command in commands:
        answers.append((yield from _command(episode, command, depth)))
        yield
    return answers


def _command(episode: Episode, command: Any, depth: int) -> Answers:
    try:
        match command:
            case [[0, payload]]:
                return wire.value((yield from _spawn_command(episode, _SPAWN(payload), depth)))
            case [[16 | 17, [int(actor_id), bool()]]]:  # autopilot and its display are the client's business
                return wire.value(episode.entry(actor_id).id)
            case [[18, [int(actor_id), int(flags)]]]:
                calls.set_vehicle_light_state(episode, actor_id, (flags,))
                return wire.value(actor_id)
            case [[int(kind), [int(actor_id), *arguments]]] if kind in _COMMANDS:
                episode.entry(actor_id)
                rpc.call(episode, _COMMANDS[kind], [actor_id, *arguments])
                return wire.value(actor_id)
            case [[int(kind), _]]:
                raise CallFailed(f"batch command {kind} is not implemented by this simulator")
        raise CallFailed(f"not a batch command: {command!r:.60}")
    except (CallFailed, wire.ProtocolError) as error:
        return wire.value_error(str(error))


def _spawn_command(episode: Episode, command: wire.SpawnCommand, depth: int) -> Generator[None, None, int]:
    if depth == NESTED_BATCHES:
        raise CallFailed(f"batch commands are nested more than {NESTED_BATCHES} deep")
    actor_id = episode.spawn(command.description, command.transform, command.parent or 0).id
    following = []
    for later in command.then:
        match later:
            case [[int(kind), [0, *rest]]] if kind != 0:
                later = [[kind, [actor_id, *rest]]]
        following.append(later)
    yield from apply_batch(episode, following, depth + 1)
    return actor_id


_SPAWN = wire.decoder(wire.SpawnCommand)
_COMMANDS = {
    1: "destroy_actor",
    2: "apply_control_to_vehicle",
    3: "apply_ackermann_control_to_vehicle",
    4: "apply_control_to_walker",
    5: "apply_physics_control",
    6: "set_actor_transform",
    7: "set_walker_state",
    8: "set_actor_target_velocity",
    9: "set_actor_target_angular_velocity",
    10: "add_actor_impulse",
    11: "add_actor_force",
    12: "add_actor_angular_impulse",
    13: "add_actor_torque",
    14: "set_actor_simulate_physics",
    15: "set_actor_enable_gravity",
    19: "set_actor_location",
}
"""Batch commands whose payload is the arguments of an RPC."""
