"""What a policy's outputs mean: the distribution of the action, its divergence and its metric.

Saliency asks three things of a distribution: how far a changed decision is from the present one (the Kullback-Leibler
divergence of eq. 3), the same of a change of the outputs however small, and which functions of the outputs a gradient
method explains. A ``target`` narrows all three to one action, or to one dimension of a continuous action.

| output | the network gives, float (B, K) | action |
|---|---|---|
| ``logits`` | A logits | one of A |
| ``q_values`` | A action values, read as the logits of a Boltzmann policy at temperature 1 | one of A |
| ``gaussian`` | D means, then D log standard deviations | (D,) |
| ``squashed_gaussian`` | the same before a tanh, which changes neither divergence nor metric | (D,) in [-1, 1] |
| ``deterministic`` | D values; as a Gaussian of standard deviation 1 | (D,) |
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_CHANGE = 80.0  # of a logit; e to it is still a number in float32
NEARLY_NOTHING = 1e-6  # its square's third order is beyond float32's digits


class Distribution(Protocol):
    """What saliency asks of a policy's outputs."""

    discrete: bool

    def outputs(self, actions: int) -> int:
        """K, how many numbers the network gives for ``actions`` actions or dimensions."""

    def divergence(self, p: Tensor, q: Tensor, target: int | None = None) -> Tensor:
        """KL(p || q) of outputs float (..., K): (...), not negative. With a target, of that action or dimension."""

    def divergence_after(self, outputs: Tensor, change: Tensor, target: int | None = None) -> Tensor:
        """``divergence`` of the outputs from outputs + change, with all digits however small either is.

        Args:
            outputs, change: float (..., K), broadcastable with each other.

        Returns:
            float (...), not negative.
        """

    def explained(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """The functions of outputs (B, K) that gradient methods explain: (B, F)."""

    def gradients(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """Derivatives of ``explained`` by the outputs, without cancellation in float32: (B, F, K)."""

    def importance(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """What a squared attribution to each of the F functions counts: (B, F); see ``combined``."""


class Categorical:
    """One of A actions, by logits.

    Without a target the explained function is f = sum_a pi_a^2 / 2, whose gradient is eq. 2. With a target it is the
    log-odds of that action, z_a - log sum_{b != a} exp z_b, and the divergence is between "a" and "not a".
    """

    discrete = True

    def outputs(self, actions: int) -> int:
        """A."""
        return actions

    def divergence(self, p: Tensor, q: Tensor, target: int | None = None) -> Tensor:
        """KL of the two categorical distributions, or of the two events "the target is chosen"."""
        if target is not None:
            p, q = _binary(p, target), _binary(q, target)
        return kl_divergence(p, q)

    def divergence_after(self, outputs: Tensor, change: Tensor, target: int | None = None) -> Tensor:
        """log E_pi[e^c] - E_pi[c], c the change less that of the preferred action."""
        pi = outputs.softmax(dim=-1)
        if target is None:
            preferred = outputs.argmax(dim=-1, keepdim=True).expand(*change.shape[:-1], 1)
            return divergence_of_others(
                pi.scatter(-1, outputs.argmax(dim=-1, keepdim=True), 0.0), change - change.gather(-1, preferred)
            )
        relative = (_others(change, target) - change[..., target, None]).clamp(max=MOST_CHANGE)
        log_odds = torch.log1p((_others(outputs, target).softmax(dim=-1) * torch.expm1(relative)).sum(dim=-1))
        chosen, left = pi[..., target].expand_as(log_odds), _sum_of_others(pi, target).expand_as(log_odds)
        rare = chosen < left
        return divergence_of_others(
            torch.where(rare, chosen, left)[..., None], torch.where(rare, -log_odds, log_odds)[..., None]
        )

    def explained(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """(B, 1)."""
        if target is None:
            return outputs.softmax(dim=1).square().sum(dim=1, keepdim=True) / 2
        binary = _binary(outputs, target)
        return binary[:, :1] - binary[:, 1:]

    def gradients(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """(B, 1, A)."""
        weights = eq2_weights(outputs) if target is None else _log_odds_gradient(outputs, target)
        return weights[:, None]

    def importance(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """1: there is one function."""
        return torch.ones_like(outputs[:, :1])


class DiagonalGaussian:
    """A continuous action of D independent dimensions: D means and D log standard deviations.

    The explained functions are the outputs themselves; their attributions are combined in the Fisher metric, which is
    1 / sigma^2 for a mean and 2 for a log standard deviation. A target is one dimension's mean. Squashing the action by
    tanh is a bijection, so that divergence and metric stay what they are.
    """

    discrete = False

    def outputs(self, actions: int) -> int:
        """2 D."""
        return 2 * actions

    def divergence(self, p: Tensor, q: Tensor, target: int | None = None) -> Tensor:
        """Sum over the dimensions of log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2."""
        (m_p, l_p), (m_q, l_q) = p.chunk(2, dim=-1), q.chunk(2, dim=-1)
        ratio = 2 * (l_p - l_q)
        each = (torch.expm1(ratio) - ratio + (m_p - m_q).square() * (-2 * l_q).exp()) / 2
        return (each.sum(dim=-1) if target is None else each[..., target]).clamp(min=0)

    def divergence_after(self, outputs: Tensor, change: Tensor, target: int | None = None) -> Tensor:
        """As ``divergence`` has it."""
        log_sigma = outputs.chunk(2, dim=-1)[1]
        of_mean, of_log = change.chunk(2, dim=-1)
        of_log = of_log.clamp(-MOST_CHANGE / 4, MOST_CHANGE / 4)
        ratio = -2 * of_log
        of_sigma = _beyond_first_order(ratio).to(change.dtype)
        each = (of_sigma + of_mean.square() * (-2 * (log_sigma + of_log)).exp()) / 2
        return each.sum(dim=-1) if target is None else each[..., target]

    def explained(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """(B, 2 D), or (B, 1) with a target."""
        return outputs if target is None else outputs[:, target, None]

    def gradients(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """Rows of the identity."""
        return _identity_rows(outputs, target)

    def importance(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """1 / sigma^2 of the means, 2 of the log standard deviations."""
        log_sigma = outputs.chunk(2, dim=-1)[1]
        diagonal = torch.cat([(-2 * log_sigma).exp(), torch.full_like(log_sigma, 2.0)], dim=1)
        return diagonal if target is None else diagonal[:, target, None]


class Deterministic:
    """A continuous action of D values without a spread; read as a Gaussian of standard deviation 1 about them."""

    discrete = False

    def outputs(self, actions: int) -> int:
        """D."""
        return actions

    def divergence(self, p: Tensor, q: Tensor, target: int | None = None) -> Tensor:
        """Half the squared distance."""
        return self.divergence_after(p, q - p, target)

    def divergence_after(self, outputs: Tensor, change: Tensor, target: int | None = None) -> Tensor:
        """Half the squared length of the change."""
        squares = change.square() / 2
        return squares.sum(dim=-1) if target is None else squares[..., target]

    def explained(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """(B, D), or (B, 1) with a target."""
        return outputs if target is None else outputs[:, target, None]

    def gradients(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """Rows of the identity."""
        return _identity_rows(outputs, target)

    def importance(self, outputs: Tensor, target: int | None = None) -> Tensor:
        """1."""
        return torch.ones_like(self.explained(outputs, target))


DISTRIBUTIONS: dict[str, Distribution] = {
    "logits": Categorical(),
    "q_values": Categorical(),
    "gaussian": DiagonalGaussian(),
    "squashed_gaussian": DiagonalGaussian(),
    "deterministic": Deterministic(),
}


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of categorical distributions given as logits (..., A): (...), not negative."""
    log_p, log_q = logits_p.log_softmax(dim=-1), logits_q.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)


def divergence_of_others(pi: Tensor, change: Tensor) -> Tensor:
    """KL(p || q) where all outcomes but one have their logits changed, with all digits however small it is.

    Args:
        pi: float (..., K), the probabilities of those others before; best if the one that stays is the likeliest.
        change: float (..., K), of their logits; broadcastable with ``pi``.

    Returns:
        float (...), not negative.
    """
    pi, exact = pi.double(), change.double().clamp(max=MOST_CHANGE)
    mean = (pi * exact).sum(dim=-1)
    if _nearly_nothing(exact):
        divergence = ((pi * exact.square()).sum(dim=-1) - mean.square()) / 2
    else:
        divergence = torch.log1p((pi * torch.expm1(exact)).sum(dim=-1)) - mean
    return divergence.clamp(min=0).to(change.dtype)


def _beyond_first_order(x: Tensor) -> Tensor:
    """e^x - 1 - x, in float64, which has the digits for the difference unless all of x is next to nothing."""
    x = x.double()
    return x.square() / 2 if _nearly_nothing(x) else torch.expm1(x).sub_(x)


def _nearly_nothing(x: Tensor) -> bool:
    return float(x.abs().amax()) < NEARLY_NOTHING


def combined(importance: Tensor, attributions: Tensor) -> Tensor:
    """Attributions to F functions as one map, sqrt(sum_f importance_f attribution_f^2).

    Args:
        importance: float (B, F).
        attributions: float (B, F, C, H, W).

    Returns:
        float (B, C, H, W), not negative; the absolute value where F is 1 and its importance 1.
    """
    if attributions.shape[1] == 1:
        return attributions[:, 0].abs() * importance[:, 0, None, None, None].sqrt()
    return torch.einsum("bf,bfchw->bchw", importance, attributions.square()).sqrt()


def eq2_weights(logits: Tensor) -> Tensor:
    """The weights c of the logits' gradients in eq. 2: sum_a pi_a d pi_a = sum_b c_b d z_b.

    c_b = sum_a pi_a pi_b (pi_b - pi_a). Eq. 2's own sum cancels in float32 when one probability is nearly 1; in this
    form the difference is between two probabilities, and no small result comes from large terms.

    Args:
        logits: float (B, A).

    Returns:
        float (B, A), differentiable.
    """
    pi = logits.softmax(dim=1)
    difference = pi[:, :, None] - pi[:, None, :]  # [b, a] = pi_b - pi_a
    return pi * (difference * pi[:, None, :]).sum(dim=2)


def _others(logits: Tensor, target: int) -> Tensor:
    """Logits with the target's at minus infinity."""
    mask = F.one_hot(torch.tensor(target, device=logits.device), logits.shape[-1]).bool()
    return logits.masked_fill(mask, -torch.inf)


def _binary(logits: Tensor, target: int) -> Tensor:
    """Logits of the event "target" and its contrary: float (..., 2)."""
    return torch.stack([logits[..., target], _others(logits, target).logsumexp(dim=-1)], dim=-1)


def _log_odds_gradient(logits: Tensor, target: int) -> Tensor:
    """d(log-odds of the target) / d logits = onehot - softmax over the others: float (..., A)."""
    onehot = F.one_hot(torch.tensor(target, device=logits.device), logits.shape[-1]).to(logits.dtype)
    return onehot - _others(logits, target).softmax(dim=-1)


def _sum_of_others(pi: Tensor, target: int) -> Tensor:
    """1 - pi_target, which keeps its digits where pi_target is nearly 1."""
    return torch.cat([pi[..., :target], pi[..., target + 1 :]], dim=-1).sum(dim=-1)


def _identity_rows(outputs: Tensor, target: int | None) -> Tensor:
    rows = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    rows = rows if target is None else rows[target, None]
    return rows.expand(len(outputs), *rows.shape)
