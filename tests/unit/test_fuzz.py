"""Parsers of bytes from outside return or refuse, whatever the bytes: a little each time, an hour's worth by --long."""

from __future__ import annotations

import logging
import struct
import time
from contextlib import closing

import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"card": 40, "config": 60}  # of 150 for the others
LONG = 100  # times as many with --long
SECONDS = 20  # that one may take
EXTREMES = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]


@st.composite
def mutated(draw, seeds: list[bytes]) -> bytes:
    """A seed with a few places changed: other bytes or numbers, parts left out, said twice or taken from another."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 64))
        kind = draw(st.sampled_from(["bytes", "number", "less", "more", "other", "end"]))
        if kind == "bytes":
            data[place : place + length] = draw(st.binary(max_size=64))
        elif kind == "number":
            code = draw(st.sampled_from(["<H", "<I", "<Q", ">I"]))
            number = draw(st.sampled_from(EXTREMES)) & (2 ** (8 * struct.calcsize(code)) - 1)
            data[place : place + struct.calcsize(code)] = struct.pack(code, number)
        elif kind == "less":
            del data[place : place + length]
        elif kind == "more":
            data[place:place] = data[place : place + length] * draw(st.integers(1, 50))
        elif kind == "other":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other)))
            data[place:place] = other[start : start + length]
        else:
            del data[place:]
    return bytes(data)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_the_bytes_a_parser_returns_or_refuses(name, tmp_path, long, caplog):
    target = TARGETS[name](tmp_path)
    count = EXAMPLES.get(name, 150) * (LONG if long else 1)

    @settings(max_examples=count, database=None, derandomize=not long, suppress_health_check=list(HealthCheck))
    @given(mutated(target.seeds))
    def check(data: bytes) -> None:
        begun = time.process_time()
        target.run(data)
        assert time.process_time() - begun < SECONDS

    caplog.set_level(logging.WARNING)
    with closing(target):
        for seed in target.seeds:
            target.run(seed)
        check()
    assert not [record for record in caplog.records if record.exc_info]
