"""Hang watchdog: dumps the stacks of all threads and exits when a rank makes no progress (a lost peer, driver or file server)."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from multitrain.cluster.exit_status import Exit
from multitrain.cluster.supervised import PULSE_FD, STACKS
from multitrain.lease import LeaseLost
from multitrain.records.events import Events

WARMUP_FACTOR = 3
"""Until the first update is done, the limit is this many times longer: files are indexed, libraries warm up."""
PEER_GRACE_SECONDS = 5.0
"""Seconds between the stacks and the end, for the other ranks, which hang for the same reason, to write theirs."""
GAP = 5.0
"""Seconds that a nap may last beyond what was asked; one that lasts longer was time in which the process stood still."""


class Watchdog:
    """Ends the process when :meth:`heartbeat` has not been called for `limit` seconds.

    All threads' stacks go to standard error, which is the rank's log, and an event `hung` to the run's events; then the
    process ends with status 1, without a collective. Time in which the whole process stood still does not count: SLURM suspends
    jobs, and laptops are closed.

    If a library holds the interpreter lock, this thread does not run either. Then the supervisor acts: once a second this thread
    writes to the pipe MULTITRAIN_PULSE_FD how long the rank may be silent. The supervisor asks a rank that is silent for longer
    for its stacks by a signal, which needs no interpreter, and kills it. A suspended job suspends its supervisor as well. Without a
    pipe, `faulthandler`'s own timer does the same half a minute after the limit, suspended or not.

    Args:
        run: the run's folder.
        rank: this rank.
        limit: seconds; None watches nothing.
        end: ends the process.
    """

    def __init__(self, run: Path, rank: int, limit: float | None, end: Callable[[int], None] = os._exit) -> None:
        self._run = run
        self._rank = rank
        self._limit = limit
        self._end = end
        self._allowed = WARMUP_FACTOR * limit if limit else 0.0
        self._last = time.monotonic()
        pulse = os.environ.pop(PULSE_FD, None)
        self._pulse = int(pulse) if pulse is not None else None
        if limit is not None:
            if self._pulse is not None:
                faulthandler.register(STACKS, all_threads=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """Record progress."""
        self._last = time.monotonic()

    def first_update_done(self) -> None:
        """The first update is done: from now on the limit is the plain one."""
        self.heartbeat()
        self._allowed = self._limit or 0.0

    def _watch(self) -> None:
        while (left := self._last + self._allowed - time.monotonic()) > 0:
            self._show_life(left)
            self._nap(min(left, 1.0))
        faulthandler.cancel_dump_traceback_later()
        text = f"no progress for {time.monotonic() - self._last:.0f} s (engine.hang_limit={self._limit:g})"
        self._say(f"{text}; where its threads are:", *stacks())
        try:
            Events(self._run / "events.jsonl").write("hung", rank=self._rank, reason=f"{text}; see the ranks' logs")
        except (OSError, LeaseLost) as error:  # the rank ends all the same
            self._say(f"{self._run}/events.jsonl cannot be written: {error}")
        time.sleep(PEER_GRACE_SECONDS)
        self._end(Exit.FAILED)

    def _show_life(self, left: float) -> None:
        if self._pulse is None:
            faulthandler.dump_traceback_later(left + PEER_GRACE_SECONDS + 30.0, exit=True)
            return
        with contextlib.suppress(OSError):  # the pipe is full or closed
            os.write(self._pulse, f"{self._allowed:g}\n".encode())

    def _nap(self, seconds: float) -> None:
        """Sleep; should the process stand still meanwhile, move the last progress by as much."""
        begun = time.monotonic()
        time.sleep(seconds)
        now = time.monotonic()
        if now - begun > seconds + GAP:
            self._last = min(self._last + now - begun - seconds, now)

    def _say(self, *lines: str) -> None:
        """All lines to standard error by one system call, each with the rank: ranks that share a log hang at the same time."""
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to hang on
            sys.stderr.flush()
            os.write(
                sys.stderr.fileno(), "".join(f"multitrain: rank {self._rank}: {line}\n" for line in lines).encode()
            )


def stacks() -> list[str]:
    """Where every thread of this process is: a line with its name, then a line a frame, most recent call first.

    Without the text of the lines, which lies on a disk that may be what hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for thread, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(thread, thread)}, most recent call first")
        lines += [
            f"  {at.f_code.co_filename}:{line} in {at.f_code.co_name}" for at, line in traceback.walk_stack(frame)
        ]
    return lines
