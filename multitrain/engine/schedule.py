"""Learning rate as a function of the update number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from multitrain.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then the shape of `optim.schedule`. A function of the update number, so it has no state to save.

    `total` and `warmup` are in updates and may be fractions of one, so that lengths in epochs stay exact.
    """

    config: OptimConfig
    warmup: float
    total: float

    @classmethod
    def of(cls, config: OptimConfig, total: int, epoch_updates: float) -> Schedule:
        """The schedule of a run of `total` updates with `epoch_updates` updates per epoch of all datasets."""
        warmup = (
            float(config.warmup_updates) if config.warmup_updates is not None else config.warmup_epochs * epoch_updates
        )
        return cls(config, min(warmup, float(total)), float(total))

    def __call__(self, update: float) -> float:
        """Learning rate of update `update`, counted from 0."""
        c = self.config
        if update < self.warmup:
            return c.start_lr + (c.lr - c.start_lr) * update / self.warmup
        if self.total <= self.warmup or c.schedule == "constant":
            return c.lr
        if c.schedule == "step":
            return c.lr * c.gamma ** sum(update >= share * self.total for share in c.milestones)
        if c.schedule == "wsd":
            begin = max(self.warmup, (1.0 - c.decay_fraction) * self.total)
            return c.lr + (c.end_lr - c.lr) * _share(update, begin, self.total)
        # PySlowFast's cosine policy, with the cosine after the warm-up
        return c.end_lr + 0.5 * (c.lr - c.end_lr) * (1.0 + math.cos(math.pi * _share(update, self.warmup, self.total)))


def _share(update: float, begin: float, end: float) -> float:
    """How much of the way from `begin` to `end` is done, 0 to 1."""
    return min(1.0, max(0.0, (update - begin) / (end - begin)))
