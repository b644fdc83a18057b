"""The order in which shards are read locally: shards permuted, then the videos within windows of a few shards.

`data pack` cuts a dataset into shards of a fixed number of videos. Which video lies in which shard is a function of the number
of videos alone (`scatter`), so the order knows the shards and depends neither on files nor on whether there are any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from multitrain.order.permutation import key, permute

SHARD_VIDEOS = 1000
"""Videos of a shard, unless the configuration says otherwise."""


def scatter(place: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The videos, by their lines in the csv, at some places of the shards of a dataset of `size` videos.

    Shard s holds places ``[s * n, (s + 1) * n)`` for n videos a shard. A fixed permutation, so that the videos of a shard are a
    fair sample of the dataset also where the csv is sorted by class.
    """
    return permute(place, size, key("shards", size))


@dataclass(frozen=True)
class Pass:
    """One pass over some shards: which comes when, and where windows end.

    Attributes:
        shard: int64 [S], the shard at each position.
        start: int64 [S + 1], the place in the pass of the first video of each position, and the end.
        window: int64 [windows + 1], the place of the first video of each window, and the end.
        keys: uint64 [windows], of the permutation in each window.
    """

    shard: NDArray[np.int64]
    start: NDArray[np.int64]
    window: NDArray[np.int64]
    keys: NDArray[np.uint64]

    def shuffled(self, place: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard, and the number within it, of the video that comes at each place [N] of the pass."""
        number = np.searchsorted(self.window, place, side="right") - 1
        begin = self.window[number]
        size = self.window[number + 1] - begin
        moved = np.empty_like(place)
        for common in np.unique(size):  # windows have few sizes, however many they are
            at = np.flatnonzero(size == common)
            keys = self.keys[number[at]]
            same = keys[:1] if (keys == keys[0]).all() else keys
            moved[at] = begin[at] + permute(place[at] - begin[at], int(common), same)
        position = np.searchsorted(self.start, moved, side="right") - 1
        return self.shard[position], moved - self.start[position]


@lru_cache(maxsize=64)
def shard_pass(sizes: tuple[tuple[int, int, int], ...], reach: int, name: tuple[str | int, ...]) -> Pass:
    """The pass that `name` identifies, over shards of sizes ``(videos, n, rest)``, one triple a part.

    A part of `videos` is cut into shards of n, and a last one of the rest (0: there is none). Windows are as even as they can
    be, of ``(reach + 1) // 2`` shards at most: so whoever takes videos of two windows reads ``reach + 1`` shards or fewer.
    """
    videos = np.concatenate([_sizes(*part) for part in sizes])
    count, width = len(videos), (reach + 1) // 2
    shard = permute(np.arange(count), count, key(*name, "shards"))
    start = np.concatenate([[0], np.cumsum(videos[shard])])
    windows = -(-count // width)
    window = start[np.arange(windows + 1) * count // windows]
    root = key(*name, "window")
    keys = permute(np.arange(windows), 1 << 62, root).astype(np.uint64)
    for array in (shard, start, window, keys):
        array.flags.writeable = False
    return Pass(shard, start, window, keys)


def _sizes(videos: int, n: int, rest: int) -> NDArray[np.int64]:
    return np.array([*[n] * (videos // n), *([rest] if rest else [])], np.int64)


__all__ = ["SHARD_VIDEOS", "Pass", "scatter", "shard_pass"]
