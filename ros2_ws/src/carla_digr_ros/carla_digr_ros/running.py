"""How a node of this package starts, spins, ends and tells what went wrong."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from carla_digr.errors import UserError

SPIN_SECONDS = 0.5  # longest time until a node sees that it was asked to stop


class Stop:
    """Whether SIGINT or SIGTERM has come; set up before anything that takes long.

    Python's own handlers, not rclpy's: they work when SIGINT was inherited as ignored, and no KeyboardInterrupt
    lands in the middle of a tick.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, stack: object) -> None:
        self.requested = True


def spin(node: Node, executor: SingleThreadedExecutor, stop: Stop) -> None:
    """Run callbacks until the process is asked to stop."""
    while not stop.requested:
        executor.spin_once(timeout_sec=SPIN_SECONDS)


def run(make: Callable[[], Node], work: Callable[[Any, SingleThreadedExecutor, Stop], None] = spin) -> int:
    """Run one node until SIGINT or SIGTERM.

    Args:
        make: creates the node; called after rclpy is initialised.
        work: the node's main loop, called with the node, the executor that has it, and what asks it to stop.

    Returns:
        Exit status: 0, or 2 after a UserError, whose sentence goes to standard error.
    """
    stop = Stop()
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
        try:
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            gc.collect()
            gc.freeze()  # a full collection over all that torch and rclpy have loaded takes longer than a frame
            work(node, executor, stop)
        finally:
            close = getattr(node, "close", None)
            if close is not None:
                close()
            node.destroy_node()
    except UserError as error:
        print(f"carla-digr: {error}", file=sys.stderr, flush=True)
        return 2
    except ExternalShutdownException:
        pass
    finally:
        rclpy.try_shutdown()
    return 0
