"""Metrics of one update, reduced over all ranks by a single small all-reduce, for the log."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from multitrain.config import RunConfig
from multitrain.engine.distributed import World
from multitrain.engine.update import Losses

PER_RANK_MAX_WORLD = 16
"""World size up to which every update records each rank's times."""
PER_RANK_INTERVAL = 50
"""In larger worlds: updates between two that record each rank's times."""


class UpdateTimer:
    """Wall time of an update on this rank, in seconds."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start timing an update."""
        self.began = time.perf_counter()
        self.data = 0.0
        """Seconds of waiting for this rank's videos."""

    @property
    def elapsed(self) -> float:
        """Seconds since the update began."""
        return time.perf_counter() - self.began


class StepMetrics:
    """Sums an update's losses and times over the ranks; nothing in it changes the training."""

    def __init__(self, config: RunConfig, datasets: list[str], accumulation: int, world: World) -> None:
        self._config = config
        self._datasets = datasets
        self._accumulation = accumulation
        self._world = world
        self._count = 0

    def reduce(self, losses: Losses, timer: UpdateTimer) -> tuple[dict[str, Any], bool]:
        """The record of an update for `metrics.jsonl`, and whether any rank found unreadable videos. A collective.

        `data_wait_max`, `data_wait_rank`: the largest fraction of the update that a rank waited for its videos, and that rank.
        `own_seconds_max`, `own_seconds_median`, `slowest_rank`: seconds of the ranks' forward passes, which contain no
        collectives (in the backward pass a slow rank delays all others). `data_wait_per_rank` and `own_seconds_per_rank`: the
        same for each rank, in rank order; in large worlds only every `PER_RANK_INTERVAL` updates.
        """
        seconds = timer.elapsed
        own = torch.cat([losses.terms, losses.per_dataset.flatten()]).double().cpu()
        per_rank = torch.zeros(2, self._world.size, dtype=torch.float64)  # each rank fills its column
        per_rank[:, self._world.rank] = torch.tensor([timer.data, losses.forward.seconds()])
        counts = torch.tensor([seconds, float(len(losses.skipped))], dtype=torch.float64)
        total = self._world.sum(torch.cat([own, counts, per_rank.flatten()]))
        own, counts, flat = total.split([own.numel(), 2, per_rank.numel()])
        waited, busy = flat.view(2, -1)
        micro_batches = self._world.size * self._accumulation
        classification, projection, informative = (own[:3] / micro_batches).tolist()
        per_dataset = own[3:].view(-1, 2).tolist()
        clips = self._config.effective_batch * self._config.augment.copies
        record = {
            "loss": classification + projection + self._config.loss.informative_weight * informative,
            "loss_classification": classification,
            "loss_projection": projection,
            "loss_informative": informative,
            "loss_per_dataset": {n: s / c for n, (s, c) in zip(self._datasets, per_dataset) if c},
            "seconds": round(seconds, 4),
            "data_wait_fraction": round(float(waited.sum() / counts[0]), 4),
            "data_wait_max": round(float(waited.max() * self._world.size / counts[0]), 4),
            "data_wait_rank": int(waited.argmax()),
            "own_seconds_max": round(float(busy.max()), 4),
            "own_seconds_median": round(float(busy.median()), 4),
            "slowest_rank": int(busy.argmax()),
            "clips_per_second": round(clips / seconds, 3),
            "max_memory_gb": round(_peak_memory(self._world.device) / 1e9, 3),
        }
        if self._world.size <= PER_RANK_MAX_WORLD or self._count % PER_RANK_INTERVAL == 0:
            shares = waited * self._world.size / counts[0]
            record["data_wait_per_rank"] = [round(v, 4) for v in shares.tolist()]
            record["own_seconds_per_rank"] = [round(v, 4) for v in busy.tolist()]
        self._count += 1
        return record, bool(counts[1])


def _peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
