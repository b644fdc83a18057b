"""When a run saves: at the interval, on request and at the end of a start; with the log lines and events about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multitrain.engine.interruption import Interruption, Request
from multitrain.engine.leadtime import LeadTime
from multitrain.engine.saver import Saver, SaveResult
from multitrain.engine.watchdog import Watchdog
from multitrain.records.recorder import Recorder

ATTEMPTS = 3
"""Attempts to write the last checkpoint of a start, which no later one replaces."""


class CheckpointPolicy:
    """Decides when to save, and reports each save. All ranks make the same calls in the same order.

    Args:
        folder: the run's folder of checkpoints.
        every: updates between two checkpoints.
        saver: writes them.
        state: the state of the completed updates, as stored in a checkpoint.
        interruption: requests to save.
        watchdog: gets a heartbeat before and after waiting for a save.
        lead_time: gets the durations of saves.
        reports: whether this rank logs the results (rank 0).
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        saver: Saver,
        state: Callable[[], dict[str, Any]],
        *,
        interruption: Interruption,
        watchdog: Watchdog,
        lead_time: LeadTime,
        reports: bool,
    ) -> None:
        self._folder = folder
        self._every = every
        self._saver = saver
        self._state = state
        self._interruption = interruption
        self._watchdog = watchdog
        self._lead_time = lead_time
        self._reports = reports
        self._saved = -1  # newest update that is on disk, or being written

    def begin(self, recorder: Recorder, saved: int | None) -> None:
        """Allocate the saver's buffers; `saved`: the update of the checkpoint that the run resumes from, if any."""
        self._recorder = recorder
        self._saved = -1 if saved is None else saved
        self._saver.preallocate()

    def save_if_due(self, completed: int, *, is_best: bool = False) -> None:
        """Begin a checkpoint after `completed` updates at the interval, on request, or if it is the best so far; report the one begun
        before."""
        self._report(self._saver.poll_result())
        asked = self._interruption.agreed() == Request.SAVE
        due = completed % self._every == 0
        late = due and self._saver.in_flight and not self._saver.done
        began = time.monotonic()
        if asked or due or is_best:
            self._begin_save(completed)
        if late:
            self._report_slow(completed, time.monotonic() - began)
        if asked:
            self._end_save()
            self._interruption.saved()

    def save_last(self, completed: int) -> bool:
        """Write the last checkpoint of this start and wait for it; True if it is on disk."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(1.0)
            self._begin_save(completed)
            self._end_save()
            if self._saved == completed:
                return True
        return False

    def _begin_save(self, completed: int) -> None:
        """Copy the state and start writing it asynchronously, unless this update is saved.

        A failure to write is reported; the run continues and tries again at the next interval.
        """
        self._end_save()
        if self._saved != completed:
            self._saved = completed
            self._saver.start(self._state())

    def _end_save(self) -> None:
        """Wait for the save in flight, if any."""
        if not self._saver.in_flight:
            return
        self._watchdog.heartbeat()  # the disk gets the whole limit
        if not self._saver.finish():
            self._saved = -1
        self._report(self._saver.poll_result())
        self._watchdog.heartbeat()

    def _report_slow(self, completed: int, waited: float) -> None:
        """Report that a checkpoint was still being written when the next was due, and that training waited for it."""
        self._recorder.event("checkpoint_slow", update=completed, waited=round(waited, 3))
        self._recorder.write(
            f"WARNING: writing a checkpoint takes longer than checkpoint.every={self._every} updates; "
            f"training stood still for {waited:.1f} s: raise checkpoint.every, or look at the disk of {self._folder}"
        )

    def _report(self, outcome: SaveResult | None) -> None:
        """Log the result of a save; rank 0 only."""
        if outcome is None or not self._reports:
            return
        update = outcome.update
        if outcome.failure is not None:
            self._recorder.event("checkpoint_failed", update=update, reason=outcome.failure)
            self._recorder.write(
                f"checkpoint after update {update} could NOT be written: {outcome.failure}; "
                f"the newest one is that of before, and the next interval tries again"
            )
            return
        seconds, held_up = round(outcome.seconds, 3), round(outcome.held_up, 3)
        self._recorder.event("checkpoint", update=update, seconds=seconds, held_up=held_up)
        if outcome.retention is not None:
            self._recorder.event("retention_failed", update=update, reason=outcome.retention)
            self._recorder.write(f"an old checkpoint could not be deleted: {outcome.retention}; make room by hand")
        self._lead_time.save(outcome.seconds)
        for name, lead in self._lead_time.short().items():
            needed = self._lead_time.needed or 0.0
            self._recorder.event("lead_time_short", setting=name, seconds=lead, needed=round(needed, 1))
            self._recorder.write(
                f"WARNING: stopping takes {needed:.0f} s (95th percentiles of an update and of a save), and {name} gives "
                f"{lead:.0f} s: touch {self._folder.parent}/STOP and submit the run again with more, or with a smaller micro_batch"
            )
