"""Validation during training: the tests' scoring with one centred view per video, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multitrain.config import RunConfig
from multitrain.evaluation import metrics
from multitrain.evaluation.scoring import Stop, Task, device_of, group_size, score_videos, shard_indices
from multitrain.evaluation.shards import Scores
from multitrain.evaluation.validation_images import ValidationImages

if TYPE_CHECKING:
    import torch

    from multitrain.data.catalog import Catalog
    from multitrain.model import MultiTrain


Reduce = Callable[["torch.Tensor"], "torch.Tensor"]


class Validation:
    """The validation of a run: metrics of the validation videos, and plots of them. All ranks make the same calls.

    Args:
        config: of the run.
        index: folder of the annotation indexes.
        rank, world_size: this process among the ranks.
        reduce: float64 CPU tensor [n] → its sum over ranks, on every rank; a collective.
        stop: called after every video; when it returns True on any rank, all ranks end the validation.
    """

    def __init__(
        self, config: RunConfig, index: Path, *, rank: int, world_size: int, reduce: Reduce, stop: Stop
    ) -> None:
        from multitrain.data.catalog import open_catalogs

        self._config = config
        self._catalogs = open_catalogs(config.data, "val", index, config.eval.val_stride)
        self._ranks = {"rank": rank, "world_size": world_size}
        self._reduce = reduce
        self._stop = stop
        self._images = ValidationImages(config, self._catalogs)
        self.draws = config.monitor.tensorboard and config.monitor.pictures
        """Whether :meth:`pictures` has any."""

    def __call__(self, model: MultiTrain) -> dict[str, dict[str, float]]:
        """The result of :func:`validate`."""
        from multitrain.model.device import autocast

        self._images.clear()
        with autocast(self._config.eval.precision or self._config.precision, device_of(model)):
            results = validate(
                model,
                self._config,
                self._catalogs,
                **self._ranks,
                reduce=self._reduce,
                stop=self._stop,
                observe=self._images.add if self.draws else None,
            )
        if results and self.draws:
            self._images.share(self._reduce)
        return results

    def pictures(self) -> dict[str, bytes]:
        """Plots of the last validation, PNG by TensorBoard name. On rank 0; not a collective."""
        return self._images.draw()


def validate(
    model: MultiTrain,
    config: RunConfig,
    catalogs: Mapping[str, Catalog],
    *,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    stop: Stop | None = None,
    observe: Callable[[str, int, Scores | None], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy on validation videos during training, with one centred view per video, on all ranks.

    Args:
        model: put in eval mode meanwhile; its mode is restored.
        config: how clips are read.
        catalogs: of the validation split, by dataset.
        rank, world_size: this process among the ranks.
        reduce: float64 CPU tensor [n] → its sum over ranks, on every rank; a collective. None for one rank.
        stop: called after every video; when it returns True on any rank, all ranks return {}.
        observe: called for each video that this rank scores, with dataset, index and scores (None: could not be read).

    Returns:
        By dataset: ``top1``, ``top5`` in percent (multi-label: ``map`` too), ``videos`` listed and ``coverage``, the
        share that could be read. The same on every rank.
    """
    import torch

    parts_by_dataset: list[np.ndarray] = []
    interrupted = False
    for name, catalog in catalogs.items():
        one_view = config.data.datasets[name].model_copy(update={"temporal_views": 1, "spatial_views": 1})
        task = Task(name, name, one_view, catalog)
        sums = _MetricSums(catalog)
        share = shard_indices(len(catalog), group_size(config, one_view), rank, world_size)
        if not interrupted:
            for index, scores, _ in score_videos(model, config, task, share, stop=stop):
                sums.add(index, scores)
                if observe is not None:
                    observe(name, index, scores)
            interrupted = stop is not None and stop()
        parts_by_dataset.append(sums.vector)
    vector = torch.from_numpy(np.concatenate([*parts_by_dataset, [float(interrupted)]]))
    vector = vector if reduce is None else reduce(vector)
    if float(vector[-1]) > 0:
        return {}
    sizes = [len(t) for t in parts_by_dataset]
    parts = np.split(vector.numpy()[:-1], np.cumsum(sizes)[:-1])
    return {name: _MetricSums.results(catalogs[name], part) for name, part in zip(catalogs, parts)}


class _MetricSums:
    """Partial sums of a validation, as a float64 vector that is summed over ranks."""

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
        """The metrics from the sum of all ranks' vectors."""
        scored = max(vector[2], 1)
        out = {"top1": 100 * float(vector[0] / scored), "top5": 100 * float(vector[1] / scored)}
        if catalog.multi_label:
            rows = vector[3:].reshape(len(catalog), -1)
            seen = np.flatnonzero(rows[:, -1])
            out["map"] = 100 * metrics.mean_average_precision(rows[seen, :-1], [catalog.labels(int(i)) for i in seen])
        return out | {"videos": len(catalog), "coverage": float(vector[2] / len(catalog))}
