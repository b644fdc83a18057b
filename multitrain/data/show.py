"""A picture of an update's augmented training clips, with their labels and mixing weights.

The clips are those of the run, with the same samples, augmentation and mixing partners as in training, because all of these are
functions of the configuration and the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from multitrain.config import RunConfig
from multitrain.data.catalog import Catalog
from multitrain.data.clips import Task, TrainClipFn
from multitrain.data.mix import finalize_batch
from multitrain.data.spatial import MEAN, STD
from multitrain.files import output_file
from multitrain.order import Plan
from multitrain.plot_style import COLOURS, INK, figure, png
from multitrain.text import printable

_FRAMES = 8
"""Frames shown per clip."""


@dataclass(frozen=True)
class ClipPreview:
    """One clip as the model receives it."""

    dataset: str
    path: str
    frames: np.ndarray
    """uint8 [T, S, S, 3], after erasing and mixing."""
    labels: tuple[str, ...]
    """Names of the video's own labels."""
    weights: list[tuple[str, float]]
    """Soft labels of the loss as (class, weight), largest first, without the weight that label smoothing gives to every class."""
    note: str
    """The unreadable videos that this one replaces; else empty."""


@dataclass
class _Batch:
    """The input of `multitrain.data.mix.finalize_batch`."""

    clips: torch.Tensor
    dataset: torch.Tensor
    labels: list[tuple[int, ...]]
    boxes: torch.Tensor
    keys: torch.Tensor
    start: int


def clips_of(
    config: RunConfig, catalogs: Mapping[str, Catalog], plan: Plan, update: int, videos: int
) -> list[ClipPreview]:
    """The clips of the first `videos` videos of an update (counted from 0), rounded up to complete mix groups, in sample order."""
    count = min(-(-videos // config.group) * config.group, config.effective_batch)
    start = update * config.effective_batch
    samples = plan.samples(start, start + count)
    job = TrainClipFn(catalogs, plan, config)
    job.warm_up()
    copies = job.shape[0]
    pixels = np.empty((count * copies, *job.shape[1:]), job.dtype)
    made = [job.run(Task(update, t), pixels[i * copies : (i + 1) * copies]) for i, t in enumerate(samples)]
    batch = _Batch(
        clips=torch.from_numpy(pixels),
        dataset=torch.tensor([m.dataset for m in made]).repeat_interleave(copies),
        labels=[m.labels for m in made for _ in range(copies)],
        boxes=torch.from_numpy(np.concatenate([m.boxes for m in made])),
        keys=torch.from_numpy(np.concatenate([m.keys for m in made])),
        start=start,
    )
    classes = {name: catalog.classes for name, catalog in catalogs.items()}
    ready = finalize_batch(batch, config.data, classes, config.augment, "cpu", config.seed)
    images = (ready.clips * STD + MEAN).clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    shown = []
    for number in range(len(images)):
        own = made[number // copies]
        name = plan.sources[own.dataset].name
        catalog = catalogs[name]
        path = (
            own.skipped[0]["stand_in"]
            if own.skipped
            else catalog.relative_path(int(samples[number // copies]["index"]))
        )
        bad = ", ".join(f"{s['path']} ({s['reason']})" for s in own.skipped)
        shown.append(
            ClipPreview(
                dataset=name,
                path=path,
                frames=images[number],
                labels=tuple(_name(catalog, label) for label in own.labels),
                weights=_weights(ready.targets[name][number].numpy(), catalog),
                note=f"replaces {bad}" if bad else "",
            )
        )
    return shown


def _name(catalog: Catalog, label: int) -> str:
    return catalog.class_names[label] if catalog.class_names else str(label)


def _weights(targets: np.ndarray, catalog: Catalog) -> list[tuple[str, float]]:
    """Classes with more weight than label smoothing gives to all, at most four."""
    floor = float(targets.min()) + 1e-6
    order = np.argsort(-targets, kind="stable")[:4]
    return [(_name(catalog, int(i)), float(targets[i])) for i in order if targets[i] > floor]


def picture(shown: Sequence[ClipPreview], title: str) -> bytes:
    """A PNG with one row per clip: frames, dataset and path, the video's labels, and the soft labels of the loss."""
    rows = len(shown)
    drawn, axes = figure(2, rows, width=15, height=1.35 * rows + 0.5, ratio=2.4)
    datasets = list(dict.fromkeys(s.dataset for s in shown))
    for row, clip in zip(axes, shown):
        colour = COLOURS[datasets.index(clip.dataset) % len(COLOURS)]
        frames = clip.frames[np.linspace(0, len(clip.frames) - 1, min(_FRAMES, len(clip.frames))).round().astype(int)]
        row[0].imshow(np.concatenate(list(frames), axis=1), interpolation="lanczos")
        for axis in row:
            axis.set_axis_off()
        weights = "   ".join(f"{weight:.2f} {name}" for name, weight in clip.weights)
        lines = [f"{clip.path}", ", ".join(clip.labels), f"loss sees:  {weights}", *([clip.note] if clip.note else [])]
        row[1].text(0, 0.98, clip.dataset, va="top", weight="bold", color=colour, size=10)
        for place, line in enumerate(lines):
            line = printable(line)
            short = line if len(line) <= 78 else line[:77] + "…"
            weight = "bold" if place == 1 else "normal"
            row[1].text(0, 0.74 - 0.22 * place, short, va="top", size=8.5, color=INK, weight=weight)
    drawn.suptitle(title, x=0.01, ha="left", size=10)
    return png(drawn)


def write(path: Path, shown: Sequence[ClipPreview], title: str) -> None:
    """Write the picture to `path`, and create missing folders. Raises ConfigError if a file that `data show` did not make is in the way."""
    with output_file(path, "data show") as temporary:
        temporary.write_bytes(picture(shown, title))
