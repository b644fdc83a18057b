"""Statistics of a run's datasets: sizes, class balance, durations, frame rates, and the samples that the mixture draws from each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from multitrain.config import DatasetConfig, RunConfig
from multitrain.data.catalog import Catalog, open_catalogs, plan_of
from multitrain.data.decode import VideoError, open_video
from multitrain.data.tools.check import SPLITS
from multitrain.order import Plan
from multitrain.plot_style import cycle, figure, label, png
from multitrain.text import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COUNTED = 2_000_000
"""Maximum number of samples whose draws are counted; of a longer epoch, only the first updates are counted."""


@dataclass(frozen=True)
class Lengths:
    """Durations and frame rates of a sample of a dataset's videos."""

    seconds: np.ndarray
    """float64 [N]."""
    fps: np.ndarray
    """float64 [N]."""
    short_sides: np.ndarray
    """int64 [N], pixels."""
    of: int
    """Number of videos examined, including unreadable ones."""


def balance(labels: np.ndarray, classes: int) -> dict[str, Any]:
    """Class balance of `labels`, int64 [N] or bool [N, K].

    Returns:
        ``empty``: number of classes without a video; ``smallest``, ``median``, ``largest``: videos per class; ``effective``: the
        number of equally large classes with the same entropy; ``counts``: videos by label.
    """
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)
    share = counts[counts > 0] / counts.sum()
    return {
        "empty": int((counts == 0).sum()),
        "smallest": int(counts.min()),
        "median": float(np.median(counts)),
        "largest": int(counts.max()),
        "effective": float(math.exp(-(share * np.log(share)).sum())),
        "counts": counts.tolist(),
    }


def lengths(catalog: Catalog, sample: int, scans: Mapping[str, Mapping[str, Any]]) -> Lengths:
    """Lengths of `sample` videos spread evenly over the catalog, from `scans` of `data check` by file, else from the files."""
    chosen = np.unique(np.linspace(0, len(catalog) - 1, min(sample, len(catalog))).round().astype(int))
    rows = []
    for number in chosen:
        path = catalog.path(int(number))
        scan = scans.get(str(path))
        try:
            rows.append(_looked_up(scan) if scan and "error" not in scan else _read(path))
        except VideoError:
            continue
    seconds, fps, sides = (np.array(column, float) for column in zip(*rows)) if rows else (np.zeros(0),) * 3
    return Lengths(seconds, fps, sides.astype(np.int64), len(chosen))


def _looked_up(scan: Mapping[str, Any]) -> tuple[float, float, int]:
    return scan["frames"] / scan["fps"], scan["fps"], min(scan["width"], scan["height"])


def _read(path: Path) -> tuple[float, float, int]:
    with open_video(path, timeout=60) as video:
        return video.duration, video.fps, min(video.frames([0]).shape[1:3])


