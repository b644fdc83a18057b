"""Long work over many files: by several processes, in shards, interrupted at any moment and resumed.

What is done stands in journals, one JSON object a line. A file whose line is not there yet is simply done again, so work must
leave either nothing or the whole result behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from multitrain.config import ConfigError
from multitrain.data.packs import DamagedError, find_packed
from multitrain.monitor import jsonl
from multitrain.monitor.progress import duration

Item = TypeVar("Item")
Work = Callable[[Any], dict[str, Any]]
"""What is done with one item, in a process of its own: returns what the journal is to hold of it. Must be picklable."""

FINAL = "final"
"""In the record of an item that failed: False when the item is not to blame (a full disk), so that it is tried again."""

INTERRUPTED = 75
"""Exit status of a command that was asked to stop; the same command goes on."""

FIELDS = {"check": ("frames", "fps", "width", "height"), "resize": ("frames", "width", "height", "bytes")}
"""Positive numbers in the record of every item that went well, by the kind of work."""

_POLL_SECONDS = 0.2  # seconds between two looks at signals and time limits


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: every `count`-th item, beginning with number `index`."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """``i/n`` with i from 0 to n − 1. Raises ConfigError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ConfigError(f"--shard {text!r}: write I/N with I from 0 to N-1, e.g. 0/16")
        return Shard(int(index), int(count))

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This shard's items."""
        return items[self.index :: self.count]


class Journal:
    """What is done, by item and version of the item.

    Every shard appends to a file of its own, and all files of the folder are read, so shards may be cut in another way when
    the work is resumed.

    Args:
        folder: made when missing.
        kind: what is done; other kinds in the same folder are left alone.
        shard: whose file is appended to.

    Raises:
        ConfigError: the folder cannot be made or read, or something that is no journal has the name of one.
    """

    def __init__(self, folder: Path, kind: str, shard: Shard) -> None:
        self._folder, self._kind = folder, kind
        self._file = folder / f"{kind}-{shard.index}-of-{shard.count}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made ({error.strerror}); choose another --out") from None
        if os.path.lexists(self._file) and not _is_journal(self._file):
            raise ConfigError(f"{self._file} is in the way: it is no journal of data {kind}; move it away")
        self._read()

    @classmethod
    def records(cls, folder: Path, kind: str) -> dict[str, dict[str, Any]]:
        """The last record of every item in the journals of a folder. Raises ConfigError: there are none."""
        if not any(folder.glob(f"{kind}-*-of-*.jsonl")):
            raise ConfigError(f"{folder}: no journal of data {kind}; give the folder that was its --out")
        return {item: found[-1] for item, found in cls(folder, kind, Shard())._done.items()}

    def _read(self) -> None:
        self._done: dict[str, list[dict[str, Any]]] = {}
        try:
            files = [f for f in self._folder.glob(f"{self._kind}-*-of-*.jsonl") if not f.is_symlink()]
            for file in sorted(files, key=lambda f: f.stat().st_mtime):
                for record in jsonl.read(file):
                    if "version" in record and self._is_valid(record):
                        self._done.setdefault(record["item"], []).append(record)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None

    def _is_valid(self, record: dict[str, Any]) -> bool:
        """Whether a record, perhaps from a stranger, holds what is read from it."""
        if not isinstance(record.get("item"), str):
            return False
        if "error" in record:
            return isinstance(record["error"], str)
        values = [record.get(field) for field in FIELDS.get(self._kind, ())]
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values)

    def refresh(self) -> None:
        """Read what other shards have written meanwhile."""
        self._read()

    def get(self, item: str, version: object) -> dict[str, Any] | None:
        """The last record of an item in this version."""
        return next((r for r in reversed(self._done.get(item, [])) if r["version"] == version), None)

    def settled(self, item: str, version: object) -> bool:
        """Whether an item is done, in this version, for good: failures of earlier versions, too, are looked at once more."""
        record = self.get(item, version)
        return record is not None and ("error" not in record or bool(record.get(FINAL)))

    def all_of(self, item: str) -> list[dict[str, Any]]:
        """Every record of an item, in any version."""
        return self._done.get(item, [])

    def claim(self) -> None:
        """Raises ConfigError now when records could not be added later."""
        try:
            os.close(os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._file}: cannot be written ({error.strerror}); the same command goes on when it can, or with another folder"
        )

    def add(self, item: str, version: object, record: dict[str, Any]) -> None:
        """Note that an item is done; on disk when this returns. Raises ConfigError when that cannot be."""
        entry = {"item": item, "version": version, **record}
        self._done.setdefault(item, []).append(entry)
        try:
            jsonl.append(self._file, entry)
        except OSError as error:
            raise self._refused(error) from None


