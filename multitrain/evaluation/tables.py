"""Metrics, tables and result files of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError
from multitrain.config.boundary import understood
from multitrain.config.reading import read_json
from multitrain.evaluation import metrics
from multitrain.evaluation.class_map import ClassMap
from multitrain.evaluation.scoring import Task
from multitrain.evaluation.shards import Scores, ShardReader
from multitrain.files import replace_text, replacing
from multitrain.intervals import FEWEST, RESAMPLES, Interval, bootstrap, proportion
from multitrain.records import jsonl
from multitrain.records.results import FILE, MEASURE_NAMES, MEASURES, checked
from multitrain.text import counted

_log = logging.getLogger(__name__)


def compute_metrics(scores: Scores, labels: Sequence[tuple[int, ...]], *, multi_label: bool) -> dict[str, Any]:
    """Compute the metrics of scored videos.

    Args:
        scores: float32 [n, K].
        labels: true labels of each of the n videos.
        multi_label: mean average precision instead of per-class accuracy and confusion.

    Returns:
        ``top1`` and ``top5`` in percent (a video counts when any true label is among the best); for one label a video
        ``mean_class_accuracy`` in percent, ``per_class`` (percent by label, null without videos) and ``confusion``
        (triples true label, predicted label, count); with several, ``map`` in percent. ``intervals``: lower and upper end of
        the 95 % interval of each of them, in percent (see :mod:`multitrain.intervals`); none without videos.
    """
    hits = {f"top{k}": metrics.topk_hits(scores, labels, k) for k in (1, 5)}
    out: dict[str, Any] = {
        name: _percent(float(hit.mean()) if len(hit) else float("nan")) for name, hit in hits.items()
    }
    if not len(scores):
        out["intervals"] = {}
    else:
        ends = {name: proportion(int(hit.sum()), len(hit)) for name, hit in hits.items()}
        ends |= _bootstrapped(scores, labels, multi_label=multi_label)
        out["intervals"] = {n: [100 * low, 100 * high] for n, (low, high) in ends.items() if not np.isnan(low)}
    if multi_label:
        return out | {"map": _percent(metrics.mean_average_precision(scores, labels))}
    per_class = metrics.per_class_accuracy(scores, labels)
    matrix = metrics.confusion_matrix(scores, labels)
    seen = per_class[~np.isnan(per_class)]
    return out | {
        "mean_class_accuracy": _percent(float(seen.mean()) if len(seen) else float("nan")),
        "per_class": [_percent(float(a)) for a in per_class],
        "confusion": [[int(t), int(p), int(matrix[t, p])] for t, p in zip(*np.nonzero(matrix))],
    }


def _bootstrapped(scores: Scores, labels: Sequence[tuple[int, ...]], *, multi_label: bool) -> dict[str, Interval]:
    """The intervals of the measures that are no proportions."""
    if not multi_label:
        measure = metrics.resampled_class_accuracy(scores, labels)
        return {"mean_class_accuracy": bootstrap(measure, len(scores))}
    affordable = LARGEST_BOOTSTRAP // max(scores.size, 1)
    resamples = min(RESAMPLES, max(FEWEST, affordable))
    return {"map": bootstrap(metrics.resampled_average_precision(scores, labels), len(scores), resamples)}


LARGEST_BOOTSTRAP = 300_000_000
"""Scores that the bootstrap of a mean average precision reads in all: a few seconds."""


def average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Unweighted means of top-1 and top-5 over the single-label datasets that have them by their own head, in percent."""
    out: dict[str, float | None] = {}
    for measure in ("top1", "top5"):
        counted = (r for r in results.values() if "map" not in r and "measured" not in r)
        values = [r[measure] for r in counted if r.get(measure) is not None]
        out[measure] = float(np.mean(values)) if values else None
    return out


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results in one line, top-1/top-5 in percent (mAP for several labels a video), and videos scored/listed.

    E.g. ``kinetics 84.7/96.5 (19796/19796) | mit 41.4/69.5 (33900/33900) | average 63.0/83.0``.
    """
    cells = [f"{name} {_measured(r)} ({_counts(r)})" for name, r in results.items()]
    if sum(r.get("top1") is not None and "map" not in r and "measured" not in r for r in results.values()) > 1:
        cells.append(f"average {_pair(average(results))}")
    return " | ".join(cells)


def interval_lines(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The 95 % intervals of a test's accuracies, one line a dataset; empty without any."""
    lines = []
    for name, result in results.items():
        known = [(m, result["intervals"][m]) for m in MEASURES if (result.get("intervals") or {}).get(m)]
        shown = [f"{MEASURE_NAMES[m]} {low:.1f}–{high:.1f}" for m, (low, high) in known]
        if shown:
            lines.append(
                f"{name}: {', '.join(shown)} (95 % interval, {counted(result.get('measured', result['scored']), 'video')})"
            )
    return "\n".join(lines)


