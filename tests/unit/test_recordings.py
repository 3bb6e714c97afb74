"""Recordings that are whole, cut off, damaged, empty or foreign: opened as far as possible, or one clear sentence."""

from __future__ import annotations

import shutil

import drive_bags
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.stream_reader import StreamReader
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from carla_digr.cli import main as command
from carla_digr.errors import UserError
from carla_digr.recordings import drive as drive_bag
from carla_digr.recordings import topics
from carla_digr.recordings.bag import BagWriter, open_bag
from carla_digr.recordings.recorder import JUMP_AHEAD, Timeline
from carla_digr.recordings.repair import repair

FRAMES, SIZE = 50, 8
MESSAGES = FRAMES * drive_bags.PER_FRAME + 1  # and the facts


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """Three chunks of a drive with small pictures."""
    return drive_bags.record(tmp_path_factory.mktemp("bags") / "drive", FRAMES, SIZE)


@pytest.fixture(scope="module")
def content(bag):
    """The file's bytes, and its messages in their order."""
    return file_of(bag).read_bytes(), messages(bag)


def file_of(bag):
    (file,) = bag.glob("*.mcap")
    return file


def messages(path):
    with open_bag(path) as opened:
        return [(channel.topic, time, data) for channel, time, data in opened.read()]


def test_a_recording_says_who_drove_and_has_every_message_with_its_time(bag, content):
    _, found = content
    assert len(found) == MESSAGES
    assert found[0][0] == topics.FACTS_TOPIC
    with open_bag(bag) as opened:
        drive = drive_bag.read_drive(opened)
        assert (opened.start, opened.end) == (drive_bags.PERIOD, FRAMES * drive_bags.PERIOD + 1)
    assert drive.facts["policy_hash"] == "0123456789ab"
    assert [frame.number for frame in drive.frames] == list(range(1, FRAMES + 1))
    for frame in drive.frames:
        assert frame.stamp == frame.camera == frame.saliency == frame.number * drive_bags.PERIOD
        assert frame.policy.value == frame.number and frame.fallback is None
        assert frame.odometry.twist.twist.linear.x == 20.0


def test_a_drive_that_ends_before_its_first_frame_leaves_no_recording(tmp_path):
    drive = drive_bags.DriveRecorder(tmp_path / "drive")
    message = drive_bags.blank(drive_bags.STORE, drive_bags.TYPES[drive_bags.DIAGNOSTICS])
    drive.add(drive_bags.DIAGNOSTICS, message, None)
    drive.close()
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_off_at_any_byte_what_is_whole_is_saved(data, content, tmp_path):
    whole, expected = content
    length = data.draw(st.integers(0, len(whole) - 1))
    cut, out = tmp_path / "cut.mcap", tmp_path / "saved"
    cut.write_bytes(whole[:length])
    shutil.rmtree(out, ignore_errors=True)
    with pytest.raises(UserError, match=r"unfinished or damaged: [^;]+; `carla-digr repair .*cut.mcap` saves"):
        messages(cut)
    complete = chunks_before(whole, length)
    if complete < 2:
        with pytest.raises(UserError, match=r"Nothing can be saved from .*cut.mcap"):
            repair(cut, out)
        assert not out.exists()
        return
    saved = repair(cut, out)
    assert messages(out) == [message for message in expected if chunk_of(*message) < complete]
    assert saved.damaged_chunks == 0


def chunk_of(topic: str, time: int, data: bytes) -> int:
    """In which chunk a message is: the first has the schemas, then each second has one and its pictures another."""
    pictures = drive_bags.TYPES.get(topic) == topics.PICTURE_TYPE
    return 1 + (time - 1) // (20 * drive_bags.PERIOD) * 2 + pictures


def chunks_before(whole: bytes, length: int) -> int:
    """How many chunk records end at or before a byte."""
    from io import BytesIO

    stream, count = BytesIO(whole), 0
    for record in StreamReader(stream, emit_chunks=True).records:
        count += type(record).__name__ == "Chunk" and stream.tell() <= length
    return count


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_costs_its_chunk_at_most(data, content, tmp_path):
    whole, expected = content
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    damaged, out = tmp_path / "damaged.mcap", tmp_path / "saved"
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    shutil.rmtree(out, ignore_errors=True)
    try:
        # Either told, or the byte was one that nothing depends on.
        assert len(messages(damaged)) <= MESSAGES
    except UserError as error:
        assert "\n" not in str(error)
    try:
        saved = repair(damaged, out)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        found = messages(out)
        assert len(found) == saved.messages
        assert {content for _, _, content in found} <= {content for _, _, content in expected}