def _is_journal(file: Path) -> bool:
    """Whether a file is empty or begins with a record (or a torn one), and is no link."""
    if file.is_symlink() or not file.is_file():
        return False
    with open(file, "rb") as handle:
        return b'{"item": '.startswith(handle.read(9))


def version(path: Path) -> list[int]:
    """Size and time of change of a file in nanoseconds, [-1, -1] when it is not there: a changed file is done again.

    Of a packed video its size, the time of change of the shard, and its checksum.
    """
    try:
        if (stored := find_packed(path)) is not None:
            return [stored.size, stored.shard.stat().st_mtime_ns, stored.crc or 0]
        found = path.stat()
    except (OSError, ValueError, DamagedError):  # ValueError: no disk takes such a name
        return [-1, -1]
    return [found.st_size, found.st_mtime_ns]


class ProgressBar(Generic[Item]):
    """A bar with the time to go on a terminal, a plain line every half minute in logs."""

    EVERY = 30.0

    def __init__(self, title: str, total: int, stream: TextIO | None = None, unit: str = "file") -> None:
        self._unit, self._title, self._total, self._stream = unit, title, total, stream or sys.stderr
        self._done = self._bad = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit=self._unit, file=self._stream, dynamic_ncols=True)

    def add(self, *, bad: bool) -> None:
        """One more is done."""
        self._done += 1
        self._bad += bad
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._bad} bad" if self._bad else "", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said > self.EVERY or self._done == self._total:
            self._said = time.monotonic()
            pace = self._done / max(self._said - self._began, 1e-9)
            left = f", {duration((self._total - self._done) / pace)} left" if self._done < self._total else ""
            some = f", {self._bad} bad" if self._bad else ""
            print(
                f"{self._title}: {self._done} of {self._total} {self._unit}s{some}, {pace:.1f} a second{left}",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    limit: float
    """Seconds that an item may take; a worker's start takes as long as it takes."""
    item: Any = None
    due: float = math.inf


def map_resumable(
    items: Iterable[Item],
    work: Work,
    *,
    workers: int,
    timeout: float,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Each item with what `work` gave for it, in the order in which they are done.

    A worker that dies (a decoder that crashes) or takes longer than `timeout` seconds is replaced, and what it worked on gets
    ``{"error": reason}``, as does an item for which `work` raised. When `stop` holds, workers are ended at once, and so is
    the iteration.
    """
    waiting = iter(items)
    crew: list[_Worker] = []
    try:
        for item in waiting:
            crew.append(_start(work, timeout))
            _assign(crew[-1], item)
            if len(crew) == workers:
                break
        while crew:
            if stop():
                return
            ready = set(wait([w.pipe for w in crew], timeout=_POLL_SECONDS))
            for worker in list(crew):
                answer = _poll(worker, worker.pipe in ready)
                if answer is None:
                    continue
                done = worker.item
                if worker.process.exitcode is not None or "overdue" in answer:
                    _end(worker)
                    crew.remove(worker)
                    worker = _start(work, timeout)
                    crew.append(worker)
                following = next(waiting, None)
                if following is None:
                    _end(worker)
                    crew.remove(worker)
                else:
                    _assign(worker, following)
                yield done, {k: v for k, v in answer.items() if k != "overdue"}
    finally:
        for worker in crew:
            _end(worker)


def _start(work: Work, limit: float) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, limit)


def _assign(worker: _Worker, item: Any) -> None:
    worker.item = item
    if worker.due < math.inf:
        worker.due = time.monotonic() + worker.limit
    with contextlib.suppress(BrokenPipeError):  # the worker has died; the next look at it finds out
        worker.pipe.send(item)


def _poll(worker: _Worker, ready: bool) -> dict[str, Any] | None:
    """What the worker says, or what has become of it; None while it works."""
    if ready:
        try:
            answer: dict[str, Any] | None = worker.pipe.recv()
            if answer is None:  # it has started
                worker.due = time.monotonic() + worker.limit
            return answer
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return {"error": f"the reader crashed ({how})"}
    if time.monotonic() > worker.due:
        return {"error": f"took longer than {worker.limit:g} s", "overdue": True}
    return None


def _end(worker: _Worker) -> None:
    """End a worker and what it has started."""
    worker.pipe.close()
    if worker.process.pid is not None and worker.process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # one that has no group of its own yet
            os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()


def _serve(pipe: Connection, work: Work) -> None:
    """A worker: one answer an item until the pipe is closed. Signals are the parent's business."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    pipe.send(None)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            answer = work(item)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split()), FINAL: False}
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


__all__ = ["FINAL", "INTERRUPTED", "Journal", "ProgressBar", "Shard", "map_resumable", "version"]