def combine(
    folder: Path, results: Mapping[str, dict[str, Any]], order: Sequence[str], header: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """`results`, and what other evaluations of the same weights, split and precision left in `folder`, in `order`."""
    found = dict(results)
    for file in sorted(folder.glob(f"*/{FILE}")):
        with understood(f"{file}: holds values that no test writes", "move it away"):
            other = checked(read_json(file))
        if all(other.get(key) == header[key] for key in ("weights", "split", "precision")):
            found.setdefault(file.parent.name, other)
    place = {name: position for position, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: (place.get(item[1]["dataset"], len(place)), item[0])))


def require_own(folder: Path, keys: Sequence[str]) -> None:
    """Raises ConfigError when `folder` holds a file in the way that was not written by an evaluation."""
    for inside in (folder, *(folder / key for key in keys)):
        file = inside / FILE
        if inside.is_symlink() and inside != folder:
            raise ConfigError(f"{inside}: is a link, which is not followed; choose another --out")
        if not (file.exists() or file.is_symlink()):
            others = [n for n in ("table.txt", "scores.npz", "confusion.png") if (inside / n).exists()]
            begun = (inside / "shards").is_dir() or any(inside.glob("*/shards"))  # an evaluation that was cut short
            if others and not begun:
                raise ConfigError(f"{inside / others[0]}: no evaluation wrote it; choose another --out")
            continue
        if not _is_own(file):
            raise ConfigError(f"{file}: no evaluation wrote it; choose another --out")


def _is_own(file: Path) -> bool:
    """Whether an evaluation wrote a ``metrics.json``."""
    try:
        return not file.is_symlink() and bool({"datasets", "weights"} & set(read_json(file)))
    except (ConfigError, TypeError):
        return False


def write_combined(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """``metrics.json`` and ``table.txt`` of all datasets of an evaluation."""
    text = table(results)
    write_json(folder / "metrics.json", {"datasets": results, "average": average(results), "table": text})
    replace_text(folder / "table.txt", text + "\n")


def merge(
    task: Task, shards: ShardReader, header: Mapping[str, Any], folder: Path, class_map: ClassMap | None = None
) -> dict[str, Any]:
    """Writes ``scores.npz``, ``metrics.json`` and ``confusion.png`` of one dataset; returns the content of the second.

    With a `class_map`, the metrics are those of the mapped scores, on the videos whose classes are covered.
    """
    catalog = task.catalog
    scored = sorted(shards.scores)
    scores = np.stack([shards.scores[i] for i in scored]) if scored else np.zeros((0, header["classes"]), np.float32)
    labels = [catalog.labels(i) for i in scored]
    unreadable = [shards.unreadable[i] for i in sorted(shards.unreadable)]
    result: dict[str, Any] = {
        "dataset": task.name,
        "head": task.head,
        "split": header["split"],
        "videos": len(catalog),
        "scored": len(scored),
        "coverage": len(scored) / len(catalog),
        "views": header["views"],
        "precision": header["precision"],
        "weights": header["weights"],
        "class_names": catalog.class_names,
        "unreadable": unreadable,
        "top1": None,
        "top5": None,
    }
    if task.head == task.name:
        result |= compute_metrics(scores, labels, multi_label=catalog.multi_label)
    elif class_map is not None:
        measured = class_map.measured(labels)
        result |= class_map.describe(catalog.class_names, int(measured.sum()))
        known = [row for row, counts in zip(labels, measured) if counts]
        result |= compute_metrics(class_map.scores(scores[measured]), known, multi_label=catalog.multi_label)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "index": np.array(scored, np.int64),
        "scores": scores,
        "paths": np.array([catalog.relative_path(i) for i in scored]),
    }
    arrays["labels"] = (
        metrics.multi_hot(labels, catalog.classes)
        if catalog.multi_label
        else np.array([v[0] for v in labels], np.int64)
    )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "scores.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    if result.get("confusion") and class_map is None:
        _draw_confusion(folder / "confusion.png", task.name, scores, labels, catalog.class_names)
    write_json(folder / "metrics.json", result)
    return result


def _draw_confusion(
    path: Path, dataset: str, scores: Scores, labels: Sequence[tuple[int, ...]], names: Sequence[str] | None
) -> None:
    """The confusion matrix as a PNG; without matplotlib a warning is logged instead."""
    from multitrain.evaluation import pictures

    matrix = metrics.confusion_matrix(scores, labels)
    shown = list(names) if names else [str(label) for label in range(len(matrix))]
    try:
        picture = pictures.confusion({dataset: matrix}, {dataset: shown})
    except ConfigError as error:
        _log.warning("%s not drawn: %s", path, error)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(picture)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, jsonl.dumps(value, indent=1) + "\n")


def _percent(fraction: float) -> float | None:
    return None if np.isnan(fraction) else 100 * float(fraction)


def _measured(result: Mapping[str, Any]) -> str:
    return _pair(result) if result.get("map") is None else f"mAP {result['map']:.1f}"


def _counts(result: Mapping[str, Any]) -> str:
    covered = f", {result['measured']} of a mapped class" if "measured" in result else ""
    return f"{result['scored']}/{result['videos']}{covered}"


def _pair(result: Mapping[str, Any]) -> str:
    pair = [result.get(m) for m in ("top1", "top5")]
    return "/".join("–" if v is None else f"{v:.1f}" for v in pair)
