"""Plots of a run: curves, film strips with predictions, confusion matrices. matplotlib is imported on the first plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from multitrain.plot_style import COLOURS, FAINT, INK, cycle
from multitrain.plot_style import figure as _figure
from multitrain.plot_style import label as _label
from multitrain.plot_style import png as _png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = "#1a7f37", "#cf222e"
POINTS = 600
"""Maximum points of a curve; longer curves are averaged in equal intervals."""
MARKED = 25
"""Maximum number of interruptions whose lines are numbered in the width of a plot; more would overlap."""
LONGEST = 32
"""Maximum length of a class label."""
NAMED = 32
"""Maximum number of classes for which a confusion matrix shows the names."""

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class History:
    """Data of the curves."""

    metrics: Sequence[Mapping[str, Any]]
    """Records of `metrics.jsonl`."""
    validations: Mapping[int, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """By completed updates: results by dataset, in percent."""
    interruptions: Sequence[Mapping[str, Any]] = ()
    """See :func:`multitrain.report.interruptions.interruptions`; numbered from 1 in the pictures."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """By dataset: chance level in percent."""


@dataclass(frozen=True)
class Example:
    """A test video and its predictions."""

    dataset: str
    frames: np.ndarray
    """uint8 [T, H, W, 3]."""
    truth: tuple[str, ...]
    predictions: Mapping[str, Sequence[tuple[str, float]]]
    """By head: (label, probability), best first."""


def curves(history: History) -> bytes:
    """Loss terms, loss by dataset, validation, learning rate, gradient norm, speed, waiting, memory, as PNG."""
    figure, axes = _figure(3, 3, width=13.0, height=9.6)
    panels = axes.ravel()
    terms = {"loss": "total", "loss_classification": "classification", "loss_projection": "projection"}
    _lines(panels[0], "Loss", {label: _curve(history, key) for key, label in terms.items()}, first=INK)
    _lines(panels[1], "Loss of each dataset's own head", _by_dataset(history))
    _lines(panels[2], "Informative loss", {"informative": _curve(history, "loss_informative")})
    _validation(panels[3], history)
    _rate(panels[4], history)
    norm = {"gradient norm": _curve(history, "grad_norm")}
    _lines(panels[5], "Gradient norm, before clipping", norm, first=COLOURS[3])
    _lines(panels[6], "Clips a second", {"": _curve(history, "clips_per_second")}, first=COLOURS[4])
    _waiting(panels[7], history)
    _lines(panels[8], "Memory of rank 0, most so far, GB", {"": _curve(history, "max_memory_gb")}, first=COLOURS[6])
    for axis in (panels[6], panels[7], panels[8]):
        axis.set_ylim(bottom=0)
    last = max((r["update"] + 1 for r in history.metrics), default=1)
    for axis in panels:
        axis.set_xlabel("updates")
        _mark_interruptions(axis, history.interruptions, last)
        axis.set_xlim(0, last * 1.01)
    return _png(figure)


def film_strips(examples: Sequence[Example], heads: Sequence[str]) -> bytes:
    """One row per video: frames, true label, and the best classes of every head, as PNG."""
    rows, shown = len(examples), 6
    figure, axes = _figure(1 + len(heads), rows, width=6.0 + 2.5 * len(heads), height=1.2 * rows + 0.4, ratio=2.6)
    for row, example in enumerate(examples):
        strip = axes[row, 0]
        strip.imshow(_strip(example.frames, shown), interpolation="lanczos", aspect="equal")
        strip.axis("off")
        _title(strip, f"{example.dataset}:  {', '.join(example.truth)}", size=9)
        for column, head in enumerate(heads, 1):
            _bars(axes[row, column], example, head)
            if row == 0:
                axes[row, column].annotate(
                    _label(head),
                    (0, 1),
                    (0, 13),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    weight="bold",
                    size=10,
                )
    return _png(figure)


def confusion(matrices: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]) -> bytes:
    """One confusion matrix per dataset (int [K, K], row = true class), in percent of the row, as PNG."""
    sides = {d: 3.0 + 0.24 * min(len(m), NAMED) for d, m in matrices.items()}
    widths = list(sides.values())
    figure, axes = _figure(len(matrices), 1, width=sum(widths), height=max(widths) * 0.92, widths=widths)
    for axis, (dataset, matrix) in zip(axes[0], matrices.items(), strict=True):
        _matrix(axis, dataset, matrix, names[dataset])
    return _png(figure)


def _matrix(axis: Axes, dataset: str, matrix: np.ndarray, names: Sequence[str]) -> None:
    rows = matrix.sum(1, keepdims=True)
    share = 100 * matrix / np.maximum(rows, 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    _title(axis, dataset)
    axis.grid(visible=False)
    if len(matrix) > NAMED:
        return
    ticks, names = range(len(matrix)), [_label(name) for name in names]
    axis.set_xticks(ticks, names, rotation=40, ha="right", rotation_mode="anchor", size=8)
    axis.set_yticks(ticks, names, size=8)
    for i in ticks:
        for j in ticks:
            if matrix[i, j]:
                colour = "white" if share[i, j] > 55 else INK
                axis.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", size=7, color=colour)


def _validation(axis: Axes, history: History) -> None:
    _title(axis, "Validation top-1, % (dotted: chance)")
    datasets = list(dict.fromkeys(d for results in history.validations.values() for d in results))
    for colour, dataset in zip(cycle(len(datasets)), datasets, strict=True):
        points = [
            (update, results[dataset]["map" if "map" in results[dataset] else "top1"])
            for update, results in sorted(history.validations.items())
            if dataset in results
        ]
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=_label(dataset))
        if dataset in history.chance:
            axis.axhline(history.chance[dataset], color=colour, linestyle=":", linewidth=1)
    axis.set_ylim(0, 102)
    if datasets:
        axis.legend()
    else:
        _nothing(axis, "no validation (eval.every is not set)")


def _rate(axis: Axes, history: History) -> None:
    updates, rate = _curve(history, "lr")
    _title(axis, "Learning rate")
    axis.plot(updates, rate, color=COLOURS[0])
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.set_ylim(bottom=0)


def _waiting(axis: Axes, history: History) -> None:
    """Percentage of the time that the ranks waited for data."""
    updates, share = _curve(history, "data_wait_fraction")
    _lines(axis, "Waiting for data, % of the time", {"": (updates, 100 * share)}, first=COLOURS[5])


def _lines(axis: Axes, title: str, series: Mapping[str, Curve], first: str | None = None) -> None:
    """Faint raw curves under smoothed ones."""
    _title(axis, title)
    drawn = {label: curve for label, curve in series.items() if len(curve[0])}
    colours = [first, *cycle(len(drawn))] if first else cycle(len(drawn))
    for colour, (label, (x, y)) in zip(colours, drawn.items(), strict=False):
        axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
        axis.plot(x, _smooth(y), color=colour, linewidth=1.6, label=_label(label))
    if len(drawn) > 1:
        axis.legend()
    if not drawn:
        _nothing(axis, "not recorded")


def _bars(axis: Axes, example: Example, head: str) -> None:
    best = list(example.predictions.get(head, ()))[:3]
    own = head == example.dataset
    for place, (label, probability) in enumerate(best):
        colour = "#afb8c1"
        if own and place == 0:
            colour = RIGHT if label in example.truth else WRONG
        axis.barh(place, 1.0, color="#f0f2f5", height=0.78)
        axis.barh(place, probability, color=colour, height=0.78, alpha=0.6)
        axis.text(
            0.02,
            place,
            _cut(label),
            va="center",
            size=8.5,
            color=INK,
            weight="bold" if place == 0 and own else "normal",
        )
        axis.text(0.98, place, f"{100 * probability:.0f} %", va="center", ha="right", size=8.5, color=INK)
    axis.set_ylim(2.6, -0.6)
    axis.set_xlim(0, 1)
    axis.axis("off")


def _cut(label: str) -> str:
    return _label(label if len(label) <= LONGEST else label[: LONGEST - 1] + "…")


def _strip(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` evenly spaced frames side by side, white between them."""
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    gap = np.full((chosen.shape[1], max(2, chosen.shape[2] // 32), 3), 255, np.uint8)
    return np.concatenate([part for frame in chosen for part in (frame, gap)][:-1], axis=1)


def _by_dataset(history: History) -> dict[str, Curve]:
    names = list(dict.fromkeys(n for r in history.metrics for n in (r.get("loss_per_dataset") or {})))
    return {name: _curve(history, "loss_per_dataset", name) for name in names}


def _curve(history: History, key: str, name: str | None = None) -> Curve:
    """Completed updates and values of a key, averaged in equal stretches down to :data:`POINTS`."""
    pairs = []
    for record in history.metrics:
        value = record.get(key) if name is None else (record.get(key) or {}).get(name)
        if value is not None:
            pairs.append((record["update"] + 1, value))
    x, y = np.array(pairs, float).reshape(-1, 2).T
    if len(x) <= POINTS:
        return x, y
    cuts = np.linspace(0, len(x), POINTS + 1).astype(int)[:-1]
    counts = np.diff([*cuts, len(x)])
    return np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts


def _smooth(y: np.ndarray) -> np.ndarray:
    """Moving mean over about a thirtieth of the curve."""
    half = max(1, len(y) // 60)
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    start, stop = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (total[stop] - total[start]) / (stop - start)


def _mark_interruptions(axis: Axes, interruptions: Sequence[Mapping[str, Any]], last: int) -> None:
    """Dashed lines, numbered from 1; a number that would lie on the one before it is left out."""
    numbered = -float("inf")
    for number, told in enumerate(interruptions, 1):
        axis.axvline(told["update"], color=INK, linestyle=(0, (2, 3)), linewidth=0.9, alpha=0.6)
        if told["update"] - numbered >= last / MARKED:
            numbered = told["update"]
            axis.annotate(
                str(number),
                (told["update"], 0.985),
                (2, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                size=7,
                color=INK,
                alpha=0.8,
            )


def _title(axis: Axes, text: str, size: float = 10.5) -> None:
    axis.set_title(_label(text), loc="left", size=size, color=INK)


def _nothing(axis: Axes, text: str) -> None:
    axis.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", color=FAINT)
