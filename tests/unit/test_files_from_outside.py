"""Files that are anything: told in one sentence, soon, in little memory, and nothing of what stands in them said."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from carla_digr.checkpoint import load
from carla_digr.config import YAML_BYTES
from carla_digr.errors import UserError
from carla_digr.files import NOTES_BYTES, read_json, read_regular
from carla_digr.tasks import load_config

READERS = {
    "a configuration": "from carla_digr.tasks import load_config as read",
    "weights": "from carla_digr.checkpoint import load as read",
    "a policy to import": "from pathlib import Path; from carla_digr.importing.reading import read as r; "
    "read = lambda path: r(Path(path))",
    "a job's saved state": "from pathlib import Path; from carla_digr.training.state import load_state; "
    "read = lambda path: load_state(Path(path))",
    "notes": "from carla_digr.files import read_json as read",
}
READ = """
import resource, sys
{reader}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read(path)
    except Exception as error:
        print(type(error).__name__, error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def odd(tmp_path):
    """Paths that are no file to read: a pipe that nobody writes to, a device without end, nothing but size."""
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(10 << 30)
    return {
        "a pipe": tmp_path / "pipe.yaml",
        "a device": Path("/dev/zero"),
        "10 GB of nothing": tmp_path / "sparse.yaml",
        "a folder": tmp_path,
    }


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(odd, reader):
    program = [sys.executable, "-c", READ.format(reader=READERS[reader])]
    done = subprocess.run([*program, *odd.values()], capture_output=True, text=True, timeout=250)
    *said, grown = done.stdout.splitlines()
    assert len(said) == len(odd), (done.stdout, done.stderr)
    for name, sentence in zip(odd, said, strict=True):
        assert sentence.partition(" ")[0] in ("UserError", "OSError", "IsADirectoryError"), (name, sentence)
    assert int(grown) < 200_000  # kB


def test_a_file_is_read_as_it_is_up_to_its_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_regular(file, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(file, 4)
    file.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="too deeply"):
        read_json(file, NOTES_BYTES)


YAML = {
    "an alias bomb": "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
    "a list that holds itself": "seed: &a [*a]",
    "20,000 levels": "task: " + "[" * 20_000,
    "a number of 6,000 digits": "seed: " + "7" * 6000,
    "a month 13": "seed: 2020-13-45",
    "a long text": "task: " + "x" * YAML_BYTES,
    "a hundred million games": "task: breakout\nteacher: {environments: 100000000}",
    "two billion features": "task: breakout\npolicy: {features: 2000000000}",
}


@pytest.mark.parametrize("name", YAML)
def test_a_configuration_that_nobody_meant_is_one_short_sentence(tmp_path, name):
    file = tmp_path / "odd.yaml"
    file.write_text(YAML[name])
    with pytest.raises(UserError, match=r"^[A-Z/].{1,400}\.$") as refused:
        load_config(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["hunter2", "hunter2: hunter2: hunter2", "- hunter2", "'hunter2", "{a: hunter2", "%hunter2\n---", "a: b\n hunter2"],
)
def test_what_stands_in_a_file_that_is_no_configuration_is_not_read_out(tmp_path, text):
    file = tmp_path / "secrets"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(file)
    assert "hunter2" not in str(refused.value)


CARDS = {
    "nested": lambda card: card | {"metrics": "NESTED"},
    "features": lambda card: card | {"policy": card["policy"] | {"features": 2_000_000_000}},
    "wide": lambda card: card | {"policy": card["policy"] | {"features": 65_536}},
    "layers": lambda card: card | {"policy": card["policy"] | {"convolutions": [[4096, 1, 1]] * 50}},
    "shape": lambda card: card | {"input_shape": [3, 10**30, 10**30]},
    "not whole": lambda card: card | {"input_shape": [3, 1e30, 128]},
    "large": lambda card: card | {"input_shape": [3, 4000, 4000]},
    "actions": lambda card: card | {"action_names": ["x"] * 100_000},
    "numbers": lambda card: card | {"action_names": [1, 2, 3, 4]},
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_promises_too_much_is_refused_before_anything_is_made(tmp_path, weights, name):
    copy = tmp_path / "policy.safetensors"
    shutil.copy(weights, copy)
    card = CARDS[name](json.loads(Path(weights).with_suffix(".json").read_text()))
    text = json.dumps(card).replace('"NESTED"', "[" * 200_000 + "]" * 200_000)
    copy.with_suffix(".json").write_text(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"policy\."):
        load(copy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
