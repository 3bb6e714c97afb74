"""Image messages as numpy arrays, exact for any row stride and byte order, of rclpy's messages as of rosbags'; pictures
of any camera as RGB, by cv_bridge's rules, also compressed ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from carla_digr.errors import UserError

MAX_PIXELS = 1 << 25  # of one picture
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # how their files begin


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
    "8UC1": Encoding(np.uint8, 1),
    "8UC3": Encoding(np.uint8, 3),
    "8UC4": Encoding(np.uint8, 4),
    "rgb16": Encoding(np.uint16, 3),
    "bgr16": Encoding(np.uint16, 3),
    "rgba16": Encoding(np.uint16, 4),
    "bgra16": Encoding(np.uint16, 4),
    "mono16": Encoding(np.uint16, 1),
    "16UC1": Encoding(np.uint16, 1),
    "32FC1": Encoding(np.float32, 1),
    **{name: Encoding(np.uint8, 2) for name in ("uyvy", "yuv422", "yuyv", "yuv422_yuy2")},
    **{f"bayer_{order}8": Encoding(np.uint8, 1) for order in ("rggb", "bggr", "gbrg", "grbg")},
    **{f"bayer_{order}16": Encoding(np.uint16, 1) for order in ("rggb", "bggr", "gbrg", "grbg")},
}
# Those without a name of their own are grey or blue, green, red, as cv_bridge shows them.
RGB_CHANNELS = {
    **{name: [0, 1, 2] for name in ("rgb8", "rgba8", "rgb16", "rgba16")},
    **{name: [2, 1, 0] for name in ("bgr8", "bgra8", "bgr16", "bgra16", "8UC3", "8UC4")},
    **{name: [0, 0, 0] for name in ("mono8", "8UC1", "mono16", "16UC1")},
}
# Encodings that OpenCV takes apart, with the names of its codes. Of a Bayer pattern it names the second row's middle.
OPENCV_CODES = {
    **dict.fromkeys(("uyvy", "yuv422"), "COLOR_YUV2RGB_UYVY"),
    **dict.fromkeys(("yuyv", "yuv422_yuy2"), "COLOR_YUV2RGB_YUY2"),
    **dict.fromkeys(("bayer_rggb8", "bayer_rggb16"), "COLOR_BayerBG2RGB"),
    **dict.fromkeys(("bayer_bggr8", "bayer_bggr16"), "COLOR_BayerRG2RGB"),
    **dict.fromkeys(("bayer_gbrg8", "bayer_gbrg16"), "COLOR_BayerGR2RGB"),
    **dict.fromkeys(("bayer_grbg8", "bayer_grbg16"), "COLOR_BayerGB2RGB"),
}


def check(message: Any) -> int:
    """The bytes of a row that are picture, not padding.

    Raises:
        ValueError: the encoding is not in ENCODINGS, step or the amount of data do not fit the size, or there is no
            pixel in it, or too many.
    """
    if message.encoding not in ENCODINGS:
        raise ValueError(f"image encoding {message.encoding[:20]!r} is not one of {', '.join(ENCODINGS)}")
    if not 0 < message.width * message.height <= MAX_PIXELS:
        raise ValueError(f"an image of {message.width}x{message.height} pixels is empty or too large")
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
    """A picture as (H, W, 3) uint8 RGB: grey and 16-bit ones too, Bayer and YUV 4:2:2, JPEG and PNG.

    Args:
        message: with the fields of sensor_msgs/Image or sensor_msgs/CompressedImage.
        decode: as `to_array`.

    Raises:
        ValueError: it is of another encoding, such as 32FC1, or damaged.
    """
    if not hasattr(message, "encoding"):
        return decompressed(bytes(message.data))
    if message.encoding not in (*RGB_CHANNELS, *OPENCV_CODES):
        known = ", ".join((*RGB_CHANNELS, *OPENCV_CODES))
        raise ValueError(f"image encoding {message.encoding[:20]!r} is not one of {known}")
    image = decode(message)
    if message.encoding in OPENCV_CODES:
        import cv2

        try:
            image = cv2.cvtColor(image, getattr(cv2, OPENCV_CODES[message.encoding]))
        except cv2.error as error:
            raise ValueError(f"{message.encoding} image of {message.width}x{message.height} is too small") from error
        channels = [0, 1, 2]
    else:
        channels = RGB_CHANNELS[message.encoding]
    if image.dtype == np.uint16:
        deep, image = image, np.empty(image.shape, np.uint8)
        for row, into in zip(deep, image, strict=True):  # by rows, for they take four times the memory meanwhile
            into[...] = np.rint(row * (255.0 / 65535.0))
    if image.ndim == 2:
        image = image[..., None]
    return image if image.shape[2] == 3 and channels == [0, 1, 2] else np.ascontiguousarray(image[..., channels])


def decompressed(data: bytes) -> NDArray[np.uint8]:
    """A PNG or JPEG file's picture, uint8 (H, W, 3) RGB; deeper than 8 bits, it is scaled.

    Raises:
        ValueError: it is neither, damaged, or too large.
    """
    if data[:8] == PNG and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
    elif data[:2] == JPEG:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
    else:
        raise ValueError("the file is no PNG or JPEG picture")
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"a picture of {width} x {height} is too large")
    if data[:2] == JPEG:
        return simplejpeg.decode_jpeg(data, "RGB")
    import cv2

    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("the file is damaged")
    return np.ascontiguousarray(picture[..., ::-1], np.uint8)


class Crop(NamedTuple):
    """A part of a picture: its first column and row, its width and height, pixels."""

    x: int
    y: int
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Crop | None:
        """ "x,y,w,h"; None of an empty text.

        Raises:
            UserError: it is nothing of the kind.
        """
        if not text:
            return None
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 4 or not all(part.isdecimal() and len(part) < 7 for part in parts) or "0" in parts[2:]:
            raise UserError(f"A crop is x,y,w,h in pixels, such as 160,0,480,480, not {text!r}.")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def of(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The part of a picture (H, W, C), or (H, W).

        Raises:
            ValueError: the picture is smaller than that.
        """
        height, width = picture.shape[:2]
        if self.x + self.width > width or self.y + self.height > height:
            raise ValueError(f"a picture of {width}x{height} has no crop {self}")
        return np.ascontiguousarray(picture[self.y : self.y + self.height, self.x : self.x + self.width])
