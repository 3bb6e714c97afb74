"""The saliency methods as the tables compare them, and how long a map takes by each."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from carla_digr.errors import UserError
from carla_digr.policy import Policy, device_under
from carla_digr.saliency import METHODS
from carla_digr.saliency.methods import Method
from carla_digr.saliency.perturbation import Perturbation

GAUSSIAN_BLUR, SARFA, DIGR, LINEAR = (METHODS[key].title for key in ("gb", "sarfa", "digr", "linear"))
DIGR_LINEAR = f"{DIGR}, linearised"
OF_THE_STUDENT = (DIGR, DIGR_LINEAR)


@dataclass(frozen=True)
class MapOf:
    """A method's map of one policy: states float (B, C, H, W) in [0, 1] -> raw maps float (B, H, W).

    Attributes:
        perturbation: of the methods that perturb.
    """

    method: Method
    policy: Policy
    perturbation: Perturbation

    def __call__(self, states: Tensor) -> Tensor:
        """The raw maps, made where the policy's weights are."""
        found = self.method(self.policy, states.to(device_under(self.policy)), perturbation=self.perturbation)
        return found.to(states.device)

    @property
    def slow(self) -> bool:
        """It takes twenty passes through the network or more: scored on fewer states."""
        return self.method.speed == "slow"


def saliency_methods(
    teacher: Policy, student: Policy, perturbation: Perturbation
) -> tuple[dict[str, MapOf], dict[str, str]]:
    """Every method that can explain its policy: two explain the student, the others the teacher.

    Of the student there are eq. 2's map, DIGR, and the linearised map, DIGR_LINEAR.

    Returns:
        The methods by title; and by title, or by name where its package cannot be loaded, why one is left out.
    """
    methods, left_out = {}, {}
    for name in METHODS:
        title = name
        try:
            method = METHODS[name]
            title, policy = method.title, student if method.student else teacher
            found = MapOf(method, policy, perturbation)
            method.check(policy)
            if method.needs == "layers":  # it may have some that the method does not know
                found(torch.full((1, *policy.input_shape), 0.5))
        except UserError as error:
            left_out[title] = str(error)
        else:
            methods[title] = found
    if LINEAR in methods:
        methods[DIGR_LINEAR] = replace(methods[LINEAR], policy=student)
    return methods, left_out


def milliseconds_per_map(method: MapOf, state: Tensor, repeats: int = 21) -> tuple[float, float]:
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
