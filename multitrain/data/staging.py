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
from typing import IO

from multitrain.config import ConfigError
from multitrain.data.packs import DamagedError, read_chunk
from multitrain.data.pool import IGNORED, shared_memory
from multitrain.data.shards_ahead import Horizon, Job, Needs, Shard
from multitrain.data.stage_folder import Busy, Full, StageFolder
from multitrain.data.staged import StageError, locate
from multitrain.text import byte_size, printable

CHUNK = 8 << 20  # bytes
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 600.0  # before the next try after an error
_CANDIDATES = 32  # shards that are considered for the next copy
_IDLE_SECONDS = 10.0  # between two looks at the copies, when there is nothing to copy
_STOP_SECONDS = 1.0  # that the training process waits for this one
_DELETE_SECONDS = 20.0  # the same after the last update, when copies are deleted
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from multitrain.data.staging import main; main(int(sys.argv[2]))"


# ----------------------------------------------------------------------------------------------- in the training process


class Staging:
    """The staging process of a node, as the training process sees it. No method blocks or raises."""

    def __init__(self, job: Job) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._broken = self._reported = False
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

    def report(self, trouble: str) -> None:
        """Say once that a reader of this node met an error with the copies."""
        if not self._reported:
            self._reported = True
            say(f"{trouble}; readers take the shared shards and try the copies again after some minutes")

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
        if self._process is None or self._broken:
            return
        try:
            self._pipe.write(line)
        except BlockingIOError:
            pass
        except OSError:
            self._broken = True
            status = self._process.poll()
            if status != 0:  # with 0, it has said why
                say(f"the process ended (status {status}); shards that are not copied yet are read from their folders")


def say(line: str) -> None:
    """Print one line to the rank's log."""
    with contextlib.suppress(OSError, ValueError):
        print(f"multitrain: staging on {platform.node()}: {printable(line)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ in the staging process


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
        part = "all of" if total <= space else "the next updates' part of"
        say(f"{part} {len(needs.shards)} shards ({byte_size(total)}) go to {folder.root}, {byte_size(space)} at most")
        others = needs.shards.values() if total <= space else ()
        horizon = Horizon(self._job, needs, space)
        while self._listen(0.0):
            horizon.advance(self._update)
            wanted = list(dict.fromkeys((*horizon.wanted(), *others)))
            copied = time.monotonic() >= self._again and self._step(folder, horizon, wanted)
            if not copied and not self._listen(_IDLE_SECONDS if horizon.complete else 0.0):
                break
        if self._done:
            with contextlib.suppress(OSError):
                folder.clear({pack.identity for pack in needs.packs.values()})

    def _step(self, folder: StageFolder, horizon: Horizon, wanted: list[Shard]) -> bool:
        """Copy one of these shards that has no copy; whether one was copied."""
        try:
            folder.ensure()
            there = folder.copies()
            self._check(folder, wanted, there)
            staged = [shard for shard in wanted if shard.name in there]
            folder.want([shard.name for shard in staged])
            space = folder.space()
            missing = [s for s in wanted if s.name not in there and s.name not in self._bad]
            for shard in missing[:_CANDIDATES]:
                kept = self._kept(horizon, staged, shard, space)
                if kept is None:
                    continue
                folder.want([s.name for s in kept])
                self._made &= {s.name for s in kept}
                with contextlib.suppress(Busy), folder.reserve(shard.name, shard.size) as file:
                    self._copy(shard, file)
                    self._made.add(shard.name)
                    self._pause = _PAUSE_SECONDS
                    return True
        except (Full, Ended):
            pass
        except (OSError, StageError) as error:
            self._failed(folder, error)
        return False

    def _kept(self, horizon: Horizon, staged: list[Shard], shard: Shard, space: int) -> list[Shard] | None:
        """The shards to keep with a new one, those that are used soonest; None if the new one is not worth the others.

        It is if this node reads half of its share of it before the next use of the others. Without windows, all shards are read all
        the time, and no copy is replaced.
        """
        kept, size = [], 0
        for candidate in sorted([*staged, shard], key=horizon.next_use):
            size += candidate.size
            if size > space:
                break
            kept.append(candidate)
        given_up = set(staged).difference(kept)
        if not given_up:
            return kept if shard in kept else None
        if self._job.plan.shuffle_window is None:
            return None
        until = min(map(horizon.next_use, given_up))
        share = len(self._job.ranks) / self._job.shape.world_size
        worth = horizon.uses(shard, until) >= share * shard.videos / 2
        return kept if shard in kept and worth else None

    def _check(self, folder: StageFolder, wanted: list[Shard], there: dict[str, os.stat_result]) -> None:
        """Remove left-overs of another size, and report copies of this process that are gone."""
        self._made &= {shard.name for shard in wanted}
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
    try:
        with os.fdopen(given, "rb") as file:
            file.seek(0)
            job: Job = pickle.load(file)
        Stager(job, sys.stdin.fileno()).run()
    except (OSError, ConfigError, DamagedError) as error:
        say(f"{error}; shards are read from their folders")
    sys.stdout.flush()
    os._exit(0)


__all__ = ["Job", "Staging", "main"]
