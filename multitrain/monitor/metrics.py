"""`metrics.jsonl`: one object an update, in order, each update once, whatever interrupted the run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.monitor import jsonl


class Metrics:
    """Appends one line an update. Opening it at a resume drops what the run is about to do again.

    Args:
        path: the file, e.g. ``RUN/metrics.jsonl``.
        start_update: updates completed; lines with ``"update"`` (counted from 0) at or above it are dropped.
        sync_seconds: seconds between forced writes to disk.
    """

    def __init__(self, path: str | Path, *, start_update: int = 0, sync_seconds: float = 30.0) -> None:
        self.path = Path(path)
        self.dropped = jsonl.drop_from(self.path, start_update)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._sync_seconds = sync_seconds
        self._synced = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; `record` has ``"update"``, from 0.

        Raises:
            OSError: the disk refuses the line; nothing of it is left in the file.
            LeaseLost: another start of the run has taken over.
        """
        lease.verify(self.path)
        jsonl.write(self._file.fileno(), jsonl.encode(record))
        if time.monotonic() - self._synced > self._sync_seconds:
            with contextlib.suppress(OSError):  # the line is written; the next forced write, at a checkpoint, says so
                self.sync()

    def sync(self) -> None:
        """Wait until every line is on disk, so that a checkpoint never outlives the lines before it."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Write everything to disk and close the file. Closing twice is fine."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file in the order written; empty when there is none."""
    return list(jsonl.read(Path(path)))
