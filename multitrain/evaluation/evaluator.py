"""Videos become scores, scores become figures: multi-view testing, and validation during training, with the same code.

A video's scores are the sum of its views' probabilities (float64 sums of fp32 rows, in view order, kept as float32).
Videos go through the network in groups of consecutive numbers, always filled to the same shape, so that a video's scores
are a function of the video and the settings alone: not of the number of ranks, of an interruption, or of a broken
neighbour. Every rank appends what it has scored to files of its own (:mod:`multitrain.evaluation.shards`); started again,
with any number of ranks, an evaluation goes on where it was. A video that cannot be read is listed, never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from multitrain.config import ConfigError, DatasetConfig, RunConfig, nearest
from multitrain.evaluation import metrics
from multitrain.evaluation.shards import Scores, ShardReader, ShardWriter

if TYPE_CHECKING:
    import torch

    from multitrain.data.catalog import Catalog
    from multitrain.data.loader import Views
    from multitrain.model import MultiTrain

Precision = Literal["fp32", "bf16", "fp16"]
Stop = Callable[[], bool]

FORMAT = 1
MOST_CLIPS = 16
"""Clips in one forward pass, unless one video has more views: 16 of 32×224² in fp32 fit in 24 GB."""
POLL_SECONDS = 0.5
PATIENCE = 1800.0
"""Seconds that rank 0 waits for other ranks' scores without seeing a new one."""


class EvaluationError(ConfigError):
    """An evaluation that cannot be finished; the message says what is missing. What is scored is kept."""


