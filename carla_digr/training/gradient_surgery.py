"""PCGrad for two objectives (Yu et al. 2020, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def project_conflicting(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The sum of two gradients, each without its part that opposes the other.

    Where the two point apart (negative inner product over all parameters together), each is projected on the normal
    plane of the other's original; otherwise this is their plain sum.

    Args:
        first: one gradient per parameter.
        second: of the other objective, same shapes.

    Returns:
        New tensors of the same shapes.
    """
    inner = sum((a * b).sum() for a, b in zip(first, second, strict=True))
    assert isinstance(inner, Tensor)
    if inner >= 0:
        return [a + b for a, b in zip(first, second, strict=True)]
    tiny = torch.finfo(inner.dtype).tiny
    first_scale = 1 - inner / sum((a * a).sum() for a in first).clamp(min=tiny)  # type: ignore[union-attr]
    second_scale = 1 - inner / sum((b * b).sum() for b in second).clamp(min=tiny)  # type: ignore[union-attr]
    return [a * first_scale + b * second_scale for a, b in zip(first, second, strict=True)]
