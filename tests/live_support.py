"""What the tests of the live drive share: the workspace in this process, nodes as processes, a node that watches."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch

from carla_digr import checkpoint
from carla_digr.config import PolicyConfig
from carla_digr.driving.control import ACTIONS
from carla_digr.live.composition import PACKAGE, Process
from carla_digr.live.supervisor import command_line, workspace_environment
from carla_digr.policy import ActorCritic, InputRecipe

LIMIT = 120.0  # s until a test gives up waiting for an event; the first start compiles the simulator


@functools.cache
def workspace() -> dict[str, str]:
    """The environment of the built workspace, which this process can import from after the first call."""
    environment = workspace_environment()
    os.environ.update({k: v for k, v in environment.items() if k.startswith(("AMENT_", "ROS_", "FASTDDS_"))})
    os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    import std_msgs.msg  # noqa: F401 - its libraries first

    # The loader read LD_LIBRARY_PATH when this process began; libraries that are loaded already it finds by name.
    supports = [f"rosidl_typesupport_{kind}" for kind in ("fastrtps_c", "introspection_c", "c")]
    import geometry_msgs.msg  # noqa: F401

    for package in ("tf2_msgs", "ackermann_msgs", "carla_digr_msgs"):
        for part in ("rosidl_generator_c", *supports, "rosidl_generator_py"):
            for directory in environment["LD_LIBRARY_PATH"].split(os.pathsep):
                for library in Path(directory).glob(f"lib{package}__{part}.so"):
                    ctypes.CDLL(str(library))
    return environment


def without(package: str, directory: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment whose Python processes cannot import a package; their hook is written into a directory."""
    (directory / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    path = os.pathsep.join(filter(None, [str(directory), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}


def make_weights(directory: Path, actions: str = "wheels") -> Path:
    """A driving policy with random weights whose probabilities depend on the picture."""
    torch.manual_seed(3)
    policy = ActorCritic(PolicyConfig(activation="softplus"), 3, 128, 128, len(ACTIONS[actions]))
    with torch.no_grad():
        policy.policy_head.weight.mul_(100.0)
    path = directory / "student.safetensors"
    checkpoint.save(path, policy, {"task": "driving", "role": "student", "action_names": list(ACTIONS[actions])})
    return path


def make_foreign_weights(directory: Path, controls: bool = True) -> Path:
    """A policy of somebody else: two actions of its own, on the last four grey pictures of 84x84 pixels."""
    torch.manual_seed(5)
    recipe = InputRecipe("grey", stack=4)
    policy = ActorCritic(PolicyConfig(features=32), 4, 84, 84, 2, recipe=recipe)
    with torch.no_grad():
        policy.policy_head.weight.mul_(100.0)
    card = {"task": None, "role": "imported", "action_names": ["go", "stop"]}
    if controls:
        card["controls"] = [{"target_speed": 15.0}, {"brake": 0.5, "steer": -0.1}]
    path = directory / "foreign.safetensors"
    checkpoint.save(path, policy, card)
    return path


def free_port() -> int:
    """A port that is free, and the next one too, as the simulator needs."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise AssertionError("no two free ports in a row")


def until(condition: Callable[[], bool], step: Callable[[], None] = lambda: time.sleep(0.02)) -> None:
    """Wait for an event; fails after LIMIT, or when a process has died that should not."""
    end = time.monotonic() + LIMIT
    while not condition():
        for running in Running.needed:
            assert running.popen.poll() is None, f"{running.log.name}: {running.output}"
        if time.monotonic() > end:
            said = "\n".join(f"{running.log.name}: {running.output}" for running in Running.needed)
            raise AssertionError(f"{LIMIT:.0f} s are over\n{said}")
        step()


class Running:
    """A process of the drive with its output in a file."""

    needed: ClassVar[list[Running]] = []  # those that should be alive

    def __init__(self, process: Process, domain: int, log: Path, fault: str = ""):
        self.log = log
        environment = {**workspace(), "ROS_DOMAIN_ID": str(domain)}
        command = command_line(process, environment)
        if fault:  # the node's own process and entry point, with something broken in it first
            program = f"{fault}\nfrom {PACKAGE}.{process.name} import main; raise SystemExit(main())"
            command = [sys.executable, "-c", program, *command[1:]]
        with log.open("wb") as file:
            self.popen = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        """Until it ends by itself; its exit status."""
        with contextlib.suppress(ValueError):
            self.needed.remove(self)
        return self.popen.wait(LIMIT)

    def end(self, number: int = signal.SIGINT) -> int:
        """Ask it to end; its exit status."""
        self.popen.send_signal(number)
        return self.wait()


class Observer:
    """A node in this process that subscribes to topics of the drive and keeps what comes, by topic name."""

    def __init__(self, domain: int, *names: str, qos=None):
        workspace()
        import rclpy
        from carla_digr_ros import topics
        from carla_digr_ros.receiving import message_of
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import DurabilityPolicy

        self.topics = topics
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("observer", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.received: dict[str, list] = defaultdict(list)
        self.sent: list[tuple[int, str]] = []  # (time of publication in ns, topic), all topics together
        for topic in topics.TOPICS:
            if topic.name in names:
                # A callback with exactly two arguments gets the times of the transport as well.
                # The bytes, for a test may send some that are no message.
                def keep(data, info, topic=topic):
                    with contextlib.suppress(ValueError):
                        self._keep(topic.name, message_of(data, topic.type), info)

                latched = topic.qos.durability is DurabilityPolicy.TRANSIENT_LOCAL  # it may have been sent before
                wanted = topic.qos if latched or not qos else qos
                self.node.create_subscription(topic.type, topic.name, keep, wanted, raw=True)

    def _keep(self, name: str, message, info: dict) -> None:
        self.received[name].append(message)
        self.sent.append((info["source_timestamp"], name))

    def spin(self) -> None:
        self.executor.spin_once(timeout_sec=0.1)

    def until(self, condition: Callable[[], bool]) -> None:
        """Take messages until something is so."""
        until(condition, self.spin)

    def set_parameter(self, node: str, name: str, value: object):
        """Ask a node for another value of a parameter; its answer."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        client = self.node.create_client(SetParameters, f"/{node}/set_parameters")
        self.until(client.service_is_ready)
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        answer = client.call_async(request)
        self.until(answer.done)
        return answer.result().results[0]

    def close(self) -> None:
        self.node.destroy_node()
        self.executor.shutdown()
        self.context.try_shutdown()


@contextlib.contextmanager
def stage(domain: int, directory: Path) -> Iterator[Callable[..., Running]]:
    """Starts processes; all are gone when the context ends."""
    started: list[Running] = []

    def start(process: Process, fault: str = "") -> Running:
        running = Running(process, domain, directory / f"{process.name}-{len(started)}.log", fault)
        started.append(running)
        return running

    try:
        yield start
    finally:
        for running in reversed(started):  # the simulator was started first: the bridge tidies up while it is there
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
                if running.popen.poll() is None:
                    running.popen.send_signal(number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        running.popen.wait(8.0)
            running.wait()


def simulator(port: int) -> Process:
    """The embedded highway."""
    arguments = ("--port", str(port), "--parent", str(os.getpid()))
    return Process("simulator", module="carla_digr.simulator.server", arguments=arguments)


def bridge(port: int, **parameters) -> Process:
    """The bridge to the embedded highway on a port."""
    return Process("carla_bridge", parameters={"port": port, "start_seconds": LIMIT, **parameters}, tidies_up=True)


def installed(name: str) -> Path:
    """A file of the node package's share directory."""
    from ament_index_python.packages import get_package_share_directory

    workspace()
    return Path(get_package_share_directory(PACKAGE)) / name
