"""One frame as bytes for the page; the format is in the docstring of server.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg

JPEG_QUALITY = 95  # 4:4:4, about 6 kB for a 128 x 128 picture


def encode(header: Mapping[str, Any], rgb: np.ndarray, saliency: np.ndarray | None) -> bytes:
    """A frame's message.

    Args:
        header: JSON-ready; the length of the picture is added.
        rgb: uint8 (H, W, 3).
        saliency: floating point (h, w) in [0, 1] (values outside are clipped), or None.
    """
    jpeg = simplejpeg.encode_jpeg(rgb, JPEG_QUALITY, "RGB", "444")
    grey = b""
    if saliency is not None:
        grey = np.rint(np.clip(saliency, 0.0, 1.0) * 255.0).astype(np.uint8).tobytes()
    text = json.dumps({**header, "jpeg_bytes": len(jpeg)}, separators=(",", ":")).encode()
    return b"".join((len(text).to_bytes(4, "little"), text, jpeg, grey))


def plain(value: Any) -> Any:
    """A copy of ``value`` in JSON's types; numpy scalars and arrays become numbers and lists, NaN and infinity None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):  # the slow question last: an hour's recording has two million values
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value]
