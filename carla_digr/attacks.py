"""Attacks on a policy's picture: what Figure 8 measures robustness against, and uniform noise as their reference.

Each takes (policy, states, epsilon, generator) and returns states that differ by at most ``epsilon`` in each channel of
each pixel and stay in [0, 1]; epsilon is a number, or float (B, 1, 1, 1), one a state. The gradient is that of the
attacked policy. FGSM, PGD and MI-FGSM raise -log pi(a*|s) of the action a* that the policy prefers on the clean state;
MAD raises KL(pi(s) || pi(s')).

torchattacks 3.5 and foolbox 3.3 have the first three on classifiers, but not MAD, and they differentiate the
cross-entropy by autograd, whose p - 1 is exactly 0 in float32 on a confident policy, so that confidence would pass for
robustness. They would also bring torchvision, or GitPython and eagerpy. Here all four are a page on the closed-form
input gradient that the saliency maps use already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from carla_digr.distributions import DISTRIBUTIONS
from carla_digr.errors import UserError
from carla_digr.policy import Policy
from carla_digr.saliency.gradient import balanced, weighted_gradient

Attack = Callable[[Policy, Tensor, float | Tensor, torch.Generator], Tensor]
STEPS = 10  # of the iterated attacks


def noise(policy: Policy, states: Tensor, epsilon: float | Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise of the same size; it knows nothing of the policy."""
    offsets = torch.rand(states.shape, generator=generator).to(states).mul_(2).sub_(1)
    return offsets.mul_(epsilon).add_(states).clamp_(*_bounds(states, epsilon))


def fgsm(policy: Policy, states: Tensor, epsilon: float | Tensor, generator: torch.Generator) -> Tensor:
    """Goodfellow et al. 2015, on policies Huang et al. 2017: one step of the gradient's sign."""
    action = _preferred(policy, states)
    gradient = _loss_gradient(policy, states, action)
    return gradient.sign_().mul_(epsilon).add_(states).clamp_(*_bounds(states, epsilon))


def pgd(policy: Policy, states: Tensor, epsilon: float | Tensor, generator: torch.Generator) -> Tensor:
    """Madry et al. 2018: a random start and projected steps of the sign."""
    action = _preferred(policy, states)
    attacked = noise(policy, states, epsilon, generator)
    bounds, step = _bounds(states, epsilon), 2.5 * epsilon / STEPS
    for _ in range(STEPS):
        gradient = _loss_gradient(policy, attacked, action)
        attacked = gradient.sign_().mul_(step).add_(attacked).clamp_(*bounds)
    return attacked


def mi_fgsm(policy: Policy, states: Tensor, epsilon: float | Tensor, generator: torch.Generator) -> Tensor:
    """Dong et al. 2018: steps along an accumulated gradient (decay 1), each normalised to a mean size of 1."""
    action = _preferred(policy, states)
    attacked, momentum = states, torch.zeros_like(states)
    bounds, step = _bounds(states, epsilon), epsilon / STEPS
    for _ in range(STEPS):
        gradient = _loss_gradient(policy, attacked, action)
        size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        momentum += gradient.div_(torch.where(size > 0, size, torch.ones_like(size)))
        attacked = momentum.sign().mul_(step).add_(attacked).clamp_(*bounds)
    return attacked


def mad(policy: Policy, states: Tensor, epsilon: float | Tensor, generator: torch.Generator) -> Tensor:
    """Zhang et al. 2020, maximal action difference: raise KL(pi(s) || pi(s')) from a random start.

    The start matters: at s' = s the divergence has its minimum and no gradient.
    """
    action = _preferred(policy, states)
    with torch.no_grad():
        clean = policy(states)[0].softmax(dim=1)
        attacked = noise(policy, states, epsilon, generator)
    bounds, step = _bounds(states, epsilon), 2.5 * epsilon / STEPS
    for _ in range(STEPS):
        gradient = weighted_gradient(policy, attacked, lambda logits: balanced(logits.softmax(dim=1) - clean, action))
        attacked = gradient.sign_().mul_(step).add_(attacked).clamp_(*bounds)
    return attacked


ATTACKS: dict[str, Attack] = {"FGSM": fgsm, "PGD": pgd, "MI-FGSM": mi_fgsm, "MAD": mad}


def _preferred(policy: Policy, states: Tensor) -> Tensor:
    """The most probable action as one-hot rows, float (B, A).

    Raises:
        UserError: the policy is continuous.
    """
    if not DISTRIBUTIONS[policy.output].discrete:
        raise UserError("Attacks are on the choice between actions, and this policy is continuous.")
    with torch.no_grad():
        logits = policy(states)[0]
    return F.one_hot(logits.argmax(dim=1), policy.actions).to(states.dtype)


def _loss_gradient(policy: Policy, states: Tensor, action: Tensor) -> Tensor:
    """d(-log pi(action)) / d s, float (B, C, H, W)."""
    return weighted_gradient(policy, states, lambda logits: balanced(logits.softmax(dim=1), action))


def _bounds(states: Tensor, epsilon: float | Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest that each value of the states may become."""
    return (states - epsilon).clamp_(min=0), (states + epsilon).clamp_(max=1)
