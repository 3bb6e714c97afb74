"""A recording as a video: pictures with their maps, and what was decided, as the page shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.live.viewer.recorded import Recorded
from carla_digr.saliency.overlay import COLORMAP, colours, overlay

RATE = 20.0  # pictures a second
CODECS = {".mp4": "mp4v", ".webm": "VP80"}
LONGEST_PAUSE = 2.0  # s that a picture is held where the recording has none
BAR = 56  # pixels under the pictures
GAP = 4  # pixels between two of them
LEAST, MOST = 64, 2160  # pixels of a picture's height


def export_video(
    recorded: Recorded,
    out: Path,
    start: float = 0.0,
    duration: float = 0.0,
    height: int = 512,
    opacity: float = 0.8,
    colormap: str = COLORMAP,
    progress: Callable[[float], object] = lambda share: None,
) -> tuple[int, int]:
    """Write a video, which is whole or not there.

    Args:
        recorded: one recording, or two side by side.
        out: the file, .mp4 or .webm.
        start: s of the recording that are left out.
        duration: s of it; 0: to its end.
        height: of the pictures, pixels.
        opacity, colormap: of the maps.
        progress: called with the share that is done.

    Returns:
        Frames that were written, and frames that were left out because their pictures are damaged.

    Raises:
        UserError: no such kind of file can be written, or there is nothing to write.
    """
    if out.suffix not in CODECS:
        raise UserError(f"A video is a file {' or '.join(CODECS)}, not {out.name}.")
    if not LEAST <= height <= MOST:
        raise UserError(f"The height of the video must lie between {LEAST} and {MOST} pixels, not {height}.")
    colours(colormap)  # or there is none
    rows = recorded.rows
    end = start + duration if duration else float("inf")
    chosen = [index for index, row in enumerate(rows) if start <= row["time"] <= end]
    if not chosen:
        raise UserError(f"The recording has no frame from {start:g} s on: it lasts {rows[-1]['time']:.1f} s.")
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    writer, written, damaged, last = None, 0, 0, 0.0
    try:
        for count, index in enumerate(chosen, 1):
            row = rows[index]
            try:
                picture = _picture(recorded, index, height, opacity, colormap)
            except UserError:
                damaged += 1
                continue
            picture = np.vstack([picture, _words(row, picture.shape[1])])
            if writer is None:
                out.parent.mkdir(parents=True, exist_ok=True)
                size = picture.shape[1], picture.shape[0]
                writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*CODECS[out.suffix]), RATE, size)
                if not writer.isOpened():
                    raise UserError(f"Cannot write the video {out}: is its directory writable?")
            elif picture.shape[1::-1] != size:
                picture = cv2.resize(picture, size).astype(np.uint8)
            held = min(row["time"] - last, LONGEST_PAUSE) if written else 1.0 / RATE
            for _ in range(max(1, round(held * RATE))):
                writer.write(picture[..., ::-1])
            written, last = written + 1, row["time"]
            progress(count / len(chosen))
        if writer is None:
            raise UserError(f"All {damaged} pictures are damaged: there is nothing to write.")
        writer.release()
        part.replace(out)
    finally:
        if writer is not None:
            writer.release()
        part.unlink(missing_ok=True)
    return written, damaged


def _picture(recorded: Recorded, index: int, height: int, opacity: float, colormap: str) -> NDArray[np.uint8]:
    """The pictures of a frame beside each other, (H, W, 3) with W even; of a side that lacks it none is black."""
    shown: list[NDArray[np.uint8] | None] = []
    for side in range(len(recorded.sides)):
        try:
            rgb, saliency = recorded.pictures(side, index)
        except LookupError:
            shown.append(None)
            continue
        width = round(rgb.shape[1] * height / rgb.shape[0] / 2) * 2
        picture = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
        if saliency is not None:
            smooth = cv2.resize(saliency, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
            picture = overlay(picture, smooth, opacity, colormap)
        shown.append(picture)
    width = next(picture.shape[1] for picture in shown if picture is not None)
    black, gap = np.zeros((height, width, 3), np.uint8), np.zeros((height, GAP, 3), np.uint8)
    panels = [black if picture is None else picture for picture in shown]
    return np.hstack([part for panel in panels for part in (gap, panel)][1:])


def _words(row: dict, width: int) -> NDArray[np.uint8]:
    """The bar with what was decided, (BAR, W, 3)."""
    bar = np.full((BAR, width, 3), 18, np.uint8)
    decision = row["decisions"][0] or {}
    names, action = decision.get("action_names") or [], decision.get("action", -1)
    decided = ""
    if names and 0 <= action < len(names):
        decided = f"{names[action]} {100 * decision['probabilities'][action]:.0f} %"
    if decision.get("fallback"):
        decided = decision.get("status") or "watchdog braking"
    first = f"{row['time']:7.2f} s   frame {row['frame']}   {decided}"
    scale = min(0.5, width / 1000)
    for line, text in enumerate((first, decision.get("sentence", ""))):
        white = (235, 235, 235) if line == 0 else (170, 180, 190)
        plain = text.encode("ascii", "replace").decode()
        cv2.putText(bar, plain, (8, 22 + 23 * line), cv2.FONT_HERSHEY_SIMPLEX, scale, white, 1, cv2.LINE_AA)
    return bar
