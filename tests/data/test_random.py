"""Draws never change, and follow the laws they are named after."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from multitrain.data.random import KeyedRNG

COUNT = 20_000

WORDS = [3245562797450168569, 12376904283407753691, 8682571627776151036]
UNIFORM = 3.2755098422660907
INTEGERS = [13, 3, 10, 6, 14, 8, 10, 10]
NORMAL = 7.071761808640744
BETAS = [0.8537575904630992, 0.4970279943891984, 0.7340069927213141]


def kolmogorov_smirnov(sample: list[float], cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """√n times the largest distance of the empirical from the true distribution; above 1.95 once in a thousand samples."""
    x = np.sort(np.array(sample))
    f, n = cdf(x), len(x)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max(np.abs(f - steps[:-1]).max(), np.abs(f - steps[1:]).max())


def beta_cdf(a: float, b: float) -> Callable[[np.ndarray], np.ndarray]:
    """By quadrature in u = x^a, v = (1 − x)^b from each end, where the integrand has no pole."""

    def end(a: float, b: float, x: np.ndarray) -> np.ndarray:
        u = np.linspace(0.0, 0.5**a, 20_001)
        f = (1.0 - u ** (1.0 / a)) ** (b - 1.0) / a
        area = np.concatenate([[0.0], np.cumsum((f[1:] + f[:-1]) / 2) * (u[1] - u[0])])
        return np.interp(x**a, u, area)

    half = np.array([0.5])
    low, high = end(a, b, half)[0], end(b, a, half)[0]

    def cdf(x: np.ndarray) -> np.ndarray:
        left = end(a, b, np.minimum(x, 0.5))
        right = low + high - end(b, a, np.minimum(1.0 - x, 0.5))
        return np.where(x <= 0.5, left, right) / (low + high)

    return cdf


def test_the_stream_is_the_same_for_ever() -> None:
    draws = KeyedRNG("multitrain", 7, b"x")
    assert [draws.word() for _ in range(3)] == WORDS
    assert draws.uniform(2, 5) == pytest.approx(UNIFORM, abs=1e-15)
    assert [draws.integer(0, 14) for _ in range(8)] == INTEGERS
    assert draws.normal(7, 0.5) == pytest.approx(NORMAL, abs=1e-12)
    assert [draws.beta(0.8, 0.8), draws.beta(1, 1), draws.beta(2.5, 0.1)] == pytest.approx(BETAS, abs=1e-12)


def test_words_go_on_behind_the_buffer_without_repeating() -> None:
    draws = KeyedRNG(1)
    assert len({draws.word() for _ in range(1000)}) == 1000


def test_other_parts_give_an_unrelated_stream() -> None:
    a, b = KeyedRNG("mix", 0, 1), KeyedRNG("mix", 0, 2)
    pairs = np.array([(a.uniform(), b.uniform()) for _ in range(COUNT)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / math.sqrt(COUNT)


def test_uniform() -> None:
    draws = KeyedRNG("uniform")
    sample = [draws.uniform(-3.0, 5.0) for _ in range(COUNT)]
    assert min(sample) >= -3.0
    assert max(sample) < 5.0
    assert kolmogorov_smirnov(sample, lambda x: (x + 3.0) / 8.0) < 1.95


def test_normal() -> None:
    draws = KeyedRNG("normal")
    sample = [draws.normal(7.0, 0.5) for _ in range(COUNT)]
    phi = np.vectorize(lambda x: 0.5 * (1.0 + math.erf((x - 7.0) / 0.5 / math.sqrt(2.0))))
    assert kolmogorov_smirnov(sample, phi) < 1.95


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.8), (1.0, 1.0), (0.5, 0.5), (0.2, 0.2), (3.0, 1.5)])
def test_beta(a: float, b: float) -> None:
    draws = KeyedRNG("beta", str(a), str(b))
    assert kolmogorov_smirnov([draws.beta(a, b) for _ in range(COUNT)], beta_cdf(a, b)) < 1.95


def test_the_beta_distribution_tested_against_is_right() -> None:
    x = np.linspace(0.001, 0.999, 101)
    np.testing.assert_allclose(beta_cdf(0.5, 0.5)(x), 2 / math.pi * np.arcsin(np.sqrt(x)), atol=1e-6)


def test_beta_with_tiny_parameters_stays_in_range() -> None:
    draws = KeyedRNG("tiny")
    sample = [draws.beta(1e-3, 1e-3) for _ in range(2000)]
    assert all(0.0 <= x <= 1.0 for x in sample)
    assert sum(x > 0.5 for x in sample) == pytest.approx(1000, abs=100)


def test_integers_reach_both_ends_equally_often() -> None:
    draws = KeyedRNG("integer")
    counts = np.bincount([draws.integer(0, 6) for _ in range(COUNT)], minlength=7)
    expected = COUNT / 7
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001
    assert draws.integer(-4, -4) == -4


def test_integers_of_a_huge_range_are_unbiased() -> None:
    """Three quarters of 2**64: the plain multiplication would hit some numbers twice as often as others."""
    draws, span = KeyedRNG("huge"), 3 << 62
    low = sum(draws.integer(0, span - 1) % 3 == 0 for _ in range(COUNT)) / COUNT
    assert low == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / COUNT))


def test_coins() -> None:
    draws = KeyedRNG("coin")
    assert not any(draws.coin(0.0) for _ in range(100))
    assert all(draws.coin(1.0) for _ in range(100))
    assert sum(draws.coin(0.25) for _ in range(COUNT)) == pytest.approx(COUNT / 4, abs=4 * math.sqrt(COUNT * 3 / 16))


def test_impossible_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="no integer"):
        KeyedRNG(0).integer(3, 2)
    with pytest.raises(ValueError, match="positive parameters"):
        KeyedRNG(0).beta(0.0, 1.0)
