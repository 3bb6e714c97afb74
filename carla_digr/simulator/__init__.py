"""The embedded highway: road, traffic and renderer, steppable in process, and a server with CARLA 0.9.16's protocol."""

from __future__ import annotations

import argparse


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options of the server's command line, here because importing the server takes a second."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--port", type=int, default=2000, help="port for calls, streams use the next one (default 2000; 0: any free)"
    )
    parser.add_argument(
        "--parent", type=int, help="end with this process, which must be the parent (default: whoever started this)"
    )
