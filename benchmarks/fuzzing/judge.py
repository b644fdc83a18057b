"""One input to one reader, in a process that can be ended: what came out."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fuzzing.mutations import mutated

GOOD = ("accepted", "refused")
BAD = ("traceback", "raw text", "many lines", "silent", "control", "hang", "growth", "crash")
"""`raw text`: a library's own words; `silent`: refused without a word; `control`: control characters reach the terminal."""

CPU_SECONDS = 10.0
IDLE_SECONDS = 120.0
"""A case may compute for the first, and wait for something that never comes for the second; a busy machine changes neither."""
GROWTH = 1 << 30
"""Bytes that a case may add to the process at its peak."""
STACKS = signal.SIGRTMIN + 5
"""Makes a worker write where its threads are."""
LONGEST = 12
"""Lines on the standard error of a command that refuses."""

RAW = re.compile(
    r"Traceback \(most|LexerNoViable|hydra\.(cc|errors)|omegaconf|pydantic|NoneType|object has no attribute|unhashable"
    r"|not subscriptable|invalid literal for int|list index out of range|unsupported operand|Errno \d+\] (?!.*: )|KeyError"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")


class Outcome(NamedTuple):
    kind: str
    text: str
    """What was said, or where it broke."""


class Case(NamedTuple):
    reader: str
    number: int
    given: str = ""
    """The input itself, in hexadecimal; where it is empty, the number says what it is."""


Call = Callable[[Path, bytes], Any]
"""Reads a case's bytes in a folder of its own; a command returns its exit status."""


def content(case: Case, seeds: list[bytes]) -> bytes:
    """The bytes of a case: a function of its reader, its number and the valid inputs; -1, -2 … are those themselves."""
    if case.given:
        return bytes.fromhex(case.given)
    if case.number < 0:
        return seeds[-case.number - 1]
    rng = random.Random(f"{case.reader}/{case.number}")
    return mutated(rng.choice(seeds), rng)


class Said(NamedTuple):
    """What a case has printed."""

    out: str
    err: str


def judged(
    call: Call, folder: Path, data: bytes, refusals: tuple[type[Exception], ...], said: Callable[[], Said]
) -> Outcome:
    """Call a reader in this process. `said` takes what has been printed since the last case."""
    try:
        status = call(folder, data)
        status = status if isinstance(status, int) and not isinstance(status, bool) else 0
        printed = said()
    except SystemExit as left:
        printed = said()
        if isinstance(left.code, str):
            printed = Said(printed.out, printed.err + left.code)
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except refusals as error:
        said()
        printed, status = Said("", str(error)), 2
        if "\n" in printed.err:
            return Outcome("many lines", printed.err)
    except MemoryError as error:
        said()
        return Outcome("growth", _place(error))
    except BaseException as error:
        said()
        return Outcome("traceback", _place(error))
    return Outcome(_kind(status, printed), printed.err or printed.out)


def _kind(status: int, said: Said) -> str:
    text = said.out + said.err
    if RAW.search(text):
        return "raw text"
    if _CONTROL.search(text):
        return "control"
    if not status:
        return "accepted"
    if not text.strip():
        return "silent"
    return "many lines" if len(said.err.strip().splitlines()) > LONGEST else "refused"


def _place(error: BaseException) -> str:
    """Type, text and the last line of our own code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if re.search(r"/(multitrain|launch)/", f.filename)] or frames
    at = ours[-1]
    name = "/".join(Path(at.filename).parts[-3:])
    return f"{type(error).__name__}: {str(error)[:200]!r} at {name}:{at.lineno} {at.name}"


Serve = Callable[[Case], Outcome]


class Worker:
    """A process that judges one case after another. It is ended and started again when a case does not end.

    It is a new Python and no fork of this one: libraries that have started threads here (OpenMP of torch) wait for these for
    ever in a fork.

    Args:
        served: gives what judges a case, in that process; picklable.
        captures: files that its standard output and error go to, see :func:`taking`.
    """

    def __init__(self, served: Callable[[], Serve], captures: tuple[Path, Path]) -> None:
        self._served, self._captures = served, captures
        self._process: Any = None

    def judge(self, case: Case) -> Outcome:
        """The outcome of a case. Raises RuntimeError when the process cannot start."""
        if self._process is None:
            self._start()
        before = last = -1.0  # of the processor; looked at when half a second has passed
        limit = CPU_SECONDS * (2 if case.reader.startswith("$") else 1)  # half of it to start Python and import torch
        moved = time.monotonic()
        self._pipe.send(tuple(case))
        while not self._pipe.poll(0.5):
            cpu = _cpu_seconds(self._process.pid)
            before = cpu if before < 0 else before
            if cpu != last:
                last, moved = cpu, time.monotonic()
            idle = time.monotonic() - moved
            if cpu - before > limit or idle > IDLE_SECONDS:
                where = self._where()
                self.close()
                return Outcome("hang", f"{cpu - before:.1f} s of the processor, {idle:.0f} s idle; {where}")
        try:
            return Outcome(*self._pipe.recv())
        except EOFError:
            return Outcome("crash", self._ended())

    def _where(self) -> str:
        """What every thread of the process is at."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, STACKS)
            time.sleep(1.0)
        return self._tail()

    def _tail(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._captures[1].read_bytes().decode(errors="backslashreplace")[-1500:]
        return ""

    def _ended(self) -> str:
        """The exit status of a process that has ended by itself, and its last words."""
        self._process.join()
        said = f"ended with {self._process.exitcode}: {self._tail()}"
        self.close()
        return said

    def close(self) -> None:
        """End the process, and what it has started."""
        if self._process is not None:
            for pid in _session(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._served, self._captures, theirs))
        self._process.start()
        theirs.close()
        try:
            self._pipe.recv()
        except EOFError:
            raise RuntimeError(self._ended()) from None


def _serve(served: Callable[[], Serve], captures: tuple[Path, Path], pipe: Connection) -> None:
    os.setsid()
    # As of a command, of which the processes that it starts import little: not this fuzz, with torch, each time.
    vars(sys.modules["__main__"]).update(__spec__=None, __file__=None)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays when the test is ended
    for stream, capture in enumerate(captures, 1):
        os.dup2(os.open(capture, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), stream)
    sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False, buffering=1)
    faulthandler.register(STACKS, file=2, all_threads=True)
    serve = served()
    limit = _status("VmSize") + 2 * GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            outcome = _measured(serve, Case(*pipe.recv()))
            pipe.send((outcome.kind, outcome.text[:2000]))


def _measured(serve: Serve, case: Case) -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    outcome = serve(case)
    grown = _status("VmHWM") - before
    if grown > GROWTH:
        return Outcome("growth", f"{grown >> 20} MiB; {outcome.kind}: {outcome.text}")
    return outcome


def _status(name: str) -> int:
    """Bytes that /proc/self/status says of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _session(leader: int) -> dict[int, int]:
    """Processes of a session, with the clock ticks of each and of those that it has waited for."""
    ticks = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader or int(file.parent.name) == leader:
                ticks[int(file.parent.name)] = sum(map(int, fields[11:15]))
    return ticks


def _cpu_seconds(session: int) -> float:
    return sum(_session(session).values()) / os.sysconf("SC_CLK_TCK")


def taking(captures: tuple[Path, Path]) -> Callable[[], Said]:
    """A function that returns, and forgets, what this process and its children have printed."""

    def said() -> Said:
        texts = []
        for number, (stream, capture) in enumerate(zip((sys.stdout, sys.stderr), captures), 1):
            stream.flush()
            texts.append(capture.read_bytes().decode(errors="backslashreplace"))
            os.ftruncate(number, 0)
        return Said(*texts)

    return said
