"""A saliency map laid over its picture."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError

COLORMAPS = {
    "inferno": cv2.COLORMAP_INFERNO,
    "turbo": cv2.COLORMAP_TURBO,
    "hot": cv2.COLORMAP_HOT,
    "viridis": cv2.COLORMAP_VIRIDIS,
}
COLORMAP = "inferno"  # where none is chosen


def overlay(
    picture: NDArray[np.uint8], saliency: NDArray[np.float32], opacity: float = 0.8, colormap: str = COLORMAP
) -> NDArray[np.uint8]:
    """Blend the map's colours into the picture, each pixel by its saliency, so that the rest stays visible.

    Args:
        picture: uint8 (H, W) or (H, W, C), shown as `rgb_of` has it: RGB, grey, or the newest picture of a stack.
        saliency: float (H, W) in [0, 1]; values outside are clipped.
        opacity: of a pixel of saliency 1, in [0, 1].
        colormap: one of COLORMAPS.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the shapes do not belong together, or the picture is none of uint8.
        UserError: no such colormap.
    """
    fits = picture.ndim in (2, 3) and picture.shape[:2] == saliency.shape and picture.dtype == np.uint8
    if not fits or 0 in picture.shape:
        raise ValueError(
            f"picture {picture.dtype} {picture.shape} and saliency {saliency.shape} differ in size or are not uint8 "
            f"(H, W) or (H, W, C) and (H, W)"
        )
    rgb = picture[..., None] if picture.ndim == 2 else picture
    rgb = rgb[..., _shown(rgb.shape[2])]
    keep, add = _tables(round(opacity * 255), colormap)
    level = np.clip(saliency * np.float32(255), 0, 255).astype(np.uint8)
    blended = rgb * keep[level][..., None]
    blended += add[level]
    blended >>= 8
    return blended.astype(np.uint8)


def rgb_of(states: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """States uint8 (N, C, H, W) as pictures (N, H, W, 3).

    3 channels are RGB and multiples of 3 a stack of such pictures; any other number is a stack of grey ones. Of a stack
    it is the last, the newest.
    """
    return states[:, _shown(states.shape[1])].transpose(0, 2, 3, 1)


def _shown(channels: int) -> list[int] | slice:
    """The three channels to show."""
    return slice(channels - 3, channels) if channels % 3 == 0 else [-1, -1, -1]


def colours(colormap: str) -> NDArray[np.uint8]:
    """The colours of saliency levels 0..255, RGB, uint8 (256, 3).

    Raises:
        UserError: no such colormap.
    """
    if colormap not in COLORMAPS:
        raise UserError(f"There is no colormap '{colormap}'; choose one of {', '.join(COLORMAPS)}.")
    levels = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(levels, COLORMAPS[colormap])[:, 0, ::-1].astype(np.uint8)


@lru_cache(maxsize=64)
def _tables(opacity: int, colormap: str) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Per saliency level 0..255: what the picture keeps (256 = all), uint16 (256,); the colour added times 256."""
    levels = np.arange(256)
    alpha = np.rint(levels * min(max(opacity, 0), 255) / 255 / 255 * 256).astype(np.uint16)
    return 256 - alpha, colours(colormap).astype(np.uint16) * alpha[:, None]
