"""Scores of saliency maps: against the important pixels where they are known, and against other maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SaliencyScores:
    """The columns of the paper's Table 1, means over states.

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


def class_shares(maps: NDArray[np.float32], classes: NDArray[np.int8], count: int) -> NDArray[np.float64]:
    """Share of each map's mass on each class of pixels: float (B, count), NaN for a map of zeros.

    Args:
        maps: float (B, H, W), not negative.
        classes: int8 (B, H, W) in [0, count).
    """
    mass = [np.bincount(c.ravel(), m.ravel(), count) for m, c in zip(maps, classes, strict=True)]
    return _ratio(np.stack(mass), maps.sum(axis=(1, 2), dtype=np.float64)[:, None])


def important_share(maps: NDArray[np.float32], importance: NDArray[np.int8]) -> NDArray[np.float64]:
    """Share of each map's counted mass that lies on important pixels: float (B,), NaN where there is no such mass.

    Args:
        importance: int8 (B, H, W) as for ``score``.
    """
    mass = (maps * (importance == 1)).sum(axis=(1, 2), dtype=np.float64)
    return _ratio(mass, (maps * (importance >= 0)).sum(axis=(1, 2), dtype=np.float64))


def pointing_game(maps: NDArray[np.float32], importance: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Whether the largest value among counted pixels is on an important one (Zhang et al. 2018): bool (B,).

    The first of several largest ones is taken; a map of zeros points nowhere.
    """
    counted = np.where(importance >= 0, maps, -1).reshape(len(maps), -1)
    at = counted.argmax(axis=1)
    rows = np.arange(len(maps))
    return (importance.reshape(len(maps), -1)[rows, at] == 1) & (counted[rows, at] > 0)


def widened(importance: NDArray[np.int8], margin: int) -> NDArray[np.int8]:
    """``importance`` with everything within ``margin`` pixels of an important pixel important too, int8 (B, H, W)."""
    if margin == 0:
        return importance
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1, 2 * margin + 1))
    return np.stack([np.where(cv2.dilate((i == 1).astype(np.uint8), disc) == 1, np.int8(1), i) for i in importance])


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each pair of maps, ties at their mean rank: float (B,), NaN for a constant map."""
    result = []
    for a, b in zip(first, second, strict=True):
        a, b = (rank - rank.mean() for rank in (_ranks(a), _ranks(b)))
        result.append(_ratio((a * b).sum(), np.sqrt((a * a).sum() * (b * b).sum())))
    return np.array(result)


def overlap(first: NDArray[np.float32], second: NDArray[np.float32], threshold: float) -> NDArray[np.float64]:
    """Pixels above the threshold in both maps over those above it in either: float (B,), NaN where there are none."""
    above, other = first > threshold, second > threshold
    return _ratio((above & other).sum(axis=(1, 2)), (above | other).sum(axis=(1, 2)))


def _ranks(values: NDArray) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole in float64, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, np.asarray(part, np.float64) / whole, np.nan)
