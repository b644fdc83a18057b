"""Multi-view testing: scores every video of a split exactly once, with any number of ranks and across interruptions.

Each rank appends its scores to its own files (:mod:`multitrain.evaluation.shards`). An evaluation that is started again, with any
number of ranks, scores the remaining videos only. Unreadable videos are listed, never replaced. Evaluations of several datasets into
the same folder, one after the other or by separate jobs, are combined in one table.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from multitrain.config import ConfigError, DatasetConfig, RunConfig, nearest
from multitrain.config.boundary import writing_to
from multitrain.evaluation import tables
from multitrain.evaluation.class_map import ClassMap, read_class_map
from multitrain.evaluation.output_folders import index_folder
from multitrain.evaluation.scoring import (
    POLL_SECONDS,
    Precision,
    Stop,
    Task,
    arithmetic,
    device_of,
    group_size,
    score_videos,
    shard_indices,
)
from multitrain.evaluation.shards import ShardReader, ShardWriter

if TYPE_CHECKING:
    from multitrain.data.catalog import Catalog
    from multitrain.data.corruptions import Corruption
    from multitrain.model import MultiTrain

FORMAT = 1
PEER_TIMEOUT_SECONDS = 1800.0
"""Seconds that rank 0 waits for other ranks' scores without seeing a new one."""


