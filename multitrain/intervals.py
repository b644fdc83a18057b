"""How far an accuracy on N videos may be from that on all videos of the kind: 95 % intervals, and paired comparisons.

The intervals describe the choice of the test videos only: another seed of the same training differs too, which no interval
of one run shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)

RESAMPLES = 1000
"""Resamples of a bootstrap; fewer where one of them is slow, but at least :data:`FEWEST`."""
FEWEST = 200
_SEED = 0

Interval = tuple[float, float]
"""Lower and upper end, as fractions in [0, 1]."""
Weights = npt.NDArray[np.int64]
"""How often a bootstrap drew each video, [N]; the sum is N."""


def proportion(successes: int, trials: int) -> Interval:
    """The interval of a proportion by Wilson's score method; (0, 1) without trials.

    Unlike a bootstrap's, it has a width where all or none of a few videos are right (Wilson 1927; Brown, Cai, DasGupta 2001).
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < trials else 1.0


def bootstrap(measure: Callable[[Weights], float], videos: int, resamples: int = RESAMPLES) -> Interval:
    """The percentile interval of `measure` over `videos` that are drawn with replacement. The same draws at every call.

    Args:
        measure: from the number of times that each video was drawn to a value; NaN where it has none.

    Returns:
        NaN twice where no resample has a value.
    """
    draws = np.random.Generator(np.random.PCG64(_SEED))
    values = [measure(np.bincount(draws.integers(videos, size=videos), minlength=videos)) for _ in range(resamples)]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """The accuracy of a second model less that of a first one, on the same videos."""

    value: float
    low: float
    high: float
    p: float
    """Probability of a difference at least as large if both were equally good."""


def paired(only_first: int, only_second: int, videos: int) -> Difference:
    """Two models on the same videos.

    Args:
        only_first: videos that only the first model has right.
        only_second: videos that only the second one has right.
        videos: all of them, at least one.

    Returns:
        The interval of Bonett and Price (2012), and the p-value of McNemar's exact test.
    """
    first, second, total = (only_first + 1) / (videos + 2), (only_second + 1) / (videos + 2), videos + 2
    centre = second - first
    half = _Z * math.sqrt((first + second - centre * centre) / total)
    value = (only_second - only_first) / videos
    return Difference(
        value,
        max(-1.0, min(centre - half, value)),
        min(1.0, max(centre + half, value)),
        _two_sided(only_first, only_second),
    )


def _two_sided(first: int, second: int) -> float:
    """The two-sided p-value of `first` heads and `second` tails of a fair coin."""
    tosses, fewer = first + second, min(first, second)
    logs = [math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * sum(math.exp(value - tosses * math.log(2)) for value in logs))
