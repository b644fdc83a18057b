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


def rates(updates: int = 100, **options: object) -> list[float]:
    schedule = Schedule.of(OptimConfig(lr=1.0, start_lr=0.0, end_lr=0.1, warmup_updates=10, **options), updates, 1.0)
    return [schedule(update) for update in range(updates)]


def test_warm_up_stable_decay_is_flat_up_to_its_last_share_and_ends_in_a_straight_line() -> None:
    found = rates(schedule="wsd", decay_fraction=0.2)
    assert found[5] == 0.5
    assert set(found[10:81]) == {1.0}
    assert found[90] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.1 + 0.9 / 20)
    assert rates(schedule="wsd", decay_fraction=1.0)[55] == pytest.approx(0.55), "it decays from the end of the warm-up"


def test_constant_and_steps() -> None:
    assert set(rates(schedule="constant")[10:]) == {1.0}
    found = rates(schedule="step", milestones=(0.5, 0.9), gamma=0.5)
    assert (found[49], found[50], found[89], found[90], found[99]) == (1.0, 0.5, 0.5, 0.25, 0.25)


@pytest.mark.parametrize("milestones", [(), (0.5, 0.5), (0.9, 0.5), (0.0,), (1.0,)])
def test_milestones_that_do_not_ascend_are_refused(milestones: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not ascending shares"):
        OptimConfig(milestones=milestones)
