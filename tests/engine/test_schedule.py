"""The learning rate is a function of the update alone."""

from __future__ import annotations

import math

import pytest

from multitrain.config import OptimConfig
from multitrain.engine.schedule import Schedule


def published(epoch: float, base: float, start: float, end: float, warmup: float, epochs: float) -> float:
    """PySlowFast's cosine policy with COSINE_AFTER_WARMUP, in epochs."""

    def cosine(t: float) -> float:
        return end + (base - end) * (math.cos(math.pi * (t - warmup) / (epochs - warmup)) + 1) / 2

    return start + (cosine(warmup) - start) / warmup * epoch if epoch < warmup else cosine(epoch)


@pytest.mark.parametrize("epoch", [0, 0.5, 9.99, 10, 10.01, 27, 49.9])
def test_equals_the_published_schedule_at_any_epoch(epoch: float) -> None:
    per_epoch = 2400.7
    schedule = Schedule.of(OptimConfig(lr=4e-4, start_lr=4e-6, end_lr=4e-6), round(50 * per_epoch), per_epoch)
    expected = published(epoch, 4e-4, 4e-6, 4e-6, 10, 50)
    assert schedule(epoch * per_epoch) == pytest.approx(expected, rel=1e-5)


def test_starts_at_the_start_rate_peaks_after_warmup_and_ends_at_the_end_rate() -> None:
    schedule = Schedule.of(OptimConfig(lr=1.0, start_lr=0.1, end_lr=0.01, warmup_updates=10), 100, 5.0)
    assert schedule(0) == 0.1
    assert schedule(10) == 1.0
    assert schedule(99) < schedule(98) < schedule(11)
    assert schedule(100) == pytest.approx(0.01)


def test_no_warmup_and_all_warmup_are_both_fine() -> None:
    assert Schedule.of(OptimConfig(lr=1.0, warmup_updates=0), 10, 1.0)(0) == 1.0
    assert Schedule.of(OptimConfig(lr=1.0, start_lr=0.0, warmup_updates=50), 10, 1.0)(5) == 0.5
