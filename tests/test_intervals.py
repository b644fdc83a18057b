"""Intervals and paired comparisons against known values, by counting, and against what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from multitrain.evaluation import metrics
from multitrain.intervals import bootstrap, paired, proportion


@pytest.mark.parametrize(
    ("right", "videos", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_proportion_is_that_of_the_textbook(right: int, videos: int, low: float, high: float) -> None:
    assert proportion(right, videos) == pytest.approx((low, high), abs=5e-5)
    assert proportion(videos - right, videos) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_few_videos_that_are_all_right_are_no_certainty() -> None:
    low, high = proportion(3, 3)
    assert low < 0.5
    assert high == 1.0
    assert proportion(0, 0) == (0.0, 1.0)


def test_the_interval_holds_the_truth_nineteen_times_of_twenty() -> None:
    draws = np.random.default_rng(1)
    for share, videos in ((0.5, 40), (0.9, 60), (0.97, 200)):
        hits = draws.binomial(videos, share, 4000)
        held = np.mean([low <= share <= high for low, high in (proportion(int(h), videos) for h in hits)])
        assert 0.93 < held < 0.98, (share, videos)


def test_a_difference_is_that_of_the_videos_on_which_the_two_disagree() -> None:
    found = paired(only_first=3, only_second=12, videos=100)
    assert found.value == pytest.approx(0.09)
    by_hand = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15
    assert found.p == pytest.approx(by_hand)
    assert found.low < found.value < found.high
    mirrored = paired(12, 3, 100)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert paired(5, 5, 50).p == 1.0
    assert paired(0, 0, 4).low < 0 < paired(0, 0, 4).high
    assert paired(0, 20_000, 40_000).p < 1e-300 or paired(0, 20_000, 40_000).p == 0.0


def test_equal_models_differ_by_chance_as_often_as_the_p_value_says() -> None:
    draws = np.random.default_rng(2)
    counts = draws.multinomial(200, [0.1, 0.1, 0.8], 4000)
    assert np.mean([paired(int(a), int(b), 200).p < 0.05 for a, b, _ in counts]) < 0.055
    assert 0.93 < np.mean([(f := paired(int(a), int(b), 200)).low <= 0 <= f.high for a, b, _ in counts]) < 0.98


def test_a_bootstrap_gives_the_same_interval_every_time_and_that_of_all_resamples() -> None:
    values = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    first = bootstrap(lambda w: float(w @ values / w.sum()), 5, 4000)
    assert first == bootstrap(lambda w: float(w @ values / w.sum()), 5, 4000)
    every = [values[list(chosen)].mean() for chosen in itertools.product(range(5), repeat=5)]
    assert first == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=0.04)
    assert all(math.isnan(end) for end in bootstrap(lambda _: math.nan, 5))


def test_resampled_measures_are_those_of_the_repeated_videos() -> None:
    draws = np.random.default_rng(3)
    scores = draws.integers(0, 6, (30, 4)).astype(np.float32)
    scores[4, 2] = np.nan
    labels = draws.integers(0, 4, 30)
    several = [tuple(np.flatnonzero(row)) for row in draws.random((30, 4)) < 0.3]
    by_class = metrics.resampled_class_accuracy(scores, labels)
    by_precision = metrics.resampled_average_precision(scores, several)
    for _ in range(20):
        weights = np.bincount(draws.integers(30, size=30), minlength=30)
        drawn = np.repeat(np.arange(30), weights)
        accuracies = metrics.per_class_accuracy(scores[drawn], labels[drawn])
        assert by_class(weights) == pytest.approx(np.nanmean(accuracies))
        expected = metrics.mean_average_precision(scores[drawn], [several[i] for i in drawn])
        assert by_precision(weights) == pytest.approx(expected)
