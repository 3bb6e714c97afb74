"""What reads bytes from outside, each as a function of bytes that returns, or refuses them by its own kind of error."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import crafted_bags
import drive_bags
import live_support
import msgpack
import numpy as np

from carla_digr.checkpoint import load
from carla_digr.errors import UserError
from carla_digr.images import to_rgb
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.live.viewer.server import ViewerServer
from carla_digr.recordings import topics
from carla_digr.recordings.bag import Channel, channel_types, open_bag
from carla_digr.recordings.drive import Decoder
from carla_digr.recordings.repair import repair
from carla_digr.simulator import wire
from carla_digr.tasks import load_config

STORE = drive_bags.STORE


class Target(NamedTuple):
    """A parser, bytes that it is to be tried with first, and what ends it."""

    run: Callable[[bytes], None]
    seeds: list[bytes]
    close: Callable[[], None] = lambda: None


def card(directory: Path) -> Target:
    weights = live_support.make_weights(directory)
    path = Path(weights).with_suffix(".json")
    whole = path.read_bytes()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(UserError):
            load(weights)

    return Target(run, [whole, b"[" * 5000, json.dumps({**json.loads(whole), "input_shape": [3, 1e30, 1e30]}).encode()])


def config(directory: Path) -> Target:
    path = directory / "config.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(UserError):
            load_config(path)

    short = b"task: breakout\nseed: 1\nteacher: {environments: 4, learning_rate: 1e-3}\npolicy: {features: 16}\n"
    return Target(run, [short, b"a: &a [*a]", b"seed: 2020-13-45", b"task: " + b"[" * 500, b"seed: " + b"7" * 5000])


def bag(directory: Path) -> Target:
    path, out = directory / "bag.mcap", directory / "out"
    drive = drive_bags.record(directory / "drive", 3, 8)
    (whole,) = drive.glob("*.mcap")
    plain = crafted_bags.File()
    image = drive_bags.image(5, np.zeros((8, 8, 3), np.uint8), "rgb8")
    plain.add_messages([(1, 5, drive_bags.serialized(topics.PICTURE_TYPE, image))])
    seeds = [whole.read_bytes(), *(plain.write(path, summary).read_bytes() for summary in (True, False))]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(UserError), closing(Recorded([path])) as recorded:
            recorded.description()
            for index in range(len(recorded.sides[0].drive.frames)):
                with suppress(UserError):
                    recorded.message(0, index)
        with suppress(UserError), open_bag(path) as opened:
            for _ in opened.read():
                pass
        shutil.rmtree(out, ignore_errors=True)
        with suppress(UserError):
            repair(path, out)

    return Target(run, seeds)


def schema(directory: Path) -> Target:
    kind = topics.DECISION_TYPE

    def run(data: bytes) -> None:
        with suppress(UserError):
            channel_types(Channel("/a", kind, data.decode(errors="replace")))

    idl = "struct B { sequence<long, 3> b; @default (value=1) long c; };"
    seeds = [
        STORE.generate_msgdef(kind, ros_version=2)[0],
        "A[100000] a\n",
        "DrivingDecision a\n",
        "string<=3[<=2] b\n",
    ]
    seeds.append(f"module a_msgs {{ module msg {{ const long A = 1; {idl} }}; }};")
    return Target(run, [seed.encode() for seed in seeds])


def cdr(directory: Path) -> Target:
    decode = Decoder()
    kinds = [topics.DECISION_TYPE, topics.PICTURE_TYPE, topics.COMPRESSED_TYPE, topics.TYPES[topics.ODOMETRY]]
    kinds += [topics.TYPES[topic] for topic in (topics.OBJECTS, topics.VEHICLES, topics.TRUST, topics.FACTS_TOPIC)]
    channels = [drive_bags.channel(f"/{number}", kind) for number, kind in enumerate(kinds)]

    def run(data: bytes) -> None:
        channel = channels[data[0] % len(channels)] if data else channels[0]
        with suppress(UserError, ValueError):
            message = decode(channel, data[1:])
            if channel.type in (topics.PICTURE_TYPE, topics.COMPRESSED_TYPE):
                to_rgb(message)

    empty = [bytes([n]) + drive_bags.serialized(k, drive_bags.blank(STORE, k)) for n, k in enumerate(kinds)]
    image = drive_bags.image(5, np.zeros((4, 4, 3), np.uint8), "rgb8")
    return Target(run, [*empty, b"\1" + drive_bags.serialized(topics.PICTURE_TYPE, image), b"\0\0\1\0\0abc"])


def protocol(directory: Path) -> Target:
    def run(data: bytes) -> None:
        with suppress(wire.ProtocolError):
            for request in wire.RequestReader().feed(data):
                for argument in request.arguments:
                    for kind in (wire.Transform, wire.ActorDescription, list[wire.Actor], wire.EpisodeSettings):
                        with suppress(wire.ProtocolError):
                            wire.decoder(kind)(argument)

    settings = wire.settings_to_wire(wire.EpisodeSettings(synchronous=True, fixed_delta=0.05))
    calls = [[0, 1, "version", [[False]]], [0, 2, "set_episode_settings", [[False], settings]]]
    return Target(run, [*map(msgpack.packb, calls), b"\x94" * 3000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])


def page(directory: Path) -> Target:
    server = ViewerServer(port=0)
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    upgrade = f"GET /ws HTTP/1.1\r\n{host}{upgrade}Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"

    def ask(data: bytes, last: bool) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client, suppress(ConnectionError):
            client.sendall(data)
            if last:
                client.shutdown(socket.SHUT_WR)
            reply = b""
            while part := client.recv(1 << 16):
                reply += part
            return reply
        return b""

    def run(data: bytes) -> None:
        ask(data, last=True)
        assert b" 200 " in ask(f"GET /api/status HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode(), last=False)[:20]

    get = f"GET / HTTP/1.1\r\n{host}\r\n"
    posts = f"POST /api/status HTTP/1.1\r\n{host}Content-Length: 5\r\n\r\nabcde", get * 3
    frames = b"\x81\x81\0\0\0\x001", b"\x88\x80\0\0\0\0", b"\x81" + b"\xff" * 13, b"\x01\x81\0\0\0\0a\x80\x80\0\0\0\0"
    seeds = [
        get.encode(),
        b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
        *(post.encode() for post in posts),
        *(upgrade.encode() + frame for frame in frames),
    ]
    return Target(run, seeds, server.close)


TARGETS = {make.__name__: make for make in (card, config, bag, schema, cdr, protocol, page)}
