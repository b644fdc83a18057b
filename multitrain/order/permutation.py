"""A keyed permutation of ``range(size)``, evaluated at any position in constant time.

Everything is integer arithmetic of fixed width, so the order is the same on every machine and with every version of
numpy. numpy's own shuffles guarantee that for one build on one machine only (NEP 19).
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np
from numpy.typing import NDArray

ROUNDS = 16
"""Enough rounds that all 720 permutations of 6 items are equally likely (12 are measurably biased)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def key(*parts: int | str | bytes) -> int:
    """The 64-bit hash of a tuple.

    Every part enters BLAKE2b with its type and length. So ``("ab", "c")`` and ``("a", "bc")`` differ, ``(1,)`` and
    ``("1",)``, ``(seed, epoch + 1)`` and ``(seed + 1, epoch)``. Integers may be of any size and sign, numpy's too.

    Raises:
        TypeError: a part is not an integer, text or bytes.
    """
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        tag, payload = _encode(part)
        state.update(tag + len(payload).to_bytes(8, "big") + payload)
    return int.from_bytes(state.digest(), "big")


def _encode(part: int | str | bytes) -> tuple[bytes, bytes]:
    if isinstance(part, str):
        return b"s", part.encode("utf-8", "surrogatepass")
    if isinstance(part, bytes):
        return b"b", part
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
        number = int(part)
        return b"i", number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
    raise TypeError(f"a key is made of int, str and bytes, not {type(part).__name__} ({part!r})")


def permute(index: NDArray[np.int64], size: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """The images of `index` under a keyed bijection of ``range(size)``.

    A generalised Feistel network over Z_a × Z_b, a ≈ b ≈ √size, with cycle walking: images outside the range are mapped again
    until they are inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Since a·b exceeds the size by
    less than a, this is rare.

    Args:
        index: int64 of any shape, each in ``range(size)``.
        size: the length of the range, below 2**63; 0 (with no index) and 1 are fine.
        key: one 64-bit key, or uint64 in the shape of `index` with a key for each.

    Returns:
        int64 in the shape of `index`.

    Raises:
        ValueError: for an index outside the range.
    """
    index = np.asarray(index, np.int64)
    if index.size and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"cannot permute index {index.min()} … {index.max()}: not all in range({size})")
    if size <= 1 or not index.size:
        return np.zeros_like(index)
    columns = isqrt(size - 1) + 1
    shape = np.uint64(columns), np.uint64(-(-size // columns))
    keys = np.broadcast_to(_round_keys(np.atleast_1d(np.asarray(key, np.uint64)).ravel()), (ROUNDS, index.size))
    image = _feistel(index.astype(np.uint64).ravel(), shape, keys)
    outside = np.flatnonzero(image >= np.uint64(size))
    while outside.size:
        image[outside] = _feistel(image[outside], shape, keys[:, outside])
        outside = outside[image[outside] >= np.uint64(size)]
    return image.astype(np.int64).reshape(index.shape)


def shuffle(size: int, key: int) -> NDArray[np.int64]:
    """A whole keyed permutation of ``range(size)``, int64 [size]: cheaper than `permute` when all of it is needed."""
    return np.argsort(_round_keys(np.array([key], np.uint64), size)[:, 0], kind="stable")


def _round_keys(keys: NDArray[np.uint64], rounds: int = ROUNDS) -> NDArray[np.uint64]:
    """SplitMix64's stream from each of keys [N], as uint64 [rounds, N]."""
    steps = np.arange(1, rounds + 1, dtype=np.uint64)[:, None]
    return _scramble(keys + steps * _GOLDEN)


def _feistel(x: NDArray[np.uint64], shape: tuple[np.uint64, np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed bijection of ``range(a * b)`` for shape (a, b): each round adds to one coordinate a hash of the other."""
    a, b = shape
    left, right = x % a, x // a
    for even, odd in zip(keys[::2], keys[1::2]):
        left = (left + _hash(right, even)) % a
        right = (right + _hash(left, odd)) % b
    return right * a + left


def _hash(x: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """63 bits, so that adding a coordinate (below 2**32) cannot wrap round and spoil the bijection."""
    return _scramble(x ^ key) >> np.uint64(1)


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    x = x ^ (x >> _SHIFTS[0])
    x *= _MULTIPLIERS[0]
    x ^= x >> _SHIFTS[1]
    x *= _MULTIPLIERS[1]
    x ^= x >> _SHIFTS[2]
    return x
