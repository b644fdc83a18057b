"""Learning rate as a function of the update number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from multitrain.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine. A function of the update number, so it has no state to save.

    `total` and `warmup` are in updates and may be fractions of one, so that lengths in epochs stay exact.
    """

    lr: float
    start_lr: float
    end_lr: float
    warmup: float
    total: float

    @classmethod
    def of(cls, config: OptimConfig, total: int, epoch_updates: float) -> Schedule:
        """The schedule of a run of `total` updates with `epoch_updates` updates per epoch of all datasets."""
        warmup = (
            float(config.warmup_updates) if config.warmup_updates is not None else config.warmup_epochs * epoch_updates
        )
        return cls(config.lr, config.start_lr, config.end_lr, min(warmup, float(total)), float(total))

    def __call__(self, update: float) -> float:
        """Learning rate of update `update`, counted from 0 (PySlowFast's cosine policy with the cosine after warm-up)."""
        if update < self.warmup:
            return self.start_lr + (self.lr - self.start_lr) * update / self.warmup
        if self.total <= self.warmup:
            return self.lr
        progress = min(1.0, (update - self.warmup) / (self.total - self.warmup))
        return self.end_lr + 0.5 * (self.lr - self.end_lr) * (1.0 + math.cos(math.pi * progress))
