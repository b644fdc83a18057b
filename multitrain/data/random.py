"""Reproducible random draws: own distributions over the raw 64-bit words of a keyed Philox generator.

Between versions, numpy keeps the raw stream of a bit generator, but not the values of `Generator.normal` and similar methods
(NEP 19). Therefore the code in this file computes every distribution from raw words.
"""

from __future__ import annotations

import math

import numpy as np

from multitrain.order.permutation import key

_WORDS = 32
_TWO_64 = 1 << 64
_TWO_53 = 1 << 53


def generator(*parts: int | str | bytes) -> np.random.Generator:
    """A counter-based generator (Philox 4×64-10; Salmon et al., SC 2011) keyed by the hash of `parts`."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


class KeyedRNG:
    """A stream of random numbers that is a pure function of `parts`, e.g. ``KeyedRNG("augment", seed, "ssv2", index, copy)``."""

    def __init__(self, *parts: int | str | bytes) -> None:
        self._bits = generator(*parts).bit_generator
        self._words: list[int] = []

    def word(self) -> int:
        """The next raw word, uniform over range(2**64)."""
        if not self._words:
            self._words = self._bits.random_raw(_WORDS).tolist()[::-1]
        return self._words.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform over [low, high), on a grid of 2**53 steps."""
        return low + (high - low) * ((self.word() >> 11) / _TWO_53)

    def integer(self, low: int, high: int) -> int:
        """Uniform integer from low to high, both included, without bias (Lemire, 2019). Raises ValueError for an empty range."""
        span = high - low + 1
        if not 0 < span <= _TWO_64:
            raise ValueError(f"no integer to draw from {low} to {high}")
        rejected = (_TWO_64 - span) % span
        product = self.word() * span
        while product % _TWO_64 < rejected:
            product = self.word() * span
        return low + (product >> 64)

    def coin(self, probability: float) -> bool:
        """True with the given probability: never for 0, always for 1."""
        return self.uniform() < probability

    def normal(self, mean: float = 0.0, std: float = 1.0) -> float:
        """Normal deviate (Box and Muller, 1958; the cosine half)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return mean + std * radius * math.cos(2.0 * math.pi * self.uniform())

    def beta(self, a: float, b: float) -> float:
        """Beta(a, b) deviate from two gamma deviates, in logarithms so that small a and b do not underflow.

        Raises:
            ValueError: a or b is not positive.
        """
        if a <= 0 or b <= 0:
            raise ValueError(f"beta needs positive parameters, not {a} and {b}")
        odds = self._log_gamma(b) - self._log_gamma(a)
        return 1.0 / (1.0 + math.exp(odds)) if odds < 700.0 else math.exp(-odds)

    def _log_gamma(self, shape: float) -> float:
        """Logarithm of a Gamma(shape, 1) deviate (Marsaglia and Tsang, 2000; with their boost below shape 1)."""
        if shape < 1.0:
            return self._log_gamma(shape + 1.0) + math.log(1.0 - self.uniform()) / shape
        d = shape - 1.0 / 3.0
        while True:
            x = self.normal()
            v = (1.0 + x / math.sqrt(9.0 * d)) ** 3
            u = 1.0 - self.uniform()
            if v > 0.0 and math.log(u) < 0.5 * x * x + d * (1.0 - v + math.log(v)):
                return math.log(d) + math.log(v)


def normals(count: int, *parts: int | str | bytes) -> np.ndarray:
    """`count` normal deviates, float32, a pure function of `parts` (Box and Muller, 1958)."""
    words = generator(*parts).bit_generator.random_raw(2 * ((count + 1) // 2)) >> np.uint64(11)
    first, second = (words / float(_TWO_53)).reshape(2, -1)
    radius = np.sqrt(-2.0 * np.log(1.0 - first))
    both = np.concatenate([radius * np.cos(2.0 * np.pi * second), radius * np.sin(2.0 * np.pi * second)])
    return both[:count].astype(np.float32)
