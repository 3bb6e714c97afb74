"""Recordings by an adversary: each command ends soon, in little memory, with a sentence or with what is whole."""

from __future__ import annotations

import os
import re
import sqlite3
import struct
from contextlib import closing
from itertools import pairwise

import crafted_bags
import cv2
import drive_bags
import numpy as np
import pytest
from crafted_bags import U32, File, zeros
from measured import Commands
from rosbags import rosbag1
from rosbags.typesys import Stores, get_typestore

from carla_digr.cli import main as command
from carla_digr.errors import UserError
from carla_digr.recordings import topics
from carla_digr.recordings.bag import open_bag
from carla_digr.recordings.drive import COMPRESSED_IMAGE, read_drive

SECOND = 10**9
MEGABYTES, SECONDS = 1000, 20  # what a command may take for any of them


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("said"))
    yield commands
    commands.close()


def picture(stamp: int, width: int = 128, height: int = 128, encoding: str = "rgb8", data: int | None = None) -> bytes:
    """An image of zeros that says it is of a size; the data fit by themselves."""
    channels = {"rgb8": 3, "mono8": 1, "mono16": 2, "32FC1": 4, "rgb16": 6}[encoding]
    step = width * channels
    content = np.zeros(step * height if data is None else data, np.uint8)
    fields = {"height": height, "width": width, "encoding": encoding, "step": step, "data": content}
    image = drive_bags.blank(drive_bags.STORE, topics.PICTURE_TYPE, header=drive_bags.header(stamp), **fields)
    return drive_bags.serialized(topics.PICTURE_TYPE, image)


def of_pictures(*pictures: bytes, **fields) -> File:
    file = File(**fields)
    for number, data in enumerate(pictures, 1):
        file.add_messages([(1, number * SECOND, data)])
    return file


GOOD = picture(SECOND)


def zstd_bomb(size: int) -> File:
    file = of_pictures(GOOD)
    file.add(crafted_bags.chunk(b"", 1, 2, size, zeros(size)), 1, 2 * SECOND, size)
    return file


def lying_size(size: int) -> File:
    file = of_pictures(GOOD)
    file.add(crafted_bags.chunk(b"", 1, 2, 1000, zeros(size)), 1, 2 * SECOND, 1000)
    return file


def duplicate_indexes(count: int) -> File:
    file = File()
    content = crafted_bags.message(1, SECOND, GOOD) * 20
    file.add(crafted_bags.chunk(content, SECOND, SECOND), SECOND, SECOND, len(content), count)
    return file


def tiny_records(count: int) -> File:
    file = of_pictures(GOOD)
    content = crafted_bags.record(99, b"") * count
    file.add(crafted_bags.chunk(content, 1, 2 * SECOND), 1, 2 * SECOND, len(content))
    return file


def tiny_messages(count: int) -> File:
    """Many of the smallest decisions there can be."""
    kind = topics.DECISION_TYPE
    file = File(types={topics.IMAGE: topics.PICTURE_TYPE, topics.DECISION: kind})
    file.add_messages([(1, SECOND, GOOD)])
    data = drive_bags.serialized(kind, drive_bags.blank(drive_bags.STORE, kind))
    file.add_messages([(2, time, data) for time in range(SECOND, SECOND + count)])
    return file


def with_definition(text: str) -> File:
    file = File(types={topics.IMAGE: topics.PICTURE_TYPE, topics.DECISION: topics.DECISION_TYPE})
    file.definitions[topics.DECISION] = text
    file.add_messages([(1, SECOND, GOOD), (2, SECOND, bytes(400))])
    return file


def long_decisions(count: int) -> File:
    """Decisions among 8,000 actions, each with its picture."""
    kind = topics.DECISION_TYPE
    file = File(types={topics.IMAGE: topics.PICTURE_TYPE, topics.DECISION: kind})
    names = [chr(97 + number % 26) for number in range(8000)]
    for number in range(1, count + 1):
        stamp = drive_bags.header(number * SECOND)
        decision = drive_bags.blank(drive_bags.STORE, kind, header=stamp, action_names=names)
        data = drive_bags.serialized(kind, decision)
        file.add_messages([(1, number * SECOND, picture(number * SECOND, 1, 1)), (2, number * SECOND, data)])
    return file


