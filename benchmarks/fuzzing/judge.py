"""Feed one input to one reader in a worker process, and classify the outcome."""

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
"""Kinds of faults. `raw text`: a library's message; `silent`: refused without one; `control`: control characters reach the terminal."""

CPU_SECONDS = 10.0
IDLE_SECONDS = 120.0
"""Limits of the CPU time and of the time without CPU use of a case; the load of the machine affects neither."""
GROWTH = 1 << 30
"""Limit of a case's peak memory beyond the worker's own, in bytes."""
STACKS = signal.SIGRTMIN + 5
"""Signal on which a worker writes the stacks of its threads."""
LONGEST = 12
"""Limit of lines on standard error of a command that refuses its input."""

RAW = re.compile(
    r"Traceback \(most|LexerNoViable|hydra\.(cc|errors)|omegaconf|pydantic|NoneType|object has no attribute|unhashable"
    r"|not subscriptable|invalid literal for int|list index out of range|unsupported operand|Errno \d+\] (?!.*: )|KeyError"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")


class Outcome(NamedTuple):
    kind: str
    text: str
    """The message, or the exception and its place."""


class Case(NamedTuple):
    reader: str
    number: int
    given: str = ""
    """The input in hexadecimal; if empty, it is derived from `number`."""


Call = Callable[[Path, bytes], Any]
"""Reads the bytes of a case in a temporary folder; a command returns its exit status."""


def content(case: Case, seeds: list[bytes]) -> bytes:
    """The bytes of a case, a function of its reader, number and the valid inputs `seeds`; numbers -1, -2 … are the seeds themselves."""
    if case.given:
        return bytes.fromhex(case.given)
    if case.number < 0:
        return seeds[-case.number - 1]
    rng = random.Random(f"{case.reader}/{case.number}")
    return mutated(rng.choice(seeds), rng)


class Said(NamedTuple):
    """The output of a case."""

    out: str
    err: str


def judged(
    call: Call, folder: Path, data: bytes, refusals: tuple[type[Exception], ...], said: Callable[[], Said]
) -> Outcome:
    """Call a reader in this process. `said` returns the output since the last case."""
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
    """Type and text of an exception, and the last line of this project's code in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if re.search(r"/(multitrain|launch)/", f.filename)] or frames
    at = ours[-1]
    name = "/".join(Path(at.filename).parts[-3:])
    return f"{type(error).__name__}: {str(error)[:200]!r} at {name}:{at.lineno} {at.name}"


Serve = Callable[[Case], Outcome]


class Worker:
    """A process that runs one case after another; it is killed and replaced if a case does not end.

    It is a new Python process, not a fork: in a fork, libraries that had started threads (OpenMP of torch) would wait for them for ever.

    Args:
        served: called in that process; returns the function that runs a case. Picklable.
        captures: files for its standard output and error, see :func:`taking`.
    """

    def __init__(self, served: Callable[[], Serve], captures: tuple[Path, Path]) -> None:
        self._served, self._captures = served, captures
        self._process: Any = None

    def judge(self, case: Case) -> Outcome:
        """Run a case and return its outcome. Raises RuntimeError if the process cannot start."""
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
        """The stacks of all threads of the process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, STACKS)
            time.sleep(1.0)
        return self._tail()

    def _tail(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._captures[1].read_bytes().decode(errors="backslashreplace")[-1500:]
        return ""

    def _ended(self) -> str:
        """Exit status and last output of a process that ended by itself."""
        self._process.join()
        said = f"ended with {self._process.exitcode}: {self._tail()}"
        self.close()
        return said

    def close(self) -> None:
        """Kill the process and its child processes."""
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
    """A value of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _session(leader: int) -> dict[int, int]:
    """CPU time in clock ticks by process of a session, including ended children."""
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
    """A function that returns the output of this process and its children since the last call."""

    def said() -> Said:
        texts = []
        for number, (stream, capture) in enumerate(zip((sys.stdout, sys.stderr), captures), 1):
            stream.flush()
            texts.append(capture.read_bytes().decode(errors="backslashreplace"))
            os.ftruncate(number, 0)
        return Said(*texts)

    return said
