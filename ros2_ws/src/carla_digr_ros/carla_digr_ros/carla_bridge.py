"""Node `carla_bridge`: owns time. Tick, frame k out, decision k in, control applied, next tick.

Paced, a tick happens on every 50 ms boundary of the wall clock and a decision has 40 ms; with `lockstep` the same
loop runs as fast as decisions come. Either way decision k acts on tick k+1, so both give the same drive.
"""

from __future__ import annotations

import math
import socket
import time

from carla_digr_msgs.msg import DriveFrame as DriveFrameMessage
from carla_digr_msgs.msg import DrivingDecision
from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from carla_digr.driving.control import DriveFrame, VehicleCommand
from carla_digr.driving.scenario import Scenario
from carla_digr.driving.session import SimulatorGone
from carla_digr.errors import UserError
from carla_digr.live.composition import whole_number
from carla_digr.live.watchdog import FULL_BRAKE, Ruling, State, Watchdog
from carla_digr_ros import topics
from carla_digr_ros.conversion import to_message
from carla_digr_ros.diagnostics import OK, WARN, Recent, Reporter
from carla_digr_ros.parameters import declare
from carla_digr_ros.running import SPIN_SECONDS, Stop, run

CALL_SECONDS = 5.0  # longest wait for an answer of the simulator
PERIOD = 0.05  # s between ticks, wall and simulation time
LOCKSTEP_SECONDS = 20.0  # longest wait for a decision in lockstep
HELD_FRAMES = 20  # from the end of an episode to the start of the next one
MAP_FRAME, EGO_FRAME, CAMERA_FRAME = "map", "ego_vehicle", "ego_vehicle/camera"


