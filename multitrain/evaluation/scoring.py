"""Scores of videos, shared by testing and validation.

A video's scores are the sum of its views' probabilities (summed in float64 in view order, stored as float32). Batches consist of
videos with consecutive indices and are always padded to the same shape, so that the scores of a video depend on the video and the
settings only, and not on the number of ranks, on interruptions, or on unreadable videos in the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from multitrain.config import DatasetConfig, RunConfig
from multitrain.evaluation.shards import Scores

if TYPE_CHECKING:
    import torch

    from multitrain.data.catalog import Catalog
    from multitrain.data.corruptions import Corruption
    from multitrain.data.loader import Views
    from multitrain.model import MultiTrain

Precision = Literal["fp32", "bf16", "fp16"]
Stop = Callable[[], bool]

MOST_CLIPS = 16
"""Limit of clips per forward pass, unless one video has more views: 16 clips of 32×224² in fp32 fit in 24 GB."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """One dataset's videos scored by one head."""

    name: str
    """Dataset whose videos are scored."""
    head: str
    """Dataset whose head scores them; there are metrics only if it is the same dataset."""
    dataset: DatasetConfig
    catalog: Catalog
    corruption: Corruption | None = None
    """What is done to every video."""

    @property
    def key(self) -> str:
        """Folder name, e.g. ``ssv2``, or ``ssv2.by.kinetics`` for another head."""
        return self.name if self.head == self.name else f"{self.name}.by.{self.head}"


def score_videos(
    model: MultiTrain, config: RunConfig, task: Task, indices: Sequence[int], *, stop: Stop | None = None
) -> Iterator[tuple[int, Scores | None, str]]:
    """Yield (index, scores float32 [K] or None, reason if the video could not be read) for each of `indices`, in order.

    A batch is always a complete group; the rows of videos that are not requested or cannot be read are zeros. Ends early, after
    a video, when `stop` returns True.

    Args:
        model: on the device to use; in eval mode meanwhile.
        config: how clips are read; `eval.videos_per_batch` videos form a group, within :data:`MOST_CLIPS` clips.
        task: videos and head.
        indices: ascending indices of videos.
    """

    views = task.dataset.temporal_views * task.dataset.spatial_views
    size = group_size(config, task.dataset)
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


def shard_indices(videos: int, group: int, rank: int, world_size: int) -> list[int]:
    """Indices of the videos of this rank: every `world_size`-th group."""
    return [i for i in range(videos) if i // group % world_size == rank]


def group_size(config: RunConfig, dataset: DatasetConfig) -> int:
    views = dataset.temporal_views * dataset.spatial_views
    return max(1, min(config.eval.videos_per_batch, MOST_CLIPS // views))


def arithmetic(precision: Precision, device: torch.device) -> ExitStack:
    """Autocast, or for fp32 the switches that keep a GPU from using TF32."""
    import torch

    from multitrain.model.device import autocast

    stack = ExitStack()
    if precision != "fp32":
        stack.enter_context(autocast(precision, device))
    elif device.type == "cuda":
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        matmul.allow_tf32 = False
        stack.callback(lambda: setattr(matmul, "allow_tf32", before))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
    return stack


def device_of(model: MultiTrain) -> torch.device:
    return next(model.parameters()).device


class _Group:
    """A batch of constant shape from the clips of consecutive videos."""

    def __init__(self, model: MultiTrain, head: str, views: int, size: int) -> None:
        self._model, self._head, self._views, self._size = model, head, views, size
        self._clips: dict[int, torch.Tensor] = {}

    def holds_other_than(self, group: int) -> bool:
        return any(i // self._size != group for i in self._clips)

    def add(self, index: int, clips: torch.Tensor) -> None:
        self._clips[index] = clips

    def scores(self) -> Iterator[tuple[int, Scores, str]]:
        """Scores of the videos added so far; empties the batch."""
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
        features = model.features(clips.to(device_of(model), non_blocking=True))
        return model.probabilities(self._head, model.heads.of(self._head)(features)).cpu()


def _load(config: RunConfig, task: Task, indices: Sequence[int], stop: Stop | None) -> Iterator[Views]:
    """All views of each video, or the reason why it cannot be read, in the order of `indices`; ends early when `stop` returns True."""
    from multitrain.data.loader import EvalLoader

    if not indices:
        return
    with EvalLoader(task.catalog, indices, task.dataset, config, task.corruption) as loader:
        while stop is None or not stop():
            try:
                video = loader.next_video(POLL_SECONDS)
            except StopIteration:
                return
            if video is not None:
                yield video
