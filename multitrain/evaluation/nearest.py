"""Nearest classes of other datasets for each class, from the learned projections.

A projection maps the logits of one dataset to those of another, ẑ_b = W_ab z_a. Its entry (j, i) is the weight with which class i
of a predicts class j of b. Rows are standardised to z-scores, because their scales differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multitrain.config import ConfigError, nearest
from multitrain.model import MultiTrain
from multitrain.plot_style import figure, label, png

SHOWN = 40
"""Maximum number of classes per axis of a heat map."""


@dataclass(frozen=True)
class Match:
    """A class of the source and its match in the target."""

    source: str
    target: str
    source_class: int
    target_class: int
    weight: float
    """The projection's entry."""
    score: float
    """The entry in standard deviations from the mean of its row."""


def affinity(model: MultiTrain, source: str, target: str) -> tuple[np.ndarray, np.ndarray]:
    """The projection from `source` to `target` and its z-scores by row, both float64 [K_target, K_source].

    Raises:
        ConfigError: no such dataset, or a model without projections.
    """
    for name in (source, target):
        if name not in model.datasets:
            raise ConfigError(f"{name!r} is no dataset of this model; {nearest(name, model.datasets)}")
    if model.projections is None:
        raise ConfigError(
            "this model has no projections (one dataset, or model.projections=false); train several jointly"
        )
    if source == target:
        raise ConfigError(f"{source!r} twice; classes are compared across datasets")
    weight = model.projections.of(source).of(target).weight.detach().double().cpu().numpy()
    spread = weight.std(1, keepdims=True)
    return weight, (weight - weight.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)


def matches(model: MultiTrain, source: str, target: str, top: int) -> list[Match]:
    """The `top` nearest classes of `target` for every class of `source`, by z-score, the strongest pairs first.

    Raises:
        ConfigError: as :func:`affinity`.
    """
    weight, score = affinity(model, source, target)
    best = np.argsort(-score, axis=0, kind="stable")[:top]
    found = [
        Match(source, target, i, int(j), float(weight[j, i]), float(score[j, i]))
        for i in range(score.shape[1])
        for j in best[:, i]
    ]
    return sorted(found, key=lambda m: -m.score)


def heat_map(model: MultiTrain, pairs: Sequence[tuple[str, str]], names: dict[str, list[str]]) -> bytes:
    """One heat map of z-scores per pair (source, target), as PNG: the classes with the strongest matches, matches on the diagonal."""
    sides = [(affinity(model, a, b)[1], a, b) for a, b in pairs]
    sizes = [(min(s.shape[0], SHOWN), min(s.shape[1], SHOWN)) for s, _, _ in sides]
    widths = [4.0 + 0.22 * columns for _, columns in sizes]
    height = 2.8 + 0.2 * max(rows for rows, _ in sizes)
    drawn, axes = figure(len(sides), 1, width=sum(widths), height=height, widths=widths)
    for axis, (score, a, b), (rows, columns) in zip(axes[0], sides, sizes):
        sources = np.argsort(-score.max(0), kind="stable")[:columns]
        targets = list(dict.fromkeys(int(score[:, i].argmax()) for i in sources))
        targets += [int(j) for j in np.argsort(-score[:, sources].max(1), kind="stable") if int(j) not in targets]
        targets = targets[:rows]
        limit = max(float(np.abs(score).max()), 1e-9)
        shown = axis.imshow(score[targets][:, sources], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_xticks(range(columns), [_short(names[a][i]) for i in sources], rotation=60, ha="right", size=7)
        axis.set_yticks(range(len(targets)), [_short(names[b][j]) for j in targets], size=7)
        axis.grid(visible=False)
        axis.set_title(label(f"{a} → {b}"), loc="left", size=10)
        axis.set_xlabel(label(f"classes of {a}"))
        axis.set_ylabel(label(f"classes of {b}"))
        drawn.colorbar(shown, ax=axis, pad=0.02).set_label("standard deviations above the mean weight", size=8)
    return png(drawn)


def _short(name: str) -> str:
    return label(name if len(name) <= 32 else name[:31] + "…")
