"""Requests to stop or save, and the one point at which all ranks act on them.

A signal handler only notes the signal; a rank may be anywhere when it comes. Ranks ask :meth:`Interruption.agreed`
together before every micro-batch: the strongest request that any rank has seen becomes everybody's.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Preemption and cancellation (SIGTERM), SLURM's warning before the time limit (SIGUSR2), and a site's own (SIGUSR1). In a
SLURM job SIGINT (`scancel --signal=INT`) is another of these; elsewhere it is Ctrl-C."""


class Request(enum.IntEnum):
    """Requests to the run, weakest first."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint after this update and go on (file SAVE in the run's folder)."""
    STOP = 2
    """Save and stop for good until submitted again (file STOP, or Ctrl-C)."""
    LEAVE = 3
    """Save and leave: the cluster wants the nodes back (a signal)."""
    FAIL = 4
    """Save and stop with an error (too many unreadable videos)."""


class Interruption:
    """Notes signals and files; tells the agreed request.

    Args:
        run: the run's folder, where files named STOP and SAVE are looked for, by rank 0 only.
        agree: the largest of all ranks' values (a collective).
        watches_files: whether this is the rank that looks for the files.
        file_interval: seconds between two looks.
    """

    def __init__(
        self, run: Path, agree: Callable[[int], int], *, watches_files: bool, file_interval: float = 1.0
    ) -> None:
        self._run = run
        self._agree = agree
        self._watches_files = watches_files
        self._file_interval = file_interval
        self._last_look = -file_interval
        self._request = Request.NONE
        self.signals: list[int] = []
        """Signals this process has received, in order."""
        self.first_at: float | None = None
        """`time.monotonic()` of the first signal."""

    def install(self) -> None:
        """Take over the signals, in the main process only; loader workers ignore them. Unblocks what the launcher blocked."""
        pid = os.getpid()

        def note(number: int, _frame: FrameType | None) -> None:
            if os.getpid() != pid:  # a forked child that has not reset its handlers
                return
            if self.first_at is None:
                self.first_at = time.monotonic()
            self.signals.append(number)

        for number in SIGNALS:
            signal.signal(number, note)
        signal.signal(signal.SIGINT, note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*SIGNALS, signal.SIGINT))

    def ask(self, request: Request) -> None:
        """Make a request of this rank's own."""
        self._request = max(self._request, request)

    @property
    def pending(self) -> Request:
        """What this rank alone knows of; no collective."""
        request = self._request
        if any(s != signal.SIGINT for s in self.signals) or (self.signals and "SLURM_JOB_ID" in os.environ):
            request = max(request, Request.LEAVE)
        elif self.signals:
            request = max(request, Request.STOP)
        if self._watches_files and time.monotonic() - self._last_look >= self._file_interval:
            self._last_look = time.monotonic()
            if (self._run / "STOP").exists():
                self._request = max(self._request, Request.STOP)
            elif (self._run / "SAVE").exists():
                self._request = max(self._request, Request.SAVE)
            request = max(request, self._request)
        return Request(request)

    def agreed(self) -> Request:
        """The strongest request any rank has; a collective, called by all ranks at the same point."""
        return Request(self._agree(int(self.pending)))

    def saved(self) -> None:
        """A SAVE request was carried out; its file is taken away."""
        if self._request == Request.SAVE:
            self._request = Request.NONE
        self._take_away("SAVE")

    def stopped(self, request: Request) -> None:
        """The run has saved, and leaves because of `request`. STOP is taken away when it was that, so that the run can be
        submitted again; written while SLURM takes the nodes away, it is for the next start.
        """
        self._take_away("SAVE", *(["STOP"] if request == Request.STOP else []))

    def _take_away(self, *names: str) -> None:
        for name in names if self._watches_files else ():
            with contextlib.suppress(OSError):  # a folder that has become read-only is no reason to fail
                (self._run / name).unlink()