@dataclass(frozen=True)
class Task:
    """One dataset's videos before one head."""

    name: str
    """Dataset whose videos are scored."""
    head: str
    """Dataset whose head scores them; figures only where it is the same."""
    dataset: DatasetConfig
    catalog: Catalog

    @property
    def key(self) -> str:
        """Folder name, e.g. ``ssv2``, or ``ssv2.by.kinetics`` for another head."""
        return self.name if self.head == self.name else f"{self.name}.by.{self.head}"


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` did."""

    finished: bool
    """Every video is scored or known to be unreadable. False after an interruption: call it again to go on."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures by dataset (see :func:`figures`); on rank 0 of a finished evaluation only."""
    folder: Path | None = None
    """Where ``metrics.json`` and each dataset's ``scores.npz`` are."""

    @property
    def table(self) -> str:
        """One line, e.g. ``kinetics 84.7/96.5 | ssv2 65.2/86.6 | average 75.0/91.6``."""
        return table(self.results)


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
    precision: Precision | None = None,
    stop: Stop | None = None,
    barrier: Callable[[], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    patience: float = PATIENCE,
) -> Evaluation:
    """Multi-view test of `model` on a split of each dataset.

    No process group is needed: ranks meet in `out_dir`, which all of them see. Call it again with the same `out_dir` and
    any number of ranks to go on after an interruption.

    Args:
        model: on the device to use; its mode is restored.
        config: how clips are read; `data.datasets` names the folders.
        datasets: names in `config.data.datasets`.
        split: which annotation file.
        out_dir: ``DATASET/shards/`` while it runs; then ``DATASET/{scores.npz,metrics.json}`` and ``metrics.json``.
        rank, world_size: this process among those that share the work.
        head: score with this dataset's head instead of each dataset's own; gives scores without figures.
        precision: arithmetic; `config.eval.precision`, else fp32, when not given. fp32 is true fp32 (no TF32).
        stop: asked between videos; when it says yes, what is scored is kept and the result is not `finished`.
        barrier: returns when all ranks have called it; spares rank 0 looking for the others' files.
        progress: called on each rank with dataset, videos done and videos in its share.
        patience: seconds that rank 0 waits without anything new from the others.

    Raises:
        ConfigError: unknown dataset or head, annotations that cannot be used, an `out_dir` of another evaluation.
        EvaluationError: other ranks' scores did not come.
    """
    from multitrain.data.catalog import Catalog

    index = Path(config.data.index or Path(config.runs) / ".index")
    tasks = []
    for name in datasets:
        chosen = _known(name, config.data.datasets, "dataset")
        catalog = Catalog.open(config.data.datasets[chosen], chosen, split, index)
        tasks.append(_task(model, chosen, head, config.data.datasets[chosen], catalog))
    precision = precision or config.eval.precision or "fp32"
    out = Path(out_dir)
    weights = _digest(model)
    headers = {t.key: _header(t, config, model, split, precision, weights) for t in tasks}
    for task in tasks:
        done = _score_share(model, config, task, headers[task.key], out, rank, world_size, precision, stop, progress)
        if not done:
            return Evaluation(finished=False, folder=out)
    if barrier is not None:
        barrier()
    if rank:
        return Evaluation(finished=True, folder=out)
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        shards = _wait(task, headers[task.key], out, stop, patience)
        if shards is None:
            return Evaluation(finished=False, folder=out)
        results[task.key] = _merge(task, shards, headers[task.key], out / task.key)
    finished = Evaluation(finished=True, results=results, folder=out)
    _write_json(out / "metrics.json", {"datasets": results, "average": average(results), "table": finished.table})
    return finished


def validate(
    model: MultiTrain,
    config: RunConfig,
    catalogs: Mapping[str, Catalog],
    *,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    stop: Stop | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy on validation videos during training: one centred view a video, nothing random, all ranks together.

    Args:
        model: put in eval mode meanwhile; its mode is restored.
        config: how clips are read.
        catalogs: of the validation split, by dataset.
        rank, world_size: this process among the ranks.
        reduce: float64 CPU tensor [n] → its sum over ranks, on every rank; a collective. None for one rank.
        stop: asked between videos; when it says yes on any rank, all ranks return {}.
        autocast: arithmetic of the forward pass; the surrounding one when not given.

    Returns:
        By dataset: ``top1``, ``top5`` in percent (multi-label: ``map`` too), ``videos`` listed and ``coverage``, the
        share that could be read. The same on every rank.
    """
    import torch

    tallies: list[np.ndarray] = []
    interrupted = False
    for name, catalog in catalogs.items():
        one_view = config.data.datasets[name].model_copy(update={"temporal_views": 1, "spatial_views": 1})
        task = Task(name, name, one_view, catalog)
        tally = _Tally(catalog)
        share = _share(len(catalog), _group_size(config, one_view), rank, world_size)
        if not interrupted:
            with ExitStack() as stack:
                if autocast is not None:
                    stack.enter_context(torch.autocast(_device(model).type, autocast))
                for index, scores, _ in score_videos(model, config, task, share, stop=stop):
                    tally.add(index, scores)
            interrupted = stop is not None and stop()
        tallies.append(tally.vector)
    vector = torch.from_numpy(np.concatenate([*tallies, [float(interrupted)]]))
    vector = vector if reduce is None else reduce(vector)
    if float(vector[-1]) > 0:
        return {}
    sizes = [len(t) for t in tallies]
    parts = np.split(vector.numpy()[:-1], np.cumsum(sizes)[:-1])
    return {name: _Tally.results(catalogs[name], part) for name, part in zip(catalogs, parts)}


def score_videos(
    model: MultiTrain, config: RunConfig, task: Task, indices: Sequence[int], *, stop: Stop | None = None
) -> Iterator[tuple[int, Scores | None, str]]:
    """Scores of some videos of a dataset, in order: (index, float32 [K] or None, why it could not be read).

    The forward pass always has the shape of a whole group; places of videos that are not asked for, or cannot be read,
    are zeros. Ends early, at the end of a video, when `stop` says yes.

    Args:
        model: on the device to use; in eval mode meanwhile.
        config: how clips are read; `eval.videos_per_batch` videos form a group, within :data:`MOST_CLIPS` clips.
        task: videos and head.
        indices: rising numbers of videos.
    """

    views = task.dataset.temporal_views * task.dataset.spatial_views
    size = _group_size(config, task.dataset)
    was_training = model.training
    model.eval()
    try:
        batch = _Group(model, task.head, views, size)
        for index, clips, reason in _load(config, task, indices, stop):
            if batch.holds_other_than(index // size):
                yield from batch.scores()
            if clips is None:
                yield index, None, reason
            else:
                batch.add(index, clips)
        if stop is None or not stop():
            yield from batch.scores()
    finally:
        model.train(was_training)


def figures(scores: Scores, labels: Sequence[tuple[int, ...]], *, multi_label: bool) -> dict[str, Any]:
    """The figures of scored videos.

    Args:
        scores: float32 [n, K].
        labels: true labels of each of the n videos.
        multi_label: mean average precision instead of per-class accuracy and confusion.

    Returns:
        ``top1`` and ``top5`` in percent (a video counts when any true label is among the best); for one label a video
        ``mean_class_accuracy`` in percent, ``per_class`` (percent by label, null without videos) and ``confusion``
        (triples true label, predicted label, count); with several, ``map`` in percent.
    """
    out: dict[str, Any] = {f"top{k}": _percent(metrics.topk_accuracy(scores, labels, k)) for k in (1, 5)}
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


def average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Unweighted means of top-1 and top-5 over the datasets that have them, in percent."""
    out: dict[str, float | None] = {}
    for measure in ("top1", "top5"):
        values = [r[measure] for r in results.values() if r.get(measure) is not None]
        out[measure] = float(np.mean(values)) if values else None
    return out


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results in one line: ``kinetics 84.7/96.5 | mit 41.4/69.5 | average 63.0/83.0`` (top-1/top-5 in percent)."""
    cells = [f"{name} {_pair(r)}{_covered(r)}" for name, r in results.items()]
    if sum(r.get("top1") is not None for r in results.values()) > 1:
        cells.append(f"average {_pair(average(results))}")
    return " | ".join(cells)


# -- scoring ---------------------------------------------------------------------------------------------------------


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
    """Scores what is left of this rank's share of a task; False when stopped."""
    folder = out / task.key / "shards"
    known = ShardReader(folder, header)
    known.poll()
    share = _share(len(task.catalog), _group_size(config, task.dataset), rank, world_size)
    left = [i for i in share if i not in known]
    writer = ShardWriter(folder, header, rank)
    finished = len(share) - len(left)
    try:
        with _arithmetic(precision, _device(model)):
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


def _share(videos: int, group: int, rank: int, world_size: int) -> list[int]:
    """Numbers of the videos of every `world_size`-th group."""
    return [i for i in range(videos) if i // group % world_size == rank]


def _group_size(config: RunConfig, dataset: DatasetConfig) -> int:
    views = dataset.temporal_views * dataset.spatial_views
    return max(1, min(config.eval.videos_per_batch, MOST_CLIPS // views))


class _Group:
    """Clips of consecutive videos on their way through the network, in a batch of constant shape."""

    def __init__(self, model: MultiTrain, head: str, views: int, size: int) -> None:
        self._model, self._head, self._views, self._size = model, head, views, size
        self._clips: dict[int, torch.Tensor] = {}

    def holds_other_than(self, group: int) -> bool:
        return any(i // self._size != group for i in self._clips)

    def add(self, index: int, clips: torch.Tensor) -> None:
        self._clips[index] = clips

    def scores(self) -> Iterator[tuple[int, Scores, str]]:
        """Scores of the videos added so far, which are forgotten."""
        import torch

        if not self._clips:
            return
        held, self._clips = self._clips, {}
        some = next(iter(held.values()))
        batch = torch.zeros(self._size, *some.shape)
        for index, clips in held.items():
            batch[index % self._size] = clips
        with torch.no_grad():
            rows = [self._probabilities(part) for part in batch.flatten(0, 1).split(MOST_CLIPS)]
        summed = torch.cat(rows).double().unflatten(0, (self._size, self._views)).sum(1)
        for index in held:
            yield index, summed[index % self._size].float().numpy(), ""

    def _probabilities(self, clips: torch.Tensor) -> torch.Tensor:
        model = self._model
        features = model.features(clips.to(_device(model), non_blocking=True))
        return model.probabilities(self._head, model.heads.of(self._head)(features)).cpu()


def _load(config: RunConfig, task: Task, indices: Sequence[int], stop: Stop | None) -> Iterator[Views]:
    """All views of each video, or why it cannot be read, in the order of `indices`; ends early when `stop` says yes."""
    from multitrain.data.loader import TestLoader

    if not indices:
        return
    with TestLoader(task.catalog, indices, task.dataset, config) as loader:
        while stop is None or not stop():
            try:
                video = loader.next_video(POLL_SECONDS)
            except StopIteration:
                return
            if video is not None:
                yield video


def _arithmetic(precision: Precision, device: torch.device) -> ExitStack:
    """Autocast, or for fp32 the switches that keep a GPU from using TF32."""
    import torch

    stack = ExitStack()
    if precision != "fp32":
        stack.enter_context(torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]))
    elif device.type == "cuda":
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        matmul.allow_tf32 = False
        stack.callback(lambda: setattr(matmul, "allow_tf32", before))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
    return stack


# -- merging ---------------------------------------------------------------------------------------------------------


def _wait(task: Task, header: Mapping[str, Any], out: Path, stop: Stop | None, patience: float) -> ShardReader | None:
    """Reads shards until every video is in them; None when stopped."""
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
        if time.monotonic() - changed > patience:
            first = next(i for i in range(len(task.catalog)) if i not in shards)
            raise EvaluationError(
                f"{task.key}: {missing} of {len(task.catalog)} videos have no scores after {patience:.0f} s without a new one "
                f"(first: number {first}); another rank has died: run the same command again, what is scored is kept in {out}"
            )
        time.sleep(POLL_SECONDS)


def _merge(task: Task, shards: ShardReader, header: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes ``scores.npz`` and ``metrics.json`` of one dataset; returns the latter's content."""
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
        "class_names": catalog.class_names,
        "unreadable": unreadable,
        "top1": None,
        "top5": None,
    }
    if task.head == task.name:
        result |= figures(scores, labels, multi_label=catalog.multi_label)
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
    _replace(folder / "scores.npz", lambda path: _save(path, arrays))
    _write_json(folder / "metrics.json", result)
    return result


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _replace(
        path,
        lambda temporary: temporary.write_text(
            json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        ),
    )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Tally:
    """What a rank knows of a validation, as a float64 vector that can be summed over ranks."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        count = 3 + (len(catalog) * (catalog.classes + 1) if catalog.multi_label else 0)
        self.vector = np.zeros(count)
        """Hits among the best 1, among the best 5, videos scored; multi-label: then, for every video, scores and 1."""

    def add(self, index: int, scores: Scores | None) -> None:
        if scores is None:
            return
        label = [self._catalog.labels(index)]
        hits = [metrics.topk_hits(scores[None], label, k)[0] for k in (1, 5)]
        self.vector[:3] += [*hits, 1]
        if self._catalog.multi_label:
            self.vector[3:].reshape(len(self._catalog), -1)[index] = [*scores, 1]

    @staticmethod
    def results(catalog: Catalog, vector: np.ndarray) -> dict[str, float]:
        """The figures of the sum of all ranks' vectors."""
        scored = max(vector[2], 1)
        out = {"top1": 100 * float(vector[0] / scored), "top5": 100 * float(vector[1] / scored)}
        if catalog.multi_label:
            rows = vector[3:].reshape(len(catalog), -1)
            seen = np.flatnonzero(rows[:, -1])
            out["map"] = 100 * metrics.mean_average_precision(rows[seen, :-1], [catalog.labels(int(i)) for i in seen])
        return out | {"videos": len(catalog), "coverage": float(vector[2] / len(catalog))}


# -- settings --------------------------------------------------------------------------------------------------------


def _task(model: MultiTrain, name: str, head: str | None, dataset: DatasetConfig, catalog: Catalog) -> Task:
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
    return Task(name, head, dataset, catalog)


def _known(name: str, known: Mapping[str, object], what: str) -> str:
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known; {nearest(name, known)}")
    return name


def _header(
    task: Task, config: RunConfig, model: MultiTrain, split: str, precision: str, weights: str
) -> dict[str, Any]:
    """All that the scores depend on; shards that differ in it are never put together."""
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
        "group": _group_size(config, dataset),
        "views": [dataset.temporal_views, dataset.spatial_views],
        "sampling": dataset.sampling,
        "test_short_side": dataset.test_short_side,
        "reading": [data.sampling_rate, data.target_fps, data.decoder],
    }


def _digest(model: MultiTrain) -> str:
    """Hex digest of the weights and of the network that they are in."""
    import torch

    digest = hashlib.blake2b(model.config.model_dump_json().encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _device(model: MultiTrain) -> torch.device:
    return next(model.parameters()).device


def _percent(fraction: float) -> float | None:
    return None if np.isnan(fraction) else 100 * float(fraction)


def _pair(result: Mapping[str, Any]) -> str:
    pair = [result.get(m) for m in ("top1", "top5")]
    return "/".join("–" if v is None else f"{v:.1f}" for v in pair)


def _covered(result: Mapping[str, Any]) -> str:
    lost = result.get("videos", 0) - result.get("scored", 0)
    return f" ({lost} of {result['videos']} unreadable)" if lost else ""


__all__ = [
    "Evaluation",
    "EvaluationError",
    "Task",
    "average",
    "evaluate",
    "figures",
    "score_videos",
    "table",
    "validate",
]