def png_pictures(count: int) -> File:
    """Compressed pictures of 33 million pixels of 16 bits, each 100 kB."""
    ok, png = cv2.imencode(".png", np.zeros((5792, 5792), np.uint16))
    assert ok
    file = File(types={COMPRESSED_IMAGE: topics.COMPRESSED_TYPE})
    for number in range(1, count + 1):
        fields = {"header": drive_bags.header(number * SECOND), "data": png.ravel()}
        image = drive_bags.blank(drive_bags.STORE, topics.COMPRESSED_TYPE, **fields)
        file.add_messages([(1, number * SECOND, drive_bags.serialized(topics.COMPRESSED_TYPE, image))])
    return file


def separated(*types: str) -> str:
    return ("=" * 80 + "\n").join(types)


def of_decision(data: bytes) -> File:
    file = File(types={topics.IMAGE: topics.PICTURE_TYPE, topics.DECISION: topics.DECISION_TYPE})
    file.add_messages([(1, SECOND, GOOD), (2, SECOND, data)])
    return file


def of_facts(text: str) -> File:
    file = File(types={topics.FACTS_TOPIC: topics.TYPES[topics.FACTS_TOPIC], topics.IMAGE: topics.PICTURE_TYPE})
    message = drive_bags.STORE.types["std_msgs/msg/String"](text)
    file.add_messages([(1, 1, drive_bags.serialized("std_msgs/msg/String", message)), (2, SECOND, GOOD)])
    return file


def of_map(data: bytes) -> File:
    file = File(types={topics.IMAGE: topics.PICTURE_TYPE, topics.SALIENCY: topics.PICTURE_TYPE})
    file.add_messages([(1, SECOND, GOOD), (2, SECOND, data)])
    return file


NAMES = struct.pack("<4x8xI", 0)  # a header without stamp and frame
MANY_NAMES = b"\0\1\0\0" + bytes(8) + U32(1) + bytes(4) + bytes(8) + U32(2**32 - 1)
# name: (the file, what is read of it by view and explain: True; it is refused: False; either: None)
FILES = {
    "a chunk of 3 GiB": (lambda: zstd_bomb(3 << 30), False),
    "a chunk that lies about its size": (lambda: lying_size(1 << 30), True),
    "chunks of 60 MiB at one time": (lambda: at_one_time(60 << 20, 20), False),
    "chunks of 60 MiB one after the other": (lambda: at_one_time(60 << 20, 20, apart=True), False),
    "a chunk that the index names 100,000 times": (lambda: duplicate_indexes(100_000), False),
    "six million records of nothing": (lambda: tiny_records(6_000_000), False),
    "240,000 small decisions": (lambda: tiny_messages(240_000), None),
    "an array of 100,000 types": (
        lambda: with_definition(separated("A[100000] a\n", "MSG: carla_digr_msgs/A\nstring b\n")),
        True,
    ),
    "arrays in arrays": (
        lambda: with_definition(
            separated("A0[900] a\n", *(f"MSG: carla_digr_msgs/A{n}\nA{n + 1}[900] a\n" for n in range(20)))
        ),
        True,
    ),
    "200,000 fields": (lambda: with_definition("".join(f"uint8 a{n}\n" for n in range(200_000))), True),
    "2,400 fields": (lambda: with_definition("".join(f"uint8 a{n}\n" for n in range(2400))), True),
    "a type in itself": (lambda: with_definition("DrivingDecision a\n"), True),
    "a decision of texts": (lambda: with_definition("string action\nstring[] probabilities\nbool fallback\n"), True),
    "a decision without fields": (lambda: with_definition("uint8 nothing\n"), True),
    "IDL in brackets": (
        lambda: with_definition("module a { module msg { const long B = " + "(" * 9 + "1" + ")" * 9 + "; }; };"),
        True,
    ),
    "a shift by 4 billion": (
        lambda: with_definition("module a { module msg { const long B = 1 << 4000000000; }; };"),
        True,
    ),
    "no name of a type": (lambda: File(types={topics.IMAGE: topics.PICTURE_TYPE, "/x": "nonsense"}), True),
    "a type that nobody knows": (lambda: File(types={topics.IMAGE: topics.PICTURE_TYPE, "/x": "a_msgs/msg/B"}), True),
    "names of 4 billion": (lambda: of_decision(MANY_NAMES), True),
    "a short message": (lambda: of_decision(b"\0\1\0\0abc"), True),
    "an empty message": (lambda: of_decision(b""), True),
    "a picture of 0 x 0": (lambda: of_pictures(GOOD, picture(2 * SECOND, 0, 0)), True),
    "a picture of 1,000,000 x 1": (lambda: of_pictures(GOOD, picture(2 * SECOND, 1_000_000, 1)), True),
    "a picture of 1 x 1,000,000": (lambda: of_pictures(GOOD, picture(2 * SECOND, 1, 1_000_000, "mono8")), True),
    "a picture larger than its data": (lambda: of_pictures(GOOD, picture(2 * SECOND, 2**29, 2**31, data=9)), True),
    "a deep picture of 16 million pixels": (lambda: of_pictures(GOOD, picture(2 * SECOND, 4096, 4096, "mono16")), True),
    "ten PNG pictures of 33 million pixels": (lambda: png_pictures(10), None),
    "500 decisions among 8,000 actions": (lambda: long_decisions(500), None),
    "a map of height 0": (lambda: of_map(picture(SECOND, 128, 0, "32FC1")), True),
    "a grey map": (lambda: of_map(picture(SECOND, 128, 128, "mono8")), True),
    "facts nested 200,000 deep": (lambda: of_facts("[" * 60_000), True),
    "aliases in quality of service": (
        lambda: of_pictures(GOOD, qos="- &a [1, 1]\n- &b [*a, *a]\n- history: *b\n"),
        False,
    ),
    "2 MB of quality of service": (lambda: of_pictures(GOOD, qos="- {history: 1}\n" * 140_000), False),
}
LONG = {
    "chunks of 60 MiB at one time",
    "chunks of 60 MiB one after the other",
    "six million records of nothing",
    "240,000 small decisions",
    "2,400 fields",
    "200,000 fields",
    "a deep picture of 16 million pixels",
    "2 MB of quality of service",
    "ten PNG pictures of 33 million pixels",
    "500 decisions among 8,000 actions",
}