class Pacer:
    """Boundaries of a fixed grid of wall-clock time; nothing drifts, and periods that were missed are counted."""

    def __init__(self) -> None:
        self.missed = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new grid now."""
        self.next = time.monotonic() + PERIOD

    def advance(self) -> None:
        """The present boundary is used; aim at the next one that is not over yet."""
        behind = math.floor((time.monotonic() - self.next) / PERIOD)
        if behind > 0:
            self.missed += behind
            self.next += behind * PERIOD
        self.next += PERIOD


class CarlaBridge(Node):
    """The simulator's driver: the only node that talks to CARLA, and the only one that ticks it."""

    def __init__(self) -> None:
        super().__init__("carla_bridge")
        self._simulator = declare(self, "simulator", "embedded", "what is driven on", choices=("embedded", "carla"))
        self._host = declare(self, "host", "127.0.0.1", "where the simulator listens")
        self._port = declare(self, "port", 2000, "the simulator's port", (1, 65535))
        self._start_seconds = declare(self, "start_seconds", 0.0, "time the simulator has to start, s", (0.0, 600.0))
        self._seed = declare(self, "seed", 1, "of the first episode; every further one adds 1", (0, 2**31 - 1))
        self._vehicles = declare(self, "vehicles", 64, "other vehicles on the ego's carriageway", (0, 400))
        self._roads, self._spawn_points = (
            _numbers(name, declare(self, name, "", description))
            for name, description in (
                ("roads", "OpenDRIVE ids of the roads on which drives start, separated by commas; empty: all highways"),
                ("spawn_points", "indices of the map's spawn points at which drives start; empty: all on highways"),
            )
        )
        self._patience = declare(
            self, "patience", 60.0, "s in which a simulator that hung or died must be back", (0.0, 86400.0)
        )
        self._lockstep = declare(self, "lockstep", False, "wait for every decision instead of keeping to the clock")
        deadline = declare(self, "deadline", 0.040, "s after a frame within which its decision must come", (0.001, 1.0))
        recovery = declare(self, "recovery", 5, "good decisions in a row that end a stop", (1, 1000))

        self._watchdog = Watchdog(time.monotonic, LOCKSTEP_SECONDS if self._lockstep else deadline, recovery)
        self._ruling = Ruling(FULL_BRAKE, True, "no frame yet")
        self._answered = False
        self._sent_at = 0.0
        self._frame: DriveFrame | None = None
        self._header = Header()
        self._pacer: Pacer | None = None
        self._episode = self._collisions = self._fallbacks = self._foreign = 0
        self._distance = 0.0
        self._over_since = 0  # frame that ended the episode, 0 while it goes on
        self._waiting = ""
        self._frames, self._ticks, self._answers = Recent(), Recent(), Recent()

        self._clock_out = topics.CLOCK.publisher(self)
        self._facts_out = topics.FRAME.publisher(self)
        self._images_out = topics.IMAGE.publisher(self)
        self._infos_out = topics.CAMERA_INFO.publisher(self)
        self._odometry_out = topics.ODOMETRY.publisher(self)
        self._decisions_out = topics.DECISION.publisher(self)
        topics.DECISION.subscribe(self, self._on_decision)
        self._reporter = Reporter(self, "drive", self._status)
        self._drive: Scenario | None = None

    def close(self) -> None:
        """Leave the simulator as it was found."""
        if self._drive is not None:
            self._drive.close()

    def run(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Drive until asked to stop.

        Raises:
            UserError: the simulator is gone and does not come back, or in lockstep no decision comes.
        """
        self._wait_for_the_simulator(executor, stop, self._start_seconds)
        if not stop.requested:
            self._drive = Scenario.connect(
                self._simulator,
                self._host,
                self._port,
                CALL_SECONDS,
                vehicles=self._vehicles,
                roads=self._roads,
                spawn_points=self._spawn_points,
            )
            self._wait_for_an_explainer(executor, stop)
        if stop.requested:
            return
        self._pacer = Pacer()
        while not stop.requested:
            try:
                self._drive_on(self._drive, executor, stop)
            except SimulatorGone as lost:
                self._recover(self._drive, lost, executor, stop)

    def _drive_on(self, drive: Scenario, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Drive one episode after the other until asked to stop. Raises SimulatorGone."""
        assert self._pacer is not None
        frame = self._begin(drive)
        self._pacer.restart()
        while not stop.requested:
            self._publish(frame)
            self._wait_for_the_decision(executor, stop)
            if stop.requested:
                break
            command = self._command()
            if not self._lockstep:
                self._wait_for_the_boundary(executor)
            if self._over_since and frame.frame - self._over_since >= HELD_FRAMES:
                self._seed += 1
                frame = self._begin(drive)
                continue
            start = time.monotonic()
            frame = drive.step(command)
            self._ticks.add((time.monotonic() - start) * 1000.0)
            self._account(frame)

    def _recover(self, drive: Scenario, lost: SimulatorGone, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Wait for a simulator that hung or died, then make ego, camera and traffic anew.

        Raises UserError when it is not back within the patience.
        """
        self.get_logger().error(f"{lost}; waiting {self._patience:g} s for it")
        end = time.monotonic() + self._patience
        self._seed += 1
        while not stop.requested:
            self._waiting = "the simulator does not answer"
            self._reporter.report()
            self._wait_for_the_simulator(executor, stop, end - time.monotonic())
            try:
                self._drive = drive.reconnect(patience=0.0)
            except UserError:
                if time.monotonic() >= end:
                    raise
                executor.spin_once(timeout_sec=SPIN_SECONDS)
            else:
                self.get_logger().info("The simulator is back")
                break
        self._waiting = ""

    def _begin(self, drive: Scenario) -> DriveFrame:
        frame = drive.reset(self._seed)
        self._episode += 1
        self._over_since = 0
        self.get_logger().info(f"Episode {self._episode}, seed {self._seed}")
        return frame

    def _account(self, frame: DriveFrame) -> None:
        self._distance += abs(frame.speed) * PERIOD
        if self._over_since:
            return
        if frame.collision:
            self._collisions += 1
            self.get_logger().warning(f"Collision with {frame.collision} after {self._distance:.0f} m in all")
        elif frame.off_road:
            self.get_logger().warning("Off the road")
        if frame.collision or frame.off_road:
            self._over_since = frame.frame
            self._reporter.report()

    # --- one frame ---

    def _publish(self, frame: DriveFrame) -> None:
        nanoseconds = round(frame.stamp * 1e9)
        header = Header(frame_id=CAMERA_FRAME)
        header.stamp.sec, header.stamp.nanosec = divmod(nanoseconds, 10**9)
        self._clock_out.publish(Clock(clock=header.stamp))
        self._facts_out.publish(
            DriveFrameMessage(
                header=header,
                frame=frame.frame,
                episode=self._episode,
                seed=self._seed,
                collision=frame.collision or "",
                off_road=frame.off_road,
                over=bool(self._over_since),
            )
        )
        image = to_message(frame.image, "rgb8", header)
        self._frame, self._header, self._answered = frame, header, False
        self._watchdog.sent(frame.frame)
        self._sent_at = time.monotonic()
        self._images_out.publish(image)
        self._infos_out.publish(_camera_info(header, Scenario.fov, image.width, image.height))
        self._odometry_out.publish(_odometry(header, frame))
        self._frames.add()

    def _command(self) -> VehicleCommand:
        """What this frame's decision asks for, or the brake."""
        ruling = self._watchdog.rule()
        if self._lockstep and not self._answered:
            raise UserError(f"{ruling.reason[0].upper()}{ruling.reason[1:]}: is the explainer running?")
        if ruling.fallback:
            self._fallbacks += 1
            self._decisions_out.publish(self._fallback_decision(ruling.command))
        if ruling.fallback and not self._ruling.fallback:
            self.get_logger().warning(f"Braking: {ruling.reason}")
        elif self._ruling.fallback and not ruling.fallback:
            self.get_logger().info("The policy drives")
        self._ruling = ruling
        return FULL_BRAKE if self._over_since else ruling.command

    def _on_decision(self, message: DrivingDecision) -> None:
        if message.fallback:
            return  # our own
        if self._frame is None or message.header.stamp != self._header.stamp:
            self._foreign += 1
            return
        command = VehicleCommand(message.steer, message.throttle, message.brake, message.target_speed)
        if self._watchdog.receive(self._frame.frame, command):
            self._answered = True
            self._answers.add((time.monotonic() - self._sent_at) * 1000.0)

    def _fallback_decision(self, command: VehicleCommand) -> DrivingDecision:
        assert self._frame is not None
        return DrivingDecision(
            header=self._header,
            frame=self._frame.frame,
            throttle=command.throttle,
            steer=command.steer,
            brake=command.brake,
            target_speed=command.target_speed,
            value=math.nan,
            inference_ms=math.nan,
            saliency_ms=math.nan,
            fallback=True,
        )

    # --- waiting ---

    def _wait_for_the_simulator(self, executor: SingleThreadedExecutor, stop: Stop, seconds: float) -> None:
        """Until something listens on the simulator's port; what it is, and if nothing does, `Scenario.connect` says."""
        end = time.monotonic() + seconds
        while not stop.requested and time.monotonic() < end:
            try:
                socket.create_connection((self._host, self._port), 1.0).close()
                break
            except (OSError, OverflowError):
                self._waiting = f"waiting for a simulator on {self._host}:{self._port}"
                executor.spin_once(timeout_sec=0.1)

    def _wait_for_an_explainer(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Until a node that publishes decisions gets our pictures; the car stands in front of its drive until then."""
        while not stop.requested:
            deciders = {info.node_name for info in self.get_publishers_info_by_topic(topics.DECISION.name)}
            watchers = [info.node_name for info in self.get_subscriptions_info_by_topic(topics.IMAGE.name)]
            answering = (deciders - {self.get_name()}) & set(watchers)
            if answering and self._images_out.get_subscription_count() >= len(watchers):
                break
            self._waiting = "waiting for an explainer"
            executor.spin_once(timeout_sec=0.1)
        self._waiting = ""

    def _wait_for_the_decision(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        while not self._answered and not stop.requested and (remaining := self._watchdog.remaining()) > 0.0:
            executor.spin_once(timeout_sec=min(remaining, SPIN_SECONDS))

    def _wait_for_the_boundary(self, executor: SingleThreadedExecutor) -> None:
        assert self._pacer is not None
        while (remaining := self._pacer.next - time.monotonic()) > 0.002:
            executor.spin_once(timeout_sec=remaining - 0.001)
        time.sleep(max(0.0, self._pacer.next - time.monotonic()))
        self._pacer.advance()

    # --- diagnostics ---

    def _status(self):
        values = {
            "watchdog": self._watchdog.state.value,
            "frames (Hz)": self._frames.rate(),
            "tick p50 (ms)": self._ticks.latency(50),
            "tick p99 (ms)": self._ticks.latency(99),
            "frame to decision p50 (ms)": self._answers.latency(50),
            "frame to decision p99 (ms)": self._answers.latency(99),
            "fallbacks": self._fallbacks,
            "decisions late or repeated": self._watchdog.ignored + self._foreign,
            "periods missed": self._pacer.missed if self._pacer else 0,
            "episode": self._episode,
            "seed": self._seed,
            "collisions": self._collisions,
            "distance (m)": self._distance,
        }
        if self._waiting:
            return WARN, self._waiting, values
        if self._watchdog.state is not State.DRIVING:
            return WARN, self._ruling.reason, values
        if self._over_since:
            return WARN, "the episode is over: collision or off the road", values
        return OK, f"driving at {self._frames.rate():.1f} frames/s", values


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, as a parameter has them."""
    return tuple(whole_number(name, part.strip(), 0, 2**31 - 1) for part in text.split(",")) if text.strip() else ()


def _camera_info(header: Header, fov: float, width: int, height: int) -> CameraInfo:
    """A pinhole without distortion; ``fov`` is the horizontal field of view in degrees, as CARLA has it."""
    focal = width / (2.0 * math.tan(math.radians(fov) / 2.0))
    cx, cy = width / 2.0, height / 2.0
    return CameraInfo(
        header=header,
        width=width,
        height=height,
        distortion_model="plumb_bob",
        d=[0.0] * 5,
        k=[focal, 0.0, cx, 0.0, focal, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[focal, 0.0, cx, 0.0, 0.0, focal, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )


def _odometry(header: Header, frame: DriveFrame) -> Odometry:
    """The ego's motion in ROS's right-handed axes (REP 103): CARLA's y and yaw change sign."""
    message = Odometry(child_frame_id=EGO_FRAME)
    message.header.stamp = header.stamp
    message.header.frame_id = MAP_FRAME
    pose = message.pose.pose
    pose.position.x, pose.position.y = float(frame.x), -float(frame.y)
    pose.orientation.z = math.sin(-frame.yaw / 2.0)
    pose.orientation.w = math.cos(-frame.yaw / 2.0)
    message.twist.twist.linear.x = float(frame.speed)
    return message


def main() -> int:
    """Run the node; its exit status."""
    return run(CarlaBridge, CarlaBridge.run)
