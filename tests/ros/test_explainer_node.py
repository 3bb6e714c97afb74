"""The node `explainer` alone: a synthetic camera in this process, the node in its own."""

from __future__ import annotations

import array
import signal

import live_support
import numpy as np
import pytest

live_support.workspace()

from builtin_interfaces.msg import Time  # noqa: E402
from carla_digr_msgs.msg import DriveFrame  # noqa: E402
from carla_digr_ros import conversion, topics  # noqa: E402
from rclpy.duration import Duration  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from carla_digr.explainer import Explainer  # noqa: E402
from carla_digr.live.composition import Process  # noqa: E402

ANSWERS = (topics.DECISION.name, topics.SALIENCY.name, topics.OVERLAY.name)


class Camera:
    """Publishes pictures as the bridge does."""

    def __init__(self, observer):
        self.observer = observer
        self.facts = topics.FRAME.publisher(observer.node)
        self.images = topics.IMAGE.publisher(observer.node)
        self.random = np.random.default_rng(0)
        observer.until(lambda: self.images.get_subscription_count() and self.facts.get_subscription_count())

    def number(self, number: int) -> Header:
        header = Header(stamp=Time(sec=number // 20, nanosec=number % 20 * 50_000_000), frame_id="camera")
        self.facts.publish(DriveFrame(header=header, frame=1000 + number))
        return header

    def send(self, number: int, encoding: str = "rgb8", size: int = 128) -> np.ndarray:
        header = self.number(number)
        channels = conversion.ENCODINGS[encoding].channels
        picture = self.random.integers(0, 256, (size, size, channels)).astype(conversion.ENCODINGS[encoding].dtype)
        self.images.publish(conversion.to_message(picture if channels > 1 else picture[..., 0], encoding, header))
        return picture


@pytest.fixture
def explainer(start, weights):
    return start(Process("explainer", parameters={"weights": str(weights)}))


def test_every_frame_is_answered_with_its_own_stamp_and_the_decision_first(explainer, observe, weights):
    observer = observe(*ANSWERS)
    camera = Camera(observer)
    pictures = [camera.send(0)]
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 1)  # all subscriptions are matched
    for number in range(1, 40):
        if number % 8 == 1:  # between two topics there is no order: frame numbers arrive before any picture of theirs
            for ahead in range(number, min(number + 8, 40)):
                camera.number(ahead)
            assert camera.facts.wait_for_all_acked(Duration(seconds=10))
        pictures.append(camera.send(number))
        observer.until(lambda wanted=number + 1: all(len(observer.received[name]) == wanted for name in ANSWERS))
    assert [name for _, name in sorted(observer.sent)] == list(ANSWERS) * 40
    library = Explainer.from_checkpoint(weights)
    for number, picture in enumerate(pictures):
        decision, saliency, overlay = (observer.received[name][number] for name in ANSWERS)
        stamp = Time(sec=number // 20, nanosec=number % 20 * 50_000_000)
        assert decision.header.stamp == saliency.header.stamp == overlay.header.stamp == stamp
        if number:  # of the first frame the number may have come before the explainer's subscription was matched
            assert decision.frame == 1000 + number
        expected = library.decide(picture)
        assert decision.action == expected.action
        np.testing.assert_array_equal(decision.probabilities, expected.probabilities)
        assert decision.policy_hash == library.policy_hash
        assert not decision.fallback
        assert (saliency.encoding, overlay.encoding) == ("32FC1", "rgb8")
        values = conversion.to_array(saliency)
        np.testing.assert_array_equal(values, library.explain(expected).map)
        assert values.min() >= 0.0 and values.max() == 1.0


def test_a_best_effort_subscriber_gets_data_on_every_topic(explainer, observe):
    observer = observe(*ANSWERS, qos=QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
    camera = Camera(observer)
    numbers = iter(range(10_000))

    def send_and_spin():
        camera.send(next(numbers))
        observer.spin()

    live_support.until(lambda: all(observer.received[name] for name in ANSWERS), send_and_spin)


def test_a_foreign_camera_is_taken_by_remapping_as_it_is_offered(start, observe, weights):
    """A topic such as CARLA's native ones or carla/ros-bridge's: best effort, bgra8, padded rows."""
    topic = "/carla/hero/front/image"
    remap = ("--ros-args", "-r", f"{topics.IMAGE.name}:={topic}")
    explainer = start(Process("explainer", arguments=remap, parameters={"weights": str(weights)}))
    observer = observe(*ANSWERS, topics.DIAGNOSTICS.name)
    camera = observer.node.create_publisher(topics.IMAGE.type, topic, qos_profile_sensor_data)
    random = np.random.default_rng(1)
    sent = {}

    def send():
        number = len(sent) + 1
        header = Header(stamp=Time(sec=number // 20, nanosec=number % 20 * 50_000_000), frame_id="camera")
        bgra = random.integers(0, 256, (128, 128, 4), np.uint8)
        message = conversion.to_message(bgra, "bgra8", header)
        rows = np.pad(bgra.reshape(128, -1), ((0, 0), (0, 24)))
        message.step, message.data = rows.shape[1], array.array("B", rows.tobytes())
        sent[header.stamp.sec, header.stamp.nanosec] = bgra[..., 2::-1]
        camera.publish(message)
        observer.spin()

    live_support.until(lambda: bool(observer.received[topics.SALIENCY.name]), send)
    decision = observer.received[topics.DECISION.name][0]
    expected = Explainer.from_checkpoint(weights).decide(sent[decision.header.stamp.sec, decision.header.stamp.nanosec])
    np.testing.assert_array_equal(decision.probabilities, expected.probabilities)
    assert f"Incompatible QoS on {topic} (RELIABILITY)" in explainer.output
    assert "best effort from now on" in explainer.output
    observer.until(lambda: "incompatible QoS" in values(observer))
    assert values(observer)["incompatible QoS"] == f"{topic} (RELIABILITY)"


def test_a_subscriber_whose_qos_does_not_match_is_logged(explainer, observe):
    observe(
        topics.DECISION.name, qos=QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    )  # for late joiners
    live_support.until(lambda: f"Incompatible QoS on {topics.DECISION.name} (DURABILITY)" in explainer.output)


def values(observer) -> dict[str, str]:
    """Of the newest diagnostics."""
    statuses = [status for message in observer.received[topics.DIAGNOSTICS.name] for status in message.status]
    return {v.key: v.value for v in statuses[-1].values} if statuses else {}


@pytest.mark.parametrize("step", [0, -1])
def test_a_repeated_or_late_picture_is_left_out_and_a_jump_of_the_clock_goes_on(explainer, observe, step):
    observer = observe(*ANSWERS, topics.DIAGNOSTICS.name)
    camera = Camera(observer)
    camera.send(100)
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 1)
    camera.send(100 + step)
    observer.until(lambda: values(observer).get("pictures repeated or late") == "1")
    camera.send(3)
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 2)
    stamps = [message.header.stamp for message in observer.received[topics.DECISION.name]]
    assert stamps == [Time(sec=5), Time(nanosec=150_000_000)]
    assert "the clock jumped back" in explainer.output


@pytest.mark.parametrize(
    ("encoding", "size", "sentence"),
    [("32FC1", 128, "image encoding '32FC1'"), ("rgb8", 64, "128 x 128 x 3 (height x width x channels) but got")],
)
def test_a_wrong_picture_is_refused_and_reported_and_the_next_good_one_answered(
    explainer, observe, encoding, size, sentence
):
    observer = observe(*ANSWERS, topics.DIAGNOSTICS.name)
    camera = Camera(observer)

    def reports():
        return [status for message in observer.received[topics.DIAGNOSTICS.name] for status in message.status]

    def errors():
        return [status for status in reports() if status.level == b"\2"]

    live_support.until(lambda: bool(errors()), lambda: (camera.send(1, encoding, size), observer.spin()))
    assert sentence in errors()[0].message
    assert errors()[0].name == "explainer: policy and explanation"
    assert not any(observer.received[name] for name in ANSWERS)

    camera.send(2)
    observer.until(lambda: all(observer.received[name] for name in ANSWERS))
    assert explainer.popen.poll() is None
    seen = len(reports())
    observer.until(lambda: any(status.level != b"\2" for status in reports()[seen:]))
    assert sentence in explainer.output


def test_a_wrong_size_is_resized_where_the_parameter_says_so(start, observe, weights):
    start(Process("explainer", parameters={"weights": str(weights), "wrong_size": "resize"}))
    observer = observe(*ANSWERS)
    Camera(observer).send(1, size=300)
    observer.until(lambda: bool(observer.received[topics.OVERLAY.name]))
    assert observer.received[topics.SALIENCY.name][0].height == 128


def test_a_foreign_policy_drives_by_what_its_card_says_of_its_actions(start, observe, tmp_path):
    path = live_support.make_foreign_weights(tmp_path)
    parameters = {"weights": str(path), "wrong_size": "resize", "method": "linear", "target": "stop", "camera": 128}
    start(Process("explainer", parameters=parameters))
    observer = observe(*ANSWERS)
    camera = Camera(observer)
    pictures = [camera.send(0)]
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 1)
    for number in range(1, 6):
        pictures.append(camera.send(number))
        observer.until(lambda wanted=number + 1: len(observer.received[topics.OVERLAY.name]) == wanted)
    library = Explainer.from_checkpoint(path, method="linear", target="stop", resize=True)
    for number, picture in enumerate(pictures):
        decision, saliency, overlay = (observer.received[name][number] for name in ANSWERS)
        expected = library.decide(picture)
        np.testing.assert_array_equal(decision.probabilities, expected.probabilities)
        np.testing.assert_array_equal(conversion.to_array(saliency), library.explain(expected).map)
        assert (overlay.height, list(decision.action_names)) == (84, ["go", "stop"])
        brakes = decision.action == 1
        assert decision.brake == (0.5 if brakes else 0.0) and np.isnan(decision.target_speed) == brakes


def test_the_target_can_be_changed_while_it_runs(explainer, observe, weights):
    observer = observe(*ANSWERS)
    camera = Camera(observer)
    camera.send(1)
    observer.until(lambda: bool(observer.received[topics.OVERLAY.name]))
    assert observer.set_parameter("explainer", "target", "brake").successful
    refused = observer.set_parameter("explainer", "target", "fly")
    assert not refused.successful and "choose one of left, keep, right, brake" in refused.reason
    picture = camera.send(2)
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 2)
    library = Explainer.from_checkpoint(weights, target="brake")
    expected = library.explain(library.decide(picture)).map
    np.testing.assert_array_equal(conversion.to_array(observer.received[topics.SALIENCY.name][1]), expected)
    first, second = observer.received[topics.DECISION.name]
    assert (first.method, first.target, second.method, second.target) == ("linear", "", "linear", "brake")


def test_a_policy_of_another_size_and_with_unknown_actions_is_refused_at_once(start, tmp_path):
    path = live_support.make_foreign_weights(tmp_path, controls=False)
    explainer = start(Process("explainer", parameters={"weights": str(path), "camera": 128}))
    assert explainer.wait() == 2
    lines = [line for line in explainer.output.splitlines() if line.startswith("carla-digr: ")]
    assert len(lines) == 1 and "Traceback" not in explainer.output
    assert "takes pictures of 84x84 pixels while the camera's have 128x128" in lines[0]
    assert "decides between go, stop while driving needs left, keep, right, brake" in lines[0]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"opacity": 1.5}, "The parameter opacity of the node explainer must lie between 0.0 and 1.0."),
        ({"opacity": "much"}, "The parameter opacity of the node explainer must be float"),
        ({"wrong_size": "guess"}, "must be refuse or resize, not 'guess'"),
    ],
)
def test_bad_parameters_end_in_one_sentence(start, parameters, sentence):
    explainer = start(Process("explainer", parameters=parameters))
    assert explainer.wait() == 2
    lines = [line for line in explainer.output.splitlines() if line.startswith("carla-digr: ")]
    assert len(lines) == 1 and sentence in lines[0]
    assert "Traceback" not in explainer.output


def test_sigterm_ends_it_cleanly(explainer, observe):
    Camera(observe())
    assert explainer.end(signal.SIGTERM) == 0
    assert "Traceback" not in explainer.output
