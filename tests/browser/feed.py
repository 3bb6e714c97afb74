"""A made-up drive for the browser tests: a moving picture whose every frame can be told by its pixels.

The 16 x 16 patch at the lower left of picture ``frame`` has a flat colour that codes ``frame`` (see `frame_of`), and
survives JPEG compression.
"""

from __future__ import annotations

import time

import numpy as np

from carla_digr.live.viewer.server import ViewerServer

ACTION_NAMES = ["left", "keep", "right", "brake"]
SIZE = 128
PATCH = 16
PATCH_CENTRE = (8, 120)  # x, y


def car_place(frame: int) -> tuple[float, float]:
    """x, y of the car ahead, in pixels."""
    return 64 + 26 * np.sin(frame / 40), 62 + 8 * np.sin(frame / 75)


def picture(frame: int) -> np.ndarray:
    """Road, lane lines and one car, uint8 (128, 128, 3)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    rgb = np.empty((SIZE, SIZE, 3), np.float32)
    rgb[:] = [118, 168, 214]
    below = y > 48
    rgb[below] = [74, 112, 62]
    depth = np.maximum(y - 48, 0.5)
    across = (x - 64) / depth  # lane lines meet in the vanishing point
    rgb[below & (abs(across) < 1.3)] = [82, 84, 90]
    dashes = (200 / depth + frame * 0.5) % 2 < 1
    for line in (-0.65, 0.0, 0.65):
        rgb[below & dashes & (abs(across - line) < 0.03)] = [236, 236, 236]
    rgb[below & (abs(abs(across) - 1.26) < 0.035)] = [240, 200, 60]
    car_x, car_y = car_place(frame)
    rgb[(abs(x - car_x) < 9) & (abs(y - car_y) < 7)] = [188, 32, 38]
    rgb[(abs(x - car_x) < 7) & (abs(y - car_y + 3) < 2.5)] = [30, 40, 56]
    rgb[-PATCH:, :PATCH] = [16 * (frame // 16**digit % 16) + 8 for digit in range(3)]
    return rgb.astype(np.uint8)


def frame_of(pixel: list[int]) -> int:
    """The frame number modulo 4096 that the patch's colour codes."""
    return sum((value // 16) * 16**digit for digit, value in enumerate(pixel[:3]))


def saliency(frame: int) -> np.ndarray:
    """A map with its maximum 1 on the car, and exactly 0 on the patch; float32 (128, 128)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    car_x, car_y = car_place(frame)
    blob = np.exp(-(((x - car_x) / 9) ** 2 + ((y - car_y) / 7) ** 2))
    blob += 0.35 * np.exp(-(((x - 64) / 4) ** 2 + ((y - 100) / 14) ** 2))
    blob[blob < 0.02] = 0
    return (blob / blob.max()).astype(np.float32)


def decision(frame: int, **changes: object) -> dict[str, object]:
    """The decision of a frame, with some of its fields changed."""
    logits = np.array([np.sin(frame / 40) * 2, 2.2, -np.sin(frame / 40) * 2, -1 + np.sin(frame / 23)])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    action = int(probabilities.argmax())
    wave = np.sin(frame * 12.9898) * 43758.5453 % 1
    return {
        "frame": frame,
        "stamp": frame * 0.05,
        "action_names": ACTION_NAMES,
        "probabilities": probabilities.tolist(),
        "action": action,
        "steer": 0.3 * float(np.sin(frame / 40)),
        "throttle": 0.35 + 0.1 * float(np.cos(frame / 60)),
        "brake": 0.0,
        "value": 6.2 + float(np.sin(frame / 50)),
        "policy_hash": "3fa94c17e2b0",
        "map": "Linearised Perturbation of brake",
        "inference_ms": 0.6 + 0.3 * float(wave),
        "saliency_ms": 1.9 + 0.8 * float(wave),
        "latency_ms": 6.0 + 5.0 * float(wave),
        "fallback": False,
        "saliency_flat": False,
        **changes,
    }


def publish(viewer: ViewerServer, frame: int, *, explained: bool = True, **changes: object) -> None:
    """Publish one frame of the drive."""
    viewer.publish(
        frame * 0.05, frame, picture(frame), saliency(frame) if explained else None, decision(frame, **changes)
    )


def drive(viewer: ViewerServer, first: int, count: int, period: float = 0.05) -> None:
    """Publish frames at a steady rate, as a drive does."""
    start = time.monotonic()
    for i in range(count):
        publish(viewer, first + i)
        time.sleep(max(0.0, start + (i + 1) * period - time.monotonic()))
