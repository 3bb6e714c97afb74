"""The paper's eight saliency methods as its tables compare them, and how long a map takes by each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from carla_digr.policy import Policy
from carla_digr.saliency import METHODS
from carla_digr.saliency.perturbation import Perturbation

Method = Callable[[Tensor], Tensor]  # states float (B, C, H, W) in [0, 1] -> raw maps float (B, H, W)

GAUSSIAN_BLUR = "Gaussian-Blur Perturbation"

# Names of Table 1, in its order, and of ``saliency.METHODS``.
NAMES = {
    "Vanilla Gradient": "vg",
    "Guided Backpropagation": "gbp",
    "Grad-CAM": "gradcam",
    "SmoothGrad": "smoothgrad",
    "Integrated Gradients": "ig",
    GAUSSIAN_BLUR: "gb",
    "SARFA": "sarfa",
    "DIGR": "digr",
}
# Those that take twenty passes through the network or more for one map.
SLOW = ("SmoothGrad", "Integrated Gradients", GAUSSIAN_BLUR, "SARFA")


def saliency_methods(teacher: Policy, student: Policy, perturbation: Perturbation) -> dict[str, Method]:
    """The methods by their names in Table 1: seven on the teacher, and eq. 2 on the student as DIGR."""
    return {
        name: partial(METHODS[key], student if name == "DIGR" else teacher, perturbation=perturbation)
        for name, key in NAMES.items()
    }


def milliseconds_per_map(method: Method, state: Tensor, repeats: int = 21) -> tuple[float, float]:
    """Time by the clock of the map of one state, float (1, C, H, W).

    Returns:
        Median over ``repeats`` calls after a first one, and standard deviation by the median absolute deviation, which
        the machine's other work does not move; ms.
    """
    method(state)
    times = np.zeros(repeats)
    for i in range(repeats):
        start = time.perf_counter()
        method(state)
        times[i] = (time.perf_counter() - start) * 1e3
    median = np.median(times)
    return float(median), float(1.4826 * np.median(np.abs(times - median)))
