"""Validation during training: the scoring of the tests with one centred view per video, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from multitrain.config import RunConfig
from multitrain.evaluation import metrics
from multitrain.evaluation.scoring import Stop, Task, device_of, group_size, score_videos, share_of
from multitrain.evaluation.shards import Scores

if TYPE_CHECKING:
    import torch

    from multitrain.data.catalog import Catalog
    from multitrain.model import MultiTrain


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
    observe: Callable[[str, int, Scores | None], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy on validation videos during training, with one centred view per video, on all ranks.

    Args:
        model: put in eval mode meanwhile; its mode is restored.
        config: how clips are read.
        catalogs: of the validation split, by dataset.
        rank, world_size: this process among the ranks.
        reduce: float64 CPU tensor [n] → its sum over ranks, on every rank; a collective. None for one rank.
        stop: asked between videos; when it says yes on any rank, all ranks return {}.
        autocast: arithmetic of the forward pass; the surrounding one when not given.
        observe: told of each video that this rank scores: dataset, index, scores (None when it could not be read).

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
        share = share_of(len(catalog), group_size(config, one_view), rank, world_size)
        if not interrupted:
            with ExitStack() as stack:
                if autocast is not None:
                    stack.enter_context(torch.autocast(device_of(model).type, autocast))
                for index, scores, _ in score_videos(model, config, task, share, stop=stop):
                    tally.add(index, scores)
                    if observe is not None:
                        observe(name, index, scores)
            interrupted = stop is not None and stop()
        tallies.append(tally.vector)
    vector = torch.from_numpy(np.concatenate([*tallies, [float(interrupted)]]))
    vector = vector if reduce is None else reduce(vector)
    if float(vector[-1]) > 0:
        return {}
    sizes = [len(t) for t in tallies]
    parts = np.split(vector.numpy()[:-1], np.cumsum(sizes)[:-1])
    return {name: _Tally.results(catalogs[name], part) for name, part in zip(catalogs, parts)}


class _Tally:
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


__all__ = ["validate"]
