"""A writer whose errors (disk full, read-only, quota) never stop the run: it buffers records in memory and retries."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class RetryingWriter:
    """Appends records to a file in order, and buffers them while writing fails.

    Args:
        path: the file, for messages.
        write: appends one record to it, completely or not at all; raises OSError when writing fails.
        say: called with one line when writing begins to fail, and one when it works again.
    """

    def __init__(self, path: Path, write: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]) -> None:
        self._path = path
        self._write = write
        self._say = say
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._refused = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the buffered records, then this one; keep what cannot be written."""
        self._waiting.append(record)
        self.retry()

    def retry(self) -> bool:
        """Write the buffer, oldest first; True if it is empty."""
        refusal: OSError | None = None
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            refusal = error
        if (refusal is not None) != self._refused:
            self._refused = refusal is not None
            self._say(
                f"{self._path} can be written again"
                if refusal is None
                else f"{self._path} cannot be written ({refusal.strerror or refusal}); "
                "the run continues, and keeps the lines in memory until it can"
            )
        return refusal is None

    def close(self) -> None:
        """Try once more; records that still cannot be written are lost, and a line says so."""
        if not self.retry():
            self._say(f"{self._path}: the last {len(self._waiting)} lines could not be written")
