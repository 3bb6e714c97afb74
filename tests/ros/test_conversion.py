"""Image messages and arrays: exact both ways, against an independent reading of sensor_msgs/Image."""

from __future__ import annotations

import struct

import live_support
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

live_support.workspace()

import rclpy  # noqa: E402
from carla_digr_msgs.msg import Vehicle, Vehicles  # noqa: E402
from carla_digr_ros import conversion, topics  # noqa: E402
from carla_digr_ros.receiving import Receiver, subscribe  # noqa: E402
from rclpy.serialization import deserialize_message, serialize_message  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

# sensor_msgs/Image and image_encodings.hpp, written down once more: struct code of an element, channels.
DOCUMENTED = {
    "rgb8": ("B", 3),
    "bgr8": ("B", 3),
    "rgba8": ("B", 4),
    "bgra8": ("B", 4),
    "mono8": ("B", 1),
    "8UC1": ("B", 1),
    "8UC3": ("B", 3),
    "8UC4": ("B", 4),
    "mono16": ("H", 1),
    "rgb16": ("H", 3),
    "bgr16": ("H", 3),
    "rgba16": ("H", 4),
    "bgra16": ("H", 4),
    "16UC1": ("H", 1),
    "32FC1": ("f", 1),
}


def element(message: Image, row: int, column: int, channel: int) -> float:
    """One value of a picture, read as the message's documentation says."""
    code, channels = DOCUMENTED[message.encoding]
    size = struct.calcsize(code)
    start = row * message.step + (column * channels + channel) * size
    order = ">" if message.is_bigendian else "<"
    return struct.unpack(order + code, bytes(message.data[start : start + size]))[0]


@st.composite
def messages(draw):
    """Any valid image message: every encoding, padded rows, both byte orders."""
    encoding = draw(st.sampled_from(sorted(DOCUMENTED)))
    code, channels = DOCUMENTED[encoding]
    height, width, padding = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(0, 9))
    big = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = width * channels
    numbers = random.integers(0, 256, (height, count)) if code != "f" else random.normal(size=(height, count))
    rows = [
        struct.pack((">" if big else "<") + str(count) + code, *(row if code == "f" else map(int, row)))
        + random.bytes(padding)
        for row in numbers
    ]
    return Image(
        height=height, width=width, encoding=encoding, is_bigendian=big, step=len(rows[0]), data=b"".join(rows)
    )


@given(messages())
def test_arrays_hold_what_the_message_documents(message):
    array = conversion.to_array(deserialize_message(serialize_message(message), Image))
    code, channels = DOCUMENTED[message.encoding]
    assert array.shape == (message.height, message.width, *((channels,) if channels > 1 else ()))
    assert array.dtype == {"B": np.uint8, "H": np.uint16, "f": np.float32}[code]
    assert array.flags.c_contiguous and array.flags.writeable
    for place in np.ndindex(message.height, message.width, channels):
        value = array[place] if channels > 1 else array[place[:2]]
        assert value == element(message, *place)


@given(messages())
def test_there_and_back_is_exact(message):
    array = conversion.to_array(message)
    header = Header(frame_id="camera")
    again = conversion.to_message(array, message.encoding, header)
    assert (again.height, again.width, again.encoding) == (message.height, message.width, message.encoding)
    assert again.step * again.height == len(again.data)
    assert again.header == header
    np.testing.assert_array_equal(conversion.to_array(again), array)


@given(messages())
def test_colour_pictures_become_rgb(message):
    if message.encoding == "32FC1":
        with pytest.raises(ValueError, match="is not one of rgb8"):
            conversion.to_rgb(message)
        return
    rgb = conversion.to_rgb(message)
    code, channels = DOCUMENTED[message.encoding]
    order = "rgb" if message.encoding.startswith("rgb") else "bgr"  # without a name as cv_bridge shows them
    for row, column in np.ndindex(message.height, message.width):
        for channel, name in enumerate("rgb"):
            value = element(message, row, column, order.index(name) if channels > 1 else 0)
            assert rgb[row, column, channel] == (value if code == "B" else round(value / 257))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoding": "nv21"}, "nv21"),
        ({"encoding": ""}, "''"),
        ({"step": 5}, "step 5"),
        ({"height": 3}, "does not fit its 12 bytes"),
        ({"data": b""}, "does not fit its 0 bytes"),
    ],
)
def test_messages_that_contradict_themselves_are_refused(change, match):
    fields = {"height": 2, "width": 2, "encoding": "rgb8", "step": 6, "data": bytes(12), **change}
    with pytest.raises(ValueError, match=match):
        conversion.to_array(Image(**fields))


@pytest.mark.parametrize(
    ("shape", "dtype", "encoding"),
    [
        ((4, 4), np.uint8, "rgb8"),
        ((4, 4, 3), np.float32, "rgb8"),
        ((4, 4, 4), np.uint8, "rgb8"),
        ((4, 4), float, "32FC1"),
    ],
)
def test_arrays_that_do_not_fit_the_encoding_are_refused(shape, dtype, encoding):
    with pytest.raises(ValueError, match=encoding):
        conversion.to_message(np.zeros(shape, dtype), encoding, Header())


def test_of_more_than_a_topics_largest_message_nothing_is_read(observe, domain):
    """Thousands of vehicles take longer to read than a decision may take."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    node, receiver, heard = rclpy.create_node("hearer", context=context), Receiver(context=context), []
    receiver.add_node(node)
    subscribe(node, topics.VEHICLES, heard.append)
    observer = observe()
    out = topics.VEHICLES.publisher(observer.node)
    observer.until(lambda: out.get_subscription_count() == 1)
    for count in (2000, 300):
        out.publish(Vehicles(vehicles=[Vehicle(type="vehicle.mercedes.coupe_2020")] * count))
    live_support.until(lambda: bool(heard), lambda: receiver.spin_once(timeout_sec=0.1))
    assert [len(message.vehicles) for message in heard] == [300]
    assert "bytes, more than 32,768" in receiver.refusal
    rclpy.shutdown(context=context)
