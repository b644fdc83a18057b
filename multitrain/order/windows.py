"""An order with local reads: the shards are permuted, then the videos within windows of a few shards.

`data pack` splits a dataset into shards of a fixed number of videos. The shard of a video is a function of the number of videos
alone (`scatter`), so the order does not depend on files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from multitrain.order.permutation import key, permute, shuffle

SHARD_VIDEOS = 1000
"""Default number of videos per shard."""


def scatter(place: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The videos (line numbers in the csv) at the positions `place` of the shards of a dataset of `size` videos.

    Shard s holds the positions ``[s * n, (s + 1) * n)`` for n videos per shard. A fixed permutation, so that a shard is an unbiased
    sample of the dataset also where the csv is sorted by class.
    """
    return permute(place, size, key("shards", size))


class Part(NamedTuple):
    """A dataset in an epoch, with its number of replicas."""

    videos: int
    replicas: int


@dataclass(frozen=True)
class Pass:
    """One epoch of the shards: their order, and the ends of the windows.

    Attributes:
        part: int64 [S], the part (replicas counted one by one) that the shard at each position is of.
        first: int64 [S], the place within its part of the shard's first video.
        start: int64 [S + 1], the place in the pass of the first video of each position, and the end.
        window: int64 [windows + 1], the place of the first video of each window, and the end.
        name: of the epoch, for the keys of the windows.
    """

    part: NDArray[np.int64]
    first: NDArray[np.int64]
    start: NDArray[np.int64]
    window: NDArray[np.int64]
    name: tuple[str | int, ...]

    def shuffled(self, place: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part, and the position within it, of the video at each of the ascending positions [N] of the epoch."""
        number = np.searchsorted(self.window, place, side="right") - 1
        begin = self.window[number]
        size = self.window[number + 1] - begin
        low = int(number[0])
        keys = np.array([key(*self.name, "window", n) for n in range(low, int(number[-1]) + 1)], np.uint64)
        moved = np.empty_like(place)
        for common in np.unique(size):  # windows have few sizes, however many they are
            at = np.flatnonzero(size == common)
            own = keys[number[at] - low]
            moved[at] = begin[at] + permute(place[at] - begin[at], int(common), own if len(keys) > 1 else keys)
        position = np.searchsorted(self.start, moved, side="right") - 1
        return self.part[position], self.first[position] + moved - self.start[position]


@lru_cache(maxsize=64)
def shard_pass(parts: tuple[Part, ...], shard_videos: int, reach: int, name: tuple[str | int, ...]) -> Pass:
    """The epoch with this name.

    Windows are as equal as possible and have ``(reach + 1) // 2`` shards at most, so that an update whose videos come from two
    consecutive windows reads ``reach + 1`` shards at most. Costs less than a microsecond per shard, once per epoch and process.
    """
    each = [np.arange(0, videos, shard_videos) for videos, replicas in parts for _ in range(replicas)]
    ends = [videos for videos, replicas in parts for _ in range(replicas)]
    part = np.repeat(np.arange(len(each)), [len(firsts) for firsts in each])
    first = np.concatenate(each)
    sizes = np.minimum(np.array(ends)[part] - first, shard_videos)
    count = len(first)
    order = shuffle(count, key(*name, "shards"))
    start = np.concatenate([[0], np.cumsum(sizes[order])])
    windows = -(-count // ((reach + 1) // 2))
    window = start[np.arange(windows + 1) * count // windows]
    arrays = part[order], first[order], start, window
    for array in arrays:
        array.flags.writeable = False
    return Pass(*arrays, name)