class EvaluationError(ConfigError):
    """An evaluation that cannot be finished; the message names what is missing. Existing scores are kept."""


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`."""

    finished: bool
    """Whether every video is scored or known to be unreadable. False after an interruption: call it again to continue."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metrics by dataset (see :func:`multitrain.evaluation.tables.compute_metrics`); on rank 0 of a finished evaluation only."""
    combined: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`results`, and those of the datasets that earlier evaluations of the same weights left in `folder`."""
    folder: Path | None = None
    """Where ``metrics.json`` and each dataset's ``scores.npz`` are."""

    @property
    def table(self) -> str:
        """One line, e.g. ``kinetics 84.7/96.5 (19796/19796) | ssv2 65.2/86.6 (24777/24777) | average 75.0/91.6``."""
        return tables.table(self.combined or self.results)

    @property
    def intervals(self) -> str:
        """One line a dataset, e.g. ``kinetics: top-1 84.2–85.2, top-5 96.2–96.8 (95 % interval, 19796 videos)``."""
        return tables.interval_lines(self.combined or self.results)


def evaluate(
    model: MultiTrain,
    config: RunConfig,
    datasets: Sequence[str],
    split: Literal["train", "val", "test"] = "test",
    *,
    out_dir: str | Path,
    rank: int = 0,
    world_size: int = 1,
    head: str | None = None,
    class_map: str | Path | None = None,
    head_names: Sequence[str] | None = None,
    precision: Precision | None = None,
    corruption: Corruption | None = None,
    stop: Stop | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    peer_timeout: float = PEER_TIMEOUT_SECONDS,
) -> Evaluation:
    """Multi-view test of `model` on a split of each dataset.

    No process group is needed: the ranks exchange scores through files in `out_dir`, a shared folder. To resume after an
    interruption, call it again with the same `out_dir` and any number of ranks.

    Args:
        model: on the device to use; its mode is restored.
        config: how clips are read; `data.datasets` names the folders.
        datasets: names in `config.data.datasets`.
        split: which annotation file.
        out_dir: ``DATASET/shards/`` while it runs; then ``DATASET/{scores.npz,metrics.json,confusion.png}``, and
            ``metrics.json`` and ``table.txt`` of all datasets tested into this folder.
        rank, world_size: this process among those that share the work.
        head: score with this dataset's head instead of each dataset's own; gives scores without metrics, unless there is a map.
        class_map: file that maps the classes of `head` to those of the dataset (:mod:`multitrain.evaluation.class_map`).
        head_names: class names of `head`, for the map.
        precision: default: `config.eval.precision`, else fp32, which does not use TF32.
        corruption: what is done to every video, to measure robustness.
        stop: called between videos; when it returns True, the scores so far are kept and the result is not `finished`.
        progress: called on each rank with dataset, videos done and videos in its share.
        peer_timeout: seconds that rank 0 waits for a new score from the other ranks.

    Raises:
        ConfigError: unknown dataset or head, annotations that cannot be used, an `out_dir` of another evaluation.
        EvaluationError: scores of other ranks are missing after `peer_timeout`.
    """
    from multitrain.data.catalog import Catalog

    out = Path(out_dir)
    index = index_folder(config, here=out)
    tasks = []
    for name in datasets:
        chosen = _known(name, config.data.datasets, "dataset")
        catalog = Catalog.open(config.data.datasets[chosen], chosen, split, index)
        tasks.append(_task(model, chosen, head, config.data.datasets[chosen], catalog, corruption))
    mapping = _class_map(tasks, class_map, head_names, model.datasets) if class_map else None
    precision = precision or config.eval.precision or "fp32"
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        tables.require_own(out, [task.key for task in tasks])
    weights = _digest(model)
    headers = {t.key: _header(t, config, model, split, precision, weights) for t in tasks}
    for task in tasks:
        done = _score_share(model, config, task, headers[task.key], out, rank, world_size, precision, stop, progress)
        if not done:
            return Evaluation(finished=False, folder=out)
    if rank:
        return Evaluation(finished=True, folder=out)
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        shards = _wait(task, headers[task.key], out, stop, peer_timeout)
        if shards is None:
            return Evaluation(finished=False, folder=out)
        results[task.key] = tables.merge(task, shards, headers[task.key], out / task.key, mapping)
    combined = tables.combine(out, results, list(model.datasets), next(iter(headers.values())))
    finished = Evaluation(finished=True, results=results, combined=combined, folder=out)
    tables.write_combined(out, combined)
    return finished


def _class_map(
    tasks: Sequence[Task], file: str | Path, head_names: Sequence[str] | None, heads: Mapping[str, int]
) -> ClassMap:
    if len(tasks) != 1 or tasks[0].head == tasks[0].name:
        raise ConfigError("--map: is for one dataset and another dataset's head; give --dataset NAME --head OTHER")
    (task,) = tasks
    catalog = task.catalog
    return read_class_map(
        Path(file), task.head, head_names, heads[task.head], task.name, catalog.class_names, catalog.classes
    )


def _score_share(
    model: MultiTrain,
    config: RunConfig,
    task: Task,
    header: Mapping[str, Any],
    out: Path,
    rank: int,
    world_size: int,
    precision: Precision,
    stop: Stop | None,
    progress: Callable[[str, int, int], None] | None,
) -> bool:
    """Score the remaining videos of this rank's part of a task; False when stopped."""
    folder = out / task.key / "shards"
    known = ShardReader(folder, header)
    known.poll()
    share = shard_indices(len(task.catalog), group_size(config, task.dataset), rank, world_size)
    left = [i for i in share if i not in known]
    writer = ShardWriter(folder, header, rank)
    finished = len(share) - len(left)
    try:
        with arithmetic(precision, device_of(model)):
            for index, scores, reason in score_videos(model, config, task, left, stop=stop):
                if scores is None:
                    writer.unreadable(index, str(task.catalog.path(index)), reason)
                else:
                    writer.scored(index, scores)
                finished += 1
                if progress is not None:
                    progress(task.key, finished, len(share))
    finally:
        writer.close()
    return finished == len(share)


def _wait(
    task: Task, header: Mapping[str, Any], out: Path, stop: Stop | None, peer_timeout: float
) -> ShardReader | None:
    """Read the shards until they hold every video; None when stopped."""
    shards = ShardReader(out / task.key / "shards", header)
    changed = time.monotonic()
    while True:
        if shards.poll():
            changed = time.monotonic()
        missing = len(task.catalog) - len(shards.scores) - len(shards.unreadable)
        if missing <= 0:
            return shards
        if stop is not None and stop():
            return None
        if time.monotonic() - changed > peer_timeout:
            first = next(i for i in range(len(task.catalog)) if i not in shards)
            raise EvaluationError(
                f"{task.key}: {missing} of {len(task.catalog)} videos have no scores after {peer_timeout:.0f} s without a new one "
                f"(first: number {first}); another rank has died: run the same command again, what is scored is kept in {out}"
            )
        time.sleep(POLL_SECONDS)


def _task(
    model: MultiTrain,
    name: str,
    head: str | None,
    dataset: DatasetConfig,
    catalog: Catalog,
    corruption: Corruption | None,
) -> Task:
    if head is None and name not in model.datasets:
        raise ConfigError(
            f"dataset {name!r} has no head in this model; score it with another one: --head {' or --head '.join(model.datasets)}"
        )
    head = _known(head or name, model.datasets, "head")
    if head == name and catalog.classes != model.datasets[head]:
        raise ConfigError(
            f"dataset {name!r} has {catalog.classes} classes, its head {model.datasets[head]}; "
            f"set data.datasets.{name}.annotations and .classes to those of the training"
        )
    return Task(name, head, dataset, catalog, corruption)


def _known(name: str, known: Mapping[str, object], what: str) -> str:
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known; {nearest(name, known)}")
    return name


def _header(
    task: Task, config: RunConfig, model: MultiTrain, split: str, precision: str, weights: str
) -> dict[str, Any]:
    """All settings on which the scores depend; shards with different headers are never merged."""
    dataset, data = task.dataset, config.data
    return {
        "format": FORMAT,
        "dataset": task.name,
        "head": task.head,
        "classes": model.datasets[task.head],
        "split": split,
        "annotations": task.catalog.digest,
        "videos_under": str(task.catalog.videos),
        "weights": weights,
        "precision": precision,
        "group": group_size(config, dataset),
        "views": [dataset.temporal_views, dataset.spatial_views],
        "sampling": dataset.sampling,
        "test_short_side": dataset.test_short_side,
        "reading": [data.sampling_rate, data.target_fps, data.decoder],
        **({"corruption": [task.corruption.name, task.corruption.strength]} if task.corruption else {}),
    }


def _digest(model: MultiTrain) -> str:
    """Hex digest of the weights and of the model configuration."""
    import torch

    digest = hashlib.blake2b(model.config.model_dump_json().encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
