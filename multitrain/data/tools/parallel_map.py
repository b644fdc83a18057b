"""Map a function over many files with several processes and in shards, interruptible at any moment and resumable.

Journals record the completed items, one JSON object per line. An item without a line is processed again, so the function must
leave either no result or the complete one.
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
from typing import Any, TypeVar

from multitrain.config import ConfigError
from multitrain.data.packs import DamagedError, find_packed
from multitrain.records import jsonl
from multitrain.records.progress import duration

Item = TypeVar("Item")
Work = Callable[[Any], dict[str, Any]]
"""The function of one item, called in a worker process: returns the record for the journal. Must be picklable."""

FINAL = "final"
"""Key in the record of a failed item: False if the cause is not the item (e.g. a full disk), so that it is tried again."""

FIELDS = {"check": ("frames", "fps", "width", "height"), "resize": ("frames", "width", "height", "bytes")}
"""Keys of positive numbers in the record of every successful item, by kind of work."""

_POLL_SECONDS = 0.2  # seconds between checks of signals and time limits


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: every `count`-th item, starting with item `index`."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """Parse ``i/n`` with i from 0 to n − 1. Raises ConfigError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ConfigError(f"--shard {text!r}: write I/N with I from 0 to N-1, e.g. 0/16")
        return Shard(int(index), int(count))

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this shard."""
        return items[self.index :: self.count]


class Journal:
    """The records of completed items, by item and version of the item.

    Every shard appends to its own file, and all files of the folder are read, so that a resumed job may have another number of
    shards.

    Args:
        folder: created if missing.
        kind: kind of work; journals of other kinds in the same folder are ignored.
        shard: the shard to whose file records are appended.

    Raises:
        ConfigError: the folder cannot be created or read, or a file with the journal's name is not a journal.
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
        """The last record of every item in the journals of a folder. Raises ConfigError if there are no journals."""
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
        """Whether a record, which may come from another user, has the expected fields."""
        if not isinstance(record.get("item"), str):
            return False
        if "error" in record:
            return isinstance(record["error"], str)
        values = [record.get(field) for field in FIELDS.get(self._kind, ())]
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values)

    def refresh(self) -> None:
        """Read the records that other shards have written since."""
        self._read()

    def get(self, item: str, version: object) -> dict[str, Any] | None:
        """The last record of an item in this version, or None."""
        return next((r for r in reversed(self._done.get(item, [])) if r["version"] == version), None)

    def settled(self, item: str, version: object) -> bool:
        """Whether an item in this version needs no further work. Failures that earlier versions recorded are tried once more."""
        record = self.get(item, version)
        return record is not None and ("error" not in record or bool(record.get(FINAL)))

    def all_of(self, item: str) -> list[dict[str, Any]]:
        """All records of an item, in any version."""
        return self._done.get(item, [])

    def claim(self) -> None:
        """Raise ConfigError if records cannot be appended."""
        try:
            os.close(os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._file}: cannot be written ({error.strerror}); make it writable, or choose another folder, and run the command again"
        )

    def add(self, item: str, version: object, record: dict[str, Any]) -> None:
        """Append the record of an item and sync it to disk. Raises ConfigError if this fails."""
        entry = {"item": item, "version": version, **record}
        self._done.setdefault(item, []).append(entry)
        try:
            jsonl.append(self._file, entry)
        except OSError as error:
            raise self._refused(error) from None


def _is_journal(file: Path) -> bool:
    """Whether a file is not a symbolic link, and is empty or starts with a record (perhaps an incomplete one)."""
    if file.is_symlink() or not file.is_file():
        return False
    with open(file, "rb") as handle:
        return b'{"item": '.startswith(handle.read(9))


def version(path: Path) -> list[int]:
    """The version of a file: its size and modification time in nanoseconds, [-1, -1] if it is missing. A changed file is processed again.

    For a packed video: its size, the shard's modification time, and its checksum.
    """
    try:
        if (stored := find_packed(path)) is not None:
            return [stored.size, stored.shard.stat().st_mtime_ns, stored.crc or 0]
        found = path.stat()
    except (OSError, ValueError, DamagedError):  # ValueError: not a valid file name
        return [-1, -1]
    return [found.st_size, found.st_mtime_ns]


class ProgressBar:
    """A progress bar with the remaining time on a terminal; a line every half minute in logs."""

    EVERY = 30.0

    def __init__(self, title: str, total: int, unit: str = "file") -> None:
        self._unit, self._title, self._total = unit, title, total
        self._done = self._bad = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit=self._unit, file=sys.stderr, dynamic_ncols=True)

    def add(self, *, bad: bool) -> None:
        """Count one more item."""
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
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    limit: float
    """Time limit of an item in seconds; a worker's start has no limit."""
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
    """Yield (item, result of `work`) for each item, in order of completion.

    A worker that crashes (e.g. in a decoder) or takes longer than `timeout` seconds is replaced, and its item gets
    ``{"error": reason}``, as does an item for which `work` raised. When `stop` returns true, workers are killed and
    the iteration ends.
    """
    waiting = iter(items)
    running: list[_Worker] = []
    try:
        for item in waiting:
            running.append(_start(work, timeout))
            _assign(running[-1], item)
            if len(running) == workers:
                break
        while running:
            if stop():
                return
            ready = set(wait([w.pipe for w in running], timeout=_POLL_SECONDS))
            for worker in list(running):
                answer = _poll(worker, worker.pipe in ready)
                if answer is None:
                    continue
                done = worker.item
                if worker.process.exitcode is not None or "overdue" in answer:
                    _end(worker)
                    running.remove(worker)
                    worker = _start(work, timeout)
                    running.append(worker)
                following = next(waiting, None)
                if following is None:
                    _end(worker)
                    running.remove(worker)
                else:
                    _assign(worker, following)
                yield done, {k: v for k, v in answer.items() if k != "overdue"}
    finally:
        for worker in running:
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
    with contextlib.suppress(BrokenPipeError):  # the worker died; the next poll detects it
        worker.pipe.send(item)


def _poll(worker: _Worker, ready: bool) -> dict[str, Any] | None:
    """The worker's result, or an error record if it died or exceeded its time limit; None while it works."""
    if ready:
        try:
            answer: dict[str, Any] | None = worker.pipe.recv()
            if answer is None:  # the worker's message that it has started
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
    """Kill a worker and its child processes."""
    worker.pipe.close()
    if worker.process.pid is not None and worker.process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # the worker has no process group of its own yet
            os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()


def _serve(pipe: Connection, work: Work) -> None:
    """Run a worker: send one result per item until the pipe is closed. Ignores signals, which the parent handles."""
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
