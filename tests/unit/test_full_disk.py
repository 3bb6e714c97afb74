"""A disk that is full, a memory that is, a directory that is gone: a sentence, and the same command goes on later."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import drive_bags
import pytest
import yaml
from measured import Commands
from tiny_run import TINY

from carla_digr.errors import SENTENCE, sentence
from carla_digr.files import allocate, atomic_write

FULL = "No space left on device; make room and run the same command again."
NO_MOUNT = "mounting a small file system needs root"


class Disk:
    """A file system in memory of any size."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], check=True, capture_output=True)

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.path], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    if os.geteuid():
        pytest.skip(NO_MOUNT)
    try:
        disk = Disk(tmp_path / "disk")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{NO_MOUNT}: {error.stderr.decode()}")
    yield disk
    disk.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    stages = ("teacher", "saliency_dataset", "distill")
    commands = Commands(tmp_path_factory.mktemp("said"), *(f"carla_digr.training.{stage}" for stage in stages))
    yield commands
    commands.close()


def digests(out: Path) -> dict[str, str]:
    """Of what follows from the seed; the teacher's saved state has times on the clock too."""
    files = [*out.glob("*.safetensors"), *out.glob("dataset/*.safetensors"), out / "distill/state.safetensors"]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_stages_on_a_full_disk_say_so_and_go_on_with_equal_bytes(disk, run, tmp_path, tiny_run):
    config, out = tmp_path / "tiny.yaml", disk.path / "out"
    config.write_text(yaml.safe_dump(TINY))
    need = sum(file.stat().st_size for file in tiny_run.rglob("*")) // 1024
    used = 0
    for stage, folder in [("train-teacher", "teacher"), ("make-dataset", "dataset"), ("distill", "distill")]:
        needed = sum(file.stat().st_size for file in (tiny_run / folder).rglob("*")) // 1024
        disk.resize(used + 16 + needed // 2)
        outcome = run(stage, config, "--out", out)
        assert outcome.status == 2 and outcome.said.rstrip().endswith(FULL), outcome
        assert "Traceback" not in outcome.said and SENTENCE in outcome.said
        disk.resize(4 * need + 1024)
        outcome = run(stage, config, "--out", out)
        assert outcome.status == 0, outcome
        used = int(subprocess.check_output(["du", "-sk", disk.path], text=True).split()[0])
    expected = digests(tiny_run)
    assert digests(out) == expected


def test_explaining_on_a_full_disk_goes_on_where_it_was(disk, run, tmp_path, weights):
    bag = drive_bags.record(tmp_path / "drive", 30, 128)
    arguments = ("explain", bag, "--weights", weights, "--method", "vg")
    assert run(*arguments, "--out", tmp_path / "whole").status == 0
    (whole,) = (tmp_path / "whole").glob("*.mcap")
    disk.resize(whole.stat().st_size // 2048)
    outcome = run(*arguments, "--out", disk.path / "explained")
    assert outcome.status == 2 and "No space left on device." in outcome.said and "Traceback" not in outcome.said
    disk.resize(whole.stat().st_size // 256)
    outcome = run(*arguments, "--out", disk.path / "explained")
    assert outcome.status == 0 and "before it was interrupted" in outcome.said, outcome
    assert (disk.path / "explained" / whole.name).read_bytes() == whole.read_bytes()


def test_a_file_that_is_mapped_has_its_room_before(disk):
    disk.resize(100)
    with pytest.raises(OSError, match="No space left"):
        allocate(disk.path / "buffer.bin", 200_000)
    assert not (disk.path / "buffer.bin").exists()
    allocate(disk.path / "buffer.bin", 50_000)
    (disk.path / "sparse").touch()
    os.truncate(disk.path / "sparse", 200_000)
    with pytest.raises(OSError, match="No space left"):
        allocate(disk.path / "sparse", 200_000)


def test_a_file_that_finds_no_room_keeps_its_old_content_and_is_named(disk):
    file = disk.path / "notes"
    file.write_text("old")
    with pytest.raises(OSError, match="No space left") as refused, atomic_write(file) as new:
        new.write(bytes(1 << 20))
    assert file.read_text() == "old" and [*disk.path.iterdir()] == [file]
    assert sentence(refused.value) == f"{file}: {FULL}"


def test_standard_output_on_a_full_disk_is_one_sentence(tmp_path):
    bag = drive_bags.record(tmp_path / "drive", 3, 8)
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "carla_digr.cli", "repair", str(bag), "--out", str(tmp_path / "new")]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (2, f"{SENTENCE}{FULL}\n")


def test_a_directory_that_is_gone_is_one_sentence(tmp_path):
    (tmp_path / "gone").mkdir()
    program = [sys.executable, "-m", "carla_digr.cli", "train-teacher", "breakout"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    done = subprocess.run(
        ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', tmp_path / "gone", *program],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"{SENTENCE}The directory in which this was started is no more: go to another one."
    )
    assert "Traceback" not in done.stderr


def test_too_little_memory_is_one_sentence(tmp_path):
    """As with `ulimit -v`: what the teacher collects is larger."""
    program = [sys.executable, "-m", "carla_digr.cli", "train-teacher", "driving", "--out", str(tmp_path)]
    limit = 1_000_000 * 1024

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, preexec_fn=limited, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert f"{SENTENCE}There is not enough memory" in done.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (PermissionError(13, "Permission denied", "/file"), "/file: Permission denied."),
        (RuntimeError("a fault of the program"), None),
    ],
)
def test_what_the_machine_refuses_is_told_and_faults_are_not_hidden(error, told):
    text = sentence(error)
    assert text is None if told is None else told in text