def at_one_time(size: int, count: int, apart: bool = False) -> File:
    file = of_pictures(GOOD)
    packed = zeros(size)
    for number in range(count):
        start = (number if apart else 0) * SECOND
        file.add(crafted_bags.chunk(b"", start, start + SECOND - 1, size, packed), start, start + SECOND - 1, size)
    return file


@pytest.mark.parametrize("summary", [True, False], ids=["indexed", "without index"])
@pytest.mark.parametrize("name", FILES)
def test_a_crafted_file_costs_little_and_ends_in_a_sentence(run, tmp_path, weights, name, summary, long):
    if not long and (name in LONG or not summary):
        pytest.skip("takes seconds of a processor: --long")
    make, read = FILES[name]
    file = make()
    if not file.data:
        file.add_messages([(1, SECOND, GOOD)])
    path = file.write(tmp_path / "crafted.mcap", summary)
    assert path.stat().st_size < 10 << 20
    explain = ("explain", path, "--out", tmp_path / "explained", "--weights", weights, "--method", "vg")
    for arguments in (("view", path), explain, ("repair", path, "--out", tmp_path / "repaired")):
        outcome = run(*arguments)
        assert "Traceback" not in outcome.said and outcome.status in (0, 2), (arguments, outcome.said[-2000:])
        assert outcome.megabytes < MEGABYTES and outcome.seconds < SECONDS, (arguments, outcome[:3])
        if outcome.status:
            (line,) = (line for line in outcome.said.splitlines() if line.startswith("carla-digr: "))
            assert len(line) < 600
        print(arguments[0], *outcome[:3])
        if summary and read is not None and arguments[0] != "repair":
            assert (outcome.status == 0) == read, (arguments, outcome)


def sqlite_bomb(path):
    """A message of 900 MB that is computed."""
    with closing(sqlite3.connect(path / "bomb.db3")) as tables:
        tables.executescript(
            "CREATE TABLE topics(id INTEGER, name TEXT, type TEXT, serialization_format TEXT);"
            "CREATE TABLE messages(id INTEGER, topic_id INTEGER, timestamp INTEGER,"
            " data BLOB GENERATED ALWAYS AS (zeroblob(900000000)));"
            f"INSERT INTO topics VALUES(1, '{topics.IMAGE}', '{topics.PICTURE_TYPE}', 'cdr');"
            "INSERT INTO messages(id, topic_id, timestamp) VALUES(1, 1, 1), (2, 1, 2), (3, 1, 3);"
        )
    return path / "bomb.db3"


def packed_file(path):
    """A file that is packed as a whole, by rosbag2's mode FILE, and unpacks to 3 GB."""
    bag = packed_bag(path, "file")
    (bag / "bag.mcap.zstd").write_bytes(zeros(3 << 30))
    return bag