def test_a_damaged_first_chunk_does_not_take_the_topics_along(content, tmp_path):
    whole, expected = content
    damaged = tmp_path / "damaged.mcap"
    damaged.write_bytes(whole[:500] + bytes(50) + whole[550:])  # the schemas, which the file's end has again
    saved = repair(damaged, tmp_path / "saved")
    assert saved.damaged_chunks == 1 and not saved.cut
    assert messages(tmp_path / "saved") == expected


def test_repair_leaves_the_bag_and_what_is_there_alone(bag, content, tmp_path, capsys):
    out = tmp_path / "new"
    (tmp_path / ".new.tmp" / "recording").mkdir(parents=True)  # of a command that was killed
    assert command(["repair", str(bag), "--out", str(out)]) == 0
    assert f"{MESSAGES} messages of 8 topics over 2.45 s" in capsys.readouterr().out
    assert messages(out) == content[1]
    assert file_of(bag).read_bytes() == content[0]
    assert command(["repair", str(bag), "--out", str(out)]) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def make_foreign(path, plugin, mode=CompressionMode.NONE, version=9, kind=topics.PICTURE_TYPE):
    """A recording by somebody else: one picture topic of another name."""
    writer = Writer(path, version=version, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/front/image_raw", kind, typestore=drive_bags.STORE)
        for number in range(1, 4):
            message = drive_bags.image(number * 10**8, drive_bags.picture(number, 16), "rgb8")
            writer.write(connection, 10**18 + number * 10**8, drive_bags.serialized(topics.PICTURE_TYPE, message))
    return path


@pytest.mark.parametrize("plugin", StoragePlugin)
@pytest.mark.parametrize("mode", CompressionMode)
def test_foreign_recordings_open_whatever_their_storage_and_compression(plugin, mode, tmp_path):
    if (plugin, mode) == (StoragePlugin.SQLITE3, CompressionMode.STORAGE):
        mode = CompressionMode.FILE  # sqlite3 has no chunks
    path = make_foreign(tmp_path / "foreign", plugin, mode, version=8)
    with open_bag(path) as opened:
        assert opened.messages == 3
        drive = drive_bag.read_drive(opened, "/front/image_raw")
        assert [frame.stamp for frame in drive.frames] == [10**8, 2 * 10**8, 3 * 10**8]
        assert all(frame.number == 0 and frame.policy is None for frame in drive.frames)
        with pytest.raises(UserError, match=r"no pictures on /carla_digr/camera/image; name one .*: /front/image_raw"):
            drive_bag.read_drive(opened)


def test_what_is_whole_of_an_sqlite3_recording_is_read_and_the_rest_told(tmp_path, capsys):
    """Each page in turn is lost, and each part of the end; of the pictures some have pages of their own."""
    path = tmp_path / "foreign"
    writer = Writer(path, version=8, storage_plugin=StoragePlugin.SQLITE3)
    with writer:
        connection = writer.add_connection("/front/image_raw", topics.PICTURE_TYPE, typestore=drive_bags.STORE)
        for number in range(1, 61):
            message = drive_bags.image(
                number * 10**8, drive_bags.picture(number, 128 if number % 10 == 0 else 16), "rgb8"
            )
            writer.write(connection, number * 10**8, drive_bags.serialized(topics.PICTURE_TYPE, message))
    (whole_file,) = path.glob("*.db3")
    data, whole, page = whole_file.read_bytes(), messages(whole_file), 4096
    hurt = tmp_path / "hurt.db3"
    lost, readable = [], 0
    for place in range(0, len(data), page):
        for damaged in (data[:place] + b"\xff" * page + data[place + page :], data[:place]):
            hurt.write_bytes(damaged)
            try:
                with open_bag(hurt) as opened:
                    found = [(channel.topic, time, data) for channel, time, data in opened.read()]
                    told = opened.damage
            except UserError as error:
                assert "sqlite3's `.recover`" in str(error) or "is empty" in str(error), error
                continue
            readable += 1
            same = [message for message in found if message in whole]
            assert [time for _, time, _ in found] == sorted({time for _, time, _ in found})
            assert len(found) - len(same) <= 1  # a page full of a picture's bytes is a picture too
            if len(found) < len(whole):
                assert told and "damaged places are left out" in told[0], place
            lost.append(len(whole) - len(found))
    assert readable > len(data) / page / 2 and max(lost) > 10 and lost.count(0) and lost.count(1)
    hurt.write_bytes(data[: len(data) - len(data) // 3])
    assert command(["repair", str(hurt), "--out", str(tmp_path / "new")]) == 0
    assert "damaged chunks were left out" in capsys.readouterr().out
    assert set(messages(tmp_path / "new")) < set(whole)


def test_the_frames_are_found_without_unpacking_the_pictures(content, tmp_path):
    whole, _ = content
    path = tmp_path / "drive.mcap"
    path.write_bytes(whole)
    with open_bag(path) as opened:
        everything = drive_bag.read_drive(opened, seen=lambda *_: None)
    with path.open("rb") as stream:
        pictures = make_reader(stream).get_summary().chunk_indexes[-1]
    middle = pictures.chunk_start_offset + pictures.chunk_length // 2
    path.write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    with open_bag(path) as opened:
        assert repr(drive_bag.read_drive(opened)) == repr(everything)
        assert not opened.damage
        with_pictures = drive_bag.read_drive(opened, seen=lambda *_: None)
        (sentence,) = opened.damage
        assert sentence.startswith("1 damaged chunks are left out")
    assert 0 < len(with_pictures.frames) < len(everything.frames)


def test_topics_of_another_type_are_left_aside_and_named(bag, tmp_path):
    writer = Writer(tmp_path / "odd", version=9, storage_plugin=StoragePlugin.MCAP)
    text = drive_bags.STORE.types["std_msgs/msg/String"]("hello")
    with writer:
        odd = writer.add_connection(topics.SALIENCY, "std_msgs/msg/String", typestore=drive_bags.STORE)
        camera = writer.add_connection(topics.IMAGE, topics.PICTURE_TYPE, typestore=drive_bags.STORE)
        writer.write(odd, 1, bytes(drive_bags.STORE.serialize_cdr(text, "std_msgs/msg/String")))
        message = drive_bags.image(5, np.zeros((8, 8, 3), np.uint8), "rgb8")
        writer.write(camera, 5, drive_bags.serialized(topics.PICTURE_TYPE, message))
    with open_bag(tmp_path / "odd") as opened:
        drive = drive_bag.read_drive(opened)
    assert len(drive.frames) == 1 and drive.frames[0].saliency is None
    assert drive.ignored == [f"{topics.SALIENCY} is std_msgs/msg/String, not sensor_msgs/msg/Image"]


def spoil(path, how):
    """A bag, or something like it, of which nothing can be opened."""
    path.mkdir()
    if how == "directory":
        return path, "is no recording: it has neither"
    if how == "text":
        (path / "notes.txt").write_text("hello")
        return path / "notes.txt", "is no recording: name a bag's directory"
    if how == "missing":
        return path / "none", "There is no recording"
    if how == "empty file":
        (path / "a.mcap").touch()
        return path / "a.mcap", "is unfinished or damaged: .*empty"
    if how == "zeros":
        (path / "a.mcap").write_bytes(bytes(1000))
        return path / "a.mcap", "is unfinished or damaged: File magic"
    if how == "no sqlite":
        (path / "a.db3").write_bytes(b"SQLite format 3\0" + bytes(2000))
        return path / "a.db3", "is unfinished or damaged: "
    if how == "two files":
        (path / "a.mcap").touch(), (path / "b.mcap").touch()
        return path, "a.mcap is unfinished or damaged"
    bag = make_foreign(path / "bag", StoragePlugin.MCAP)
    metadata = bag / "metadata.yaml"
    text = metadata.read_text()
    if how == "version":
        metadata.write_text(text.replace("version: 9", "version: 99"))
        return bag, "version 99 not supported"
    if how == "storage":
        metadata.write_text(text.replace("storage_identifier: mcap", "storage_identifier: tape"))
        return bag, "'tape' not supported"
    if how == "no file":
        (bag / "bag.mcap").unlink()
        return bag, "files are missing"
    if how == "empty metadata":
        metadata.write_text("")
        return bag, "is unfinished or damaged: Invalid bag metadata"
    if how == "yaml":
        metadata.write_text(text[:200] + "\n{[")
        return bag, "is unfinished or damaged: Could not load YAML"
    assert how == "no messages"
    BagWriter(path / "empty", list(drive_bags.CHANNELS.values())).close()
    return path / "empty", "is empty: there are no messages"


HOW = ["directory", "text", "missing", "empty file", "zeros", "no sqlite", "two files", "version", "storage"]
HOW += ["no file", "empty metadata", "yaml", "no messages"]


@pytest.mark.parametrize("how", HOW)
def test_what_cannot_be_opened_is_one_sentence(how, tmp_path, capsys):
    path, sentence = spoil(tmp_path / "spoilt", how)
    with pytest.raises(UserError, match=sentence) as caught, open_bag(path):
        pass
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert command(["explain", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"carla-digr: {caught.value}\n"
    assert not (tmp_path / "out").exists()


def test_time_never_runs_back_when_a_simulator_starts_again():
    timeline = Timeline()
    seconds = 10**9
    assert [timeline.place("a", t * seconds) for t in (5, 6, 7)] == [5 * seconds, 6 * seconds, 7 * seconds]
    assert timeline.place("b", 6 * seconds) == 6 * seconds  # only late
    assert timeline.place("a", 0) == 7 * seconds  # begun anew
    assert timeline.place("b", 7 * seconds) == 7 * seconds  # what was under way belongs to the clock before
    assert timeline.place("b", seconds) == 8 * seconds
    assert timeline.place("c", seconds) == 8 * seconds
    assert timeline.place("a", seconds) == 8 * seconds
    assert timeline.now == 8 * seconds


WALL = 1_764_000_000 * 10**9  # ns, as another program's clock has it
STAMPS = st.integers(-(2**31) * 10**9, 2**32 * 10**9)  # of any message


@given(st.lists(STAMPS, max_size=200))
@example([0] * 40)  # a clock that stands still falls behind, which is its own matter
def test_no_foreign_stamp_moves_the_frames_of_a_recording_or_bloats_it(foreign):
    timeline, frame = Timeline(JUMP_AHEAD), 50_000_000
    for number, stamp in enumerate(foreign):
        assert timeline.place("frame", number * frame) == number * frame
        placed = timeline.place("clock", stamp)
        assert 0 <= placed <= timeline.now <= number * frame + (number + 1) * JUMP_AHEAD


@given(STAMPS)
def test_the_first_stamp_of_a_recording_may_be_a_foreign_one(stamp):
    timeline = Timeline(JUMP_AHEAD)
    assert 0 <= timeline.place("clock", stamp) < 1 << 63
    first, second = (timeline.place("frame", number) for number in (WALL, WALL + 1))
    assert 0 <= first == second - 1 < 1 << 63


def test_two_clocks_on_one_topic_are_told_apart():
    timeline, frame = Timeline(JUMP_AHEAD), 50_000_000
    for number in range(3300):
        assert timeline.place("clock", number * frame) == timeline.place("frame", number * frame) == number * frame
        assert timeline.place("clock", WALL + number * frame) == number * frame
    assert timeline.jumps == 1


def test_what_one_publisher_of_a_topic_sends_late_belongs_to_its_own_time():
    timeline, seconds = Timeline(JUMP_AHEAD), 10**9
    for stamp, source in ((5, "a"), (5, "b"), (6, "b"), (9, "b"), (6, "a"), (9, "a")):  # the second was held up
        assert timeline.place("decision", stamp * seconds, source) == stamp * seconds
    assert timeline.place("decision", 0, "c") == 9 * seconds  # begun anew, by a new process
    assert timeline.jumps == 1
