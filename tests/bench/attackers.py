"""A drive with strangers beside it: frames lost, decisions late, brakes.

``python tests/bench/attackers.py OUT.json [--seconds 600] [--pause 1.0] [--only NAME]``: `carla-digr live`, measured,
while all that it listens to is attacked once a ``pause``: each topic by messages that are none (strange_messages.py),
/clock by the wall's time, `set_policy` by files that are none, the page by clients that are deaf, half asked or talk
nonsense, the simulator by calls that are too large. What it prints is the measurement of the drive, with how often each
attacked; `--only none` drives without them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgpack

sys.path.insert(0, str(Path(__file__).parents[1]))
import live_support

OUTSIDE = dict(os.environ)  # of a drive that finds its workspace itself
live_support.workspace()

import rclpy  # noqa: E402
from builtin_interfaces.msg import Time  # noqa: E402
from carla_digr_msgs.srv import SetPolicy  # noqa: E402
from carla_digr_ros import topics  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from strange_messages import nonsense  # noqa: E402

from carla_digr.live.supervisor import free_domain  # noqa: E402

AFTER_SECONDS = 7.0  # of the drive until the first attack; before, who publishes as a bridge does is taken for one
HEARD = (topics.DECISION, topics.MANUAL, topics.CMD_VEL, topics.ACKERMANN, topics.FRAME, topics.IMAGE, topics.INSTANCES,
         topics.VEHICLES, topics.ODOMETRY, topics.OBSERVATION, topics.SALIENCY, topics.OVERLAY, topics.OBJECTS,
         topics.TRUST, topics.TF, topics.EVENTS)  # fmt: skip
CAMERA = ["sensor.camera.rgb", [["image_size_x", 1, "2048"]]]
HERE = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


class Strangers:
    """All who attack, each counted."""

    def __init__(self, domain: int, port: int, page: int, directory: Path):
        self.port, self.page, self.done, self.deaf = port, page, Counter[str](), list[socket.socket]()
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        self.node = rclpy.create_node("stranger", context=context)
        self.header = None
        self.observer = live_support.Observer(domain, topics.FRAME.name)
        self.out = [(topic, self.node.create_publisher(topic.type, topic.name, topics.QOS)) for topic in HEARD]
        self.service = self.node.create_client(SetPolicy, "/explainer/set_policy")
        os.mkfifo(directory / "pipe.safetensors")
        with (directory / "sparse.safetensors").open("wb") as file:
            file.truncate(10 << 30)
        self.files = ["/dev/zero", str(directory / "pipe.safetensors"), str(directory / "sparse.safetensors")]

    def all_of_them(self) -> list[Callable[[], None]]:
        """One turn of each."""
        return [self.messages, self.clocks, self.policies, self.half_asked, self.deaf_page, self.talk, self.calls]

    def messages(self) -> None:
        """Of every topic what is no message, with the stamp of the frame that is driven on."""
        self.observer.received.clear()
        self.observer.until(lambda: bool(self.observer.received[topics.FRAME.name]))
        header = self.observer.received[topics.FRAME.name][-1].header
        for topic, publisher in self.out:
            for message in nonsense(topic, header):
                publisher.publish(message)
                self.done["messages"] += 1

    def clocks(self) -> None:
        """Twelve of the wall's time, by a publisher that comes and goes."""
        publisher = self.node.create_publisher(Clock, topics.CLOCK.name, topics.QOS)
        for _ in range(12):
            publisher.publish(Clock(clock=Time(sec=1_764_000_000 + int(time.monotonic()))))
            self.done["clocks"] += 1
        self.node.destroy_publisher(publisher)

    def policies(self) -> None:
        """A policy that is none."""
        self.service.call_async(SetPolicy.Request(weights=self.files[self.done["policies"] % len(self.files)]))
        self.done["policies"] += 1

    def half_asked(self) -> None:
        """A request without an end, left open, and one that is none."""
        for text in (b"GET / HTTP/1.1\r\nHost: x", b"\0\1\2 nonsense\r\n\r\n"):
            with contextlib.suppress(OSError):
                self._keep(socket.create_connection(("127.0.0.1", self.page), timeout=2)).sendall(text)
                self.done["requests"] += 1

    def deaf_page(self) -> None:
        """A page that reads nothing of what it is sent."""
        with contextlib.suppress(OSError):
            self._page()
            self.done["deaf pages"] += 1

    def talk(self) -> None:
        """A page that sends what is no message."""
        with contextlib.suppress(OSError):
            self._page().sendall(b"\x81\xfe\xff\xff" + bytes(4) + b"x" * 65535)
            self.done["talking pages"] += 1

    def calls(self) -> None:
        """Calls with more than the simulator takes."""
        many = {"get_actors_by_id": [[7] * 300_000], "apply_batch": [[[1, [7]]] * 100_000, False],
                "spawn_actor": [[0, *CAMERA, [["role_name", 4, "x" * 2**20]]], HERE]}  # fmt: skip
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            name = [*many][self.done["calls"] % len(many)]
            connection.sendall(msgpack.packb([0, 7, name, [[False], *many[name]]]))
            connection.recv(1 << 16)
        self.done["calls"] += 1

    def _page(self) -> socket.socket:
        connection = self._keep(socket.create_connection(("127.0.0.1", self.page), timeout=2))
        connection.sendall(
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{self.page}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        return connection

    def _keep(self, connection: socket.socket) -> socket.socket:
        self.deaf.append(connection)
        for old in self.deaf[:-20]:
            old.close()
        del self.deaf[:-20]
        return connection


def main() -> None:
    """Drive, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument(
        "--only", default="", help="one of: messages, clocks, policies, half_asked, deaf_page, talk, calls"
    )
    args = parser.parse_args()
    port, page = live_support.free_port(), live_support.free_port()
    command = [sys.executable, "-m", "carla_digr.cli", "live", "--port", str(port), "--viewer-port", str(page),
               "--duration", f"{args.seconds:g}", "--headless", "--json", str(args.out)]  # fmt: skip
    with contextlib.ExitStack() as opened:
        domain = opened.enter_context(free_domain())
        directory = opened.enter_context(tempfile.TemporaryDirectory())
        drive = opened.enter_context(subprocess.Popen(command, env={**OUTSIDE, "ROS_DOMAIN_ID": str(domain)}))
        strangers = Strangers(domain, port, page, Path(directory))
        strangers.observer.until(lambda: bool(strangers.observer.received[topics.FRAME.name]))
        time.sleep(AFTER_SECONDS)

        def again(attack: Callable[[], None]) -> None:
            while drive.poll() is None:
                attack()
                time.sleep(args.pause)

        for attack in (each for each in strangers.all_of_them() if args.only in ("", each.__name__)):
            threading.Thread(target=again, args=(attack,), daemon=True).start()
        drive.wait()
        attacks = dict(strangers.done)
    report = json.loads(args.out.read_text())
    report["attacks"] = attacks
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"attacks": attacks, "status": drive.returncode, **report["figures"]}, indent=1))
    sys.stdout.flush()
    os._exit(0)  # a thread may wait for a frame


if __name__ == "__main__":
    main()