def packed_messages(path):
    """Messages that are packed each for itself, one of which unpacks to 3 GB."""
    bag = packed_bag(path, "message")
    File(data=b"").write(bag / "bag.mcap")
    of_pictures(zeros(3 << 30)).write(bag / "bag.mcap")
    return bag


def packed_bag(path, mode: str):
    drive_bags.record(path / "bag", 2, 8)
    (file,) = (path / "bag").glob("*.mcap")
    name = f"bag.mcap{'.zstd' * (mode == 'file')}"
    metadata = path / "bag" / "metadata.yaml"
    text = metadata.read_text().replace(file.name, name)
    text = re.sub(r"compression_mode: .*", f"compression_mode: {mode.upper()}", text)
    metadata.write_text(re.sub(r"compression_format: .*", "compression_format: zstd", text))
    file.rename(path / "bag" / name)
    return path / "bag"


def yaml_bomb(path):
    bag = drive_bags.record(path / "bag", 2, 8)
    text = (bag / "metadata.yaml").read_text()
    bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in pairwise("abcdefghij"))
    (bag / "metadata.yaml").write_text(bomb + re.sub(r"compression_format: .*", "compression_format: *j", text))
    return bag


def pipe_in_directory(path):
    bag = drive_bags.record(path / "bag", 2, 8)
    (file,) = bag.glob("*.mcap")
    file.unlink()
    os.mkfifo(file)
    return bag


def pipe(path):
    os.mkfifo(path / "pipe.mcap")
    return path / "pipe.mcap"


def ros1_bomb(path):
    """A chunk of 300 MB of zeros in bz2, which is 300 bytes."""
    store = get_typestore(Stores.ROS1_NOETIC)
    writer = rosbag1.Writer(path / "old.bag")
    writer.set_compression(rosbag1.Writer.CompressionFormat.BZ2)
    with writer:
        camera = writer.add_connection("/cam", topics.PICTURE_TYPE, typestore=store)
        writer.write(camera, SECOND, bytes(300_000_000))
    return path / "old.bag"


ODD = [sqlite_bomb, packed_file, packed_messages, yaml_bomb, pipe_in_directory, pipe, ros1_bomb]


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_other_recordings_of_an_adversary_are_refused_soon(run, tmp_path, make):
    path = make(tmp_path)
    for arguments in (("view", path), ("repair", path, "--out", tmp_path / "repaired")):
        outcome = run(*arguments)
        assert "Traceback" not in outcome.said and len(outcome.said) < 900, (arguments, outcome.said[-2000:])
        assert outcome.status == 2 or (make is yaml_bomb and arguments[0] == "repair"), (arguments, outcome)
        assert outcome.megabytes < MEGABYTES and outcome.seconds < SECONDS, (arguments, outcome[:3])


def test_what_is_allowed_is_set_by_the_environment(tmp_path, monkeypatch):
    path = at_one_time(1 << 20, 70).write(tmp_path / "large.mcap")
    with (
        pytest.raises(UserError, match=r"has chunks of more than 64 MiB at one time.*CARLA_DIGR_UNPACK=10"),
        open_bag(path),
    ):
        pass
    monkeypatch.setenv("CARLA_DIGR_UNPACK", "2")
    with open_bag(path) as opened:
        assert opened.messages
    monkeypatch.setenv("CARLA_DIGR_UNPACK", "much")
    with pytest.raises(UserError, match="must be a whole number"), open_bag(path):
        pass


def test_repair_leaves_out_what_nobody_can_read_and_says_so(tmp_path, capsys):
    good = drive_bags.serialized(
        topics.DECISION_TYPE, drive_bags.blank(drive_bags.STORE, topics.DECISION_TYPE, header=drive_bags.header(SECOND))
    )
    file = File(types={topics.IMAGE: topics.PICTURE_TYPE, topics.DECISION: topics.DECISION_TYPE})
    file.add_messages([(1, SECOND, GOOD), (2, SECOND, good), (2, SECOND + 1, good[:30]), (2, SECOND + 2, MANY_NAMES)])
    path = file.write(tmp_path / "bag.mcap")
    assert command(["repair", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "2 messages of 2 topics" in (said := capsys.readouterr().out) and "2 damaged messages were left out" in said
    with open_bag(tmp_path / "out") as opened:
        assert {data for _, _, data in opened.read()} == {GOOD, good}
    with open_bag(path) as opened:
        assert read_drive(opened).ignored == ["2 messages are damaged"]
