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
"""Factor of the limit until the first update is completed: files are indexed, libraries warm up."""
PEER_GRACE_SECONDS = 5.0
"""Seconds between writing the stacks and the exit, so that the other ranks, which hang for the same reason, write theirs."""
SUSPEND_GAP_SECONDS = 5.0
"""Excess duration of a sleep from which the process is taken to have been suspended meanwhile."""


class Watchdog:
    """Ends the process when :meth:`heartbeat` has not been called for `limit` seconds.

    It writes the stacks of all threads to standard error, which is the rank's log, and an event `hung` to the run's events; then it
    ends the process with status 1, without a collective. Time during which the process was suspended (by SLURM, or a closed laptop)
    does not count.

    If a library holds the interpreter lock, this thread does not run either. Then the supervisor acts: once a second this thread
    writes the time limit to the pipe MULTITRAIN_PULSE_FD. If nothing arrives for longer than that, the supervisor sends a signal that
    makes `faulthandler` write the stacks, which needs no interpreter lock, and kills the rank. A suspended job suspends its supervisor
    as well. Without a pipe, `faulthandler`'s own timer does the same half a minute after the limit, suspended or not.

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
        """Record progress; from now on the limit is not multiplied by `WARMUP_FACTOR`."""
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
        """Sleep; if the process was suspended meanwhile, shift the time of the last progress accordingly."""
        begun = time.monotonic()
        time.sleep(seconds)
        now = time.monotonic()
        if now - begun > seconds + SUSPEND_GAP_SECONDS:
            self._last = min(self._last + now - begun - seconds, now)

    def _say(self, *lines: str) -> None:
        """Write all lines to standard error in one system call, each with the rank, because ranks may share a log."""
        with contextlib.suppress(OSError):  # the disk of the log is full; the process must end all the same
            sys.stderr.flush()
            os.write(
                sys.stderr.fileno(), "".join(f"multitrain: rank {self._rank}: {line}\n" for line in lines).encode()
            )


def stacks() -> list[str]:
    """The stacks of all threads of this process: a line with the thread's name, then a line per frame, most recent call first.

    Source lines are left out: the disk that holds them may be the cause of the hang.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for thread, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(thread, thread)}, most recent call first")
        lines += [
            f"  {at.f_code.co_filename}:{line} in {at.f_code.co_name}" for at, line in traceback.walk_stack(frame)
        ]
    return lines
