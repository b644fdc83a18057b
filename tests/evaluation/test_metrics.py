"""Figures agree with cases worked out by hand, and ties never make them depend on the order of videos."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitrain.evaluation import metrics

SCORES = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.4, 0.35, 0.25]])


def test_topk_counts_a_true_label_among_the_best_k() -> None:
    labels = [1, 2, 2, 2]
    assert metrics.topk_accuracy(SCORES, labels, 1) == 0.5
    assert metrics.topk_accuracy(SCORES, labels, 2) == 0.75
    assert metrics.topk_accuracy(SCORES, labels, 3) == 1.0


def test_more_places_than_classes_hold_every_label() -> None:
    assert metrics.topk_accuracy(SCORES, [0, 0, 0, 0], 5) == 1.0


def test_any_of_several_labels_counts() -> None:
    assert metrics.topk_hits(SCORES, [(0, 1), (1, 2), (0,), (2, 0)], 1).tolist() == [True, False, False, True]


def test_of_equal_scores_the_lower_class_is_first() -> None:
    tied = np.array([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4], [0.3, 0.3, 0.3]])
    assert metrics.ranking(tied, 3).tolist() == [[0, 1, 2], [1, 2, 0], [0, 1, 2]]
    assert metrics.topk_hits(tied, [1, 2, 2], 1).tolist() == [False, False, False]
    assert metrics.topk_hits(tied, [0, 1, 0], 1).tolist() == [True, True, True]


def test_a_score_that_is_no_number_is_never_a_hit() -> None:
    broken = np.array([[np.nan, np.nan, np.nan], [np.nan, 1.0, 0.0]])
    assert metrics.topk_hits(broken, [0, 1], 3).tolist() == [False, False]


def test_confusion_has_true_labels_in_rows() -> None:
    matrix = metrics.confusion_matrix(SCORES, [1, 2, 2, 2])
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 0], [2, 0, 1]]


def test_per_class_accuracy_is_not_a_number_without_videos() -> None:
    accuracy = metrics.per_class_accuracy(SCORES, [1, 2, 2, 2])
    assert math.isnan(accuracy[0])
    assert accuracy[1:].tolist() == [1.0, pytest.approx(1 / 3)]


def test_confusion_refuses_several_labels() -> None:
    with pytest.raises(ValueError, match="exactly one label"):
        metrics.confusion_matrix(SCORES, [(0, 1), (1,), (2,), (0,)])


def test_a_label_outside_the_classes_is_refused() -> None:
    for label in (3, -1):
        with pytest.raises(ValueError, match=r"not in 0..2"):
            metrics.topk_accuracy(SCORES, [label, 0, 0, 0])


def test_average_precision_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert metrics.average_precision(scores, [1, 0, 1, 0]) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert metrics.average_precision(scores, [0, 0, 0, 1]) == pytest.approx(1 / 4)
    assert metrics.average_precision(scores, [1, 1, 1, 1]) == pytest.approx(1.0)
    assert math.isnan(metrics.average_precision(scores, [0, 0, 0, 0]))


def test_videos_of_equal_score_enter_average_precision_together() -> None:
    # one threshold with two videos, one of them positive (precision ½), then the last positive (precision ⅔)
    scores = np.array([0.5, 0.5, 0.1])
    for truth in ([1, 0, 1], [0, 1, 1]):
        assert metrics.average_precision(scores, truth) == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)


def test_mean_average_precision_leaves_out_classes_without_positives() -> None:
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.3]])
    assert metrics.mean_average_precision(scores, [(0,), (0, 1)]) == pytest.approx(1.0)
    assert metrics.mean_average_precision(scores, [(1,), (1,)]) == pytest.approx(1.0)
    assert metrics.mean_average_precision(scores, [(1,), (0,)]) == pytest.approx(0.5)


rows = st.lists(
    st.tuples(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=3, max_size=3), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@given(rows, st.randoms(use_true_random=False))
def test_no_figure_depends_on_the_order_of_videos(videos: list[tuple[list[float], int]], shuffle: object) -> None:
    def figures(these: list[tuple[list[float], int]]) -> list[float]:
        scores, labels = np.array([s for s, _ in these]), [(k,) for _, k in these]
        top = [metrics.topk_accuracy(scores, labels, k) for k in (1, 2, 3)]
        return [*top, metrics.mean_average_precision(scores, labels), *metrics.confusion_matrix(scores, labels).ravel()]

    mixed = list(videos)
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    assert figures(mixed) == pytest.approx(figures(videos), abs=1e-12)
    top = figures(videos)[:3]
    assert top == sorted(top)
    assert top[2] == 1.0


def test_no_videos_give_no_figure() -> None:
    none = np.zeros((0, 3))
    assert math.isnan(metrics.topk_accuracy(none, [], 1))
    assert math.isnan(metrics.mean_average_precision(none, []))
