"""The node `player` in its own process: what was recorded is on the topics again, in order, when it is due."""

from __future__ import annotations

import drive_bags
import live_support
import pytest

live_support.workspace()

from carla_digr_ros import conversion, topics  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402
from test_control import Operator  # noqa: E402

from carla_digr.live import composition  # noqa: E402
from carla_digr.recordings.topics import PICTURE_TYPE  # noqa: E402

pytestmark = pytest.mark.alone

FRAMES = 30
RECORDED = [topics.CLOCK, topics.FRAME, topics.ODOMETRY, topics.IMAGE, topics.DECISION, topics.SALIENCY, topics.OVERLAY]


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    return drive_bags.record(tmp_path_factory.mktemp("bags") / "drive", FRAMES)


@pytest.fixture
def play(start, observe, bag):
    """Starts the player of the composition for some values of its arguments; the observer hears all of it."""

    def begin(observer=None, path=bag, started=lambda process: None, **values):
        observer = observer or observe(*(topic.name for topic in topics.TOPICS), qos=QoSProfile(depth=1000))
        arguments = {a.name: a.default for a in composition.REPLAY_ARGUMENTS}
        arguments |= {"bag": str(path), "viewer": "false", **values}
        *others, player = composition.replay(arguments)
        player.parameters["listeners"] += ["observer"]
        for process in others:
            started(start(process))
        return start(player), observer

    return begin


def numbers(observer, topic=topics.FRAME) -> list[int]:
    return [message.frame for message in observer.received[topic.name]]


def clock(observer) -> list[float]:
    return [m.clock.sec + m.clock.nanosec * 1e-9 for m in observer.received[topics.CLOCK.name]]


def call(observer, kind, name, **fields):
    client = observer.node.create_client(kind, name)
    observer.until(client.service_is_ready)
    answer = client.call_async(kind.Request(**fields))
    observer.until(answer.done)
    return answer.result()


def test_every_message_comes_again_with_its_content_and_then_the_player_ends(play, bag):
    player, observer = play(rate="5.0")
    observer.until(lambda: player.popen.poll() is not None)
    assert player.wait() == 0, player.output
    for topic in RECORDED:
        observer.until(lambda topic=topic: len(observer.received[topic.name]) >= FRAMES)
        assert len(observer.received[topic.name]) == FRAMES, topic.name
    assert numbers(observer) == numbers(observer, topics.DECISION) == list(range(1, FRAMES + 1))
    assert clock(observer) == pytest.approx([0.05 * number for number in range(1, FRAMES + 1)])
    for message, number in zip(observer.received[topics.IMAGE.name], range(1, FRAMES + 1), strict=True):
        assert (conversion.to_rgb(message) == drive_bags.picture(number)).all()
    # 1.45 s of drive at five times its speed: the transport's own times of sending, so no wait of ours is in it.
    sent = [time for time, name in observer.sent if name == topics.CLOCK.name]
    assert (sent[-1] - sent[0]) * 1e-9 >= 0.95 * 1.45 / 5


def test_start_duration_and_loop_choose_the_part(play):
    player, observer = play(start="0.5", duration="0.25", loop="true", rate="5.0")
    observer.until(lambda: len(numbers(observer)) >= 15)
    assert numbers(observer)[:15] == [11, 12, 13, 14, 15] * 3
    assert player.end() == 0, player.output


def test_pause_and_step_hold_the_drive(play):
    player, observer = play(paused="true", rate="5.0")
    assert call(observer, Trigger, "/player/step").success
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 1)
    call(observer, Trigger, "/player/step")
    call(observer, Trigger, "/player/step")
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) == 3)
    assert numbers(observer) == [1, 2, 3]
    assert call(observer, SetBool, "/player/pause", data=False).message == "going on"
    observer.until(lambda: len(numbers(observer)) >= 6)
    call(observer, SetBool, "/player/pause", data=True)
    observer.until(
        lambda: any("paused" in s.message for m in observer.received[topics.DIAGNOSTICS.name] for s in m.status)
    )
    assert numbers(observer) == list(range(1, len(numbers(observer)) + 1))
    assert player.end() == 0, player.output


