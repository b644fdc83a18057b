"""Micro-batches of clips for this rank, in the order of the sampling plan.

The videos of a micro-batch are computed from the update (`Plan.samples`, `BatchShape.slice`), and a clip is a pure function of its
sample (`multitrain.data.clips`). Batches therefore do not depend on the number of workers, on prefetching, or on
where a run was interrupted; clips that workers prefetched before an interruption are made again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multitrain.config import DatasetConfig, RunConfig
from multitrain.data.catalog import Catalog
from multitrain.data.clips import Clips, EvalViewsFn, Task, TrainClipFn
from multitrain.data.corruptions import Corruption
from multitrain.data.pool import LoaderError, Result, open_pool
from multitrain.data.staging import Job, Staging
from multitrain.order import BatchShape, Plan

_LONG = 60.0  # timeout in seconds of one wait while iterating


@dataclass
class Batch:
    """A micro-batch of N = videos × copies clips, in the order v0a v0b v1a v1b …"""

    clips: Tensor
    """uint8 [N, T, S, S, 3]."""
    dataset: Tensor
    """Position of each clip's dataset in the plan's sources: int64 [N]."""
    labels: list[tuple[int, ...]]
    """Labels of each clip, N entries."""
    boxes: Tensor
    """Boxes to erase (top, left, height, width), zeros for none: int32 [N, 4]."""
    keys: Tensor
    """Key of each clip, a hash of (seed, dataset, index, epoch, copy): int64 [N]."""
    tickets: np.ndarray
    """The sample of each video, of dtype `multitrain.order.SAMPLE_DTYPE`: [videos]."""
    start: int
    """Global sample number of the first video."""
    skipped: list[dict[str, Any]]
    """Records of unreadable videos: dataset, path, reason, update, stand_in (path of the fallback video)."""
    decode_seconds: float
    """Worker time spent on these clips, in seconds."""

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, for asynchronous copies to the GPU."""
        return replace(
            self,
            clips=self.clips.pin_memory(),
            dataset=self.dataset.pin_memory(),
            boxes=self.boxes.pin_memory(),
            keys=self.keys.pin_memory(),
        )


class TrainLoader:
    """This rank's micro-batches of updates `start_update` to `stop_update - 1`.

    Args:
        catalogs: training split of each dataset of the plan, by name.
        plan: the sampling plan.
        shape: division of an update into micro-batches.
        rank: this rank, in range(shape.world_size).
        config: uses `data` (decoder, workers, prefetch, decode_timeout, stage, stage_limit), `augment`, `model` (frames, crop), `seed`
            and `gpus` (per node).
    """

    def __init__(
        self,
        catalogs: Mapping[str, Catalog],
        plan: Plan,
        shape: BatchShape,
        rank: int,
        config: RunConfig,
        start_update: int,
        stop_update: int,
    ) -> None:
        self._plan, self._shape, self._rank = plan, shape, rank
        self._range = range(start_update, stop_update)
        job = TrainClipFn(catalogs, plan, config)
        self._copies, *self._clip = job.shape
        self._pin = torch.cuda.is_available()
        self._part: _Part | None = None
        self._steps = self._slices()
        workers = config.data.workers
        self._pool = open_pool(
            job, self._tasks(), workers=workers, ahead=max(1, workers) * config.data.prefetch * shape.micro_batch
        )
        self._staging = self._start_staging(catalogs, config)
        self._left = len(self._range) * shape.accumulation

    def next_batch(self, timeout: float) -> Batch | None:
        """The next micro-batch, or None if it is not complete within `timeout` seconds; call again then.

        Raises:
            StopIteration: after the last one.
            LoaderError: a worker died, or a video and all its fallbacks cannot be read.
            ConfigError: the decoder is not installed.
        """
        deadline = time.monotonic() + timeout
        if self._part is None:
            self._part = self._new_part()
        while len(self._part.made) < self._shape.micro_batch:
            answer = self._pool.next(max(0.0, deadline - time.monotonic()))
            if answer is None:
                return None
            self._part.add(answer)
            if answer.result.trouble and self._staging is not None:
                self._staging.report(answer.result.trouble)
        batch, self._part = self._part.batch(), None
        self._left -= 1
        return batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            try:
                batch = self.next_batch(_LONG)
            except StopIteration:
                return
            if batch is not None:
                yield batch

    def close(self) -> None:
        """Stop all workers immediately; within three seconds even if one hangs in a read. After the last micro-batch, the node's
        staged copies are deleted."""
        self._pool.close()
        if self._staging is not None:
            self._staging.close(done=not self._left)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_staging(self, catalogs: Mapping[str, Catalog], config: RunConfig) -> Staging | None:
        """The staging process of this node, which its first rank starts if `data.stage` is set."""
        stage, limit = config.data.stage, config.data.stage_limit
        if stage is None or self._rank % config.gpus:
            return None
        ranks = range(self._rank, min(self._rank + config.gpus, self._shape.world_size))
        return Staging(Job(stage, limit, self._plan, catalogs, self._shape, ranks, self._range.start, self._range.stop))

    def _slices(self) -> Iterator[tuple[int, int, int]]:
        """(update, start, stop) of this rank's micro-batches, as sample numbers [start, stop)."""
        for update in self._range:
            for micro_step in range(self._shape.accumulation):
                yield update, *self._shape.slice(update, micro_step, self._rank)

    def _tasks(self) -> Iterator[Task]:
        for update, start, stop in self._slices():
            for sample in self._plan.samples(start, stop):
                yield Task(update, sample)

    def _new_part(self) -> _Part:
        update, start, stop = next(self._steps)
        if self._staging is not None:
            self._staging.reached(update)
        clips = torch.empty(((stop - start) * self._copies, *self._clip), dtype=torch.uint8, pin_memory=self._pin)
        return _Part(start, clips, self._copies, [], [])


