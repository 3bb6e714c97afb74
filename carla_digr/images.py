"""Image messages as numpy arrays, exact for any row stride and byte order, of rclpy's messages as of rosbags'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Encoding(NamedTuple):
    """Element type and channels of an image encoding."""

    dtype: type[np.generic]
    channels: int


ENCODINGS = {
    "rgb8": Encoding(np.uint8, 3),
    "bgr8": Encoding(np.uint8, 3),
    "rgba8": Encoding(np.uint8, 4),
    "bgra8": Encoding(np.uint8, 4),
    "mono8": Encoding(np.uint8, 1),
    "16UC1": Encoding(np.uint16, 1),
    "32FC1": Encoding(np.float32, 1),
}
RGB_CHANNELS = {"rgb8": [0, 1, 2], "rgba8": [0, 1, 2], "bgr8": [2, 1, 0], "bgra8": [2, 1, 0]}


def check(message: Any) -> int:
    """The bytes of a row that are picture, not padding.

    Raises:
        ValueError: the encoding is not in ENCODINGS, or step or the amount of data do not fit the size.
    """
    if message.encoding not in ENCODINGS:
        raise ValueError(f"image encoding {message.encoding!r} is not one of {', '.join(ENCODINGS)}")
    dtype, channels = ENCODINGS[message.encoding]
    used = message.width * channels * np.dtype(dtype).itemsize
    if message.step < used or len(message.data) != message.step * message.height:
        raise ValueError(
            f"{message.encoding} image of {message.width}x{message.height} with step {message.step} does not fit "
            f"its {len(message.data)} bytes"
        )
    return used


def to_array(message: Any) -> NDArray:
    """The picture as (H, W, channels), or (H, W) for one channel, native byte order, contiguous and writable.

    Args:
        message: with the fields of sensor_msgs/Image; ``data`` is anything with a buffer of bytes.

    Raises:
        ValueError: as `check`.
    """
    used = check(message)
    dtype, channels = ENCODINGS[message.encoding]
    stored = np.dtype(dtype).newbyteorder(">" if message.is_bigendian else "<")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    image = np.ascontiguousarray(rows[:, :used]).view(stored).astype(dtype)
    return image if channels == 1 else image.reshape(message.height, message.width, channels)


def to_rgb(message: Any, decode: Callable[[Any], NDArray] = to_array) -> NDArray[np.uint8]:
    """A colour picture as (H, W, 3) uint8 RGB.

    Raises:
        ValueError: not a colour encoding of 8 bits, or damaged.
    """
    if message.encoding not in RGB_CHANNELS:
        raise ValueError(f"image encoding {message.encoding!r} is not one of {', '.join(RGB_CHANNELS)}")
    image = decode(message)
    channels = RGB_CHANNELS[message.encoding]
    return image if image.shape[2] == 3 and channels == [0, 1, 2] else np.ascontiguousarray(image[..., channels])
