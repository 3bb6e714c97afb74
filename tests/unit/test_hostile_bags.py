"""Recordings by an adversary: each command ends soon, in little memory, with a sentence or with what is whole."""

from __future__ import annotations

import struct

import crafted_bags
import drive_bags
import numpy as np
import pytest
from crafted_bags import U32, File, zeros
from measured import Commands

from carla_digr.recordings import topics

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
