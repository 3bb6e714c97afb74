"""Every saliency method of the paper by its name in `carla_digr.saliency.METHODS`."""

from __future__ import annotations

from torch import Tensor

from carla_digr.policy import ActorCritic
from carla_digr.saliency.gradient import vanilla_gradient
from carla_digr.saliency.perturbation import Perturbation, perturbation_maps, sarfa_maps


def raw_maps(method: str, policy: ActorCritic, states: Tensor, perturbation: Perturbation) -> Tensor:
    """Maps of states by a method; the same input gives the same bytes.

    Args:
        method: a key of `carla_digr.saliency.METHODS`.
        policy: the policy to explain.
        states: float (B, C, H, W) in [0, 1], no inference tensor.
        perturbation: settings of the methods ``gb`` and ``sarfa``.

    Returns:
        float (B, H, W), not negative, not normalised.

    Raises:
        KeyError: there is no such method.
    """
    if method in ("digr", "vg"):
        return vanilla_gradient(policy, states)
    if method == "gb":
        return perturbation_maps(policy, states, perturbation)
    if method == "sarfa":
        return sarfa_maps(policy, states, perturbation)
    from carla_digr.saliency import baselines  # captum, which the drive itself does without

    return {
        "gbp": baselines.guided_backpropagation,
        "gradcam": baselines.grad_cam,
        "ig": baselines.integrated_gradients,
        "smoothgrad": baselines.smooth_grad,
    }[method](policy, states)