def draws(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """The samples that the run draws from each dataset, counted in its sampling plan.

    Returns:
        ``updates`` of the run, and by dataset: ``share`` of the samples, samples ``per_update``, ``passes`` (epochs) over its videos in the
        run.
    """
    updates = config.updates or plan.updates(config.epochs)
    whole = min(updates, max(1, _COUNTED // plan.effective_batch))
    counts = np.zeros(len(plan.sources), np.int64)
    for first in range(0, whole, 256):
        span = plan.samples(first * plan.effective_batch, min(first + 256, whole) * plan.effective_batch)
        counts += np.bincount(span["dataset"], minlength=len(counts))
    share = counts / counts.sum()
    total = updates * plan.effective_batch
    return {
        "updates": updates,
        "datasets": {
            s.name: {
                "share": float(p),
                "per_update": float(p * plan.effective_batch),
                "passes": float(p * total / s.size),
            }
            for s, p in zip(plan.sources, share)
        },
    }


def collect(
    config: RunConfig, index: Path, sample: int, scans: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Lengths]]:
    """(all statistics of a run's datasets, the measured lengths by dataset). Raises CatalogError."""
    train = open_catalogs(config.data, "train", index)
    found: dict[str, Any] = {"datasets": {}, "mixture": draws(config, plan_of(config, train))}
    measured = {}
    for name, dataset in config.data.datasets.items():
        catalog = train[name]
        measured[name] = lengths(catalog, sample, scans)
        found["datasets"][name] = {
            "videos": {"train": len(catalog), **_others(dataset, name, index)},
            "classes": catalog.classes,
            "balance": balance(catalog.label_array(), catalog.classes),
            **_summary(measured[name]),
        }
    return found, measured


def _others(dataset: DatasetConfig, name: str, index: Path) -> dict[str, int]:
    there = [s for s in SPLITS[1:] if (Path(dataset.annotations) / f"{s}.csv").is_file()]
    return {split: len(Catalog.open(dataset, name, split, index)) for split in there}  # type: ignore[arg-type]


def _summary(found: Lengths) -> dict[str, Any]:
    def spread(values: np.ndarray) -> list[float] | None:
        return [float(v) for v in np.percentile(values, [5, 50, 95])] if len(values) else None

    return {
        "looked_at": found.of,
        "unreadable": found.of - len(found.seconds),
        "seconds": spread(found.seconds),
        "fps": spread(found.fps),
        "short_side": spread(found.short_sides),
    }


def text(found: Mapping[str, Any]) -> str:
    """The statistics as text tables."""
    header = [
        "dataset",
        "train",
        "val",
        "test",
        "classes",
        "without video",
        "videos a class",
        "like",
        "seconds",
        "fps",
        "short side",
    ]
    rows = []
    for name, d in found["datasets"].items():
        b = d["balance"]
        sizes = [str(d["videos"].get(split, "-")) for split in SPLITS]
        per_class = f"{b['smallest']}–{b['median']:g}–{b['largest']}"
        rows.append([name, *sizes, str(d["classes"]), str(b["empty"]), per_class, f"{b['effective']:.0f} even"])
        rows[-1] += [_range(d["seconds"], ".1f"), _range(d["fps"], ".3g"), _range(d["short_side"], ".0f")]
    drawn = [
        [name, f"{100 * d['share']:.2f} %", f"{d['per_update']:.2f}", f"{d['passes']:.2f}"]
        for name, d in found["mixture"]["datasets"].items()
    ]
    mixture = table(["dataset", "share", "videos an update", "passes in the run"], drawn)
    looked = ", ".join(f"{n}: {d['looked_at']} ({d['unreadable']} unreadable)" for n, d in found["datasets"].items())
    return "\n".join(
        [
            table(header, rows),
            "videos a class: smallest–median–largest; like: as many equal classes have this entropy; lengths: 5–50–95 % of the",
            f"training videos looked at, {looked}",
            "",
            f"the mixture, over {found['mixture']['updates']} updates:",
            mixture,
        ]
    )


def _range(values: Sequence[float] | None, form: str) -> str:
    return "–".join(format(v, form) for v in values) if values else "-"


def picture(found: Mapping[str, Any], measured: Mapping[str, Lengths]) -> bytes:
    """A PNG with class balance, durations and frame rates of each dataset, and the mixture."""
    names = list(measured)
    drawn, axes = figure(4, 1, width=17, height=3.8)
    classes, seconds, fps, mixture = axes[0]
    for colour, name in zip(cycle(len(names)), names):
        counts = np.sort(found["datasets"][name]["balance"]["counts"])[::-1]
        places = 100 * np.arange(len(counts) + 1) / len(counts)
        classes.stairs(np.maximum(counts, 0.5), places, baseline=None, color=colour, label=label(name), linewidth=1.6)
        for axis, values in ((seconds, measured[name].seconds), (fps, measured[name].fps)):
            if len(values):  # equal datasets lie on each other: steps of different widths show them all
                share = np.full(len(values), 100 / len(values))
                width = 1.2 + 1.4 * (len(names) - 1 - names.index(name))
                axis.hist(values, bins=25, weights=share, histtype="step", color=colour, linewidth=width)
    classes.set_yscale("log")
    classes.yaxis.set_major_formatter("{x:g}")
    classes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if _few_decades(classes) else "")
    classes.legend()
    for axis, title, horizontal, vertical in (
        (classes, "Size of the classes", "classes, largest first, %", "training videos"),
        (seconds, "Length", "seconds", "% of the videos looked at"),
        (fps, "Frame rate", "frames a second", "% of the videos looked at"),
        (mixture, "What the mixture draws", "% of the videos drawn", ""),
    ):
        axis.set_title(title, loc="left", size=10)
        axis.set_xlabel(horizontal)
        axis.set_ylabel(vertical)
    shares = [100 * found["mixture"]["datasets"][n]["share"] for n in names]
    mixture.barh([label(name) for name in names], shares, color=cycle(len(names)), alpha=0.55)
    mixture.invert_yaxis()
    for place, name in enumerate(names):
        passes = found["mixture"]["datasets"][name]["passes"]
        mixture.text(1, place, f"{shares[place]:.1f} %, {passes:.3g} passes", va="center", size=8)
    return png(drawn)


def _few_decades(axis: Axes) -> bool:
    """Whether a logarithmic axis is so short that its minor ticks need numbers."""
    low, high = axis.get_ylim()
    return high < 10 * low
