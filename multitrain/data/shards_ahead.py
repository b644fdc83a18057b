"""The shards that a node reads in the next updates, computed from the plan."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multitrain.data.catalog import Catalog
from multitrain.data.packs import DamagedError, Pack, find_packed, pack_of
from multitrain.order import BatchShape, Plan

AHEAD, FURTHEST = 50, 5000
"""Minimum and maximum number of updates whose shards are looked up ahead."""


@dataclass(frozen=True)
class Job:
    """What the staging process of a node needs to know.

    Attributes:
        stage, limit: `data.stage`, `data.stage_limit` in bytes.
        ranks: the ranks of this node.
        start, stop: the updates [start, stop) that are trained.
    """

    stage: str
    limit: int
    plan: Plan
    catalogs: Mapping[str, Catalog]
    shape: BatchShape
    ranks: range
    start: int
    stop: int


class Shard:
    """A shard that is read in this run."""

    def __init__(self, pack: Pack, path: Path, size: int, videos: int) -> None:
        self.path, self.size, self.videos = path, size, videos
        self.name = f"{pack.identity}/{path.name}"
        """Name of the copy below the folder of copies, without its ending."""


class Needs:
    """The shards that the ranks of a node read, update by update.

    Attributes:
        packs: the packs of the run, by folder.
        loose: the datasets that are no packs.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.packs: dict[Path, Pack] = {}
        self.loose: list[str] = []
        self.shards: dict[Path, Shard] = {}
        self._first: dict[Path, int] = {}
        self._numbers = [np.full(len(job.catalogs[s.name]), -2, np.int32) for s in job.plan.sources]
        self._listed: list[Shard] = []
        for name, catalog in job.catalogs.items():
            pack = pack_of(catalog.file(0))
            if pack is None:
                self.loose.append(name)
            else:
                self._open(pack)

    def _open(self, pack: Pack) -> None:
        if pack.folder not in self.packs:
            self.packs[pack.folder] = pack
            listed = zip(pack.shards().items(), pack.videos_of_shards())
            self._first[pack.folder] = len(self.shards)
            for (name, size), videos in listed:
                self.shards[pack.folder / name] = Shard(pack, pack.folder / name, size, videos)
            self._places = {path: number for number, path in enumerate(self.shards)}
            self._listed = list(self.shards.values())

    def of(self, update: int) -> dict[Shard, int]:
        """The shards that this node reads in an update, in order of first use, with the number of videos."""
        found: dict[int, int] = {}
        for rank in self._job.ranks:
            start, _ = self._job.shape.slice(update, 0, rank)
            for ticket in self._job.plan.tickets(start, start + self._job.shape.videos_per_rank):
                number = self._number(int(ticket["dataset"]), int(ticket["index"]))
                found[number] = found.get(number, 0) + 1
        return {self._listed[number]: videos for number, videos in found.items() if number >= 0}

    def _number(self, dataset: int, index: int) -> int:
        """Number of the shard of a video; -1 for a file."""
        known = int(self._numbers[dataset][index])
        if known == -2:
            known = self._numbers[dataset][index] = self._look_up(dataset, index)
        return known

    def _look_up(self, dataset: int, index: int) -> int:
        catalog = self._job.catalogs[self._job.plan.sources[dataset].name]
        pack = self.packs.get(catalog.videos)
        found = None if pack is None else pack.shard_number(os.path.normpath(catalog.file_path(index)))
        if pack is not None and found is not None:
            return self._first[pack.folder] + found
        try:
            stored = find_packed(catalog.file(index))
            if stored is not None and stored.shard not in self._places and (other := pack_of(stored.shard)):
                self._open(other)
        except (OSError, ValueError, DamagedError):
            return -1
        return -1 if stored is None else self._places.get(stored.shard, -1)


class Horizon:
    """The shards of the next updates, with the updates that use them.

    Without windows (`data.shuffle_window`) it looks `AHEAD` updates ahead, with windows at least as far as a window lasts, and
    further while the shards fit into `limit` bytes.
    """

    def __init__(self, job: Job, needs: Needs, limit: int) -> None:
        self._needs, self._stop, self._limit = needs, job.stop, limit
        plan = job.plan
        window = (plan.shuffle_window or 0) * plan.shard_videos * len(plan.sources) // plan.effective_batch
        self._least = min(max(AHEAD, window), FURTHEST)
        self._most = FURTHEST if plan.shuffle_window else self._least
        self._updates: deque[tuple[int, dict[Shard, int]]] = deque()
        self._uses: dict[Shard, deque[tuple[int, int]]] = {}
        self._next = job.start
        self._bytes = 0

    def advance(self, update: int) -> None:
        """Drop the updates before `update`, and look further ahead for a short time."""
        while self._updates and self._updates[0][0] < update:
            for shard in self._updates.popleft()[1]:
                self._uses[shard].popleft()
                if not self._uses[shard]:
                    del self._uses[shard]
                    self._bytes -= shard.size
        self._next = max(self._next, update)
        until = time.monotonic() + 0.2
        while time.monotonic() < until and not self.complete:
            shards = self._needs.of(self._next)
            for shard, videos in shards.items():
                if shard not in self._uses:
                    self._bytes += shard.size
                self._uses.setdefault(shard, deque()).append((self._next, videos))
            self._updates.append((self._next, shards))
            self._next += 1

    @property
    def complete(self) -> bool:
        """Whether there is nothing to look up further ahead."""
        ahead = len(self._updates)
        return self._next >= self._stop or ahead >= self._most or (ahead >= self._least and self._bytes > self._limit)

    def wanted(self) -> list[Shard]:
        """The shards in order of next use."""
        return sorted(self._uses, key=self.next_use)

    def next_use(self, shard: Shard) -> int:
        """The update that uses a shard next; the first one behind the horizon if none does."""
        return self._uses[shard][0][0] if shard in self._uses else self._next

    def uses(self, shard: Shard, before: int) -> int:
        """How many videos of a shard are read before an update."""
        return sum(videos for update, videos in self._uses.get(shard, ()) if update < before)


__all__ = ["AHEAD", "FURTHEST", "Horizon", "Job", "Needs", "Shard"]
