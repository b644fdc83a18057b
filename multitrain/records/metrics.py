"""`metrics.jsonl`: one object per update, in order, each update once, also after interruptions."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.records import jsonl

SYNC_SECONDS = 30.0
"""Seconds between two syncs to disk."""


class Metrics:
    """Appends one line per update. Opening it at a resume drops the lines of updates that will be done again.

    Args:
        path: the file, e.g. ``RUN/metrics.jsonl``.
        start_update: updates completed; lines with ``"update"`` (counted from 0) at or above it are dropped.
    """

    def __init__(self, path: str | Path, *, start_update: int = 0) -> None:
        self.path = Path(path)
        self.dropped = jsonl.drop_from(self.path, start_update)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._synced = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; `record` has ``"update"``, from 0.

        Raises:
            OSError: the line cannot be written; no part of it is left in the file.
            LeaseLost: another start of the run has taken over.
        """
        lease.verify(self.path)
        jsonl.write(self._file.fileno(), jsonl.encode(record))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            with contextlib.suppress(OSError):  # the line is written; the sync at the next checkpoint reports the error
                self.sync()

    def sync(self) -> None:
        """Sync the file, so that a checkpoint's updates are never missing in the metrics."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close the file. Idempotent."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file in the order written; empty when there is none."""
    return list(jsonl.read(Path(path)))