def test_the_page_of_a_replay_holds_steps_and_hastens_it_and_drives_nothing(play, observe):
    observer = observe(*(topic.name for topic in topics.TOPICS), qos=QoSProfile(depth=1000))
    viewers = []
    player, _ = play(
        observer,
        paused="true",
        loop="true",
        viewer="true",
        viewer_port=str(live_support.free_port()),
        started=viewers.append,
    )
    page = Operator(viewers[0])
    try:

        def answer(*words):
            number = page.say(*words)
            observer.until(lambda: number in page.answers)
            return page.answers[number]

        observer.until(lambda: page.state.get("paused") and page.setting("rate") == "1")
        assert page.state["replay"] and page.state["policies"] == []
        assert answer("step")["ok"]
        observer.until(lambda: numbers(observer) == [1])
        assert answer("set", "rate", "4")["ok"]
        observer.until(lambda: page.setting("rate") == "4")
        assert answer("resume")["said"] == "going on"
        observer.until(lambda: len(numbers(observer)) >= 5 and not page.state["paused"])
        assert answer("pause")["ok"]
        observer.until(lambda: page.state["paused"])
        for words in (("reset",), ("drive", "0", "0", "1"), ("policy", "driving_student"), ("record", "on")):
            assert "here is no drive" in answer(*words)["said"], words
        assert "no vehicles to set" in answer("set", "vehicles", "3")["said"]
    finally:
        page.close()
    assert player.end() == 0, player.output


