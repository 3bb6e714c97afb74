"""Node `explainer`: for every camera frame the policy's decision, then the map that explains it, then its objects.

Torch and what needs it are imported when the node is configured: that takes seconds, in which the other nodes find
this one already.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from concurrent.futures import Future as LoadedFuture
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from carla_digr_msgs.msg import DriveFrame, DrivingDecision, MapTrust, Vehicles
from carla_digr_msgs.srv import SetPolicy
from numpy.typing import NDArray
from rcl_interfaces.srv import SetParameters
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.client import Client
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from rclpy.task import Future
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from carla_digr.driving.control import ACTIONS, TICK, UNKNOWN, VehicleCommand, commands_of
from carla_digr.errors import UserError, sentence
from carla_digr.live.composition import ATTACKS, WEIGHTS
from carla_digr.live.trust import LOW, LOW_IN_A_ROW, Judged, TrustMeter
from carla_digr.live.watchdog import WARN_PERIODS, Order, Stamps
from carla_digr.saliency import DEFAULT, METHODS
from carla_digr.saliency.overlay import COLORMAP, COLORMAPS, overlay
from carla_digr.scheduling import ANSWERS, go_first
from carla_digr.training import prepare_process
from carla_digr_ros import topics
from carla_digr_ros.conversion import to_jpeg, to_message, to_rgb
from carla_digr_ros.diagnostics import ERROR, OK, WARN, Recent, Reporter, Seldom
from carla_digr_ros.parameters import REALTIME, check, declare
from carla_digr_ros.running import ManagedNode, run

if TYPE_CHECKING:
    from carla_digr.explainer import Decision, Explainer, Saliency
    from carla_digr_ros.objects import ObjectsStage

DEVICES = ("cpu", "auto", "cuda")  # one frame at a time is fastest on the processor
SWITCH_SECONDS = 0.0005  # for which the thread of objects keeps Python's lock when a decision wants it
SETTLED = 100  # maps after which they are held against perturbation maps
GAP = 0.5  # s between two pictures from which on the later one begins anew for policies that see several
ANNOUNCE_SECONDS = 1.0  # longest wait for the bridge's answer
REPORT_SECONDS = 0.5  # between two problems that are told at once: a report takes a millisecond of the next decision's
MOST_VEHICLES = 300  # of one frame
KNOWN_FRAMES = 40  # frame numbers that are remembered by stamp until their picture comes


class ExplainerNode(ManagedNode):
    """Subscribes to the camera; publishes decision, saliency map and overlay with the picture's header.

    The service ``~/set_policy`` (carla_digr_msgs/srv/SetPolicy) lets another policy drive; the parameters that can be
    changed while it runs do so from the next frame on.
    """

    def __init__(self) -> None:
        super().__init__("explainer")
        self._settings: dict[str, Any] = {}
        self._setting("weights", str(WEIGHTS), "policy, a .safetensors file beside its card; ~/set_policy changes it")
        self._setting(
            "wrong_size", "refuse", "what to do with pictures of another size than the policy's", ("refuse", "resize")
        )
        self._setting("explanation", True, "publish saliency maps and overlays")
        self._setting("objects", True, "say which object decides, where the camera's segmentation is published")
        self._setting("trust", True, "hold a map against a perturbation map now and then, in a process of low priority")
        self._setting("opacity", 0.8, "opacity of the map in the overlay", bounds=(0.0, 1.0))
        self._setting("colormap", COLORMAP, "colours of the map in the overlay", tuple(COLORMAPS))
        self._setting("attack", "none", "attack on the picture that the policy sees", ("none", *ATTACKS))
        self._setting(
            "attack_epsilon", 0.02, "the attack's largest change of a channel, 1 being its range", bounds=(0.0, 0.2)
        )
        self._setting("target", "", "action that is explained, by name or number; empty: the one that was decided on")
        self._setting("method", DEFAULT, "how the maps are computed", tuple(METHODS))
        self._module = declare(self, "module", "", "the policy's own code, package.module:factory; empty: it has none")
        self._drives = declare(self, "drives", True, "whether the decisions drive a car, whose actions must be known")
        self._realtime = declare(self, "realtime", False, REALTIME)
        self._device = declare(
            self, "device", "cpu", "where the policy computes; auto: on a GPU if there is one", choices=DEVICES
        )
        self._camera = declare(self, "camera", 0, "side of the camera's pictures, pixels; 0: not known", (0, 4096))
        check(self, "weights", self._refuse_weights)
        check(self, "target", self._refuse_target)
        check(self, "method", self._refuse_method)

        self._decisions = self.advertise(topics.DECISION)
        self._saliencies = self.advertise(topics.SALIENCY)
        self._overlays = self.advertise(topics.OVERLAY)
        self._overlay_jpegs = self.advertise(topics.OVERLAY_JPEG)
        self._observations = self.advertise(topics.OBSERVATION)
        self._objects_out = self.advertise(topics.OBJECTS)
        self._objects: ObjectsStage | None = None
        self._trusts = self.advertise(topics.TRUST)
        self._trust: TrustMeter[DrivingDecision] | None = None
        self._agreements: deque[float] = deque(maxlen=LOW_IN_A_ROW)
        self._judged: MapTrust | None = None  # the last one
        self._maps = 0  # by this policy
        # In a group of its own: while it waits for a policy, the node's other callbacks go on.
        loading = ReentrantCallbackGroup()
        self.create_service(SetPolicy, "~/set_policy", self._on_set_policy, callback_group=loading)
        self._bridge: Client = self.create_client(SetParameters, "carla_bridge/set_parameters", callback_group=loading)
        self._loader = ThreadPoolExecutor(1)  # a policy is loaded while the present one drives on
        self._commands: tuple[VehicleCommand, ...] | None = None  # of the actions
        self._loaded: tuple[str, Explainer] | None = None  # of the service, until the parameter has its value

        self._numbers: dict[tuple[int, int], int] = {}  # stamp -> frame number, in order of arrival
        self._stamps = Stamps()
        self._decided, self._explained = Recent(), Recent()
        self._refused = self._failed = self._flat = self._disordered = 0
        self._episode = 0
        self._last_stamp = -math.inf  # s
        self._problem = ""  # of the last frame
        self._at_once, self._in_the_log = Seldom(REPORT_SECONDS), Seldom()
        self._last_picture = -math.inf
        self._saliency_ms = math.nan
        self._reporter = Reporter(self, "policy and explanation", self._status)

    def _setting(self, name: str, default: Any, description: str, choices=(), bounds=None) -> None:
        def change(value: Any) -> None:
            self._settings[name] = value
            if self.configured and name == "target":
                self._explainer.target = value or None
            if self.configured and name == "wrong_size":
                self._explainer.resize = value == "resize"
            if self.configured and name == "method" and value != self._explainer.method:
                # As another policy's: what a method needs is imported and tried while the present one explains on.
                loading = self._loader.submit(self._load, self._settings["weights"])
                loading.add_done_callback(lambda done: self.executor and self.executor.create_task(self._explain, done))

        self._settings[name] = declare(self, name, default, description, bounds, choices, change)

    # --- the managed node ---

    def configure(self) -> None:
        """Load the policy."""
        from carla_digr_ros.objects import ObjectsStage

        prepare_process()
        self._take(self._load(self._settings["weights"]))
        self._objects = ObjectsStage(self._objects_out.publish, self._realtime)
        if self._settings["objects"]:
            self._objects.practise(self._explainer)

    def close(self) -> None:
        """End what works beside the frames."""
        self._distrust()
        if self._objects is not None:
            self._objects.close()
            self._objects = None

    def activate(self) -> None:
        """Watch the camera."""
        # Frame numbers first: of two messages that wait, the executor takes the older subscription's.
        self.listen(topics.FRAME, self._on_frame)
        self.listen(topics.IMAGE, self._on_image)
        self.listen(topics.INSTANCES, self._on_surroundings)
        self.listen(topics.VEHICLES, self._on_surroundings)
        self._realtime = self._realtime and go_first(ANSWERS, alone=True)

    # --- the policy ---

    def _load(self, weights: str) -> Explainer:
        """Load a policy and check it.

        Raises:
            UserError: it cannot be had, or not with this camera or this car.
        """
        from carla_digr.explainer import Explainer

        explainer = Explainer.from_checkpoint(
            weights,
            "driving" if self._drives else None,
            self._settings["method"],
            resize=self._settings["wrong_size"] == "resize",
            module=self._module or None,
            device=self._device,
        )
        height, width, _ = explainer.image_shape
        problems = []
        if self._camera and not explainer.resize and (height, width) != (self._camera, self._camera):
            problems.append(
                f"takes pictures of {width}x{height} pixels while the camera's have {self._camera}x{self._camera} "
                f"(wrong_size resize scales them)"
            )
        if self._drives and (not explainer.discrete or commands_of(explainer.card) is None):
            driving = ", or ".join(", ".join(own) for own in ACTIONS.values())
            problems.append(
                f"decides between {', '.join(explainer.action_names)} while driving needs {driving}, or a card whose "
                f"controls say what each of its actions does to the car"
                if explainer.discrete
                else "is continuous, which can be explained but does not drive"
            )
        if problems:
            raise UserError(f"The policy {weights} {', and '.join(problems)}.")
        return explainer

    def _take(self, explainer: Explainer) -> None:
        self._explainer = explainer
        self._distrust()
        self._commands = commands_of(explainer.card)
        try:
            explainer.target = self._settings["target"] or None
        except UserError as error:  # a target of the policy before
            self.get_logger().warning(f"{error} The decision is explained instead")
        names = ", ".join(explainer.action_names)
        self.get_logger().info(f"Policy {explainer.policy_hash} from {Path(self._settings['weights']).name}: {names}")

    def _explain(self, loaded: LoadedFuture[Explainer]) -> None:
        """By the method that was asked for, or on by the one before."""
        try:
            explainer = loaded.result()
        except Exception as error:  # of a method's own code any
            self.get_logger().warning(sentence(error) or f"The method cannot be had: {error!r}")
            self.set_parameters([Parameter("method", value=self._explainer.method)])
        else:
            if explainer.policy_hash == self._explainer.policy_hash and explainer.method == self._settings["method"]:
                self._take(explainer)

    def _distrust(self) -> None:
        """Forget what was found of another policy's maps."""
        if self._trust is not None:
            self._trust.close()
        self._trust, self._judged, self._maps = None, None, 0
        self._agreements.clear()

    async def _on_set_policy(self, request: SetPolicy.Request, response: SetPolicy.Response) -> SetPolicy.Response:
        done: Future = Future(executor=self.executor)
        loading = self._loader.submit(self._load, request.weights)
        loading.add_done_callback(done.set_result)
        await done
        try:
            explainer = loading.result()
            await self._announce(explainer.policy_hash)
            self._loaded = request.weights, explainer
            verdict = self.set_parameters([Parameter("weights", value=request.weights)])[0]
            response.success, response.message = verdict.successful, verdict.reason
        except Exception as error:  # of a policy's own code any
            response.message = sentence(error) or f"It cannot be loaded: {error!r}."
        if not response.success:
            self.get_logger().warning(f"Refused the policy {request.weights}: {response.message}")
        elif self.configured:
            self._take(explainer)
        else:
            response.message = "The policy is taken when the node is configured."
        response.policy_hash = self._explainer.policy_hash if self.configured else ""
        return response

    async def _announce(self, policy_hash: str) -> None:
        """Have the bridge, if there is one, apply the decisions of a policy that was asked for."""
        if not self._bridge.service_is_ready():
            return
        driving = [self._explainer.policy_hash] if self.configured else []
        policies = Parameter("policies", value=[*driving, policy_hash]).to_parameter_msg()
        answer = self._bridge.call_async(SetParameters.Request(parameters=[policies]))
        patience = self.create_timer(ANNOUNCE_SECONDS, answer.cancel, clock=Clock(clock_type=ClockType.STEADY_TIME))
        await answer
        self.destroy_timer(patience)

    def _refuse_weights(self, weights: str) -> str:
        if not self.configured:
            return ""  # the next configuration loads them
        if self._loaded is None or self._loaded[0] != weights:
            return "Call the service ~/set_policy: it loads and checks a policy before it takes over."
        size, present = self._loaded[1].image_shape, self._explainer.image_shape
        if size[:2] != present[:2] and self._settings["wrong_size"] == "refuse":
            return f"It needs pictures of {size[1]}x{size[0]}, the present one {present[1]}x{present[0]} pixels."
        return ""

    def _refuse_target(self, target: str) -> str:
        if not (target and self.configured):
            return ""
        from carla_digr.explainer import action_index

        try:
            action_index(target, self._explainer.action_names)
        except UserError as error:
            return str(error)
        return ""

    def _refuse_method(self, name: str) -> str:
        fast = [key for key, method in METHODS.loadable().items() if method.speed == "frame"]
        if self._drives and name not in fast:
            return f"The maps of {name} take longer than a frame; choose one of {', '.join(fast)}."
        return ""

    # --- one frame ---

    def _on_frame(self, message: DriveFrame) -> None:
        if message.episode != self._episode:  # known before its first picture comes
            self._episode = message.episode
            self._explainer.restart()
        self._numbers[_key(message.header)] = message.frame
        while len(self._numbers) > KNOWN_FRAMES:
            del self._numbers[next(iter(self._numbers))]

    def _on_image(self, message: Image) -> None:
        start = self._last_picture = time.monotonic()
        try:  # before its stamp counts: what is no picture moves no clock
            rgb = self._explainer.fitted(to_rgb(message))
        except (UserError, ValueError) as error:
            self._refuse(f"Refused a picture on {self._topic()}: {error}")
            return
        stamp = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        order = self._stamps.check(stamp)
        if order in (Order.REPEATED, Order.LATE):
            self._disordered += 1
            self._report(f"Left out a picture on {self._topic()}: {order.value}")
            return
        if order is Order.JUMP:
            self.get_logger().warning(f"On {self._topic()} the clock jumped back; going on from there")
        if order is Order.JUMP or stamp - self._last_stamp > GAP:
            self._explainer.restart()
        self._last_stamp = stamp
        attack, epsilon = self._settings["attack"], self._settings["attack_epsilon"]
        try:
            if attack != "none":
                rgb = self._explainer.attacked(rgb, attack, epsilon)
            decision = self._explainer.decide(rgb)
        except (UserError, ValueError) as error:
            self._refuse(f"Refused a picture on {self._topic()}: {error}")
            return
        except Exception as error:  # whatever a broken policy does: no decision, and the bridge brakes
            self._refuse(f"No decision for this frame: {error!r}")
            return
        answer = self._decision_message(message.header, decision)
        answer.attack = f"{attack} {epsilon:g}" if attack != "none" else ""
        self._decisions.publish(answer)
        self._decided.add((time.monotonic() - start) * 1000.0)
        # From here on nothing may stop the drive: the decision is out.
        self._saliency_ms = math.nan
        try:
            if answer.attack:
                self._observations.publish(to_message(rgb, "rgb8", message.header))
            if not answer.unexplained:
                saliency = self._explainer.explain(decision)
                self._publish_map(message.header, rgb, saliency)
                self._saliency_ms = saliency.saliency_ms
                self._flat += saliency.flat
                self._explained.add((time.monotonic() - start) * 1000.0)
                if self._objects is not None and self._settings["objects"]:
                    drive = self._episode, self._explainer.policy_hash
                    self._objects.add_explained(
                        message.header, answer.frame, self._explainer, decision, saliency.map, drive
                    )
                self._measure_trust(answer, decision, saliency)
        except Exception as error:
            self._failed += 1
            self._report(f"No map for this frame: {error!r}")
            return
        self._problem = "" if decision.finite else "The policy's output is not a number: the bridge brakes."

    def _measure_trust(self, answer: DrivingDecision, decision: Decision, saliency: Saliency) -> None:
        """Offer a frame to be judged, and tell what was found of an earlier one."""
        self._maps += not saliency.flat
        if not self._settings["trust"] or saliency.flat or self._maps < SETTLED:
            return
        if self._trust is None:
            self._trust = TrustMeter(self._settings["weights"], self._module)
        self._trust.offer(answer, decision.state.numpy(), saliency.map, self._explainer.target)
        if (judged := self._trust.judged()) is not None:
            self._tell_trust(answer.header, judged)

    def _tell_trust(self, header: Header, judged: Judged[DrivingDecision]) -> None:
        frame = judged.frame
        self._agreements.append(judged.agreement)
        self._judged = MapTrust(
            header=header,
            frame=frame.frame,
            age=_seconds(header) - _seconds(frame.header),
            agreement=judged.agreement,
            method=frame.method,
            target=frame.target,
            policy_hash=frame.policy_hash,
        )
        self._trusts.publish(self._judged)

    def _on_surroundings(self, message: Image | Vehicles) -> None:
        if isinstance(message, Vehicles) and len(message.vehicles) > MOST_VEHICLES:
            raise ValueError(f"more than {MOST_VEHICLES} vehicles in view")
        if self._objects is not None and self._settings["objects"]:
            if isinstance(message, Image):
                to_rgb(message)  # what is no picture takes no frame's place
            self._objects.add(message)

    def _topic(self) -> str:
        return topics.IMAGE.of(self)

    def _decision_message(self, header: Header, decision: Decision) -> DrivingDecision:
        wanted = UNKNOWN if self._commands is None else self._commands[decision.action]
        return DrivingDecision(
            header=header,
            frame=self._numbers.pop(_key(header), 0),
            action_names=self._explainer.action_names,
            probabilities=decision.probabilities,
            action=max(decision.action, 0),
            throttle=wanted.throttle,
            steer=wanted.steer if decision.finite else math.nan,
            brake=wanted.brake,
            target_speed=wanted.target_speed,
            along_lane=wanted.along_lane,
            value=decision.value,
            policy_hash=self._explainer.policy_hash,
            inference_ms=decision.inference_ms,
            saliency_ms=self._saliency_ms,
            unexplained=not self._settings["explanation"],
            method=self._explainer.method,
            target=self._explainer.target_name,
        )

    def _publish_map(self, header: Header, rgb: NDArray[np.uint8], saliency: Saliency) -> None:
        self._saliencies.publish(to_message(saliency.map, "32FC1", header))
        picture = overlay(rgb, saliency.map, self._settings["opacity"], self._settings["colormap"])
        self._overlays.publish(to_message(picture, "rgb8", header))
        if self._overlay_jpegs.get_subscription_count():
            self._overlay_jpegs.publish(to_jpeg(picture, header))

    # --- diagnostics ---

    def _refuse(self, problem: str) -> None:
        self._refused += 1
        self._report(problem)

    def _report(self, problem: str) -> None:
        if problem != self._problem:  # at once on /diagnostics, repetitions and what comes thick and fast once a second
            self._problem = problem
            if self._at_once():
                self._reporter.report()
        if self._in_the_log():
            self.get_logger().error(problem)

    def _status(self):
        values = {
            "policy hash": self._explainer.policy_hash if self.configured else "",
            "method": self._settings["method"],
            "target": self._settings["target"],
            "attack": self._settings["attack"],
            "decisions (Hz)": self._decided.rate(),
            "decision p50 (ms)": self._decided.latency(50),
            "decision p99 (ms)": self._decided.latency(99),
            "maps (Hz)": self._explained.rate(),
            "map p50 (ms)": self._explained.latency(50),
            "map p99 (ms)": self._explained.latency(99),
            "pictures refused": self._refused,
            "pictures repeated or late": self._disordered,
            "maps failed": self._failed,
            "flat maps": self._flat,
            "scheduling": "real-time" if self._realtime else "ordinary",
        }
        if self._objects is not None:
            values["objects (Hz)"] = self._objects.done.rate()
            values["objects p50 (ms)"] = self._objects.done.latency(50)
            values["objects p99 (ms)"] = self._objects.done.latency(99)
            values["objects left out"] = self._objects.dropped
        if self._judged is not None:
            values["agreement with a perturbation map"] = self._judged.agreement
            values["age of the agreement (s)"] = self._last_stamp - _seconds(self._judged.header) + self._judged.age
        if self._problem:
            return ERROR, self._problem, values
        if len(self._agreements) == LOW_IN_A_ROW and max(self._agreements) < LOW:
            return WARN, f"The maps agree little with perturbation maps: {max(self._agreements):.2f} at best", values
        if self._trust is not None and self._trust.problem:
            return WARN, self._trust.problem, values
        if self._objects is not None and self._objects.problem:
            return WARN, self._objects.problem, values
        if time.monotonic() - self._last_picture > WARN_PERIODS * TICK:
            return WARN, f"No pictures on {self._topic()}", values
        return OK, f"{self._decided.rate():.1f} frames/s", values


def _seconds(header: Header) -> float:
    return header.stamp.sec + header.stamp.nanosec * 1e-9


def _key(header: Header) -> tuple[int, int]:
    return header.stamp.sec, header.stamp.nanosec


def main() -> int:
    """Run the node; its exit status."""
    cv2.setNumThreads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    return run(ExplainerNode)
