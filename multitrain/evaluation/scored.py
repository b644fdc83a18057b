"""Results of a finished evaluation: scores and metrics by dataset, hardest classes, and most frequent confusions."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitrain.config import ConfigError
from multitrain.config.boundary import understood
from multitrain.records.results import read_results


@dataclass(frozen=True)
class Scored:
    """The test of one dataset: metrics and scores."""

    name: str
    result: Mapping[str, Any]
    """As in ``metrics.json``."""
    labels: np.ndarray
    """int [N], or bool [N, K] for several labels a video."""
    scores: np.ndarray
    """float32 [N, K]."""
    paths: np.ndarray
    """Below the video root, str [N]."""

    @property
    def class_names(self) -> list[str]:
        """Class names by label; numbers where the names are unknown."""
        return self.result.get("class_names") or [str(i) for i in range(self.scores.shape[1])]

    @property
    def chance(self) -> float:
        """Accuracy of always predicting the most frequent class, in percent."""
        frequency = (
            self.labels.mean(0) if self.labels.ndim == 2 else np.bincount(self.labels) / max(len(self.labels), 1)
        )
        return 100 * float(frequency.max(initial=0.0))

    def truth(self, i: int) -> tuple[str, ...]:
        """Names of the true labels of the i-th scored video."""
        own = np.flatnonzero(self.labels[i]) if self.labels.ndim == 2 else [self.labels[i]]
        return tuple(self.class_names[int(k)] for k in own)

    @property
    def confusion(self) -> np.ndarray | None:
        """int [K, K], row = true class; None where videos have several labels."""
        if "confusion" not in self.result:
            return None
        classes = self.scores.shape[1]
        matrix = np.zeros((classes, classes), int)
        for true, predicted, number in self.result["confusion"]:
            matrix[true, predicted] = number
        return matrix

    @property
    def unreadable(self) -> list[Mapping[str, Any]]:
        """Videos that could not be read: ``path`` and ``reason``."""
        return list(self.result.get("unreadable") or ())


class HardClass(NamedTuple):
    """A class with low accuracy."""

    name: str
    videos: int
    right: int
    predicted_as: tuple[tuple[str, int], ...]
    """Predicted wrong classes with counts, the most frequent first."""


def hardest(tested: Scored) -> list[HardClass]:
    """The ten classes with the lowest accuracy, lowest first, each with the three most frequent wrong predictions.

    Of equal accuracy, the class with more videos comes first. Classes without test videos, and those that are always right, are left out.
    """
    matrix = tested.confusion
    if matrix is None:
        return []
    names, totals, right = tested.class_names, matrix.sum(1), matrix.diagonal()
    order = sorted(np.flatnonzero(right < totals), key=lambda k: (right[k] / totals[k], -totals[k], k))
    found = []
    for k in order[:10]:
        row = matrix[k].copy()
        row[k] = 0
        most = [int(o) for o in np.argsort(-row, kind="stable")[:3] if row[o]]
        found.append(HardClass(names[k], int(totals[k]), int(right[k]), tuple((names[o], int(row[o])) for o in most)))
    return found


def confused(tested: Scored, count: int = 10) -> list[tuple[str, str, int, int]]:
    """The most frequent confusions: (true class, predicted class, count, videos of the true class)."""
    matrix = tested.confusion
    if matrix is None:
        return []
    totals = matrix.sum(1)
    wrong = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(i), len(matrix)) for i in order]
    names = tested.class_names
    return [(names[t], names[p], int(wrong[t, p]), int(totals[t])) for t, p in pairs if wrong[t, p]]


def newest_evaluation(run_dir: Path) -> Path | None:
    """The finished test of the newest checkpoint in a run's folder; validation files only where there is no test."""
    found = list((run_dir / "evaluation").glob("update-*/*/metrics.json"))
    order = {"test": 2, "val": 1}
    best = max(found, key=lambda p: (p.parts[-3], order.get(p.parts[-2], 0)), default=None)
    return best.parent if best else None


def read_evaluation(folder: str | Path) -> dict[str, Scored]:
    """The datasets of a finished evaluation that were scored by their own head.

    Raises:
        ConfigError: there is no finished evaluation, or its files are damaged.
    """
    folder = Path(folder)
    own = {name: r for name, r in read_results(folder).items() if r.get("head") == r.get("dataset")}
    return {name: _read_scores(folder / name / "scores.npz", name, result) for name, result in own.items()}


LARGEST = 1 << 30
"""Bytes of the scores of one dataset, unpacked."""


def _read_scores(file: Path, name: str, result: Mapping[str, Any]) -> Scored:
    with understood(f"{file}: damaged", "run `multitrain evaluate` again"):
        with zipfile.ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > LARGEST:
                raise ConfigError(f"{file}: unpacks to more than {LARGEST >> 20} MB; run `multitrain evaluate` again")
        with np.load(file) as arrays:
            labels, scores, paths = arrays["labels"], arrays["scores"], arrays["paths"]
        found = Scored(name, result, labels, scores.astype(np.float32, copy=False), paths.astype(str, copy=False))
        _require_consistent(found)
    return found


def _require_consistent(found: Scored) -> None:
    """Raises ValueError or IndexError when labels, scores, paths and figures are not of the same videos and classes."""
    count, classes = found.scores.shape
    several = found.labels.ndim == 2
    if len(found.labels) != count or len(found.paths) != count or (several and found.labels.shape[1] != classes):
        raise ValueError("labels, scores and paths are not of the same videos")
    if not several and count and not (found.labels.min() >= 0 and found.labels.max() < classes):
        raise ValueError("a label is no class")
    if len(found.class_names) != classes or found.result["videos"] < found.result["scored"] or classes < 1:
        raise ValueError("the figures are of other classes or videos")
    if any(not (0 <= t < classes and 0 <= p < classes and n >= 0) for t, p, n in found.result.get("confusion", ())):
        raise IndexError("a confused class is none")
