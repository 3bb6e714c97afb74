"""Bags of other people, written by other writers: any camera topic is explained, shown and told about."""

from __future__ import annotations

import re
from contextlib import closing
from types import SimpleNamespace

import cv2
import drive_bags
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from mcap.writer import Writer as McapWriter
from mcap_ros2.writer import Writer as RosWriter
from rosbags import rosbag1
from rosbags.typesys import Stores, get_typestore

from carla_digr.cli import main as command
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.images import Crop, to_array, to_rgb
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.recordings import topics
from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.drive import COMPRESSED_IMAGE, Decoder, read_drive, stamp_of

SECOND = 10**9
CAMERA = "/front/image_raw/compressed"
STORE = drive_bags.STORE
DEFINITIONS = {
    kind: STORE.generate_msgdef(kind, ros_version=2)[0]
    for kind in (topics.PICTURE_TYPE, topics.COMPRESSED_TYPE, topics.TYPES[topics.ODOMETRY])
}


def header(stamp: int) -> dict:
    return {"stamp": {"sec": stamp // SECOND, "nanosec": stamp % SECOND}, "frame_id": "front"}


def smooth(number: int, size: int = 128) -> np.ndarray:
    """A picture that JPEG keeps well."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def jpeg(picture: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), 95)


def png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


class Foreign:
    """An MCAP file by mcap-ros2-support, which serialises by itself."""

    def __init__(self, path):
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("wb")
        self._writer = RosWriter(self._file)
        self._schemas = {kind: self._writer.register_msgdef(kind, text) for kind, text in DEFINITIONS.items()}

    def compressed(self, time: int, data: bytes, stamp: int | None = None) -> None:
        message = {"header": header(time if stamp is None else stamp), "format": "jpeg", "data": data}
        self._writer.write_message(CAMERA, self._schemas[topics.COMPRESSED_TYPE], message, time, time)

    def motion(self, time: int, speed: float) -> None:
        twist = {"twist": {"linear": {"x": speed}}, "covariance": [0.0] * 36}
        message = {"header": header(time), "pose": {"covariance": [0.0] * 36}, "twist": twist}
        self._writer.write_message("/odom", self._schemas[topics.TYPES[topics.ODOMETRY]], message, time, time)

    def close(self) -> None:
        self._writer.finish()
        self._file.close()


def explained(path, out, *arguments: str, weights) -> None:
    arguments = ("--weights", str(weights), "--method", "vg", *arguments)
    assert command(["explain", str(path), "--out", str(out), *arguments]) == 0


def decoded(path, topic):
    decode = Decoder()
    with open_bag(path) as opened:
        return [decode(channel, data) for channel, _, data in opened.read(wanted=lambda c: c.topic == topic)]


def test_compressed_pictures_are_explained_and_shown_and_the_copy_knows_its_camera(tmp_path, weights, capsys):
    bag = Foreign(tmp_path / "bag.mcap")
    pictures = [smooth(number) for number in range(6)]
    for number, picture in enumerate(pictures, 1):
        bag.motion(number * SECOND // 20 - 7_000_000, float(number))
        bag.compressed(number * SECOND // 20, jpeg(picture) if number % 2 else png(picture))
    bag.compressed(7 * SECOND // 20, jpeg(pictures[0])[:200])  # cut off
    bag.compressed(8 * SECOND // 20, b"GIF89a")
    bag.close()
    out = tmp_path / "out"
    explained(tmp_path / "bag.mcap", out, "--camera", CAMERA, "--odometry", "/odom", weights=weights)
    said = capsys.readouterr().out
    assert "6 frames explained" in said and "2 pictures were refused, so 75 % are explained (" in said
    assert "the file is no PNG or JPEG picture" in said
    explainer = Explainer.from_checkpoint(weights, method="vg")
    seen = [to_rgb(message) for message in decoded(out, COMPRESSED_IMAGE)[:6]]
    for shown, picture in zip(seen[1::2], pictures[1::2], strict=True):
        np.testing.assert_array_equal(shown, picture)
    for shown, picture in zip(seen, pictures, strict=True):
        assert abs(shown.astype(int) - picture).mean() < 3
    for picture, made in zip(seen, decoded(out, topics.SALIENCY), strict=True):
        np.testing.assert_array_equal(to_array(made), explainer.explain(explainer.decide(picture)).map)
    with closing(Recorded([out])) as recorded:
        rows = recorded.description()["frames"]
        assert [row["explained"] for row in rows] == [[True]] * 6 + [[False]] * 2
        assert recorded.message(0, 1)
    with open_bag(out) as opened:
        assert topics.ODOMETRY in {channel.topic for channel in opened.channels}
    with closing(Recorded([tmp_path / "bag.mcap"], CAMERA, "/odom")) as recorded:
        motions = [frame.odometry.twist.twist.linear.x for frame in recorded.sides[0].drive.frames]
        assert motions == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0, 6.0]


@pytest.mark.parametrize("stamp", [0, 5 * SECOND])
def test_pictures_without_stamps_have_the_bags_times(tmp_path, weights, capsys, stamp):
    bag = Foreign(tmp_path / "bag.mcap")
    for number in range(1, 9):
        bag.compressed(number * SECOND // 10, png(smooth(number)), stamp)
    bag.close()
    out = tmp_path / "out"
    explained(tmp_path / "bag.mcap", out, "--camera", CAMERA, weights=weights)
    said = capsys.readouterr().out
    assert "8 frames explained" in said and "the recording's own times are taken" in said
    times = [number * SECOND // 10 for number in range(1, 9)]
    with open_bag(out) as opened:
        drive = read_drive(opened)
        stamps = {topic: [] for topic in (topics.SALIENCY, COMPRESSED_IMAGE, topics.DECISION)}
        for channel, _, data in opened.read(wanted=lambda channel: channel.topic in stamps):
            stamps[channel.topic].append(stamp_of(data))
    assert all(found == times for found in stamps.values())
    assert [frame.stamp for frame in drive.frames] == times and all(frame.saliency for frame in drive.frames)


def test_decades_without_a_message_are_a_second_on_the_page(tmp_path):
    bag = Foreign(tmp_path / "bag.mcap")
    for time in (SECOND, 2 * SECOND, 1_700_000_000 * SECOND, 1_700_000_001 * SECOND):
        bag.compressed(time, png(smooth(1)))
    bag.close()
    with closing(Recorded([tmp_path / "bag.mcap"], CAMERA)) as recorded:
        assert [row["time"] for row in recorded.description()["frames"]] == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_several_files_without_metadata_are_one_recording(tmp_path, weights, capsys):
    for part in range(3):
        bag = Foreign(tmp_path / "bag" / f"bag_{part}.mcap")
        for number in range(3):
            bag.compressed((3 * part + number + 1) * SECOND, png(smooth(3 * part + number)))
        bag.close()
    explained(tmp_path / "bag", tmp_path / "out", "--camera", CAMERA, weights=weights)
    assert "9 frames explained" in capsys.readouterr().out
    shown = [to_rgb(message) for message in decoded(tmp_path / "out", COMPRESSED_IMAGE)]
    for number, picture in enumerate(shown):
        np.testing.assert_array_equal(picture, smooth(number))


IDL = """module builtin_interfaces { module msg { struct Time { int32 sec; uint32 nanosec; }; }; };
module std_msgs { module msg { struct Header { builtin_interfaces::msg::Time stamp; string frame_id; }; }; };
module sensor_msgs { module msg { struct CompressedImage {
  std_msgs::msg::Header header; string format; sequence<uint8> data; }; }; };
"""
PARTS = IDL.splitlines()
JOINED = "".join(
    f"{'=' * 80}\nIDL: {name}\n{text}\n"
    for name, text in (
        (topics.COMPRESSED_TYPE, "\n".join(PARTS[2:])),
        ("std_msgs/msg/Header", PARTS[1]),
        ("builtin_interfaces/msg/Time", PARTS[0]),
    )
)


@pytest.mark.parametrize("text", [IDL, JOINED], ids=["plain", "joined"])
def test_types_may_be_given_as_idl(tmp_path, weights, capsys, text):
    with (tmp_path / "bag.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start(profile="ros2")
        schema = writer.register_schema(topics.COMPRESSED_TYPE, "ros2idl", text.encode())
        channel = writer.register_channel(CAMERA, "cdr", schema)
        for number in range(1, 4):
            message = drive_bags.blank(
                STORE,
                topics.COMPRESSED_TYPE,
                header=drive_bags.header(number * SECOND),
                data=np.frombuffer(png(smooth(number)), np.uint8),
            )
            data = drive_bags.serialized(topics.COMPRESSED_TYPE, message)
            writer.add_message(channel, number * SECOND, data, number * SECOND)
        writer.finish()
    explained(tmp_path / "bag.mcap", tmp_path / "out", "--camera", CAMERA, weights=weights)
    assert "3 frames explained" in capsys.readouterr().out


def test_a_ros_1_bag_is_explained(tmp_path, weights, capsys):
    store = get_typestore(Stores.ROS1_NOETIC)
    types = store.types
    with rosbag1.Writer(tmp_path / "old.bag") as writer:
        camera = writer.add_connection("/cam", topics.PICTURE_TYPE, typestore=store)
        odometry = writer.add_connection("/odom", "nav_msgs/msg/Odometry", typestore=store)
        for number in range(1, 5):
            stamp = types["builtin_interfaces/msg/Time"](sec=number, nanosec=0)
            first = types["std_msgs/msg/Header"](seq=number, stamp=stamp, frame_id="cam")
            picture = smooth(number)
            message = types[topics.PICTURE_TYPE](first, 128, 128, "bgr8", 0, 384, picture[..., ::-1].ravel())
            writer.write(camera, number * SECOND, store.serialize_ros1(message, topics.PICTURE_TYPE))
            motion = drive_bags.blank(STORE, "nav_msgs/msg/Odometry")
            motion.header = first
            motion.twist.twist.linear.x = float(number)
            writer.write(odometry, number * SECOND, store.serialize_ros1(motion, "nav_msgs/msg/Odometry"))
    out = tmp_path / "out"
    explained(tmp_path / "old.bag", out, "--camera", "/cam", "--odometry", "/odom", weights=weights)
    assert "4 frames explained" in capsys.readouterr().out
    with open_bag(out) as opened:
        frames = read_drive(opened).frames
    assert [frame.odometry.twist.twist.linear.x for frame in frames] == [1.0, 2.0, 3.0, 4.0]
    for number, message in enumerate(decoded(out, topics.IMAGE), 1):
        np.testing.assert_array_equal(to_rgb(message), smooth(number))
        assert (message.header.stamp.sec, message.header.frame_id) == (number, "cam")
    (tmp_path / "old.bag").write_bytes((tmp_path / "old.bag").read_bytes()[:-500])
    assert command(["view", str(tmp_path / "old.bag")]) == 2
    assert re.search("unfinished or damaged: .*rosbag reindex", capsys.readouterr().err)


def test_damaged_chunks_of_a_ros_1_bag_are_left_out(tmp_path, weights, capsys):
    store, path = get_typestore(Stores.ROS1_NOETIC), tmp_path / "old.bag"
    writer = rosbag1.Writer(path)
    writer.set_compression(rosbag1.Writer.CompressionFormat.BZ2)
    with writer:
        writer.chunk_threshold = 40_000  # a picture a chunk
        camera = writer.add_connection("/cam", topics.PICTURE_TYPE, typestore=store)
        for number in range(1, 7):
            stamp = store.types["builtin_interfaces/msg/Time"](sec=number, nanosec=0)
            first = store.types["std_msgs/msg/Header"](seq=number, stamp=stamp, frame_id="cam")
            noise = np.random.default_rng(number).integers(256, size=128 * 128 * 3).astype(np.uint8)
            message = store.types[topics.PICTURE_TYPE](first, 128, 128, "rgb8", 0, 384, noise)
            writer.write(camera, number * SECOND, store.serialize_ros1(message, topics.PICTURE_TYPE))
    content = bytearray(path.read_bytes())
    for place in (len(content) // 6, len(content) // 2):  # in the first chunk, and in the third or fourth
        content[place : place + 400] = bytes(400)
    path.write_bytes(content)
    explained(path, tmp_path / "out", "--camera", "/cam", weights=weights)
    said = capsys.readouterr()
    assert "4 frames explained" in said.out and "2 damaged chunks are left out" in said.out + said.err


def test_a_crop_is_explained_and_shown(tmp_path, weights, capsys):
    bag = Foreign(tmp_path / "bag.mcap")
    bag.compressed(SECOND, png(smooth(1, 300)))
    bag.close()
    out = tmp_path / "out"
    explained(tmp_path / "bag.mcap", out, "--camera", CAMERA, "--crop", "40,10,128,128", weights=weights)
    part = smooth(1, 300)[10:138, 40:168]
    explainer = Explainer.from_checkpoint(weights, method="vg")
    (made,) = decoded(out, topics.SALIENCY)
    np.testing.assert_array_equal(to_array(made), explainer.explain(explainer.decide(part)).map)
    with closing(Recorded([out])) as recorded:
        recorded.message(0, 0)
        shown, saliency, _ = recorded.sides[0]._kept[0]
        np.testing.assert_array_equal(shown, part)
        assert saliency is not None
    with pytest.raises(UserError, match=r"maps in .* are of the crop 40,10,128,128, not of the crop 0,0,9,9: explain"):
        Recorded([out], crop=Crop(0, 0, 9, 9))
    with closing(Recorded([tmp_path / "bag.mcap"], CAMERA, crop=Crop(40, 10, 128, 128))) as recorded:
        recorded.message(0, 0)
        np.testing.assert_array_equal(recorded.sides[0]._kept[0][0], part)
    for crop, sentence in [("1,2,3", "A crop is x,y,w,h"), ("0,0,0,5", "A crop is"), ("200,0,128,128", "has no crop")]:
        arguments = [str(tmp_path / "bag.mcap"), "--out", str(tmp_path / "none"), "--camera", CAMERA, "--crop", crop]
        assert command(["explain", *arguments, "--weights", str(weights)]) == 2
        assert sentence in capsys.readouterr().err


def test_a_map_of_another_size_is_stretched_over_its_picture_or_refused(tmp_path, weights):
    bag = Foreign(tmp_path / "bag.mcap")
    bag.compressed(SECOND, png(smooth(1, 300)))
    bag.close()
    arguments = ("--camera", CAMERA, "--wrong-size", "resize")
    explained(tmp_path / "bag.mcap", tmp_path / "out", *arguments, weights=weights)
    with closing(Recorded([tmp_path / "out"])) as recorded:
        recorded.message(0, 0)
        picture, saliency, _ = recorded.sides[0]._kept[0]
        assert (picture.shape, saliency.shape) == ((300, 300, 3), (128, 128))
    sentence = "frame 0 in out has 300x300 pixels, its map 128x128; --wrong-size resize stretches it"
    with (
        closing(Recorded([tmp_path / "out"], wrong_size="refuse")) as recorded,
        pytest.raises(UserError, match=sentence),
    ):
        recorded.message(0, 0)


def message(encoding: str, data: np.ndarray, width: int, height: int):
    flat = np.ascontiguousarray(data).view(np.uint8).ravel()
    return SimpleNamespace(
        encoding=encoding, width=width, height=height, step=len(flat) // height, is_bigendian=0, data=flat.tobytes()
    )


@given(st.integers(0, 2**32 - 1))
def test_encodings_become_rgb_by_cv_bridges_rules(seed):
    random = np.random.default_rng(seed)
    grey = random.integers(0, 256, (6, 8), np.uint8)
    for encoding in ("mono8", "8UC1"):
        np.testing.assert_array_equal(to_rgb(message(encoding, grey, 8, 6)), np.repeat(grey[..., None], 3, 2))
    colour = random.integers(0, 256, (6, 8, 4), np.uint8)
    np.testing.assert_array_equal(to_rgb(message("8UC4", colour, 8, 6)), colour[..., 2::-1])
    np.testing.assert_array_equal(to_rgb(message("8UC3", colour[..., :3], 8, 6)), colour[..., 2::-1])
    deep = random.integers(0, 65536, (6, 8, 3), np.uint16)
    scaled = np.rint(deep / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(to_rgb(message("rgb16", deep, 8, 6)), scaled)
    np.testing.assert_array_equal(to_rgb(message("bgr16", deep, 8, 6)), scaled[..., ::-1])
    for encoding in ("mono16", "16UC1"):
        shown = to_rgb(message(encoding, deep[..., 0], 8, 6))
        np.testing.assert_array_equal(shown, np.repeat(scaled[..., :1], 3, 2))
    with pytest.raises(ValueError, match="'32FC1' is not one of"):
        to_rgb(message("32FC1", deep[..., 0].astype(np.float32), 8, 6))


@pytest.mark.parametrize("order", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_bayer_pattern_of_one_colour_is_that_colour(order, depth):
    colour = {"r": 200, "g": 100, "b": 30}
    unit = 1 if depth == 8 else 257
    pattern = np.array([[colour[order[0]], colour[order[1]]], [colour[order[2]], colour[order[3]]]]) * unit
    data = np.tile(pattern, (8, 8)).astype(np.uint8 if depth == 8 else np.uint16)
    np.testing.assert_array_equal(
        to_rgb(message(f"bayer_{order}{depth}", data, 16, 16))[4:-4, 4:-4].reshape(-1, 3).mean(0), [200, 100, 30]
    )


@pytest.mark.parametrize("encoding", ["uyvy", "yuv422", "yuyv", "yuv422_yuy2"])
def test_yuv_is_that_of_bt_601(encoding):
    y, u, v = 120, 90, 200
    order = [u, y, v, y] if encoding in ("uyvy", "yuv422") else [y, u, y, v]
    shown = to_rgb(message(encoding, np.tile(np.array(order, np.uint8), (4, 4)), 8, 4))
    luma = 1.164 * (y - 16)
    expected = [luma + 1.596 * (v - 128), luma - 0.813 * (v - 128) - 0.391 * (u - 128), luma + 2.018 * (u - 128)]
    assert np.abs(shown.reshape(-1, 3) - np.clip(expected, 0, 255)).max() <= 2


def test_crops_are_told_apart_from_nonsense():
    assert Crop.parse("") is None
    assert Crop.parse(" 1, 2,3,4") == (1, 2, 3, 4)
