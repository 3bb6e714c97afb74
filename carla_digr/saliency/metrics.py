"""Scores of saliency maps where the important pixels are known: the columns of the paper's Table 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SaliencyScores:
    """Means over states.

    Attributes:
        important: sum of the normalised map over important pixels.
        unimportant: sum over unimportant pixels.
        auc: probability that an important pixel has more saliency than an unimportant one, ties counting half.
    """

    important: float
    unimportant: float
    auc: float


def score(maps: NDArray[np.float32], importance: NDArray[np.int8]) -> SaliencyScores:
    """Score normalised maps.

    Args:
        maps: float (B, H, W) in [0, 1].
        importance: int8 (B, H, W): 1 important, 0 unimportant, -1 not counted.

    Raises:
        ValueError: shapes differ, or a state lacks one of the two kinds of pixels.
    """
    if maps.shape != importance.shape:
        raise ValueError(f"maps {maps.shape} and importance {importance.shape} differ in shape")
    aucs = [auc(m[i == 1], m[i == 0]) for m, i in zip(maps, importance, strict=True)]
    per_state = (1, 2)
    return SaliencyScores(
        important=float((maps * (importance == 1)).sum(axis=per_state).mean()),
        unimportant=float((maps * (importance == 0)).sum(axis=per_state).mean()),
        auc=float(np.mean(aucs)),
    )


def auc(positive: NDArray, negative: NDArray) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counting half.

    Raises:
        ValueError: one of the two is empty.
    """
    if not len(positive) or not len(negative):
        raise ValueError("the AUC needs important and unimportant pixels")
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    up_to = np.searchsorted(ordered, positive, side="right")
    return float((below + up_to).mean() / 2 / len(negative))
