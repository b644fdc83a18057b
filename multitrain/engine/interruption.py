"""Requests to stop or save, and the point in the loop at which all ranks act on them.

The signal handler only records the signal. Before every micro-batch all ranks call :meth:`Interruption.agreed`, which returns the
strongest request of any rank on all of them.
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

from multitrain.cluster.slurm import STOP_SIGNALS, unblock_stop_signals


class Request(enum.IntEnum):
    """Requests to the run, weakest first."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint after this update and continue (file SAVE in the run's folder)."""
    STOP = 2
    """Save and stop until the run is submitted again (file STOP, or Ctrl-C)."""
    LEAVE = 3
    """Save and exit: the cluster takes the nodes away (a signal)."""


class Interruption:
    """Records signals and request files; returns the request that all ranks agree on.

    Args:
        run: the run's folder; rank 0 looks for files named STOP and SAVE in it.
        agree: the largest of all ranks' values (a collective).
        watches_files: whether this rank looks for the files.
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
        """Install the handlers, in the main process only (loader workers ignore the signals), and unblock what the launcher blocked."""
        pid = os.getpid()

        def note(number: int, _frame: FrameType | None) -> None:
            if os.getpid() != pid:  # a forked child that has not reset its handlers
                return
            if self.first_at is None:
                self.first_at = time.monotonic()
            self.signals.append(number)

        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, note)
        unblock_stop_signals()

    @property
    def pending(self) -> Request:
        """The strongest request known to this rank; no collective."""
        request = self._request
        # In a SLURM job SIGINT (`scancel --signal=INT`) counts as a stop signal; elsewhere it is Ctrl-C.
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
        """The strongest request of any rank; a collective, called by all ranks at the same point."""
        return Request(self._agree(int(self.pending)))

    def saved(self) -> None:
        """Acknowledge a SAVE request: delete its file."""
        if self._request == Request.SAVE:
            self._request = Request.NONE
        self._remove_files("SAVE")

    def stopped(self, request: Request) -> None:
        """Acknowledge that the run has saved and exits because of `request`. The file STOP is deleted if it was the request, so
        that the run can be submitted again; a STOP written during a preemption is for the next start.
        """
        self._remove_files("SAVE", *(["STOP"] if request == Request.STOP else []))

    def _remove_files(self, *names: str) -> None:
        for name in names if self._watches_files else ():
            with contextlib.suppress(OSError):  # the folder may have become read-only
                (self._run / name).unlink()