@dataclass
class _Part:
    """An incomplete micro-batch."""

    start: int
    clips: Tensor
    copies: int
    made: list[Clips]
    tickets: list[np.void]

    def add(self, answer: Result) -> None:
        at = len(self.made) * self.copies
        self.clips[at : at + self.copies] = torch.from_numpy(answer.array)
        self.made.append(answer.result)
        self.tickets.append(answer.task.sample)

    def batch(self) -> Batch:
        return Batch(
            clips=self.clips,
            dataset=torch.tensor([c.dataset for c in self.made]).repeat_interleave(self.copies),
            labels=[c.labels for c in self.made for _ in range(self.copies)],
            boxes=torch.from_numpy(np.concatenate([c.boxes for c in self.made])),
            keys=torch.from_numpy(np.concatenate([c.keys for c in self.made])),
            tickets=np.array(self.tickets, dtype=self.tickets[0].dtype),
            start=self.start,
            skipped=[record for c in self.made for record in c.skipped],
            decode_seconds=sum(c.seconds for c in self.made),
        )


class Views(NamedTuple):
    """All views of one video, or the reason why it cannot be read."""

    video: int
    """The video's number in the catalog."""
    clips: Tensor | None
    """float32 [V, 3, T, S, S], normalised, view = temporal view × spatial_views + crop; None if it cannot be read."""
    error: str
    """Why it cannot be read, or ''."""


class EvalLoader:
    """The videos `indices` of one dataset, one at a time, in that order, each with all its views; unreadable videos are not replaced.

    Args:
        catalog: the split to test on.
        dataset: the dataset's configuration, for sampling and views.
        config: uses `data`, `model` and `eval.workers`.
        corruption: changes every video; see :mod:`multitrain.data.corruptions`.
    """

    def __init__(
        self,
        catalog: Catalog,
        indices: Sequence[int],
        dataset: DatasetConfig,
        config: RunConfig,
        corruption: Corruption | None = None,
    ) -> None:
        workers = config.data.workers if config.eval.workers is None else config.eval.workers
        workers = min(workers, len(indices))
        job = EvalViewsFn(catalog, dataset, config, corruption)
        self._pin = torch.cuda.is_available()
        self._pool = open_pool(job, (int(i) for i in indices), workers=workers, ahead=workers + 2)

    def next_video(self, timeout: float) -> Views | None:
        """The next video, or None if it is not ready within `timeout` seconds; call again then.

        Raises:
            StopIteration: after the last one.
            LoaderError: a worker died.
            ConfigError: the decoder is not installed.
        """
        answer = self._pool.next(timeout)
        if answer is None:
            return None
        if answer.result:
            return Views(answer.task, None, answer.result)
        clips = torch.empty(answer.array.shape, pin_memory=self._pin)
        clips.copy_(torch.from_numpy(answer.array))
        return Views(answer.task, clips, "")

    def __iter__(self) -> Iterator[Views]:
        while True:
            try:
                video = self.next_video(_LONG)
            except StopIteration:
                return
            if video is not None:
                yield video

    def close(self) -> None:
        """Stop all workers immediately."""
        self._pool.close()

    def __enter__(self) -> EvalLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["Batch", "EvalLoader", "LoaderError", "TrainLoader", "Views"]
