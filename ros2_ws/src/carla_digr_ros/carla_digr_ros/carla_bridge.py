"""Node `carla_bridge`: owns time. Tick, frame k out, decision k in, control applied, next tick.

Paced, a tick happens on every 50 ms boundary of the wall clock and a decision has 40 ms; with `lockstep` the same
loop runs as fast as decisions come. Either way decision k acts on tick k+1, so both give the same drive.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from ackermann_msgs.msg import AckermannDriveStamped
from carla_digr_msgs.msg import DriveEvent, DrivingDecision, Vehicle, VehicleControl, Vehicles
from carla_digr_msgs.msg import DriveFrame as DriveFrameMessage
from geometry_msgs.msg import Twist
from rclpy.executors import SingleThreadedExecutor
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger

from carla_digr.driving.control import MAX_WHEEL_ANGLE, UNKNOWN_LANE, DriveFrame, VehicleCommand, turning
from carla_digr.driving.scenario import WEATHERS, Scenario
from carla_digr.errors import SimulatorGone, UserError
from carla_digr.live.composition import whole_number
from carla_digr.live.pacing import PERIOD, Pacer
from carla_digr.live.watchdog import (
    BRAKE_PERIODS,
    FULL_BRAKE,
    WARN_PERIODS,
    Camera,
    ManualControl,
    Ruling,
    State,
    Watchdog,
)
from carla_digr.scheduling import DRIVES, go_first
from carla_digr_ros import topics
from carla_digr_ros.conversion import (
    OPTICAL_FRAME,
    camera_info,
    camera_transforms,
    ego_transform,
    markers,
    odometry,
    to_message,
)
from carla_digr_ros.diagnostics import OK, WARN, Recent, Reporter, Seldom
from carla_digr_ros.parameters import REALTIME, Live, declare
from carla_digr_ros.running import SPIN_SECONDS, ManagedNode, Stop, run

CALL_SECONDS = 5.0  # longest wait for an answer of the simulator
ENDLESS_SECONDS = 60.0  # after which a call, each of whose steps ends after CALL_SECONDS, will never end
LOCKSTEP_SECONDS = 20.0  # longest wait for a decision in lockstep
HELD_FRAMES = 20  # from the end of an episode to the start of the next one
LOOK_SECONDS = 0.002  # between two looks for the segmentation of a frame
NEWCOMER_SECONDS = 5.0  # of driving in which a bridge leaves the road to another one; discovery may take 3 s


class CarlaBridge(ManagedNode):
    """The simulator's driver: the only node that talks to CARLA, and the only one that ticks it.

    Services: ``~/pause`` (std_srvs/SetBool), ``~/step`` (Trigger, one frame while paused), ``~/reset`` (Trigger, a new
    episode with the parameter ``seed``). While commands come on topics.MANUAL, CMD_VEL or ACKERMANN the last one is
    applied, whatever else happens.
    All calls to the simulator are made in one thread, so that this node answers while one of them hangs.
    """

    def __init__(self) -> None:
        super().__init__("carla_bridge")
        self._simulator = declare(self, "simulator", "embedded", "what is driven on", choices=("embedded", "carla"))
        self._host = declare(self, "host", "127.0.0.1", "where the simulator listens")
        self._port = declare(self, "port", 2000, "the simulator's port", (1, 65535))
        self._start_seconds = declare(self, "start_seconds", 0.0, "time the simulator has to start, s", (0.0, 600.0))
        self._seed = Live(self, "seed", 1, "of the next episode; every further one adds 1", (0, 2**31 - 1))
        self._vehicles = Live(
            self,
            "vehicles",
            64,
            "other vehicles on the ego's carriageway; a change holds from the next episode on",
            (0, 400),
        )
        self._weather = Live(
            self,
            "weather",
            "",
            "of CARLA's names; empty: as it is (on a CARLA server ClearNoon)",
            choices=("", *WEATHERS),
        )
        listeners = declare(self, "listeners", [""], "nodes that must get the pictures too before the drive begins")
        self._listeners = set(filter(None, listeners))
        self._roads, self._spawn_points = (
            _numbers(name, declare(self, name, "", description))
            for name, description in (
                ("roads", "OpenDRIVE ids of the roads on which drives start, separated by commas; empty: all highways"),
                ("spawn_points", "indices of the map's spawn points at which drives start; empty: all on highways"),
            )
        )
        self._objects = declare(
            self, "objects", True, "also publish what the picture's pixels show, where the server has a camera for that"
        )
        self._lockstep = declare(self, "lockstep", False, "wait for every decision instead of keeping to the clock")
        self._realtime = declare(self, "realtime", False, REALTIME)
        self._patience = Live(
            self, "patience", 60.0, "s in which a simulator that hung or died must be back", (0.0, 86400.0)
        )
        self._deadline = Live(
            self, "deadline", 0.040, "s that a frame's decision may take, unless in lockstep", (0.001, 1.0)
        )
        self._recovery = Live(self, "recovery", 5, "good decisions in a row that end a stop", (1, 1000))

        self._policies = Live(
            self, "policies", [""], "hashes of the policies that may drive; empty: that of the first decision"
        )
        self._first_policy: str | None = None
        self._stranger = ""  # the last policy that decided and may not drive
        self._strange, self._rivals = Recent(), Recent()

        self._watchdog = Watchdog(time.monotonic)
        self._manual = ManualControl(time.monotonic)
        self._fault_told = Seldom()
        self._camera = Camera()
        self._ruling = Ruling(FULL_BRAKE, True, "no frame yet")
        self._answered = False
        self._to_draw: Vehicles | None = None  # as markers, once the decision has come
        self._segmented = True  # whether this frame's segmentation is out, or none is to be waited for
        self._sent_at = 0.0
        self._frame: DriveFrame | None = None
        self._header = Header()
        self._pacer = Pacer()
        self._episode = self._episode_seed = self._collisions = self._fallbacks = self._foreign = 0
        self._distance = 0.0
        self._known = False, False, False  # in the frame before: collision, off the road, end of the road
        self._over_since = 0  # frame that ended the episode, 0 while it goes on
        self._paused = self._step = self._reset = False
        self._waiting = ""
        self._frames, self._ticks, self._answers = Recent(), Recent(), Recent()

        self._clock_out = self.advertise(topics.CLOCK)
        self._facts_out = self.advertise(topics.FRAME)
        self._images_out = self.advertise(topics.IMAGE)
        self._infos_out = self.advertise(topics.CAMERA_INFO)
        self._odometry_out = self.advertise(topics.ODOMETRY)
        self._transforms_out = self.advertise(topics.TF)
        self._static_transforms_out = self.advertise(topics.TF_STATIC)
        self._markers_out = self.advertise(topics.MARKERS)
        self._events_out = self.advertise(topics.EVENTS)
        self._instances_out = self.advertise(topics.INSTANCES)
        self._vehicles_out = self.advertise(topics.VEHICLES)
        self._decisions_out = self.advertise(topics.DECISION)
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/step", self._on_step)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._reporter = Reporter(self, "drive", self._status)
        self._calls = ThreadPoolExecutor(1, "simulator")
        self._drive: Scenario | None = None

    def activate(self) -> None:
        """Take decisions and manual commands; `run` drives."""
        self.listen(topics.DECISION, self._on_decision)
        self.listen(topics.MANUAL, self._on_manual)
        self.listen(topics.CMD_VEL, self._on_twist)
        self.listen(topics.ACKERMANN, self._on_ackermann)
        self._static_transforms_out.publish(camera_transforms())

    def close(self) -> None:
        """Leave the simulator as it was found."""
        if self._drive is not None:
            self._calls.submit(self._drive.close).result()
            self._drive = None

    def run(self, executor: SingleThreadedExecutor, stop: Stop) -> None:
        """Drive while the node is active, until asked to stop.

        Raises:
            UserError: the simulator is gone and does not come back, or in lockstep no decision comes.
        """

        def going() -> bool:
            return self.active and not stop.requested

        while not (stop.requested or self.finalized):
            if not self.active:
                executor.spin_once(timeout_sec=SPIN_SECONDS)
                continue
            self._connect(executor, going)
            try:
                if going():
                    self._drive_on(executor, going)
            except SimulatorGone as lost:
                self._recover(lost, executor, going)

    def _connect(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        """Have a connection to the simulator, which may be hung at first, and an explainer that watches."""
        end = time.monotonic() + self._start_seconds
        while self._drive is None and going():
            self._wait_for_the_simulator(executor, going, end - time.monotonic())
            try:
                self._drive = self._ask(executor, self._new_drive)
            except SimulatorGone:
                if time.monotonic() >= end:
                    raise
                self._waiting = "the simulator does not answer"
        self._go_first()
        self._wait_for_an_explainer(executor, going)

    def _go_first(self) -> None:
        """Also the threads of the carla client, of which some are as old as its connection."""
        self._realtime = self._realtime and go_first(DRIVES)

    def _new_drive(self) -> Scenario:
        return Scenario.connect(
            self._simulator,
            self._host,
            self._port,
            CALL_SECONDS,
            vehicles=self._vehicles.value,
            roads=self._roads,
            spawn_points=self._spawn_points,
            surroundings=self._objects,
        )

    def _drive_on(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        """Drive one episode after the other.

        Raises:
            SimulatorGone: the simulator does not answer.
            UserError: there is another bridge.
        """
        frame = self._begin(executor)
        settled = time.monotonic() + NEWCOMER_SECONDS
        while going():
            if time.monotonic() < settled:
                self._refuse_a_second(topics.CLOCK, topics.FRAME)  # a bridge that began just now; a clock ends no drive
            self._publish(frame)
            self._wait_for_the_decision(executor, going)
            if not self._lockstep:
                self._wait_for_the_boundary(executor)
            self._wait_while_paused(executor, going)
            if not going():
                break
            command = self._command()
            if self._reset or (self._over_since and frame.frame - self._over_since >= HELD_FRAMES):
                frame = self._begin(executor)
                continue
            frame = self._tick(executor, command)

    def _ask(self, executor: SingleThreadedExecutor, call: Callable[[], Any], watch: bool = False) -> Any:
        """The answer of a call to the simulator; callbacks go on when it takes long.

        With ``watch`` the car's own next frame is waited for: a warning after WARN_PERIODS, the brake after
        BRAKE_PERIODS. A call that never ends, as where the client's Traffic Manager has lost a wake-up, ends this
        process with an abort: nothing else ends the library's wait, and who runs this node starts it again.
        """
        start = time.monotonic()
        answer = self._calls.submit(call)
        wait([answer], WARN_PERIODS * PERIOD)
        while not answer.done():
            brake = (time.monotonic() - start) / PERIOD >= BRAKE_PERIODS
            lateness = f"no frame for {BRAKE_PERIODS if brake else WARN_PERIODS} periods"
            if watch and lateness != self._waiting:
                self._waiting = lateness
                if brake:
                    self._rule(self._watchdog.fail(lateness))
                self._reporter.report()
            if time.monotonic() - start > ENDLESS_SECONDS:
                self.get_logger().fatal("The carla client never ends a call: this process ends, to be started again")
                os.abort()
            executor.spin_once(timeout_sec=PERIOD)
        if watch:
            self._waiting = ""
        return answer.result()

    def _tick(self, executor: SingleThreadedExecutor, command: VehicleCommand) -> DriveFrame:
        drive = self._drive
        assert drive is not None
        start = time.monotonic()
        self._change_weather(executor, drive)
        frame: DriveFrame = self._ask(executor, lambda: drive.step(command), watch=True)
        self._ticks.add((time.monotonic() - start) * 1000.0)
        self._account(frame)
        return frame

    def _change_weather(self, executor: SingleThreadedExecutor, drive: Scenario) -> None:
        wanted = self._weather.value
        if wanted and wanted != drive.weather:
            self._ask(executor, lambda: drive.change_weather(wanted))

    def _recover(self, lost: SimulatorGone, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        """Wait for a simulator that hung or died, then make ego, camera and traffic anew.

        Raises:
            UserError: it is not back within the patience.
        """
        drive = self._drive
        assert drive is not None
        self.get_logger().error(f"{lost} Waiting {self._patience.value:g} s for it")
        self._rule(self._watchdog.fail("the simulator does not answer"))
        end = time.monotonic() + self._patience.value
        while going():
            self._waiting = self._ruling.reason
            self._reporter.report()
            self._wait_for_the_simulator(executor, going, end - time.monotonic())
            try:
                self._drive = self._ask(executor, lambda: drive.reconnect(patience=0.0))
            except UserError:
                if time.monotonic() >= end:
                    raise
                executor.spin_once(timeout_sec=SPIN_SECONDS)
            else:
                self.get_logger().info("The simulator is back")
                self._go_first()
                break
        self._waiting = ""

    def _begin(self, executor: SingleThreadedExecutor) -> DriveFrame:
        drive = self._drive
        assert drive is not None
        self._episode_seed = self._seed.value
        drive.vehicles = self._vehicles.value
        self._change_weather(executor, drive)
        frame: DriveFrame = self._ask(executor, lambda: drive.reset(self._episode_seed))
        self._seed.value = min(self._seed.value + 1, 2**31 - 1)
        self._episode += 1
        self._over_since, self._reset = 0, False
        self._camera = Camera()
        self._pacer.restart()
        self.get_logger().info(f"Episode {self._episode}, seed {self._episode_seed}")
        return frame

    def _account(self, frame: DriveFrame) -> None:
        self._distance += abs(frame.speed) * PERIOD
        if self._over_since:
            return
        if frame.collision:
            self._collisions += 1
            what = f"{frame.collision} drove into the ego" if frame.struck else f"Collision with {frame.collision}"
            self.get_logger().warning(f"{what} after {self._distance:.0f} m in all")
        elif frame.off_road:
            self.get_logger().warning("Off the road")
        elif frame.road_ends:
            self.get_logger().info("The stretch of road that can be driven ends here")
        if frame.collision or frame.off_road or frame.road_ends:
            self._over_since = frame.frame
            self._reporter.report()

    # --- one frame ---

    def _publish(self, frame: DriveFrame) -> None:
        nanoseconds = round(frame.stamp * 1e9)
        header = Header(frame_id=OPTICAL_FRAME)
        header.stamp.sec, header.stamp.nanosec = divmod(nanoseconds, 10**9)
        self._clock_out.publish(Clock(clock=header.stamp))
        self._facts_out.publish(
            DriveFrameMessage(
                header=header,
                frame=frame.frame,
                episode=self._episode,
                seed=self._episode_seed,
                collision=frame.collision or "",
                off_road=frame.off_road,
                over=bool(self._over_since),
            )
        )
        image = to_message(frame.image, "rgb8", header)
        warned, fault = self._camera.warning, self._camera.check(frame.stamp, frame.image, frame.speed)
        if self._camera.warning and not warned:
            self._reporter.report()
        self._frame, self._header, self._answered = frame, header, False
        self._watchdog.deadline = LOCKSTEP_SECONDS if self._lockstep else self._deadline.value
        self._watchdog.recovery = self._recovery.value
        self._watchdog.sent(frame.frame, fault)
        self._sent_at = time.monotonic()
        self._images_out.publish(image)
        self._infos_out.publish(camera_info(header, Scenario.fov, image.width, image.height))
        motion = odometry(header, frame)
        self._odometry_out.publish(motion)
        self._transforms_out.publish(ego_transform(motion))
        self._publish_events(frame)
        self._segmented = not (self._objects and self._drive is not None and self._drive.segments)
        self._frames.add()

    def _publish_surroundings(self) -> None:
        """As soon as they have come; nothing waits for them."""
        if self._segmented or self._drive is None or (found := self._drive.surroundings()) is None:
            return
        assert self._frame is not None
        self._segmented = True
        vehicles = [
            Vehicle(
                id=actor,
                ahead=there.ahead,
                right=there.right,
                lane=min(max(there.lane, -126), UNKNOWN_LANE),
                type=there.type,
                heading=-there.turned,
                speed=there.speed,
                **dict(zip(("length", "width", "height"), there.size, strict=True)),
            )
            for actor, there in found.vehicles.items()
        ]
        self._to_draw = Vehicles(header=self._header, frame=self._frame.frame, vehicles=vehicles)
        self._vehicles_out.publish(self._to_draw)
        self._instances_out.publish(to_message(found.labels, "rgb8", self._header))

    def _draw(self) -> None:
        """The markers, which nothing waits for, where somebody looks at them."""
        if self._to_draw is not None and self._markers_out.get_subscription_count():
            self._markers_out.publish(markers(self._to_draw.header, self._to_draw.vehicles))
        self._to_draw = None

    def _publish_events(self, frame: DriveFrame) -> None:
        """What happens on this frame, each once."""
        left, ended = frame.off_road, frame.road_ends
        kinds = {
            DriveEvent.COLLISION: bool(frame.collision) and not self._known[0],
            DriveEvent.OFF_ROAD: left and not self._known[1],
            DriveEvent.LANE_CHANGE: bool(frame.lane_change),
            DriveEvent.ROAD_END: ended and not self._known[2],
        }
        self._known = bool(frame.collision), left, ended
        for kind in (kind for kind, happens in kinds.items() if happens):
            event = DriveEvent(header=self._header, frame=frame.frame, kind=kind)
            if kind == DriveEvent.COLLISION:
                event.other = frame.collision or ""
            elif kind == DriveEvent.LANE_CHANGE:
                event.lanes = min(max(frame.lane_change, -127), 127)
            self._events_out.publish(event)

    def _command(self) -> VehicleCommand:
        """What a human wants, else what this frame's decision asks for, or the brake."""
        silent = self._watchdog.silent
        ruling, manual = self._watchdog.rule(), self._manual.command()
        if self._lockstep and silent and manual is None:
            raise UserError(f"{ruling.reason[0].upper()}{ruling.reason[1:]}: is the explainer running?")
        self._rule(ruling)
        applied = manual or (FULL_BRAKE if self._over_since else ruling.command)
        if manual is not None or ruling.fallback:
            self._decisions_out.publish(self._own_decision(manual or ruling.command, manual is not None))
        return applied

    def _rule(self, ruling: Ruling) -> None:
        """Tell where the car begins to brake and where the policy takes over again."""
        self._fallbacks += ruling.fallback
        before, self._ruling = self._ruling, ruling
        if ruling.fallback and not before.fallback:
            self.get_logger().warning(f"Braking: {ruling.reason}")
        elif before.fallback and not ruling.fallback:
            self.get_logger().info("The policy drives")
        if ruling.fallback != before.fallback:
            self._reporter.report()

    def _on_decision(self, message: DrivingDecision) -> None:
        if message.fallback:
            return  # our own
        if self._frame is None or message.header.stamp != self._header.stamp:
            self._foreign += 1
            return
        if not self._may_drive(message.policy_hash):
            return
        if self._answered:
            self._rivals.add()
        steer = message.steer if len(message.probabilities) == len(message.action_names) else math.nan
        command = VehicleCommand(steer, message.throttle, message.brake, message.target_speed, message.along_lane)
        if self._watchdog.receive(self._frame.frame, command):
            self._answered = True
            self._answers.add((time.monotonic() - self._sent_at) * 1000.0)

    def _may_drive(self, policy: str) -> bool:
        if self._first_policy is None:
            self._first_policy = policy
        allowed = policy in (set(filter(None, self._policies.value)) or {self._first_policy})
        if not allowed:
            self._stranger = policy[:12]
            self._strange.add()
        return allowed

    def _on_manual(self, message: VehicleControl) -> None:
        command = VehicleCommand(message.steer, message.throttle, message.brake)
        self._drive_by_hand(command, by_page=message.header.frame_id == topics.PAGE)

    def _on_twist(self, message: Twist) -> None:
        self._drive_by_hand(turning(message.linear.x, message.angular.z))

    def _on_ackermann(self, message: AckermannDriveStamped) -> None:
        wanted = message.drive
        self._drive_by_hand(VehicleCommand(-wanted.steering_angle / MAX_WHEEL_ANGLE, target_speed=wanted.speed))

    def _drive_by_hand(self, command: VehicleCommand, by_page: bool = False) -> None:
        if (fault := self._manual.receive(command, by_page)) and self._fault_told():
            self.get_logger().error(f"Full brake: in the manual command {fault}")

    def _own_decision(self, command: VehicleCommand, manual: bool) -> DrivingDecision:
        assert self._frame is not None
        return DrivingDecision(
            header=self._header,
            frame=self._frame.frame,
            throttle=command.throttle,
            steer=command.steer,
            brake=command.brake,
            target_speed=command.target_speed,
            along_lane=command.along_lane,
            value=math.nan,
            inference_ms=math.nan,
            saliency_ms=math.nan,
            fallback=True,
            manual=manual,
        )

    # --- services ---

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._paused = request.data
        self._reporter.report()
        response.success, response.message = True, "paused" if request.data else "driving"
        return response

    def _on_step(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self._step = self._paused and self.active
        response.message = "one frame" if response.success else "Pause the drive first (~/pause)."
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self._reset = self.active
        response.message = f"Seed {self._seed.value} comes next." if response.success else "The bridge is not active."
        return response

    # --- waiting ---

    def _wait_for_the_simulator(
        self, executor: SingleThreadedExecutor, going: Callable[[], bool], seconds: float
    ) -> None:
        """Until something listens on the simulator's port; what it is, and if nothing does, `Scenario.connect` says."""
        end = time.monotonic() + seconds
        while going() and time.monotonic() < end:
            try:
                socket.create_connection((self._host, self._port), 1.0).close()
                break
            except (OSError, OverflowError):
                self._waiting = self._waiting or f"waiting for a simulator on {self._host}:{self._port}"
                executor.spin_once(timeout_sec=0.1)

    def _wait_for_an_explainer(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        """Until a node that publishes decisions gets our pictures; the car stands in front of its drive until then.

        Raises:
            UserError: another node is the drive's clock.
        """
        image, decision = topics.IMAGE.of(self), topics.DECISION.of(self)
        while going():
            self._refuse_a_second(topics.CLOCK)
            deciders = {info.node_name for info in self.get_publishers_info_by_topic(decision)}
            watchers = [info.node_name for info in self.get_subscriptions_info_by_topic(image)]
            answering = (deciders - {self.get_name()}) & set(watchers)
            missing = self._listeners - set(watchers)
            if answering and not missing and self._images_out.get_subscription_count() >= len(watchers):
                break
            self._waiting = f"waiting for {', '.join(sorted(missing)) if answering else 'an explainer'}"
            executor.spin_once(timeout_sec=0.1)
        self._waiting = ""

    def _refuse_a_second(self, *own: topics.Topic) -> None:
        """Leave the road to another node that owns time here.

        Raises:
            UserError: another node publishes all of these topics, which are a bridge's own.
        """
        names = [topic.of(self) for topic in own]
        nodes = [
            Counter((info.node_namespace, info.node_name) for info in self.get_publishers_info_by_topic(name))
            for name in names
        ]
        if functools.reduce(operator.and_, nodes).total() > 1:
            raise UserError(f"Another node publishes {names[0]} too: end it, or give each drive its own namespace.")

    def _wait_for_the_decision(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        start = time.monotonic()
        while not self._answered and going() and (remaining := self._watchdog.remaining()) > 0.0:
            self._spin(executor, min(remaining, SPIN_SECONDS))
        while self._lockstep and not self._segmented and going() and time.monotonic() - start < PERIOD:
            self._spin(executor, PERIOD)
        if self._lockstep:
            self._draw()
        if time.monotonic() - start > PERIOD:  # the first decision, or one in lockstep
            self._pacer.restart()

    def _wait_for_the_boundary(self, executor: SingleThreadedExecutor) -> None:
        while (remaining := self._pacer.next - time.monotonic()) > 0.002:
            self._spin(executor, remaining - 0.001)
        time.sleep(max(0.0, self._pacer.next - time.monotonic()))
        self._pacer.advance()

    def _spin(self, executor: SingleThreadedExecutor, seconds: float) -> None:
        """Answer, for so long at most; and see whether the segmentation has come."""
        self._publish_surroundings()
        if self._answered:
            self._draw()
        executor.spin_once(timeout_sec=seconds if self._segmented else min(seconds, LOOK_SECONDS))

    def _wait_while_paused(self, executor: SingleThreadedExecutor, going: Callable[[], bool]) -> None:
        if not self._paused:
            return
        while self._paused and not (self._step or self._reset) and going():
            executor.spin_once(timeout_sec=SPIN_SECONDS)
        self._step = False
        self._pacer.restart()

    # --- diagnostics ---

    def _status(self):
        values = {
            "watchdog": self._watchdog.state.value,
            "control": self._manual.driver or ("watchdog" if self._ruling.fallback else "policy"),
            "paused": self._paused,
            "frames (Hz)": self._frames.rate(),
            "tick p50 (ms)": self._ticks.latency(50),
            "tick p99 (ms)": self._ticks.latency(99),
            "frame to decision p50 (ms)": self._answers.latency(50),
            "frame to decision p99 (ms)": self._answers.latency(99),
            "fallbacks": self._fallbacks,
            "decisions of other policies (Hz)": self._strange.rate(),
            "decisions late or repeated": self._watchdog.ignored + self._foreign,
            "periods missed": self._pacer.missed,
            "scheduling": "real-time" if self._realtime else "ordinary",
            "episode": self._episode,
            "seed": self._episode_seed,
            "collisions": self._collisions,
            "distance (m)": self._distance,
        }
        if self._waiting:
            return WARN, self._waiting, values
        if self._paused:
            return OK, "paused", values
        if self._strange.rate():
            remedy = "let it drive by ~/set_policy of the explainer, or by the parameter policies of this node"
            return WARN, f"Decisions of the policy {self._stranger!r} are not applied: {remedy}", values
        if self._watchdog.state is not State.DRIVING:
            return WARN, self._ruling.reason, values
        if self._rivals.rate():
            topic = topics.DECISION.of(self)
            deciders = [info.node_name for info in self.get_publishers_info_by_topic(topic)]
            names = ", ".join(sorted(name for name in deciders if name != self.get_name())[:5])
            return WARN, f"Several nodes decide ({names}): for each frame the first answer counts", values
        if self._over_since:
            return WARN, "the episode is over: collision or off the road", values
        if self._camera.warning:
            return WARN, self._camera.warning, values
        return OK, f"driving at {self._frames.rate():.1f} frames/s", values


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, as a parameter has them."""
    return tuple(whole_number(name, part.strip(), 0, 2**31 - 1) for part in text.split(",")) if text.strip() else ()


def main() -> int:
    """Run the node; its exit status."""
    return run(CarlaBridge, CarlaBridge.run)
