"""`data.stage`: one process a node copies the shards of the next updates to the node's own disk.

The order of the samples is arithmetic, so the process knows which shards the ranks of its node read next, in what order, and which
ones they do not read soon. If all shards fit, it copies them all. Whatever fails, readers take the shared shards, and this
process says so once. See `multitrain.data.stage_folder` for the files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import platform
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from multitrain.config import ConfigError
from multitrain.data.catalog import Catalog
from multitrain.data.packs import DamagedError, Pack, find_packed, pack_of, read_chunk
from multitrain.data.pool import IGNORED, shared_memory
from multitrain.data.stage_folder import Busy, Full, StageFolder
from multitrain.data.staged import StageError, locate
from multitrain.order import BatchShape, Plan
from multitrain.text import printable

AHEAD = 50
"""Minimum number of updates whose shards are looked up ahead."""
FURTHEST = 5000
"""Maximum number of updates, if their shards fit."""
CHUNK = 8 << 20  # bytes
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 600.0  # before the next try after an error
_IDLE_SECONDS = 10.0  # between two looks at the copies, when there is nothing to copy
_STOP_SECONDS = 1.0  # that the training process waits for this one
_DELETE_SECONDS = 20.0  # the same after the last update, when copies are deleted
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from multitrain.data.staging import main; main(int(sys.argv[2]))"


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


# ----------------------------------------------------------------------------------------------- in the training process


class Staging:
    """The staging process of a node, as the training process sees it. No method blocks or raises."""

    def __init__(self, job: Job) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said = False
        environment = os.environ | {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        path = [p or os.getcwd() for p in sys.path]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # inherited until the process ignores them
        try:
            with os.fdopen(shared_memory(0), "wb") as given:
                pickle.dump(job, given)
                given.flush()
                command = [sys.executable, "-c", _BOOT, json.dumps(path), str(given.fileno())]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, pass_fds=[given.fileno()], env=environment, bufsize=0
                )
            os.set_blocking(self._pipe.fileno(), False)
        except OSError as error:
            say(f"cannot start ({error.strerror or error}); shards are read from their folders")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin

    def reached(self, update: int) -> None:
        """Report that training has reached `update`."""
        self._send(b"%d\n" % update)

    def close(self, *, done: bool) -> None:
        """End the process; after the last update (`done`) it deletes the copies that no other run needs."""
        if self._process is None:
            return
        if done:
            self._send(b"done\n")
        with contextlib.suppress(OSError):
            self._pipe.close()
        try:
            self._process.wait(timeout=_DELETE_SECONDS if done else _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # without waiting: a process that hangs in a dead disk cannot be ended
        self._process = None

    def _send(self, line: bytes) -> None:
        if self._process is None or self._said:
            return
        try:
            self._pipe.write(line)
        except BlockingIOError:
            pass
        except OSError:
            self._said = True
            status = self._process.poll()
            if status != 0:  # with 0, it has said why
                say(f"the process ended (status {status}); shards that are not copied yet are read from their folders")


def say(line: str) -> None:
    """Print one line to the rank's log."""
    with contextlib.suppress(OSError, ValueError):
        print(f"multitrain: staging on {platform.node()}: {printable(line)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ in the staging process


class Shard:
    """A shard that is read in this run."""

    def __init__(self, pack: Pack, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.identity = pack.identity
        self.name = f"{self.identity}/{path.name}"
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
        self._numbers = [np.full(len(job.catalogs[s.name]), -2, np.int32) for s in job.plan.sources]
        self._listed: list[Shard] = []
        for name, catalog in job.catalogs.items():
            pack = pack_of(catalog.path(0))
            if pack is None:
                self.loose.append(name)
            else:
                self._open(pack)

    def _open(self, pack: Pack) -> None:
        if pack.folder not in self.packs:
            self.packs[pack.folder] = pack
            sizes = pack.shards().items()
            self.shards |= {pack.folder / name: Shard(pack, pack.folder / name, size) for name, size in sizes}
            self._places = {path: number for number, path in enumerate(self.shards)}
            self._listed = list(self.shards.values())

    def of(self, update: int) -> list[Shard]:
        """The shards that this node reads in an update, in order of first use."""
        found: dict[int, None] = {}
        for rank in self._job.ranks:
            start, _ = self._job.shape.slice(update, 0, rank)
            for ticket in self._job.plan.tickets(start, start + self._job.shape.videos_per_rank):
                found[self._number(int(ticket["dataset"]), int(ticket["index"]))] = None
        return [self._listed[number] for number in found if number >= 0]

    def _number(self, dataset: int, index: int) -> int:
        """Number of the shard of a video; -1 for a file."""
        known = int(self._numbers[dataset][index])
        if known == -2:
            known = self._numbers[dataset][index] = self._look_up(dataset, index)
        return known

    def _look_up(self, dataset: int, index: int) -> int:
        catalog = self._job.catalogs[self._job.plan.sources[dataset].name]
        try:
            stored = find_packed(catalog.path(index))
            if stored is not None and stored.shard not in self._places and (pack := pack_of(stored.shard)):
                self._open(pack)
        except (OSError, ValueError, DamagedError):
            return -1
        return -1 if stored is None else self._places.get(stored.shard, -1)


class Horizon:
    """The shards of the next updates: of `AHEAD` or more, as far as they fit into the limit."""

    def __init__(self, needs: Needs, start: int, stop: int, limit: int) -> None:
        self._needs, self._stop, self._limit = needs, stop, limit
        self._updates: deque[tuple[int, list[Shard]]] = deque()
        self._next = start
        self._bytes = 0
        self._count: dict[str, int] = {}
        self.wanted: list[Shard] = []
        """Distinct shards in order of first use."""

    def advance(self, update: int) -> None:
        """Forget the updates before `update`, and look further ahead for a short time."""
        while self._updates and self._updates[0][0] < update:
            for shard in self._updates.popleft()[1]:
                self._count[shard.name] -= 1
                if not self._count[shard.name]:
                    del self._count[shard.name]
                    self._bytes -= shard.size
        self._next = max(self._next, update)
        until = time.monotonic() + 0.2
        while time.monotonic() < until and not self.complete:
            shards = self._needs.of(self._next)
            for shard in shards:
                if shard.name not in self._count:
                    self._bytes += shard.size
                self._count[shard.name] = self._count.get(shard.name, 0) + 1
            self._updates.append((self._next, shards))
            self._next += 1
        self.wanted = list({shard.name: shard for _, shards in self._updates for shard in shards}.values())

    @property
    def complete(self) -> bool:
        """Whether there is nothing to look up further ahead."""
        ahead = len(self._updates)
        return self._next >= self._stop or (ahead >= AHEAD and (self._bytes > self._limit or ahead >= FURTHEST))


class Stager:
    """Copies shards in the order in which they are needed.

    Args:
        progress: the descriptor on which the training process writes lines: the update it has reached, or ``done``.
    """

    def __init__(self, job: Job, progress: int) -> None:
        self._job, self._progress = job, progress
        self._update, self._done = job.start, False
        self._text = b""
        self._pause, self._again = _PAUSE_SECONDS, 0.0
        self._said: set[str] = set()
        self._made: set[str] = set()
        self._bad: set[str] = set()

    def run(self) -> None:
        """Copy until the training process ends."""
        needs = Needs(self._job)
        if needs.loose:
            loose = ", ".join(map(repr, needs.loose))
            say(
                f"only packs are staged, and {loose} {'is' if len(needs.loose) == 1 else 'are'} not packed; see multitrain data pack"
            )
        if not needs.packs:
            return
        try:
            folder = StageFolder(locate(self._job.stage), self._job.limit)
            space = folder.space()
        except (StageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            say(f"data.stage={self._job.stage}: {reason}; shards are read from their folders")
            return
        total = sum(shard.size for shard in needs.shards.values())
        self._whole = total <= space
        part = "all of" if self._whole else "the next updates' part of"
        say(f"{part} {len(needs.shards)} shards ({in_words(total)}) go to {folder.root}, {in_words(space)} at most")
        horizon = Horizon(needs, self._job.start, self._job.stop, space)
        while self._listen(0.0):
            horizon.advance(self._update)
            wanted = horizon.wanted
            if self._whole:
                wanted = list({s.name: s for s in (*wanted, *needs.shards.values())}.values())
            if time.monotonic() < self._again:
                copied = False
            else:
                copied = self._step(folder, wanted)
            if not copied and not self._listen(0.0 if not horizon.complete else _IDLE_SECONDS):
                break
        if self._done:
            with contextlib.suppress(OSError):
                folder.clear({pack.identity for pack in needs.packs.values()})

    def _step(self, folder: StageFolder, wanted: list[Shard]) -> bool:
        """Copy the first of these shards that has no copy; whether one was copied."""
        try:
            folder.want([shard.name for shard in wanted])
            there = folder.copies()
            self._check(folder, wanted, there)
            for shard in wanted:
                if shard.name in there or shard.name in self._bad:
                    continue
                with contextlib.suppress(Busy), folder.reserve(shard.name, shard.size) as file:
                    self._copy(shard, file)
                    self._made.add(shard.name)
                    self._pause = _PAUSE_SECONDS
                    return True
        except Full:
            pass
        except Ended:
            return False
        except (OSError, StageError) as error:
            self._failed(folder, error)
        return False

    def _check(self, folder: StageFolder, wanted: list[Shard], there: dict[str, os.stat_result]) -> None:
        """Remove left-overs of another size, and report copies of this process that are gone."""
        self._made &= {shard.name for shard in wanted}  # others may have been deleted to make space
        for shard in wanted:
            found = there.get(shard.name)
            if found is not None and found.st_size != shard.size:
                folder.drop(shard.name)
                del there[shard.name]
            if found is None and shard.name in self._made:
                self._made.remove(shard.name)
                self._once(
                    "copies were damaged or removed and are made again; until then their shards are read from their folders"
                )

    def _copy(self, shard: Shard, file: int) -> None:
        """Copy the bytes. Raises Ended, OSError."""
        at = 0
        while at < shard.size:
            if not self._listen(0.0):
                raise Ended
            try:
                content = read_chunk(shard.path, at, min(CHUNK, shard.size - at))
            except OSError as error:
                raise SourceError(error.errno, error.strerror or str(error), str(shard.path)) from error
            if not content:
                self._bad.add(shard.name)
                raise SourceError(errno.EIO, "is shorter than its index says", str(shard.path))
            at += os.pwrite(file, content, at)

    def _failed(self, folder: StageFolder, error: OSError | StageError) -> None:
        """Report an error once, and wait before the next try."""
        self._again = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        where = str(error.filename) if isinstance(error, SourceError) else str(folder.root)
        self._once(f"{where}: {reason}; shards that are not copied are read from their folders")

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            say(line)

    def _listen(self, seconds: float) -> bool:
        """Take the training process's lines for up to `seconds`; False when it has ended or is done."""
        while not self._done and select.select([self._progress], [], [], seconds)[0]:
            received = os.read(self._progress, 1 << 16)
            if not received:
                return False
            *lines, self._text = (self._text + received).split(b"\n")
            for line in lines:
                self._done = self._done or line == b"done"
                self._update = max(self._update, int(line)) if line.isdigit() else self._update
            seconds = 0.0
        return not self._done


class Ended(Exception):
    """The training process has ended."""


class SourceError(OSError):
    """The shared shard cannot be read."""


def in_words(size: int) -> str:
    """Bytes in a unit that people read."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def main(given: int) -> None:
    """Run the staging process. Never returns.

    Args:
        given: descriptor of a file with the pickled `Job`.
    """
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    with contextlib.suppress(OSError):
        os.nice(5)
    with os.fdopen(given, "rb") as file:
        file.seek(0)
        job: Job = pickle.load(file)
    try:
        Stager(job, sys.stdin.fileno()).run()
    except (OSError, ConfigError, DamagedError) as error:
        say(f"{error}; shards are read from their folders")
    sys.stdout.flush()
    os._exit(0)


__all__ = ["Job", "Staging", "in_words", "main"]
