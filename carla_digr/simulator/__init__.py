"""The embedded highway: road, traffic and renderer, steppable in process, and a server with CARLA 0.9.16's protocol."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

_PROTOCOL = {  # modules without compiled code
    *(
        "batches",
        "blueprints",
        "calls",
        "connections",
        "entries",
        "episode",
        "frames",
        "measuring",
        "navigation",
        "playback",
        "process",
        "queries",
        "recorder_calls",
        "recording",
        "refusals",
        "retelling",
        "rpc",
        "sensors",
        "server",
        "streaming",
        "walker_calls",
        "walkers",
        "wire",
    ),
}


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options of the server's command line, here because importing the server takes a second."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--port",
        type=int,
        default=2000,
        help="port for carla.Client, streams use the next one (default %(default)s; 0: any two that are free)",
    )
    parser.add_argument(
        "--instances",
        type=int,
        default=1,
        metavar="N",
        help="start N simulators that know nothing of each other, on PORT, PORT + 10, ... (default %(default)s)",
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="end with this process, which must be the one that starts this"
    )
    parser.add_argument(
        "--like", choices=("carla",), help="be as awkward as a real CARLA server: all traits of docs/carla_server.md"
    )
    parser.add_argument(
        "--traits",
        default="",
        metavar="NAME[=SIZE],...",
        help="single traits or groups of docs/carla_server.md; with --like, -NAME takes one out",
    )
    parser.add_argument(
        "--realtime", action="store_true", help="go before the machine's other programs, where the system allows it"
    )
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)  # one of --instances
    parser.add_argument("--seed", type=int, default=0, help="of the traits' chance (default: %(default)s)")


def _keep_compiled_code_per_version() -> None:
    """Give numba a cache directory of its own for this state of the sources, unless the user chose one.

    numba recompiles a function when its own file changes, but not when a function or constant of another file does
    that was compiled into it; after an update, part of the highway would go on as it was.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carla_digr" / "numba"
    if not os.environ.get("NUMBA_CACHE_DIR", str(home)).startswith(str(home)):
        return
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem not in _PROTOCOL:
            digest.update(source.read_bytes())
    directory = home / digest.hexdigest()[:16]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ["NUMBA_CACHE_DIR"] = str(directory)
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(directory)


_keep_compiled_code_per_version()
