"""Metrics from scores and labels, with numpy. Tie rules are fixed, so that a metric never depends on the order of the videos.

`scores` are ``float [N, K]``, larger is better. `labels` are one integer a video (``int [N]``) or, with several true
labels a video, a sequence of tuples of integers. All figures are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from multitrain.intervals import Weights

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.ArrayLike | Sequence[tuple[int, ...]]


def ranking(scores: Scores, k: int) -> npt.NDArray[np.int64]:
    """The `k` best classes of every row, best first: ``int64 [N, min(k, K)]``. Equal scores: the lower class first. NaN: last."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


def multi_hot(labels: Labels, classes: int) -> npt.NDArray[np.bool_]:
    """Labels as ``bool [N, classes]``.

    Raises:
        ValueError: a label outside ``0 … classes-1``.
    """
    rows = [(row,) if np.ndim(row) == 0 else tuple(row) for row in labels]  # type: ignore[arg-type, union-attr]
    hot = np.zeros((len(rows), classes), dtype=np.bool_)
    for i, row in enumerate(rows):
        for label in row:
            if not 0 <= int(label) < classes:
                raise ValueError(f"label {label} of row {i} is not in 0..{classes - 1}")
            hot[i, int(label)] = True
    return hot


def topk_hits(scores: Scores, labels: Labels, k: int) -> npt.NDArray[np.bool_]:
    """Whether any true label is among the `k` best classes: ``bool [N]``. A row that holds a NaN is never a hit."""
    scores = np.asarray(scores)
    truth = multi_hot(labels, scores.shape[1])
    hit = np.take_along_axis(truth, ranking(scores, k), axis=1).any(axis=1)
    return np.asarray(hit & ~np.isnan(scores).any(axis=1))


def topk_accuracy(scores: Scores, labels: Labels, k: int = 1) -> float:
    """Fraction of rows with a true label among the `k` best classes; NaN without rows."""
    hits = topk_hits(scores, labels, k)
    return float(hits.mean()) if len(hits) else float("nan")


def confusion_matrix(scores: Scores, labels: Labels) -> npt.NDArray[np.int64]:
    """Counts ``int64 [K, K]``: row = true label, column = best class. For one label a video.

    Raises:
        ValueError: a video with no or several labels.
    """
    scores = np.asarray(scores)
    classes = scores.shape[1]
    truth = multi_hot(labels, classes)
    if not (truth.sum(axis=1) == 1).all():
        raise ValueError("a confusion matrix needs exactly one label a video; use mean_average_precision for several")
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (truth.argmax(axis=1), ranking(scores, 1)[:, 0]), 1)
    return matrix


def per_class_accuracy(scores: Scores, labels: Labels) -> npt.NDArray[np.float64]:
    """Top-1 accuracy of the videos of each class: ``float64 [K]``; NaN for a class without videos."""
    matrix = confusion_matrix(scores, labels)
    count = matrix.sum(axis=1)
    return np.divide(np.diag(matrix), count, out=np.full(len(count), np.nan), where=count > 0)


def average_precision(scores: Scores, truth: npt.ArrayLike) -> float:
    """Average precision of one class: sum over distinct score thresholds of (recall gained) × precision.

    Videos of equal score enter together, so their order does not matter. NaN without a positive.

    Args:
        scores: ``float [N]``; NaN ranks last.
        truth: ``bool [N]``.
    """
    scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores))
    positive = np.asarray(truth, dtype=bool)
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    ends = _threshold_ends(scores[order])
    precision = found[ends] / (ends + 1)
    gained = np.diff(found[ends], prepend=0) / found[-1]
    return float((gained * precision).sum())


def _threshold_ends(ranked: Scores) -> npt.NDArray[np.int64]:
    """The last place of each distinct value in sorted scores."""
    return np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)


def mean_average_precision(scores: Scores, labels: Labels) -> float:
    """Mean of :func:`average_precision` over the classes that have a positive; NaN when none has."""
    scores = np.asarray(scores)
    truth = multi_hot(labels, scores.shape[1])
    present = [average_precision(scores[:, c], truth[:, c]) for c in np.flatnonzero(truth.any(axis=0))]
    return float(np.mean(present)) if present else float("nan")


def resampled_class_accuracy(scores: Scores, labels: Labels) -> Callable[[Weights], float]:
    """The mean of :func:`per_class_accuracy` as a function of how often each video counts, for a bootstrap."""
    scores = np.asarray(scores)
    truth = multi_hot(labels, scores.shape[1]).argmax(axis=1)
    hit = ranking(scores, 1)[:, 0] == truth

    def measure(weights: Weights) -> float:
        counted = np.bincount(truth, weights, scores.shape[1])
        right = np.bincount(truth, weights * hit, scores.shape[1])
        return float((right[counted > 0] / counted[counted > 0]).mean()) if counted.any() else float("nan")

    return measure


def resampled_average_precision(scores: Scores, labels: Labels) -> Callable[[Weights], float]:
    """:func:`mean_average_precision` as a function of how often each video counts, for a bootstrap."""
    scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores))
    truth = multi_hot(labels, scores.shape[1])
    ranked = []
    for c in np.flatnonzero(truth.any(axis=0)):
        order = np.argsort(-scores[:, c], kind="stable")
        ranked.append((order, truth[order, c], _threshold_ends(scores[order, c])))

    def measure(weights: Weights) -> float:
        values = []
        for order, positive, ends in ranked:
            counted = weights[order]
            found, seen = np.cumsum(counted * positive)[ends], np.cumsum(counted)[ends]
            if found[-1]:
                precision = found / np.maximum(seen, 1)
                values.append(float((np.diff(found, prepend=0) / found[-1] * precision).sum()))
        return float(np.mean(values)) if values else float("nan")

    return measure
