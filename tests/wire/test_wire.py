"""The wire format by itself."""

from __future__ import annotations

import contextlib
import struct
from typing import get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carla_digr.simulator import streaming, wire

f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
u32 = st.integers(0, 2**32 - 1)
text = st.text(max_size=20)
STRUCTURES = [
    wire.Transform,
    wire.BoundingBox,
    wire.ActorDescription,
    wire.Actor,
    wire.VehicleControl,
    wire.Weather,
    wire.VehiclePhysics,
]


def values(hint) -> st.SearchStrategy:
    """Values of a type that decoder() knows."""
    simple = {float: f32, int: u32, bool: st.booleans(), str: text, bytes: st.binary(max_size=30)}
    if hint in simple:
        return simple[hint]
    if hasattr(hint, "__metadata__"):
        (numbers,) = hint.__metadata__
        return st.integers(numbers[0], numbers[-1])
    arguments = getattr(hint, "__args__", ())
    if getattr(hint, "__origin__", None) is list:
        return st.lists(values(arguments[0]), max_size=3)
    if getattr(hint, "__origin__", None) is tuple:
        return st.tuples(*map(values, arguments))
    return st.builds(hint, **{name: values(h) for name, h in get_type_hints(hint, include_extras=True).items()})


def over_the_wire(value):
    return msgpack.unpackb(wire.pack(value))


@given(st.sampled_from(STRUCTURES).flatmap(lambda s: st.tuples(st.just(s), values(s))))
def test_structures_survive_the_wire(case):
    kind, value = case
    assert wire.decoder(kind)(over_the_wire(value)) == value


@given(st.one_of(st.none(), f32), st.booleans())
def test_settings_survive_the_wire(delta, synchronous):
    settings = wire.EpisodeSettings(synchronous=synchronous, fixed_delta=delta)
    assert wire.decoder(wire.EpisodeSettings)(over_the_wire(wire.settings_to_wire(settings))) == settings


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), text, st.binary(max_size=5)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(text, inner, max_size=2),
    max_leaves=12,
)


@given(st.sampled_from([*STRUCTURES, wire.EpisodeSettings, wire.SpawnCommand]), junk)
def test_junk_is_refused_by_its_own_error(kind, value):
    try:
        wire.decoder(kind)(value)
    except wire.ProtocolError:
        return
    assert isinstance(value, list) and len(value) >= len(kind._fields)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39, -(2**200), True, "1", None])
def test_floats_are_finite_numbers(bad):
    with pytest.raises(wire.ProtocolError):
        wire.decoder(wire.Vector3D)([0.0, bad, 0.0])


requests = st.lists(
    st.builds(wire.Request, u32, text, st.booleans(), st.lists(st.one_of(u32, text, st.lists(f32)), max_size=4)),
    min_size=1,
    max_size=5,
)


@given(requests, st.data())
def test_requests_are_read_however_they_are_cut(calls, data):
    stream = b"".join(wire.pack((0, c.call_id, c.method, [[c.asynchronous], *c.arguments])) for c in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = wire.RequestReader()
    read = [
        request
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for request in reader.feed(stream[start:end])
    ]
    assert read == calls


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_a_protocol_error(data):
    reader = wire.RequestReader()
    with contextlib.suppress(wire.ProtocolError):
        assert all(isinstance(request, wire.Request) for request in reader.feed(data))


def test_a_request_that_announces_gigabytes_is_refused():
    reader = wire.RequestReader()
    with pytest.raises(wire.ProtocolError):
        for _ in range(wire.MAX_REQUEST // 2**20 + 1):
            list(reader.feed(b"\xc6\x7f\xff\xff\xff" + bytes(2**20)))


def test_the_actor_record_has_carlas_layout():
    layout = struct.Struct("<IB15f3f3?ifB?IB24x")
    fields = (7, 1, *map(float, range(15)), 0.25, -0.5, 0.75, True, False, True, -1, 90.0, 2, True, 12, 3)
    record = np.zeros(1, streaming.ACTOR_STATE)
    groups = (7, 1, (0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11), (12, 13, 14), *fields[17:])
    for name, value in zip(streaming.ACTOR_STATE.names, groups, strict=False):
        record[name] = value
    assert layout.size == streaming.ACTOR_STATE.itemsize == 119
    assert record.tobytes() == layout.pack(*fields)


@given(st.integers(0, 2**32 - 1), st.integers(0, 65535))
def test_a_token_names_stream_and_port(stream, port):
    token = streaming.token(stream, port)
    assert struct.unpack("<IHBB16s", token) == (stream, port, 1, 0, bytes(16))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**63), st.floats(0, 1e6))
def test_an_image_message_holds_header_and_pixels(width, height, frame, stamp):
    pixels = np.arange(width * height * 4, dtype=np.uint8).reshape(height, width, 4)
    place = wire.Transform(wire.Vector3D(1.0, 2.0, 3.0), wire.Rotation(4.0, 5.0, 6.0))
    message = streaming.image(streaming.RGB_CAMERA, frame, stamp, place, 48.0, pixels)
    assert struct.unpack_from("<IQQd6f", message) == (len(message) - 4, 13, frame, stamp, 1, 2, 3, 4, 5, 6)
    assert struct.unpack_from("<IIf", message, 52) == (width, height, 48.0)
    assert message[64:] == pixels.tobytes()