def test_remapped_topics_and_pictures_of_another_camera(play, observe, tmp_path):
    """A recording without /clock by somebody else; its clock is made from the messages' times."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    kind = PICTURE_TYPE
    with Writer(tmp_path / "foreign", version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        camera = writer.add_connection("/front/image_raw", kind, typestore=drive_bags.STORE)
        other = writer.add_connection("/other", "x_msgs/msg/X", msgdef="uint8 x\n", rihs01="RIHS01_" + 64 * "0")
        for number in range(1, 11):
            message = drive_bags.image(number * 10**8, drive_bags.picture(number, 16), "rgb8")
            writer.write(camera, number * 10**8, drive_bags.serialized(kind, message))
            writer.write(other, number * 10**8, b"\0\1\0\0\7")
    observer = observe(topics.IMAGE.name, topics.CLOCK.name, qos=QoSProfile(depth=1000))
    remap = f"/front/image_raw:={topics.IMAGE.name}"
    player, _ = play(observer, tmp_path / "foreign", remap=remap)
    observer.until(lambda: player.popen.poll() is not None)
    assert player.wait() == 0, player.output
    assert "Not replayed: /other: the type x_msgs/msg/X is not installed." in player.output
    pictures: list[Image] = observer.received[topics.IMAGE.name]
    assert [round(p.header.stamp.sec * 10 + p.header.stamp.nanosec * 1e-8) for p in pictures] == list(range(1, 11))
    ticks = clock(observer)
    assert ticks == sorted(ticks) and ticks[-1] == pytest.approx(1.0)
    assert len(ticks) > 20  # between the pictures too


def test_compressed_pictures_are_the_drives_after_crop_and_gap_and_static_frames_come_with_any_start(
    play, observe, tmp_path
):
    """Another recorder's: JPEG or PNG without stamps, one damaged, decades between two of them, a latched transform."""
    import cv2
    from carla_digr_ros.conversion import camera_transforms
    from mcap_ros2.writer import Writer
    from rclpy.serialization import serialize_message
    from rosbags.rosbag2 import StoragePlugin
    from rosbags.rosbag2 import Writer as BagWriter

    from carla_digr.recordings.bag import offered_qos

    kind = "sensor_msgs/msg/CompressedImage"
    times = [1, 2, 3, 1_700_000_000, 1_700_000_001]
    with (tmp_path / "foreign.mcap").open("wb") as file:
        writer = Writer(file)
        schema = writer.register_msgdef(kind, drive_bags.definition(drive_bags.STORE, kind))
        for number, time in enumerate(times):
            data = cv2.imencode(".png", drive_bags.picture(number, 32)[..., ::-1])[1].tobytes()
            message = {"format": "png", "data": data if number != 1 else data[:60]}
            writer.write_message("/cam/compressed", schema, message, time * 10**9, time * 10**9)
        writer.finish()
    observer = observe(topics.IMAGE.name, qos=QoSProfile(depth=100))
    player, _ = play(observer, tmp_path / "foreign.mcap", camera="/cam/compressed", crop="4,8,16,20", rate="10.0")
    observer.until(lambda: player.popen.poll() is not None)
    assert player.wait() == 0, player.output
    pictures = observer.received[topics.IMAGE.name]
    assert [picture.header.stamp.sec for picture in pictures] == [1, 3, *times[3:]]
    for picture, number in zip(pictures, (0, 2, 3, 4), strict=True):
        assert (conversion.to_rgb(picture) == drive_bags.picture(number, 32)[8:28, 4:20]).all()
    assert "Left out a picture on /cam/compressed" in player.output and "going on after the gap" in player.output

    static = topics.TF_STATIC
    with BagWriter(tmp_path / "framed", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        latched = writer.add_connection(
            static.name, static.type_name, typestore=drive_bags.STORE, offered_qos_profiles=offered_qos(latched=True)
        )
        camera = writer.add_connection(topics.IMAGE.name, PICTURE_TYPE, typestore=drive_bags.STORE)
        writer.write(latched, 10**9, serialize_message(camera_transforms()))
        for number in range(1, 6):
            message = drive_bags.image(number * 10**9, drive_bags.picture(number, 16), "rgb8")
            writer.write(camera, number * 10**9, drive_bags.serialized(PICTURE_TYPE, message))
    observer = observe(topics.IMAGE.name)
    framed = observe()
    late = []
    framed.node.create_subscription(static.type, static.name, late.append, static.qos)
    player, _ = play(observer, tmp_path / "framed", start="2.5", rate="10.0")
    framed.until(lambda: player.popen.poll() is not None)
    assert player.wait() == 0, player.output
    framed.until(lambda: bool(late))
    assert late == [camera_transforms()]


def test_pictures_are_explained_anew(play, weights):
    player, observer = play(method="gradcam", weights=str(weights))
    observer.until(lambda: player.popen.poll() is not None)
    assert player.wait() == 0, player.output
    observer.until(lambda: len(observer.received[topics.OVERLAY.name]) >= FRAMES)
    from carla_digr.explainer import Explainer

    explainer = Explainer.from_checkpoint(weights, method="gradcam")
    assert {m.policy_hash for m in observer.received[topics.DECISION.name]} == {explainer.policy_hash}
    assert numbers(observer, topics.DECISION) == list(range(1, FRAMES + 1))
    expected = explainer.explain(explainer.decide(drive_bags.picture(7))).map
    assert abs(conversion.to_array(observer.received[topics.SALIENCY.name][6]) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"bag": "/nowhere"}, "There is no recording /nowhere"),
        ({"start": "2.0"}, "is 1.5 s long and cannot start at 2 s"),
    ],
    ids=["missing", "too short"],
)
def test_what_cannot_be_replayed_is_one_sentence(values, sentence, start, bag):
    arguments = {a.name: a.default for a in composition.REPLAY_ARGUMENTS}
    player = composition.replay(arguments | {"bag": str(bag), "viewer": "false", **values})[-1]
    running = start(player)
    assert running.wait() == 2
    (line,) = (line for line in running.output.splitlines() if line.startswith("carla-digr: "))
    assert sentence in line
    assert "Traceback" not in running.output
